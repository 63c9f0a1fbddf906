"""Retrieval evaluation: encodes every image and every caption once, then scores all pairs in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers.utils import logging

from ..data.dataset import count_shared_captions
from ..distributed import gather, gather_rows
from ..model.modeling_pico import PicoModel
from .retrieval_metrics import (
    TIE_TOLERANCE,
    RetrievalRanks,
    chance_rsum,
    fold_members,
    mean_metrics,
    retrieval_metrics,
)
from .uncertainty_reranking import RetrievalUncertainty, TileView


logger = logging.get_logger(__name__)

# Ranks of images among texts and of texts among images.
_Ranks = tuple[torch.Tensor, torch.Tensor]


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
        caption_codes (`torch.Tensor` of shape `(texts,)`, *optional*): Equal where the wording of texts is.
    """

    image_tokens: torch.Tensor
    image_mask: torch.Tensor
    text_tokens: torch.Tensor
    text_mask: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor
    caption_codes: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether this process holds all images, so that it can evaluate without the others."""
        return len(self.image_tokens) == len(self.image_ids)

    def first_image(self) -> int:
        """Index of this process's first image among those of all processes."""
        if self.is_whole:
            return 0
        counts = gather(torch.tensor([len(self.image_tokens)], device=self.image_tokens.device))
        return int(counts[: PartialState().process_index].sum())

    def gather_images(self) -> EncodedRetrieval:
        """The same set with the images of all processes."""
        return replace(self, image_tokens=gather_rows(self.image_tokens), image_mask=gather_rows(self.image_mask))

    def subset(self, images: torch.Tensor, texts: torch.Tensor | None = None) -> EncodedRetrieval:
        """
        Some of the images and texts, as a retrieval set of its own.

        Args:
            images (`torch.Tensor` of shape `(chosen,)`):
                Rows of `image_ids`, ascending, the same on every process; unless the set is whole, each process needs
                one of its own.
            texts (`torch.Tensor` of shape `(chosen,)`, *optional*):
                Rows of `text_ids`; all texts of the images' identities by default.
        """
        images = images.to(self.image_ids.device)
        start = self.first_image()
        own = images[(images >= start) & (images < start + len(self.image_tokens))] - start
        if texts is None:
            texts = torch.isin(self.text_ids, self.image_ids[images]).nonzero().squeeze(1)
        return EncodedRetrieval(
            image_tokens=self.image_tokens[own],
            image_mask=self.image_mask[own],
            text_tokens=self.text_tokens[texts],
            text_mask=self.text_mask[texts],
            image_ids=self.image_ids[images],
            text_ids=self.text_ids[texts],
            caption_codes=None if self.caption_codes is None else self.caption_codes[texts],
        )


@dataclass
class _Block:
    """Images or texts that are scored together."""

    # Where their tokens are, where their scores belong, and their lowest and highest identity.
    tokens: slice | torch.Tensor
    positions: torch.Tensor
    ids: tuple[int, int]

    def may_match(self, other: _Block) -> bool:
        """Whether an identity may be in both."""
        return self.ids[0] <= other.ids[1] and other.ids[0] <= self.ids[1]


