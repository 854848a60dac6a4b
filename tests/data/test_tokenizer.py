from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from genscale.data import tokenizer as module
from genscale.data.tokenizer import PATTERN, PROBE, Tokenizer, byte_characters, character_tokenizer, train_bpe
from genscale.runtime.errors import UserError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def standard_library(pattern: str) -> list[str]:
    return [file.read_text(encoding="utf-8", errors="replace") for file in sorted(LIBRARY.glob(pattern))]


def odd_texts(count: int = 2000) -> list[str]:
    """Random mixtures of what cuts words in odd places, and of all of Unicode."""
    draw = random.Random(0)
    pieces = [
        *("'s", "'S", "'ſ", "'LL", "'Re", "don't", "'", "''s", " '"),
        *(" \n", "\n\n", "\r\n", "\r", "\t\t", "    ", "\u00a0", "\u2003", "\u3000", "\x0b", "\x1c", "\x85", "\u2028"),
        *(" 123456", "¼", "①", "१२३", "\u0660\u0661", "Ⅷ", "ﬁ", "ẞ", "İ", "ǅ", "K", "ª", "\u0345", "e\u0301"),
        *(
            "\u200b",
            "\u200d",
            "\ufe0f",
            "\ufeff",
            "👩\u200d👩\u200d👧",
            "🏳️\u200d🌈",
            "\U0010ffff",
            "\x00",
            "<|endoftext|>",
        ),
        *("word", " Word", "日本語", "한국어", "((", "]]]", "==", "_", "__init__"),
    ]

    def piece() -> str:
        if draw.random() < 0.7:
            return draw.choice(pieces)
        point = draw.choice([draw.randrange(0x3000), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])
        return chr(point)

    mixtures = ["".join(piece() for _ in range(draw.randrange(1, 40))) for _ in range(count)]
    runs = [" " * 10_000, "\n" * 5000, " \n" * 5000, "\n " * 3000 + "x", "a" * 50_000, "é" * 9999, "   x" * 999]
    return [*mixtures, *runs, "", PROBE]


