"""BPE dropout: algorithm 1 of the paper, the tokenizer's own ids without dropout, and stores that can be made again."""

from __future__ import annotations

import collections
import itertools
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from scipy import stats

from genscale.data import bpe_dropout
from genscale.data.bpe_dropout import LONGEST, BPEDropout
from genscale.data.prepare import prepare
from genscale.data.store import Store
from genscale.data.tokenizer import END_OF_DOCUMENT, PROBE, Tokenizer, train_bpe
from genscale.recipe.schema import Recipe

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))
TEXTS = [file.read_text(encoding="utf-8") for file in SOURCES[:12]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 800)


def places(count: int, document: str = "document") -> list[tuple[str, int]]:
    return [(document, number) for number in range(count)]


def split(tokens: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])]


def merges_of(tokenizer: Tokenizer) -> dict[tuple[str, str], int]:
    return {(left, right): rank for rank, (left, right) in enumerate(json.loads(tokenizer.content)["model"]["merges"])}


def distribution(word: tuple[str, ...], merges: dict[tuple[str, str], int], rate: float) -> collections.Counter:
    """Of the cuts of a word by algorithm 1 of Provilkov et al. 2020: every merge there is, in order of rank."""
    pairs = [(merges[pair], i) for i, pair in enumerate(itertools.pairwise(word)) if pair in merges]
    chances: collections.Counter = collections.Counter()
    left_out = 1.0
    for _, i in sorted(pairs):
        merged = (*word[:i], word[i] + word[i + 1], *word[i + 2 :])
        for cut, chance in distribution(merged, merges, rate).items():
            chances[cut] += left_out * (1 - rate) * chance
        left_out *= rate
    chances[word] += left_out
    return chances


def assert_drawn_from(cuts: list[tuple[str, ...]], chances: collections.Counter) -> None:
    found = collections.Counter(cuts)
    assert found.keys() <= chances.keys()
    common = [cut for cut in chances if chances[cut] * len(cuts) >= 5]
    expected = [chances[cut] * len(cuts) for cut in common]
    observed = [found[cut] for cut in common]
    rest = len(cuts) - sum(expected), len(cuts) - sum(observed)
    if rest[0] >= 5:
        expected, observed = [*expected, rest[0]], [*observed, rest[1]]
    expected = np.array(expected) * sum(observed) / sum(expected)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_without_dropout_the_ids_are_the_tokenizers_own(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, PROBE, "", "x", "日本語のテキスト" * 4, " " * 100]
    found = BPEDropout(tokenizer, 0.0).encode_flat(texts, places(len(texts)))
    expected = tokenizer.encode_flat(texts)
    assert max(map(len, TEXTS)) > 50_000
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[0].dtype == np.uint32


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("word", [" return", "......", "assertEqual"])
def test_cuts_are_drawn_as_algorithm_1_draws_them(tokenizer: Tokenizer, word: str, rate: float) -> None:
    tokens, offsets = BPEDropout(tokenizer, rate).encode_flat([word] * 6000, places(6000))
    names = {token: name for name, token in json.loads(tokenizer.content)["model"]["vocab"].items()}
    cuts = [tuple(names[token] for token in part) for part in split(tokens, offsets)]
    letters = tuple("Ġ" + word[1:] if word.startswith(" ") else word)
    assert_drawn_from(cuts, distribution(letters, merges_of(tokenizer), rate))


def test_cuts_are_drawn_as_the_library_tokenizers_draws_them() -> None:
    # Merges that never compete for a letter; where they do, the library draws again about merges that were left out.
    tokenizer = train_bpe(["abcd"] * 9, 260)
    assert merges_of(tokenizer) == {("a", "b"): 0, ("c", "d"): 1, ("ab", "cd"): 2}
    model = json.loads(tokenizer.content)
    model["model"]["dropout"] = 0.3
    library = tokenizers.Tokenizer.from_str(json.dumps(model))
    theirs = collections.Counter(tuple(library.encode("abcd").ids) for _ in range(4000))
    ours = collections.Counter(
        map(tuple, split(*BPEDropout(tokenizer, 0.3).encode_flat(["abcd"] * 4000, places(4000))))
    )
    assert theirs.keys() == ours.keys()
    assert len(ours) == 5
    table = [[counts[cut] for cut in ours] for counts in (theirs, ours)]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_text_comes_back_from_any_cuts(tokenizer: Tokenizer, rate: float) -> None:
    texts = [*TEXTS[:4], PROBE, "=" * (3 * LONGEST + 7), "日本語のテキスト" * 40, "", "a"]
    tokens, offsets = BPEDropout(tokenizer, rate).encode_flat(texts, places(len(texts)))
    assert [tokenizer.decode(part) for part in split(tokens, offsets)] == texts
    assert len(tokens) > len(tokenizer.encode_flat(texts)[0])


