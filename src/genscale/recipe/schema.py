"""The recipe: everything that, with the data and the code, makes a run."""

from __future__ import annotations

from pydantic import Field, model_validator

from genscale.recipe.amount import Clock
from genscale.recipe.base import NamedPath, Part
from genscale.recipe.data import TextData
from genscale.recipe.model import TransformerModel
from genscale.recipe.objective import CausalObjective, Objective
from genscale.recipe.training import Layout, Sampling, Training


class Recipe(Part):
    """A whole training run, from raw data to samples."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0)
    run: NamedPath = "runs/{name}"
    """The run directory; ``{name}`` is the recipe's name."""
    data: TextData = TextData()
    model: TransformerModel = TransformerModel()
    objective: Objective = CausalObjective()
    training: Training = Training()
    layout: Layout = Layout()
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        context, batch, budget = self.model.context, self.training.batch, self.training.budget
        samples = self.samples_per_step
        if samples < 1:
            raise ValueError(f"training.batch ({batch}) is less than one sample of model.context ({context} tokens)")
        micro_batch = self.layout.micro_batch
        if micro_batch != "auto" and micro_batch > samples:
            raise ValueError(
                f"layout.micro_batch ({micro_batch} samples) is larger than training.batch ({samples} samples)"
            )
        if budget.unit != "epochs" and budget.samples(Clock(context, samples)) < samples:
            raise ValueError(f"training.budget ({budget}) is less than one step of training.batch ({batch})")
        if self.objective.kind == "masked" and self.model.sliding_window is not None:
            raise ValueError("model.sliding_window reaches back only; objective.kind 'masked' looks both ways")
        return self

    @property
    def samples_per_step(self) -> int:
        """The batch over all ranks; one in tokens is rounded to whole samples of ``model.context`` tokens."""
        return self.training.batch.samples(Clock(tokens_per_sample=self.model.context))

    @property
    def run_directory(self) -> str:
        return self.run.replace("{name}", self.name)

    @property
    def store_directory(self) -> str:
        return self.data.store.replace("{name}", self.name)
