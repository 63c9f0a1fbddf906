"""
Re-ranking by uncertainty, and how well uncertainty tells right answers from wrong ones.

Method: PAU (NeurIPS 2023, arXiv 2309.17093). Its weights are learned here on validation data, and only kept where they
help queries that they were not chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import gather_rows
from ..model.modeling_pico import PicoModel
from .retrieval_metrics import RECALL_LEVELS, TIE_TOLERANCE, retrieval_metrics, retrieval_ranks


if TYPE_CHECKING:
    from .evaluator import EncodedRetrieval


# Scores of a tile as one kind of ranks sees them, from its rows, columns and scores.
TileView = Callable[[Any, Any, Tensor], Tensor]
_DIRECTIONS = ("image_to_text", "text_to_image")
_CHUNK = 256
# Weights tried first, over the standard deviation of the gallery's uncertainty, and the ratios by which the best of
# them is then changed.
_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_REFINEMENTS = (1.8, 1.35, 1.15)
_PARTS = 5
# The gain of held-out queries must be so many times its standard error.
_SIGNIFICANT = 2.0


@dataclass(frozen=True)
class UncertaintyReranking:
    """
    Scores re-ranked by the uncertainty of what is searched, `S'_ij = exp(-b_i u_i) exp(-b_j u_j) (S_ij - floor)`.

    A factor below 1 would raise a negative score, so scores are shifted by `floor`, the lowest score of the validation
    data: nothing of the gallery that is searched enters. Scores below it keep their place below all others.

    A query's own factor is the same for its whole gallery and changes none of its ranks. So `text_weight` matters to
    image-to-text retrieval alone and `image_weight` to text-to-image alone, and each is learned by itself.

    Args:
        image_weight (`float`, *optional*, defaults to 0.0): Weight of the images' uncertainty; 0 leaves ranks alone.
        text_weight (`float`, *optional*, defaults to 0.0): Weight of the texts' uncertainty.
        floor (`float`, *optional*, defaults to 0.0): Score that is shifted to zero.
        image_center, text_center (`float`, *optional*, defaults to 0.0):
            Uncertainty at which the factor is 1: a constant that changes no rank and keeps numbers in range.
    """

    image_weight: float = 0.0
    text_weight: float = 0.0
    floor: float = 0.0
    image_center: float = 0.0
    text_center: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """As [`PicoConfig`] keeps it."""
        return asdict(self)

    def rerank(
        self, scores: Tensor, *, image_uncertainty: Tensor | None = None, text_uncertainty: Tensor | None = None
    ) -> Tensor:
        """
        Re-ranks any scores of images and texts.

        Args:
            scores (`torch.Tensor` of shape `(images, texts)`): Scores, higher is better.
            image_uncertainty (`torch.Tensor` of shape `(images,)`, *optional*):
                Give it where images are searched; left out, their factor is 1.
            text_uncertainty (`torch.Tensor` of shape `(texts,)`, *optional*): The same for texts.

        Returns:
            `torch.Tensor` of shape `(images, texts)`, in float32: in half precision, uncertainties that order a
            gallery round to the same number.

        Raises:
            `ValueError`: If an uncertainty does not fit the scores.
        """
        scores = scores.float()
        shifted = scores - self.floor
        factor = torch.ones((), dtype=scores.dtype, device=scores.device)
        sides = (
            ("image", 0, image_uncertainty, self.image_weight, self.image_center),
            ("text", 1, text_uncertainty, self.text_weight, self.text_center),
        )
        for name, dim, uncertainty, weight, center in sides:
            if uncertainty is None:
                continue
            if uncertainty.shape != scores.shape[dim : dim + 1]:
                raise ValueError(
                    f"{name}_uncertainty must be ({scores.shape[dim]},) to fit scores (images, texts) of shape "
                    f"{tuple(scores.shape)}, got {tuple(uncertainty.shape)}."
                )
            of_side = torch.exp(-weight * (uncertainty.to(scores.device, torch.float32) - center))
            factor = factor * (of_side[:, None] if dim == 0 else of_side)
        return torch.where(shifted > 0, shifted * factor, shifted)


def learn_reranking(
    scores: Tensor, image_ids: Tensor, text_ids: Tensor, image_uncertainty: Tensor, text_uncertainty: Tensor
) -> UncertaintyReranking:
    """
    Learns the weights of a re-ranking on validation data: those of the highest recall at 1, 5 and 10, from a grid and
    a local search around its best point. The sign is free.

    Five parts of the queries are held out in turn and re-ranked by the weight that is best for the others: where they
    do not gain by twice the standard error of their gain (queries of one identity counted together), the weight stays
    0. Of a grid some weight gains by chance on what it is chosen on, and would lose elsewhere.

    Args:
        scores (`torch.Tensor` of shape `(images, texts)`): Scores of the validation data, higher is better.
        image_ids (`torch.Tensor` of shape `(images,)`): Identity of each image.
        text_ids (`torch.Tensor` of shape `(texts,)`): Identity of each text.
        image_uncertainty (`torch.Tensor` of shape `(images,)`): Uncertainty of each image.
        text_uncertainty (`torch.Tensor` of shape `(texts,)`): Uncertainty of each text.

    Returns:
        [`UncertaintyReranking`]

    Raises:
        `ValueError`: If uncertainties or identities do not fit the scores, or a value is NaN or infinite.
    """
    scores, image_uncertainty, text_uncertainty = scores.float(), image_uncertainty.float(), text_uncertainty.float()
    plain = UncertaintyReranking(
        floor=float(scores.min()),
        image_center=float(image_uncertainty.mean()),
        text_center=float(text_uncertainty.mean()),
    )
    weights = {}
    for direction, side, uncertainty, query_ids in (
        (1, "image", image_uncertainty, text_ids),
        (0, "text", text_uncertainty, image_ids),
    ):

        def hits(weight: float, direction=direction, side=side, uncertainty=uncertainty) -> Tensor:
            """How many of the recall levels each query reaches with this weight."""
            reranking = replace(plain, **{f"{side}_weight": weight})
            reranked = reranking.rerank(scores, **{f"{side}_uncertainty": uncertainty})
            ranks = retrieval_ranks(reranked, image_ids, text_ids, tie_tolerance=TIE_TOLERANCE)[direction]
            return torch.stack([ranks < k for k in RECALL_LEVELS]).sum(dim=0).cpu()

        groups = query_ids.unique(return_inverse=True)[1].cpu()
        weights[f"{side}_weight"] = _best_weight(hits, uncertainty - uncertainty.mean(), groups)
    return replace(plain, **weights)


def _best_weight(hits: Callable[[float], Tensor], uncertainty: Tensor, groups: Tensor) -> float:
    """
    The weight of the most hits; 0 where it does not gain on held-out queries, see [`learn_reranking`].

    `hits` gives those of each query with a weight, `uncertainty` `(items,)` is that of what is searched, and `groups`
    `(queries,)` numbers the queries' identities.
    """
    spread = float(uncertainty.double().std(correction=0))
    # Below this the uncertainties differ by rounding alone.
    if spread < 1e-7:
        return 0.0
    # Ordered by size: of equal weights the smallest wins.
    grid = [0.0, *(sign * size / spread for size in _GRID for sign in (1, -1))]
    of_grid = torch.stack([hits(weight) for weight in grid])
    gains = torch.zeros_like(of_grid[0])
    for part in range(_PARTS):
        held_out = groups % _PARTS == part
        best = int(of_grid[:, ~held_out].sum(dim=1).argmax())
        gains[held_out] = of_grid[best, held_out] - of_grid[0, held_out]
    by_identity = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, gains.double())
    standard_error = float(by_identity.std(correction=0)) * len(by_identity) ** 0.5
    if float(by_identity.sum()) <= _SIGNIFICANT * standard_error:
        return 0.0
    totals = of_grid.sum(dim=1)
    best = int(totals.argmax())
    weight, most = grid[best], int(totals[best])
    for ratio in _REFINEMENTS:
        for candidate in (weight / ratio, weight * ratio):
            found = int(hits(candidate).sum())
            if found > most:
                weight, most = candidate, found
    return weight


@dataclass
class RetrievalUncertainty:
    """
    How uncertain a model is of a retrieval set, and what that adds to the metrics of it.

    Attributes:
        images (`torch.Tensor` of shape `(images,)`): Uncertainty of the images of all processes.
        texts (`torch.Tensor` of shape `(texts,)`): Uncertainty of the texts.
        reranking ([`UncertaintyReranking`], *optional*): The weights that the model has learned.
    """

    images: Tensor
    texts: Tensor
    reranking: UncertaintyReranking | None = None

    @classmethod
    @torch.no_grad()
    def measure(cls, model: PicoModel, encoded: EncodedRetrieval) -> RetrievalUncertainty | None:
        """The uncertainty of an [`EncodedRetrieval`], on all processes alike; None for a model without."""
        if model.uncertainty_prototypes is None:
            return None

        def of(side: str, tokens: Tensor, mask: Tensor) -> Tensor:
            parts = zip(tokens.split(_CHUNK), mask.split(_CHUNK), strict=True)
            return torch.cat([model.uncertainty(*part, side) for part in parts])  # type: ignore[misc]

        images = of("image", encoded.image_tokens, encoded.image_mask)
        if not encoded.is_whole:
            images = gather_rows(images[:, None]).squeeze(1)
        options = (model.config.uncertainty_config or {}).get("reranking")
        reranking = None if options is None else UncertaintyReranking(**options)
        return cls(images, of("text", encoded.text_tokens, encoded.text_mask), reranking)

    def subset(self, images: slice | Tensor, texts: slice | Tensor) -> RetrievalUncertainty:
        """That of some of the images and texts."""
        return RetrievalUncertainty(self.images[images], self.texts[texts], self.reranking)

    def views(self) -> list[TileView]:
        """
        For each direction that is re-ranked, the scores with the factor of what is searched. A query's own factor
        changes nothing and is left out.
        """
        reranking, views = self.reranking, []
        if reranking is not None and reranking.text_weight:
            views.append(lambda rows, columns, tile: reranking.rerank(tile, text_uncertainty=self.texts[columns]))
        if reranking is not None and reranking.image_weight:
            views.append(lambda rows, columns, tile: reranking.rerank(tile, image_uncertainty=self.images[rows]))
        return views

    def metrics(
        self, ranks: tuple[Tensor, Tensor], reranked: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> dict[str, float]:
        """
        The areas under the risk-coverage curves of recall at 1 (`image_to_text_aurc`, `text_to_image_aurc`), and of a
        model that has learned a re-ranking the metrics of it (`reranked_rsum` and so on).

        Args:
            ranks (`tuple(torch.Tensor, torch.Tensor)`): Ranks of both directions.
            reranked (`list` of the same): Ranks as each of the [`views`] sees the scores.
        """
        curves = self.risk_coverage(ranks)
        metrics = {f"{direction}_aurc": curves[direction].aurc for direction in _DIRECTIONS}
        if self.reranking is not None:
            left = list(reranked)
            to_text = left.pop(0)[0] if self.reranking.text_weight else ranks[0]
            to_image = left.pop(0)[1] if self.reranking.image_weight else ranks[1]
            found = retrieval_metrics(to_text, to_image)
            metrics.update({f"reranked_{name}": value for name, value in found.items()})
        return metrics

    def risk_coverage(self, ranks: tuple[Tensor, Tensor]) -> dict[str, RiskCoverage]:
        """The risk-coverage curves of recall at 1, by direction."""
        of_queries = zip(_DIRECTIONS, ranks, (self.images, self.texts), strict=True)
        return {direction: risk_coverage(found, uncertainty) for direction, found, uncertainty in of_queries}


@dataclass(frozen=True)
class RiskCoverage:
    """
    Recall of the queries that are kept when the most uncertain ones are left out.

    Attributes:
        coverage (`torch.Tensor` of shape `(queries,)`): Share of the queries kept, in percent, ascending.
        recall (`torch.Tensor` of shape `(queries,)`): Their recall in percent.
        best_recall (`torch.Tensor` of shape `(queries,)`): The same if failures were left out first.
    """

    coverage: Tensor
    recall: Tensor
    best_recall: Tensor

    @property
    def aurc(self) -> float:
        """Area under the risk-coverage curve in percent (risk: 100 - recall; arXiv 1805.08206); lower is better."""
        return 100 - float(self.recall.mean())

    @property
    def best_aurc(self) -> float:
        """The least that any order of these queries reaches."""
        return 100 - float(self.best_recall.mean())

    @property
    def chance_aurc(self) -> float:
        """What a random order reaches on average: the risk of all queries."""
        return 100 - float(self.recall[-1])


def risk_coverage(ranks: Tensor, uncertainty: Tensor, k: int = 1) -> RiskCoverage:
    """
    Keeps queries from the most certain to the least and measures the recall of those kept so far.

    Args:
        ranks (`torch.Tensor` of shape `(queries,)`): 0-based ranks, see [`retrieval_ranks`].
        uncertainty (`torch.Tensor` of shape `(queries,)`): Uncertainty of each query. Queries of equal uncertainty
            share what they reach, so that their order does not matter.
        k (`int`, *optional*, defaults to 1): Length of the result list.

    Raises:
        `ValueError`: If there is no query, shapes differ, or an uncertainty is NaN or infinite.
    """
    if ranks.ndim != 1 or len(ranks) == 0 or ranks.shape != uncertainty.shape:
        raise ValueError(
            "ranks and uncertainty must both be (queries,) with at least one query, got "
            f"{tuple(ranks.shape)} and {tuple(uncertainty.shape)}."
        )
    if not torch.isfinite(uncertainty).all():
        raise ValueError(f"{int((~torch.isfinite(uncertainty)).sum())} uncertainties are NaN or infinite.")
    hits = (ranks < k).double().cpu()
    _, groups, sizes = uncertainty.cpu().unique(return_inverse=True, return_counts=True)
    shares = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, hits) / sizes
    kept = torch.arange(1, len(hits) + 1, dtype=torch.float64)
    return RiskCoverage(
        coverage=100 * kept / len(hits),
        recall=100 * shares.repeat_interleave(sizes).cumsum(dim=0) / kept,
        best_recall=100 * hits.sort(descending=True).values.cumsum(dim=0) / kept,
    )


__all__ = ["RetrievalUncertainty", "RiskCoverage", "UncertaintyReranking", "learn_reranking", "risk_coverage"]
