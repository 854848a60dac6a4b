"""The probability of augmentation follows a discriminator's overfitting (ADA, Karras et al. 2020, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genscale.recipe.amount import Clock
from genscale.recipe.image_objective import Augmentation
from genscale.runtime.errors import UserError

_INTERVAL = 4
"""Steps between two moves (the paper's N): a single batch tells little about a mean of signs."""


def overfitting_signs(real: Tensor, generated: Tensor, relative: bool) -> Tensor:
    """(batch,) -1, 0 or 1, whose mean is the paper's r_t: 0 without overfitting, 1 when it is complete.

    The paper's sign(D(real)) needs logits with a meaningful zero, which the non-saturating and hinge losses give them.
    Relativistic and Wasserstein losses see differences of logits only: a constant added to all of them changes nothing,
    and their zero drifts. What can be asked of them is how often a real image scores above a generated one, as the code
    of R3GAN does: sign(D(real) - D(generated)). Where both logits are normal, equally wide, and as far from zero on
    either side, the paper's target of 0.6 is a target of 0.77 in these signs.

    Args:
        real: (batch,) logits of real images, as the discriminator was shown them: augmented.
        generated: (batch,) logits of generated ones.
        relative: whether the loss sees differences only.
    """
    return torch.sign(real - generated if relative else real)


class AdaptiveProbability(nn.Module):
    """Holds the overfitting signal at ``options.target`` by augmenting more when it is above, less when below.

    Every four steps the probability moves by samples / speed, up or down, within 0 and 1. Its state is in buffers: it
    is checkpointed, and a resumed run adapts as one that never stopped.

    Raises:
        UserError: the speed is not in samples, or none.
    """

    probability: Tensor
    """Scalar float32, for :func:`genscale.objectives.augmentation.augment`."""
    gathered: Tensor
    """(3,) float32 since the last move: sum of signs, samples, steps."""

    def __init__(self, options: Augmentation):
        super().__init__()
        assert options.target is not None
        self.target = options.target
        try:
            self.speed = options.speed.samples(Clock())
        except ValueError:
            self.speed = 0
        if self.speed < 1:
            raise UserError(
                f"objective.augmentation.speed: expected an amount such as '500k samples', not '{options.speed}'"
            )
        self.register_buffer("probability", torch.tensor(options.probability))
        self.register_buffer("gathered", torch.zeros(3))

    @torch.no_grad()
    def update(self, signal: float, samples: int) -> None:
        """Take in a step.

        Args:
            signal: the mean of :func:`overfitting_signs` over the step; one that is not finite is passed over.
            samples: real images in the step.
        """
        if not math.isfinite(signal):
            return
        self.gathered += self.gathered.new_tensor((signal * samples, samples, 1))
        signs, seen, steps = self.gathered.unbind()
        due = steps >= _INTERVAL
        self.probability += torch.sign(signs / seen - self.target) * (seen / self.speed) * due
        self.probability.clamp_(0, 1)
        self.gathered *= ~due