def code_points() -> list[str]:
    """Every character of the basic plane, and one in 64 of the others, between letters."""
    points = [chr(point) for point in (*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 64))]
    return ["".join(f"a{c}b {c}{c}\n" for c in points[i : i + 512]) for i in range(0, len(points), 512)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(standard_library("a*.py"), 2000)


def reference(tokenizer: Tokenizer, path: Path) -> tokenizers.Tokenizer:
    """The library ``tokenizers`` on the saved file; specials as text, as in documents."""
    tokenizer.save(path / "tokenizer.json")
    loaded = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


def test_bpe_gives_the_ids_of_the_library_tokenizers(bpe: Tokenizer, tmp_path: Path) -> None:
    assert bpe.encoder == "fastokens"
    texts = [*standard_library("[b-t]*.py"), *odd_texts()]
    assert sum(map(len, texts)) > 2_000_000
    expected = [encoding.ids for encoding in reference(bpe, tmp_path).encode_batch_fast(texts)]
    found = bpe.encode_batch(texts)
    assert [tokens.tolist() for tokens in found] == expected
    assert [bpe.decode(tokens) for tokens in expected] == texts
    assert [bpe.encode(text) for text in texts[:5]] == expected[:5]


def test_bpe_is_exact_on_all_of_unicode(bpe: Tokenizer, tmp_path: Path) -> None:
    texts = code_points()
    expected = [encoding.ids for encoding in reference(bpe, tmp_path).encode_batch_fast(texts)]
    assert [tokens.tolist() for tokens in bpe.encode_batch(texts)] == expected
    assert [bpe.decode(tokens) for tokens in expected] == texts


def merges_by_counting(texts: list[str], count: int) -> list[bytes]:
    """BPE as it is told in books: merge the commonest pair of neighbours, of equals the one with the lowest ids."""
    splitter = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    split = {word: list(word.encode()) for word in words}
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(count):
        pairs: Counter[tuple[int, int]] = Counter()
        for word, ids in split.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in split.values():
            place = 0
            while place < len(ids) - 1:
                if (ids[place], ids[place + 1]) == best:
                    ids[place : place + 2] = [len(tokens)]
                place += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def test_bpe_training_merges_the_commonest_pair() -> None:
    texts = [*standard_library("ast.py"), "日本語 ééé  \n\n\n 12345 " * 30]
    trained = train_bpe(texts, 420)
    expected = merges_by_counting(texts, 420 - 257)
    assert [trained.decode_bytes([token]) for token in range(419)] == expected


def test_bpe_training_does_not_depend_on_threads_or_order() -> None:
    program = (
        "import sys, pathlib; from genscale.data.tokenizer import train_bpe;"
        f"texts = [f.read_text() for f in sorted(pathlib.Path({str(LIBRARY)!r}).glob('a*.py'))];"
        "print(train_bpe(texts[::int(sys.argv[1])], 1500).fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, order],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
        for order in ("1", "-1")
    }
    assert len(found) == 1


def test_the_end_of_document_token_is_the_last_of_the_vocabulary(bpe: Tokenizer) -> None:
    assert (bpe.size, bpe.end_of_document, bpe.end_of_document_token) == (2000, 1999, "<|endoftext|>")


def test_text_that_quotes_the_end_of_document_does_not_end(bpe: Tokenizer) -> None:
    characters = character_tokenizer("<|endoftxa>")
    for tokenizer in (bpe, characters):
        tokens = tokenizer.encode("a<|endoftext|>a")
        assert tokenizer.end_of_document not in tokens
        assert tokenizer.decode(tokens) == "a<|endoftext|>a"
        assert tokenizer.decode([*tokens, tokenizer.end_of_document]) == "a<|endoftext|>a"


def test_decoding_half_a_character(bpe: Tokenizer) -> None:
    tokens = bpe.encode("日")
    assert len(tokens) > 1
    assert "\ufffd" in bpe.decode(tokens[:1])
    assert b"".join(bpe.decode_bytes([token]) for token in tokens) == "日".encode()


def test_encode_flat_says_where_each_text_begins(bpe: Tokenizer) -> None:
    texts = ["one", "", "two three", "日本"]
    tokens, offsets = bpe.encode_flat(texts)
    assert (tokens.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert [tokens[a:b].tolist() for a, b in pairwise(offsets)] == [bpe.encode(text) for text in texts]
    empty, offsets = bpe.encode_flat([])
    assert (len(empty), offsets.tolist()) == (0, [0])


def test_saving_and_loading_keeps_every_byte(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.content, again.fingerprint, again.size) == (bpe.content, bpe.fingerprint, bpe.size)
    assert again.fingerprint != train_bpe(standard_library("ast.py"), 500).fingerprint


def test_a_vocabulary_that_the_text_cannot_fill() -> None:
    with pytest.raises(UserError) as caught:
        train_bpe(["ab abc abcd"], 4096)
    # " abc", "ab", "abc", " abcd" and " abc" again: five merges and no pair is left
    found = len(merges_possible("ab abc abcd"))
    assert str(caught.value) == (
        f"data.tokenizer.vocabulary: 4096 tokens need 3839 merges, but the training text has only {found}; "
        f"expected at most {found + 257}, or more text"
    )
    assert train_bpe(["ab abc abcd"], found + 257).size == found + 257


def merges_possible(text: str) -> list[bytes]:
    for count in range(1, 100):
        try:
            tokens = merges_by_counting([text], count)
        except ValueError:  # no pair is left
            return tokens[256:]
    raise AssertionError


# Characters


def test_characters(tmp_path: Path) -> None:
    text = "".join(odd_texts(300)) + "line\n"
    tokenizer = character_tokenizer(text)
    assert tokenizer.size == len(set(text)) + 1
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text) == [ids[character] for character in text]
    library = reference(tokenizer, tmp_path)
    assert library.encode(text).ids == tokenizer.encode(text)
    assert library.decode(tokenizer.encode(text)) == text == tokenizer.decode(tokenizer.encode(text))
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.encoder, again.end_of_document) == ("characters", len(set(text)))
    assert again.encode(text) == tokenizer.encode(text)


