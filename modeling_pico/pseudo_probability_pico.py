"""
Pseudo-semantic probability: how much a feature column carries meaning, estimated from pairs seen in training.

Pure functions of tensors: what one batch adds to sums over pairs, and the probability that follows from these, or from
several samples of one meaning. Method: PICO (arXiv 2510.11175); what the paper does not have is marked *ours*.
"""

from __future__ import annotations

import torch

from .configuration_pico import PROBABILITY_ESTIMATORS
from .feature_columns_pico import MIN_PROBABILITY


def sign_shares(tokens: torch.Tensor, mask: torch.Tensor, by_magnitude: bool = False) -> torch.Tensor:
    """
    Shares of a sample's real tokens at which each feature is positive, and at which it is negative.

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, dim)`):
            Token embeddings; only their signs matter, unless `by_magnitude`.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
        by_magnitude (`bool`, *optional*, defaults to `False`):
            Whether tokens count by the feature's absolute value, so that the shares are those of its sum *(ours)*.

    Returns:
        `torch.Tensor` of shape `(batch, 2, dim)` in float32: positive and negative shares.
    """
    real = mask.bool().float().unsqueeze(1)  # (batch, 1, tokens)
    if by_magnitude:
        values = tokens.detach().float().masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    else:
        values = tokens.detach().sign().float()
    # Positive minus negative, and positive plus negative: two products instead of four passes over the tokens.
    difference = real @ values
    total = real @ values.abs_()  # a copy of the tokens in either case
    parts = torch.cat([total + difference, total - difference], dim=1) / 2
    # Of a sample that is not finite, or of zeros alone, nothing is positive or negative.
    return (parts / total).nan_to_num(0.0) if by_magnitude else parts / real.sum(dim=2, keepdim=True).clamp(min=1)


def best_aligned_agreement(
    image_tokens: torch.Tensor, image_mask: torch.Tensor, text_tokens: torch.Tensor, text_mask: torch.Tensor
) -> torch.Tensor:
    r"""
    Share of positive products `v_id * t_jd` over the best-aligned patches and words of matched pairs alone *(ours)*:
    the mean over patches, each with its most similar word, and that over words, each with its most similar patch,
    half each. These are the products of which the score of unweighted tokens consists.

    Args:
        image_tokens (`torch.Tensor` of shape `(batch, patches, dim)`): Token embeddings of the images.
        image_mask (`torch.Tensor` of shape `(batch, patches)`): True at real tokens.
        text_tokens (`torch.Tensor` of shape `(batch, words, dim)`): Token embeddings of their texts.
        text_mask (`torch.Tensor` of shape `(batch, words)`): True at real tokens.

    Returns:
        `torch.Tensor` of shape `(batch, dim)` in float32.
    """
    images, texts = image_tokens.detach().float(), text_tokens.detach().float()
    image_mask, text_mask = image_mask.bool(), text_mask.bool()
    similarity = images @ texts.mT
    agreement = torch.zeros_like(images[:, 0])
    for own, other, mask, other_mask, scores in (
        (images, texts, image_mask, text_mask, similarity),
        (texts, images, text_mask, image_mask, similarity.mT),
    ):
        best = scores.masked_fill(~other_mask.unsqueeze(1), -torch.inf).argmax(dim=2)
        partners = other.gather(1, best.unsqueeze(-1).expand(-1, -1, other.shape[-1]))
        positive = (own * partners > 0) & mask.unsqueeze(-1)
        agreement += positive.sum(dim=1) / (2 * mask.sum(dim=1, keepdim=True).clamp(min=1))
    return agreement


