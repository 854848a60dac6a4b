"""Drawing text from a causal network: what a request says, how the next token is chosen, and the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from genscale.models.layers import KeyValueCache
from genscale.runtime.randomness import Rng


@dataclass(frozen=True)
class TextRequest:
    """Text that is asked of an objective, all in tokens; one sample for each prompt.

    The seed, and each row's number in it, are in the ``Rng`` that is given beside it.
    """

    prompts: Sequence[Sequence[int]]
    """Each at least one token long."""
    tokens: int
    """The most new tokens for each prompt."""
    suffixes: Sequence[Sequence[int]] | None = None
    """What comes after the new tokens, for objectives that fill in."""
    beginnings: Sequence[Sequence[int] | None] | None = None
    """For each prompt the tokens that the first new one is chosen from; None for all. Left-to-right writing only."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    ends: tuple[int, ...] = ()
    """Tokens that end a sample."""
    steps: int | None = None
    """Masked diffusion: network calls for each sample; by default one a token."""
    order: Literal["random", "confidence"] = "random"
    """Masked diffusion: which tokens are unmasked first."""
    watch: Callable[[int, int], bool] | None = None
    """Called with each row and its next token, in order; true stops the row (stop strings, streaming)."""


class TextSample(NamedTuple):
    tokens: list[int]
    """The new tokens, without the one that ended them."""
    stopped: Literal["length", "end", "watch"]
    """By the number of tokens, by an end token, or by the request's ``watch``."""


class Filling(NamedTuple):
    """How a causal network is asked to fill in: ``before prefix between suffix after``, and then it writes."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    """Sentinels that end what is filled in."""


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before (CTRL, Keskar et al. 2019, section 4.1).

    logits: (rows, vocabulary); seen: (rows, vocabulary) bool.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(rows, vocabulary): all but the k largest become -inf."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(rows, vocabulary): the fewest tokens that hold the probability p together (Holtzman et al. 2020)."""
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """(rows, vocabulary): tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def choose(logits: Tensor, request: TextRequest, seen: Tensor | None, uniform: Tensor) -> Tensor:
    """The next token of each row, as the request asks; filters come in the order of ``transformers``.

    Args:
        logits: (rows, vocabulary) fp32, -inf for what must not come.
        seen: (rows, vocabulary) bool, needed for a repetition penalty.
        uniform: (rows,) in [0, 1); the choice is a function of it.
    """
    if seen is not None and request.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, request.repetition_penalty)
    if request.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / request.temperature
    if request.top_k is not None:
        logits = keep_top_k(logits, request.top_k)
    if request.top_p is not None:
        logits = keep_top_p(logits, request.top_p)
    if request.min_p is not None:
        logits = keep_min_p(logits, request.min_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # The first token whose cumulative probability passes the draw: never one of probability 0.
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


def seen_tokens(texts: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """(rows, vocabulary) bool: the tokens that occur in each text."""
    seen = torch.zeros(len(texts), vocabulary, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, list(text)] = True
    return seen.to(device)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[torch.device]:
    """Without gradients, dropout or compiled code; gives the network's device.

    A network compiled for training would be compiled anew for the length of every prompt and of the cache.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield next(network.parameters()).device
    finally:
        network.train(was_training)


class Transcript:
    """What has been written for each row, until it stops."""

    def __init__(self, request: TextRequest, limits: Sequence[int], ends: Iterable[int] = ()):
        """``limits``: the most tokens for each row. ``ends``: end tokens besides the request's."""
        self._watch = request.watch
        self._limits = limits
        self._ends = {*request.ends, *ends}
        self._tokens: list[list[int]] = [[] for _ in request.prompts]
        self._stopped: list[Literal["length", "end", "watch"] | None] = [None] * len(request.prompts)

    def stopped(self, row: int) -> bool:
        return self._stopped[row] is not None

    def take(self, row: int, token: int) -> None:
        """The row's next token; nothing once the row has stopped."""
        if self._stopped[row] is not None:
            return
        if token in self._ends:
            self._stopped[row] = "end"
            return
        self._tokens[row].append(token)
        if self._watch is not None and self._watch(row, token):
            self._stopped[row] = "watch"
        elif len(self._tokens[row]) == self._limits[row]:
            self._stopped[row] = "length"

    def samples(self) -> list[TextSample]:
        return [TextSample(tokens, why or "length") for tokens, why in zip(self._tokens, self._stopped, strict=True)]


