"""denoising-diffusion-pytorch: its Unet, GaussianDiffusion and Trainer, with the same data from memory.

Its Trainer reads image files in as many worker processes as there are cores; arrays from memory and no workers are
faster, so it is given those.
"""

from __future__ import annotations

import os
import tempfile

import numpy as np
import torch
import without_torchvision
from figures import Figures
from image_shapes import DIFFUSION_STEPS, EMA_DECAY, RESOLUTION, SHAPES, arguments, size

without_torchvision.stand_in()

import denoising_diffusion_pytorch.denoising_diffusion_pytorch as package  # noqa: E402


def main() -> None:
    name, folder, precision, steps, _compiled, device = arguments()
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu")
    shape = SHAPES[name]
    images = torch.from_numpy(np.load(folder / "train.npy"))

    class Images(torch.utils.data.Dataset):
        def __init__(self, *arguments, **options):
            pass

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index].float() / 255

    package.Dataset = Images
    package.cpu_count = lambda: 0
    levels = range(len(shape.widths))
    model = package.Unet(
        dim=shape.width,
        dim_mults=shape.multipliers,
        channels=images.shape[1],
        attn_dim_head=shape.head_width,
        attn_heads=tuple(max(1, shape.widths[level] // shape.head_width) for level in levels),
        full_attn=tuple(level in shape.attention for level in levels),
    )
    diffusion = package.GaussianDiffusion(
        model, image_size=RESOLUTION, timesteps=DIFFUSION_STEPS, objective="pred_noise", beta_schedule="linear"
    )
    figures = Figures(shape.batch)
    with tempfile.TemporaryDirectory() as results:
        trainer = package.Trainer(
            diffusion,
            "from memory",
            train_batch_size=shape.batch,
            augment_horizontal_flip=False,
            train_lr=shape.learning_rate,
            train_num_steps=steps,
            ema_decay=EMA_DECAY,
            save_and_sample_every=10 * steps,
            results_folder=results,
            amp=precision == "bf16",
            mixed_precision_type="bf16",
            calculate_fid=False,
        )
        update = trainer.ema.update

        def watched() -> None:
            update()
            figures.step(float("nan"))

        trainer.ema.update = watched  # the last thing in each of its steps
        trainer.train()
    figures.report(warmup=steps // 5, parameters=size(model))


if __name__ == "__main__":
    main()
