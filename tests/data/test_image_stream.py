from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from genscale.data.image_store import ImageStore, write_image_store
from genscale.data.image_stream import ImageStream
from genscale.runtime.errors import UserError


def numbered(path: Path, train: int, validation: int = 5, shard: int = 1000, labels: bool = True) -> ImageStore:
    """A store in which each image holds its own number, in two bytes."""
    images, numbers = {}, {}
    for split, count in (("train", train), ("validation", validation)):
        values = np.zeros((count, 4, 4, 1), np.uint8)
        values[:, 0, 0, 0], values[:, 0, 1, 0] = np.divmod(np.arange(count), 256)
        images[split], numbers[split] = values, np.arange(count) % 7
    classes = tuple("abcdefg") if labels else ()
    return write_image_store(path, images, numbers if labels else None, classes, shard)


def numbers_of(images: torch.Tensor) -> list[int]:
    pixels = ((images + 1) * 127.5).round().int()
    return (pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 0, 1]).tolist()


def test_pixels_go_from_minus_one_to_one_channels_first(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)
    pixels[0, 0, 0] = [0, 255, 128]
    store = write_image_store(tmp_path / "s", {"train": pixels, "validation": pixels[:1]})
    (batch,) = ImageStream(store, "validation", 0).sweep(4)
    assert batch.images.shape == (1, 3, 6, 6)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous()
    assert batch.images[0, :, 0, 0].tolist() == pytest.approx([-1, 1, 128 / 127.5 - 1], abs=1e-6)
    expected = torch.from_numpy(pixels[:1].astype(np.float64) / 127.5 - 1).permute(0, 3, 1, 2)
    assert (batch.images - expected).abs().max() < 1e-6
    assert batch.labels is None
    assert batch.captions is None


@pytest.mark.parametrize("shard", [1000, 40, 7])
def test_an_epoch_shows_every_image_once_with_its_label(tmp_path: Path, shard: int) -> None:
    stream = ImageStream(numbered(tmp_path / "s", 120, shard=shard), "train", 0)
    assert stream.samples_per_epoch == 120
    orders = []
    for epoch in range(3):
        batches = [stream.batch_at(step, 10) for step in range(epoch * 12, epoch * 12 + 12)]
        orders.append([number for batch in batches for number in numbers_of(batch.images)])
        assert sorted(orders[-1]) == list(range(120))
        for batch in batches:
            assert batch.labels is not None
            assert batch.labels.tolist() == [number % 7 for number in numbers_of(batch.images)]
            assert torch.equal(batch.positions, torch.arange(10))
    assert len(set(map(tuple, orders))) == 3  # each epoch in an order of its own


def test_shards_do_not_show(tmp_path: Path) -> None:
    whole = ImageStream(numbered(tmp_path / "a", 100), "train", 3)
    cut = ImageStream(numbered(tmp_path / "b", 100, shard=9), "train", 3)
    assert all(torch.equal(whole.batch_at(s, 16).images, cut.batch_at(s, 16).images) for s in range(20))


@pytest.mark.parametrize("batch", [1, 12, 100, 300])
def test_parts_of_a_batch_together_are_the_batch(tmp_path: Path, batch: int) -> None:
    stream = ImageStream(numbered(tmp_path / "s", 100), "train", 0)
    for step in (0, 1, 7):
        whole = stream.batch_at(step, batch)
        cuts = sorted({0, batch // 3, batch // 2, batch})
        parts = [stream.batch_at(step, batch, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    store = numbered(tmp_path / "s", 100)
    forward, again = (ImageStream(store, "train", 0) for _ in range(2))
    steps = [0, 5, 1, 99_999, 3]
    ahead = {step: forward.batch_at(step, 8).images for step in steps}
    assert all(torch.equal(again.batch_at(step, 8).images, ahead[step]) for step in reversed(steps))
    other = ImageStream(store, "train", 1)
    assert not torch.equal(other.batch_at(0, 8).images, ahead[0])


def test_orders_are_even(tmp_path: Path) -> None:
    """Each image comes first in an epoch about as often as any other: chi-square of 20 images over 4,000 epochs."""
    stream = ImageStream(numbered(tmp_path / "s", 20), "train", 0)
    first = Counter(numbers_of(stream.batch_at(0, 20 * 4000).images)[::20])
    chi_square = sum((first[number] - 200) ** 2 / 200 for number in range(20))
    assert chi_square < 43.8  # its 0.999 quantile for 19 degrees of freedom


def test_a_sweep_is_the_split_in_order(tmp_path: Path) -> None:
    stream = ImageStream(numbered(tmp_path / "s", 10, validation=50, shard=8), "validation", 0)
    batches = list(stream.sweep(16))
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    assert [number for batch in batches for number in numbers_of(batch.images)] == list(range(50))
    assert torch.equal(torch.cat([batch.positions for batch in batches]), torch.arange(50))


def test_a_limited_sweep_is_spread_evenly_and_the_same_for_every_seed(tmp_path: Path) -> None:
    store = numbered(tmp_path / "s", 10, validation=1000)
    found = [
        torch.cat([batch.positions for batch in ImageStream(store, "validation", seed).sweep(7, limit=20)]).tolist()
        for seed in (0, 1)
    ]
    assert found[0] == found[1]
    assert [number // 50 for number in found[0]] == list(range(20))
    assert len({number % 50 for number in found[0]}) > 5
    everything = list(ImageStream(store, "validation", 0).sweep(600, limit=2000))
    assert sum(map(len, everything)) == 1000


def test_a_split_without_images(tmp_path: Path) -> None:
    store = write_image_store(tmp_path / "s", {"train": np.zeros((3, 4, 4, 1), np.uint8)})
    with pytest.raises(UserError, match=r"the validation split of .*/s has no images: change data\.split\.validation"):
        ImageStream(store, "validation", 0)


def test_positions_outside_a_batch(tmp_path: Path) -> None:
    stream = ImageStream(numbered(tmp_path / "s", 10, labels=False), "train", 0)
    assert stream.batch_at(0, 4).labels is None
    for start, stop in ((-1, 2), (2, 2), (0, 5)):
        with pytest.raises(ValueError, match="are not in a batch of 4"):
            stream.batch_at(0, 4, start, stop)
