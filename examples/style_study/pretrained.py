"""One training of the study with pretrained towers, frozen (their hidden states are computed once) or fine-tuned."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from encoded_data import hold_out, loading_options, model_options
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import set_seed

from modeling_pico import (
    CaptionedImageDataset,
    PicoModel,
    PicoProcessor,
    PicoTrainer,
    PicoTrainingArguments,
    RetrievalEvaluator,
    align_encoded,
    load_captioned_images,
)
from modeling_pico.data import PicoDataCollator
from modeling_pico.data.looks import RandomStyle
from modeling_pico.model.gallery_alignment_pico import spread_rows
from modeling_pico.training.tower_cache import TowerStates, cached_states


BATCH = 100


def train(
    setting: dict[str, Any],
    options: dict[str, Any],
    seed: int,
    splits: list[str],
    cache: Path,
    weights: Path,
    shared_options: dict[str, Any],
    aligned: bool = False,
) -> dict[str, Any]:
    """
    Trains one variant with one seed, or only evaluates it where `weights` are there from before.

    Args:
        setting (`dict`): Data, towers and schedule.
        options (`dict`): The variant.
        seed (`int`): Initial weights of the head, order of batches and captions.
        splits (`list[str]`):
            Names of splits; `test@sketch` is one whose images are drawn in a look, `validation:romantic` one whose
            captions are those of a column, and `validation:1` one with the first caption of each image alone.
        cache (`Path`): Keeps the hidden states of frozen towers between trainings.
        weights (`Path`): Safetensors file that keeps the trained weights.
        shared_options (`dict`): Options of `PicoTrainingArguments` that all variants share.
        aligned (`bool`, *optional*, defaults to `False`):
            Whether each split is also evaluated with its gallery moved to where images of training lie.

    Returns:
        `dict` with the rSum of each split, plain (`rsum`) and, if asked for, moved (`aligned`).
    """
    torch.set_num_threads(1)
    set_seed(seed)
    model = _build_model(setting, options)
    frozen = setting.get("frozen", True)
    if not frozen:
        # Convolutions take two thirds of the time so; other layers take no notice.
        model.vision_model.to(memory_format=torch.channels_last)
    processor = PicoProcessor.from_backbones(setting["vision_model_name_or_path"], setting["text_model_name_or_path"])
    side = {"height": setting["image_size"], "width": setting["image_size"]}
    processor.image_processor.size = processor.image_processor.crop_size = side
    collator = PicoDataCollator(processor)
    transform = _augmentation(options.get("data", {}))
    training_set = _rows(setting, "train")
    validation = CaptionedImageDataset(_rows(setting, "validation"))
    found: dict[str, Any] = {}
    # What frozen towers weigh is known.
    not_kept = ("vision_model.", "text_model.") if frozen else ()
    with tempfile.TemporaryDirectory() as folder:
        states_folder = cache if frozen else Path(folder, "states")

        def fit(transform: RandomStyle | None, states: Path | None, **changed: Any) -> None:
            args = {**shared_options, **options.get("args", {}), **changed}
            args["tower_cache_dir"] = None if states is None else str(states)
            trainer = PicoTrainer(
                model=model,
                args=PicoTrainingArguments(folder, **args),
                data_collator=collator,
                train_dataset=CaptionedImageDataset(training_set, transform),
                eval_dataset=validation,
                processing_class=processor,
            )
            trainer.train()
            log = trainer.state.log_history
            found["constructions"] = [entry for entry in log if "prototype_stage" in entry]
            found["loss"] = next((entry["loss"] for entry in reversed(log) if "loss" in entry), None)

        if weights.exists():
            missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
            lost = [name for name in (*missing, *unexpected) if not name.startswith(("image_moments.", *not_kept))]
            if lost:
                raise ValueError(f"{weights} holds other weights than this variant has: {lost[:5]}")
        else:
            start = time.perf_counter()
            towers = (model.vision_model, model.text_model)
            for tower in towers:
                tower.requires_grad_(False)
            if frozen:
                fit(transform, cache)
            else:
                # Heads first: towers would be led astray by heads that know nothing yet.
                fit(
                    None,
                    cache,
                    num_train_epochs=setting["num_head_epochs"],
                    learning_rate=setting["head_learning_rate"],
                )
                for tower in towers:
                    tower.requires_grad_(True)
                model._freeze_unused()
                fit(transform, None, prototype_start=1, prototype_update_start=2)
            found["seconds"] = time.perf_counter() - start
            weights.parent.mkdir(parents=True, exist_ok=True)
            kept = {
                name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith(not_kept)
            }
            save_file(kept, weights)
        model.eval()
        evaluator = RetrievalEvaluator(image_chunk=1000)
        if aligned:
            reference = training_set.select(spread_rows([None] * len(training_set))).map(_first_caption)
            model.fit_alignment(_loader(CaptionedImageDataset(reference), collator))
            found["aligned"] = {}
        found["rsum"] = {}
        for split in splits:
            dataset = _split(setting, split)
            encoded = evaluator.encode(model, _batches(cached_states(states_folder, model, dataset, collator)))
            found["rsum"][split] = [evaluator.retrieval_metrics(model, encoded)["rsum"]]
            if aligned:
                # By the images themselves: layers of the tower are moved too.
                moved = align_encoded(model, encoded, _loader(dataset, collator))
                found["aligned"][split] = [evaluator.retrieval_metrics(model, moved)["rsum"]]
    return found


def _build_model(setting: dict[str, Any], options: dict[str, Any]) -> PicoModel:
    model_class, head = model_options(options, "data")
    return model_class.from_backbones(
        setting["vision_model_name_or_path"],
        setting["text_model_name_or_path"],
        embedding_dim=setting["embedding_dim"],
        **head,
    )


def _augmentation(data: dict[str, Any]) -> RandomStyle | None:
    if data.keys() - {"style_augmentation"}:
        raise ValueError(f"`data` of a variant may have `style_augmentation` alone, but has {sorted(data)}")
    return RandomStyle(data["style_augmentation"]) if data else None


def _rows(setting: dict[str, Any], split: str, **options: Any) -> Any:
    """A split, of which `seen` are images that are held out of `train`, at random but for all trainings alike."""
    name = "train" if split == "seen" else split
    rows = load_captioned_images(setting["dataset_name"], **loading_options(setting, name), **options)
    if name == "train" and "num_seen" in setting:
        seen, others = hold_out(len(rows), setting["num_seen"])
        rows = rows.select((seen if split == "seen" else others).sort().values.tolist())
    return rows


def _split(setting: dict[str, Any], name: str) -> CaptionedImageDataset:
    """A split, drawn in a look or with other captions where its name says so."""
    rest, _, look = name.partition("@")
    split, _, captions = rest.partition(":")
    if captions == "1":
        rows = _rows(setting, split).map(_first_caption)
    else:
        rows = _rows(setting, split, **({"caption_column": captions} if captions else {}))
    dataset = CaptionedImageDataset(rows)
    return dataset.in_look(look) if look else dataset


def _first_caption(row: dict[str, Any]) -> dict[str, Any]:
    return {"captions": row["captions"][:1]}


def _loader(dataset: CaptionedImageDataset, collator: PicoDataCollator) -> DataLoader:
    return DataLoader(dataset, batch_size=BATCH, collate_fn=collator, generator=torch.Generator())


def _batches(states: TowerStates) -> list[dict[str, torch.Tensor]]:
    rows = list(range(len(states)))
    return [states.__getitems__(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
