#!/usr/bin/env python
"""
Fine-tunes a vision-language model for image-text retrieval with PICO.

    accelerate launch train_pico.py examples/quickstart.yaml
    accelerate launch train_pico.py --model_name_or_path openai/clip-vit-base-patch32 --dataset_name user/set ...

Options come from one YAML or JSON file, from flags, or from a file followed by flags that override it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback, set_seed

from modeling_pico.data import PicoDataCollator
from modeling_pico.durable import sole_run, write_text
from modeling_pico.evaluation.style_stress import draw_looks
from modeling_pico.markdown import escape_markdown
from modeling_pico.model.backbones_pico import limit_text_length
from modeling_pico.plots import FOLDER as PLOTS_FOLDER
from modeling_pico.plots import has_matplotlib, save_run_plots
from modeling_pico.script.arguments import parse_arguments
from modeling_pico.script.data import Data, check_data_arguments, load_data, report_truncation
from modeling_pico.script.model import find_checkpoint, plan_model
from modeling_pico.script.output import (
    OneLineErrors,
    ignore_closed_streams,
    never_fatal,
    set_up_logging,
    shorten_logs,
)
from modeling_pico.script.record import describe_run, write_run_record
from modeling_pico.training import PicoTrainer
from modeling_pico.training.secrets import find_secrets, without_secrets


def main(argv: Sequence[str] | None = None, callbacks: list[TrainerCallback] | None = None) -> dict[str, float]:
    r"""
    Runs what the arguments ask for. SIGTERM in training: a checkpoint, exit status 143.

    Args:
        argv (`Sequence[str]`, *optional*): The words of the command; by default those of this process.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks of the trainer.

    Returns:
        `dict[str, float]`: all metrics.

    Raises:
        ValueError, OSError, ImportError: say what is wrong with options, data or checkpoints, and what to do.
    """
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(argv)
    with sole_run(training_args.output_dir) if training_args.should_save else nullcontext():
        set_up_logging(training_args.get_process_log_level())
        # What can be known to be wrong is said before anything slow.
        check_data_arguments(data_args, training_args)
        checkpoint = find_checkpoint(training_args)
        plan = plan_model(model_args, checkpoint, training_args.do_train)
        if training_args.uncertainty_reranking and plan.config.uncertainty_config is None:
            raise ValueError(
                "--uncertainty_reranking needs a model with uncertainty, such as --uncertainty_config '{}'."
            )
        set_seed(training_args.seed)

        # A model that is made of backbones has not been measured on images of training yet.
        needs_reference = training_args.align_gallery and not training_args.do_train and plan.source is None
        data = load_data(data_args, training_args, plan.config.uses_prototypes, needs_reference)
        model, processor = plan.build(data.train_captions, data_args)
        if training_args.align_gallery and not training_args.do_train and not needs_reference:
            model.image_moments.check_fitted()
        if model_args.freeze_vision:
            model.vision_model.requires_grad_(False)
        if model_args.freeze_text:
            model.text_model.requires_grad_(False)
        if model_args.train_uncertainty_only:
            model.train_uncertainty_only()
        limit_text_length(processor.tokenizer, model.text_model, data_args.max_text_length)
        collator = PicoDataCollator(processor)
        splits = data.by_name(data_args)
        if training_args.should_log:
            report_truncation(splits, processor.tokenizer, collator.max_length)
        secrets = find_secrets({**vars(model_args), **vars(data_args), **vars(training_args)})
        command = shlex.join(without_secrets(["accelerate", "launch", "train_pico.py", *argv], secrets))
        if training_args.process_index == 0:
            options = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
            write_run_record(training_args.output_dir, describe_run(command, options, splits, secrets))

        trainer = PicoTrainer(
            model=model,
            args=training_args,
            data_collator=collator,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=processor,
            callbacks=callbacks,
        )
        shorten_logs(trainer)
        names = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
        card_info = {
            "base_models": [path for name in names if (path := getattr(model_args, name)) is not None],
            "dataset_name": data_args.dataset_name,
            "splits": {
                name: {"images": len(split), "texts": int(split.num_captions.sum())} for name, split in splits.items()
            },
        }
        trainer.card_info = {**without_secrets(card_info, secrets), "command": command}
        trainer.card_split_names = {"eval": data_args.eval_split}
        results = train_and_evaluate(trainer, data, checkpoint)
        if training_args.do_train:
            with never_fatal("model card"):
                trainer.create_model_card()
            if training_args.push_to_hub:
                trainer.push_to_hub()
        # After the upload: pictures show images of the data, which may not be meant to be published.
        if data_args.plots and has_matplotlib():
            with never_fatal("pictures"):
                save_run_plots(trainer, splits, main=data_args.eval_split)
        if data_args.plots and data.looks and trainer.is_world_process_zero():
            with never_fatal("contact sheet"):
                folder = Path(training_args.output_dir, PLOTS_FOLDER)
                folder.mkdir(exist_ok=True)
                draw_looks(data.tests[data_args.test_split[0]], data.looks).save(folder / "style_stress.png")
        return results


def train_and_evaluate(trainer: PicoTrainer, data: Data, checkpoint: str | None) -> dict[str, float]:
    """Trains, evaluates and predicts as asked; writes `all_results.json` and returns all metrics."""
    args = trainer.args
    results: dict[str, float] = {}

    def record(name: str, metrics: dict[str, float]) -> None:
        trainer.save_metrics(name, metrics)
        trainer.log_metrics(name, metrics)
        results.update(metrics)

    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        # Saved before as well: an image that cannot be read must not cost the training.
        trainer.save_model(_internal_call=True)
        trainer.fit_alignment()
        # An "internal call" uploads nothing: `main` does, once, when results and card are there too.
        trainer.save_model(_internal_call=True)
        trainer.save_state()
        if args.uncertainty_reranking:
            metrics.update(trainer.learn_uncertainty_reranking())
            trainer.save_model(_internal_call=True)  # its configuration holds what was learned
        record("train", metrics)
    else:
        if data.reference is not None:
            trainer.fit_alignment(data.reference)
        if args.uncertainty_reranking:
            record("reranking", trainer.learn_uncertainty_reranking())
    if args.do_eval:
        record("eval", trainer.evaluate())
    if args.do_predict:
        for split, dataset in data.tests.items():
            # Not `predict`, which also gathers the matrix of all scores.
            record(split, trainer.evaluate(dataset, metric_key_prefix=split))
    if data.looks or any(data.caption_styles.values()):
        stress = {
            split: trainer.measure_style_stress(dataset, data.looks, data.caption_styles[split])
            for split, dataset in data.tests.items()
        }
        named = {split: result.metrics().items() for split, result in stress.items()}
        record("style_stress", {f"{split}_{name}": value for split in named for name, value in named[split]})
        if trainer.is_world_process_zero():
            text = json.dumps({split: result.to_dict() for split, result in stress.items()}, indent=4)
            write_text(Path(args.output_dir, "style_stress.json"), text + "\n")
            tables = [f"## {escape_markdown(split)}\n\n{result.to_markdown()}" for split, result in stress.items()]
            write_text(Path(args.output_dir, "style_stress.md"), "\n".join(["# Style stress test\n", *tables]))
    if data.styled is not None:
        report = trainer.measure_styles(data.styled, data.seen_styles)
        record("style", report.metrics())
        trainer.card_info["style_metrics"] = {name: style.table_row() for name, style in report.styles.items()}
        if trainer.is_world_process_zero():
            text = json.dumps(report.to_dict(), indent=4, ensure_ascii=False)
            write_text(Path(args.output_dir, "style_report.json"), text + "\n")
            write_text(Path(args.output_dir, "style_report.md"), report.to_markdown())
    return results


if __name__ == "__main__":
    ignore_closed_streams()
    with OneLineErrors() as errors:
        main(callbacks=[errors])
