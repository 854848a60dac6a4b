"""What a diffusion model is told of the images that it draws: their class, their caption, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genscale.data.description import ImageDescription
from genscale.objectives.guidance import Condition
from genscale.objectives.image_request import ImageRequest
from genscale.runtime.errors import UserError


@dataclass(frozen=True)
class Conditioning:
    """The kind of condition, how often it is left out in training, and how it is written for the network."""

    kind: Literal["none", "class", "text"]
    dropout: float
    classes: int
    """Their number, which as a label means none."""
    caption_tokens: int

    @staticmethod
    def of(asked: str, dropout: float, described: ImageDescription) -> Conditioning:
        """As ``objective.conditioning`` asks; raises UserError where the data has no such thing."""
        classes, captions = len(described.classes), bool(described.caption_vocabulary)
        if asked == "class" and not classes:
            raise UserError(f"objective.conditioning: 'class' needs images with labels; {_there(classes, captions)}")
        if asked == "text" and not captions:
            raise UserError(f"objective.conditioning: 'text' needs images with captions; {_there(classes, captions)}")
        if asked == "auto":
            asked = "class" if classes else "text" if captions else "none"
        kinds: dict[str, Literal["none", "class", "text"]] = {"none": "none", "class": "class", "text": "text"}
        return Conditioning(kinds[asked], dropout, classes, described.caption_tokens)

    def condition(self, labels: Tensor | None, captions: Tensor | None) -> Condition:
        """What is known of images, without what the network is not told.

        Args:
            labels: (batch,) int64, -1 for none.
            captions: (batch, tokens) int64.
        """
        if self.kind == "class" and labels is not None:
            return Condition(torch.where(labels < 0, self.classes, labels), None)
        return Condition(None, captions if self.kind == "text" else None)

    def nothing(self, batch: int, device: torch.device) -> Condition:
        """No condition, for each image of a batch."""
        if self.kind == "class":
            return Condition(torch.full((batch,), self.classes, device=device), None)
        if self.kind == "text":
            return Condition(None, torch.zeros(batch, self.caption_tokens, dtype=torch.long, device=device))
        return Condition(None, None)

    def left_out(self, condition: Condition, dropped: Tensor) -> Condition:
        """Nothing where ``dropped``, (batch,) bool, is true."""
        labels, captions = condition
        if labels is not None:
            labels = torch.where(dropped, self.classes, labels)
        if captions is not None:
            captions = captions.masked_fill(dropped[:, None], 0)
        return Condition(labels, captions)

    def check(self, request: ImageRequest) -> None:
        """Raise UserError where a request asks for what the model was never told, or for none where it always was."""
        if request.labels is not None and self.kind != "class":
            raise UserError(f"labels: this model was not trained on classes ({self._was})")
        if request.captions is not None and self.kind != "text":
            raise UserError(f"captions: this model was not trained on captions ({self._was})")
        if request.labels is not None and int(request.labels.max()) >= self.classes:
            raise UserError(f"labels: {int(request.labels.max())} is not a class: they are 0 to {self.classes - 1}")
        if request.guidance != 1 and request.guide is None:
            self._check_guidance(request)
        if self.kind == "class" and self.dropout == 0 and (request.labels is None or bool((request.labels < 0).any())):
            raise UserError(f"labels: this model was never without a class; give each image one of its {self.classes}")
        if self.kind == "text" and self.dropout == 0 and request.captions is None:
            raise UserError("captions: this model was never without a caption; give each image one")

    def _check_guidance(self, request: ImageRequest) -> None:
        asked = f"guidance: {request.guidance:g}"
        if self.kind == "none":
            raise UserError(f"{asked} needs a model trained with a condition ({self._was}), or a guide; 1 is none")
        if self.dropout == 0:
            raise UserError(
                f"{asked} needs a model trained with a condition that was sometimes left out "
                "(objective.condition_dropout was 0), or a guide; 1 is none"
            )
        if request.labels is None and request.captions is None:
            raise UserError(f"{asked} needs {'labels' if self.kind == 'class' else 'captions'} to follow; 1 is none")

    @property
    def _was(self) -> str:
        return f"objective.conditioning was '{self.kind}'"


def _there(classes: int, captions: bool) -> str:
    """What there is instead."""
    instead = "'class'" if classes else "'text'" if captions else None
    return f"the data has none, so use {instead} or 'none'" if instead else "the data has none, so use 'none'"
