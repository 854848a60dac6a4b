"""The learned uncertainty finds each noise level's own error."""

import torch

from genscale.objectives.uncertainty import Uncertainty


def test_uncertainty_learns_the_logarithm_of_the_error_at_each_level():
    uncertainty = Uncertainty()
    levels = torch.linspace(0, 1, 64)
    errors = 0.02 + 0.5 * levels**2
    assert torch.equal(uncertainty(levels), torch.zeros(64))
    optimizer = torch.optim.Adam(uncertainty.parameters(), 0.02)
    for _ in range(400):
        u = uncertainty(levels)
        loss = (errors / u.exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (uncertainty(levels) - errors.log()).abs().max() < 0.3


def test_every_instance_has_the_same_features_and_keeps_none_in_a_checkpoint():
    one, two = Uncertainty(), Uncertainty()
    assert torch.equal(one.frequencies, two.frequencies)
    assert list(one.state_dict()) == ["weight"]
