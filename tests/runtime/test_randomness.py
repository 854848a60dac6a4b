"""Randomness is a pure function of what it is for, and random."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from genscale.runtime.randomness import Rng, generator, key


def splitmix64(seed: int, count: int) -> list[int]:
    """The reference generator of Steele, Lea and Flood 2014, in Python integers."""
    wrap = (1 << 64) - 1
    numbers = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & wrap
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        numbers.append(z ^ (z >> 31))
    return numbers


def unsigned(values: torch.Tensor) -> list[int]:
    return [value % (1 << 64) for value in values.flatten().tolist()]


def test_each_sample_is_a_splitmix64_stream() -> None:
    rng = Rng(1, 2, "train", torch.tensor([7]))
    mix = splitmix64  # mix(x) is the first output of the stream that starts at x - gamma
    gamma, wrap = 0x9E3779B97F4A7C15, (1 << 64) - 1
    inner = mix((7 * gamma + key(1, 2, "train") - gamma) & wrap, 1)[0]
    start = mix((inner + key("noise") - gamma) & wrap, 1)[0]
    assert unsigned(rng.bits("noise", (5,))) == mix(start, 5)


def test_draws_do_not_depend_on_the_micro_batch_a_sample_falls_in() -> None:
    whole = Rng(0, 5, "train", torch.arange(8)).normal("noise", (3, 4))
    parts = [Rng(0, 5, "train", torch.arange(start, start + 2)).normal("noise", (3, 4)) for start in (0, 2, 4, 6)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    "other",
    [
        Rng(1, 5, "train", torch.arange(4)),
        Rng(0, 6, "train", torch.arange(4)),
        Rng(0, 5, "validate", torch.arange(4)),
        Rng(0, 5, "train", torch.arange(4) + 4),
    ],
    ids=["seed", "step", "phase", "position"],
)
def test_every_part_of_the_key_matters(other: Rng) -> None:
    one = Rng(0, 5, "train", torch.arange(4))
    assert not torch.isin(one.bits("noise", (64,)), other.bits("noise", (64,))).any()
    assert not torch.isin(one.bits("noise", (64,)), one.bits("mask", (64,))).any()


def test_distributions() -> None:
    rng = Rng(3, 1, "train", torch.arange(64))
    assert stats.kstest(rng.uniform("u", (1000,)).flatten().double().numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(rng.normal("n", (1000,)).flatten().double().numpy(), "norm").pvalue > 1e-4
    counts = torch.bincount(rng.integers("i", 10, (1000,)).flatten(), minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    uniform = rng.uniform("u", (1000,))
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_samples_are_uncorrelated() -> None:
    noise = Rng(0, 0, "train", torch.arange(32)).normal("noise", (4096,)).double()
    correlation = torch.corrcoef(noise) - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_keys_are_the_same_on_every_machine() -> None:
    assert key(0, "model.embedding.weight") == 7092286603443115285
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))
    assert not torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "b")))


def test_spread_draws_cover_the_unit_interval_evenly_at_every_step_and_are_kept_by_position() -> None:
    steps = torch.stack([Rng(0, step, "train", torch.arange(64)).spread("time") for step in range(200)])
    ordered = steps.sort(dim=1).values
    assert (ordered - (torch.arange(64) + 0.5) / 64).abs().max() < 2.5 / 64  # separate draws are off by 0.17
    assert stats.kstest(steps[:, 5].double().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(Rng(0, 3, "train", torch.arange(40, 64)).spread("time"), steps[3, 40:])
