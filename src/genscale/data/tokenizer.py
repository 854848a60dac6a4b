"""Tokenizers: byte-level BPE trained here, characters, or any given file; all saved as a ``tokenizer.json``.

The file is the standard one of the ``tokenizers`` library, whose ids are the truth. Faster encoders stand in for it
where they give the same ids: ``fastokens`` for BPE (checked against ``tokenizers`` on a text of hard cases when a
tokenizer is loaded, and on a part of each work unit when a store is prepared), a table of code points for characters.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Cuts text into words before BPE: GPT-4's pattern in the form that Llama 3 uses, which fast encoders know by heart."""

EVERY_CHARACTER = r"[\s\S]"

PROBE = (
    "def f(x):\n\treturn x  # it's, IT'S, 'ſ' we'LL\r\n\r\n   \n  naïve café, "
    "日本語のテキスト한국어 हिन्दी עברית ١٢٣٤٥ 1234567 ½Ⅷ①\n"
    "\u00a0\u2003\u3000 \u200b\u200d\ufe0f👩\u200d👩\u200d👧 🏳️\u200d🌈 e\u0301 \u0345 ﬁ ẞ İı ǅ "
    "\x00\x0b\x0c\x1c\x85\u2028\ufeff"
    "\U0001d54f\U0010ffff\ue000 <|endoftext|> </s> <s> [UNK] (((]]]==>>>> ____ ''' \"\"\"     x\n\n\n\n  y \t \n z"
)


