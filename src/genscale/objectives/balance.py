"""Which of the two players of a GAN is ahead, as running means, and when that is something to look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_HALF_LIFE = 2000
"""Images after which what was measured counts half."""
_SETTLED = 10_000
"""Images before which nothing is a concern: every generator begins with images that all look alike."""

_COLLAPSED = 0.1
_ALWAYS_RIGHT = 0.99
_FAR_APART = 5.0
"""Logits at which a softplus or hinge has hardly any slope left. Under strong penalties a discriminator may well be
always right by a little, and the game goes on."""
_OFTEN_WRONG = -0.25
_DIVERGED = 100.0


def spread(fake: Tensor, real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far apart images are, generated and real: two sums of squared distances over the same pairs. Their quotient
    is 0 for a generator that draws one image only, and 1 for one that draws as many kinds as there are.

    Pairs are of one class; others weigh a thousandth, and so speak only where a batch has no two images of a class.
    They are within a micro-batch: this is for looking at, never for a loss. Of one image alone both sums are 0.

    Args:
        fake: (batch, channels, height, width).
        real: the same.
        labels: (batch,) int64, the class of either; None: there are none.
    """
    one, other = slice(1, None), slice(None, -1)
    if labels is None:
        weights = fake.new_ones(len(fake) - 1)
    else:
        order = labels.argsort(stable=True)  # so that neighbours are of one class
        fake, real, labels = fake[order], real[order], labels[order]
        weights = torch.where(labels[one] == labels[other], 1.0, 1e-3)
    sums = [(weights * (images[one] - images[other]).square().sum(dim=(1, 2, 3))).sum() for images in (fake, real)]
    return sums[0], sums[1]


class Balance(nn.Module):
    """Running means over training of what tells the players' state; its buffers are kept with the run's controls.

    Args:
        signs: whether a discriminator that is always right is a concern (a Wasserstein critic may be).
    """

    real_logit: Tensor
    gap: Tensor
    sign: Tensor
    diversity: Tensor
    seen: Tensor
    """Images that went into the means."""

    def __init__(self, signs: bool):
        super().__init__()
        self.signs = signs
        for name in ("real_logit", "gap", "sign", "diversity"):
            self.register_buffer(name, torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))

    def observe(self, samples: int, **measured: float) -> None:
        """Take in a step of ``samples`` images.

        Args:
            measured: ``real_logit``, the discriminator's mean at real images; ``gap``, how far it is above the one at
                generated images; ``sign``, the mean sign of its judgement: 1 always right, -1 always wrong;
                ``diversity``, of generated images, in units of that of real ones. What is not finite is passed over.
        """
        self.seen += samples
        # At first a plain mean, so that no beginning value counts.
        share = max(1 - 0.5 ** (samples / _HALF_LIFE), samples / int(self.seen))
        for name, value in measured.items():
            if math.isfinite(value):
                mean = getattr(self, name)
                mean += share * (value - mean)

    def concerns(self) -> dict[str, str]:
        """What a person should look at, and what to try."""
        if self.seen < _SETTLED:
            return {}
        found = {}
        diversity, sign, gap = self.diversity.item(), self.sign.item(), self.gap.item()
        if diversity < _COLLAPSED:
            found["collapse"] = (
                f"the generator collapses: its images differ {diversity:.2g} times as much as real ones (squared"
                " distance, within a class); try objective.loss=relativistic, a larger objective.r1 and objective.r2,"
                " or a lower learning rate"
            )
        if (self.signs and sign > _ALWAYS_RIGHT and gap > _FAR_APART) or abs(gap) > _DIVERGED:
            found["discriminator_wins"] = (
                f"the discriminator wins: it is right about {50 + 50 * sign:.1f}% of images, its logits {gap:.3g}"
                " apart; try a larger objective.r1 and objective.r2, objective.augmentation with target: 0.6, more"
                " images, or fewer channels in model.discriminator"
            )
        elif sign < _OFTEN_WRONG:
            found["generator_wins"] = (
                f"the generator wins: the discriminator is right about only {50 + 50 * sign:.0f}% of images; try a"
                " smaller objective.r1 and objective.r2, more channels in model.discriminator, or weaker"
                " objective.augmentation"
            )
        return found
