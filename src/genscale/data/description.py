"""What networks must know of their data; kept with a run, so that it samples without its store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from genscale.data.tokenizer import Tokenizer
from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically

IMAGES_FILE = "images.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextDescription:
    """Text of a vocabulary."""

    vocabulary: int
    """The tokenizer's number of tokens."""


@dataclass(frozen=True)
class ImageDescription:
    """Images, or latents of images, of one shape."""

    channels: int
    """Of what is stored: 1, 3, or those of the latents."""
    resolution: int
    """Height and width of what is stored, in pixels or latent cells."""
    classes: tuple[str, ...] = ()
    """Names, in the order of their numbers; empty where there are no labels."""
    caption_vocabulary: int = 0
    """Tokens of the captions' tokenizer, the padding 0 included; 0 where there are no captions."""
    caption_tokens: int = 0
    autoencoder: str | None = None
    """The folder of the autoencoder whose latents are stored; None: pixels."""

    def save(self, folder: Path) -> None:
        """Write ``images.json`` into the folder."""
        write_atomically(folder / IMAGES_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


Description = TextDescription | ImageDescription


def load_description(folder: Path) -> Description:
    """What a run directory or a store says of its data; raises UserError where it says nothing."""
    images = folder / IMAGES_FILE
    if images.exists():
        try:
            described = json.loads(images.read_text(encoding="utf-8"))
            return ImageDescription(**{**described, "classes": tuple(described["classes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{images} is damaged: {error}") from None
    return TextDescription(Tokenizer.load(folder / TOKENIZER_FILE).size)