class RetrievalEvaluator:
    r"""
    Evaluates image-text retrieval.

    It keeps token embeddings before weighting and asks the alignment head for score-ready ones when it scores. Scores
    that differ by no more than `TIE_TOLERANCE` tie, and a tie never counts in favour of the right answer.

    Metrics need ranks alone, so no score matrix is held. Images and texts are scored in tiles, in the order of their
    identities, where only the tiles along the diagonal hold right pairs. These come first and are kept until all
    processes know what each query's best right answer scores; every other tile is counted and dropped. So every pair
    is scored once (a second time, in another tile, it might be rounded differently), and memory grows with the number
    of images and texts, not with their product.

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

    def __call__(self, model: PicoModel, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """
        Encodes, scores and measures. See [`encode`] for `batches`; returns [`metrics`].
        """
        return self.metrics(model, self.encode(model, batches))

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
        own = encode_batches(model, batches, num_batches, on_batch)
        of_all = ("text_tokens", "text_mask", "image_ids", "text_ids", "caption_codes")
        gathered = {name: gather_rows(tensor) for name in of_all if (tensor := getattr(own, name)) is not None}
        return replace(own, **gathered)

    @torch.no_grad()
    def score(self, model: PicoModel, encoded: EncodedRetrieval) -> torch.Tensor:
        """
        Scores every image of all processes against every text, under the prototypes the model holds now. No metric
        needs this matrix, which is 0.5 GB for 5,000 images with five captions each.

        Args:
            model ([`PicoModel`]): The model, unwrapped.
            encoded ([`EncodedRetrieval`]): The retrieval set.

        Returns:
            `torch.Tensor` of shape `(images, texts)` in float32, the same on every process.
        """
        first, own = encoded.first_image(), len(encoded.image_tokens)
        image_rows = torch.arange(own)
        image_blocks = _blocks(encoded.image_ids[first : first + own], image_rows, image_rows, self.image_chunk)
        text_rows = torch.arange(len(encoded.text_tokens))
        text_blocks = _blocks(encoded.text_ids, text_rows, text_rows, self.text_chunk)
        scores = encoded.image_tokens.new_empty(own, len(encoded.text_tokens), dtype=torch.float32)
        for block in image_blocks:
            for rows, columns, tile in self._tiles(model, encoded, block, text_blocks):
                scores[rows[:, None], columns] = tile
        return scores if encoded.is_whole else gather_rows(scores)

    @torch.no_grad()
    def metrics(self, model: PicoModel, encoded: EncodedRetrieval) -> dict[str, float]:
        """
        Recalls at 1, 5 and 10 in both directions in percent, median ranks, rSum, the rSum of a random ranking
        (`chance_rsum`), and the in-batch loss over consecutive images with their first caption (`loss`: that of the
        pairs alone, without auxiliary losses and the weights beside them). For a model with uncertainty also
        [`RetrievalUncertainty.metrics`].
        """
        _warn_of_shared_captions(encoded)
        metrics = self._measure(model, encoded, RetrievalUncertainty.measure(model, encoded))
        metrics["chance_rsum"] = chance_rsum(encoded.image_ids, encoded.text_ids, self.num_folds)
        metrics["loss"] = self._loss(model, encoded)
        return metrics

    @torch.no_grad()
    def retrieval_metrics(self, model: PicoModel, encoded: EncodedRetrieval) -> dict[str, float]:
        """Recalls, median ranks and rSum under the prototypes the model holds now; see [`metrics`]."""
        return self._measure(model, encoded, None)

    @torch.no_grad()
    def ranks(self, model: PicoModel, encoded: EncodedRetrieval) -> tuple[torch.Tensor, torch.Tensor]:
        """0-based ranks of the best right answers, image to text and text to image, in the whole gallery."""
        texts = torch.arange(len(encoded.text_ids), device=encoded.text_ids.device)
        (ranks,) = self._ranks(model, encoded, slice(0, len(encoded.image_ids)), texts, [_as_it_is])
        return ranks

    def _measure(
        self, model: PicoModel, encoded: EncodedRetrieval, uncertainty: RetrievalUncertainty | None
    ) -> dict[str, float]:
        """Metrics of the ranks, averaged over folds; with `uncertainty`, those that need it as well."""
        folds = []
        for images, texts in fold_members(encoded.image_ids, encoded.text_ids, self.num_folds):
            of_fold = None if uncertainty is None else uncertainty.subset(images, texts)
            views = [_as_it_is, *([] if of_fold is None else of_fold.views())]
            plain, *others = self._ranks(model, encoded, images, texts, views)
            metrics = retrieval_metrics(*plain)
            if of_fold is not None:
                metrics.update(of_fold.metrics(plain, others))
            folds.append(metrics)
        return mean_metrics(folds)

    def _ranks(
        self,
        model: PicoModel,
        encoded: EncodedRetrieval,
        images: slice,
        texts: torch.Tensor,
        views: Sequence[TileView],
    ) -> list[_Ranks]:
        """Ranks of both directions among these images and texts, as each view sees the scores."""
        image_ids, text_ids, first = encoded.image_ids[images], encoded.text_ids[texts], encoded.first_image()
        start, stop = max(images.start, first), min(images.stop, first + len(encoded.image_tokens))
        own = torch.arange(start, max(start, stop))
        image_blocks = _blocks(encoded.image_ids[own], own - first, own - images.start, self.image_chunk)
        text_blocks = _blocks(text_ids, texts, torch.arange(len(texts)), self.text_chunk)
        ranks = [RetrievalRanks(image_ids, text_ids, tie_tolerance=TIE_TOLERANCE) for _ in views]

        def tiles(right: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
            """Those that may hold right pairs, or the others."""
            for block in image_blocks:
                chosen = [other for other in text_blocks if block.may_match(other) == right]
                yield from self._tiles(model, encoded, block, chosen)

        def count(rows: torch.Tensor, columns: torch.Tensor, tile: torch.Tensor) -> None:
            for of_view, see in zip(ranks, views, strict=True):
                of_view.count(rows, columns, see(rows, columns, tile))

        kept = []
        for rows, columns, tile in tiles(right=True):
            for of_view, see in zip(ranks, views, strict=True):
                of_view.observe(rows, columns, see(rows, columns, tile))
            kept.append((rows, columns, tile))
        if not encoded.is_whole:
            for of_view in ranks:
                of_view.best.copy_(gather(of_view.best[None]).amax(dim=0))
        while kept:
            count(*kept.pop())
        for scored in tiles(right=False):
            count(*scored)
        if not encoded.is_whole:
            for of_view in ranks:
                of_view.counts.copy_(gather(of_view.counts[None]).sum(dim=0))
        return [of_view.compute() for of_view in ranks]

    def _tiles(
        self, model: PicoModel, encoded: EncodedRetrieval, image_block: _Block, text_blocks: list[_Block]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Scores a block of images with blocks of texts; gives positions of both and scores in float32."""
        if not text_blocks:
            return
        images, image_mask = score_ready(model, encoded, "image", image_block.tokens)
        # Texts are weighted tile by tile as well: a weighted copy of a large gallery would double its memory.
        for text_block in text_blocks:
            texts, text_mask = score_ready(model, encoded, "text", text_block.tokens)
            tile = model.score(images, texts, image_mask, text_mask)
            yield image_block.positions, text_block.positions, tile.float()

    def _loss(self, model: PicoModel, encoded: EncodedRetrieval) -> float:
        size, first = self.loss_batch_size, encoded.first_image()
        sorted_ids, order = encoded.text_ids.sort(stable=True)
        captions = order[torch.searchsorted(sorted_ids, encoded.image_ids)]
        end = first + len(encoded.image_tokens)
        rows = []
        # Batches of the images of all processes; of the first and the last, other processes may have a part.
        for start in range(first // size * size, end, size):
            own = slice(max(start, first) - first, min(start + size, end) - first)
            images, image_mask = score_ready(model, encoded, "image", own)
            texts, text_mask = score_ready(model, encoded, "text", captions[start : start + size])
            rows.append(model.score(images, texts, image_mask, text_mask).float())
        scores = gather_rows(concatenate_padded(rows))
        total = 0.0
        for start in range(0, len(scores), size):
            ids = encoded.image_ids[start : start + size]
            codes = None if encoded.caption_codes is None else encoded.caption_codes[captions[start : start + size]]
            block = scores[start : start + size, : len(ids)]
            loss = model.loss_of_scores(block, block.T, image_ids=ids, caption_codes=codes)
            total += float(loss) * len(ids)
        return total / len(scores)


@torch.no_grad()
def encode_batches(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    num_batches: int | None = None,
    on_batch: Callable[[], None] | None = None,
) -> EncodedRetrieval:
    """
    Encodes the batches of this process as a set of its own, without the other processes; arguments as in
    [`RetrievalEvaluator.encode`].
    """
    model.eval()
    device = next(model.parameters()).device
    encoded: list[tuple[torch.Tensor, ...]] = []
    caption_codes: list[torch.Tensor] = []
    inputs: dict[str, Any] = {}
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items()}
        image_ids, text_ids = inputs.pop("image_ids"), inputs.pop("text_ids")
        inputs.pop("num_captions", None)
        if "caption_codes" in inputs:
            caption_codes.append(inputs.pop("caption_codes"))
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
    tensors = [concatenate_padded(parts) for parts in zip(*encoded, strict=True)]
    return EncodedRetrieval(*tensors, torch.cat(caption_codes) if caption_codes else None)  # type: ignore[call-arg]


