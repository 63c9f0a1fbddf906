"""From a model and data to the plain numbers that the pictures show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import CaptionedImageDataset, PicoDataCollator
from ..evaluation.evaluator import concatenate_padded
from ..evaluation.retrieval_metrics import retrieval_ranks
from ..evaluation.uncertainty_reranking import RiskCoverage, risk_coverage
from ..model.backbones_pico import num_prefix_tokens
from ..model.modeling_pico import PicoModel
from ..model.prototypes_pico import squared_distances
from ..model.scoring_pico import pair_scores
from .canvas import NothingToDrawError
from .features import PairScores, PrototypeSet, SemanticProbability
from .matches import PatchWordMatch


_BATCH = 32
# Rows of a heat map that stay readable.
_MAX_GROUPS = 20
_NO_PROTOTYPES = "the model has no style prototypes, or none has been built yet"


@dataclass
class EncodedPairs:
    """
    Images with one caption each, encoded but not weighted.

    Attributes:
        image_tokens, image_mask: `(pairs, patches, dim)` and `(pairs, patches)`.
        text_tokens, text_mask: `(pairs, words, dim)` and `(pairs, words)`.
        ids (`torch.Tensor` of shape `(pairs,)`): Identity of the meaning of each pair.
    """

    image_tokens: torch.Tensor
    image_mask: torch.Tensor
    text_tokens: torch.Tensor
    text_mask: torch.Tensor
    ids: torch.Tensor


def spread_rows(length: int, count: int) -> list[int]:
    """At most `count` rows, evenly spaced from the first on."""
    count = min(length, count)
    return [index * length // count for index in range(count)]


@torch.no_grad()
def encode_pairs(
    model: PicoModel, collator: PicoDataCollator, dataset: CaptionedImageDataset, rows: Iterable[int]
) -> EncodedPairs:
    r"""
    Encodes rows of a data set, each image with its first caption.

    Args:
        model ([`PicoModel`]): The model, unwrapped; it is left in evaluation mode.
        collator ([`PicoDataCollator`]): Makes batches.
        dataset ([`CaptionedImageDataset`]): The data.
        rows (iterable of `int`): Which rows.

    Returns:
        [`EncodedPairs`]
    """
    rows = list(rows)
    if not rows:
        raise NothingToDrawError("the data set is empty")
    model.eval()
    parts = []
    for start in range(0, len(rows), _BATCH):
        batch = _batch(model, collator, dataset, rows[start : start + _BATCH])
        ids = batch.pop("image_ids")
        outputs = model(**batch, return_logits=False)
        parts.append((outputs.image_tokens, outputs.image_mask, outputs.text_tokens, outputs.text_mask, ids))
    return EncodedPairs(*(concatenate_padded(tensors) for tensors in zip(*parts, strict=True)))


def _batch(
    model: PicoModel, collator: PicoDataCollator, dataset: CaptionedImageDataset, rows: Sequence[int]
) -> dict[str, torch.Tensor]:
    samples = [dataset[row] for row in rows]
    pairs = [
        {"image": item["image"], "caption": item["captions"][0], "image_id": item["image_id"]} for item in samples
    ]
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in collator(pairs).items()}


@torch.no_grad()
def gather_pair_scores(model: PicoModel, pairs: EncodedPairs) -> PairScores:
    """Scores every image of `pairs` with every text; with weights too where the model uses them."""
    head, masks = model.alignment_head, (pairs.image_mask, pairs.text_mask)
    unweighted = pair_scores(pairs.image_tokens, pairs.text_tokens, *masks)
    weighted = None
    if _built_prototypes(model) is not None:
        images, _ = head.weight(pairs.image_tokens, pairs.image_mask, "image")
        texts, _ = head.weight(pairs.text_tokens, pairs.text_mask, "text")
        weighted = _array(pair_scores(images, texts, *masks))
    return PairScores(_array(unweighted), _array(pairs.ids[:, None] == pairs.ids[None, :]), weighted)


@torch.no_grad()
def gather_risk_coverage(model: PicoModel, pairs: EncodedPairs) -> dict[str, RiskCoverage]:
    """
    Retrieval among `pairs` in both directions, and how well the uncertainty of the queries foretells failures.

    Raises:
        NothingToDrawError: if the model has no uncertainty.
    """
    if model.uncertainty_prototypes is None:
        raise NothingToDrawError("the model has no uncertainty")
    images, _ = model.alignment_head.weight(pairs.image_tokens, pairs.image_mask, "image")
    texts, _ = model.alignment_head.weight(pairs.text_tokens, pairs.text_mask, "text")
    scores = pair_scores(images, texts, pairs.image_mask, pairs.text_mask)
    to_text, to_image = retrieval_ranks(scores, pairs.ids, pairs.ids)
    of_images = model.uncertainty(pairs.image_tokens, pairs.image_mask, "image")
    of_texts = model.uncertainty(pairs.text_tokens, pairs.text_mask, "text")
    assert of_images is not None and of_texts is not None
    return {"Image to text": risk_coverage(to_text, of_images), "Text to image": risk_coverage(to_image, of_texts)}


def _built_prototypes(model: PicoModel) -> Any:
    """The prototypes by side, if the model has some and they are in use."""
    prototypes: Any = model.style_prototypes
    return prototypes if prototypes is not None and prototypes["image"].stage > 0 else None


@torch.no_grad()
def gather_match(
    model: PicoModel, collator: PicoDataCollator, dataset: CaptionedImageDataset, row: int
) -> PatchWordMatch:
    """
    Similarities of the patches of image `row` with the words of its first caption, weighted as in the score.

    Raises:
        NothingToDrawError: if the model scores one vector per sample, or its tokens are not a grid of patches.
    """
    if model.config.alignment_head == "clip_style":
        raise NothingToDrawError("the model scores pooled vectors and matches no patches with words")
    model.eval()
    batch = _batch(model, collator, dataset, [row])
    batch.pop("image_ids")
    outputs = model(**batch)
    words = outputs.text_mask[0]
    similarity = outputs.image_embeds[0].float() @ outputs.text_embeds[0, words].float().T
    special = _special_image_tokens(model)
    grid = _grid(len(similarity) - len(special), batch["pixel_values"].shape[-2:])
    tokenizer = collator.processor.tokenizer
    ids = batch["input_ids"][0, words].tolist()
    return PatchWordMatch(
        image=_shown_image(batch["pixel_values"][0], collator.processor.image_processor),
        caption=dataset[row]["captions"][0],
        words=[word_of(tokenizer, token) for token in ids],
        similarity=_array(similarity),
        grid=grid,
        score=float(outputs.logits_per_image / outputs.logit_scale),
        special_tokens=special,
        special_words=[token in tokenizer.all_special_ids for token in ids],
        weighted=_built_prototypes(model) is not None,
    )


def _special_image_tokens(model: PicoModel) -> list[str]:
    config = model.config.vision_config
    try:
        count = num_prefix_tokens(config) if model.config.vision_special_tokens else 0
    except ValueError:
        # A family that nobody described: if its tokens fill a grid, there are no others.
        count = 0
    names = ["CLS", "distillation"] if config.model_type == "deit" else ["CLS"]
    return (names + [f"register {index + 1}" for index in range(count)])[:count]


def _grid(patches: int, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of `patches` equal patches of an image of `size` `(height, width)`."""
    height, width = size
    rows = max(1, round((patches * height / width) ** 0.5))
    if patches < 1 or patches % rows:
        raise NothingToDrawError(f"{patches} image tokens are no grid of an image of {height} x {width} pixels")
    return rows, patches // rows


