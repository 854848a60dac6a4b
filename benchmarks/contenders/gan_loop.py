"""A straight loop over genscale's own pair of networks: relativistic loss, R1 and R2, fused AdamW, an average."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from figures import Figures
from image_shapes import RESOLUTION, SHAPES, Average, arguments, batches, size
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.initialise import initialise
from genscale.models.players import build_player
from genscale.recipe.image_model import DCGANModel, GANModel


def main() -> None:
    name, folder, precision, steps, compiled, device = arguments()
    shape = SHAPES[name]
    images = batches(folder, shape.batch, device)
    described = ImageDescription(channels=next(images).shape[1], resolution=RESOLUTION)
    kind = DCGANModel if shape.kind == "dcgan" else GANModel
    model = kind(latent=shape.latent, generator=shape.generator, discriminator=shape.discriminator)
    generator, discriminator = (build_player(role, model, described, False) for role in ("generator", "discriminator"))
    for network in (generator, discriminator):
        initialise(network, 0)
        network.to(device)
    average = Average(generator)
    optimizers = {
        network: torch.optim.AdamW(
            network.parameters(), lr=shape.learning_rate, betas=shape.betas, weight_decay=shape.weight_decay, fused=True
        )
        for network in (generator, discriminator)
    }
    draw = torch.compile(generator) if compiled else generator
    context = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    figures = Figures(shape.batch)
    for _, real in zip(range(steps), images, strict=False):
        discriminator.requires_grad_(True)
        real.requires_grad_(True)
        with context:
            with torch.no_grad():
                fake = draw(torch.randn(shape.batch, shape.latent, device=device)).float()
            fake.requires_grad_(True)
            real_logits, fake_logits = discriminator(real), discriminator(fake)
        penalty = torch.zeros((), device=device)
        for logits, inputs in ((real_logits, real), (fake_logits, fake)):
            (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
            penalty = penalty + gradient.square().sum(dim=(1, 2, 3)).mean()
        loss = F.softplus(fake_logits - real_logits).mean() + shape.penalty / 2 * penalty
        loss.backward()
        update(discriminator, optimizers)

        discriminator.requires_grad_(False)
        real = real.detach()
        with context:
            fake = draw(torch.randn(shape.batch, shape.latent, device=device))
            difference = discriminator(fake) - discriminator(real)
        loss = F.softplus(-difference).mean()
        loss.backward()
        update(generator, optimizers)
        average.update()
        figures.step(loss.item())
    figures.report(warmup=steps // 5, parameters=size(generator, discriminator))


def update(network: torch.nn.Module, optimizers: dict[torch.nn.Module, torch.optim.Optimizer]) -> None:
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizers[network].step()
    optimizers[network].zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
