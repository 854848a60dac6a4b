"""A folder that diffusers loads offline, and that draws the image which the run draws from the same noise."""

import json
import os
import subprocess
import sys

import pytest
import torch

from genscale.data.description import ImageDescription
from genscale.export.run import export
from genscale.objectives.build import build_objective
from genscale.objectives.image_request import ImageRequest
from genscale.recipe.load import recipe_from_mapping
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng
from genscale.training.checkpoint import CheckpointStore
from genscale.training.state import controls

pytest.importorskip("diffusers")

CLASSES = ("boot", "bag", "coat")
UNET = {"kind": "unet", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [1], "head_width": 16}
TRANSFORMER = {"kind": "diffusion_transformer", "layers": 2, "width": 16, "heads": 1, "patch": 2}
PLAIN = ImageDescription(channels=1, resolution=8)
LABELLED = ImageDescription(channels=3, resolution=8, classes=CLASSES)


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory):
    """diffusers copies the code of folders into one place of the user's; here into a place of the tests'."""
    folder = str(tmp_path_factory.mktemp("modules"))
    from diffusers.utils import constants, dynamic_modules_utils

    saved = {module: module.HF_MODULES_CACHE for module in (constants, dynamic_modules_utils)}
    for module in saved:
        module.HF_MODULES_CACHE = folder
    yield
    for module, value in saved.items():
        module.HF_MODULES_CACHE = value
    sys.path[:] = [each for each in sys.path if each != folder]


def made(folder, model, objective, described):
    """A run with one checkpoint of random weights, and its objective."""
    recipe = recipe_from_mapping(
        {
            "run": str(folder / "run"),
            "data": {"kind": "images", "resolution": 8},
            "model": model,
            "objective": objective,
            "training": {"budget": "100 samples", "batch": "4 samples"},
        }
    )
    run = Run.create(folder / "run", recipe, "fingerprint")
    described.save(run.directory)
    built = build_objective(recipe, described).eval()
    torch.manual_seed(0)
    for parameter in built.parameters():  # the answer begins at zero
        torch.nn.init.normal_(parameter, std=0.1)
    tensors = {f"networks.{name}": tensor for name, tensor in built.networks.state_dict().items()}
    tensors |= {f"controls.{name}": tensor for name, tensor in controls(built).items()}
    CheckpointStore(run.checkpoints, keep_last=2).save(1, tensors, {}, best=True, wait=True)
    return run, built


def loaded(folder, **how):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **how)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


OBJECTIVES = {
    "flow": ({"kind": "flow", "shift": 3.0}, "euler"),
    "edm": ({"kind": "edm", "sigma_data": 0.4}, "euler"),
    "ddpm epsilon": ({"kind": "ddpm"}, "dpm_solver_2m"),
    "ddpm v": ({"kind": "ddpm", "prediction": "v", "noise_schedule": "cosine", "steps": 400}, "dpm_solver_2m"),
    "ddpm x0": ({"kind": "ddpm", "prediction": "x0", "zero_terminal_snr": True}, "ddim"),
}


