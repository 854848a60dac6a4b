from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from genscale.data.prepare import prepare
from genscale.data.stream import Stream
from genscale.recipe.load import recipe_from_mapping
from genscale.runtime.errors import UserError


@dataclass
class ArrayStore:
    """A store with chosen tokens, shard sizes and documents: the part of ``Store`` that the stream reads."""

    arrays: list[np.ndarray]
    starts: np.ndarray = field(default_factory=lambda: np.array([0]))
    path: Path = Path("stores/x")
    tokenizer: Any = field(default_factory=lambda: SimpleNamespace(fingerprint="a", end_of_document=None))

    def tokens(self, split: str) -> int:
        return sum(len(array) for array in self.arrays)

    def shards(self, split: str) -> list[np.ndarray]:
        return self.arrays

    def document_starts(self, split: str) -> np.ndarray:
        return self.starts


def numbered(size: int, cuts: tuple[int, ...] = (), first: int = 0, **values: Any) -> ArrayStore:
    """A store in which each token is its own place, so that a window tells where it is from."""
    return ArrayStore(np.split(np.arange(first, first + size, dtype=np.uint32), cuts), **values)


def stream(
    store: ArrayStore | list[ArrayStore], context: int, weights: list[float] | None = None, **values: Any
) -> Stream:
    stores = store if isinstance(store, list) else [store]
    arguments = {"split": "train", "seed": 0} | values
    return Stream(stores, weights, context=context, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", [(), (500,), (3, 9, 400, 401, 700), tuple(range(0, 1000, 7))], ids=len)
def test_windows_are_consecutive_tokens_whatever_the_shards(cuts: tuple[int, ...]) -> None:
    whole = stream(numbered(1000), 16)
    cut = stream(numbered(1000, cuts), 16)
    for step in range(30):
        batch = cut.batch_at(step, 8)
        assert batch.tokens.dtype == torch.int64
        assert torch.equal(batch.tokens, batch.tokens[:, :1] + torch.arange(17))
        assert torch.equal(batch.tokens, whole.batch_at(step, 8).tokens)
        assert batch.valid is None
        assert torch.equal(batch.positions, torch.arange(8))


def test_any_order_of_calls_gives_the_same_batches() -> None:
    forward = stream(numbered(5000), 8)
    backward = stream(numbered(5000), 8)
    steps = [0, 1, 2, 500, 501, 9999]
    ahead = [forward.batch_at(step, 12).tokens for step in steps]
    behind = [backward.batch_at(step, 12).tokens for step in reversed(steps)]
    assert all(torch.equal(a, b) for a, b in zip(ahead, reversed(behind), strict=True))
    assert not torch.equal(ahead[0], stream(numbered(5000), 8, seed=1).batch_at(0, 12).tokens)


@pytest.mark.parametrize("batch", [1, 7, 64, 1500, 3000])
def test_parts_of_a_batch_together_are_the_batch(batch: int) -> None:
    source = stream([numbered(3000, starts=np.arange(0, 3000, 11)), numbered(900, first=10_000)], 8, [0.8, 0.2])
    for step in (0, 3):
        whole = source.batch_at(step, batch)
        for parts in (2, 3, 5):
            edges = [batch * part // parts for part in range(parts + 1)]
            pieces = [source.batch_at(step, batch, a, b) for a, b in itertools.pairwise(edges) if a < b]
            for name in ("tokens", "documents", "positions"):
                assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))


def test_batch_size_does_not_change_the_order_of_samples() -> None:
    source = stream(numbered(3000), 8)
    small = torch.cat([source.batch_at(step, 10).tokens for step in range(12)])
    assert torch.equal(small, torch.cat([source.batch_at(step, 40).tokens for step in range(3)]))


