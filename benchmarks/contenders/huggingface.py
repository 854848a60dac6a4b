"""The Hugging Face Trainer on GPT2LMHeadModel of the same shape, with its own defaults otherwise."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from figures import Figures
from shapes import arguments, windows
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


def main() -> None:
    shape, folder, precision, steps, compiled = arguments()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            for window in windows(folder, shape):
                for row in torch.from_numpy(window):
                    yield {"input_ids": row[:-1], "labels": row[:-1]}

    figures = Figures(shape.tokens)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            figures.step(float("nan"))

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=shape.batch,
        learning_rate=1e-3,
        adam_beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        use_cpu=True,
        torch_compile=compiled,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    Trainer(model=model, args=settings, train_dataset=Windows(), callbacks=[Watch()]).train()
    figures.report(warmup=steps // 5)


if __name__ == "__main__":
    main()