@pytest.mark.parametrize("model", [UNET, TRANSFORMER], ids=["unet", "transformer"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_same_noise_gives_the_same_image(name, model, tmp_path):
    options, sampler = OBJECTIVES[name]
    run, objective = made(tmp_path, model, options, LABELLED)
    folder = export(run, "diffusers", tmp_path / "exported")
    pipeline = loaded(folder, trust_remote_code=True)
    labels, noise = torch.tensor([2, 0]), torch.randn(2, 3, 8, 8)
    for guidance in (1.0, 2.5):
        request = ImageRequest(labels=labels, sampler=sampler, steps=8, guidance=guidance, noise=noise)
        expected = objective.sample(request, Rng(0, 0, "sample", torch.arange(2)))
        asked = {"latents": noise, "num_inference_steps": 8, "guidance_scale": guidance, "output_type": "pt"}
        drawn = pipeline(labels=["coat", 0], **asked).images
        assert expected.std() > 0.05
        torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (pipeline(**asked | {"guidance_scale": 1.0}).images - expected).abs().max() > 1e-3  # without a class


def test_discrete_steps_without_a_condition_need_no_code(tmp_path):
    run, objective = made(tmp_path, UNET, {"kind": "ddpm"}, PLAIN)
    folder = export(run, "diffusers", tmp_path / "exported")
    assert not list(folder.rglob("*.py"))
    pipeline = loaded(folder)
    assert type(pipeline).__name__ == "DDIMPipeline"
    shape = (3, 1, 8, 8)
    images = pipeline(batch_size=3, generator=torch.manual_seed(4), num_inference_steps=10, output_type="np").images
    noise = torch.randn(shape, generator=torch.manual_seed(4))
    request = ImageRequest(sampler="ddim", steps=10, noise=noise)
    expected = objective.sample(request, Rng(0, 0, "sample", torch.arange(3))).clamp(-1, 1) / 2 + 0.5
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-3)


def test_captions_and_augmentation_travel_along(tmp_path):
    described = ImageDescription(channels=1, resolution=8, caption_vocabulary=300, caption_tokens=5)
    options = {"kind": "flow", "augmentation": {"flip": True}}
    run, objective = made(tmp_path, UNET, options, described)
    run.tokenizer.write_text("{}")
    folder = export(run, "diffusers", tmp_path / "exported")
    assert (folder / "tokenizer.json").read_text() == "{}"
    pipeline = loaded(folder, trust_remote_code=True)
    captions, noise = torch.tensor([[3, 299, 7, 0, 0], [1, 0, 0, 0, 0]]), torch.randn(2, 1, 8, 8)
    request = ImageRequest(captions=captions, sampler="euler", steps=6, guidance=2.0, noise=noise)
    expected = objective.sample(request, Rng(0, 0, "sample", torch.arange(2)))
    asked = {"latents": noise, "num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "pt"}
    drawn = pipeline(caption_tokens=captions, **asked).images
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.slow
def test_the_folder_is_loaded_where_there_is_no_genscale(tmp_path):
    run, _ = made(tmp_path, TRANSFORMER, {"kind": "flow"}, LABELLED)
    export(run, "diffusers", tmp_path / "exported")
    program = (
        "import sys; sys.modules['genscale'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained('exported', trust_remote_code=True)\n"
        "images = pipeline(labels=['bag'] * 2, num_inference_steps=2, guidance_scale=2.0).images\n"
        "print([image.size for image in images], pipeline.config.id2label['2'])\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "[(8, 8), (8, 8)] coat\n", done.stderr


def test_latents_are_decoded_as_the_run_decodes_them(tmp_path):
    from diffusers import AutoencoderKL

    from genscale.data.image_latents import decode_latents

    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.2,
    ).save_pretrained(tmp_path / "autoencoder")
    described = ImageDescription(channels=2, resolution=8, autoencoder=str(tmp_path / "autoencoder"))
    run, objective = made(tmp_path, UNET, {"kind": "ddpm"}, described)
    pipeline = loaded(export(run, "diffusers", tmp_path / "exported"), trust_remote_code=True)
    noise = torch.randn(2, 2, 8, 8)
    request = ImageRequest(sampler="dpm_solver_2m", steps=5, noise=noise)
    expected = decode_latents(described.autoencoder, objective.sample(request, Rng(0, 0, "sample", torch.arange(2))))
    drawn = pipeline(latents=noise, num_inference_steps=5, output_type="pt").images
    assert drawn.shape == (2, 3, 16, 16)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_exported_is_told_and_leaves_nothing(tmp_path):
    gan = {"kind": "gan", "latent": 4, "generator": [4, 4], "discriminator": [4, 4], "group_width": None}
    run, _ = made(tmp_path / "gan", gan, {"kind": "adversarial"}, PLAIN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for to, out, words in (
        ("diffusers", "new", "diffusers draws with diffusion models"),
        ("difusers", "new", "did you mean 'diffusers'"),
        ("diffusers", "full", "is not an empty folder"),
    ):
        with pytest.raises(UserError, match=words) as error:
            export(run, to, tmp_path / out)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "gan"]


def test_an_export_into_an_empty_folder_is_whole(tmp_path):
    run, _ = made(tmp_path, UNET, {"kind": "edm"}, PLAIN)
    (tmp_path / "empty").mkdir()
    folder = export(run, "diffusers", tmp_path / "empty", checkpoint=1)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["denoiser"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
