"""torchgan: its Trainer with its DCGAN pair and its Wasserstein losses with gradient penalty."""

from __future__ import annotations

import os
import tempfile

os.environ["TENSORBOARD_LOGGING"] = os.environ["VISDOM_LOGGING"] = "0"

import torch
import without_torchvision
from figures import Figures
from image_shapes import RESOLUTION, SHAPES, arguments, batches, size

without_torchvision.stand_in()

from torchgan.losses import WassersteinDiscriminatorLoss, WassersteinGeneratorLoss, WassersteinGradientPenalty  # noqa: E402
from torchgan.models import DCGANDiscriminator, DCGANGenerator  # noqa: E402
from torchgan.trainer import Trainer  # noqa: E402


def main() -> None:
    name, folder, precision, steps, _compiled, device = arguments()
    shape = SHAPES[name]
    if precision != "fp32":
        raise SystemExit("torchgan trains in fp32 only")
    channels = next(batches(folder, 1, "cpu")).shape[1]
    adam = {"name": torch.optim.Adam, "args": {"lr": shape.learning_rate, "betas": shape.betas}}
    generator = {"out_channels": channels, "out_size": RESOLUTION, "encoding_dims": shape.latent}
    discriminator = {"in_channels": channels, "in_size": RESOLUTION, "batchnorm": False}
    with tempfile.TemporaryDirectory() as results:
        trainer = Trainer(
            {
                "generator": {
                    "name": DCGANGenerator,
                    "args": {**generator, "step_channels": shape.dcgan},
                    "optimizer": adam,
                },
                "discriminator": {
                    "name": DCGANDiscriminator,
                    "args": {**discriminator, "step_channels": shape.dcgan},
                    "optimizer": adam,
                },
            },
            [WassersteinGeneratorLoss(), WassersteinDiscriminatorLoss(), WassersteinGradientPenalty()],
            device=torch.device(device),
            epochs=1,
            sample_size=1,
            checkpoints=f"{results}/gan",
            recon=results,
        )
        figures = Figures(shape.batch)

        class Images(torch.utils.data.IterableDataset):
            def __iter__(self):
                for _, images in zip(range(steps), batches(folder, shape.batch, "cpu"), strict=False):
                    yield images
                    figures.step(float("nan"))  # asked for the next, it has done its step

        trainer.save_model = trainer.logger.run_end_epoch = lambda *arguments: None  # after the epoch
        trainer.batch_size = shape.batch
        trainer.train(torch.utils.data.DataLoader(Images(), batch_size=None))
    figures.report(warmup=steps // 5, parameters=size(trainer.generator, trainer.discriminator))


if __name__ == "__main__":
    main()
