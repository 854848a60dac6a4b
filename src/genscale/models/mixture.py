"""Mixture of experts: a feed-forward layer of which each token uses a part (Shazeer et al. 2017).

No expert has a capacity and no token is dropped: tokens are sorted by expert, and each expert takes as many as chose
it. What a token gives is so its own affair, whatever else is in the batch.

What the router is to learn besides, to keep experts equally busy, is a loss of each sequence. The layer puts its
gradient into the backward itself, so that no objective has to know of it. A training loop does, in order:

    begin_step(network, scale)        # before the forwards of a step
    ...                               # forwards and backwards
    load = loads(network)             # to be summed over the ranks that hold other tokens
    balance_step(network, load)       # after the update
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.models.embedding import in_compute_dtype
from genscale.models.feed_forward import FeedForward, FeedForwardKind, activated
from genscale.recipe.image_model import DiffusionTransformerModel
from genscale.recipe.mixture import Mixture
from genscale.recipe.model import TransformerModel


class Routing(NamedTuple):
    """Where the tokens go."""

    chosen: Tensor
    """(batch, time, active) int64: experts."""
    weights: Tensor
    """(batch, time, active): what each expert's output is multiplied by."""
    counts: Tensor
    """(batch, experts) int64: choices in each sequence."""
    logits: Tensor
    """(batch, time, experts)."""
    scores: Tensor
    """(batch, time, experts): softmax or sigmoid of the logits."""


class Experts(nn.Module):
    """Feed-forward layers of one shape, stacked; without biases.

    Args:
        experts: how many.
        active: how many of them a token passes through.
        width: of the input and the output.
        hidden: of the layer between.
        kind: the activation.

    Attributes:
        share_active: the part of the parameters that a token is multiplied with.
    """

    def __init__(self, experts: int, active: int, width: int, hidden: int, kind: FeedForwardKind):
        super().__init__()
        self.kind = kind
        self.share_active = active / experts
        self.gate = _matrices(experts, hidden, width) if kind in ("swiglu", "geglu") else None
        self.up = _matrices(experts, hidden, width)
        self.down = _matrices(experts, width, hidden)

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate, up and down as this rank has them: all of the experts, or its own."""
        gate = None if self.gate is None else _local(self.gate)
        return gate, _local(self.up), _local(self.down)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(rows, width) to the same. The first ``counts[0]`` rows go through expert 0, the next through expert 1."""
        gate, up, down = self.weights()
        hidden = grouped_product(rows, up, counts)
        gated = None if gate is None else grouped_product(rows, gate, counts)
        return grouped_product(activated(self.kind, hidden, gated), down, counts)


