"""The objectives of text: the next token, masked tokens (masked diffusion), and filling in.

Each takes :class:`genscale.data.batch.TextBatch` micro-batches, has one network named ``model``, and reports its loss
in nats per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.data.batch import TextBatch
from genscale.data.description import TextDescription
from genscale.models.embedding import Head
from genscale.models.initialise import initialise
from genscale.models.transformer import Transformer
from genscale.objectives.cross_entropy import CrossEntropy
from genscale.objectives.decoding import Filling, TextRequest, TextSample, decode
from genscale.objectives.infill import MIDDLE_SENTINELS, SpanLayout, corrupt_spans, rearrange_middle, span_layout
from genscale.objectives.linear_cross_entropy import linear_cross_entropy
from genscale.objectives.objective import Denoising, Loss, Phase
from genscale.objectives.token_dropout import drop_tokens
from genscale.objectives.unmasking import unmask
from genscale.recipe.model import TransformerModel
from genscale.recipe.objective import CausalObjective, InfillObjective, MaskedObjective
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng


class Targets(NamedTuple):
    """What the criterion compares the outputs with."""

    tokens: Tensor
    """(batch, time) int64."""
    weights: Tensor | None
    """(batch, time) a factor on each token's loss, or bool; None counts each once."""
    number: Tensor
    """Scalar: tokens that the loss speaks of."""

    def ending_at(self, time: int) -> Targets:
        """The same after tokens that do not count, so that there are ``time``."""
        missing = time - self.tokens.shape[1]
        if not missing:
            return self
        weights = torch.ones_like(self.tokens, dtype=torch.bool) if self.weights is None else self.weights
        return Targets(F.pad(self.tokens, (missing, 0)), F.pad(weights, (missing, 0)), self.number)

    def some(self, chunks: tuple[int, ...], of: int) -> Targets:
        """Some of ``of`` equal chunks of the tokens, and an equal part of the number."""

        def take(x: Tensor) -> Tensor:
            every = x.chunk(of, 1)
            return torch.cat([every[chunk] for chunk in chunks], dim=1)

        weights = None if self.weights is None else take(self.weights)
        return Targets(take(self.tokens), weights, self.number * (len(chunks) / of))


def _networks(recipe: Recipe, vocabulary: int, causal: bool) -> nn.ModuleDict:
    """The one network, with its first weights."""
    network = Transformer(_shape(recipe), vocabulary, causal=causal)
    initialise(network, recipe.seed)
    return nn.ModuleDict({"model": network})


def _shape(recipe: Recipe) -> TransformerModel:
    assert isinstance(recipe.model, TransformerModel)  # the recipe has seen to it
    return recipe.model


def _flops(networks: nn.ModuleDict, time: int) -> float:
    """Of one sample of ``time`` tokens."""
    return time * cast(Transformer, networks["model"]).flops_per_token(time)


def _valid_tokens(batch: TextBatch) -> Tensor:
    """Scalar int64: tokens that have to be predicted."""
    if batch.valid is None:
        return torch.tensor(batch.tokens[:, 1:].numel(), device=batch.tokens.device)
    return batch.valid.sum()


def _valid_text(batch: TextBatch) -> Tensor:
    """(batch, context + 1) bool: ``valid`` for every token of the window; the first is as its neighbour."""
    if batch.valid is None:
        return torch.ones_like(batch.tokens, dtype=torch.bool)
    return torch.cat((batch.valid[:, :1], batch.valid), dim=1)