def _as_it_is(rows: Any, columns: Any, tile: torch.Tensor) -> torch.Tensor:
    return tile


def score_ready(
    model: PicoModel, encoded: EncodedRetrieval, modality: str, rows: slice | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted tokens and mask of some images (`modality="image"`) or texts (`"text"`)."""
    tokens, mask = getattr(encoded, f"{modality}_tokens")[rows], getattr(encoded, f"{modality}_mask")[rows]
    return model.alignment_head.weight(tokens, mask, modality)[0], mask


def _warn_of_shared_captions(encoded: EncodedRetrieval) -> None:
    if encoded.caption_codes is None or not PartialState().is_main_process:
        return
    shared = count_shared_captions(encoded.caption_codes, encoded.text_ids)
    if shared:
        logger.warning_once(
            f"{shared} of {len(encoded.text_ids)} texts are also the texts of other images, of other ids. Nothing can "
            "tell them apart, so that no model ranks all of them right: recalls have a ceiling below 100."
        )


def _blocks(ids: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, size: int) -> list[_Block]:
    """Cuts images or texts into blocks of `size` in the order of their identities; see [`_Block`]."""
    sorted_ids, order = ids.cpu().sort(stable=True)
    tokens, blocks = tokens.cpu(), []
    for part, part_ids in zip(order.split(size), sorted_ids.split(size), strict=True):
        if len(part):  # an empty tensor is split into one empty part
            rows = tokens[part]
            # A slice gives a view of the tokens, indices give a copy.
            is_run = bool((rows.diff() == 1).all())
            where = slice(int(rows[0]), int(rows[-1]) + 1) if is_run else rows.to(ids.device)
            lowest_and_highest = int(part_ids[0]), int(part_ids[-1])
            blocks.append(_Block(where, positions[part].to(ids.device), lowest_and_highest))
    return blocks


def concatenate_padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates along the first dimension; the second may differ and is padded with zeros."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    size = (sum(len(tensor) for tensor in tensors), width, *tensors[0].shape[2:])
    result = tensors[0].new_zeros(size)
    start = 0
    for tensor in tensors:
        result[start : start + len(tensor), : tensor.shape[1]] = tensor
        start += len(tensor)
    return result


__all__ = [
    "EncodedRetrieval",
    "RetrievalEvaluator",
    "concatenate_padded",
    "encode_batches",
    "score_ready",
]
