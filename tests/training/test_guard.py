"""The guard on made-up series of losses."""

import json
import math
import random

import pytest

from genscale.recipe.training import Guard as GuardRecipe
from genscale.training.guard import Guard, Verdict

GOOD, SKIP, ROLLBACK, GIVE_UP = Verdict.GOOD, Verdict.SKIP, Verdict.ROLLBACK, Verdict.GIVE_UP


def noise(seed: int, count: int, level: float = 3.0, spread: float = 0.05) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(level, spread) for _ in range(count)]


def watched(losses: list[float], start: int = 0, **settings) -> tuple[Guard, list[Verdict]]:
    guard = Guard(GuardRecipe(**settings))
    return guard, [guard.observe(start + step, loss, 1.0) for step, loss in enumerate(losses)]


def test_ordinary_training_is_left_alone():
    falling = [2.0 + 6.0 * math.exp(-step / 40) + wobble for step, wobble in enumerate(noise(0, 2000, 0.0, 0.05))]
    _, verdicts = watched(falling)
    assert set(verdicts) == {GOOD}


def test_tiny_noise_late_in_training_is_no_spike():
    losses = noise(0, 100, 2.0, 1e-5)
    _, verdicts = watched([*losses, 2.01, 1.99, 2.05])
    assert set(verdicts) == {GOOD}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_bad_from_the_first_step(loss, norm):
    assert Guard(GuardRecipe()).observe(0, loss, norm) is SKIP


def test_a_spike_is_skipped_and_leaves_no_mark():
    losses = noise(1, 100)
    guard, verdicts = watched([*losses[:60], 4.5, *losses[60:]])
    assert [step for step, verdict in enumerate(verdicts) if verdict is not GOOD] == [60]
    assert verdicts[60] is SKIP
    assert 4.5 not in guard.state()["losses"]
    assert guard.skipped == set()


def test_the_threshold_is_in_standard_deviations_of_the_window():
    losses = [2.0, 4.0] * 32  # mean 3, standard deviation 1 (64 values: 1.008)
    assert watched([*losses, 9.03], spike=6.0)[1][-1] is GOOD
    assert watched([*losses, 9.06], spike=6.0)[1][-1] is SKIP
    assert watched([*([50.0] * 64), *losses, 9.06], spike=6.0, window=64)[1][-1] is SKIP  # older losses are forgotten


def test_spikes_need_some_history():
    assert watched([*noise(2, 15), 90.0])[1][-1] is GOOD
    assert watched([*noise(2, 16), 90.0])[1][-1] is SKIP
    assert watched([*noise(2, 8), 90.0], window=8)[1][-1] is SKIP


def test_without_a_spike_setting_only_what_is_not_finite_is_bad():
    assert watched([*noise(3, 100), 1e6, math.nan], spike=None)[1][-2:] == [GOOD, SKIP]


def test_the_loss_of_a_player_may_rise_unless_the_recipe_says_otherwise():
    losses = [*noise(3, 100), 1e6]
    for spike, competes, verdict in (
        ("auto", False, SKIP),
        ("auto", True, GOOD),
        (6.0, True, SKIP),
        (None, False, GOOD),
    ):
        guard = Guard(GuardRecipe(spike=spike), competes)
        assert [guard.observe(step, loss, 1.0) for step, loss in enumerate(losses)][-1] is verdict
    with pytest.raises(ValueError, match="spike"):
        GuardRecipe(spike=0)


def test_patience_in_a_row_goes_back_and_passes_over_what_led_up_to_it():
    guard, verdicts = watched([*noise(4, 200), 9.0, 9.0, 9.0], patience=3, window=64)
    assert verdicts[200:] == [SKIP, SKIP, ROLLBACK]
    assert guard.trusted_until == 200 - 64
    assert guard.skipped == set(range(200 - 64, 203))


def test_a_good_step_in_between_starts_the_count_again():
    _, verdicts = watched([*noise(4, 100), 9.0, 9.0, 3.0, 9.0, 9.0, 3.0], patience=3)
    assert verdicts[100:] == [SKIP, SKIP, GOOD, SKIP, SKIP, GOOD]


def go_back(guard: Guard, checkpoint: dict) -> None:
    """As the loop does it."""
    memory = json.loads(json.dumps(guard.memory()))
    guard.load(json.loads(json.dumps(checkpoint)))
    guard.remember(memory)


def test_going_back_restores_the_losses_but_not_the_memory():
    guard, _ = watched(noise(5, 100))
    checkpoint = guard.state()
    for step in range(100, 150):
        guard.observe(step, 2.9, 1.0)
    verdicts = [guard.observe(step, math.nan, 1.0) for step in range(150, 153)]
    assert verdicts[-1] is ROLLBACK
    go_back(guard, checkpoint)
    assert guard.state()["losses"] == checkpoint["losses"]
    assert guard.rollbacks == 1
    assert guard.trusted_until is None
    assert guard.skipped == set(range(150 - 64, 153))
    guard.remember(guard.memory())  # again, after a restart
    assert guard.rollbacks == 1


def test_a_checkpoint_from_amid_bad_steps_does_not_count_them_again():
    guard, _ = watched([*noise(6, 100), 9.0, 9.0], patience=3)
    amid = guard.state()
    assert guard.observe(102, 9.0, 1.0) is ROLLBACK
    go_back(guard, amid)
    assert guard.observe(103, 9.0, 1.0) is SKIP


@pytest.mark.parametrize("level", [9.0, math.nan])
@pytest.mark.parametrize("rollbacks", [0, 1, 3])
def test_a_loss_that_stays_bad_ends_in_giving_up(level, rollbacks):
    guard, _ = watched(noise(7, 300), rollbacks=rollbacks, patience=3)
    checkpoint, reaches = guard.state(), []
    step = 300
    for _ in range(1000):
        verdict = guard.observe(step, level, 1.0)
        step += 1
        if verdict is ROLLBACK:
            reaches.append(step - 3 - guard.trusted_until)
            go_back(guard, checkpoint)
        if verdict is GIVE_UP:
            break
    assert verdict is GIVE_UP
    assert step == 300 + 3 * (rollbacks + 1)
    assert reaches == [64 * (time + 1) for time in range(rollbacks)]  # each time further back


def test_a_resumed_guard_takes_the_same_decisions():
    losses = noise(8, 300)
    for step in (50, 51, 120, 200, 201, 202, 250):
        losses[step] = 8.0
    guard, verdicts = watched(losses)
    assert {SKIP, ROLLBACK} < set(verdicts)
    for cut in (10, 51, 121, 202, 203):
        first, before = watched(losses[:cut])
        second = Guard(GuardRecipe())
        second.load(json.loads(json.dumps(first.state())))
        after = [second.observe(step, losses[step], 1.0) for step in range(cut, 300)]
        assert before + after == verdicts
        assert second.state() == guard.state()