class _Language(Denoising):
    """What the three share."""

    shape: TransformerModel
    options: Any
    """The recipe's objective, of the kind of the class."""
    takes_parts = True  # the loss of a token is taken where the token is
    vocabulary: int
    """The tokenizer's number of tokens."""
    known: int | None = None
    """The first so many tokens of the network's vocabulary can be an answer; None: all."""

    def answer(self, inputs: dict[str, Any]) -> Tensor:
        """The head's input, (batch, tokens, width): of all tokens, or of those that this process has."""
        return self.networks["model"](**inputs, logits=False)

    def scored(self, answer: Tensor, targets: Targets, training: bool = True) -> Loss:
        if self.sharers > 1:
            whole = answer.shape[1] * self.sharers
            chunks = (self.share, 2 * self.sharers - 1 - self.share)  # as parallel/context.py deals them out
            targets = targets.ending_at(whole).some(chunks, 2 * self.sharers)
        return self.criterion(answer, targets, training)

    def criterion(self, outputs: Tensor, targets: Targets, training: bool = True) -> Loss:
        """Cross entropy of the last tokens; label smoothing and z-loss only when training, never in ``loss``.

        Args:
            outputs: (batch, tokens, width), the head's input.
        """
        options = self.options
        smoothing, z_loss = (options.label_smoothing, options.z_loss) if training else (0.0, 0.0)

        def read(hidden: Tensor, weight: Tensor, head: Head) -> CrossEntropy:
            return linear_cross_entropy(
                hidden,
                weight,
                targets.tokens,
                targets.weights,
                smoothing,
                z_loss,
                head.soft_cap,
                self.known,
                head.group,
                head.first_row,
                head.vocabulary,
                self.goes_back_again,
            )

        sums = cast(Transformer, self.networks["model"]).head(outputs[:, -targets.tokens.shape[1] :], read)
        metrics = {"loss": (sums.plain, targets.number)}
        if z_loss:
            metrics["z_loss"] = (z_loss * sums.squared_log_partition, targets.number)
        return Loss(sums.total, metrics)

    def flops_per_sample(self) -> float:
        return _flops(self.networks, self.shape.context)

    def activation_bytes_per_sample(self, element: int) -> int:
        """Per token and layer about 10 tensors of the width, 3 of the hidden width and the attention's queries, keys
        and values (Korthikanti et al. 2022, section 4.1, with a fused attention kernel); three copies of the logits.
        """
        shape = self.shape
        layer = 10 * shape.width + 3 * shape.width_of_hidden + 4 * shape.heads * shape.width_of_head
        return shape.context * (element * layer * shape.layers + 12 * self.vocabulary)

    def rows_per_sample(self) -> int:
        return self.shape.context


class CausalLanguage(_Language):
    """Predict each token from those before it."""

    def __init__(self, recipe: Recipe, described: TextDescription):
        super().__init__()
        assert isinstance(recipe.objective, CausalObjective)
        self.options = recipe.objective
        self.shape = _shape(recipe)
        vocabulary = self.vocabulary = described.vocabulary
        self.special: dict[str, int] = {}
        self.networks = _networks(recipe, vocabulary, causal=True)

    def weight(self, phase: Phase, batch: TextBatch) -> Tensor:
        return _valid_tokens(batch)

    def prepare(self, batch: TextBatch, rng: Rng) -> tuple[dict[str, Any], Targets]:
        inputs = {"tokens": batch.tokens[:, :-1]}
        if self.training and self.options.token_dropout:
            inputs["tokens"] = drop_tokens(inputs["tokens"], self.options.token_dropout, self.vocabulary, rng)
        if self.shape.within_documents:
            inputs["documents"] = batch.documents[:, :-1]
        return inputs, Targets(batch.tokens[:, 1:], batch.valid, _valid_tokens(batch))

    def sample(self, request: TextRequest, rng: Rng) -> list[TextSample]:
        """Continue each prompt; returns what was written."""
        if request.suffixes is not None:
            raise UserError("a suffix needs a run that learned to fill in (objective.kind: infill), not a causal one")
        return decode(self.networks["model"], request, rng, self.shape.context, self.vocabulary)


class MaskedLanguage(_Language):
    """Masked diffusion: predict masked tokens from those left, at every rate of masking.

    The loss is the continuous-time bound of MDLM (Sahoo et al. 2024, equation 10, with the linear schedule) and LLaDA
    (Nie et al. 2025, equation 3): an upper bound on nats per token, so that it compares with the causal loss. It speaks
    of the same tokens as the causal loss: those after the window's first.
    """

    def __init__(self, recipe: Recipe, described: TextDescription):
        """The mask is the id above the vocabulary."""
        super().__init__()
        assert isinstance(recipe.objective, MaskedObjective)
        self.options = recipe.objective
        self.shape = _shape(recipe)
        vocabulary = self.vocabulary = described.vocabulary
        self.special = {"mask": vocabulary}
        self.known = vocabulary  # the mask itself is never the answer (MDLM, section 3.2.3)
        self.networks = _networks(recipe, vocabulary + 1, causal=False)

    def weight(self, phase: Phase, batch: TextBatch) -> Tensor:
        return _valid_tokens(batch)

    def _rates(self, rng: Rng) -> Tensor:
        """(batch,) float32 masking rates in [minimum_rate, 1): each uniform, together spread evenly over the batch."""
        return self.options.minimum_rate + (1 - self.options.minimum_rate) * rng.spread("rate")

    def prepare(self, batch: TextBatch, rng: Rng) -> tuple[dict[str, Any], Targets]:
        tokens = batch.tokens[:, 1:]
        rates = self._rates(rng)[:, None]
        masked = rng.uniform("mask", (tokens.shape[1],)) < rates
        weights = masked / rates
        if batch.valid is not None:
            weights = weights * batch.valid
            masked = masked | ~batch.valid  # padding is unknown, never read
        inputs = {"tokens": torch.where(masked, self.special["mask"], tokens)}
        if self.shape.within_documents:
            inputs["documents"] = batch.documents[:, 1:]
        return inputs, Targets(tokens, weights, _valid_tokens(batch))

    def sample(self, request: TextRequest, rng: Rng) -> list[TextSample]:
        """Continue each prompt, or fill between it and its suffix, by unmasking; returns what was written."""
        return unmask(self.networks["model"], request, rng, self.shape.context, self.vocabulary, self.special["mask"])


