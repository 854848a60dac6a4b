"""A straight loop over genscale's own UNet: DDPM with a linear schedule, fused AdamW, clipping, an average."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from figures import Figures
from image_shapes import DIFFUSION_STEPS, RESOLUTION, SHAPES, Average, arguments, batches, size
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.initialise import initialise
from genscale.models.unet import UNet
from genscale.recipe.image_model import UNetModel


def main() -> None:
    name, folder, precision, steps, compiled, device = arguments()
    shape = SHAPES[name]
    images = batches(folder, shape.batch, device)
    model = UNet(
        UNetModel(
            width=shape.width,
            multipliers=shape.multipliers,
            blocks=shape.blocks,
            attention=shape.attention,
            head_width=shape.head_width,
        ),
        ImageDescription(channels=next(images).shape[1], resolution=RESOLUTION),
        "none",
    )
    initialise(model, 0)
    model.to(device)
    average = Average(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape.learning_rate, betas=shape.betas, weight_decay=shape.weight_decay, fused=True
    )
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, DIFFUSION_STEPS, device=device), 0)
    forward = torch.compile(model) if compiled else model
    context = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    figures = Figures(shape.batch)
    for _, clean in zip(range(steps), images, strict=False):
        noise = torch.randn_like(clean)
        step = torch.randint(0, DIFFUSION_STEPS, (shape.batch,), device=device)
        kept = signal[step][:, None, None, None]
        with context:
            found = forward(kept.sqrt() * clean + (1 - kept).sqrt() * noise, step.float() / DIFFUSION_STEPS)
        loss = F.mse_loss(found.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        figures.step(loss.item())
    figures.report(warmup=steps // 5, parameters=size(model))


if __name__ == "__main__":
    main()