def test_cuts_depend_on_the_text_its_place_and_the_seed_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text[start : start + 900] for text in TEXTS if len(text) > 9000 for start in range(0, 9000, 900)][:30]
    dropout = BPEDropout(tokenizer, 0.2)
    together = split(*dropout.encode_flat(texts, places(len(texts))))
    alone = [dropout.encode_flat([text], [place])[0].tolist() for text, place in zip(texts, places(30), strict=True)]
    assert together == alone
    monkeypatch.setattr(bpe_dropout, "_GROUP", 2000)
    assert split(*dropout.encode_flat(texts, places(len(texts)))) == together
    for other in (
        split(*dropout.encode_flat(texts, places(len(texts), "another"))),
        split(*BPEDropout(tokenizer, 0.2, seed=1).encode_flat(texts, places(len(texts)))),
    ):
        assert all(one != two for one, two in zip(together, other, strict=True))


def test_each_occurrence_is_cut_in_its_own_way(tokenizer: Tokenizer) -> None:
    tokens, _ = BPEDropout(tokenizer, 0.3).encode_flat([" return" * 500], places(1))
    assert len(tokenizer.encode(" return")) == 1
    names = {token: name for name, token in json.loads(tokenizer.content)["model"]["vocab"].items()}
    cuts, cut = [], ()
    for token in tokens.tolist():
        if names[token].startswith("Ġ") and cut:
            cuts.append(cut)
            cut = ()
        cut = (*cut, names[token])
    assert_drawn_from(cuts, distribution(tuple("Ġreturn"), merges_of(tokenizer), 0.3))


def test_a_tokenizer_without_merges_and_no_text_at_all(tokenizer: Tokenizer) -> None:
    bytes_only = train_bpe(["x"], 257)
    assert BPEDropout(bytes_only, 0.1).encode_flat(["hé"], places(1))[0].tolist() == list("hé".encode())
    for texts in ([], [""], ["", ""]):
        tokens, offsets = BPEDropout(tokenizer, 0.1).encode_flat(texts, places(len(texts)))
        assert tokens.tolist() == []
        assert offsets.tolist() == [0] * (len(texts) + 1)


# In a store


def recipe(folder: Path, sources: Path, **options: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {
                "kind": "text",
                "sources": [str(sources)],
                "store": str(folder / "store"),
                "tokenizer": {"kind": "bpe", "vocabulary": 500, **options},
                "split": {"validation": 0.3},
            }
        }
    )


def parts(store: Store, part: str) -> dict[str, list[int]]:
    """The tokens of each document, its end left out."""
    tokens = np.concatenate([*store.shards(part), []]).astype(int)
    rows = [row for row in store.documents().to_pylist() if row["split"] == part]
    return {row["path"]: tokens[row["start"] : row["start"] + row["tokens"] - 1].tolist() for row in rows}


def test_a_store_is_the_same_with_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for file, text in zip(SOURCES, TEXTS, strict=False):
        (sources / file.name).write_text(text)
    (sources / "long.txt").write_text("".join(TEXTS))
    for module, name, value in (
        ("text_prepare", "UNIT", 90_000),
        ("units", "UNIT", 90_000),
        ("units", "LONG", 300_000),
    ):
        monkeypatch.setattr(f"genscale.data.{module}.{name}", value)
    plain = prepare(recipe(tmp_path / "plain", sources))
    one = prepare(recipe(tmp_path / "one", sources, dropout=0.1))
    monkeypatch.setattr("genscale.data.preparation._SMALL", 0)
    two = prepare(recipe(tmp_path / "two", sources, dropout=0.1), workers=2)
    one.verify()
    assert one.fingerprint == two.fingerprint != plain.fingerprint
    assert one.tokenizer.content == plain.tokenizer.content
    assert parts(one, "validation") == parts(plain, "validation")
    train, undropped = parts(one, "train"), parts(plain, "train")
    assert {path: one.tokenizer.decode(tokens) for path, tokens in train.items()} == {
        path: plain.tokenizer.decode(tokens) for path, tokens in undropped.items()
    }
    assert sum(map(len, train.values())) > 1.1 * sum(map(len, undropped.values()))
    assert one.bytes("train") == plain.bytes("train")
    end = one.tokenizer.end_of_document
    assert one.tokenizer.end_of_document_token == END_OF_DOCUMENT
    assert sum(int((np.asarray(shard) == end).sum()) for shard in one.shards("train")) == len(train)
