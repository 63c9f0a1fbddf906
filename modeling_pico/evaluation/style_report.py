"""How retrieval holds when the style of the images changes: a report over a set that shows several styles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..data import PicoDataCollator, as_captioned
from ..distributed import gather_rows, own_rows
from ..markdown import escape_markdown, signed_number
from ..model.modeling_pico import PicoModel
from ..model.processing_pico import PicoProcessor
from ..model.scoring_pico import pair_scores
from .evaluator import EncodedRetrieval, RetrievalEvaluator, score_ready
from .retrieval_metrics import RECALL_LEVELS, TIE_TOLERANCE, chance_rsum, retrieval_metrics
from .style_alignment import match_moments
from .style_probe import StyleProbe, probe_styles


logger = logging.get_logger(__name__)

TOP_LEVELS = (1, 10)
_IMAGE_CHUNK = 256
_TEXT_CHUNK = 1024
_RECALLS = [f"{side}_recall_at_{k}" for side in ("image_to_text", "text_to_image") for k in RECALL_LEVELS]


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
            rSum after [`match_moments`] has moved the images to the features of the seen styles, for a style not seen.
        gallery_share (`float`): Share of the style in the gallery that mixes all styles.
        top_shares (`dict[str, float]`): Its share of the first place (`"1"`) and of the first ten (`"10"`) there.
        first_right_share (`float`, *optional*):
            How often its image comes first among the right images of a caption, over captions whose meaning is shown
            in more than one style; None if there are none.
        first_right_expected (`float`, *optional*): The same if one of the right images were drawn by lot.
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
    first_right_share: float | None
    first_right_expected: float | None

    def table_row(self) -> dict[str, float]:
        """What a model card shows: recalls, the size of the gallery, and what they are to be judged by."""
        return {
            **self.retrieval,
            **{name: getattr(self, name) for name in ("images", "texts", "chance_rsum", "equal_rsum")},
        }


@dataclass
class StyleReport:
    """
    What the style of images does to retrieval.

    Recall depends on the number of wrong answers, so styles of different size cannot be compared as they are. Gaps
    therefore compare the expected recall after the wrong answers of every query have been reduced by lot to the number
    that the smallest gallery has, which the rank gives exactly (hypergeometric distribution). Where all galleries are
    of one size this is the plain recall.

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
    ) -> StyleReport:
        r"""
        Measures a set that is encoded already; with several processes all of them, alike.

        Args:
            model ([`PicoModel`]): The model, unwrapped.
            encoded ([`EncodedRetrieval`]): The set, from [`RetrievalEvaluator.encode`].
            styles (`Sequence[str]`): Style of each image of all processes, in order; at least two different ones.
            num_captions (`torch.Tensor` of shape `(images,)`): Captions of each image, which lie in the same order.
            seen_styles (`Sequence[str]`, *optional*): Those of the styles that training has shown.

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
        encoded = replace(
            encoded, image_tokens=gather_rows(encoded.image_tokens), image_mask=gather_rows(encoded.image_mask)
        )
        text_styles = image_styles.repeat_interleave(num_captions)
        to_text, wrong_texts = _rank_texts(model, encoded, image_styles, text_styles)
        weights = (1 / (num_captions * len(num_captions))).repeat_interleave(num_captions)
        to_image, wrong_images, mixed = _rank_images(model, encoded, image_styles, text_styles, weights, len(names))
        left_texts, left_images = int(wrong_texts.min()), int(wrong_images.min())
        report = cls({}, left_images, left_texts, probe_styles(model, encoded, image_styles))
        for code, name in enumerate(names):
            images, texts = image_styles == code, text_styles == code
            report.styles[name] = StyleRetrieval(
                images=int(images.sum()),
                texts=int(texts.sum()),
                seen=None if seen_styles is None else name in seen_styles,
                retrieval=retrieval_metrics(to_text[images], to_image[texts]),
                chance_rsum=chance_rsum(encoded.image_ids[images], encoded.text_ids[texts]),
                equal_rsum=sum(
                    thinned_recall(to_text[images], wrong_texts[images], left_texts, k)
                    + thinned_recall(to_image[texts], wrong_images[texts], left_images, k)
                    for k in RECALL_LEVELS
                ),
                gap=None,
                aligned_rsum=None,
                gallery_share=100 * int(images.sum()) / len(images),
                **mixed.of_style(code),
            )
        report._measure_gaps()
        report._measure_alignment(model, encoded, image_styles, text_styles)
        return report

    def _measure_gaps(self) -> None:
        seen = [result.equal_rsum for result in self.styles.values() if result.seen]
        for result in self.styles.values():
            if seen and not result.seen:
                result.gap = sum(seen) / len(seen) - result.equal_rsum
        rarest = min(self.styles, key=lambda name: self.styles[name].images)
        if seen and self.styles[rarest].images <= max(RECALL_LEVELS):
            logger.warning(
                f"The style {rarest!r} has {self.styles[rarest].images} image(s), so the gaps compare galleries of "
                "about that size, in which recall is high by chance alone. Leave it out for gaps that say more."
            )

    def _measure_alignment(
        self, model: PicoModel, encoded: EncodedRetrieval, image_styles: Tensor, text_styles: Tensor
    ) -> None:
        seen = [code for code, result in enumerate(self.styles.values()) if result.seen]
        if not seen:
            return
        known = torch.isin(image_styles, torch.tensor(seen, device=image_styles.device))
        reference = encoded.image_tokens[known], encoded.image_mask[known]
        for code, result in enumerate(self.styles.values()):
            if result.seen:
                continue
            images, texts = image_styles == code, text_styles == code
            tokens, mask = encoded.image_tokens[images], encoded.image_mask[images]
            aligned = EncodedRetrieval(
                image_tokens=match_moments(tokens, mask, *reference).to(tokens.dtype),
                image_mask=mask,
                text_tokens=encoded.text_tokens[texts],
                text_mask=encoded.text_mask[texts],
                image_ids=encoded.image_ids[images],
                text_ids=encoded.text_ids[texts],
            )
            one_style = torch.zeros_like(aligned.image_ids), torch.zeros_like(aligned.text_ids)
            to_text, _ = _rank_texts(model, aligned, *one_style)
            weights = torch.ones_like(aligned.text_ids, dtype=torch.float32)
            to_image, _, _ = _rank_images(model, aligned, *one_style, weights, 1)
            result.aligned_rsum = retrieval_metrics(to_text, to_image)["rsum"]

    def metrics(self) -> dict[str, float]:
        """The main numbers under flat names: `style_{name}_rsum`, `style_{name}_gap`, `style_gap` (the mean), ..."""
        metrics = {}
        for name, result in self.styles.items():
            metrics[f"style_{name}_rsum"] = result.retrieval["rsum"]
            metrics[f"style_{name}_chance_rsum"] = result.chance_rsum
            if result.gap is not None:
                metrics[f"style_{name}_gap"] = result.gap
            if result.aligned_rsum is not None:
                metrics[f"style_{name}_aligned_rsum"] = result.aligned_rsum
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
        """Two tables and a sentence."""
        by_style = [
            [
                escape_markdown(name),
                {True: "yes", False: "no", None: "?"}[result.seen],
                f"{result.images:,}",
                *(f"{result.retrieval[key]:.1f}" for key in (*_RECALLS, "rsum")),
                f"{result.chance_rsum:.1f}",
                f"{result.equal_rsum:.1f}",
                _number(result.gap, signed_number),
                _number(result.aligned_rsum),
            ]
            for name, result in self.styles.items()
        ]
        recalls = [f"{arrow} R@{k}" for arrow in ("i→t", "t→i") for k in RECALL_LEVELS]
        headers = [
            "Style",
            "Seen",
            "Images",
            *recalls,
            "rSum",
            "Chance",
            "rSum, equal galleries",
            "Gap",
            "rSum, aligned",
        ]
        mixed = [
            [
                escape_markdown(name),
                _number(result.gallery_share),
                *(_number(share) for share in result.top_shares.values()),
                _number(result.first_right_share),
                _number(result.first_right_expected),
            ]
            for name, result in self.styles.items()
        ]
        tops = ["Of the first places" if k == 1 else f"Of the first {k}" for k in TOP_LEVELS]
        mixed_headers = ["Style", "Of the gallery", *tops, "First of the right images", "The same by lot"]
        parts = [
            "# Style report",
            "Recall in percent, each style's images against the captions of these images. Equal galleries leave each "
            f"caption {self.equal_wrong_images:,} wrong images and each image {self.equal_wrong_texts:,} wrong "
            "captions; the gap is the mean of the seen styles there minus an unseen one. Aligned: the rSum after the "
            "features of an unseen style's images have been given mean and spread of those of the seen styles.",
            _table(headers, by_style),
            "Share of each style in percent when captions are ranked against the images of all styles:",
            _table(mixed_headers, mixed),
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
    loader = DataLoader(
        captioned,
        sampler=own_rows(len(captioned)),
        batch_size=batch_size,
        collate_fn=PicoDataCollator(processor),
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    encoded = RetrievalEvaluator().encode(model, loader)
    return StyleReport.from_encoded(model, encoded, captioned.styles, captioned.num_captions, seen_styles)


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


def thinned_recall(ranks: Tensor, wrong: Tensor, left: int, k: int) -> float:
    """
    Expected recall at `k` in percent when of each query's wrong answers only `left` remain, chosen by lot: how many of
    those that beat the best right answer remain is hypergeometric.

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