@pytest.mark.parametrize(("size", "context"), [(1000, 16), (999, 16), (17, 16), (33, 16), (40, 16), (100, 1), (2, 1)])
def test_an_epoch_holds_each_of_its_windows_once(size: int, context: int) -> None:
    source = stream(numbered(size), context)
    cuts = set()
    for epoch in range(20):
        samples = range(epoch * source.samples_per_epoch, (epoch + 1) * source.samples_per_epoch)
        starts = sorted(int(source.batch_at(sample, 1).tokens[0, 0]) for sample in samples)
        cut = starts[0]
        cuts.add(cut)
        assert starts == list(range(cut, cut + len(starts) * context, context))
        assert starts[-1] + context < size
        assert 0 <= cut < 2 * context
    assert source.samples_per_epoch == max(1, (size - context) // context)
    if context > 1 and size > context + 8:
        assert len(cuts) > 5


def test_epochs_are_shuffled_differently() -> None:
    source = stream(numbered(80_001), 8)
    size = source.samples_per_epoch
    first, second = ((source.batch_at(epoch, size).tokens[:, 0] // 8).double() for epoch in range(2))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([first, torch.arange(size).double()]))[0, 1]) < 0.05


def test_over_the_epochs_every_token_is_learned_from() -> None:
    source = stream(numbered(333), 16)
    targets = source.batch_at(0, 400 * source.samples_per_epoch).tokens[:, 1:]
    assert set(targets.unique().tolist()) == set(range(1, 333))


def test_documents_are_counted_within_the_window() -> None:
    generator = np.random.default_rng(0)
    starts = np.unique(np.concatenate([[0], generator.integers(0, 4000, 300), [1000, 1001, 1002]]))
    source = stream(numbered(4000, (1234, 3000), starts=starts), 32)
    begins = np.zeros(4000, dtype=int)
    begins[starts] = 1
    document = np.cumsum(begins)
    several = 0
    for step in range(40):
        batch = source.batch_at(step, 6)
        assert batch.documents.dtype == torch.int32
        places = batch.tokens.numpy()
        np.testing.assert_array_equal(batch.documents.numpy(), document[places] - document[places[:, :1]])
        several += int((batch.documents[:, -1] > 1).sum())
    assert several > 20


def test_a_mixture_takes_its_share_of_each_store_and_passes_over_each_fully() -> None:
    stores = [numbered(1000), numbered(400, (100,), first=10_000), numbered(300, first=20_000)]
    source = stream(stores, 8, [0.5, 0.3, 0.2])
    starts = torch.cat([source.batch_at(step, 50).tokens for step in range(40)])[:, 0]
    taken = (starts // 10_000).tolist()
    assert [taken.count(store) for store in range(3)] == [1000, 600, 400]
    assert source.samples_per_epoch == 124 + 49 + 36
    for store, size in enumerate((124, 49, 36)):
        mine = starts[starts // 10_000 == store][: 3 * size].view(3, size)
        assert all(len(epoch.unique()) == size for epoch in mine)


def test_without_weights_stores_are_mixed_by_size() -> None:
    source = stream([numbered(8008), numbered(2008, first=100_000)], 8)
    starts = source.batch_at(0, source.samples_per_epoch).tokens[:, 0]
    assert source.samples_per_epoch == 1250
    assert int((starts >= 100_000).sum()) == 250
    assert len(starts.unique()) == 1250


def test_stores_of_one_size_are_in_different_orders() -> None:
    source = stream([numbered(4000), numbered(4000, first=10_000)], 8, [1, 1])
    starts = source.batch_at(0, source.samples_per_epoch).tokens[:, 0]
    first, second = (starts[starts // 10_000 == store] % 10_000 // 8 for store in range(2))
    assert int((first == second).sum()) < 10


def test_nothing_the_size_of_the_corpus_is_held_in_memory() -> None:
    endless = np.broadcast_to(np.uint16(1), 10**13)
    tracemalloc.start()
    source = stream(ArrayStore([endless]), 1024)
    for step in (0, 10**6):
        source.batch_at(step, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_a_context_longer_than_the_data_is_refused() -> None:
    with pytest.raises(UserError) as error:
        stream(numbered(1200), 4096)
    assert str(error.value) == "model.context (4096) is longer than the training split (1200 tokens) of stores/x"
    with pytest.raises(UserError, match="longer than the training split"):
        stream(numbered(16), 16)


def test_stores_with_different_tokenizers_are_refused() -> None:
    other = SimpleNamespace(fingerprint="b", end_of_document=None)
    with pytest.raises(UserError, match="stores/y and stores/x have different tokenizers"):
        stream([numbered(100), numbered(100, path=Path("stores/y"), tokenizer=other)], 8)


def test_positions_outside_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="positions 4 to 9 are not in a batch of 8"):
        stream(numbered(100), 8).batch_at(0, 8, 4, 9)


@pytest.mark.parametrize("size", [2, 5, 16, 17, 18, 33, 34, 1000])
@pytest.mark.parametrize("batch", [1, 7])
def test_a_sweep_scores_each_token_but_the_first_once(size: int, batch: int) -> None:
    source = stream(numbered(size, (size // 2,)), 16, split="validation")
    scored: Counter[int] = Counter()
    numbers = []
    for part in source.sweep(batch):
        valid = torch.ones_like(part.tokens[:, 1:], dtype=torch.bool) if part.valid is None else part.valid
        scored.update(part.tokens[:, 1:][valid].tolist())
        numbers += part.positions.tolist()
        assert len(part) <= batch
        # The token that a scored one is predicted from is the one before it.
        assert torch.equal(part.tokens[:, :-1][valid] + 1, part.tokens[:, 1:][valid])
    assert scored == Counter(range(1, size))
    assert numbers == list(range(len(numbers)))


def test_padding_is_a_document_of_its_own_with_the_end_of_document_token() -> None:
    tokenizer = SimpleNamespace(fingerprint="a", end_of_document=77)
    store = numbered(12, starts=np.array([0, 10]), tokenizer=tokenizer)
    first, last = stream(store, 8, split="validation").sweep(1)
    assert first.valid is None
    assert first.documents.tolist() == [[0] * 9]
    assert last.tokens.tolist() == [[8, 9, 10, 11, 77, 77, 77, 77, 77]]
    assert last.documents.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2, 2]]
    assert last.valid is not None
    assert last.valid.tolist() == [[True] * 3 + [False] * 5]


def test_a_sweep_of_several_stores_never_crosses_from_one_to_the_next() -> None:
    stores = [numbered(20), numbered(2, first=100), numbered(1, first=200), numbered(30, first=300)]
    scored: list[int] = []
    for part in stream(stores, 8, split="validation").sweep(4):
        valid = torch.ones_like(part.tokens[:, 1:], dtype=torch.bool) if part.valid is None else part.valid
        scored += part.tokens[:, 1:][valid].tolist()
        assert torch.equal(part.tokens[:, :-1][valid] + 1, part.tokens[:, 1:][valid])
    assert scored == [*range(1, 20), 101, *range(301, 330)]


def test_a_limited_sweep_is_spread_out_and_always_the_same() -> None:
    def chosen(limit: int, seed: int) -> torch.Tensor:
        source = stream(numbered(100_000), 8, split="validation", seed=seed)
        return torch.cat([part.positions for part in source.sweep(16, limit)])

    total = 12_500
    windows = chosen(100, seed=0)
    assert torch.equal(windows, chosen(100, seed=1))
    assert torch.equal(windows // (total // 100), torch.arange(100))
    assert len((windows % (total // 100)).unique()) > 40
    assert torch.equal(chosen(total, 0), torch.arange(total))
    assert torch.equal(chosen(10**9, 0), torch.arange(total))


def test_a_split_with_nothing_to_score_is_refused() -> None:
    for size in (0, 1):
        with pytest.raises(UserError, match="validation split of stores/x has fewer than 2 tokens, too short to score"):
            stream(numbered(size), 8, split="validation")


def test_reads_a_prepared_store(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number}.txt").write_text(f"{number}: " + "abcdefgh"[: number % 8] * (number % 30))
    data = {
        "sources": [str(texts)],
        "store": str(tmp_path / "store"),
        "tokenizer": {"kind": "characters"},
        "split": {"validation": 0.2},
        "shard_tokens": 1024,
    }
    store = prepare(recipe_from_mapping({"data": data}), workers=1)
    assert len(store.shards("train")) > 3
    tokens = np.concatenate(store.shards("train")).astype(np.int64)
    end = store.tokenizer.end_of_document
    batch = Stream([store], None, "train", 100, seed=0).batch_at(3, 64)
    everywhere = np.lib.stride_tricks.sliding_window_view(tokens, 101)
    for window, documents in zip(batch.tokens.numpy(), batch.documents.numpy(), strict=True):
        assert (everywhere == window).all(axis=1).any()
        # A document begins after the token that ends the one before.
        np.testing.assert_array_equal(documents, np.concatenate([[0], np.cumsum(window[:-1] == end)]))
    swept = [part.tokens[:, :-1].reshape(-1) for part in Stream([store], None, "validation", 10, seed=0).sweep(7)]
    held_out = np.concatenate(store.shards("validation"))
    np.testing.assert_array_equal(torch.cat(swept)[: len(held_out) - 1], held_out[:-1])
