"""Which data a run of `train_pico.py` reads: loaded, checked, and the same on all processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers.utils import logging

from ..data import (
    CaptionedImageDataset,
    RandomCropFlip,
    check_distinct,
    check_images,
    count_truncated,
    load_captioned_images,
)
from ..distributed import gather_object
from ..evaluation.style_report import order_styles
from ..model.processing_pico import PicoProcessor
from .arguments import PicoTrainingArguments
from .run_record import fingerprint
from .script_arguments import DataArguments


logger = logging.get_logger(__name__)


@dataclass
class Data:
    """
    The splits that a run reads.

    Attributes:
        train, evaluation ([`CaptionedImageDataset`] or `None`): What is trained on, and what selects and feeds back.
        tests (`dict[str, CaptionedImageDataset]`): What is reported only, by name of the split.
        styled ([`CaptionedImageDataset`] or `None`): All test splits together, for the style report.
        seen_styles (`list[str]` or `None`): The styles among them that training has shown, if known.
    """

    train: CaptionedImageDataset | None
    evaluation: CaptionedImageDataset | None
    tests: dict[str, CaptionedImageDataset]
    styled: CaptionedImageDataset | None = None
    seen_styles: list[str] | None = None

    def by_name(self, data_args: DataArguments) -> dict[str, CaptionedImageDataset]:
        """All splits under their own names."""
        named = {data_args.train_split: self.train, data_args.eval_split: self.evaluation, **self.tests}
        return {name: dataset for name, dataset in named.items() if dataset is not None}

    @property
    def train_captions(self) -> list[str] | None:
        """All captions that are trained on."""
        if self.train is None:
            return None
        return [caption for captions in self.train.dataset["captions"] for caption in captions]


def check_data_arguments(data_args: DataArguments, training_args: PicoTrainingArguments) -> None:
    """Refuses what no data can meet, before any is read."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    if data_args.style_report and not training_args.do_predict:
        raise ValueError("--style_report reports on the test splits; give --do_predict as well.")
    if data_args.seen_styles is not None and not data_args.style_report:
        raise ValueError("--seen_styles is for the style report; give --style_report true as well.")
    for name in ("max_train_samples", "max_eval_samples", "max_text_length", "preprocessing_num_workers"):
        value = getattr(data_args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, but got {value}.")
    # Metrics are named by their split, and so are the files that hold them.
    own = {
        "train": training_args.do_train,
        "eval": training_args.do_eval,
        "reranking": training_args.uncertainty_reranking,
        "style": data_args.style_report,
        "all": True,
    }
    taken = [name for name in data_args.test_split if own.get(name)] if training_args.do_predict else []
    if taken:
        raise ValueError(
            f"--test_split {taken[0]}: this run writes results of its own under that name, which those of the split "
            "would replace. Report the split in a run of its own, with --do_predict alone, or give it another name."
        )
    if not 0 <= data_args.max_skipped <= 1:
        raise ValueError(f"--max_skipped is a share of the rows from 0 to 1, but got {data_args.max_skipped}.")
    if not 0 < data_args.min_crop_scale <= 1:
        raise ValueError(
            f"--min_crop_scale is a share of the image's area, above 0 and at most 1, but got "
            f"{data_args.min_crop_scale}."
        )


def load_data(data_args: DataArguments, training_args: PicoTrainingArguments, uses_prototypes: bool) -> Data:
    """Loads the splits that the run needs, on the main process first."""
    train = evaluation = None
    tests = {}
    needs_feedback = training_args.do_train and training_args.feedback_needs_validation and uses_prototypes
    with training_args.main_process_first(desc="loading data"):
        if training_args.do_train:
            transform = None
            if data_args.min_crop_scale < 1 or data_args.random_flip:
                transform = RandomCropFlip(data_args.min_crop_scale, data_args.random_flip)
            train = _load_split(data_args.train_split, data_args, data_args.max_train_samples, transform)
        if training_args.do_eval or needs_feedback or training_args.uncertainty_reranking:
            evaluation = _load_split(data_args.eval_split, data_args, data_args.max_eval_samples)
        if training_args.do_predict:
            # Named, so that a split without styles is refused with the columns that it has.
            named = {"style_column": data_args.style_column or "style"} if data_args.style_report else {}
            tests = {
                split: _load_split(split, data_args, data_args.max_eval_samples, **named)
                for split in data_args.test_split
            }
        data = Data(train, evaluation, tests)
        check_distinct({name: split.dataset for name, split in data.by_name(data_args).items()})
        if data_args.style_report:
            data.styled = CaptionedImageDataset(concatenate_datasets([split.dataset for split in tests.values()]))
            data.seen_styles = _find_seen_styles(data, data_args)
            order_styles(data.styled.styles, data.seen_styles)  # what cannot be reported is refused before training
    check_processes(data.by_name(data_args))
    return data


def check_processes(splits: dict[str, CaptionedImageDataset]) -> None:
    """ValueError unless all processes have read the same captions: of other ones they would train other models."""
    own = {name: (len(split), fingerprint(split, images=False)) for name, split in splits.items()}
    for process, found in enumerate(gather_object([own])):
        for name, (rows, digest) in found.items():
            here, own_digest = own[name]
            if (rows, digest) != (here, own_digest):
                how = "other captions" if rows == here else f"{rows} images instead of {here}"
                raise ValueError(
                    f"The processes read different data: the split {name!r} of process {process} has {how}. Give all "
                    "machines the same files in the same order."
                )


def report_truncation(
    splits: dict[str, CaptionedImageDataset], processor: PicoProcessor, max_length: int | None
) -> None:
    """Warns, per split, of captions longer than the model takes."""
    for name, dataset in splits.items():
        cut, total, longest = count_truncated(dataset.dataset, processor.tokenizer, max_length)
        if cut:
            logger.warning(
                f"{name}: {cut} of {total} captions are longer than {max_length} tokens and are cut (the longest has "
                f"{longest})."
            )


def _load_rows(split: str, data_args: DataArguments, **options: Any) -> Dataset:
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


def _load_split(
    split: str, data_args: DataArguments, limit: int | None, transform: Any = None, **options: Any
) -> CaptionedImageDataset:
    """Loads one split, checks its images, and cuts it to `limit` rows."""
    dataset = _load_rows(split, data_args, **options)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    on_bad_image: Any = data_args.on_bad_image
    dataset = check_images(dataset, on_bad_image, data_args.preprocessing_num_workers, data_args.max_skipped)
    return CaptionedImageDataset(dataset, transform=transform)


def _find_seen_styles(data: Data, data_args: DataArguments) -> list[str] | None:
    """The reported styles that training has shown: as given, else those of the training split; None if unknown."""
    if data_args.seen_styles is not None:
        return data_args.seen_styles
    reason = "has no column with them"
    seen = None
    if data.train is not None:
        seen = data.train.styles
    else:
        try:
            rows = _load_rows(data_args.train_split, data_args, with_images=False)
            seen = rows["style"][:] if "style" in rows.column_names else None
        except (ValueError, OSError) as error:
            reason = f"cannot be read ({error})"
    if seen is None:
        logger.warning(
            f"Which styles training has shown is not known: the split {data_args.train_split!r} {reason}. The style "
            "report will have no gaps between seen and unseen styles; name the seen ones by --seen_styles."
        )
        return None
    return sorted(set(seen) & set(data.styled.styles))  # type: ignore[union-attr, arg-type]


__all__ = ["Data", "check_data_arguments", "check_processes", "load_data", "report_truncation"]
