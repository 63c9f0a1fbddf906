#!/usr/bin/env python
"""
Fine-tunes a vision-language model for image-text retrieval with PICO.

    accelerate launch train_pico.py examples/quickstart.yaml
    accelerate launch train_pico.py --model_name_or_path openai/clip-vit-base-patch32 --dataset_name user/set ...

Options come from one YAML or JSON file, from flags, or from a file followed by flags that override it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, set_seed
from transformers import logging as hf_logging

from modeling_pico import PicoConfig, PicoModel, PicoProcessor
from modeling_pico.backbones_pico import build_backbone, limit_text_length, load_backbone
from modeling_pico.data import (
    CaptionedImageDataset,
    PicoDataCollator,
    RandomCropFlip,
    check_distinct,
    check_images,
    count_truncated,
    load_captioned_images,
)
from modeling_pico.evaluation.style_report import order_styles
from modeling_pico.plots import has_matplotlib, require_matplotlib, save_run_plots
from modeling_pico.training import PicoTrainer, PicoTrainingArguments
from modeling_pico.training.checkpoint_files import check_resumable, clean_up, is_complete, last_checkpoint, write_text
from modeling_pico.training.from_scratch import (
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)
from modeling_pico.training.run_lock import sole_run
from modeling_pico.training.run_record import describe_run, without_secrets, write_run_record
from modeling_pico.training.script_arguments import DataArguments, ModelArguments, parse_arguments


logger = hf_logging.get_logger("train_pico")


def find_checkpoint(args: PicoTrainingArguments) -> str | None:
    """The checkpoint to resume from; refuses an output folder that already holds a run."""
    wanted = args.resume_from_checkpoint
    if wanted is not None and wanted.lower() not in ("true", "false", "last", "auto"):
        if not is_complete(wanted):
            raise ValueError(
                f"--resume_from_checkpoint: {wanted!r} is not a complete checkpoint (a folder with "
                "trainer_state.json). Give the folder of one, or true, auto, false."
            )
        check_resumable(wanted)
        return wanted
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        if args.do_train and args.should_save:
            clean_up(args.output_dir)
    last = last_checkpoint(args.output_dir)
    if wanted is not None and wanted.lower() != "false" and (last is not None or wanted.lower() != "auto"):
        if last is None:
            raise ValueError(
                f"--resume_from_checkpoint: {args.output_dir!r} holds no complete checkpoint. With auto, a run starts "
                "anew where there is none."
            )
        check_resumable(last)
        return last
    finished = os.path.isfile(os.path.join(args.output_dir, "all_results.json"))
    if args.do_train and (last is not None or finished):
        raise ValueError(
            f"The output folder {args.output_dir!r} already holds a run "
            f"({os.path.basename(last) if last else 'all_results.json'}). Continue it with --resume_from_checkpoint "
            "true, or choose another --output_dir; nothing was changed."
        )
    return None


def load_rows(split: str, data_args: DataArguments, **options) -> Dataset:
    """The rows of one split as the arguments describe them."""
    described = {
        "image_column": data_args.image_column,
        "caption_column": data_args.caption_column,
        "id_column": data_args.id_column,
        "style_column": data_args.style_column,
        "image_dir": data_args.image_dir,
        "config_name": data_args.dataset_config_name,
        "cache_dir": data_args.cache_dir,
        "on_empty_captions": data_args.on_empty_captions,
        "max_skipped": data_args.max_skipped,
    }
    return load_captioned_images(data_args.dataset_name, split=split, **{**described, **options})


def load_split(
    split: str, data_args: DataArguments, limit: int | None, transform=None, **options
) -> CaptionedImageDataset:
    """Loads one split, checks its images, and cuts it to `limit` rows."""
    dataset = load_rows(split, data_args, **options)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    dataset = check_images(dataset, data_args.on_bad_image, data_args.preprocessing_num_workers, data_args.max_skipped)
    return CaptionedImageDataset(dataset, transform=transform)


@dataclass
class Data:
    """The splits that a run reads."""

    train: CaptionedImageDataset | None
    evaluation: CaptionedImageDataset | None
    tests: dict[str, CaptionedImageDataset]
    # All test splits together for the style report, and the styles among them that training has shown.
    styled: CaptionedImageDataset | None = None
    seen_styles: list[str] | None = None

    def by_name(self, data_args: DataArguments) -> dict[str, CaptionedImageDataset]:
        """All splits under their own names."""
        named = {data_args.train_split: self.train, data_args.eval_split: self.evaluation, **self.tests}
        return {name: dataset for name, dataset in named.items() if dataset is not None}


def may_use_prototypes(model_args: ModelArguments) -> bool:
    """Whether the model could have style prototypes; known for certain only once it is built."""
    if model_args.model_name_or_path is not None and model_args.method is None:
        return True
    model_class = model_args.model_class()
    return model_class.config_class(**model_args.config_options(model_class)).uses_prototypes


def load_data(model_args: ModelArguments, data_args: DataArguments, training_args: PicoTrainingArguments) -> Data:
    """Loads the splits that the run needs, on the main process first."""
    train = evaluation = None
    tests = {}
    needs_feedback = training_args.do_train and training_args.feedback_needs_validation
    with training_args.main_process_first(desc="loading data"):
        if training_args.do_train:
            transform = None
            if data_args.min_crop_scale < 1 or data_args.random_flip:
                transform = RandomCropFlip(data_args.min_crop_scale, data_args.random_flip)
            train = load_split(data_args.train_split, data_args, data_args.max_train_samples, transform)
        needs_feedback = needs_feedback and may_use_prototypes(model_args)
        if training_args.do_eval or needs_feedback or training_args.uncertainty_reranking:
            evaluation = load_split(data_args.eval_split, data_args, data_args.max_eval_samples)
        if training_args.do_predict:
            # Named, so that a split without styles is refused with the columns that it has.
            named = {"style_column": data_args.style_column or "style"} if data_args.style_report else {}
            tests = {
                split: load_split(split, data_args, data_args.max_eval_samples, **named)
                for split in data_args.test_split
            }
        data = Data(train, evaluation, tests)
        check_distinct({name: split.dataset for name, split in data.by_name(data_args).items()})
        if data_args.style_report:
            data.styled = CaptionedImageDataset(concatenate_datasets([split.dataset for split in tests.values()]))
            data.seen_styles = find_seen_styles(data, data_args)
            order_styles(data.styled.styles, data.seen_styles)  # what cannot be reported is refused before training
    return data


def find_seen_styles(data: Data, data_args: DataArguments) -> list[str] | None:
    """The reported styles that training has shown: as given, else those of the training split; None if unknown."""
    if data_args.seen_styles is not None:
        return data_args.seen_styles
    reason = "has no column with them"
    seen = None
    if data.train is not None:
        seen = data.train.styles
    else:
        try:
            rows = load_rows(data_args.train_split, data_args, with_images=False)
            seen = rows["style"][:] if "style" in rows.column_names else None
        except (ValueError, OSError) as error:
            reason = f"cannot be read ({error})"
    if seen is None:
        logger.warning(
            f"Which styles training has shown is not known: the split {data_args.train_split!r} {reason}. The style "
            "report will have no gaps between seen and unseen styles; name the seen ones by --seen_styles."
        )
        return None
    return sorted(set(seen) & set(data.styled.styles))


def is_pico_checkpoint(path: str | None, revision: str | None) -> bool:
    """Whether a checkpoint is one of PICO itself."""
    if path is None:
        return False
    return isinstance(AutoConfig.from_pretrained(path, revision=revision), PicoConfig)


def build(
    model_args: ModelArguments, data_args: DataArguments, train_captions: list[str] | None, checkpoint: str | None
) -> tuple[PicoModel, PicoProcessor]:
    """Model and processor: from a PICO checkpoint, from pretrained backbones, from scratch, or a mixture."""
    joint, vision, text = (
        model_args.model_name_or_path,
        model_args.vision_model_name_or_path,
        model_args.text_model_name_or_path,
    )
    if joint is not None and (vision is not None or text is not None):
        raise ValueError("Give either --model_name_or_path or --vision/text_model_name_or_path, not both.")
    source = checkpoint or joint
    revision = {} if model_args.model_revision is None or checkpoint else {"revision": model_args.model_revision}
    loading: dict[str, Any] = {**revision, "use_safetensors": model_args.use_safetensors}
    if model_args.attn_implementation is not None:
        loading["attn_implementation"] = model_args.attn_implementation
    model_class = model_args.model_class(checkpoint)
    options = {} if checkpoint else model_args.config_options(model_class)
    if checkpoint or is_pico_checkpoint(source, revision.get("revision")):
        model = model_class.from_pretrained(source, dtype=torch.float32, **loading, **options)
        return model, PicoProcessor.from_pretrained(source, **revision)
    if joint is not None:
        model = model_class.from_backbones(joint, backbone_kwargs=loading, **options)
        return model, PicoProcessor.from_backbones(joint, **revision)
    vision_model, text_model, processor = build_towers(model_args, data_args, train_captions, loading, revision)
    return model_class.from_backbones(vision_model, text_model, **options), processor


def build_towers(model_args, data_args, train_captions, loading, revision):
    """Each tower from its checkpoint if one is given, else small and from scratch; and their processor."""
    vision, text = model_args.vision_model_name_or_path, model_args.text_model_name_or_path
    if vision is None:
        config = small_vision_config(
            model_args.vision_hidden_size,
            model_args.vision_num_layers,
            model_args.vision_num_heads,
            model_args.image_size,
            model_args.patch_size,
        )
        vision_model, image_processor = build_backbone(config), small_image_processor(model_args.image_size)
    else:
        vision_model = load_backbone(vision, "image", dtype="float32", **loading)
        image_processor = AutoImageProcessor.from_pretrained(vision, **revision)
    if text is None:
        if train_captions is None:
            raise ValueError(
                "Without a text checkpoint the tokenizer is trained on the captions of --train_split, which only "
                "--do_train loads. Give --model_name_or_path to evaluate a trained model."
            )
        tokenizer = train_tokenizer(train_captions, model_args.vocab_size, data_args.max_text_length or 64)
        config = small_text_config(
            model_args.text_hidden_size, model_args.text_num_layers, model_args.text_num_heads, tokenizer
        )
        text_model = build_backbone(config)
    else:
        text_model = load_backbone(text, "text", dtype="float32", **loading)
        tokenizer = AutoTokenizer.from_pretrained(text, **revision)
    return vision_model, text_model, PicoProcessor(image_processor=image_processor, tokenizer=tokenizer)


def report_truncation(datasets: dict[str, CaptionedImageDataset], processor: PicoProcessor, max_length: int | None):
    """Warns, per split, of captions longer than the model takes."""
    for name, dataset in datasets.items():
        cut, total, longest = count_truncated(dataset.dataset, processor.tokenizer, max_length)
        if cut:
            logger.warning(
                f"{name}: {cut} of {total} captions are longer than {max_length} tokens and are cut (the longest has "
                f"{longest})."
            )


def set_up_logging(level: int) -> None:
    """Shows the messages of this script and of `modeling_pico` as those of transformers are shown."""
    hf_logging.set_verbosity(level)
    for name in ("train_pico", "modeling_pico"):
        named = logging.getLogger(name)
        named.setLevel(level)
        if not named.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("[%(name)s] %(levelname)s: %(message)s"))
            named.addHandler(handler)
            named.propagate = False


def wants_plots(plots: str) -> bool:
    """Whether to draw pictures; ImportError where they are asked for and matplotlib is missing."""
    if plots not in ("auto", "true", "false"):
        raise ValueError(f"--plots must be one of 'auto', 'true', 'false', but got {plots!r}.")
    if plots == "true":
        require_matplotlib()
    return plots == "true" or (plots == "auto" and has_matplotlib())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs what the arguments ask for; returns all metrics. SIGTERM in training: a checkpoint, exit status 143."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(argv)
    with sole_run(training_args.output_dir) if training_args.should_save else nullcontext():
        return carry_out(argv, model_args, data_args, training_args)


def carry_out(
    argv: list[str], model_args: ModelArguments, data_args: DataArguments, training_args: PicoTrainingArguments
) -> dict[str, float]:
    """As `main`, with the words of the command as they were understood."""
    set_up_logging(training_args.get_process_log_level())
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    if data_args.style_report and not training_args.do_predict:
        raise ValueError("--style_report reports on the test splits; give --do_predict as well.")
    if data_args.seen_styles is not None and not data_args.style_report:
        raise ValueError("--seen_styles is for the style report; give --style_report true as well.")
    plots = wants_plots(data_args.plots)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)

    data = load_data(model_args, data_args, training_args)
    captions = None
    if data.train is not None:
        captions = [caption for row in data.train.dataset["captions"] for caption in row]
    model, processor = build(model_args, data_args, captions, checkpoint)
    if model_args.freeze_vision:
        model.vision_model.requires_grad_(False)
    if model_args.freeze_text:
        model.text_model.requires_grad_(False)
    if model_args.train_uncertainty_only:
        model.train_uncertainty_only()
    if training_args.uncertainty_reranking and model.uncertainty_prototypes is None:
        raise ValueError("--uncertainty_reranking needs a model with uncertainty: --num_uncertainty_prototypes 8.")
    limit_text_length(processor.tokenizer, model.text_model, data_args.max_text_length)
    collator = PicoDataCollator(processor)
    splits = data.by_name(data_args)
    if training_args.should_log:
        report_truncation(splits, processor, collator.max_length)
    if training_args.process_index == 0:
        record_run(argv, model_args, data_args, training_args, splits)

    trainer = PicoTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=processor,
    )
    bases = [model_args.model_name_or_path, model_args.vision_model_name_or_path, model_args.text_model_name_or_path]
    trainer.card_info = {
        "base_models": [base for base in bases if base is not None],
        "dataset_name": data_args.dataset_name,
        "splits": {
            name: {"images": len(split), "texts": int(split.num_captions.sum())} for name, split in splits.items()
        },
        "command": shlex.join(["accelerate", "launch", "train_pico.py", *without_secrets(argv)]),
    }
    trainer.card_split_names = {"eval": data_args.eval_split}
    results = run(trainer, data, checkpoint)
    if training_args.do_train:
        with ornament("model card"):
            trainer.create_model_card()
        if training_args.push_to_hub:
            trainer.push_to_hub()
    if plots:
        # After the upload: pictures show images of the data, which may not be meant to be published.
        with ornament("pictures"):
            save_run_plots(trainer, splits, main=data_args.eval_split)
    return results


def record_run(argv, model_args, data_args, training_args, splits: dict[str, CaptionedImageDataset]) -> None:
    """Writes what this run is into `run.json`, before anything is trained."""
    configuration = {
        "model": asdict(model_args),
        "data": asdict(data_args),
        "training": training_args.to_dict(),
    }
    record = describe_run(["train_pico.py", *argv], configuration, splits, Path(__file__).resolve().parent)
    write_run_record(training_args.output_dir, record)


@contextmanager
def ornament(name: str) -> Iterator[None]:
    """Reports an error of what a run can do without; the model and the results are on the disk by then."""
    try:
        yield
    except Exception:
        logger.exception(f"The {name} could not be made. The model and the results are complete without.")


def run(trainer: PicoTrainer, data: Data, checkpoint: str | None) -> dict[str, float]:
    """Trains, evaluates and predicts as asked; writes `all_results.json`."""
    args = trainer.args
    results: dict[str, float] = {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        # An "internal call" uploads nothing: `main` does, once, when results and card are there too.
        trainer.save_model(_internal_call=True)
        trainer.save_state()
        if args.uncertainty_reranking:
            metrics.update(trainer.learn_uncertainty_reranking())
            trainer.save_model(_internal_call=True)  # its configuration holds what was learned
        results.update(_record(trainer, "train", metrics))
    elif args.uncertainty_reranking:
        results.update(_record(trainer, "reranking", trainer.learn_uncertainty_reranking()))
    if args.do_eval:
        results.update(_record(trainer, "eval", trainer.evaluate()))
    if args.do_predict:
        for split, dataset in data.tests.items():
            # Not `predict`, which also gathers the matrix of all scores.
            metrics = trainer.evaluate(dataset, metric_key_prefix=split)
            results.update(_record(trainer, split, metrics))
    if data.styled is not None:
        report = trainer.measure_styles(data.styled, data.seen_styles)
        results.update(_record(trainer, "style", report.metrics()))
        trainer.card_info["style_metrics"] = {name: style.table_row() for name, style in report.styles.items()}
        if trainer.is_world_process_zero():
            text = json.dumps(report.to_dict(), indent=4, ensure_ascii=False)
            write_text(Path(args.output_dir, "style_report.json"), text + "\n")
            write_text(Path(args.output_dir, "style_report.md"), report.to_markdown())
    return results


def _record(trainer: PicoTrainer, name: str, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)
    return metrics


if __name__ == "__main__":
    main()
