"""The recipe: everything that, with the data and the code, makes a run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from genscale.recipe.amount import Clock
from genscale.recipe.base import NamedPath, Part
from genscale.recipe.data import Data, TextData
from genscale.recipe.layout import Layout
from genscale.recipe.model import Model, TransformerModel
from genscale.recipe.objective import CausalObjective, Objective
from genscale.recipe.sampling import ImageSampling, Sampling, TextSampling
from genscale.recipe.training import Training

_MODELS = {
    "text": ("transformer",),
    "diffusion": ("diffusion_transformer", "unet"),
    "adversarial": ("gan", "dcgan"),
}
_FAMILIES = {
    "causal": "text",
    "masked": "text",
    "infill": "text",
    "flow": "diffusion",
    "edm": "diffusion",
    "ddpm": "diffusion",
    "adversarial": "adversarial",
}


class Recipe(Part):
    """A whole training run, from raw data to samples."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0)
    run: NamedPath = "runs/{name}"
    """The run directory; ``{name}`` is the recipe's name."""
    data: Data = TextData()
    model: Model = TransformerModel()
    objective: Objective = CausalObjective()
    training: Training = Training()
    layout: Layout = Layout()
    sampling: Sampling = TextSampling()

    @model_validator(mode="before")
    @classmethod
    def _sampling_of_the_data(cls, values: Any) -> Any:
        """Where nothing is said of sampling, images are drawn for images."""
        if isinstance(values, dict) and "sampling" not in values:
            data = values.get("data")
            kind = data.get("kind") if isinstance(data, dict) else getattr(data, "kind", None)
            if kind == "images":
                return {**values, "sampling": ImageSampling()}
        return values

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        self._kinds_fit_together()
        batch, budget = self.training.batch, self.training.budget
        if self.tokens_per_sample is None:
            for name, amount in (("training.batch", batch), ("training.budget", budget)):
                if amount.unit == "tokens":
                    raise ValueError(f"{name} ({amount}) is in tokens, but data.kind 'images' has none: use images")
        samples = self.samples_per_step
        if samples < 1:
            context = f"model.context ({self.tokens_per_sample} tokens)"
            raise ValueError(f"training.batch ({batch}) is less than one sample of {context}")
        micro_batch = self.layout.micro_batch
        if micro_batch != "auto" and micro_batch > samples:
            raise ValueError(
                f"layout.micro_batch ({micro_batch} samples) is larger than training.batch ({samples} samples)"
            )
        if budget.unit != "epochs" and budget.samples(Clock(self.tokens_per_sample, samples)) < samples:
            raise ValueError(f"training.budget ({budget}) is less than one step of training.batch ({batch})")
        window = self.model.sliding_window if isinstance(self.model, TransformerModel) else None
        if self.objective.kind == "masked" and window is not None:
            raise ValueError("model.sliding_window reaches back only; objective.kind 'masked' looks both ways")
        return self

    def _kinds_fit_together(self) -> None:
        family = _FAMILIES[self.objective.kind]
        kind = "text" if family == "text" else "images"
        if self.data.kind != kind:
            raise ValueError(
                f"objective.kind '{self.objective.kind}' learns from {kind}, but data.kind is '{self.data.kind}'"
            )
        if self.model.kind not in _MODELS[family]:
            expected = " or ".join(f"'{name}'" for name in _MODELS[family])
            raise ValueError(
                f"model.kind is '{self.model.kind}', but objective.kind '{self.objective.kind}' needs {expected}"
            )
        if self.sampling.kind != kind:
            raise ValueError(f"sampling.kind '{self.sampling.kind}' does not fit data.kind '{self.data.kind}'")

    @property
    def tokens_per_sample(self) -> int | None:
        """Tokens that make up a sample of text; None for images."""
        return self.model.context if isinstance(self.model, TransformerModel) else None

    @property
    def samples_per_step(self) -> int:
        """The batch over all ranks; one in tokens is rounded to whole samples of ``model.context`` tokens."""
        return self.training.batch.samples(Clock(tokens_per_sample=self.tokens_per_sample))

    @property
    def run_directory(self) -> str:
        return self.run.replace("{name}", self.name)

    @property
    def store_directory(self) -> str:
        return self.data.store.replace("{name}", self.name)