@dataclass
class _MixedGallery:
    """Weight of each style among the images that captions find in the gallery of all styles."""

    tops: dict[int, Tensor]
    first_right: Tensor
    first_right_expected: Tensor

    def of_style(self, code: int) -> dict[str, Any]:
        asked = float(self.first_right_expected.sum())
        return {
            "top_shares": {str(k): 100 * float(share[code]) for k, share in self.tops.items()},
            "first_right_share": 100 * float(self.first_right[code]) / asked if asked else None,
            "first_right_expected": 100 * float(self.first_right_expected[code]) / asked if asked else None,
        }


def _rank_texts(
    model: PicoModel, encoded: EncodedRetrieval, image_styles: Tensor, text_styles: Tensor
) -> tuple[Tensor, Tensor]:
    """Rank of each image's best caption among the captions of its style, and how many of those are wrong."""
    ranks, num_wrong = torch.zeros_like(encoded.image_ids), torch.zeros_like(encoded.image_ids)
    for style in image_styles.unique():
        texts = (text_styles == style).nonzero().squeeze(1)
        for images in (image_styles == style).nonzero().squeeze(1).split(_IMAGE_CHUNK):
            right = encoded.image_ids[images, None] == encoded.text_ids[texts]
            ranks[images] = _ranks(_scores(model, encoded, images, texts), right, ~right)
            num_wrong[images] = (~right).sum(dim=1)
    return ranks, num_wrong


