"""How well a linear probe reads the style of an image from its embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modeling_pico import PicoModel
from .evaluator import EncodedRetrieval


_NUM_FOLDS = 5
# Directions with less than a hundredth of the mean variance are hardly read.
_PENALTY = 0.01
_CHUNK = 256


@dataclass
class StyleProbe:
    """
    Cross-validated accuracy of a linear reader of styles, in percent.

    Attributes:
        accuracy (`float`): From mean image tokens before weighting; the mean over styles of their own accuracy.
        weighted_accuracy (`float`, *optional*): From score-ready ones; None for a model without weights.
        chance (`float`): Accuracy of guessing.
        num_folds (`int`): Folds; no meaning is on both sides of one.
    """

    accuracy: float
    weighted_accuracy: float | None
    chance: float
    num_folds: int

    def sentence(self) -> str:
        """The result in words."""
        weighted = "" if self.weighted_accuracy is None else f", in {self.weighted_accuracy:.1f}% from weighted ones"
        return (
            f"A linear probe reads the style in {self.accuracy:.1f}% of cases from image embeddings without weights"
            f"{weighted} (chance {self.chance:.1f}%; mean over styles, {self.num_folds} folds by meaning)."
        )


def probe_styles(model: PicoModel, encoded: EncodedRetrieval, image_styles: Tensor) -> StyleProbe | None:
    """
    Probes mean image tokens with and without weights.

    Args:
        model ([`PicoModel`]): The model, unwrapped.
        encoded ([`EncodedRetrieval`]): The set with the image tokens of all processes.
        image_styles (`torch.Tensor` of shape `(images,)`): Code of each image's style, from 0 on without holes.

    Returns:
        [`StyleProbe`], or None if there is one meaning only.
    """
    num_meanings = len(encoded.image_ids.unique())
    if num_meanings < 2:
        return None
    plain, weighted = [], []
    for rows in torch.arange(len(encoded.image_tokens), device=image_styles.device).split(_CHUNK):
        tokens, mask = encoded.image_tokens[rows], encoded.image_mask[rows]
        score_ready, probability = model.alignment_head.weight(tokens, mask, "image")
        plain.append(_mean_token(tokens, mask))
        if probability is not None:
            weighted.append(_mean_token(score_ready, mask))
    num_folds = min(_NUM_FOLDS, num_meanings)
    styles, ids = image_styles.cpu(), encoded.image_ids.cpu()
    return StyleProbe(
        accuracy=probe_accuracy(torch.cat(plain), styles, ids, num_folds),
        weighted_accuracy=probe_accuracy(torch.cat(weighted), styles, ids, num_folds) if weighted else None,
        chance=100 / (int(styles.max()) + 1),
        num_folds=num_folds,
    )


def probe_accuracy(features: Tensor, labels: Tensor, groups: Tensor, num_folds: int = _NUM_FOLDS) -> float:
    """
    Accuracy of ridge classification (one linear map to the indicators of all labels, in closed form), cross-validated
    so that no group is on both sides.

    Every label weighs the same, in fitting and in the accuracy, so guessing reaches one by the number of labels
    however unevenly they occur.

    Args:
        features (`torch.Tensor` of shape `(samples, dim)`): What is read.
        labels (`torch.Tensor` of shape `(samples,)`): Codes from 0 on without holes.
        groups (`torch.Tensor` of shape `(samples,)`): Identity of each sample's group.
        num_folds (`int`, *optional*, defaults to 5): Folds, at most the number of groups.

    Returns:
        `float`: The mean over labels of the share that is read rightly, in percent.
    """
    features = features.cpu().double()
    _, groups = groups.unique(return_inverse=True)
    num_groups = int(groups.max()) + 1
    # Shuffled, for groups may be sorted by meaning; by a generator of its own, so that the report repeats.
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(0))
    folds = (order % num_folds)[groups]
    predicted = torch.empty_like(labels)
    for fold in range(num_folds):
        held_out = folds == fold
        predicted[held_out] = _ridge_predict(features[~held_out], labels[~held_out], features[held_out], labels)
    right = (predicted == labels).double()
    counts = labels.bincount()
    return 100 * float((labels.bincount(right) / counts).mean())


def _ridge_predict(features: Tensor, labels: Tensor, queries: Tensor, all_labels: Tensor) -> Tensor:
    targets = nn.functional.one_hot(labels, int(all_labels.max()) + 1).double()
    present = targets.sum(dim=0) > 0
    weights = (targets / targets.sum(dim=0).clamp(min=1)).sum(dim=1, keepdim=True) / present.sum()
    mean = (weights * features).sum(dim=0)
    centred = features - mean
    # One scale for all features and not one each: the score is an inner product, in which a feature that weights
    # have made small counts little, and so it should for the probe.
    variance = (weights * centred.square()).sum().div(features.shape[1]).clamp(min=1e-30)
    normal = centred.T @ (weights * centred) + _PENALTY * variance * torch.eye(features.shape[1], dtype=torch.float64)
    coefficients = torch.linalg.solve(normal, centred.T @ (weights * targets))
    outputs = (queries - mean) @ coefficients
    return outputs.masked_fill(~present, -torch.inf).argmax(dim=1)


def _mean_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens, `(batch, dim)`."""
    return (tokens.float() * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


__all__ = ["StyleProbe", "probe_accuracy", "probe_styles"]
