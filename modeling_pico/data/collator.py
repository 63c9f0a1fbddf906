"""From samples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .dataset import caption_code


# Tokenizers without a limit of their own report an astronomically large one.
LARGEST_SANE_LENGTH = 10_000


class PicoDataCollator:
    """
    Makes a batch of tensors of the samples of a [`CaptionedImageDataset`].

    Training samples (with a `caption`) give `pixel_values` `(batch, 3, height, width)`, `input_ids` and
    `attention_mask` `(batch, tokens)`, `token_type_ids` if the tokenizer makes them, `image_ids` `(batch,)`, and
    `caption_codes` `(batch,)`, equal where captions are (see [`caption_code`]).

    Evaluation samples (with all `captions`) give the same, but the text tensors and `caption_codes` hold all captions
    of the batch one after another, `(texts, tokens)` and `(texts,)`; besides there are `text_ids` `(texts,)`, the id
    of each caption's image, and `num_captions` `(batch,)`.

    Texts are cut to the tokenizer's `model_max_length`, which is saved with it (if it is 10,000 or more, nothing is
    cut), and padded to the longest of the batch. The attributes `seen_captions` and `truncated_captions` count what
    this object tokenized; in a data loader with workers each worker counts in its own copy, so use [`count_truncated`]
    for a report over a data set.

    Args:
        processor (`ProcessorMixin`):
            Has an `image_processor` and a `tokenizer`.
        pad_to_multiple_of (`int`, *optional*):
            Pads texts to a multiple of this number, but never beyond the length at which they are cut.

    Raises:
        ValueError: for a multiple that is not positive, an empty batch, or samples of both kinds in one batch.
    """

    def __init__(self, processor: ProcessorMixin, pad_to_multiple_of: int | None = None) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(
                f"`pad_to_multiple_of` must be a positive number of tokens or None, got {pad_to_multiple_of}."
            )
        self.processor = processor
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seen_captions = 0
        self.truncated_captions = 0

    @property
    def max_length(self) -> int | None:
        """Tokens at which texts are cut, or `None` if they are not."""
        return default_max_length(self.processor.tokenizer)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a batch, on the CPU."""
        if not samples:
            raise ValueError("A batch needs at least one sample, got none.")
        kinds = {"captions" if "captions" in sample else "caption" for sample in samples}
        if len(kinds) > 1:
            raise ValueError("A batch mixes training samples ('caption') with evaluation samples ('captions').")
        image_ids = torch.tensor([sample["image_id"] for sample in samples], dtype=torch.int64)
        batch = {"pixel_values": self._encode_images([sample["image"] for sample in samples])}
        if kinds == {"caption"}:
            batch.update(self._encode_texts([sample["caption"] for sample in samples]), image_ids=image_ids)
            return batch
        num_captions = torch.tensor([len(sample["captions"]) for sample in samples], dtype=torch.int64)
        batch.update(self._encode_texts([text for sample in samples for text in sample["captions"]]))
        batch.update(
            image_ids=image_ids,
            text_ids=torch.repeat_interleave(image_ids, num_captions),
            num_captions=num_captions,
        )
        return batch

    def _encode_images(self, images: list[Any]) -> torch.Tensor:
        arrays = self.processor.image_processor(images=images)["pixel_values"]
        shapes = {tuple(array.shape) for array in arrays}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3:
            raise ValueError(
                "The image processor must give every image one shape (3, height, width), but in this batch it gave "
                f"{sorted(shapes)}. Let it resize all images to one size."
            )
        return torch.stack([torch.as_tensor(array) for array in arrays])

    def _encode_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        options = {"return_attention_mask": True, "return_tensors": "pt", "verbose": False}
        tokenizer = self.processor.tokenizer
        caption_codes = torch.tensor([caption_code(text) for text in texts], dtype=torch.int64)
        encoded = tokenizer(texts, padding="longest", pad_to_multiple_of=self.pad_to_multiple_of, **options)
        self.seen_captions += len(texts)
        if self.max_length is not None and encoded["input_ids"].shape[1] > self.max_length:
            # Texts are measured first and cut only if need be: that counts the cut ones, and cutting is rare. Either
            # a text is too long or rounding up to the multiple went too far; both ways the limit is the right width.
            self.truncated_captions += int((encoded["attention_mask"].sum(dim=1) > self.max_length).sum())
            encoded = tokenizer(texts, truncation=True, max_length=self.max_length, padding="max_length", **options)
        return {**encoded, "caption_codes": caption_codes}


def default_max_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's own limit in tokens, or `None` if it has none (none below 10,000)."""
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < LARGEST_SANE_LENGTH else None


def count_truncated(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[int, int, int]:
    """
    Counts the captions that `max_length` cuts, to be reported once before a training.

    Args:
        dataset (`datasets.Dataset`):
            Data with a column `captions`, as [`load_captioned_images`] gives it.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the model.
        max_length (`int`, *optional*):
            Limit in tokens, special tokens included; `None` cuts nothing.

    Returns:
        `tuple[int, int, int]`: captions that are cut, captions in all, and the longest one's number of tokens.
    """
    cut, total, longest = 0, 0, 0
    for start in tqdm(range(0, len(dataset), 1000), desc="Measuring captions", delay=5):
        texts = [text for captions in dataset[start : start + 1000]["captions"] for text in captions]
        if not texts:
            continue
        encoded = tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        total += len(lengths)
        longest = max(longest, max(lengths))
        if max_length is not None:
            cut += sum(length > max_length for length in lengths)
    return cut, total, longest
