"""The Hugging Face Trainer, which is accelerate, on some ranks: DistributedDataParallel, or FSDP2 on each block.

Each rank reads its own rows: by default the first one would read all and send them to the others, which is slower.
"""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from figures import Figures
from ranks import RANKS, arguments, device, report
from shapes import windows
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


def main() -> None:
    shape, folder, precision, steps, how, options = arguments()
    place = device()
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
        def on_train_begin(self, args, state, control, **others):
            wrapped = {type(module).__name__ for module in trainer.model_wrapped.modules()}
            expected = "FSDPGPT2Block" if how == "shard" else "DistributedDataParallel"
            if RANKS > 1 and expected not in wrapped:
                raise SystemExit(f"the Trainer goes on without what was asked for: there is no {expected} in its model")

        def on_step_end(self, args, state, control, **others):
            figures.step(float("nan"))

    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}}
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=shape.batch // RANKS,
        learning_rate=1e-3,
        adam_beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        use_cpu=place.type == "cpu",
        torch_compile="compile" in options,
        accelerator_config={"dispatch_batches": False},
        ddp_find_unused_parameters=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        **(sharded if how == "shard" else {}),
    )
    trainer = Trainer(model=model, args=settings, train_dataset=Windows(), callbacks=[Watch()])
    trainer.train()
    report(figures, steps)


if __name__ == "__main__":
    main()
