"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genscale.training.average import weights_replaced


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """The network holds y, where gradients are taken; the state holds z, which takes the steps.

    x, the average to be judged and shipped, follows from y = (1 - beta1) z + beta1 x and is computed only where it is
    wanted (:meth:`averaged`). Each step's weight in the average is the square of the largest learning rate so far, so
    that a warm-up counts for less.

    Args:
        groups: parameter groups with ``lr`` and ``weight_decay``; the decay is taken at y.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float):
        defaults = {
            "betas": betas,
            "epsilon": epsilon,
            "steps": 0,
            "weight_sum": 0.0,
            "largest_learning_rate": 0.0,
            "kept_scalars": ("steps", "weight_sum", "largest_learning_rate"),
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            y = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not y:
                continue
            beta1, beta2 = group["betas"]
            learning_rate = group["lr"]
            group["steps"] += 1
            group["largest_learning_rate"] = max(learning_rate, group["largest_learning_rate"])
            weight = group["largest_learning_rate"] ** 2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if weight else 0.0  # c in the paper

            for parameter in y:
                if "z" not in self.state[parameter]:
                    self.state[parameter]["z"] = parameter.detach().clone()
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            z = [self.state[parameter]["z"] for parameter in y]
            squares = [self.state[parameter]["exp_avg_sq"] for parameter in y]
            gradients = [parameter.grad for parameter in y]

            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
            denominators = torch._foreach_div(squares, 1 - beta2 ** group["steps"])
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, group["epsilon"])
            direction: tuple[Tensor, ...] = torch._foreach_div(gradients, denominators)
            if group["weight_decay"]:
                torch._foreach_add_(direction, y, alpha=group["weight_decay"])

            # y follows z and x at once, without x in memory.
            torch._foreach_lerp_(y, z, share)
            torch._foreach_add_(y, direction, alpha=learning_rate * (beta1 * (1 - share) - 1))
            torch._foreach_sub_(z, direction, alpha=learning_rate)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network holds x. Afterwards it holds y to the bit, so that looking never changes training."""
        parameters: list[Tensor] = []
        averages: list[Tensor] = []
        with torch.no_grad():
            for group in self.param_groups:
                y = [parameter for parameter in group["params"] if "z" in self.state.get(parameter, {})]
                if y:
                    z = [self.state[parameter]["z"] for parameter in y]
                    parameters += y
                    averages += torch._foreach_lerp(y, z, 1 - 1 / group["betas"][0])
        with weights_replaced(parameters, averages):
            yield