class Tokenizer:
    """Text to token ids and back. Make one with :meth:`load`, :func:`train_bpe` or :func:`character_tokenizer`.

    Args:
        content: what stands in ``tokenizer.json``.
        end_of_document: the token that ends a document; by default the first of :data:`END_OF_DOCUMENT_NAMES` there is.
        where: named in errors.
    """

    def __init__(self, content: str, end_of_document: str | None = None, where: str = "tokenizer.json"):
        import tokenizers

        self.content = content
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        try:
            self._reference = tokenizers.Tokenizer.from_str(content)
            self._description: dict[str, Any] = json.loads(content)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{where} is not a tokenizer.json that the library tokenizers reads: {error}") from None
        self._reference.no_truncation()
        self._reference.no_padding()
        # Text is data: a document that quotes "<|endoftext|>" must not end there.
        self._reference.encode_special_tokens = True
        vocabulary = self._reference.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        """Number of token ids."""
        if end_of_document is not None and end_of_document not in vocabulary:
            from genscale.runtime.errors import nearest

            specials = [token["content"] for token in self._description.get("added_tokens", [])]
            raise UserError(
                f"{where} has no token '{end_of_document}' to end documents with{nearest(end_of_document, specials)}"
            )
        names = END_OF_DOCUMENT_NAMES if end_of_document is None else (end_of_document,)
        self.end_of_document_token = next((name for name in names if name in vocabulary), None)
        self.end_of_document = vocabulary[self.end_of_document_token] if self.end_of_document_token else None
        """The id of the token that ends a document, or None."""
        self._special = {token["id"] for token in self._description.get("added_tokens", []) if token["special"]}
        self._characters = _character_table(self._description)
        self._fast = None if self._characters is not None else _fast_encoder(content, self._reference)

    @classmethod
    def load(cls, path: str | Path, end_of_document: str | None = None) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            UserError: there is no such file, it is no tokenizer, or it lacks the given end-of-document token.
        """
        try:
            content = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"cannot read the tokenizer {path}: {reason}") from None
        return cls(content, end_of_document, where=str(path))

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, to the letter as it was loaded or made."""
        write_atomically(Path(path), self.content)

    @property
    def encoder(self) -> str:
        """Which library encodes: "characters", "fastokens" or "tokenizers"."""
        if self._characters is not None:
            return "characters"
        return "fastokens" if self._fast is not None else "tokenizers"

    def encode(self, text: str) -> list[int]:
        """The ids of one text. No special token is added, and none is read out of the text.

        Raises:
            UserError: the tokenizer has no token for a character.
        """
        return self.encode_flat([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32."""
        tokens, offsets = self.encode_flat(texts)
        return [tokens[start:stop] for start, stop in itertools.pairwise(offsets)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one array, and where each begins: (tokens,) uint32 and (texts + 1,) int64."""
        if self._characters is not None:
            return self._encode_characters(texts)
        if self._fast is not None:
            tokens, offsets = self._fast.encode_batch_flat(list(texts), False, True)
            return np.frombuffer(tokens, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)
        return self._encode_reference(texts)

    def check(self, texts: Sequence[str]) -> None:
        """Compare the fast encoder with ``tokenizers`` on these texts; where they differ, give the fast one up."""
        if self._fast is not None:
            (found, _), (expected, _) = self.encode_flat(texts), self._encode_reference(texts)
            if not np.array_equal(found, expected):
                self._fast = None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        if self._token_bytes is None:
            return self._reference.decode(list(ids), skip_special_tokens=True)
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of the tokens, special tokens left out.

        Of a byte-level tokenizer the bytes of a sequence are the joined bytes of its parts, so that text can be
        streamed token by token; a character may then be spread over several tokens.
        """
        if self._token_bytes is None:
            return self.decode(ids).encode()
        return b"".join([self._token_bytes[token] for token in ids])

    def tokens_beginning_with(self, token: int) -> list[int]:
        """The tokens that begin with the bytes of ``token``, itself among them; alone where bytes are unknown."""
        content = self._token_bytes
        if content is None or not content[token]:
            return [token]
        return [other for other, piece in enumerate(content) if piece.startswith(content[token])]

    @functools.cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """Bytes of each token, for tokenizers whose text is the joined bytes of the tokens; None for others."""
        vocabulary = self._reference.get_vocab(with_added_tokens=False)
        decoder = self._description.get("decoder") or {}
        if self._characters is not None:
            content = {token: text.encode() for text, token in vocabulary.items()}
        elif decoder.get("type") == "ByteLevel":
            byte_of = {character: byte for byte, character in enumerate(byte_characters())}
            try:
                content = {token: bytes(byte_of[letter] for letter in text) for text, token in vocabulary.items()}
            except KeyError:  # a vocabulary entry that stands for text, not for bytes
                return None
        else:
            return None
        for token in self._description.get("added_tokens", []):
            content[token["id"]] = b"" if token["special"] else token["content"].encode()
        return [content.get(token, b"") for token in range(self.size)]

    def _encode_reference(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(encoding) for encoding in encodings], out=offsets[1:])
        tokens = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return np.concatenate(tokens) if tokens else np.zeros(0, np.uint32), offsets

    def _encode_characters(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        assert self._characters is not None
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        tokens = self._characters[np.minimum(points, len(self._characters) - 1)]
        unknown = tokens == _UNKNOWN
        if unknown.any():
            character = chr(points[unknown.argmax()])
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the tokenizer's vocabulary of "
                f"{self.size} characters; the text that it was made from has none"
            )
        return tokens, offsets


_UNKNOWN = np.uint32(0xFFFFFFFF)


def _character_table(description: dict[str, Any]) -> np.ndarray | None:
    """(highest code point + 2,) uint32: the token of each code point, if this is a tokenizer of characters."""
    model, splitter = description.get("model") or {}, description.get("pre_tokenizer") or {}
    if model.get("type") != "WordLevel" or splitter.get("pattern") != {"Regex": EVERY_CHARACTER}:
        return None
    if description.get("normalizer") or model.get("unk_token") in model["vocab"]:
        return None
    characters = {ord(text): token for text, token in model["vocab"].items() if len(text) == 1}
    table = np.full(max(characters, default=0) + 2, _UNKNOWN)  # the last entry stands for all code points above
    table[list(characters)] = list(characters.values())
    return table


def _fast_encoder(content: str, reference: Any) -> Any:
    """fastokens, if it reads this tokenizer and gives the ids of ``reference`` on the hard cases; else None."""
    import fastokens

    try:
        fast = fastokens.Tokenizer.from_json_str(content)
        fast.no_truncation()
        fast.no_padding()
        found = fast.encode(PROBE, False, True).ids
    except Exception:  # it raises what it likes for the kinds of tokenizer that it does not know
        return None
    return fast if found == reference.encode(PROBE, add_special_tokens=False).ids else None


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's ``bytes_to_unicode``)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def character_tokenizer(characters: Iterable[str], end_of_document: bool = True) -> Tokenizer:
    """One token for each character, in the order of code points, and the end-of-document token after them."""
    vocabulary = {character: token for token, character in enumerate(sorted(set(characters)))}
    added = []
    if end_of_document:
        added.append(_special_token(len(vocabulary)))
        vocabulary[END_OF_DOCUMENT] = len(vocabulary)
    splitter = {"type": "Split", "pattern": {"Regex": EVERY_CHARACTER}, "behavior": "Isolated", "invert": False}
    # An unk_token that is not in the vocabulary makes an unknown character an error, not a silent token.
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}
    return Tokenizer(_tokenizer_json(added, splitter, {"type": "Fuse"}, model))


def train_bpe(texts: Iterable[str], vocabulary: int, at_most: bool = False) -> Tokenizer:
    """Train byte-level BPE: 256 bytes, ``vocabulary`` - 257 merges, and the end-of-document token, in this order.

    The result depends on the texts alone, not on their order or on the number of threads. Memory grows with the
    number of different words, not with the length of the text.

    Args:
        texts: to learn from.
        vocabulary: number of tokens.
        at_most: be content with fewer tokens where the texts hold too few pairs for that many merges.

    Raises:
        UserError: the texts hold too few pairs, and ``at_most`` is not set.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocabulary - 1, buffer_size=64, pattern=PATTERN)
    ranks = {bytes(content): rank for content, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocabulary - 1 and not at_most:
        raise UserError(
            f"data.tokenizer.vocabulary: {vocabulary} tokens need {vocabulary - 257} merges, but the training text has "
            f"only {len(ranks) - 256}; expected at most {len(ranks) + 1}, or more text"
        )
    letters = byte_characters()
    names = {content: "".join(letters[byte] for byte in content) for content in ranks}
    merges = [[names[left], names[right]] for left, right in _merges(ranks)]
    splitter = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {names[content]: rank for content, rank in sorted(ranks.items(), key=lambda item: item[1])},
        "merges": merges,
    }
    return Tokenizer(_tokenizer_json([_special_token(len(ranks))], splitter, decoder, model))


def _merges(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """The two parts of each merged token, in order of rank: what BPE makes of its bytes by the earlier merges."""
    for content in sorted(ranks, key=ranks.__getitem__):
        if len(content) == 1:
            continue
        parts = [content[i : i + 1] for i in range(len(content))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        yield parts[0], parts[1]


def _special_token(token: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": END_OF_DOCUMENT, **flags}


def _tokenizer_json(added: list[dict[str, Any]], splitter: dict, decoder: dict, model: dict) -> str:
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(description, ensure_ascii=False, indent=1) + "\n"