class MixtureFeedForward(nn.Module):
    """In place of :class:`FeedForward`: (batch, time, width) to the same.

    Args:
        width: of the input and the output.
        hidden: of each expert's layer between.
        options: the recipe's ``model.mixture``.
        kind: the activation.
        bias: on every projection of the shared experts; the others have none.

    Attributes:
        run_experts: from rows sorted by expert to outputs, as :meth:`Experts.forward`; expert parallelism replaces it.
        auxiliary_scale: what the auxiliary losses, totals over sequences, are multiplied by: the same as the main
            loss's total. None: 1 / the sequences of the forward, for a loss that is a mean over one batch.
        auxiliary_share: this rank's part of the auxiliary losses, where several ranks compute the same and add their
            gradients.
        sum_over_sequence: a differentiable sum over the ranks that hold the other parts of the same sequences.
        load: (experts,) int64: choices since the step began, counted in the backward.
        choice_bias: (experts,) added to the scores for the choice alone, where ``balance`` is ``bias``.
    """

    load: Tensor
    choice_bias: Tensor | None

    def __init__(self, width: int, hidden: int, options: Mixture, kind: FeedForwardKind = "swiglu", bias: bool = False):
        super().__init__()
        self.options = options
        self.router = nn.Linear(width, options.experts, bias=False)
        self.experts = Experts(options.experts, options.active, width, hidden, kind)
        self.shared = FeedForward(width, options.shared * hidden, kind, bias) if options.shared else None
        self.run_experts: Callable[[Experts, Tensor, Tensor], Tensor] = Experts.__call__
        self.auxiliary_scale: float | Tensor | None = None
        self.auxiliary_share = 1.0
        self.sum_over_sequence: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("load", torch.zeros(options.experts, dtype=torch.int64), persistent=False)
        self.register_buffer("choice_bias", torch.zeros(options.experts) if options.balance == "bias" else None)

    @torch.compiler.disable  # sizes depend on the data
    def forward(self, x: Tensor) -> Tensor:
        routing = self.route(x)
        tokens, active = x.flatten(0, 1), self.options.active  # (tokens, width)
        order = routing.chosen.flatten().argsort(stable=True)  # (tokens x active,) by expert
        inverse = _inverse(order)
        rows = _Spread.apply(tokens, order, inverse, active)
        rows = self.run_experts(self.experts, rows, routing.counts.sum(0))
        weights = _Spread.apply(routing.weights.reshape(-1, 1), order, inverse, 1)
        y = _Gather.apply((rows * weights).to(rows.dtype), order, inverse, active).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        if self.training and torch.is_grad_enabled():
            y = _Account.apply(y, self._auxiliary(routing), routing.counts.sum(0), self.load)
        return y

    def route(self, x: Tensor) -> Routing:
        """Choose experts for each token, in float32 at least: a rounded logit sends a token to another expert."""
        options, dtype = self.options, torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), _local(self.router.weight).to(dtype))
            scores = logits.softmax(-1) if options.score == "softmax" else logits.sigmoid()
            chosen = (scores if self.choice_bias is None else scores + self.choice_bias).topk(options.active).indices
            if options.active == 1:  # divided by its own sum it would be 1, and the router learn nothing
                weights = scores.gather(-1, chosen)
            elif options.score == "softmax":
                weights = logits.gather(-1, chosen).softmax(-1)
            else:  # DeepSeek-V3, equations 13 to 15
                weights = scores.gather(-1, chosen)
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        choices = chosen.flatten(1)
        counts = choices.new_zeros(len(x), options.experts).scatter_add_(1, choices, torch.ones_like(choices))
        return Routing(chosen, weights, counts, logits, scores)

    def _auxiliary(self, routing: Routing) -> Tensor | None:
        """The auxiliary losses, scaled; None where there are none.

        Balance is asked of each sequence by itself (DeepSeek-V3, equations 17 to 20), not of the batch as in GShard and
        Switch: a batch's loss would change with its cut into micro-batches and ranks.
        """
        options = self.options
        balances = options.balance == "loss" and options.balance_weight > 0
        if not balances and not options.z_loss:
            return None
        affinities = routing.scores
        if options.score == "sigmoid":
            affinities = affinities / (affinities.sum(-1, keepdim=True) + 1e-20)  # equation 19
        sums = torch.stack((routing.counts.to(affinities.dtype), affinities.sum(1)))  # (2, batch, experts)
        if self.sum_over_sequence is not None:
            sums = self.sum_over_sequence(sums)
        choices, affinity = sums
        time = (
            choices.sum(-1) / options.active
        )  # (batch,) tokens of the whole sequence, of which this rank may have few
        local = routing.logits.shape[1] / time  # this rank's part of each sequence
        losses = torch.zeros_like(time)
        if balances:
            frequency = choices * (options.experts / options.active) / time[:, None]  # f, equation 18; 1 in balance
            share = affinity / time[:, None]  # P, equation 20
            losses = losses + options.balance_weight * (frequency * share).sum(-1) * local
        if options.z_loss:  # Zoph et al. 2022, equation 5
            losses = losses + options.z_loss * routing.logits.logsumexp(-1).square().mean(1) * local
        scale = 1 / max(1, len(time)) if self.auxiliary_scale is None else self.auxiliary_scale
        return losses.sum() * self.auxiliary_share * scale


def feed_forward_of(
    shape: TransformerModel | DiffusionTransformerModel, layer: int, bias: bool
) -> FeedForward | MixtureFeedForward:
    """The feed-forward layer of a network's layer number ``layer``, as the recipe's ``model`` says."""
    mixture = shape.mixture
    if mixture is None or layer < mixture.from_layer:
        return FeedForward(shape.width, shape.width_of_hidden, shape.feed_forward, bias)
    hidden = mixture.hidden or shape.width_of_hidden
    return MixtureFeedForward(shape.width, hidden, mixture, shape.feed_forward, bias)


def mixture_layers(network: nn.Module) -> list[MixtureFeedForward]:
    """The layers of ``network`` that have experts, from its input on."""
    return [module for module in network.modules() if isinstance(module, MixtureFeedForward)]


