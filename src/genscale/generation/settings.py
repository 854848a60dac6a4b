"""A run's recorded ``sampling`` with other values for some of its keys."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from genscale.recipe.mistakes import one_line
from genscale.recipe.sampling import ImageSampling, TextSampling
from genscale.runtime.errors import UserError

Settings = TypeVar("Settings", TextSampling, ImageSampling)


def with_overrides(recorded: Settings, overrides: dict[str, Any]) -> Settings:
    """``recorded`` with the values of ``overrides``; raises UserError for an unknown key or an impossible value."""
    part, values = type(recorded), {**recorded.model_dump(), **overrides}
    try:
        return part.model_validate(values)
    except ValidationError as error:
        raise UserError(one_line(error, part, values, lambda key: "sampling")) from None