def _rank_images(
    model: PicoModel,
    encoded: EncodedRetrieval,
    image_styles: Tensor,
    text_styles: Tensor,
    weights: Tensor,
    num_styles: int,
) -> tuple[Tensor, Tensor, _MixedGallery]:
    """The same for captions, and what they find among all images; `weights` `(texts,)` is what each one counts."""
    images = torch.arange(len(image_styles), device=image_styles.device)
    styles = nn.functional.one_hot(image_styles, num_styles).float()
    ranks, num_wrong = torch.zeros_like(encoded.text_ids), torch.zeros_like(encoded.text_ids)
    tops = {k: torch.zeros(num_styles, dtype=torch.float64) for k in TOP_LEVELS}
    first, expected = torch.zeros(num_styles, dtype=torch.float64), torch.zeros(num_styles, dtype=torch.float64)
    for texts in torch.arange(len(text_styles), device=images.device).split(_TEXT_CHUNK):
        scores = _scores(model, encoded, images, texts).T
        right = encoded.text_ids[texts, None] == encoded.image_ids
        own = text_styles[texts, None] == image_styles
        wrong = own & ~right
        ranks[texts], num_wrong[texts] = _ranks(scores, own & right, wrong), wrong.sum(dim=1)
        for k, total in tops.items():
            total += (weights[texts] @ _places(scores, k) @ styles).cpu()
        by_lot = right / right.sum(dim=1, keepdim=True)
        choice = weights[texts] * ((by_lot @ styles > 0).sum(dim=1) > 1)
        first += (choice @ _places(scores.masked_fill(~right, -torch.inf), 1) @ styles).cpu()
        expected += (choice @ by_lot @ styles).cpu()
    return ranks, num_wrong, _MixedGallery(tops, first, expected)


def _scores(model: PicoModel, encoded: EncodedRetrieval, images: Tensor, texts: Tensor) -> Tensor:
    """Scores `(images, texts)` of some rows of both sides."""
    rows = []
    for some_images in images.split(_IMAGE_CHUNK):
        image_embeds, image_mask = score_ready(model, encoded, "image", some_images)
        tiles = []
        for some_texts in texts.split(_TEXT_CHUNK):
            text_embeds, text_mask = score_ready(model, encoded, "text", some_texts)
            tiles.append(pair_scores(image_embeds, text_embeds, image_mask, text_mask))
        rows.append(torch.cat(tiles, dim=1))
    scores = torch.cat(rows)
    if not torch.isfinite(scores).all():
        raise ValueError(f"{int((~torch.isfinite(scores)).sum())} scores are NaN or infinite; nothing can be ranked.")
    return scores


def _ranks(scores: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Wrong answers that score at least as high as the best right one, `(queries,)`: ties count against it."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (wrong & (scores >= best - TIE_TOLERANCE)).sum(dim=1)


def _places(scores: Tensor, k: int) -> Tensor:
    """Share of the first `k` places that each item of `(queries, items)` holds; equal scores share places evenly."""
    k = min(k, scores.shape[1])
    last = scores.topk(k, dim=1).values[:, -1:]
    tied = (scores - last).abs() <= TIE_TOLERANCE
    above = (scores > last) & ~tied
    left = k - above.sum(dim=1, keepdim=True)
    return (above + tied * (left / tied.sum(dim=1, keepdim=True))) / k


def _table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: Callable[[float], str] = "{:.1f}".format) -> str:
    return "–" if value is None else form(value)


__all__ = ["StyleReport", "StyleRetrieval", "measure_styles", "order_styles"]
