"""``genscale sample`` and ``genscale export`` for runs that learned images, as a user types them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.cli.main import main
from genscale.data.description import ImageDescription
from genscale.generation.run import sample
from genscale.objectives.build import build_objective
from genscale.recipe.load import recipe_from_mapping
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training.checkpoint import CheckpointStore
from genscale.training.state import controls

CLASSES = ("Ankle boot", "Bag", "Sneaker")
UNET = {"kind": "unet", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [1], "head_width": 16}
GAN = {"kind": "gan", "latent": 6, "generator": [8, 8], "discriminator": [8, 8], "group_width": None}


def make_run(folder, name, model, objective, classes=CLASSES):
    """A run with checkpoints of random weights at steps 1 and 2, of which the second is the best."""
    recipe = recipe_from_mapping(
        {
            "run": str(folder / name),
            "data": {"kind": "images", "resolution": 8, "channels": 1},
            "model": model,
            "objective": objective,
            "training": {"budget": "100 samples", "batch": "4 samples"},
            "sampling": {"kind": "images", "count": 6, "steps": 3},
        }
    )
    run = Run.create(folder / name, recipe, "fingerprint")
    ImageDescription(channels=1, resolution=8, classes=classes).save(run.directory)
    store = CheckpointStore(run.checkpoints, keep_last=2)
    for step in (1, 2):
        objective = build_objective(recipe, ImageDescription(channels=1, resolution=8, classes=classes))
        torch.manual_seed(step)
        for parameter in objective.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        tensors = {f"networks.{each}": tensor for each, tensor in objective.networks.state_dict().items()}
        tensors |= {f"controls.{each}": tensor for each, tensor in controls(objective).items()}
        store.save(step, tensors, {}, best=step == 2, wait=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs: of classes, without them, and a GAN; a picture, and a mask of its right half."""
    folder = tmp_path_factory.mktemp("images")
    make_run(folder, "flow", UNET, {"kind": "flow"})
    make_run(folder, "plain", UNET, {"kind": "edm"}, classes=())
    make_run(folder, "gan", GAN, {"kind": "adversarial"})
    picture = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (16, 1))
    Image.fromarray(picture).save(folder / "picture.png")
    Image.fromarray(np.where(np.arange(16) >= 8, 255, 0).astype(np.uint8)[None].repeat(16, 0)).save(folder / "mask.png")
    return folder


@pytest.fixture
def call(folder, monkeypatch, capfd):
    """Run a command line in the folder; its standard output, or, where it is to fail, its standard error."""
    monkeypatch.chdir(folder)

    def call(*words, code=0):
        with pytest.raises(SystemExit) as exit:
            main(words)
        out, err = capfd.readouterr()
        assert (exit.value.code or 0) == code, err
        return out if code == 0 else err

    return call


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_grid_of_one_class_is_drawn_and_said(call, folder):
    words = ["sample", "flow", "--label", "sneaker", "--guidance", "2", "--steps", "4", "--grid", "2x3"]
    said = json.loads(call(*words, "--out", "out/shoes.png", "--json"))
    assert said == {"paths": ["out/shoes.png"], "labels": ["Sneaker"] * 6, "captions": None, "rows": 2, "columns": 3}
    drawn = pixels(folder / "out/shoes.png")
    assert drawn.shape == (16, 24)
    assert drawn.std() > 5
    assert call(*words, "--out", "again.png") == "again.png\n"
    assert (pixels(folder / "again.png") == drawn).all()
    for other in (
        ["--seed", "1"],
        ["--label", "bag"],
        ["--guidance", "3"],
        ["--checkpoint", "1"],
        ["--sampler", "ddim"],
    ):
        call(*words, *other, "--out", "other.png")
        assert (pixels(folder / "other.png") != drawn).any(), other


def test_by_default_all_classes_are_drawn_into_a_grid_named_after_the_run(call, folder):
    assert call("sample", "flow") == "flow.png\n"
    assert pixels(folder / "flow.png").shape == (16, 24)
    labels = json.loads(call("sample", "flow", "--json"))["labels"]
    assert labels == list(CLASSES) * 2


def test_a_folder_and_arrays_hold_what_the_grid_shows(call, folder):
    call("sample", "gan", "--count", "4", "--out", "grid.png")
    call("sample", "gan", "--count", "4", "--out", "arrays.npz")
    assert call("sample", "gan", "--count", "4", "--out", "drawn") == "drawn: 4 images\n"
    arrays = np.load(folder / "arrays.npz")
    assert arrays["label"].tolist() == [*CLASSES, CLASSES[0]]
    grid = pixels(folder / "grid.png")
    for number, (row, column) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):
        image = grid[row : row + 8, column : column + 8]
        assert (image == arrays["image"][number, :, :, 0]).all()
        assert (image == pixels(folder / "drawn" / arrays["label"][number] / f"0000{number}.png")).all()


def test_the_number_of_images_at_a_time_changes_nothing(folder):
    for name in ("flow", "gan"):
        many, few = (sample(folder / name, count=5, batch=batch, show_progress=False) for batch in (64, 2))
        torch.testing.assert_close(many.images, few.images, rtol=0, atol=1e-5)


