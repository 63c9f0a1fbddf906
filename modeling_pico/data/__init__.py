"""Captioned images: where they come from, how they are decoded, sampled and batched."""

from ..model.image_decoding_pico import BadImageError, decode_image
from .collator import PicoDataCollator, default_max_length
from .dataset import (
    CaptionedImageDataset,
    CaptionedImages,
    Compose,
    RandomCropFlip,
    SampleKey,
    as_captioned,
    caption_code,
)
from .images import check_images
from .looks import LOOKS, RandomStyle, render
from .sampler import UniqueIdBatchSampler
from .sources import load_captioned_images
from .splits import check_distinct
from .styled_shapes import styled_shapes


__all__ = [
    "LOOKS",
    "BadImageError",
    "CaptionedImageDataset",
    "CaptionedImages",
    "Compose",
    "PicoDataCollator",
    "RandomCropFlip",
    "RandomStyle",
    "SampleKey",
    "UniqueIdBatchSampler",
    "as_captioned",
    "caption_code",
    "check_distinct",
    "check_images",
    "decode_image",
    "default_max_length",
    "load_captioned_images",
    "render",
    "styled_shapes",
]
