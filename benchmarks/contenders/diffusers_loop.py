"""The loop of diffusers' example of unconditional training: UNet2DModel, DDPMScheduler, accelerate, EMAModel.

As in examples/unconditional_image_generation/train_unconditional.py, without its logging to trackers.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from figures import Figures
from image_shapes import DIFFUSION_STEPS, EMA_DECAY, RESOLUTION, SHAPES, arguments, batches, size
from torch.nn import functional as F


def main() -> None:
    name, folder, precision, steps, _compiled, device = arguments()
    shape = SHAPES[name]
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=device == "cpu")
    channels = next(batches(folder, 1, "cpu")).shape[1]
    levels = range(len(shape.widths))
    model = UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=shape.blocks,
        block_out_channels=shape.widths,
        down_block_types=tuple("AttnDownBlock2D" if level in shape.attention else "DownBlock2D" for level in levels),
        up_block_types=tuple(
            "AttnUpBlock2D" if level in shape.attention else "UpBlock2D" for level in reversed(levels)
        ),
        attention_head_dim=shape.head_width,
        resnet_time_scale_shift="scale_shift",  # as genscale's UNet, which is then the same network
    )
    average = EMAModel(model.parameters(), decay=EMA_DECAY, model_cls=UNet2DModel, model_config=model.config)
    average.to(accelerator.device)
    schedule = DDPMScheduler(num_train_timesteps=DIFFUSION_STEPS)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape.learning_rate, betas=shape.betas, weight_decay=shape.weight_decay
    )
    learning_rate = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)

    class Images(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from batches(folder, shape.batch, "cpu")

    loader = torch.utils.data.DataLoader(Images(), batch_size=None)
    model, optimizer, loader, learning_rate = accelerator.prepare(model, optimizer, loader, learning_rate)
    figures = Figures(shape.batch)
    model.train()
    for _, clean in zip(range(steps), loader, strict=False):
        noise = torch.randn_like(clean)
        step = torch.randint(0, DIFFUSION_STEPS, (shape.batch,), device=clean.device).long()
        noisy = schedule.add_noise(clean, noise, step)
        with accelerator.accumulate(model):
            found = model(noisy, step).sample
            loss = F.mse_loss(found.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            learning_rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(model.parameters())
        figures.step(loss.detach().item())
    figures.report(warmup=steps // 5, parameters=size(model))


if __name__ == "__main__":
    main()