def sign_agreement(
    image_shares: torch.Tensor, text_shares: torch.Tensor, valid: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Sums, over the pairs of a batch, of the share of positive products `v_id * t_jd`.

    The share of one pair is `1/(nv*nt) * sum_ij [v_id * t_jd > 0]` (PICO). It equals `a+ b+ + a- b-` with the shares
    of positive and negative values on either side, so no `(patches, words, dim)` tensor is needed. With shares by
    magnitude it is the share that positive products have in the sum of absolute ones. Row `i` of both
    sides is a matched pair; every image with every text of another id is a mismatched one *(ours)*.

    Args:
        image_shares (`torch.Tensor` of shape `(batch, 2, dim)`): [`sign_shares`] of the images.
        text_shares (`torch.Tensor` of shape `(batch, 2, dim)`): [`sign_shares`] of their texts.
        valid (`torch.Tensor` of shape `(batch,)`): True where both sides of the pair have a real token.
        ids (`torch.Tensor` of shape `(batch,)`): Identity of the meaning.

    Returns:
        Matched sum `(dim,)`, mismatched sum `(dim,)`, and the two numbers of pairs (float32 scalars).
    """
    matched = valid.float()
    mismatched = ((ids[:, None] != ids[None, :]) & valid[:, None] & valid[None, :]).float()
    agreement = (image_shares * text_shares).sum(dim=1)
    matched_sum = (agreement * matched[:, None]).sum(dim=0)
    partners = (mismatched @ text_shares.flatten(1)).view_as(text_shares)
    return matched_sum, (image_shares * partners).sum(dim=(0, 1)), matched.sum(), mismatched.sum()


def meaning_share(columns: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    r"""
    Share of the variance of each feature column, over samples, that lies between meanings *(ours)*.

    Where a meaning repeats, drawn and worded by several hands, what differs within it is style. With `n` samples of
    `m` meanings, the variance within is the sum of squares around the means of the meanings over `n - m`; the share is
    one minus that variance over the variance of all samples, clipped at 0 (the intraclass correlation). Every sample
    counts as a drawing of its own: one that is there twice makes the share too large.

    Args:
        columns (`torch.Tensor` of shape `(samples, dim, length)`): Feature columns; squares are summed over `length`.
        ids (`torch.Tensor` of shape `(samples,)`): Identity of the meaning.

    Returns:
        `torch.Tensor` of shape `(dim,)`, values in [0, 1].

    Raises:
        ValueError: No meaning repeats.
    """
    _, row, count = ids.unique(return_inverse=True, return_counts=True)
    freedom = len(ids) - len(count)
    if freedom == 0:
        raise ValueError(f"No two of the {len(ids)} samples are of one meaning.")
    columns = columns.float()
    of_meaning = torch.zeros_like(columns[: len(count)]).index_add_(0, row, columns) / count.view(-1, 1, 1)
    within = (columns - of_meaning[row]).square().sum(dim=(0, 2)) / freedom
    total = columns.var(dim=0).sum(dim=1)
    return (1 - within / total.clamp(min=MIN_PROBABILITY**2)).clamp(0, 1)


def pseudo_semantic_probability(
    matched_rate: torch.Tensor, mismatched_rate: torch.Tensor, estimator: str = "matched"
) -> torch.Tensor:
    r"""
    Pseudo-semantic probability of each feature column from its rates of positive products.

    Args:
        matched_rate (`torch.Tensor` of shape `(dim,)`): Mean share over matched pairs.
        mismatched_rate (`torch.Tensor` of shape `(dim,)`): Mean share over mismatched pairs.
        estimator (`str`, *optional*, defaults to `"matched"`):
            `"matched"`: the matched rate (PICO). `"chance_corrected"`: `(p - p0) / (1 - p0)`, clipped at 0, the form
            of Cohen's kappa *(ours)*: a column of fixed sign agrees on any pair, which is bias and not meaning.
            `"magnitude"` and `"best_aligned"`: the matched rate, of which the shares were counted otherwise.
            (`"meaning_share"` has no rates of products: see [`meaning_share`].)

    Returns:
        `torch.Tensor` of shape `(dim,)`, values in [0, 1].
    """
    if estimator == "chance_corrected":
        return ((matched_rate - mismatched_rate) / (1 - mismatched_rate).clamp(min=MIN_PROBABILITY)).clamp(0, 1)
    of_products = [name for name in PROBABILITY_ESTIMATORS if name != "meaning_share"]
    if estimator not in of_products:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, of_products))}, but got {estimator!r}.")
    return matched_rate


__all__ = [
    "best_aligned_agreement",
    "meaning_share",
    "pseudo_semantic_probability",
    "sign_agreement",
    "sign_shares",
]
