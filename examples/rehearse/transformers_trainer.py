"""Train a small GPT-2 with the `Trainer` of transformers, with gradient accumulation.

memfit rehearse --gpu "RTX 4090" -- python examples/rehearse/transformers_trainer.py --batch-size 64
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

SAMPLES = 1 << 16
TOKENS = 256
VOCABULARY = 8000


class Noise(Dataset[dict[str, torch.Tensor]]):
    """Texts that are noise."""

    def __len__(self) -> int:
        """Return more than any batch."""
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tokens of a text, which are its labels too."""
        tokens = torch.full((TOKENS,), index % VOCABULARY)
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    """Train for eight optimizer steps of two micro-batches each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=TOKENS,
            n_embd=256,
            n_layer=4,
            n_head=4,
            use_cache=False,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=2,
            max_steps=8,
            bf16=True,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
        )
        Trainer(model=model, args=arguments, train_dataset=Noise()).train()


if __name__ == "__main__":
    main()
