"""Images from a run directory: drawn anew, on the way between two seeds, or from a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.data.description import ImageDescription, load_description
from genscale.data.image_captions import caption_ids
from genscale.data.image_latents import Autoencoder
from genscale.data.tokenizer import Tokenizer
from genscale.generation.grid import grid, parse_grid, save_images, to_pixels, writable
from genscale.generation.images import Start, cells, class_numbers, draw, told
from genscale.generation.picture import read_mask, read_picture
from genscale.generation.settings import with_overrides
from genscale.objectives.objective import Objective
from genscale.recipe.image_data import ImageData
from genscale.recipe.sampling import ImageSampling
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.runtime.progress import progress
from genscale.training.restore import load_objective

_FRAMES = 8
"""Images between two seeds, where nobody says how many."""
_STRENGTH = 0.6
"""How far a picture is noised, where nobody says: what it shows stays, how it looks does not."""
_OF_DIFFUSION = ("sampler", "steps", "guidance", "guidance_interval", "guide", "image", "mask", "strength")
_OF_GANS = ("truncation",)


@dataclass(frozen=True)
class Images:
    """What was drawn."""

    images: Tensor
    """(n, channels, height, width) float32 from -1 to 1."""
    labels: tuple[str, ...] | None
    """The class of each, where classes were asked for."""
    captions: tuple[str, ...] | None
    cells: tuple[int, int]
    """Rows and columns of the grid."""

    @property
    def pixels(self) -> np.ndarray:
        """(n, h, w, c) uint8."""
        return to_pixels(self.images)

    @property
    def grid(self) -> np.ndarray:
        """(rows x h, columns x w, c) uint8."""
        return grid(self.pixels, *self.cells)

    def save(self, path: str | Path) -> list[Path]:
        """Write a grid (``.png``), arrays (``.npz``), or a folder of PNGs; the files that were written."""
        return save_images(writable(path), self.pixels, self.labels, self.cells)


def sample_images(
    run: Run | str | Path,
    *,
    labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    count: int | None = None,
    grid: str | tuple[int, int] | None = None,
    seed: int = 0,
    interpolate: int | None = None,
    image: str | Path | None = None,
    mask: str | Path | None = None,
    strength: float | None = None,
    guide: str | int | Path | None = None,
    checkpoint: str | int = "best",
    device: str = "auto",
    batch: int = 64,
    show_progress: bool | None = None,
    **sampling: Any,
) -> Images:
    """Draw images with a run's weights. A seed gives the same images at any batch size.

    Args:
        run: the run or its directory. Its data store is not needed.
        labels: names of classes, taken in turn; by default those of the run's recipe, or all.
        captions: the same for a model of captions.
        count: images; by default as many as the grid has, or as the run's recipe says.
        grid: rows and columns, as ``"8x8"`` or two numbers.
        interpolate: another seed: each row goes from an image of ``seed`` to one of it. (The ``ancestral`` sampler's
            own noise stays that of ``seed``.)
        image: a picture to start from (diffusion).
        mask: a picture, white where the image is drawn anew and black where it is kept.
        strength: how far the picture is noised, up to 1; by default 0.6, or 1 with a mask.
        guide: a weaker model to push away from: another checkpoint of the run, or another run's directory.
        checkpoint: ``best``, ``last``, or a step.
        batch: images drawn at a time.
        show_progress: by default where standard error is a terminal, plain lines elsewhere.
        sampling: keys of the recipe's ``sampling`` that differ from the run's: ``guidance=2``, ``steps=50``, ...

    Raises:
        UserError: no run, no such checkpoint, an unknown or impossible key, a class that there is not, a file that
            is no picture, or what this model cannot do, such as guidance without a condition.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    described, settings = load_description(run.directory), run.recipe.sampling
    if not isinstance(described, ImageDescription) or not isinstance(settings, ImageSampling):
        raise UserError(f"{run.directory} learned text and draws no images")
    given = {"image": image, "mask": mask, "strength": strength, "guide": guide, **sampling}
    _fits_the_family(run, [name for name, value in given.items() if value is not None])
    overrides = {**sampling, **({"labels": tuple(labels)} if labels else {})}
    settings = with_overrides(settings, {**overrides, **({"captions": tuple(captions)} if captions else {})})
    chosen = class_numbers(settings.labels, described.classes) if settings.labels else None
    place = pick_device(device)
    objective = load_objective(run, checkpoint, place)
    if chosen is None and told(objective) == "class":
        chosen = list(range(len(described.classes)))
    in_turn = len(chosen or settings.captions) or 1
    count, layout = _count_and_cells(count, grid, settings.count, in_turn, interpolate is not None)
    start = Start(**_picture(run, described, image, mask, strength, place), towards=interpolate, frames=layout[1])
    if interpolate is None:
        start = Start(start.image, start.strength, start.mask)
    with progress("drawing", count, "images", enabled=show_progress) as advance:
        drawn = draw(
            objective,
            described,
            settings,
            count=count,
            seed=seed,
            labels=chosen,
            captions=_encode(run, described, settings.captions),
            device=place,
            batch=batch,
            guide=_load_guide(run, guide, place),
            start=start,
            on_images=advance,
        )
    ways = [number // start.frames for number in range(count)]
    return Images(
        drawn,
        tuple(described.classes[chosen[way % len(chosen)]] for way in ways) if chosen else None,
        tuple(settings.captions[way % len(settings.captions)] for way in ways) if settings.captions else None,
        layout,
    )


def _fits_the_family(run: Run, given: Sequence[str]) -> None:
    """Raise UserError for the first option that a GAN, or a diffusion model, has no use for."""
    draws_at_once = run.recipe.objective.kind == "adversarial"
    for name in given:
        if draws_at_once and name in _OF_DIFFUSION:
            raise UserError(
                f"{name}: {run.directory} is a GAN, which draws at once and starts from nothing; leave it out"
            )
        if not draws_at_once and name in _OF_GANS:
            raise UserError(f"{name}: {run.directory} is a diffusion model; for truer images raise guidance instead")


def _count_and_cells(
    count: int | None, grid: str | tuple[int, int] | None, usual: int, in_turn: int, interpolates: bool
) -> tuple[int, tuple[int, int]]:
    """How many images, and in how many rows and columns."""
    if count is not None and count < 1:
        raise UserError(f"count: expected at least 1, not {count}")
    if grid is None and interpolates:  # a row for each way
        columns = min(count or _FRAMES, _FRAMES)
        grid = (math.ceil((count or columns) / columns), columns)
    if grid is None:
        count = usual if count is None else count
        return count, cells(count, in_turn)
    rows, columns = parse_grid(grid) if isinstance(grid, str) else grid
    count = rows * columns if count is None else count
    if count > rows * columns:
        raise UserError(f"grid: {rows}x{columns} has no room for count {count}")
    return count, (rows, columns)


def _picture(
    run: Run,
    described: ImageDescription,
    image: str | Path | None,
    mask: str | Path | None,
    strength: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """The start that files ask for."""
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{name}: there is no image to start from; give one")
        return {}
    found: dict[str, Any] = {"strength": strength if strength is not None else _STRENGTH if mask is None else 1.0}
    data = run.recipe.data
    assert isinstance(data, ImageData)  # as its description is of images
    picture = read_picture(image, data)
    if described.autoencoder is not None:
        latents = Autoencoder.load(described.autoencoder, device).encode(to_pixels(picture))
        picture = torch.from_numpy(latents).float().permute(0, 3, 1, 2)
    found["image"] = picture
    if mask is not None:
        found["mask"] = read_mask(mask, data, described.resolution)
    return found


def _encode(run: Run, described: ImageDescription, captions: Sequence[str]) -> Tensor | None:
    """(captions, tokens) int64 for a model of captions; None where there are none."""
    if not captions:
        return None
    if not described.caption_vocabulary:
        raise UserError(f"caption: the images of {run.directory} have no captions, so there is no '{captions[0]}'")
    return torch.from_numpy(caption_ids(Tokenizer.load(run.tokenizer), captions, described.caption_tokens))


def _load_guide(run: Run, guide: str | int | Path | None, device: torch.device) -> Objective | None:
    """The objective to push away from: of another checkpoint, or of another run's best one."""
    if guide is None:
        return None
    name = str(guide)
    if name in ("best", "last") or name.isdecimal():
        return load_objective(run, int(name) if name.isdecimal() else name, device)
    return load_objective(Run.open(name), "best", device)
