"""How retrieval holds when the style of the images changes: a report over a set that shows several styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..data import PicoDataCollator, as_captioned
from ..distributed import own_rows
from ..markdown import markdown_table, number_cell, signed_number
from ..model.gallery_alignment_pico import MIN_IMAGES
from ..model.modeling_pico import PicoModel
from ..model.processing_pico import PicoProcessor
from .evaluator import EncodedRetrieval, RetrievalEvaluator
from .retrieval_metrics import RECALL_LEVELS, TIE_TOLERANCE, chance_rsum, num_right_answers, retrieval_metrics
from .style_alignment import align_encoded
from .style_probe import StyleProbe, probe_styles


logger = logging.get_logger(__name__)

_TEXT_CHUNK = 1024


@dataclass
class StyleRetrieval:
    """
    Retrieval of one style's images. Recalls, sums of recalls and shares are in percent.

    Attributes:
        images (`int`): Images of the style.
        texts (`int`): Captions of these images.
        seen (`bool`, *optional*): Whether training has shown the style; None if that is not known.
        retrieval (`dict[str, float]`): [`retrieval_metrics`] of these images and these captions alone.
        chance_rsum (`float`): rSum of a random ranking of them.
        equal_rsum (`float`): Expected rSum with as few wrong answers as the smallest gallery has, see [`StyleReport`].
        gap (`float`, *optional*): Mean `equal_rsum` of the seen styles minus this one's, for a style not seen.
        aligned_rsum (`float`, *optional*):
            rSum after [`align_encoded`] has moved the images, those of the style by themselves, to where images of
            training lie: what that gains in a style not seen, and costs in a seen one. None for a model without such
            moments and a style with too few images.
        gallery_share (`float`): Share of the style in the gallery that mixes all styles.
        top_shares (`dict[str, float]`): Its share of the first place (`"1"`) and of the first ten (`"10"`) there.
    """

    images: int
    texts: int
    seen: bool | None
    retrieval: dict[str, float]
    chance_rsum: float
    equal_rsum: float
    gap: float | None
    aligned_rsum: float | None
    gallery_share: float
    top_shares: dict[str, float]

    def table_row(self) -> dict[str, float]:
        """What a model card shows: recalls, the size of the gallery, and what they are to be judged by."""
        compared = {name: getattr(self, name) for name in ("images", "texts", "chance_rsum", "equal_rsum")}
        return {**self.retrieval, **compared}


@dataclass
class StyleReport:
    """
    What the style of images does to retrieval.

    Recall depends on the number of wrong answers, so styles of different size cannot be compared as they are. Gaps
    therefore compare the recall that is expected after wrong answers of every query have been removed at random until
    as many are left as the smallest gallery has, which the rank gives exactly (hypergeometric distribution). Where all
    galleries are of one size this is the plain recall.

    In the mixed gallery every caption of the set asks for images of all styles; the captions of an image together
    count as one query, so that a model that finds the right images and has no preference for a style gives each style
    its share of the gallery at the first place. Equal scores share the places that they compete for.

    Attributes:
        styles (`dict[str, StyleRetrieval]`): By style; seen ones first, then by name.
        equal_wrong_images (`int`): Wrong images that each caption is left with for `equal_rsum`.
        equal_wrong_texts (`int`): Wrong captions that each image is left with for `equal_rsum`.
        probe ([`StyleProbe`], *optional*): How well the style is read from embeddings; None with a single meaning.
    """

    styles: dict[str, StyleRetrieval]
    equal_wrong_images: int
    equal_wrong_texts: int
    probe: StyleProbe | None

    @classmethod
    @torch.no_grad()
    def from_encoded(
        cls,
        model: PicoModel,
        encoded: EncodedRetrieval,
        styles: Sequence[str] | None,
        num_captions: Tensor,
        seen_styles: Sequence[str] | None = None,
        *,
        aligned: EncodedRetrieval | None = None,
    ) -> StyleReport:
        r"""
        Measures a set that is encoded already; with several processes all of them, alike.

        Args:
            model ([`PicoModel`]): The model, unwrapped.
            encoded ([`EncodedRetrieval`]): The set, from [`RetrievalEvaluator.encode`].
            styles (`Sequence[str]`): Style of each image of all processes, in order; at least two different ones.
            num_captions (`torch.Tensor` of shape `(images,)`): Captions of each image, which lie in the same order.
            seen_styles (`Sequence[str]`, *optional*): Those of the styles that training has shown.
            aligned ([`EncodedRetrieval`], *optional*):
                The set once more, from [`align_encoded`] with these styles and `leave_small=True`.

        Returns:
            [`StyleReport`]

        Raises:
            `ValueError`: if the styles are missing or all the same, do not fit the images, or lack a seen one.
        """
        names = order_styles(styles, seen_styles)
        assert styles is not None
        if not len(styles) == len(num_captions) == len(encoded.image_ids):
            raise ValueError(
                f"There are {len(encoded.image_ids)} images, but {len(styles)} styles and {len(num_captions)} numbers "
                "of captions."
            )
        device = encoded.image_ids.device
        image_styles = torch.tensor([names.index(style) for style in styles], device=device)
        num_captions = torch.as_tensor(num_captions, device=device)
        if int(num_captions.sum()) != len(encoded.text_ids):
            raise ValueError(
                f"num_captions adds up to {int(num_captions.sum())}, not to {len(encoded.text_ids)} texts."
            )
        encoded = encoded.gather_images()
        aligned = None if aligned is None else aligned.gather_images()
        text_styles = image_styles.repeat_interleave(num_captions)
        galleries = [
            _rank_style(model, encoded, image_styles == code, text_styles == code) for code in range(len(names))
        ]
        left_texts, left_images = (min(int(wrong[side].min()) for *_, wrong in galleries) for side in (0, 1))
        # The captions of an image count as one query.
        weights = (1 / (num_captions * len(num_captions))).repeat_interleave(num_captions)
        mixed = _shares_of_styles(model, encoded, nn.functional.one_hot(image_styles).float(), weights)
        report = cls({}, left_images, left_texts, probe_styles(model, encoded, image_styles))
        for name, (images, texts, ranks, wrong), shares in zip(names, galleries, mixed, strict=True):
            report.styles[name] = StyleRetrieval(
                images=len(images),
                texts=len(texts),
                seen=None if seen_styles is None else name in seen_styles,
                retrieval=retrieval_metrics(*ranks),
                chance_rsum=chance_rsum(encoded.image_ids[images], encoded.text_ids[texts]),
                equal_rsum=sum(
                    thinned_recall(ranks[0], wrong[0], left_texts, k)
                    + thinned_recall(ranks[1], wrong[1], left_images, k)
                    for k in RECALL_LEVELS
                ),
                gap=None,
                aligned_rsum=None
                if aligned is None or len(images) < MIN_IMAGES
                else RetrievalEvaluator().retrieval_metrics(model, aligned.subset(images, texts))["rsum"],
                gallery_share=100 * len(images) / len(image_styles),
                top_shares=shares,
            )
        seen = [result for result in report.styles.values() if result.seen]
        if seen:
            for result in list(report.styles.values())[len(seen) :]:
                result.gap = sum(other.equal_rsum for other in seen) / len(seen) - result.equal_rsum
            report._warn_of_small_galleries()
        return report

    def _warn_of_small_galleries(self) -> None:
        rarest = min(self.styles, key=lambda name: self.styles[name].images)
        if self.styles[rarest].images <= max(RECALL_LEVELS):
            logger.warning(
                f"The style {rarest!r} has {self.styles[rarest].images} image(s), so the gaps compare galleries of "
                "about that size, in which recall is high by chance alone. Leave it out for gaps that say more."
            )

    def metrics(self) -> dict[str, float]:
        """The main numbers under flat names: `style_{name}_rsum`, `style_{name}_gap`, `style_gap` (the mean), ..."""
        metrics = {}
        for name, result in self.styles.items():
            values = {"rsum": result.retrieval["rsum"]}
            values |= {key: getattr(result, key) for key in ("chance_rsum", "gap", "aligned_rsum")}
            metrics.update({f"style_{name}_{key}": value for key, value in values.items() if value is not None})
        gaps = [result.gap for result in self.styles.values() if result.gap is not None]
        if gaps:
            metrics["style_gap"] = sum(gaps) / len(gaps)
        if self.probe is not None:
            metrics["style_probe_accuracy"] = self.probe.accuracy
            if self.probe.weighted_accuracy is not None:
                metrics["style_probe_weighted_accuracy"] = self.probe.weighted_accuracy
            metrics["style_probe_chance"] = self.probe.chance
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Two tables, what their columns mean, and the probe."""
        by_style = {
            name: {
                "Seen": {True: "yes", False: "no", None: "?"}[result.seen],
                "Images": f"{result.images:,}",
                **recall_cells(result.retrieval),
                "rSum": number_cell(result.retrieval["rsum"]),
                "Chance": number_cell(result.chance_rsum),
                "rSum, equal galleries": number_cell(result.equal_rsum),
                "Gap": number_cell(result.gap, signed_number),
                "rSum, aligned": number_cell(result.aligned_rsum),
            }
            for name, result in self.styles.items()
        }
        mixed = {
            name: {
                "Of the gallery": number_cell(result.gallery_share),
                "Of the first places": number_cell(result.top_shares["1"]),
                "Of the first 10": number_cell(result.top_shares["10"]),
            }
            for name, result in self.styles.items()
        }
        parts = [
            "# Style report",
            "Recall in percent, each style's images against the captions of these images. Equal galleries leave each "
            f"caption {self.equal_wrong_images:,} wrong images and each image {self.equal_wrong_texts:,} wrong "
            "captions; the gap is the mean of the seen styles there minus an unseen one. Aligned: the rSum after a "
            "style's images have been given, in the image tower, mean and spread that images of training "
            f"have there; – where the model has none, or the style fewer than {MIN_IMAGES} images.",
            markdown_table("Style", by_style),
            "Share of each style in percent when captions are ranked against the images of all styles:",
            markdown_table("Style", mixed),
        ]
        if self.probe is not None:
            parts.append(self.probe.sentence())
        return "\n\n".join(parts) + "\n"


