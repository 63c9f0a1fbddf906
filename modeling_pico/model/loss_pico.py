"""Losses of image-text retrieval as pure functions of score matrices, for one process or a share of many."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


LOSS_TYPES = ("infonce", "hinge")


def exclusion_mask(row_ids: Tensor, column_ids: Tensor, targets: Tensor) -> Tensor:
    """
    Marks the columns `(rows, columns)` that mean the same as a row without being its partner: five captions of one
    image, one meaning drawn in several styles, or one sentence about several images. They are neither pulled nor
    pushed.

    Args:
        row_ids (`torch.Tensor` of shape `(rows,)`): Identity of each row's meaning (or wording), integers.
        column_ids (`torch.Tensor` of shape `(columns,)`): Likewise of each column.
        targets (`torch.Tensor` of shape `(rows,)`): Column of each row's partner, int64.
    """
    same_meaning = row_ids[:, None] == column_ids[None, :]
    return same_meaning.scatter(1, targets[:, None], False)


def infonce_loss(logits: Tensor, targets: Tensor, exclude: Tensor | None = None) -> Tensor:
    """
    InfoNCE in one direction, a mean over rows: cross entropy of each row's partner against all columns that are not
    excluded (CLIP, arXiv 2103.00020). A row without negatives contributes zero.

    Args:
        logits (`torch.Tensor` of shape `(rows, columns)`): Scores times the inverse temperature.
        targets (`torch.Tensor` of shape `(rows,)`): Column of each row's partner, int64.
        exclude (`torch.Tensor` of shape `(rows, columns)`, *optional*): True where a column is no negative.
    """
    logits = _at_least_float32(logits)
    if exclude is not None:
        logits = logits.masked_fill(exclude.scatter(1, targets[:, None], False), float("-inf"))
    return F.cross_entropy(logits, targets)


def hinge_loss(
    scores: Tensor, targets: Tensor, exclude: Tensor | None = None, *, margin: float = 0.2, hardest: bool = True
) -> Tensor:
    """
    Triplet hinge in one direction, a mean over rows: `max(0, margin + negative - positive)` (VSE++, arXiv 1707.05612).
    A row without negatives contributes zero.

    Args:
        scores (`torch.Tensor` of shape `(rows, columns)`): Scores.
        targets (`torch.Tensor` of shape `(rows,)`): Column of each row's partner, int64.
        exclude (`torch.Tensor` of shape `(rows, columns)`, *optional*): True where a column is no negative.
        margin (`float`, *optional*, defaults to 0.2): Wanted distance to a negative, in units of the score.
        hardest (`bool`, *optional*, defaults to `True`):
            Whether a row counts its hardest negative only, or the sum over all its negatives.
    """
    scores = _at_least_float32(scores)
    columns = targets[:, None]
    positives = scores.gather(1, columns)
    # One matrix says what is no negative: the partner itself and whatever shares its meaning.
    no_negative = torch.zeros_like(scores, dtype=torch.bool) if exclude is None else exclude
    negatives = scores.masked_fill(no_negative.scatter(1, columns, True), float("-inf"))
    if hardest:
        negatives = negatives.amax(dim=1, keepdim=True)
    # relu(-inf) is 0 with gradient 0, so neither masked entries nor rows without negatives need a second mask.
    return F.relu(margin + negatives - positives).sum(dim=1).mean()


def image_text_loss(
    scores_per_image: Tensor,
    scores_per_text: Tensor,
    *,
    image_ids: Tensor | None = None,
    caption_codes: Tensor | None = None,
    offset: int = 0,
    loss_type: str = "infonce",
    logit_scale: Tensor | float | None = None,
    margin: float = 0.2,
    hardest: bool = True,
) -> Tensor:
    """
    Loss of matched image-text pairs in both directions. Row `r` of either matrix belongs to pair `offset + r` of the
    whole batch, and so does column `offset + r`. The paper does not state its loss; both types are those of its field:
    the directions are averaged for InfoNCE, as CLIP does, and summed for the hinge, as VSE++ does.

    Each direction is a mean over the local rows. With equally many rows in each process and galleries gathered *with*
    gradient, the mean of the gradients over processes is that of the loss of the whole batch.

    Args:
        scores_per_image (`torch.Tensor`): Local images against all texts, shape `(local, all)`.
        scores_per_text (`torch.Tensor`): Local texts against all images, shape `(local, all)`.
        image_ids (`torch.Tensor` of shape `(all,)`, *optional*):
            Identity of every pair's meaning, integers. Pairs of equal identity are not each other's negatives; without
            it all meanings are distinct.
        caption_codes (`torch.Tensor` of shape `(all,)`, *optional*):
            Identity of every pair's caption: equal for equal sentences, which nothing could tell apart. Pairs of equal
            captions are not each other's negatives either; without it all captions are distinct.
        offset (`int`, *optional*, defaults to 0): First local pair's place in the whole batch, rank times local batch.
        loss_type (`str`, *optional*, defaults to `"infonce"`): `"infonce"` or `"hinge"`.
        logit_scale (`torch.Tensor` or `float`, *optional*):
            Inverse temperature that multiplies the scores, not its logarithm; for InfoNCE only, since the margin of
            the hinge is in units of the score.
        margin (`float`, *optional*, defaults to 0.2): Margin of the hinge.
        hardest (`bool`, *optional*, defaults to `True`): Hardest negative of the hinge, or all negatives.

    Returns:
        `torch.Tensor`: Scalar in float32 (float64 for float64 input).

    Raises:
        `ValueError`: If `loss_type` is unknown, or shapes, offset and ids do not fit together.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown loss_type {loss_type!r}; allowed are {', '.join(map(repr, LOSS_TYPES))}.")
    if scores_per_image.ndim != 2 or scores_per_image.shape != scores_per_text.shape:
        raise ValueError(
            "scores_per_image and scores_per_text must both be (local pairs, all pairs), got "
            f"{tuple(scores_per_image.shape)} and {tuple(scores_per_text.shape)}."
        )
    rows, columns = scores_per_image.shape
    if not 0 <= offset <= columns - rows:
        raise ValueError(f"offset {offset} with {rows} local pairs does not fit into {columns} pairs in all.")
    targets = torch.arange(offset, offset + rows, device=scores_per_image.device)
    given = []
    for name, identity in (("image_ids", image_ids), ("caption_codes", caption_codes)):
        if identity is not None:
            if identity.shape != (columns,):
                raise ValueError(
                    f"{name} must be those of all {columns} pairs, of shape ({columns},), got {tuple(identity.shape)}."
                )
            given.append(exclusion_mask(identity[targets], identity, targets))
    exclude = torch.stack(given).any(dim=0) if given else None
    if loss_type == "hinge":
        return hinge_loss(scores_per_image, targets, exclude, margin=margin, hardest=hardest) + hinge_loss(
            scores_per_text, targets, exclude, margin=margin, hardest=hardest
        )
    scale = 1.0 if logit_scale is None else logit_scale
    per_image = infonce_loss(_at_least_float32(scores_per_image) * scale, targets, exclude)
    per_text = infonce_loss(_at_least_float32(scores_per_text) * scale, targets, exclude)
    return (per_image + per_text) / 2


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
