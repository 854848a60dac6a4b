"""Cross entropy summed over tokens, with its gradient made in the forward pass, a few rows at a time.

Logits are the largest tensor of a language model. ``F.cross_entropy`` under autocast makes three more of their size in
fp32; here a block of rows that fits the cache is turned into probabilities and straight into the gradient, in the
logits' own precision. Everything is computed in fp32 (fp64 for fp64 logits), whatever the autocast. Measured on one CPU
core, forward and backward, 3,072 tokens, bf16: vocabulary 4,096: 21 ms against 110 for ``F.cross_entropy``;
vocabulary 65: 0.7 ms against 1.1 to 4.7.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = {"cpu": 2**19}  # logits in a block: what stays in a core's cache
_ACCELERATOR_BLOCK = 2**26  # where only memory counts


class CrossEntropy(NamedTuple):
    """Three scalars, each a weighted sum over tokens."""

    total: Tensor
    """What is trained: smoothed cross entropy plus the log-partition penalty; the only one with a gradient."""
    plain: Tensor
    """Cross entropy, in nats."""
    squared_log_partition: Tensor


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Cross entropy summed over tokens.

    Args:
        logits: (..., vocabulary), any floating-point precision.
        targets: (...) int64 in [0, vocabulary), also where the weight is 0.
        weights: (...) a factor on each token, or a bool mask of those that count; None counts each once.
        label_smoothing: the share of the target spread evenly over the vocabulary (Szegedy et al. 2016).
        z_loss: weight of the squared log-partition log(Z)^2 (PaLM, Chowdhery et al. 2022, section 5).
    """
    vocabulary = logits.shape[-1]
    rows = logits.reshape(-1, vocabulary)
    flat_weights = None if weights is None else weights.reshape(-1).to(torch.promote_types(rows.dtype, torch.float32))
    sums = _SummedCrossEntropy.apply(rows, targets.reshape(-1), flat_weights, label_smoothing, z_loss)
    return CrossEntropy(*sums)


class _SummedCrossEntropy(torch.autograd.Function):
    """logits (rows, vocabulary), targets (rows,), weights (rows,) -> total, plain, squared log-partition."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocabulary = logits.shape
        exact = torch.promote_types(logits.dtype, torch.float32)
        # fp16 keeps its gradient in fp32: small probabilities would vanish before the loss scale reaches them.
        gradient_type = exact if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=gradient_type) if logits.requires_grad else None
        total, plain, squared = (torch.empty(rows, dtype=exact, device=logits.device) for _ in range(3))
        step = max(1, _BLOCK.get(logits.device.type, _ACCELERATOR_BLOCK) // vocabulary)
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            scores = logits[block]
            target = targets[block, None]
            probabilities = torch.softmax(scores, dim=1, dtype=exact)  # (block, vocabulary)
            # The largest probability is exp(max - log Z) and at least 1 / vocabulary, so that its log is exact.
            log_partition = scores.amax(dim=1).to(exact) - probabilities.amax(dim=1).log()
            plain[block] = log_partition - scores.gather(1, target).squeeze(1)
            squared[block] = log_partition.square()
            total[block] = plain[block]
            if label_smoothing:
                spread = log_partition - scores.mean(dim=1, dtype=exact)
                total[block] = torch.lerp(plain[block], spread, label_smoothing)
            if z_loss:
                total[block] += z_loss * squared[block]
            if gradient is None:
                continue
            if z_loss:
                probabilities *= (1 + 2 * z_loss * log_partition)[:, None]
            if label_smoothing:
                probabilities -= label_smoothing / vocabulary
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, label_smoothing - 1))
            if weights is not None:
                probabilities *= weights[block, None]
            gradient[block] = probabilities
        ctx.gradient = gradient
        ctx.logits_type = logits.dtype
        if weights is not None:
            total, plain, squared = total * weights, plain * weights, squared * weights
        sums = total.sum(), plain.sum(), squared.sum()
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        if scale.device.type == "cpu" and scale == 1:  # without a loss scale there is nothing to multiply
            return ctx.gradient.to(ctx.logits_type), None, None, None, None
        return (ctx.gradient * scale).to(ctx.logits_type), None, None, None, None
