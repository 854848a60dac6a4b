"""Lightning's Trainer on some ranks, around the straight loop's module: its "ddp" strategy, its "fsdp", or its strategy
for FSDP2, in which the module shards itself."""

from __future__ import annotations

import logging
import warnings

import lightning
import nanogpt
import torch
from figures import Figures
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import RANKS, arguments, device, own_windows, report
from torch.distributed.fsdp import fully_shard

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    shape, folder, precision, steps, how, _options = arguments()
    place = device()

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from own_windows(folder, shape)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nanogpt.GPT(shape)

        def configure_model(self):
            if how == "shard":
                mesh = self.device_mesh["data_parallel"]
                for block in self.model.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

        def training_step(self, tokens, index):
            return self.model(tokens[:, :-1], tokens[:, 1:])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    figures = Figures(shape.tokens)

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            figures.step(outputs["loss"].item())

    backend = "gloo" if place.type == "cpu" else "nccl"
    strategies = {
        "replicate": lambda: DDPStrategy(process_group_backend=backend),
        "shard": lambda: ModelParallelStrategy(
            data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend=backend
        ),
        "fsdp": lambda: FSDPStrategy(auto_wrap_policy={nanogpt.Block}, process_group_backend=backend),
    }
    trainer = lightning.Trainer(
        accelerator=place.type,
        devices=RANKS,
        strategy=strategies[how](),
        max_steps=steps,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Windows(), batch_size=None))
    report(figures, steps)


if __name__ == "__main__":
    main()