def _shown_image(pixels: torch.Tensor, image_processor: Any) -> np.ndarray:
    """The model's own input `(3, height, width)` as an image `(height, width, 3)` with values in [0, 1]."""
    pixels = pixels.float().cpu()
    if getattr(image_processor, "do_normalize", False):
        mean, spread = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
        pixels = pixels * spread.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)
    if not getattr(image_processor, "do_rescale", True):
        pixels = pixels / 255
    return pixels.clamp(0, 1).permute(1, 2, 0).numpy()


def word_of(tokenizer: Any, token: int) -> str:
    """What a token is called in a picture: special tokens by their role, the others as written."""
    # Later roles win where tokens have several: CLIP's end of text also stands for unknown words.
    roles = {"unk": "[unknown]", "mask": "[mask]", "sep": "[end]", "eos": "[end]", "cls": "[start]", "bos": "[start]"}
    named = {getattr(tokenizer, f"{role}_token_id", None): name for role, name in roles.items()}
    return named.get(token) or tokenizer.decode([token]).strip() or str(tokenizer.convert_ids_to_tokens(token))


@torch.no_grad()
def gather_semantic_probability(
    model: PicoModel,
    collator: PicoDataCollator,
    splits: Mapping[str, CaptionedImageDataset],
    num_samples: int = 200,
) -> SemanticProbability:
    r"""
    Semantic probability of samples of every style of every split, at most of the first 20.

    Args:
        model ([`PicoModel`]): The model, unwrapped.
        collator ([`PicoDataCollator`]): Makes batches.
        splits (`dict[str, CaptionedImageDataset]`): The data, by name; without styles only the first is used.
        num_samples (`int`, *optional*, defaults to 200): About so many samples in all, at least 4 of a style.

    Returns:
        [`SemanticProbability`]

    Raises:
        NothingToDrawError: if the model has no semantic probability yet.
    """
    prototypes = _built_prototypes(model)
    if prototypes is None:
        raise NothingToDrawError(_NO_PROTOTYPES)
    groups = list(style_rows(splits).items())[:_MAX_GROUPS]
    per_group = max(4, num_samples // max(1, len(groups)))
    names: list[str] = []
    encoded = []
    for (split, style), rows in groups:
        chosen = [rows[index] for index in spread_rows(len(rows), per_group)]
        encoded.append(encode_pairs(model, collator, splits[split], chosen))
        names += [style if len(splits) == 1 else f"{style} ({split})"] * len(chosen)
    if not encoded:
        dataset = next(iter(splits.values()))
        encoded = [encode_pairs(model, collator, dataset, spread_rows(len(dataset), num_samples))]
    probability = {}
    for side in ("image", "text"):
        parts = [prototypes[side].semantic_probability(*_tokens(pairs, side)) for pairs in encoded]
        probability[side] = _array(torch.cat(parts))
    return SemanticProbability(probability, names or None)


def _tokens(pairs: EncodedPairs, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(pairs, f"{side}_tokens"), getattr(pairs, f"{side}_mask")


def style_rows(splits: Mapping[str, CaptionedImageDataset]) -> dict[tuple[str, str], list[int]]:
    """Rows of each style of each split, by `(split, style)`; rows without a style are left out."""
    rows: dict[tuple[str, str], list[int]] = {}
    for split, dataset in splits.items():
        for row, style in enumerate(getattr(dataset, "styles", None) or []):
            if style is not None:
                rows.setdefault((split, str(style)), []).append(row)
    return rows


@torch.no_grad()
def gather_prototypes(model: PicoModel, pairs: EncodedPairs | None = None) -> dict[str, PrototypeSet]:
    r"""
    The prototypes of both sides.

    Args:
        model ([`PicoModel`]): The model, unwrapped.
        pairs ([`EncodedPairs`], *optional*): Samples whose columns are counted by their nearest prototype.

    Returns:
        `dict[str, PrototypeSet]`: by side, `"image"` and `"text"`.

    Raises:
        NothingToDrawError: if the model has no prototypes yet.
    """
    built, sides = _built_prototypes(model), {}
    if built is None:
        raise NothingToDrawError(_NO_PROTOTYPES)
    for side, held in built.items():
        centroids = held.prototypes.float()
        assigned = None
        if pairs is not None:
            columns = held.columns(*_tokens(pairs, side))
            nearest = squared_distances(columns, centroids, held.column_scale.float()).argmin(dim=-1)
            assigned = _array(torch.bincount(nearest.flatten(), minlength=len(centroids)))
        rate = _array(held.style_rate.float())
        sides[side] = PrototypeSet(_array(centroids), rate, model.config.column_mode, assigned)
    return sides


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


__all__ = [
    "EncodedPairs",
    "encode_pairs",
    "gather_match",
    "gather_pair_scores",
    "gather_prototypes",
    "gather_risk_coverage",
    "gather_semantic_probability",
    "spread_rows",
    "style_rows",
    "word_of",
]
