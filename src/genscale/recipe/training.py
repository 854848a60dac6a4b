"""The recipe's ``training`` and ``layout``: how the weights are found, and on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genscale.recipe.amount import Amount, PositiveAmount
from genscale.recipe.base import Part
from genscale.recipe.low_communication import LowCommunication


class AdamW(Part):
    """Decoupled weight decay (Loshchilov and Hutter 2019), fused."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    bits: Literal[8, 32] = 32
    """8: optimizer state in 8 bits through torchao (extra ``genscale[torchao]``)."""


class Muon(Part):
    """Orthogonalised momentum for matrices inside the blocks (Jordan 2024), AdamW for the rest."""

    kind: Literal["muon"] = "muon"
    learning_rate: float = Field(default=0.02, gt=0)
    """For matrices."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(default=5, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    """For matrices."""
    rest: AdamW = AdamW(learning_rate=3e-3, weight_decay=0.0)
    """For embeddings, head, norms and biases."""


class Adafactor(Part):
    """Factored second moments (Shazeer and Stern 2018)."""

    kind: Literal["adafactor"] = "adafactor"
    learning_rate: float = Field(default=1e-2, gt=0)
    beta2_decay: float = Field(default=-0.8, le=0)
    clip: float = Field(default=1.0, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)


class ScheduleFree(Part):
    """Schedule-free AdamW (Defazio et al. 2024): averaging in place of a schedule."""

    kind: Literal["schedule_free"] = "schedule_free"
    learning_rate: float = Field(default=2.5e-3, gt=0)
    beta1: float = Field(default=0.9, gt=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


Optimizer = Annotated[AdamW | Muon | Adafactor | ScheduleFree, Field(discriminator="kind")]


class Schedule(Part):
    """The learning rate as a pure function of samples seen: a factor on each group's learning rate."""

    kind: Literal["constant", "linear", "cosine", "warmup_stable_decay", "inverse_sqrt"] = "cosine"
    warmup: Amount = Amount(2, "%")
    decay: Amount = Amount(20, "%")
    """The last part of the budget in which ``warmup_stable_decay`` goes down."""
    final: float = Field(default=0.1, ge=0, le=1)
    """The factor at the end of the budget (linear, cosine, warmup_stable_decay)."""

    @model_validator(mode="after")
    def _within_the_budget(self) -> Schedule:
        for name, amount in (("warmup", self.warmup), ("decay", self.decay)):
            if amount.unit == "%" and amount.value > 100:
                raise ValueError(f"{name} ({amount}) is more than the whole budget")
        return self


class Validation(Part):
    every: PositiveAmount = Amount(5, "%")
    amount: PositiveAmount | None = None
    """How much of the validation split is scored each time; by default all of it."""


class Checkpoints(Part):
    every: PositiveAmount = Amount(5, "%")
    keep_last: int = Field(default=2, ge=1)
    keep_every: PositiveAmount | None = None
    """Checkpoints at multiples of this are kept for good."""


class EarlyStopping(Part):
    patience: int = Field(default=5, ge=1)
    """Validations without improvement before training stops."""
    minimum_improvement: float = Field(default=0.0, ge=0)


class Guard(Part):
    """What happens on a bad step: it is skipped; after too many in a row, the last good checkpoint comes back."""

    spike: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """A loss more than this many standard deviations above its recent mean is a spike; null: only non-finite is bad.
    ``auto``: 6, and null for the players of a game, whose losses rise whenever the other one finds something."""
    window: int = Field(default=64, ge=8)
    """Steps in the recent mean."""
    patience: int = Field(default=3, ge=1)
    """Bad steps in a row before going back."""
    rollbacks: int = Field(default=3, ge=0)
    """Times to go back before giving up."""


class ExponentialAverage(Part):
    """Average of the weights; validation, samples and exports use it."""

    kind: Literal["exponential"] = "exponential"
    half_life: PositiveAmount = Amount(2, "%")


class PowerAverage(Part):
    """Averages with power-function profiles, from which one of any length is put together after training (Karras et
    al. 2024, section 3). Validation, samples and exports use the first."""

    kind: Literal["power"] = "power"
    lengths: tuple[float, ...] = Field(default=(0.05, 0.10), min_length=1)
    """Relative standard deviations of the profiles: the part of the run that an average looks back over."""
    snapshot_every: PositiveAmount = Amount(5, "%")
    """Between the snapshots that are kept for putting together others."""

    @model_validator(mode="after")
    def _profiles(self) -> PowerAverage:
        for length in self.lengths:
            if not 0 < length < 0.28:
                raise ValueError(f"lengths are relative standard deviations, between 0 and 0.28, not {length:g}")
        return self


Average = Annotated[ExponentialAverage | PowerAverage, Field(discriminator="kind")]


class Trackers(Part):
    """Besides ``metrics.jsonl``, which is always written."""

    tensorboard: bool = False
    wandb: str | None = None
    """A Weights & Biases project; offline when ``WANDB_MODE=offline``."""
    mlflow: str | None = None
    """An MLflow experiment, at ``MLFLOW_TRACKING_URI`` or in the run directory."""


class Training(Part):
    budget: PositiveAmount = Amount(5e6, "tokens")
    batch: PositiveAmount = Amount(64, "samples")
    """Tokens or samples in each step over all ranks. Accumulation follows from it."""
    optimizer: Optimizer = Muon()
    schedule: Schedule = Schedule()
    gradient_clip: float | None = Field(default=1.0, gt=0)
    average: Average | None = None
    low_communication: LowCommunication | None = None
    """Groups of ranks that train apart and exchange weights now and then, for slow networks."""
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    early_stopping: EarlyStopping | None = EarlyStopping()
    guard: Guard = Guard()
    trackers: Trackers = Trackers()
    log_every: int = Field(default=10, ge=1)
    """Steps between lines in ``metrics.jsonl``."""
    profile: tuple[int, int] | None = None
    """First and last step of a torch profiler trace, written to ``trace/`` in the run directory."""

    @model_validator(mode="after")
    def _units(self) -> Training:
        if self.batch.unit not in ("tokens", "samples"):
            raise ValueError(f"batch is given in tokens or samples, not '{self.batch}'")
        if self.budget.unit == "%":
            raise ValueError("budget is given in tokens, samples, steps or epochs, not in % of itself")
        if self.low_communication is not None:
            if self.average is not None:
                raise ValueError("low_communication: groups that train apart have no common average; set average: null")
            if self.optimizer.kind == "schedule_free":
                raise ValueError("low_communication: optimizer 'schedule_free' judges weights that no group shares")
        if self.profile and not 0 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile is the first and the last step, not {list(self.profile)}")
        return self