def measure_styles(
    model: PicoModel,
    processor: PicoProcessor,
    dataset: Dataset | datasets.Dataset,
    seen_styles: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
) -> StyleReport:
    r"""
    Encodes a set that shows several styles and measures how retrieval depends on them.

    Args:
        model ([`PicoModel`]): The model.
        processor ([`PicoProcessor`]): Its processor.
        dataset ([`CaptionedImageDataset`]):
            Images with their captions and styles; whatever [`~modeling_pico.data.as_captioned`] takes.
        seen_styles (`Sequence[str]`, *optional*):
            Those of the styles that training has shown. Without it there are no gaps.
        batch_size (`int`, *optional*, defaults to 64): Images encoded at a time.

    Returns:
        [`StyleReport`]

    Raises:
        `ValueError`: if the set has no styles or only one, or a seen style that does not occur.

    Example:

    ```python
    >>> rows = load_captioned_images("styled_shapes", split="validation_seen")
    >>> report = measure_styles(model, processor, CaptionedImageDataset(rows), seen_styles=["flat", "pixel"])
    >>> report.styles["sketch"].gap
    ```
    """
    captioned: Any = as_captioned(dataset)
    order_styles(captioned.styles, seen_styles)
    loader = own_batches(captioned, processor, batch_size)
    encoded = RetrievalEvaluator().encode(model, loader)
    aligned = None
    if model.image_moments.is_fitted:
        aligned = align_encoded(model, encoded, loader, captioned.styles, leave_small=True)
    return StyleReport.from_encoded(
        model, encoded, captioned.styles, captioned.num_captions, seen_styles, aligned=aligned
    )