class InfillLanguage(_Language):
    """Filling in by a causal network over rearranged text: see :mod:`genscale.objectives.infill`."""

    def __init__(self, recipe: Recipe, described: TextDescription):
        """The sentinels are the ids above the vocabulary."""
        super().__init__()
        assert isinstance(recipe.objective, InfillObjective)
        self.options = recipe.objective
        self.shape = _shape(recipe)
        if self.shape.within_documents:
            raise UserError("model.within_documents: an infill objective moves text across documents; set it to false")
        if self.shape.context < 16:
            raise UserError(f"model.context: an infill objective needs at least 16 tokens, not {self.shape.context}")
        vocabulary = self.vocabulary = described.vocabulary
        self.spans: SpanLayout | None = None
        names: list[str] = list(MIDDLE_SENTINELS)
        if self.options.form == "spans":
            self.spans = span_layout(self.shape.context + 1, self.options.noise_density, self.options.mean_span)
            names = [*(f"span {i}" for i in range(self.spans.spans)), "end"]
        self.special = {name: vocabulary + i for i, name in enumerate(names)}
        self.networks = _networks(recipe, vocabulary + len(names), causal=True)

    def weight(self, phase: Phase, batch: TextBatch) -> Tensor:
        if self.spans is None:
            return _valid_tokens(batch)
        share = _valid_tokens(batch) / (batch.tokens.shape[1] - 1)  # in windows; spans are random, their number is not
        return share * self.spans.targets

    def prepare(self, batch: TextBatch, rng: Rng) -> tuple[dict[str, Any], Targets]:
        valid = _valid_text(batch)
        if self.spans is None:
            tokens, valid = rearrange_middle(batch.tokens, valid, self.special, self.options.rate, rng)
            first_target = 1
        else:
            tokens, valid = corrupt_spans(batch.tokens, valid, self.spans, self.special, rng)
            first_target = self.spans.corrupted
        valid = valid[:, first_target:]
        return {"tokens": tokens[:, :-1]}, Targets(tokens[:, first_target:], valid, valid.sum())

    def sample(self, request: TextRequest, rng: Rng) -> list[TextSample]:
        """Continue each prompt, or fill between it and its suffix; returns what was written.

        A continuation is text after the prompt when the network has seen plain text (``middle``: before its first
        sentinel); with ``spans`` it is one span at the end, as short as the network learned spans to be.
        """
        special, filling = self.special, None
        if self.spans is not None:
            mark = special["span 0"]
            # Training windows end in a corrupted span, so a suffix has one after it, which is never answered.
            last = (special["span 1"],) if request.suffixes is not None and self.spans.spans > 1 else ()
            filling = Filling((), (mark,), (*last, mark), tuple(special.values()))
        elif request.suffixes is not None:
            filling = Filling((special["prefix"],), (special["suffix"],), (special["middle"],), (special["end"],))
        elif self.options.rate == 1:  # text that is always rearranged starts with a sentinel, and goes on as plain text
            request = replace(request, prompts=[[special["prefix"], *prompt] for prompt in request.prompts])
        return decode(self.networks["model"], request, rng, self.shape.context, self.vocabulary, filling)

    def flops_per_sample(self) -> float:
        time = self.shape.context if self.spans is None else self.spans.corrupted + self.spans.targets - 1
        return _flops(self.networks, time)
