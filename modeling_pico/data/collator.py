"""From samples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
    cut), and padded to the longest of the batch.

    Args:
        processor (`ProcessorMixin`): Has an `image_processor` and a `tokenizer`.

    Raises:
        ValueError: for an empty batch, samples of both kinds in one batch, or images of different sizes.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

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
            batch.update(self.encode_texts([sample["caption"] for sample in samples]), image_ids=image_ids)
            return batch
        num_captions = torch.tensor([len(sample["captions"]) for sample in samples], dtype=torch.int64)
        batch.update(self.encode_texts([text for sample in samples for text in sample["captions"]]))
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

    def encode_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """The text tensors of a batch."""
        encoded = self.processor.tokenizer(
            texts,
            padding="longest",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
            verbose=False,
        )
        caption_codes = torch.tensor([caption_code(text) for text in texts], dtype=torch.int64)
        return {**encoded, "caption_codes": caption_codes}


def default_max_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's own limit in tokens, or `None` if it has none (none below 10,000)."""
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < LARGEST_SANE_LENGTH else None
