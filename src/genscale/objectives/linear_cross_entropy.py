"""Cross entropy straight from hidden states: the head's product, the loss and their gradients by chunks of tokens.

The logits of a chunk are turned into their gradient where they lie, and that at once into the gradient of the hidden
states and of the head's weight, so that the logits of all tokens never exist together (Liger kernel, Hsu et al. 2024,
section 3.2; Wijmans et al. 2024, "Cut your losses"). Where the vocabulary is split over ranks, each has the logits of
its own rows of the head, and they exchange three numbers for each token (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from genscale.objectives.cross_entropy import CrossEntropy, row_losses, rows_in_block, softmax, turn_into_gradient
from genscale.runtime.collectives import gather_into

_CHUNK = {"cpu": 2**18}  # logits in a chunk: products in cache
_ACCELERATOR_CHUNK = 2**26
_FEWEST_ROWS = 512  # below, adding to the weight's gradient takes longer than its product


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    known: int | None = None,
    group: distributed.ProcessGroup | None = None,
    first_row: int = 0,
    vocabulary: int | None = None,
    again: bool = False,
) -> CrossEntropy:
    """``cross_entropy(F.linear(hidden, weight), targets, ...)`` without the logits; can be differentiated once.

    Products are in autocast's dtype where it is on; all else is computed in fp32 (fp64 for fp64 hidden states).

    Args:
        hidden: (..., width), the same on all ranks of the group.
        weight: (vocabulary here, width), the rows of the head that are here; may be none.
        targets: (...) int64 ids of the whole vocabulary, also where the weight is 0.
        weights: (...) a factor on each token, or a bool mask of those that count; None counts each once.
        label_smoothing: the share of the target spread evenly over the vocabulary (Szegedy et al. 2016).
        z_loss: weight of the squared log-partition log(Z)^2 (PaLM, Chowdhery et al. 2022, section 5).
        soft_cap: logits l become soft_cap * tanh(l / soft_cap) (Gemma 2, 2024, section 2).
        known: only the first ``known`` ids of the vocabulary take part.
        group: the ranks over which the head's rows are split, in order; None: all are here.
        first_row: the first of the rows that are here.
        vocabulary: number of rows on all ranks.
        again: whether the backward may be run more than once, as pipelines do that take the gradients of weights later.

    Returns:
        The sums over all of the vocabulary, the same on all ranks. But hidden states get only the part of their
        gradient that comes through the rows here: the caller adds up those of the group.
    """
    if group is not None and vocabulary is None:
        raise ValueError("a head that is split needs the size of the whole vocabulary")
    vocabulary = vocabulary or weight.shape[0]
    known = vocabulary if known is None else known
    here = min(weight.shape[0], max(0, known - first_row))
    terms = _Terms(label_smoothing, z_loss, soft_cap, known, vocabulary, first_row, here, group, again)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return CrossEntropy(*_LinearCrossEntropy.apply(rows, weight, targets.reshape(-1), _flat(weights), terms))
    return _over_chunks(rows, weight, targets.reshape(-1), _flat(weights), terms, None, None)


class _Terms(NamedTuple):
    label_smoothing: float
    z_loss: float
    soft_cap: float | None
    known: int
    vocabulary: int
    first_row: int
    here: int
    """How many of the rows here take part."""
    group: distributed.ProcessGroup | None
    again: bool


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.reshape(-1)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """As F.linear has it: autocast leaves fp64 alone."""
    device = hidden.device.type
    cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else hidden.dtype


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 keeps its gradients in fp32: they would vanish before the loss scale reaches them."""
    return torch.float32 if dtype == torch.float16 else dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (rows, width), weight (here, width), targets (rows,), weights (rows,) -> the three sums."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, terms: _Terms
    ) -> CrossEntropy:
        dtype = _product_dtype(hidden)
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = torch.empty_like(hidden, dtype=_gradient_dtype(dtype), memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        sums = _over_chunks(hidden, weight, targets, weights, terms, of_hidden, of_weight)
        ctx.gradients = of_hidden, of_weight
        ctx.dtypes, ctx.again = (hidden.dtype, weight.dtype), terms.again
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear cross entropy has given its gradient away: it goes backward once")
        if ctx.again:
            kept = zip(ctx.gradients, ctx.dtypes, strict=True)
            return *(None if x is None else (x * scale).to(dtype) for x, dtype in kept), None, None, None
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, as the weight's can be very large
        scaled = (
            None if x is None else x.mul_(scale).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def _over_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    terms: _Terms,
    of_hidden: Tensor | None,
    of_weight: Tensor | None,
) -> CrossEntropy:
    """The three sums; the gradient of the total is written into ``of_hidden`` and added to ``of_weight``."""
    rows, device, dtype = len(hidden), hidden.device, _product_dtype(hidden)
    exact = torch.promote_types(dtype, torch.float32)
    weights = None if weights is None else weights.to(exact)
    ranks = 1 if terms.group is None else distributed.get_world_size(terms.group)
    columns = -(-terms.vocabulary // ranks)  # not those here: all ranks must go in equal steps
    step = max(1, min(rows, max(_FEWEST_ROWS, _CHUNK.get(device.type, _ACCELERATOR_CHUNK) // columns)))
    losses = CrossEntropy(*torch.empty(3, rows, dtype=exact, device=device))
    with torch.autocast(device.type, enabled=False):
        matrix = weight[: terms.here].to(dtype)
        logits = torch.empty(step, terms.here, dtype=dtype, device=device)  # one buffer for all chunks
        gradient = None
        if of_hidden is not None or of_weight is not None:
            gradient = logits.to(_gradient_dtype(dtype))  # the same buffer, but for fp16
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            size = chunk.stop - start
            part = hidden[chunk].to(dtype)
            torch.mm(part, matrix.T, out=logits[:size])
            chunk_weights = None if weights is None else weights[chunk]
            chunk_losses = CrossEntropy(*(loss[chunk] for loss in losses))
            chunk_gradient = None if gradient is None else gradient[:size]
            _losses_of_chunk(logits[:size], targets[chunk], chunk_weights, terms, columns, chunk_losses, chunk_gradient)
            if chunk_gradient is not None and of_hidden is not None:
                torch.mm(chunk_gradient, matrix.to(chunk_gradient.dtype), out=of_hidden[chunk])
            if chunk_gradient is not None and of_weight is not None:
                _add_product(of_weight[: terms.here], chunk_gradient, part)
    if weights is not None:
        losses = CrossEntropy(*(loss * weights for loss in losses))
    return CrossEntropy(*(loss.sum() for loss in losses))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (here, width) += left^T right, of (rows, here) and (rows, width)."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right.to(left.dtype))
    else:
        total += left.T @ right


def _losses_of_chunk(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    terms: _Terms,
    columns: int,
    losses: CrossEntropy,
    gradient: Tensor | None,
) -> None:
    """Fill in the losses and the gradient of the logits, (chunk, here), which may be the logits' own memory."""
    exact = losses.total.dtype
    step = rows_in_block(logits.device, columns)
    for start in range(0, len(logits), step):
        block = slice(start, start + step)
        scores = logits[block]
        if terms.soft_cap is not None:
            squashed = torch.tanh(scores.to(exact) / terms.soft_cap)
            scores = squashed * terms.soft_cap
        found = _find(scores, targets[block], terms, exact)
        row = row_losses(
            found.log_partition, found.target_scores, found.mean_scores, terms.label_smoothing, terms.z_loss
        )
        for loss, values in zip(losses, row, strict=True):
            loss[block] = values
        if gradient is None or terms.here == 0:
            continue
        block_weights = None if weights is None else weights[block]
        spread = terms.label_smoothing / terms.known
        turn_into_gradient(
            found.probabilities, found.log_partition, found.target, found.share, block_weights, spread, terms.z_loss
        )
        if terms.soft_cap is not None:
            found.probabilities.mul_(1 - squashed.square_())  # the derivative of soft_cap * tanh(l / soft_cap)
        gradient[block] = found.probabilities


class _Found(NamedTuple):
    """What a block of logits says, over the whole vocabulary except where it is told."""

    probabilities: Tensor
    """(block, here)."""
    log_partition: Tensor
    """(block,)."""
    target: Tensor
    """(block, 1) the target's column here; 0 where it is not here."""
    share: Tensor
    """(block, 1) what the target has of the wanted distribution, above what all have; 0 where it is not here."""
    target_scores: Tensor
    """(block,)."""
    mean_scores: Tensor | None
    """(block,)."""


def _find(scores: Tensor, targets: Tensor, terms: _Terms, exact: torch.dtype) -> _Found:
    smoothing = terms.label_smoothing
    if terms.group is None:
        probabilities, log_partition = softmax(scores, exact)
        target = targets[:, None]
        target_scores = scores.gather(1, target).squeeze(1).to(exact)
        mean_scores = scores.mean(dim=1, dtype=exact) if smoothing else None
        share = probabilities.new_full(target.shape, 1 - smoothing)
        return _Found(probabilities, log_partition, target, share, target_scores, mean_scores)

    # (log-partition, target's score, sum of scores) of the rows here, then of those of each rank
    column = (targets - terms.first_row)[:, None]
    is_here = (column >= 0) & (column < terms.here)
    target = column.where(is_here, 0)
    if terms.here:
        probabilities, own_partition = softmax(scores, exact)
        target_scores = scores.gather(1, target).to(exact).where(is_here, 0).squeeze(1)
        statistics = torch.stack((own_partition, target_scores, scores.sum(dim=1, dtype=exact)))
    else:
        probabilities, own_partition = scores.to(exact), scores.new_full((len(scores),), -torch.inf, dtype=exact)
        statistics = torch.stack((own_partition, *own_partition.new_zeros(2, len(scores))))
    ranks = distributed.get_world_size(terms.group)
    gathered = statistics.new_empty(ranks * len(statistics), len(scores))
    gather_into(gathered, statistics, terms.group)
    gathered = gathered.view(ranks, *statistics.shape)
    log_partition = gathered[:, 0].logsumexp(dim=0)
    target_scores, sums = gathered[:, 1:].sum(dim=0)
    probabilities *= (own_partition - log_partition).exp()[:, None]
    share = (1 - smoothing) * is_here.to(exact)
    return _Found(probabilities, log_partition, target, share, target_scores, sums / terms.known if smoothing else None)
