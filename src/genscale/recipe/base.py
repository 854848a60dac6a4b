"""What every part of a recipe is: typed, immutable, and strict about unknown keys."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Part(BaseModel):
    """A part of a recipe. Unknown keys are errors; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or URL: ``~`` is expanded; a relative path is relative to the current folder."""


def _named(template: str) -> str:
    template = os.path.expanduser(template)
    if "{" in template.replace("{name}", ""):
        raise ValueError(f"only {{name}} may stand in braces, not '{template}'")
    return template


NamedPath = Annotated[str, AfterValidator(_named)]
"""A path in which ``{name}`` stands for the recipe's name."""
