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


def rows_in_block(device: torch.device, vocabulary: int) -> int:
    """Rows of logits that are looked at together."""
    return max(1, _BLOCK.get(device.type, _ACCELERATOR_BLOCK) // vocabulary)


def softmax(scores: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Probabilities (block, vocabulary) and log-partitions (block,) of logits (block, vocabulary)."""
    probabilities = torch.softmax(scores, dim=1, dtype=exact)
    # The largest probability is exp(max - log Z) and at least 1 / vocabulary, so that its log is exact.
    return probabilities, scores.amax(dim=1).to(exact) - probabilities.amax(dim=1).log()


def row_losses(
    log_partition: Tensor, target_scores: Tensor, mean_scores: Tensor | None, label_smoothing: float, z_loss: float
) -> CrossEntropy:
    """The three losses of each row, (block,); the mean over the vocabulary only where labels are smoothed."""
    plain, squared = log_partition - target_scores, log_partition.square()
    total = plain
    if mean_scores is not None:
        total = torch.lerp(plain, log_partition - mean_scores, label_smoothing)
    if z_loss:
        total = total + z_loss * squared
    return CrossEntropy(total, plain, squared)


def turn_into_gradient(
    probabilities: Tensor,
    log_partition: Tensor,
    target: Tensor,
    share: Tensor,
    weights: Tensor | None,
    spread: float,
    z_loss: float,
) -> None:
    """Make of probabilities the gradient of the total with respect to their logits, in place.

    Args:
        probabilities: (block, vocabulary).
        log_partition: (block,).
        target: (block, 1) the column of the target.
        share: (block, 1) what the target has of the wanted distribution, above ``spread``.
        weights: (block,) or None.
        spread: what every token has of it.
        z_loss: as above.
    """
    if z_loss:
        probabilities *= (1 + 2 * z_loss * log_partition)[:, None]
    if spread:
        probabilities -= spread
    probabilities.scatter_add_(1, target, -share)
    if weights is not None:
        probabilities *= weights[:, None]


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
        step = rows_in_block(logits.device, vocabulary)
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            scores = logits[block]
            target = targets[block, None]
            probabilities, log_partition = softmax(scores, exact)
            target_scores = scores.gather(1, target).squeeze(1)
            mean_scores = scores.mean(dim=1, dtype=exact) if label_smoothing else None
            losses = row_losses(log_partition, target_scores, mean_scores, label_smoothing, z_loss)
            total[block], plain[block], squared[block] = losses
            if gradient is None:
                continue
            share = probabilities.new_full(target.shape, 1 - label_smoothing)
            block_weights = None if weights is None else weights[block]
            spread = label_smoothing / vocabulary
            turn_into_gradient(probabilities, log_partition, target, share, block_weights, spread, z_loss)
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
