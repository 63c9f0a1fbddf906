"""Retrieval evaluation: encodes every image and every caption once, then scores all pairs in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn

from ..loss_pico import image_text_loss
from ..scoring_pico import pair_scores
from .retrieval_metrics import chance_rsum, folded_retrieval_metrics


@dataclass
class EncodedRetrieval:
    """
    A retrieval set, encoded but not yet weighted, so that it can be scored under other prototypes as well.

    Attributes:
        image_tokens (`torch.Tensor` of shape `(own images, patches, dim)`): This process's images.
        image_mask (`torch.Tensor` of shape `(own images, patches)`): True at tokens that take part.
        text_tokens (`torch.Tensor` of shape `(texts, words, dim)`): All texts.
        text_mask (`torch.Tensor` of shape `(texts, words)`): True at tokens that take part.
        image_ids (`torch.Tensor` of shape `(images,)`): Identity of each image of all processes, in order.
        text_ids (`torch.Tensor` of shape `(texts,)`): Identity of each text.
    """

    image_tokens: torch.Tensor
    image_mask: torch.Tensor
    text_tokens: torch.Tensor
    text_mask: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor


class RetrievalEvaluator:
    r"""
    Evaluates image-text retrieval.

    Knows nothing of the alignment head: it keeps token embeddings before weighting and asks the head for score-ready
    ones when it scores.

    Args:
        num_folds (`int`, *optional*, defaults to 1):
            Consecutive blocks of images over which metrics are averaged; 5 for MS-COCO 1K.
        loss_batch_size (`int`, *optional*, defaults to 64):
            Pairs per batch of the reported loss; in-batch losses depend on it.
        image_chunk (`int`, *optional*, defaults to 256): Images weighted and scored at a time.
        text_chunk (`int`, *optional*, defaults to 2048): Texts weighted and scored at a time.

    Example:

    ```python
    >>> dataset = CaptionedImageDataset(load_captioned_images("styled_shapes", split="test"))
    >>> loader = DataLoader(dataset, batch_size=64, collate_fn=PicoDataCollator(processor))
    >>> RetrievalEvaluator()(model, loader)["rsum"]
    ```
    """

    def __init__(self, num_folds: int = 1, loss_batch_size: int = 64, image_chunk: int = 256, text_chunk: int = 2048):
        self.num_folds = num_folds
        self.loss_batch_size = loss_batch_size
        self.image_chunk = image_chunk
        self.text_chunk = text_chunk

    def __call__(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """
        Encodes, scores and measures. See [`encode`] for `batches`; returns [`metrics`].
        """
        encoded = self.encode(model, batches)
        return self.metrics(model, encoded, self.score(model, encoded))

    @torch.no_grad()
    def encode(
        self,
        model: nn.Module,
        batches: Iterable[dict[str, Any]],
        num_batches: int | None = None,
        on_batch: Callable[[], None] | None = None,
    ) -> EncodedRetrieval:
        r"""
        Encodes a retrieval set.

        With several processes each one gives the batches of its own contiguous block of images. Texts are gathered.

        Args:
            model (`nn.Module`): A [`PicoModel`], or one wrapped for distributed use.
            batches (iterable of `dict`): As [`PicoDataCollator`] makes them of samples with all captions.
            num_batches (`int`, *optional*):
                Batches of the longest block. A process with fewer repeats its last one without effect, since sharded
                models must run equally often everywhere.
            on_batch (`Callable`, *optional*): Called after each batch, for a progress bar.

        Returns:
            [`EncodedRetrieval`]
        """
        model.eval()
        unwrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        device = next(unwrapped.parameters()).device
        encoded: list[tuple[torch.Tensor, ...]] = []
        inputs: dict[str, Any] = {}
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            image_ids, text_ids = inputs.pop("image_ids"), inputs.pop("text_ids")
            inputs.pop("num_captions", None)
            outputs = model(**inputs, return_logits=False)
            encoded.append(
                (outputs.image_tokens, outputs.image_mask, outputs.text_tokens, outputs.text_mask, image_ids, text_ids)
            )
            if on_batch is not None:
                on_batch()
        if not encoded:
            raise ValueError("The evaluation set is empty (or has fewer images than there are processes).")
        for _ in range(len(encoded), num_batches or 0):
            model(**inputs, return_logits=False)
        image_tokens, image_mask, text_tokens, text_mask, image_ids, text_ids = (
            concatenate_padded(tensors) for tensors in zip(*encoded, strict=True)
        )
        return EncodedRetrieval(
            image_tokens=image_tokens,
            image_mask=image_mask,
            text_tokens=gather_rows(text_tokens),
            text_mask=gather_rows(text_mask),
            image_ids=gather_rows(image_ids),
            text_ids=gather_rows(text_ids),
        )

    @torch.no_grad()
    def score(self, model: nn.Module, encoded: EncodedRetrieval) -> torch.Tensor:
        """
        Scores every image of all processes against every text, under the prototypes the model holds now.

        Args:
            model (`nn.Module`): The [`PicoModel`], unwrapped.
            encoded ([`EncodedRetrieval`]): The retrieval set.

        Returns:
            `torch.Tensor` of shape `(images, texts)` in float32, the same on every process.
        """
        head, slope = model.alignment_head, model.config.negative_slope
        rows = []
        for image_start in range(0, len(encoded.image_tokens), self.image_chunk):
            image_rows = slice(image_start, image_start + self.image_chunk)
            image_mask = encoded.image_mask[image_rows]
            images, _ = head.weight(encoded.image_tokens[image_rows], image_mask, "image")
            tiles = []
            # Texts are weighted tile by tile as well: a weighted copy of a large gallery would double its memory.
            for text_start in range(0, len(encoded.text_tokens), self.text_chunk):
                text_rows = slice(text_start, text_start + self.text_chunk)
                text_mask = encoded.text_mask[text_rows]
                texts, _ = head.weight(encoded.text_tokens[text_rows], text_mask, "text")
                tiles.append(pair_scores(images, texts, image_mask, text_mask, negative_slope=slope))
            rows.append(torch.cat(tiles, dim=1))
        return gather_rows(torch.cat(rows))

    @torch.no_grad()
    def metrics(self, model: nn.Module, encoded: EncodedRetrieval, scores: torch.Tensor) -> dict[str, float]:
        """
        Recalls at 1, 5 and 10 in both directions in percent, median ranks, rSum, the rSum of a random ranking
        (`chance_rsum`), and the in-batch loss over consecutive images with their first caption (`loss`).
        """
        metrics = self.retrieval_metrics(encoded, scores)
        metrics["chance_rsum"] = chance_rsum(encoded.image_ids, encoded.text_ids, self.num_folds)
        metrics["loss"] = self._loss(model, encoded, scores)
        return metrics

    def retrieval_metrics(self, encoded: EncodedRetrieval, scores: torch.Tensor) -> dict[str, float]:
        """Recalls, median ranks and rSum of a score matrix."""
        return folded_retrieval_metrics(scores, encoded.image_ids, encoded.text_ids, num_folds=self.num_folds)

    def _loss(self, model: nn.Module, encoded: EncodedRetrieval, scores: torch.Tensor) -> float:
        config = model.config
        total = 0.0
        for start in range(0, len(scores), self.loss_batch_size):
            rows = torch.arange(start, min(start + self.loss_batch_size, len(scores)), device=scores.device)
            matches = encoded.image_ids[rows, None] == encoded.text_ids[None, :]
            block = scores[rows][:, matches.float().argmax(dim=1)]
            loss = image_text_loss(
                block,
                block.T,
                image_ids=encoded.image_ids[rows],
                loss_type=config.loss_type,
                logit_scale=model.logit_scale.float().exp(),
                margin=config.margin,
            )
            total += float(loss) * len(rows)
        return total / len(scores)


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """
    Concatenates a tensor of all processes along its first dimension; the first two dimensions may differ between
    processes, the second is padded with zeros.
    """
    if PartialState().num_processes == 1:
        return tensor
    sizes = gather(torch.tensor([tensor.shape[:2]], device=tensor.device))
    counts = sizes[:, 0].tolist()
    # Not `pad_across_processes`, which makes integers of the booleans that it pads, on that process alone.
    padded = tensor.new_zeros((*sizes.amax(dim=0).tolist(), *tensor.shape[2:]))
    padded[tuple(slice(size) for size in tensor.shape[:2])] = tensor
    blocks = gather(padded).split(max(counts))
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def concatenate_padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates along the first dimension; the second may differ and is padded with zeros."""
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    size = (sum(len(tensor) for tensor in tensors), width, *tensors[0].shape[2:])
    result = tensors[0].new_zeros(size)
    start = 0
    for tensor in tensors:
        result[start : start + len(tensor), : tensor.shape[1]] = tensor
        start += len(tensor)
    return result


__all__ = ["EncodedRetrieval", "RetrievalEvaluator", "concatenate_padded", "gather_rows"]
