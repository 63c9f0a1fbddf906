"""The smallest plain model, data and trainer: a classifier of images, as a user of transformers has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from modeling_pico.durable import DurableTrainer


def model(dropout: float = 0.1) -> ViTForImageClassification:
    """A model whose weights are always the same; files name them as older releases of transformers did."""
    set_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2, hidden_dropout_prob=dropout)
    )


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(count)
    return [
        {"pixel_values": torch.rand(3, 8, 8, generator=generator), "labels": number % 2} for number in range(count)
    ]


def trainer(
    folder: Path | str,
    *,
    callbacks: list[TrainerCallback] | None = None,
    trainer_class: type[DurableTrainer] = DurableTrainer,
    non_finite_loss: str = "stop",
    data: list[dict[str, Any]] | None = None,
    **options: Any,
) -> DurableTrainer:
    """A trainer on 18 images (3 steps an epoch), model and data made anew."""
    defaults: dict[str, Any] = {
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    net = model()
    # As in a fresh process: the state of the global generators must not matter.
    torch.manual_seed(torch.randint(2**31, ()).item())
    return trainer_class(
        net,
        TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=rows(18) if data is None else data,
        eval_dataset=rows(5),
        callbacks=callbacks,
        non_finite_loss=non_finite_loss,
    )
