"""The loss on held-out data."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from genscale.objectives.objective import Objective
from genscale.runtime.randomness import Rng
from genscale.runtime.world import World, all_reduce_sum


class Sweep(Protocol):
    """What scoring needs of a stream."""

    def sweep(self, batch: int, limit: int | None) -> Iterator[Any]: ...


def held_out(
    objective: Objective,
    stream: Sweep,
    *,
    seed: int,
    batch: int,
    limit: int | None = None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    world: World | None = None,
    data: World | None = None,
) -> dict[str, float]:
    """Each metric of ``objective.validate`` over a split: the sum over all its samples, divided once.

    The noise of a sample (masking, rearranging) is a pure function of the seed and the sample's number, so that scores
    at different steps compare, and do not depend on the batch size or the number of ranks.

    Args:
        batch: samples that go through the networks at once, on each rank.
        limit: how many samples of the split to score, spread over it; by default all.
        autocast: makes the context that the network runs in.
        world: ranks that share the work; all of them get the result.
        data: this process's place among those that have different samples, where not all have; the others share each
            sample's loss, or have the same.
    """
    world = world or World()
    data = data or world
    sums: dict[str, list[Tensor]] = defaultdict(list)  # of each pass: the sum's elements, then the count
    shapes: dict[str, torch.Size] = {}
    was_training = objective.training
    objective.eval()
    batches = stream.sweep(batch, limit)
    # Not inference_mode: tables that a network makes at its first use could then not be used in training.
    with torch.no_grad(), autocast():
        while several := list(itertools.islice(batches, data.size)):
            # At the end a rank may be left without a batch of its own; it runs another's for nothing, because
            # collectives inside the network wait for every rank.
            idle = data.rank >= len(several)
            own = several[0 if idle else data.rank].to(device)
            loss = objective.validate(own, Rng(seed, 0, "validate", own.positions))
            for name, metric in loss.metrics.items():
                total, count = (part.detach().float() for part in metric)
                shapes[name] = total.shape
                sums[name].append(torch.cat([total.reshape(-1), count.reshape(1)]) * (not idle))
    objective.train(was_training)
    totals = {name: torch.stack(parts).cpu().double().sum(0) for name, parts in sums.items()}
    all_reduce_sum(totals.values(), world)
    return objective.scores({name: (total[:-1] / total[-1]).view(shapes[name]) for name, total in totals.items()})


def bits_per_byte(nats_per_token: float, tokens: int, bytes: int) -> float:
    """The loss in bits for each byte of text, which compares across tokenizers.

    Args:
        nats_per_token: the mean loss.
        tokens: how many tokens the text has, with its end-of-document tokens.
        bytes: how many UTF-8 bytes the same text has.
    """
    return nats_per_token * tokens / (math.log(2) * bytes)
