"""How well a linear probe reads the style of an image from its embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.modeling_pico import PicoModel
from .evaluator import EncodedRetrieval


_NUM_FOLDS = 5
# Ten times scikit-learn's default, at which features of unit variance are read less well than they could be.
_INVERSE_PENALTY = 10.0
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
    Probes mean image tokens with and without weights; None if there is one meaning only.

    Args:
        model ([`PicoModel`]): The model, unwrapped.
        encoded ([`EncodedRetrieval`]): The set with the image tokens of all processes.
        image_styles (`torch.Tensor` of shape `(images,)`): Code of each image's style, from 0 on without gaps.
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
    Balanced accuracy in percent of scikit-learn's logistic regression, cross-validated so that no group is on both
    sides. Every label weighs the same, in fitting and in the accuracy, so guessing reaches one by the number of labels
    however unevenly they occur.

    Args:
        features (`torch.Tensor` of shape `(samples, dim)`): What is read.
        labels (`torch.Tensor` of shape `(samples,)`): Codes of at least two labels.
        groups (`torch.Tensor` of shape `(samples,)`): Identity of each sample's group.
        num_folds (`int`, *optional*, defaults to 5): Folds, at most the number of groups.
    """
    # Imported here: it takes a second, and only the style report needs it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold

    points, targets = features.cpu().double().numpy(), labels.cpu().numpy()
    predicted = targets.copy()
    # Shuffled, for groups may be sorted by meaning.
    folds = GroupKFold(num_folds, shuffle=True, random_state=0)
    for train, held_out in folds.split(points, targets, groups.cpu().numpy()):
        centred = points - points[train].mean(axis=0)
        # One scale for all features: one that weights have made small counts little in the score, and so it does here.
        scale = max(np.sqrt(np.square(centred[train]).mean()), 1e-30)
        known = np.unique(targets[train])
        if len(known) == 1:
            predicted[held_out] = known
            continue
        classifier = LogisticRegression(C=_INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
        classifier.fit(centred[train] / scale, targets[train])
        predicted[held_out] = classifier.predict(centred[held_out] / scale)
    return 100 * float(balanced_accuracy_score(targets, predicted))


def _mean_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens, `(batch, dim)`."""
    return (tokens.float() * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


__all__ = ["StyleProbe", "probe_accuracy", "probe_styles"]