def test_characters_without_an_end_of_document() -> None:
    tokenizer = character_tokenizer("abc", end_of_document=False)
    assert (tokenizer.size, tokenizer.end_of_document) == (3, None)


@pytest.mark.parametrize("unknown", ["d", "\n", "é", "\U0001f600"])
def test_an_unknown_character_is_named(unknown: str) -> None:
    with pytest.raises(UserError) as caught:
        character_tokenizer("abcz").encode(f"ab{unknown}c")
    assert f"the character {unknown!r} (U+{ord(unknown):04X}) is not in the tokenizer's vocabulary" in str(caught.value)
    assert "\n" not in str(caught.value)


# Given files


def save(tokenizer: tokenizers.Tokenizer, path: Path, *specials: str) -> Path:
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(path / "given.json"))
    return path / "given.json"


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0), *((letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    vocabulary = {"[UNK]": 0, "the": 1, "##m": 2, "cat": 3, "##s": 4}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize("make", [unigram, word_piece])
def test_other_kinds_of_tokenizer_are_read(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    given = make()
    tokenizer = Tokenizer.load(save(given, tmp_path, "</s>"))
    assert tokenizer.end_of_document == given.token_to_id("</s>") == tokenizer.size - 1
    for text in ("the cat", "them cats the", "the  dog", ""):
        assert tokenizer.encode(text) == given.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == given.decode(given.encode(text).ids)


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_the_usual_names_of_the_end_token_are_found(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.load(save(word_piece(), tmp_path, "[MASK]", name))
    assert (tokenizer.end_of_document_token, tokenizer.end_of_document) == (name, 6)


def test_a_named_end_token(tmp_path: Path) -> None:
    file = save(word_piece(), tmp_path, "<stop>", "</s>")
    assert Tokenizer.load(file, end_of_document="<stop>").end_of_document == 5
    with pytest.raises(UserError) as caught:
        Tokenizer.load(file, end_of_document="<stopp>")
    assert str(caught.value) == f"{file} has no token '<stopp>' to end documents with, did you mean '<stop>'?"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    given = word_piece()
    given.enable_truncation(2)
    given.enable_padding(length=8)
    assert len(Tokenizer.load(save(given, tmp_path, "</s>")).encode("the cat the cat the")) == 5


def test_an_encoder_that_differs_is_given_up(bpe: Tokenizer) -> None:
    tokenizer = Tokenizer(bpe.content)
    expected = tokenizer.encode("def f(x): return 'naïve'")

    class Wrong:
        def encode_batch_flat(self, texts: list[str], *arguments: bool) -> tuple[bytes, bytes]:
            return b"\0" * 4 * len(texts), np.arange(len(texts) + 1, dtype=np.uint64).tobytes()

    tokenizer._fast = Wrong()
    tokenizer.check(["def f(x)"])
    assert tokenizer.encoder == "tokenizers"
    assert tokenizer.encode("def f(x): return 'naïve'") == expected


def test_a_probe_that_differs_keeps_the_fast_encoder_out(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
            return tokenizers.Tokenizer.from_str(bpe.content).encode("something else")

    assert module._fast_encoder(bpe.content, Other()) is None


@pytest.mark.parametrize("content", ["{}", "not json", json.dumps({"version": "1.0", "model": {"type": "Magic"}})])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json is not a tokenizer\.json that the library tokenizers reads: "):
        Tokenizer.load(tmp_path / "t.json")


def test_a_missing_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*t\.json: No such file or directory"):
        Tokenizer.load(tmp_path / "t.json")


def test_byte_characters_are_those_of_the_library() -> None:
    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = byte_characters()
    assert (letters[ord(" ")], letters[ord("\n")], letters[ord("A")]) == ("Ġ", "Ċ", "A")