def own_batches(dataset: Any, processor: PicoProcessor, batch_size: int) -> DataLoader:
    """Batches of this process's images, with all their captions."""
    return DataLoader(
        dataset,
        sampler=own_rows(len(dataset)),
        batch_size=batch_size,
        collate_fn=PicoDataCollator(processor),
        generator=torch.Generator(),  # else the loader draws from the global one
    )


def order_styles(styles: Sequence[str] | None, seen_styles: Sequence[str] | None) -> list[str]:
    """The different styles, seen ones first, then by name; refuses what no report can be made of."""
    if styles is None:
        raise ValueError(
            "The data set has no column `style`. Name the column that holds the style of each image by the "
            "`style_column` of `load_captioned_images`."
        )
    found = set(styles)
    if len(found) < 2:
        raise ValueError(
            f"A style report compares styles and needs at least two, but all {len(styles)} images have the style(s) "
            f"{sorted(found)}."
        )
    unknown = set(seen_styles or ()) - found
    if unknown:
        raise ValueError(f"`seen_styles` holds {sorted(unknown)}, which no image has; the styles are {sorted(found)}.")
    return sorted(found, key=lambda style: (style not in (seen_styles or ()), style))


def recall_cells(retrieval: Mapping[str, float]) -> dict[str, str]:
    """Cells of a table, by title: the recalls of [`retrieval_metrics`]."""
    return {
        f"{arrow} R@{k}": number_cell(retrieval[f"{direction}_recall_at_{k}"])
        for arrow, direction in (("i→t", "image_to_text"), ("t→i", "text_to_image"))
        for k in RECALL_LEVELS
    }