def test_each_row_goes_from_one_seed_to_the_other(call, folder):
    for name in ("flow", "gan"):
        call("sample", name, "--interpolate", "7", "--grid", "2x5", "--out", "way.png")
        for seed, column in (("0", 0), ("7", 4)):
            call("sample", name, "--seed", seed, "--count", "2", "--grid", "2x1", "--out", "end.png")
            end = pixels(folder / "way.png")[:, 8 * column : 8 * column + 8]
            assert abs(end - pixels(folder / "end.png")).max() <= 1
    said = json.loads(call("sample", "flow", "--interpolate", "7", "--json"))
    assert (said["rows"], said["columns"], said["labels"]) == (1, 8, ["Ankle boot"] * 8)


def test_a_picture_is_kept_under_the_mask_and_followed_by_its_strength(call, folder):
    words = ["sample", "flow", "--image", "picture.png", "--count", "1", "--steps", "10", "--out", "drawn.png"]
    call(*words, "--strength", "0.1")
    before = pixels(folder / "drawn.png")
    expected = np.tile(np.linspace(0, 255, 8), (8, 1))
    near = abs(before - expected).mean()
    call(*words, "--strength", "1")
    assert near < 40 < abs(pixels(folder / "drawn.png") - expected).mean()
    call(*words, "--mask", "mask.png")
    drawn = pixels(folder / "drawn.png")
    assert abs(drawn - expected)[:, :3].max() < 12
    assert abs(drawn - expected)[:, 4:].mean() > 40


def test_a_weaker_checkpoint_guides_where_there_is_no_condition(call, folder):
    words = ["sample", "plain", "--count", "1", "--guidance", "2"]
    call(*words, "--guide", "1", "--out", "guided.png")
    call(*words, "--guide", str(folder / "plain"), "--out", "by-itself.png")
    call("sample", "plain", "--count", "1", "--out", "alone.png")
    assert (pixels(folder / "by-itself.png") == pixels(folder / "alone.png")).all()
    assert (pixels(folder / "guided.png") != pixels(folder / "alone.png")).any()


def test_truncation_pulls_a_gan_to_one_image(folder):
    def spread(truncation):
        drawn = sample(folder / "gan", labels=["bag"], count=8, truncation=truncation, show_progress=False)
        return drawn.images.std(dim=0).mean()

    assert spread(0) < 1e-6 < spread(0.5) < spread(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flow", "--prompt", "a"], "--prompt: flow draws images, and has --label, --caption"),
        (["flow", "--top-k", "3"], "--top-k: flow draws images"),
        (["flow", "--label", "sneakers"], "label: no class 'sneakers', did you mean 'Sneaker'?"),
        (["plain", "--label", "bag"], "label: the images of this run have no classes, so there is no 'bag'"),
        (["flow", "--caption", "a bag"], "caption: the images of flow have no captions"),
        (["plain", "--guidance", "2"], "guidance: 2 needs a model trained with a condition"),
        (["gan", "--steps", "3"], "steps: gan is a GAN"),
        (["gan", "--image", "picture.png"], "image: gan is a GAN"),
        (["flow", "--truncation", "0.5"], "truncation: flow is a diffusion model"),
        (["flow", "--mask", "mask.png"], "mask: there is no image to start from"),
        (["flow", "--strength", "0.5"], "strength: there is no image to start from"),
        (["flow", "--image", "none.png"], "none.png: no such file"),
        (["flow", "--grid", "8"], "grid: expected rows and columns such as 8x8, found '8'"),
        (["flow", "--grid", "2x2", "--count", "5"], "grid: 2x2 has no room for count 5"),
        (["flow", "--guidance-interval", "0.9", "0.1"], "guidance_interval goes up"),
        (["flow", "--out", "a.jpg"], "a.jpg: images are written as .png"),
        (["flow", "--checkpoint", "9"], "9"),
        (["flow", "--guidance", "2", "--guide", "gan"], "guide: expected a diffusion model"),
        (["flow", "--guidance", "2", "--guide", "nowhere"], "nowhere is no run directory"),
    ],
)
def test_what_does_not_fit_is_one_line(words, message, call, folder):
    before = sorted(folder.iterdir())
    error = call("sample", *words, code=2)
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")
    assert sorted(folder.iterdir()) == before


def test_the_python_interface_tells_of_mistakes_as_well(folder):
    for how, words in (
        ({"guidence": 2}, "did you mean 'guidance'"),
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"count": 0}, "at least 1, not 0"),
        ({"prompts": ["a"]}, "draws images"),
    ):
        with pytest.raises(UserError, match=words) as error:
            sample(folder / "flow", **how)
        assert "\n" not in str(error.value)


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from genscale.cli.main import main\ntry: main(['sample', '--help'])\nexcept SystemExit: pass\n"
    )
    program += "print(sorted({'torch', 'pydantic', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--guidance" in done.stdout
