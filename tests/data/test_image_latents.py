from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genscale.data.image_store import ImageStore
from genscale.data.image_stream import ImageStream
from genscale.data.prepare import prepare
from genscale.recipe.load import recipe_from_mapping
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

diffusers = pytest.importorskip("diffusers", reason="pip install 'genscale[diffusers]' has AutoencoderKL")

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one, of random weights, that halves the resolution."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(folder)
    return folder


def recipe(folder: Path, autoencoder: Path, **data: Any) -> Recipe:
    np.savez(folder / "a.npz", image=IMAGES)
    values = {
        "kind": "images",
        "sources": [str(folder / "a.npz")],
        "resolution": 16,
        "split": {"validation": 0.3},
        "store": str(folder / "store"),
        "latents": {"autoencoder": str(autoencoder), "batch": 4},
        **data,
    }
    rest = {"objective": {"kind": "flow"}, "model": {"kind": "unet"}}
    return recipe_from_mapping({"data": values, **rest, "training": {"budget": "100 images", "batch": "10 images"}})


def test_latents_are_those_of_diffusers_shifted_and_scaled(tmp_path: Path, autoencoder: Path) -> None:
    store = prepare(recipe(tmp_path, autoencoder))
    assert isinstance(store, ImageStore)
    store.verify()
    described = store.described
    assert (described.channels, described.resolution, described.autoencoder) == (4, 8, str(autoencoder))
    assert (store.dtype, store.shape) == (np.float16, (8, 8, 4))
    network = diffusers.AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        pixels = torch.from_numpy(IMAGES.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        expected = (network.encode(pixels).latent_dist.mean - 0.25) * 0.5
    for row in store.documents().to_pylist():
        found = np.concatenate(store.shards(row["split"]))[row["index"]].transpose(2, 0, 1)
        assert np.abs(found - expected[row["position"]].numpy()).max() < 2e-3  # float16
    batch = next(ImageStream(store, "validation", 0).sweep(2))
    assert batch.images.shape == (2, 4, 8, 8)
    assert batch.images.dtype == torch.float32


def test_decoding_is_that_of_diffusers(autoencoder: Path) -> None:
    from genscale.data.image_latents import decode_latents

    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network = diffusers.AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        expected = network.decode(latents / 0.5 + 0.25).sample
    found = decode_latents(str(autoencoder), latents, batch=2)
    assert found.shape == (5, 3, 16, 16)
    assert (found - expected).abs().max() < 1e-4


def test_an_interrupted_encoding_goes_on(tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genscale.data import image_latents, image_work

    monkeypatch.setattr(image_work, "UNIT", 10)  # a unit for each file
    whole = prepare(recipe(tmp_path, autoencoder, store=str(tmp_path / "whole")))
    made = recipe(tmp_path, autoencoder)
    encode = image_latents.Autoencoder.encode
    calls = 0

    def counting(self: object, pixels: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return encode(self, pixels)  # type: ignore[arg-type]

    def stop(stage: str, done: int, total: int | None, unit: str) -> None:
        if stage == "writing the store":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_latents.Autoencoder, "encode", counting)
        with pytest.raises(KeyboardInterrupt):
            prepare(made, on_progress=stop)
        first = calls
        assert first >= 30 / 4
        assert prepare(made).fingerprint == whole.fingerprint
        assert calls == first  # nothing is encoded twice


def refusal(made: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        prepare(made)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_that_do_not_fit_the_autoencoder(tmp_path: Path, autoencoder: Path) -> None:
    assert refusal(recipe(tmp_path, autoencoder, channels=1)) == (
        f"data.channels is 1, but the autoencoder {autoencoder} takes 3"
    )
    assert refusal(recipe(tmp_path, autoencoder, resolution=17)) == (
        f"data.resolution is 17, but the autoencoder {autoencoder} needs a multiple of 2"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert refusal(recipe(tmp_path, tmp_path / "other")).startswith(
        f"data.latents.autoencoder: {tmp_path}/other is no AutoencoderKL: "
    )


def test_a_changed_autoencoder_is_noticed(tmp_path: Path, autoencoder: Path) -> None:
    import shutil

    shutil.copytree(autoencoder, tmp_path / "mine")
    made = recipe(tmp_path, tmp_path / "mine")
    prepare(made)
    weights = tmp_path / "mine" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert refusal(made) == (
        f"the store {tmp_path}/store was made from other inputs: the autoencoder {tmp_path}/mine was changed since; "
        "choose another data.store or delete that folder"
    )
