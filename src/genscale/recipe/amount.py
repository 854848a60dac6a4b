"""Amounts as people write them: ``5M tokens``, ``250 steps``, ``2 epochs``, ``64 samples``, ``3%``.

The clock of a run is the number of samples seen; every amount turns into samples in one place, :meth:`Amount.samples`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

_UNITS = ("tokens", "samples", "steps", "epochs", "%")
_SCALES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(
    r"^\s*(\d[\d_]*(?:\.\d+)?(?:e[+-]?\d{1,2})?)\s*([kMBT]?)\s*(tokens?|samples?|images?|steps?|epochs?|%)\s*$"
)
_EXPECTED = "an amount such as '5M tokens', '250 steps', '2 epochs', '64 samples' or '3%'"


@dataclass(frozen=True)
class Clock:
    """What turns an amount into samples. A field is None where it is not known yet."""

    tokens_per_sample: int | None = None
    samples_per_step: int | None = None
    samples_per_epoch: int | None = None
    samples_in_budget: int | None = None


@dataclass(frozen=True)
class Amount:
    """A number with its unit: tokens, samples, steps, epochs, or % of the training budget."""

    value: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"the unit is one of {', '.join(_UNITS)}, not {self.unit!r}")
        object.__setattr__(self, "value", float(self.value))

    @classmethod
    def parse(cls, text: object) -> Amount:
        """From ``'5M tokens'``; raises ValueError with what was expected."""
        if isinstance(text, Amount):
            return text
        match = _PATTERN.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"expected {_EXPECTED}, not {text!r}")
        number, scale, unit = match.groups()
        unit = unit if unit == "%" else unit.rstrip("s") + "s"
        value = float(Decimal(number.replace("_", "")) * _SCALES[scale])
        return cls(value, "samples" if unit == "images" else unit)

    def samples(self, clock: Clock) -> int:
        """The amount in samples, at least 0; raises ValueError where the clock lacks what the unit needs."""
        factor = {
            "samples": 1.0,
            "tokens": clock.tokens_per_sample and 1.0 / clock.tokens_per_sample,
            "steps": clock.samples_per_step,
            "epochs": clock.samples_per_epoch,
            "%": clock.samples_in_budget and clock.samples_in_budget / 100.0,
        }[self.unit]
        if factor is None:
            raise ValueError(f"'{self}' cannot be used here: a {self.unit.rstrip('s')} has no size yet")
        return round(self.value * factor)

    def __str__(self) -> str:
        """The shortest form that parses back to an equal amount."""
        number = f"{int(self.value)}" if self.value.is_integer() else repr(self.value)
        for scale in ("T", "B", "M", "k"):
            scaled = Decimal(repr(self.value)) / _SCALES[scale]
            if scaled >= 1 and scaled == round(scaled, 3):
                number = f"{scaled.normalize():f}{scale}"
                break
        unit = self.unit.rstrip("s") if number == "1" else self.unit
        return f"{number}%" if unit == "%" else f"{number} {unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.to_string_ser_schema())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": _PATTERN.pattern, "description": _EXPECTED}


def _more_than_nothing(amount: Amount) -> Amount:
    if amount.value <= 0:
        raise ValueError(f"must be more than 0, not '{amount}'")
    return amount


PositiveAmount = Annotated[Amount, AfterValidator(_more_than_nothing)]
