"""Which data a run of `train_pico.py` reads: loaded, checked, and the same on all processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import (
    CaptionedImageDataset,
    Compose,
    RandomCropFlip,
    RandomStyle,
    check_distinct,
    check_images,
    load_captioned_images,
)
from ..data.dataset import Transform, count_styles
from ..data.images import image_keys
from ..distributed import gather_object
from ..evaluation.style_report import order_styles
from ..evaluation.style_stress import check_stress
from ..model.gallery_alignment_pico import check_sizes
from ..training.arguments import PicoTrainingArguments
from .arguments import DataArguments
from .record import fingerprint


logger = logging.get_logger(__name__)


@dataclass
class Data:
    """
    The splits that a run reads.

    Attributes:
        train, evaluation ([`CaptionedImageDataset`] or `None`): What is trained on, and what selects and feeds back.
        tests (`dict[str, CaptionedImageDataset]`): What is reported only, by name of the split.
        reference ([`CaptionedImageDataset`] or `None`): Images of training of a run that does not train, to which
            galleries are moved.
        styled ([`CaptionedImageDataset`] or `None`): All test splits together, for the style report.
        seen_styles (`list[str]` or `None`): The styles among them that training has shown, if known.
        looks (`list[str]`): Looks of the stress test of the test splits.
        caption_styles (`dict[str, dict[str, list[list[str]]]]`):
            Captions of the stress test, by test split and column, a list for each row.
    """

    train: CaptionedImageDataset | None
    evaluation: CaptionedImageDataset | None
    tests: dict[str, CaptionedImageDataset]
    reference: CaptionedImageDataset | None = None
    styled: CaptionedImageDataset | None = None
    seen_styles: list[str] | None = None
    looks: list[str] = field(default_factory=list)
    caption_styles: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)

    def by_name(self, data_args: DataArguments) -> dict[str, CaptionedImageDataset]:
        """All splits under their own names."""
        training = self.reference if self.train is None else self.train
        named = {data_args.train_split: training, data_args.eval_split: self.evaluation, **self.tests}
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
    stressed = [f"--{name}" for name in ("style_stress", "caption_style_columns") if getattr(data_args, name)]
    if stressed and not training_args.do_predict:
        raise ValueError(f"{stressed[0]} reports on the test splits; give --do_predict as well.")
    # Metrics are named by their split, and so are the files that hold them.
    own = {
        "train": training_args.do_train,
        "eval": training_args.do_eval,
        "reranking": training_args.uncertainty_reranking,
        "style": data_args.style_report,
        "style_stress": bool(stressed),
        "all": True,
    }
    taken = [name for name in data_args.test_split if own.get(name)] if training_args.do_predict else []
    if taken:
        raise ValueError(
            f"--test_split {taken[0]}: this run writes results of its own under that name, which those of the split "
            "would replace. Report the split in a run of its own, with --do_predict alone, or give it another name."
        )


def load_data(
    data_args: DataArguments,
    training_args: PicoTrainingArguments,
    uses_prototypes: bool,
    needs_reference: bool = False,
) -> Data:
    r"""
    Loads the splits that the run needs, on the main process first.

    Args:
        data_args (`DataArguments`): Where they are.
        training_args ([`PicoTrainingArguments`]): What is done with them.
        uses_prototypes (`bool`): Whether the model has style prototypes, which validation feeds back on.
        needs_reference (`bool`, *optional*, defaults to `False`):
            Whether images of training are needed though nothing is trained, see [`Data`].
    """
    train = evaluation = reference = None
    tests = {}
    needs_feedback = training_args.do_train and training_args.feedback_needs_validation and uses_prototypes
    evaluates = training_args.do_eval or needs_feedback or training_args.uncertainty_reranking
    if training_args.do_train and evaluates and data_args.eval_split == data_args.train_split:
        raise ValueError(
            f"--train_split and --eval_split are both {data_args.eval_split!r}, but what selects must not be what is "
            "trained on. Name another --eval_split."
        )
    with training_args.main_process_first(desc="loading data"):
        if training_args.do_train:
            transform = augmentation(data_args)
            train = _load_split(data_args.train_split, data_args, data_args.max_train_samples, transform)
        if evaluates:
            evaluation = _load_split(data_args.eval_split, data_args, data_args.max_eval_samples)
        if training_args.do_predict:
            # Named, so that a split without styles is refused with the columns that it has.
            style_column = data_args.style_column or ("style" if data_args.style_report else None)
            of_tests = replace(data_args, style_column=style_column)
            tests = {split: _load_split(split, of_tests, data_args.max_eval_samples) for split in data_args.test_split}
        if needs_reference:
            reference = _load_split(data_args.train_split, data_args, data_args.max_train_samples)
        data = Data(train, evaluation, tests, reference)
        check_distinct({name: split.dataset for name, split in data.by_name(data_args).items()})
        data.looks = data_args.style_stress or []
        data.caption_styles = {split: _caption_styles(split, rows, data_args) for split, rows in tests.items()}
        if data.looks or data_args.caption_style_columns:
            for split, rows in tests.items():
                check_stress(rows, data.looks, data.caption_styles[split])
        if data_args.style_report:
            data.styled = CaptionedImageDataset(
                datasets.concatenate_datasets([split.dataset for split in tests.values()])
            )
            data.seen_styles = _seen_styles(data, data_args.seen_styles)
            order_styles(data.styled.styles, data.seen_styles)  # what cannot be reported is refused before training
    if training_args.align_gallery:
        _check_galleries(data, data_args, training_args)
    check_processes(data.by_name(data_args))
    return data


def _check_galleries(data: Data, data_args: DataArguments, training_args: PicoTrainingArguments) -> None:
    """ValueError for splits that are to be moved, or moved to, and have too few images for that."""
    moved = dict(data.tests)
    if training_args.do_eval and data.evaluation is not None:
        moved[data_args.eval_split] = data.evaluation
    for name, split in moved.items():
        check_sizes(count_styles(split), f"split {name!r}")
    for reference in (data.train, data.reference):
        if reference is not None:
            check_sizes({None: len(reference)}, f"split {data_args.train_split!r}")


def augmentation(data_args: DataArguments) -> Transform | None:
    """What becomes of the training images; None where they stay as they are."""
    transforms: list[Transform] = []
    if data_args.min_crop_scale != 1 or data_args.random_flip:
        transforms.append(RandomCropFlip(data_args.min_crop_scale, data_args.random_flip))
    if data_args.style_augmentation:
        transforms.append(RandomStyle(data_args.style_augmentation))
    return Compose(transforms) if transforms else None


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
    splits: dict[str, CaptionedImageDataset], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> None:
    """Warns, per split, of captions longer than the model takes."""
    for name, split in splits.items():
        cut = 0
        for rows in tqdm(split.dataset.select_columns("captions").iter(1000), desc="Measuring captions", delay=5):
            texts = [text for captions in rows["captions"] for text in captions]
            encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            cut += sum(max_length is not None and len(ids) > max_length for ids in encoded)
        if cut:
            total = int(split.num_captions.sum())
            logger.warning(f"{name}: {cut} of {total} captions are longer than {max_length} tokens and are cut.")


def _load_split(
    split: str, data_args: DataArguments, limit: int | None, transform: Any = None
) -> CaptionedImageDataset:
    """Loads one split, checks its images, and cuts it to `limit` rows."""
    on_bad_image: Any = data_args.on_bad_image
    dataset = _load_rows(split, data_args, data_args.on_empty_captions)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return CaptionedImageDataset(check_images(dataset, on_bad_image, data_args.preprocessing_num_workers), transform)


def _load_rows(split: str, data_args: DataArguments, on_empty_captions: Any) -> datasets.Dataset:
    return load_captioned_images(
        data_args.dataset_name,
        split=split,
        image_column=data_args.image_column,
        caption_column=data_args.caption_column,
        id_column=data_args.id_column,
        style_column=data_args.style_column,
        split_column=data_args.split_column,
        image_dir=data_args.image_dir,
        config_name=data_args.dataset_config_name,
        cache_dir=data_args.cache_dir,
        revision=data_args.dataset_revision,
        on_empty_captions=on_empty_captions,
    )


def _caption_styles(
    split: str, dataset: CaptionedImageDataset, data_args: DataArguments
) -> dict[str, list[list[str]]]:
    """By column of `--caption_style_columns`, a list of captions for each row of a split, empty where it has none."""

    def names(rows: datasets.Dataset) -> list[Any]:
        return list(zip(image_keys(rows.select_columns("image")), rows["image_id"][:], strict=True))

    found = {}
    for column in data_args.caption_style_columns or ():
        rows = _load_rows(split, replace(data_args, caption_column=[column]), "keep")
        captions = dict(zip(names(rows), rows["captions"][:], strict=True))
        found[column] = [captions[name] for name in names(dataset.dataset)]
    return found


def _seen_styles(data: Data, given: list[str] | None) -> list[str] | None:
    """The reported styles that training has shown: as given, else those that this run trains on; None if unknown."""
    if given is not None or data.train is None or data.train.styles is None:
        if given is None:
            logger.warning(
                "Which styles training has shown is not known: the style report will have no gaps between seen and "
                "unseen styles. Name the seen ones by --seen_styles."
            )
        return given
    return sorted(set(data.train.styles) & set(data.styled.styles))  # type: ignore[union-attr, arg-type]


__all__ = ["Data", "augmentation", "check_data_arguments", "check_processes", "load_data", "report_truncation"]
