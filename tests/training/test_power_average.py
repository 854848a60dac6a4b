"""Averages with power-function profiles against their definition, and averages put together against tracked ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from genscale.cli.average import average
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.training import loop
from genscale.training.average_snapshots import Snapshot, drop_later, read_snapshots, snapshots_of, write_snapshot
from genscale.training.power_average import PowerAverage, gamma_of
from genscale.training.reconstruction import Profile, average_of, fit, inner_products, reconstruct
from genscale.training.restore import load_objective
from genscale.training.run import train

BATCH = 16
LENGTHS = (0.05, 0.10)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)


def walk(net: nn.Module, steps: range, after_step: Callable[[int], None]) -> None:
    """A trajectory like training's: it drifts, ever more slowly, and wanders about."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.05 / math.sqrt(step + 1) + 0.02 * noise).to(parameter.dtype)
        after_step(step)


def numeric(profile: Profile, points: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints over [0, 1] and the profile's density there."""
    tau = (np.arange(points) + 0.5) / points
    gamma = gamma_of(profile.length)
    return tau, np.where(tau <= profile.time, (gamma + 1) * tau**gamma / profile.time ** (gamma + 1), 0.0)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_length_is_the_standard_deviation_of_its_profile(length: float) -> None:
    tau, density = numeric(Profile(length, 1.0))
    weights = density / density.sum()
    mean = (weights * tau).sum()
    assert math.sqrt((weights * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-5)


def test_the_lengths_of_the_paper() -> None:
    """Karras et al. 2024, section 3.1: gamma 6.94 is a length of 0.10, and 16.97 one of 0.05."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(12**-0.5) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, math.nan])
def test_a_length_that_no_profile_has_is_refused(length: float) -> None:
    with pytest.raises(UserError, match=r"between 0 and 0\.289"):
        gamma_of(length)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.10, 0.25])
@pytest.mark.parametrize("batches", [[BATCH] * 300, [8] * 100 + [64] * 50 + [1] * 30])
def test_the_recursion_is_the_weighted_sum_of_all_weights(length: float, batches: list[int]) -> None:
    net = network()
    average = PowerAverage(net, [length])
    history: list[Tensor] = []

    def after_step(step: int) -> None:
        average.update(batches[step])
        history.append(net[0].weight.detach().double().clone())

    walk(net, range(len(batches)), after_step)
    power = gamma_of(length) + 1
    ends = np.cumsum(batches, dtype=np.float64)
    begins = ends - batches
    shares = (ends / ends[-1]) ** power - (begins / ends[-1]) ** power  # the integral of the profile over each step
    expected = sum(share * weight for share, weight in zip(shares.tolist(), history, strict=True))
    assert average.samples == ends[-1]
    torch.testing.assert_close(average.state["0.weight"].double(), expected, atol=1e-6, rtol=0)


def test_initial_weights_count_for_nothing_and_a_constant_stays_what_it_is() -> None:
    net = network()
    average = PowerAverage(net, LENGTHS)
    with torch.no_grad():
        net[0].weight.fill_(0.1)
    for _ in range(1000):
        average.update(BATCH)
    for name, tensor in average.snapshot().items():
        if name.endswith("0.weight"):
            assert torch.equal(tensor, torch.full((4, 3), 0.1)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_shows_the_first_length_and_gives_the_weights_back_to_the_bit(dtype: torch.dtype) -> None:
    net = network(dtype)
    average = PowerAverage(net, LENGTHS)
    walk(net, range(20), lambda step: average.update(BATCH))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with average.swapped():
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, average.snapshot()[f"0.05/{name}"].to(dtype))
            assert not torch.equal(parameter, average.snapshot()[f"0.1/{name}"].to(dtype))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_loaded_average_goes_on_to_the_bit() -> None:
    straight, first, second = network(), network(), network()
    whole, part, resumed = (PowerAverage(net, LENGTHS) for net in (straight, first, second))
    walk(straight, range(40), lambda step: whole.update(BATCH))
    walk(first, range(15), lambda step: part.update(BATCH))
    second.load_state_dict(first.state_dict())
    resumed.load({name: tensor.clone() for name, tensor in part.state.items()})
    walk(second, range(15, 40), lambda step: resumed.update(BATCH))
    assert resumed.samples == whole.samples == 40 * BATCH
    assert resumed.state.keys() == whole.state.keys()
    assert all(torch.equal(tensor, whole.state[name]) for name, tensor in resumed.state.items())


def test_averages_of_other_lengths_are_refused() -> None:
    net = network()
    with pytest.raises(UserError, match=r"no average of '0\.2/0\.weight' of shape \(4, 3\)"):
        PowerAverage(net, [0.05, 0.2]).load(PowerAverage(net, LENGTHS).state)


# Putting together


def test_inner_products_of_profiles_against_numeric_integrals() -> None:
    profiles = [Profile(0.05, 1.0), Profile(0.10, 1.0), Profile(0.05, 0.6), Profile(0.28, 0.6), Profile(0.10, 0.3)]
    found = inner_products(profiles, profiles)
    for row, left in zip(found, profiles, strict=True):
        for value, right in zip(row, profiles, strict=True):
            expected = numeric(left)[1] * numeric(right)[1]
            assert value == pytest.approx(expected.mean(), rel=1e-4, abs=1e-12)
    # The unit of time is the same for all and does not matter, but for the scale.
    in_samples = [profile._replace(time=profile.time * 5000) for profile in profiles]
    np.testing.assert_allclose(inner_products(in_samples, in_samples) * 5000, found, rtol=1e-12)


def test_the_error_of_a_fit_is_that_of_its_profile() -> None:
    profiles = [Profile(length, time) for time in (0.25, 0.5, 0.75, 1.0) for length in LENGTHS]
    target = Profile(0.15, 1.0)
    found = fit(profiles, target)
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-9)
    wanted = numeric(target)[1]
    total = sum(c * numeric(profile)[1] for c, profile in zip(found.coefficients, profiles, strict=True))
    assert found.error == pytest.approx(math.sqrt(((total - wanted) ** 2).mean() / (wanted**2).mean()), rel=1e-3)
    # No other coefficients with that sum do better.
    generator = np.random.default_rng(0)
    for _ in range(20):
        step = generator.normal(size=len(profiles))
        other = found.coefficients + 1e-3 * (step - step.mean())
        worse = sum(c * numeric(profile, 20_000)[1] for c, profile in zip(other, profiles, strict=True))
        coarse = numeric(target, 20_000)[1]
        assert math.sqrt(((worse - coarse) ** 2).mean() / (coarse**2).mean()) > found.error


def tracked(steps: int, snapshots: int, lengths: list[float]) -> tuple[list[Snapshot], dict[float, dict[str, Tensor]]]:
    """Snapshots of averages of LENGTHS, evenly spaced, and averages of other lengths that were tracked all along."""
    net = network()
    kept, others = PowerAverage(net, LENGTHS), PowerAverage(net, lengths)
    taken: list[Snapshot] = []

    def after_step(step: int) -> None:
        kept.update(BATCH)
        others.update(BATCH)
        if (step + 1) % (steps // snapshots) == 0:
            copies = {name: tensor.clone() for name, tensor in kept.snapshot().items()}
            taken.extend(snapshots_of(copies, kept.samples))

    walk(net, range(steps), after_step)
    return taken, {each.length: dict(each.tensors) for each in snapshots_of(others.snapshot(), others.samples)}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor], scale: dict[str, Tensor]) -> float:
    """Root mean square, relative to how far the wanted average is from ``scale``."""
    gap = sum((found[name] - wanted[name]).double().square().sum() for name in wanted)
    return float((gap / sum((scale[name] - wanted[name]).double().square().sum() for name in wanted)).sqrt())


@pytest.mark.parametrize(
    ("length", "bound"),
    [(0.05, 1e-5), (0.03, 0.02), (0.07, 0.005), (0.08, 0.002), (0.15, 0.001), (0.2, 0.01), (0.25, 0.05)],
)
def test_an_average_put_together_is_the_one_that_was_tracked(length: float, bound: float) -> None:
    """With snapshots every 5 % of the run, to a small part of its distance from the average of length 0.06."""
    steps = 800
    snapshots, averages = tracked(steps, snapshots=20, lengths=[length, 0.06])
    found = reconstruct(snapshots, length, steps * BATCH)
    assert found.keys() == dict(network().named_parameters()).keys()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert distance(found, averages[length], averages[0.06]) < bound


def test_more_snapshots_bring_it_closer() -> None:
    steps, length = 960, 0.03
    errors = []
    for count in (5, 10, 20, 40, 80):
        snapshots, averages = tracked(steps, count, [length, 0.05])
        errors.append(distance(reconstruct(snapshots, length, steps * BATCH), averages[length], averages[0.05]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_an_average_of_an_earlier_time() -> None:
    steps = 400
    averages = tracked(steps, snapshots=10, lengths=[0.15, 0.05])[1]
    later = tracked(2 * steps, snapshots=20, lengths=[0.15])[0]
    found = reconstruct([each for each in later if each.samples <= steps * BATCH], 0.15, steps * BATCH)
    assert distance(found, averages[0.15], averages[0.05]) < 0.02


def test_nothing_to_put_together() -> None:
    with pytest.raises(UserError, match="no snapshots"):
        reconstruct([], 0.1, 1000)


# Files


def test_snapshots_come_back_in_the_order_of_time(tmp_path: Path) -> None:
    net = network()
    average = PowerAverage(net, LENGTHS)
    folder = tmp_path / "averages"
    assert read_snapshots(folder, "model") == []
    kept: dict[int, dict[str, Tensor]] = {}

    def after_step(step: int) -> None:
        average.update(BATCH)
        if step % 4 == 3:
            kept[average.samples] = {name: tensor.clone() for name, tensor in average.snapshot().items()}
            write_snapshot(folder, "model", average.samples, average.snapshot())
            write_snapshot(folder, "another-model", average.samples, {"0.05/x": torch.zeros(1)})

    walk(net, range(12), after_step)
    found = read_snapshots(folder, "model")
    assert [(each.samples, each.length) for each in found] == [(n, length) for n in kept for length in LENGTHS]
    for each in found:
        assert dict(each.tensors).keys() == dict(net.named_parameters()).keys()
        for name, tensor in each.tensors.items():
            assert torch.equal(tensor, kept[each.samples][f"{each.length!r}/{name}"])
    assert {each.samples for each in read_snapshots(folder, "model", before=8 * BATCH)} == {4 * BATCH}
    stored = load_file(folder / f"model-{4 * BATCH:012d}.safetensors")
    assert all(torch.equal(tensor, kept[4 * BATCH][name]) for name, tensor in stored.items())


def test_going_back_drops_later_snapshots_and_what_a_kill_left(tmp_path: Path) -> None:
    drop_later(tmp_path / "averages", 0)  # there may be none yet
    for samples in (100, 200, 300):
        for name in ("model", "other"):
            write_snapshot(tmp_path, name, samples, {"0.05/x": torch.zeros(1)})
    (tmp_path / ".model-000000000400.safetensors.17.aside").write_bytes(b"half")
    drop_later(tmp_path, 200)
    expected = [f"{name}-000000000{samples}.safetensors" for name in ("model", "other") for samples in (100, 200)]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_a_kill_amid_writing_leaves_the_snapshot_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(tmp_path, "model", 100, {"0.05/x": torch.ones(3)})

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, "model", 100, {"0.05/x": torch.zeros(3)})
    monkeypatch.undo()
    (snapshot,) = read_snapshots(tmp_path, "model")
    assert torch.equal(snapshot.tensors["x"], torch.ones(3))


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    write_snapshot(tmp_path, "model", 100, {"0.05/x": torch.ones(300)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model-000000000100\.safetensors is damaged"):
        read_snapshots(tmp_path, "model")


# Runs

POWER = {"kind": "power", "lengths": [0.05, 0.1], "snapshot_every": "5%"}
RUN = {
    "training.budget": "40 steps",
    "training.schedule": {"kind": "constant"},
    "training.validation.every": "40 steps",
    "training.early_stopping": None,
}


def test_a_run_put_together_afterwards_is_the_run_that_tracked_it(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    kept = train(recipe(run=str(tmp_path / "kept"), **RUN, **{"training.average": POWER}), show_progress=False)
    other = {**POWER, "lengths": [0.15]}
    tracked_run = train(recipe(run=str(tmp_path / "other"), **RUN, **{"training.average": other}), show_progress=False)
    objective, error = average_of(kept, 0.15, "last", "cpu")
    assert error < 0.01
    found, wanted, first = (
        each.networks["model"].state_dict()
        for each in (objective, load_objective(tracked_run, "last", "cpu"), load_objective(kept, "last", "cpu"))
    )
    assert distance(found, wanted, first) < 0.02
    same = average_of(kept, 0.05, "last", "cpu").objective.networks["model"].state_dict()
    for name, tensor in same.items():
        torch.testing.assert_close(tensor, first[name], atol=1e-5, rtol=0)
    file = tmp_path / "weights.safetensors"
    words = [str(kept.directory), "--length", "0.15", "--checkpoint", "last", "--out", str(file), "--json"]
    said = CliRunner().invoke(average, words, catch_exceptions=False)
    assert json.loads(said.output) == {"out": str(file), "length": 0.15, "profile_error": error}
    stored = load_file(file)
    assert stored.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored.items())


def test_a_run_that_died_and_went_on_ends_with_the_same_snapshots(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **RUN,
        "training.budget": "20 steps",
        "training.average": POWER,
        "training.checkpoints.every": "5 steps",
    }
    straight = train(recipe(run=str(tmp_path / "straight"), **settings), show_progress=False)
    original = loop.keep_snapshots

    def dies(job: Any) -> None:
        original(job)
        if job.progress.step == 13:
            raise ZeroDivisionError

    monkeypatch.setattr(loop, "keep_snapshots", dies)
    with pytest.raises(ZeroDivisionError):
        train(recipe(run=str(tmp_path / "resumed"), **settings), show_progress=False)
    monkeypatch.undo()
    resumed = train(recipe(run=str(tmp_path / "resumed"), **settings), show_progress=False)
    left, right = (sorted((run.directory / "averages").iterdir()) for run in (straight, resumed))
    assert [path.name for path in left] == [f"model-{8 * step:012d}.safetensors" for step in range(1, 21)]
    assert [path.read_bytes() for path in right] == [path.read_bytes() for path in left]


def test_an_exponential_average_has_one_length(recipe: Callable[..., Recipe]) -> None:
    run = train(recipe(**{"training.budget": "2 steps"}), show_progress=False)
    with pytest.raises(UserError, match=r"needs training\.average\.kind 'power' while training, not nothing"):
        average_of(run, 0.1)
