"""Hugging Face datasets as a source, through the library ``datasets`` (an extra)."""

from __future__ import annotations

from typing import Any

from genscale.runtime.errors import UserError


def load(name: str, split: str, where: str) -> Any:
    """The split of a dataset: ``owner/name``, ``owner/name:configuration``, or a local folder of data files.

    Raises:
        UserError: the library is not installed, or it cannot load the dataset.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where}: 'hf:{name}' needs the library datasets: pip install 'genscale[datasets]'") from None
    name, _, configuration = name.partition(":")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: cannot load the dataset 'hf:{name}', split '{split}': {reason}") from None