def _rank_style(
    model: PicoModel, encoded: EncodedRetrieval, images: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """
    Rows of a style's images and of their captions, the ranks of both among each other, and how many wrong captions
    each of the images has and how many wrong images each of the captions.
    """
    images, texts = images.nonzero().squeeze(1), texts.nonzero().squeeze(1)
    ranks = RetrievalEvaluator().ranks(model, encoded.subset(images, texts))
    ids, of_texts = encoded.image_ids[images], encoded.text_ids[texts]
    wrong = len(texts) - num_right_answers(ids, of_texts), len(images) - num_right_answers(of_texts, ids)
    return images, texts, ranks, wrong


def thinned_recall(ranks: Tensor, wrong: Tensor, left: int, k: int) -> float:
    """
    Expected recall at `k` in percent when only `left` of each query's wrong answers remain, chosen at random: how many
    of those that beat the best right answer remain is hypergeometric.

    Args:
        ranks (`torch.Tensor` of shape `(queries,)`): Wrong answers that score at least as high as the best right one.
        wrong (`torch.Tensor` of shape `(queries,)`): Wrong answers in all.
        left (`int`): Wrong answers that remain, at most the least of `wrong`.
        k (`int`): Length of the result list.
    """
    ranks, wrong = ranks.cpu().double(), wrong.cpu().double()
    rest = torch.tensor(left, dtype=torch.float64)
    hits = torch.zeros_like(ranks)
    for above in torch.arange(k, dtype=torch.float64):
        log_ways = _log_choose(ranks, above) + _log_choose(wrong - ranks, rest - above)
        hits += (log_ways - _log_choose(wrong, rest)).exp()
    return 100 * float(hits.clamp(max=1).mean())


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    # -inf where k is negative or more than n: the gamma function is infinite at 0 and below.
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _shares_of_styles(
    model: PicoModel, encoded: EncodedRetrieval, styles: Tensor, weights: Tensor
) -> list[dict[str, float]]:
    """
    By style, its share in percent of the first place (`"1"`) and the first ten (`"10"`) that captions find in the
    gallery of all images; `styles` is `(images, styles)`, one-hot, and `weights` `(texts,)` what each caption counts.
    """
    tops = {k: torch.zeros(styles.shape[1], dtype=torch.float64) for k in (1, 10)}
    for start in range(0, len(weights), _TEXT_CHUNK):
        some = slice(start, start + _TEXT_CHUNK)
        captions = {name: getattr(encoded, name)[some] for name in ("text_tokens", "text_mask", "text_ids")}
        scores = RetrievalEvaluator().score(model, replace(encoded, **captions)).T
        for k, total in tops.items():
            total += (weights[some] @ _places(scores, k) @ styles).cpu()
    return [{str(k): 100 * float(share[code]) for k, share in tops.items()} for code in range(styles.shape[1])]


def _places(scores: Tensor, k: int) -> Tensor:
    """Share of the first `k` places that each item of `(queries, items)` holds; equal scores share places evenly."""
    k = min(k, scores.shape[1])
    last = scores.topk(k, dim=1).values[:, -1:]
    tied = (scores - last).abs() <= TIE_TOLERANCE
    above = (scores > last) & ~tied
    left = k - above.sum(dim=1, keepdim=True)
    return (above + tied * (left / tied.sum(dim=1, keepdim=True))) / k


__all__ = ["StyleReport", "StyleRetrieval", "measure_styles", "order_styles", "recall_cells"]
