"""Captioned images as a torch dataset, and the augmentation of its images."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..image_decoding_pico import decode_image
from .paths import check_mark


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


class CaptionedImageDataset(Dataset):
    """
    Decoded images with their captions over the canonical columns of [`load_captioned_images`].

    `dataset[row]` is the whole row, for evaluation: `{"image", "captions", "image_id", "row"}`. With a [`SampleKey`]
    it is one training sample, augmented if a transform is set: `{"image", "caption", "image_id"}`. The image is a PIL
    image in RGB and `image_id` the integer code of the row's id.

    Args:
        dataset (`datasets.Dataset`):
            Rows with the columns `image`, `captions`, `image_id` and, if known, `style`.
        transform (`Callable[[PIL.Image.Image, random.Random], PIL.Image.Image]`, *optional*):
            Augmentation of training samples, for example [`RandomCropFlip`]. All its chance must come from the given
            generator.

    Attributes:
        ids (`torch.Tensor` of shape `(rows,)`, int64):
            Code of each row's `image_id`, counted in the order of first appearance.
        num_captions (`torch.Tensor` of shape `(rows,)`, int64):
            Number of captions of each row.
        styles (`list[str]` or `None`):
            Style of each row, if known.

    Raises:
        ValueError: if a column is missing.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable[[Image.Image, random.Random], Image.Image] | None = None,
    ) -> None:
        missing = {"image", "captions", "image_id"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"The data set lacks the column(s) {sorted(missing)}; it has {dataset.column_names}. "
                "`load_captioned_images` makes them."
            )
        columns = ["image", "captions", "image_id"] + ["style"] * ("style" in dataset.column_names)
        self.dataset = dataset.select_columns(columns).cast_column("image", datasets.Image(decode=False))
        self.transform = transform
        codes: dict[str, int] = {}
        self.ids = torch.tensor([codes.setdefault(i, len(codes)) for i in dataset["image_id"][:]], dtype=torch.int64)
        self.num_captions = torch.tensor([len(c) for c in dataset["captions"][:]], dtype=torch.int64)
        self.styles = list(dataset["style"]) if "style" in dataset.column_names else None

    def __len__(self) -> int:
        return len(self.dataset)

    def image_names(self, codes: Sequence[int]) -> list[str]:
        """The `image_id` of the data for each code of `ids`."""
        rows = [int((self.ids == code).nonzero()[0]) for code in codes]
        return self.dataset.select_columns("image_id")[rows]["image_id"]

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        row = key.row if isinstance(key, SampleKey) else int(key)
        item = self.dataset[row]
        check_mark(item["image"] and item["image"]["path"])
        image = decode_image(item["image"])
        image_id = int(self.ids[row])
        if not isinstance(key, SampleKey):
            return {"image": image, "captions": item["captions"], "image_id": image_id, "row": row % len(self)}
        if self.transform is not None:
            image = self.transform(image, random.Random(key.seed))
        return {"image": image, "caption": item["captions"][key.caption], "image_id": image_id}


class RandomCropFlip:
    """
    Cuts a random part of the image, scales it back to the image's own size (bicubic), and mirrors half of the images.

    Mirroring swaps left and right: turn it off where captions speak of sides.

    Args:
        min_scale (`float`, *optional*, defaults to 0.6):
            Smallest share of the image's area that is kept, in (0, 1]. The share is uniform; the ratio of the sides
            changes by up to 4/3 as far as the image has room.
        flip (`bool`, *optional*, defaults to `True`):
            Whether to mirror with probability one half.
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}(min_scale={self.min_scale}, flip={self.flip})"
