"""
What alignment, the stress test and kept hidden states cost beside plain evaluation and training, in one run.

    python tests/benchmarks/pretrained.py --output DIR --dataset_name FOLDER --vision TOWER --text TOWER
    python tests/benchmarks/pretrained.py --output DIR --quick    # small towers from scratch on generated scenes

Trains the head alone for an epoch, without and with `tower_cache_dir`, and evaluates a split. Each round runs every
row once, so that a disturbance meets all; medians are compared with the first row of their table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from modeling_pico import (
    CaptionedImageDataset,
    PicoModel,
    PicoProcessor,
    PicoTrainer,
    PicoTrainingArguments,
    load_captioned_images,
)
from modeling_pico.data.looks import LOOKS
from modeling_pico.markdown import markdown_table
from modeling_pico.model.backbones_pico import build_backbone
from modeling_pico.script.from_scratch import (
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)


def build(args: argparse.Namespace, captions: list[str]) -> tuple[PicoModel, PicoProcessor]:
    """Model and processor of the named towers, or of small ones from scratch."""
    if args.vision is not None:
        model = PicoModel.from_backbones(args.vision, args.text, method="fine_grained", embedding_dim=256)
        processor = PicoProcessor.from_backbones(args.vision, args.text)
    else:
        tokenizer = train_tokenizer(captions, max_length=32)
        towers = small_vision_config(32, 2, 2, 48, 8), small_text_config(32, 1, 2, tokenizer)
        model = PicoModel.from_backbones(*map(build_backbone, towers), method="fine_grained", embedding_dim=32)
        processor = PicoProcessor(image_processor=small_image_processor(48), tokenizer=tokenizer)
    model.vision_model.requires_grad_(False)
    model.text_model.requires_grad_(False)
    return model, processor


def measure(rows: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each row in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(what: str, seconds: dict[str, list[float]]) -> str:
    """Median seconds, and their ratio to those of the first row."""
    first = statistics.median(next(iter(seconds.values())))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return markdown_table(
        what, {name: {"seconds": f"{value:.1f}", "ratio": f"{value / first:.2f}"} for name, value in medians.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for pretrained.md")
    parser.add_argument("--dataset_name", default="styled_shapes", help="with the splits train and validation")
    parser.add_argument("--vision", help="image tower (default: a small one from scratch)")
    parser.add_argument("--text", help="text tower")
    parser.add_argument("--images", type=int, default=1000, help="of each split")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="64 images, one round")
    args = parser.parse_args()
    if args.quick:
        args.images, args.rounds = 64, 1
    logging.set_verbosity_error()
    train, validation = (
        CaptionedImageDataset(rows.select(range(min(args.images, len(rows)))))
        for rows in (load_captioned_images(args.dataset_name, split=split) for split in ("train", "validation"))
    )
    model, processor = build(args, [text for texts in train.dataset["captions"] for text in texts])
    with tempfile.TemporaryDirectory() as folder:

        def trainer(**options: object) -> PicoTrainer:
            arguments = PicoTrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=32,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **options,
            )
            return PicoTrainer(
                model, arguments, train_dataset=train, eval_dataset=validation, processing_class=processor
            )

        caches = iter(range(1000))

        def fresh() -> None:
            trainer(tower_cache_dir=f"{folder}/{next(caches)}").train()

        kept = f"{folder}/kept"
        trainer(tower_cache_dir=kept).train()
        training = measure(
            {
                "an epoch of the head": lambda: trainer().train(),
                "with tower_cache_dir, the first time": fresh,
                "with tower_cache_dir, later": lambda: trainer(tower_cache_dir=kept).train(),
            },
            args.rounds,
        )
        plain = trainer()
        plain.fit_alignment()
        evaluation = measure(
            {
                "evaluation": lambda: plain.evaluate(),
                "with --align_gallery": lambda: trainer(align_gallery=True).evaluate(),
                f"stress test, {len(LOOKS)} looks": lambda: plain.measure_style_stress(validation, list(LOOKS)),
            },
            args.rounds,
        )
    captions = int(train.num_captions.sum()), int(validation.num_captions.sum())
    text = (
        f"{len(train):,} training images with {captions[0]:,} captions, {len(validation):,} evaluated with "
        f"{captions[1]:,}; {torch.get_num_threads()} thread(s), medians of {args.rounds} round(s).\n\n"
        f"{table('Training', training)}\n\n{table('Evaluation', evaluation)}\n"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "pretrained.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