def begin_step(network: nn.Module, scale: float | Tensor) -> None:
    """Before the forwards of a step: count loads from zero, and multiply auxiliary losses by ``scale``.

    They are totals over sequences; so the scale is 1 / the sequences of the global batch, times the loss scale of fp16.
    """
    for layer in mixture_layers(network):
        layer.load.zero_()
        layer.auxiliary_scale = scale


def loads(network: nn.Module) -> Tensor:
    """(layers, experts) int64: choices of this rank's tokens since the step began."""
    return torch.stack([layer.load for layer in mixture_layers(network)])


def busiest_expert(loads: Tensor) -> Tensor:
    """The load of the busiest expert in mean loads, in the layer where it is worst; 1 is balance.

    Args:
        loads: (layers, experts), summed over ranks.
    """
    return (loads.amax(1) / loads.double().mean(1)).amax()


@torch.no_grad()
def balance_step(network: nn.Module, loads: Tensor) -> None:
    """After an update: where ``balance`` is ``bias``, make busy experts less likely to be chosen (Wang et al. 2024,
    algorithm 1).

    Args:
        loads: (layers, experts), summed over ranks: the biases stay the same on all of them.
    """
    for layer, load in zip(mixture_layers(network), loads, strict=True):
        if layer.choice_bias is not None:
            error = load.sum() - load * len(load)  # mean load - load, in whole numbers
            layer.choice_bias += layer.options.bias_rate * error.sign()


def grouped_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times the transpose of its own matrix, in autocast's dtype.

    Args:
        rows: (rows, inputs), sorted by group.
        matrices: (groups, outputs, inputs).
        counts: (groups,) int64: the rows of each.
    """
    rows, matrices = in_compute_dtype(rows), in_compute_dtype(matrices)
    if (
        rows.device.type != "cpu"
        and rows.dtype == torch.bfloat16
        and matrices.shape[1] % 8 == matrices.shape[2] % 8 == 0
    ):
        return _grouped_kernel(rows, matrices, counts)
    # unbind, not an index for each: the gradient of an index is as large as the whole stack
    parts = zip(rows.split(counts.tolist()), matrices.unbind(), strict=True)
    return torch.cat([F.linear(part, matrix) for part, matrix in parts])


def _grouped_kernel(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """One kernel for all groups, without waiting for the counts. It wants bfloat16 and rows of whole 16 bytes."""
    transposed = matrices.mT
    if transposed.requires_grad:
        # On Blackwell a group without rows gets a gradient of whatever was in memory (pytorch issue 172439).
        empty = (counts == 0)[:, None, None]
        transposed.register_hook(lambda gradient: gradient.masked_fill(empty, 0))
    return F.grouped_mm(rows, transposed, offs=counts.cumsum(0, dtype=torch.int32))


def _matrices(experts: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(experts, rows, columns).normal_(std=1 / math.sqrt(columns)))


def _local(weight: Tensor) -> Tensor:
    """What this rank has of a DTensor, whose class takes a second to import that one process has no use for."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def sorted_rows(rows: Tensor, order: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``rows[order]``, and the function that puts rows back in their places."""
    inverse = _inverse(order)
    return _Spread.apply(rows, order, inverse, 1), lambda rows: _Gather.apply(rows, order, inverse, 1)


class _Spread(torch.autograd.Function):
    """Each row ``copies`` times, then permuted. Indexing would do, but on an accelerator its gradient adds the copies
    in any order, and a run would not repeat itself to the bit."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.copies = copies
        return rows[order // copies]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Gather.apply(gradient, *ctx.saved_tensors, ctx.copies), None, None, None


class _Gather(torch.autograd.Function):
    """The transpose: permuted back, then the sum of each row's copies."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.copies = copies
        rows = rows[inverse]
        return rows if copies == 1 else rows.unflatten(0, (-1, copies)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(gradient, *ctx.saved_tensors, ctx.copies), None, None, None


class _Account(torch.autograd.Function):
    """The identity, whose backward adds the gradient of the auxiliary losses and counts the load.

    Recomputing activations repeats the forward; a backward runs once for each micro-batch.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, auxiliary: Tensor | None, counts: Tensor, load: Tensor) -> Tensor:
        ctx.one = None if auxiliary is None else torch.ones_like(auxiliary)
        ctx.counts, ctx.load = counts, load
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ctx.load += ctx.counts
        return gradient, ctx.one, None, None
