"""Captioned images as a torch dataset, and the augmentation of its images."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import datasets
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from ..model.image_decoding_pico import decode_image
from .looks import check_looks, render
from .paths import check_mark


Transform = Callable[[Image.Image, random.Random], Image.Image]


class SampleKey(NamedTuple):
    """
    One training sample, as the batch sampler asks for it.

    Attributes:
        row (`int`): The row of the data set.
        caption (`int`): Which of the row's captions.
        seed (`int`): Seeds the augmentation of this sample, so that it depends neither on workers nor on a resume.
    """

    row: int
    caption: int
    seed: int


@runtime_checkable
class CaptionedImages(Protocol):
    """
    What the trainer asks of a data set: rows by [`SampleKey`] for training and by number for evaluation, and these.

    Attributes:
        ids (`torch.Tensor` of shape `(rows,)`, int64): Equal where rows mean the same.
        num_captions (`torch.Tensor` of shape `(rows,)`, int64): Number of captions of each row.
    """

    ids: torch.Tensor
    num_captions: torch.Tensor

    def __len__(self) -> int: ...


class CaptionedImageDataset(Dataset):
    """
    Decoded images with their captions over the canonical columns of [`load_captioned_images`].

    `dataset[row]` is the whole row, for evaluation: `{"image", "captions", "image_id", "row"}`. With a [`SampleKey`]
    it is one training sample, augmented if a transform is set: `{"image", "caption", "image_id"}`. The image is a PIL
    image in RGB and `image_id` the integer code of the row's id.

    Args:
        dataset (`datasets.Dataset`):
            Rows with the columns `image`, `captions` (list of `str`), `image_id` (`str` or `int`) and, if known,
            `style`.
        transform (`Callable[[PIL.Image.Image, random.Random], PIL.Image.Image]` or a list of these, *optional*):
            Augmentation of training samples, for example [`RandomCropFlip`], random by the given generator alone; a
            list has one (or `None`) for each row.

    Attributes:
        ids (`torch.Tensor` of shape `(rows,)`, int64):
            Code of each row's `image_id`, counted in the order of first appearance.
        num_captions (`torch.Tensor` of shape `(rows,)`, int64):
            Number of captions of each row.
        styles (`list[str]` or `None`):
            Style of each row, if known.
        look (`str` or `None`):
            The look in which all images are drawn again, see [`in_look`].

    Raises:
        ValueError: if a column is missing or holds something else.
    """

    def __init__(self, dataset: datasets.Dataset, transform: Transform | list[Transform | None] | None = None) -> None:
        missing = {"image", "captions", "image_id"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"The data set lacks the column(s) {sorted(missing)}; it has {dataset.column_names}. "
                "`load_captioned_images` makes them."
            )
        columns = ["image", "captions", "image_id"] + ["style"] * ("style" in dataset.column_names)
        # Without a format, which would give ids as tensors: no two of them are the same key.
        dataset = dataset.select_columns(columns).with_format(None)
        _check_types(dataset)
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.transform = transform
        self.look: str | None = None
        codes: dict[str | int, int] = {}
        self.ids = torch.tensor([codes.setdefault(i, len(codes)) for i in dataset["image_id"][:]], dtype=torch.int64)
        self.num_captions = torch.tensor([len(c) for c in dataset["captions"][:]], dtype=torch.int64)
        self.styles = list(dataset["style"]) if "style" in dataset.column_names else None

    def __len__(self) -> int:
        return len(self.dataset)

    def in_look(self, look: str) -> CaptionedImageDataset:
        """
        The same data with every image drawn again in a fixed look, see [`~modeling_pico.data.render`]; ValueError for
        a look that does not exist.
        """
        check_looks([look])
        drawn = copy.copy(self)
        drawn.look = look
        return drawn

    def count_shared_captions(self) -> int:
        """
        Number of captions whose words are also the caption of an image of another id. Nothing can tell these apart:
        in training they are no negatives of each other, and in evaluation they bound the recalls.
        """
        codes = [caption_code(text) for texts in self.dataset["captions"][:] for text in texts]
        ids = self.ids.repeat_interleave(self.num_captions)
        return count_shared_captions(torch.tensor(codes, dtype=torch.int64), ids)

    def image_names(self, codes: Sequence[int]) -> list[str]:
        """The `image_id` of the data for each code of `ids`."""
        rows = [int((self.ids == code).nonzero()[0]) for code in codes]
        return self.dataset.select_columns("image_id")[rows]["image_id"]

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        row = key.row if isinstance(key, SampleKey) else int(key)
        item = self.dataset[row]
        check_mark(item["image"] and item["image"]["path"])
        image = decode_image(item["image"])
        if self.look is not None:
            image = render(image, self.look)
        image_id = int(self.ids[row])
        if not isinstance(key, SampleKey):
            return {"image": image, "captions": item["captions"], "image_id": image_id, "row": row % len(self)}
        transform = self.transform[row] if isinstance(self.transform, list) else self.transform
        if transform is not None:
            image = transform(image, random.Random(key.seed))
        return {"image": image, "caption": item["captions"][key.caption], "image_id": image_id}


def as_captioned(dataset: Any) -> CaptionedImages:
    """
    Gives a data set the form that training and evaluation ask for.

    Rows of a `Subset` and of a `ConcatDataset` keep the transform of the data set they come from. Equal ids in two
    parts are one meaning; those that [`load_captioned_images`] makes up differ wherever images do.

    Args:
        dataset ([`CaptionedImageDataset`], `datasets.Dataset`, `Subset` or `ConcatDataset` of these):
            A `datasets.Dataset` needs the columns of [`CaptionedImageDataset`]. Data sets of one's own are taken as
            they are if they have what [`CaptionedImages`] names.

    Raises:
        ValueError: for any other type.
    """
    if isinstance(dataset, CaptionedImages):
        return dataset
    if isinstance(dataset, datasets.Dataset):
        return CaptionedImageDataset(dataset)
    if isinstance(dataset, Subset):
        whole = _join([dataset.dataset])
        rows = [int(row) for row in dataset.indices]
        return CaptionedImageDataset(whole.dataset.select(rows), [whole.transform[row] for row in rows])
    if isinstance(dataset, ConcatDataset):
        return _join(dataset.datasets)
    name = type(dataset).__name__
    if isinstance(dataset, (datasets.IterableDataset, IterableDataset)):
        raise ValueError(
            f"{name} is a stream, which cannot be asked for a row: batches in which every meaning occurs once, and "
            "rankings over a whole set, need all rows. Load it without `streaming=True`."
        )
    raise ValueError(
        f"{name} holds no captioned images. Give a CaptionedImageDataset, a datasets.Dataset with the columns "
        "`image`, `captions` and `image_id` (`load_captioned_images` makes them), or a Subset or ConcatDataset of "
        "these."
    )


def _join(members: Sequence[Any]) -> Any:
    """The rows of several data sets, each with its own transform."""
    parts: list[Any] = [as_captioned(member) for member in members]
    if own := [type(part).__name__ for part in parts if type(part) is not CaptionedImageDataset]:
        raise ValueError(
            f"A Subset or ConcatDataset must be of CaptionedImageDataset or datasets.Dataset, not of {own[0]}."
        )
    if looks := [part.look for part in parts if part.look is not None]:
        raise ValueError(
            f"A part of a data set is drawn in the look {looks[0]!r}. Take parts of the plain data, and then the look "
            f"of all: `as_captioned(...).in_look({looks[0]!r})`."
        )
    transforms: list[Transform | None] = []
    for part in parts:
        transforms += part.transform if isinstance(part.transform, list) else [part.transform] * len(part)
    columns = ["image", "captions", "image_id"] + ["style"] * all(part.styles is not None for part in parts)
    table = datasets.concatenate_datasets([part.dataset.select_columns(columns) for part in parts])
    return CaptionedImageDataset(table, transforms)


def _check_types(dataset: datasets.Dataset) -> None:
    captions, image_id = dataset.features["captions"], dataset.features["image_id"]
    text, integer = (pa.types.is_string, pa.types.is_large_string), pa.types.is_integer
    # A column of single captions would be taken for lists of letters.
    is_list = isinstance(captions, (datasets.List, datasets.LargeList))
    if not is_list or not _is_value(captions.feature, *text):
        wrong = f"`captions` must hold lists of strings, but holds {captions}"
    elif not _is_value(image_id, *text, integer):
        wrong = f"`image_id` must hold strings or integers, but holds {image_id}"
    elif missing := dataset["image_id"][:].count(None):
        wrong = f"`image_id` is missing in {missing} rows, which would all mean the same"
    elif empty := sum(texts is None or not all(texts) for texts in dataset["captions"][:]):
        wrong = f"`captions` is missing in {empty} rows, or holds a caption without text"
    else:
        return
    raise ValueError(f"The column {wrong}. `load_captioned_images` makes the columns that are needed.")


def _is_value(feature: Any, *kinds: Callable[[pa.DataType], bool]) -> bool:
    return isinstance(feature, datasets.Value) and any(kind(feature.pa_type) for kind in kinds)


def caption_code(caption: str) -> int:
    """The words of a caption as a number (64 bits, signed): the same for captions equal up to case and spaces."""
    words = " ".join(caption.casefold().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little", signed=True)


def count_styles(dataset: Dataset) -> Counter[str | None]:
    """Number of images of each style; of all images under None where they have none."""
    styles = dataset.styles if isinstance(dataset, CaptionedImageDataset) else None
    return Counter(styles or [None] * len(dataset))  # type: ignore[arg-type]


def count_shared_captions(caption_codes: torch.Tensor, ids: torch.Tensor) -> int:
    """Number of captions, by their codes `(captions,)`, whose words also stand under another id `(captions,)`."""
    _, codes = caption_codes.unique(return_inverse=True)
    num_ids = torch.stack([codes, ids], dim=1).unique(dim=0)[:, 0].bincount()
    return int((num_ids[codes] > 1).sum())


class RandomCropFlip:
    """
    Cuts a random part of the image, scales it back to the image's own size (bicubic), and mirrors half of the images.

    Mirroring swaps left and right: turn it off where captions speak of sides.

    Args:
        min_scale (`float`, *optional*, defaults to 0.6):
            Smallest share of the image's area that is kept, in (0, 1]. The share is uniform; the ratio of the sides
            changes by up to 4/3 as far as the image has room.
        flip (`bool`, *optional*, defaults to `True`): Whether to mirror with probability one half.
    """

    def __init__(self, min_scale: float = 0.6, flip: bool = True) -> None:
        if not 0 < min_scale <= 1:
            raise ValueError(f"`min_scale` is a share of the image's area in (0, 1], got {min_scale}.")
        self.min_scale = min_scale
        self.flip = flip

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Returns the augmented image, of the same size; `rng` is the only source of chance."""
        width, height = image.size
        share = rng.uniform(self.min_scale, 1.0)
        # A side cannot exceed the image's, so only ratios up to 1 / share keep the area as drawn.
        limit = min(math.log(4 / 3), -math.log(share))
        stretch = math.exp(rng.uniform(-limit, limit) / 2)
        crop_width, crop_height = width * math.sqrt(share) * stretch, height * math.sqrt(share) / stretch
        left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
        # Rounding must not push the box over the edge by a fraction of a pixel.
        box = (max(0.0, left), max(0.0, top), min(width, left + crop_width), min(height, top + crop_height))
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class Compose:
    """Several transforms, one after another, which share the generator of a sample."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        for transform in self.transforms:
            image = transform(image, rng)
        return image
