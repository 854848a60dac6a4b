"""Lightning's Trainer around the same module as the straight loop."""

from __future__ import annotations

import logging
import warnings

import lightning
import nanogpt
import torch
from figures import Figures
from shapes import arguments, windows

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    shape, folder, precision, steps, compiled = arguments()

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            for window in windows(folder, shape):
                yield torch.from_numpy(window)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nanogpt.GPT(shape)
            if compiled:
                self.model.compile()

        def training_step(self, tokens, index):
            return self.model(tokens[:, :-1], tokens[:, 1:])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    figures = Figures(shape.tokens)

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            figures.step(outputs["loss"].item())

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Windows(), batch_size=None))
    figures.report(warmup=steps // 5)


if __name__ == "__main__":
    main()
