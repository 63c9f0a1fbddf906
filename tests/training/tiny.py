"""The smallest model, data and trainer that show everything the training side does."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, TrainerCallback, set_seed

from modeling_pico import PicoModel, PicoProcessor
from modeling_pico.data import CaptionedImageDataset
from modeling_pico.model.backbones_pico import build_backbone
from modeling_pico.training import PicoTrainer, PicoTrainingArguments
from modeling_pico.training.from_scratch import (
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)


SIZE = 16
COLORS = ("red", "green", "blue", "grey")
PLACES = ("up here", "far down there", "left", "on the right hand side", "in the middle")


def pixels(seed: int) -> np.ndarray:
    """Noise `(SIZE, SIZE, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@functools.cache
def rows(count: int, seed: int = 0, repeats: int = 0) -> datasets.Dataset:
    """`count` noise images with one to three captions of different lengths; the last `repeats` share earlier ids."""
    rng = np.random.default_rng(seed)
    table: dict[str, list] = {"image": [], "captions": [], "image_id": []}
    for row in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file, "PNG")
        table["image"].append({"bytes": file.getvalue(), "path": None})
        name = f"{COLORS[row % 4]} {PLACES[row % 5]}"
        table["captions"].append([name, f"a thing that is {name} {row}", f"{row}"][: 1 + row % 3])
        table["image_id"].append(str(row - (count - repeats) if row >= count - repeats else row))
    features = datasets.Features(
        image=datasets.Image(decode=False),
        captions=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(table, features=features)


class CountedDataset(CaptionedImageDataset):
    """Counts how often a sample is asked for."""

    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    captions = [caption for group in rows(40)["captions"] for caption in group]
    return train_tokenizer(captions, 200, 24)


def processor() -> PicoProcessor:
    """An image processor of 16 pixels, and a tokenizer that knows the words of [`rows`]."""
    return PicoProcessor(image_processor=small_image_processor(SIZE), tokenizer=copy.deepcopy(_tokenizer()))


def model(dropout: float = 0.0, seed: int = 0, model_class: type[PicoModel] = PicoModel, **options: Any) -> PicoModel:
    """A model whose weights depend on `seed` alone."""
    set_seed(seed)
    vision = small_vision_config(16, 1, 2, SIZE, 8)
    text = small_text_config(16, 1, 2, processor().tokenizer)
    for config in (vision, text):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    options = {"embedding_dim": 8, "num_style_prototypes": 3, **options}
    return model_class.from_backbones(build_backbone(vision), build_backbone(text), **options)


def arguments(folder: Path | str, **options: Any) -> PicoTrainingArguments:
    defaults: dict[str, Any] = {
        "learning_rate": 1e-2,
        "backbone_learning_rate": 1e-2,
        "num_train_epochs": 6,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 4,
        "prototype_start": 1,
        "prototype_update_start": 3,
        "reservoir_pairs": 10,
        "feedback_kappa": 30.0,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 100,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_drop_last": True,
    }
    return PicoTrainingArguments(str(folder), **{**defaults, **options})


def trainer(
    folder: Path | str,
    *,
    transform=None,
    data: CaptionedImageDataset | None = None,
    eval_data: Any = "default",
    net: PicoModel | None = None,
    callbacks: list[TrainerCallback] | None = None,
    trainer_class: type[PicoTrainer] = PicoTrainer,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> PicoTrainer:
    """A trainer on 20 training images (3 steps an epoch) and 9 validation images, model and data made anew."""
    if isinstance(eval_data, str):
        eval_data = CountedDataset(rows(9, seed=1, repeats=1))
    # As in a fresh process: the state of the global generators must not matter.
    torch.manual_seed(torch.randint(2**31, ()).item())
    return trainer_class(
        model=model(**(model_options or {})) if net is None else net,
        args=arguments(folder, **options),
        train_dataset=CountedDataset(rows(20, repeats=2), transform=transform) if data is None else data,
        eval_dataset=eval_data,
        processing_class=processor(),
        callbacks=callbacks,
    )


def prototype_log(made: PicoTrainer) -> list[dict[str, float]]:
    return [entry for entry in made.state.log_history if "prototype_stage" in entry]


def whole_log(made: PicoTrainer) -> list[dict[str, float]]:
    """All of the log, without what depends on the clock."""
    clock = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(clock)} for entry in made.state.log_history
    ]


def assert_same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Weights and buffers equal bit for bit."""
    mine, other = first.state_dict(), second.state_dict()
    assert mine.keys() == other.keys()
    different = [name for name in mine if not torch.equal(mine[name], other[name])]
    assert not different, f"different: {different}"
