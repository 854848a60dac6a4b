"""The probability of augmentation follows the overfitting signal."""

import copy
import math

import pytest
import torch
from scipy import stats

from genscale.objectives.adaptive import AdaptiveProbability, overfitting_signs
from genscale.recipe.amount import Amount
from genscale.recipe.image_objective import Augmentation
from genscale.runtime.errors import UserError


def adaptive(probability=0.0, target=0.6, speed="1000 samples"):
    return AdaptiveProbability(Augmentation(probability=probability, target=target, speed=Amount.parse(speed)))


def test_it_moves_as_a_simulation_by_hand():
    control = adaptive(0.125)
    # Step: signal and samples. After four steps the mean of the signs is compared with 0.6.
    history = [(1.0, 16), (1.0, 16), (0.5, 16), (0.0, 16)]  # mean 0.625: up by 64 / 1000
    history += [(0.9, 32), (0.5, 32), (0.5, 32), (0.3, 32)]  # mean 0.55: down by 128 / 1000
    history += [(1.0, 10), (0.0, 30), (1.0, 10), (1.0, 10)]  # mean over samples 0.5, over steps 0.75: down by 60 / 1000
    expected = [0.125] * 3 + [0.189] * 4 + [0.061] * 4 + [0.001]
    for (signal, samples), probability in zip(history, expected, strict=True):
        control.update(signal, samples)
        assert control.probability.item() == pytest.approx(probability, abs=1e-6)


def test_it_stays_between_zero_and_one():
    control = adaptive(0.5)
    for signal, bound in ((1.0, 1.0), (-1.0, 0.0)):
        for _ in range(40):
            control.update(signal, 100)
        assert control.probability.item() == bound


def test_from_none_to_all_takes_the_speed():
    control = adaptive(speed="6400 samples")
    for step in range(100):
        assert control.probability < 1, step
        control.update(0.9, 64)
    assert control.probability.item() == pytest.approx(1.0)


def test_it_settles_where_the_signal_meets_the_target():
    control = adaptive(speed="20k samples")
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(1500):
        signal = 0.9 - 0.5 * control.probability.item()  # augmentation makes the discriminator's life harder
        signs = (torch.rand(64, generator=generator) < (1 + signal) / 2).float() * 2 - 1
        control.update(signs.mean().item(), 64)
        seen.append(control.probability.item())
    assert sum(seen[500:]) / 1000 == pytest.approx(0.6, abs=0.05)
    assert max(seen[500:]) - min(seen[500:]) < 0.3


def test_it_goes_on_from_its_buffers():
    control = adaptive(0.3)
    for _ in range(6):
        control.update(0.9, 64)
    resumed = adaptive()
    resumed.load_state_dict(copy.deepcopy(control.state_dict()))
    for one in (control, resumed):
        one.update(0.1, 64)
        one.update(0.2, 64)
    assert torch.equal(control.probability, resumed.probability)
    assert {name for name, _ in control.named_buffers()} == {"probability", "gathered"}
    assert not list(control.parameters())


def test_a_signal_that_is_not_finite_is_passed_over():
    control, other = adaptive(0.3), adaptive(0.3)
    for signal in (0.9, math.nan, 0.9, math.inf, 0.9, 0.9):
        control.update(signal, 64)
        if math.isfinite(signal):
            other.update(signal, 64)
    assert torch.equal(control.probability, other.probability)
    assert control.probability > 0.3


def test_signs_of_relativistic_losses_do_not_see_a_constant():
    real, generated = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([1.0, -2.0, 0.5, 4.0])
    assert overfitting_signs(real, generated, relative=False).tolist() == [1, -1, 1, 1]
    assert overfitting_signs(real, generated, relative=True).tolist() == [1, 1, 0, -1]
    assert torch.equal(overfitting_signs(real - 10, generated - 10, True), overfitting_signs(real, generated, True))


def test_the_target_of_paired_signs_that_corresponds_to_the_papers():
    logits = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(1)).double()
    shift = stats.norm.ppf(0.8)  # sign(D(real)) has the mean 0.6
    real, generated = logits[0] + shift, logits[1] - shift
    assert overfitting_signs(real, generated, relative=False).mean().item() == pytest.approx(0.6, abs=0.005)
    assert overfitting_signs(real, generated, relative=True).mean().item() == pytest.approx(0.77, abs=0.005)


@pytest.mark.parametrize("speed", ["0 samples", "3%", "2 epochs"])
def test_a_speed_that_is_no_number_of_samples_is_refused(speed):
    with pytest.raises(UserError, match=r"objective\.augmentation\.speed: expected .* not '"):
        adaptive(speed=speed)
