"""Captioned images: where they come from, how they are decoded, sampled and batched."""

from .collator import PicoDataCollator, count_truncated, default_max_length
from .dataset import CaptionedImageDataset, CaptionedImages, RandomCropFlip, SampleKey, as_captioned, caption_code
from .images import BadImageError, check_images, decode_image
from .sampler import UniqueIdBatchSampler
from .sources import load_captioned_images
from .styled_shapes import styled_shapes


__all__ = [
    "BadImageError",
    "CaptionedImageDataset",
    "CaptionedImages",
    "PicoDataCollator",
    "RandomCropFlip",
    "SampleKey",
    "UniqueIdBatchSampler",
    "as_captioned",
    "caption_code",
    "check_images",
    "count_truncated",
    "decode_image",
    "default_max_length",
    "load_captioned_images",
    "styled_shapes",
]