def decode(
    network: nn.Module,
    request: TextRequest,
    rng: Rng,
    context: int,
    vocabulary: int,
    filling: Filling | None = None,
) -> list[TextSample]:
    """Write token after token, each from those before it, with a key-value cache.

    Prompts of different length are padded on the left, and rows that have stopped leave the batch. When a row fills the
    context, the last half of it is read anew and writing goes on; a filling ends there instead. Draws are keyed by row
    and number of the token, so what a row says does not depend on the rows beside it.

    Args:
        network: a causal one; gives logits (rows, time, at least vocabulary).
        context: the most tokens that it sees at once.
        vocabulary: ids from here on are never written.
        filling: write between each prompt and its suffix, or an empty one, instead of after each prompt.
    """
    if filling is None:
        texts = [list(prompt[-context:]) for prompt in request.prompts]
        limits = [request.tokens] * len(texts)
    else:
        texts = _arranged(request, context, filling)
        limits = [min(request.tokens, context + 1 - len(text)) for text in texts]
    if not all(texts):
        raise ValueError("a prompt needs at least one token")
    sentinels = filling.ends if filling else ()
    transcript = Transcript(request, limits, sentinels)
    first = [0] * len(texts)  # where the part of each text begins that the network sees
    rows = list(range(len(texts)))  # those still being written
    cache: KeyValueCache | None = None
    forbidden = seen = None
    with evaluating(network) as device:
        for number in range(request.tokens):
            if cache is None or cache.length == context:
                for row in rows:
                    if len(texts[row]) - first[row] > context:
                        first[row] = len(texts[row]) - max(1, context // 2)
                tokens, cache = _padded([texts[row][first[row] :] for row in rows], device)
            else:
                tokens = torch.tensor([texts[row][-1:] for row in rows], device=device)  # (rows, 1)
            logits = network(tokens, cache=cache)[:, -1].float()  # (rows, ids)
            if forbidden is None:
                forbidden = torch.arange(logits.shape[1], device=device) >= vocabulary
                forbidden[list(sentinels)] = False
                seen = seen_tokens(texts, logits.shape[1], device) if request.repetition_penalty != 1 else None
            uniform = rng.uniform(f"token {number}").to(device)[rows]
            logits = logits.masked_fill(forbidden, -torch.inf)
            if number == 0 and request.beginnings is not None:
                logits = _only(logits, request.beginnings)
            chosen = choose(logits, request, None if seen is None else seen[rows], uniform)
            if seen is not None:
                seen[rows, chosen] = True
            for row, token in zip(rows, chosen.tolist(), strict=True):
                texts[row].append(token)
                transcript.take(row, token)
            going_on = [place for place, row in enumerate(rows) if not transcript.stopped(row)]
            if not going_on:
                break
            if len(going_on) < len(rows):
                cache.keep(torch.tensor(going_on, device=device))
                rows = [rows[place] for place in going_on]
    return transcript.samples()


def _only(logits: Tensor, allowed: Sequence[Sequence[int] | None]) -> Tensor:
    """Each row's logits where it allows them, minus infinity elsewhere."""
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in enumerate(allowed):
        if tokens is not None:
            excluded[row] = True
            excluded[row, list(tokens)] = False
    return logits.masked_fill(excluded, -torch.inf)


def _padded(texts: list[list[int]], device: torch.device) -> tuple[Tensor, KeyValueCache]:
    """(rows, time) tokens, padded on the left, and an empty cache that knows of the padding."""
    longest = max(map(len, texts))
    padding = [longest - len(text) for text in texts]
    tokens = torch.tensor([[0] * count + text for count, text in zip(padding, texts, strict=True)], device=device)
    return tokens, KeyValueCache(start=torch.tensor(padding, device=device) if any(padding) else None)


def _arranged(request: TextRequest, context: int, filling: Filling) -> list[list[int]]:
    """Prompts and suffixes between their sentinels, cut on their outer sides where the context is too short."""
    marks = len(filling.before) + len(filling.between) + len(filling.after)
    room = context + 1 - marks - min(request.tokens, context // 2)
    texts = []
    for prompt, suffix in zip(request.prompts, request.suffixes or [()] * len(request.prompts), strict=True):
        kept = max(room // 2, room - len(prompt))  # of the suffix: what the prompt leaves
        kept_suffix = suffix[:kept]
        kept_prompt = prompt[max(0, len(prompt) - (room - len(kept_suffix))) :]
        texts.append([*filling.before, *kept_prompt, *filling.between, *kept_suffix, *filling.after])
    return texts
