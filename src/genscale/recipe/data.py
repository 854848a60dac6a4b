"""The recipe's ``data``: where the raw data is, how it is cut and stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from genscale.recipe.base import NamedPath, Part, UserPath
from genscale.recipe.image_data import ImageData


class Source(Part):
    """One source of documents: a path, a glob, any fsspec URL, or a Hugging Face dataset."""

    path: UserPath = Field(min_length=1)
    """A file, a folder, a glob (``~/corpus/**/*.txt``), an fsspec URL (``s3://``, ``gs://``, ``https://``, ``memory://``),
    ``python:stdlib`` for the sources of Python's own standard library, or ``hf:NAME`` for a Hugging Face dataset
    (``hf:NAME:CONFIGURATION`` for one of its configurations)."""
    format: Literal["auto", "text", "jsonl", "csv", "parquet"] = "auto"
    """``auto`` decides by the file's ending, after a compression ending such as ``.gz`` or ``.zst``."""
    text: str = "text"
    """The column or key that holds the text (jsonl, csv, parquet, hf)."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    licence: str | None = None
    """Recorded with every document of this source."""
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


class BPETokenizer(Part):
    """A byte-level BPE tokenizer, trained on the training split of these sources."""

    kind: Literal["bpe"] = "bpe"
    vocabulary: int = Field(default=4096, ge=257)
    """Number of tokens: 256 bytes, the merges, and the end-of-document token."""
    training_bytes: int = Field(default=100_000_000, ge=1)
    """The tokenizer is trained on at most this much text, chosen by document hash."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """BPE dropout (Provilkov et al. 2020): the chance that a merge is left out, where the training split is encoded.
    Each occurrence of a word is then cut in a way of its own, drawn once, when the store is prepared. Validation and
    sampling are encoded without. The paper's value is 0.1; sequences become about a quarter longer."""


class CharacterTokenizer(Part):
    """One token for each character that occurs in the sources."""

    kind: Literal["characters"] = "characters"
    end_of_document: bool = True
    """Whether a token marks the end of each document."""


class FileTokenizer(Part):
    """A given ``tokenizer.json``."""

    kind: Literal["file"] = "file"
    path: UserPath
    end_of_document: str | None = None
    """The token that ends a document; by default the file's ``<|endoftext|>``, ``<|end_of_text|>``, ``</s>`` or
    ``<eos>``."""


Tokenizer = Annotated[BPETokenizer | CharacterTokenizer | FileTokenizer, Field(discriminator="kind")]


class Split(Part):
    """How validation data is held out."""

    by: Literal["document", "tail"] = "document"
    """``document``: by the hash of the document's text, so that the same document never sits on both sides.
    ``tail``: the last part of each document, for a corpus that is one long text."""
    validation: float = Field(default=0.02, gt=0, lt=1)
    """The fraction held out: of the documents, or of each document's characters."""


class TextData(Part):
    """Text, tokenised into memory-mapped shards."""

    kind: Literal["text"] = "text"
    sources: tuple[Source, ...] = ()
    store: NamedPath = "stores/{name}"
    """The folder of the prepared store; ``{name}`` is the recipe's name."""
    mixture: dict[str, float] | None = None
    """Stores to train on, with their weights, instead of the one in ``store``; each must share the tokenizer."""
    tokenizer: Tokenizer = BPETokenizer()
    split: Split = Split()
    undecodable: Literal["replace", "drop", "fail"] = "replace"
    """What happens to a document whose bytes are not UTF-8: replace the bytes, drop the document, or stop."""
    damaged: Literal["drop", "fail"] = "fail"
    """What happens to a damaged part of a file (a broken parquet row group, jsonl line or compressed stream)."""
    shard_tokens: int = Field(default=100_000_000, ge=1024)
    """Tokens in each shard file."""
    seed: int = 0
    """Chooses which documents are held out and which train the tokenizer."""

    @model_validator(mode="after")
    def _weights(self) -> TextData:
        if self.mixture is not None and not self.mixture:
            raise ValueError("mixture names no store; leave it out to train on the recipe's own")
        for store, weight in (self.mixture or {}).items():
            if weight <= 0:
                raise ValueError(f"mixture gives '{store}' the weight {weight:g}; expected more than 0")
        return self


Data = Annotated[TextData | ImageData, Field(discriminator="kind")]
