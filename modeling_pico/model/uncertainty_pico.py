"""
Aleatoric uncertainty of images and texts, from their similarity to learned prototypes.

Method: PAU, "Prototype-based Aleatoric Uncertainty Quantification for Cross-modal Retrieval" (NeurIPS 2023,
arXiv 2309.17093). What departs from it is marked *(ours)*.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from .configuration_pico import UncertaintyConfig


def prototype_uncertainty(logits: Tensor, temperature: float = 5.0) -> Tensor:
    """
    Uncertainty of samples: `u = 1 - K / S` with evidence `E_k = exp(logit_k / temperature)`, `alpha_k = E_k + 1` and
    `S = sum_k alpha_k` (PAU).

    It grows with the evidence: a sample that is close to many meanings of the other modality is ambiguous. The
    evidential "vacuity" of other work is the complement `K / S`, which falls with it.

    Args:
        logits (`torch.Tensor` of shape `(batch, prototypes)`):
            Cosines with the prototypes of the *other* modality, times the inverse temperature of the scores.
        temperature (`float`, *optional*, defaults to 5.0): Divides the logits (tau); more gives flatter evidence.

    Returns:
        `torch.Tensor` of shape `(batch,)`: In (0, 1); 0.5 where the mean evidence is 1.
    """
    # 1 - K / (K + sum E) = sigmoid(log(mean E)), which no large logit overflows.
    return torch.sigmoid(torch.logsumexp(logits / temperature, dim=-1) - math.log(logits.shape[-1]))


def uncertainty_loss(uncertainty: Tensor, similarity: Tensor, matching: Tensor) -> Tensor:
    """
    Mean squared difference between uncertainty and a target: a sample's mean similarity to the non-matching samples
    of the other modality, rescaled so that its mean over the batch is that of the uncertainty (PAU).

    PAU rescales cosines as they are, which CLIP makes positive; where their mean is near zero the target explodes and
    where it is negative it is turned around. Here `(1 + cosine) / 2`, which is never negative, is rescaled *(ours)*.

    Args:
        uncertainty (`torch.Tensor` of shape `(rows,)`): Uncertainty of each sample.
        similarity (`torch.Tensor` of shape `(rows, columns)`): Cosines with samples of the other modality.
        matching (`torch.Tensor` of shape `(rows, columns)`):
            True where a column means the same as a row. A row without any other column does not count.

    Returns:
        `torch.Tensor`: Scalar, 0 where no row has a non-matching column.
    """
    others = (~matching).sum(dim=1)
    closeness = ((1 + similarity) / 2).masked_fill(matching, 0.0).sum(dim=1) / others.clamp(min=1)
    counts = (others > 0).to(uncertainty)
    total = counts.sum().clamp(min=1)
    smallest = torch.finfo(closeness.dtype).tiny
    rescale = (uncertainty * counts).sum() / (closeness * counts).sum().clamp(min=smallest)
    return (((uncertainty - rescale * closeness) ** 2) * counts).sum() / total


def diversity_loss(prototypes: Tensor, scale: Tensor | float) -> Tensor:
    """
    Mean square of all `K * K` logits between prototypes, those with themselves taken as 0 (PAU): least where
    prototypes are at right angles.

    Args:
        prototypes (`torch.Tensor` of shape `(prototypes, dim)`): Unit vectors.
        scale (`torch.Tensor` or `float`): Inverse temperature of the scores, which makes logits of cosines.
    """
    logits = scale * prototypes @ prototypes.T
    return (logits - torch.diag(logits.diagonal())).square().mean()


class UncertaintyPrototypes(nn.Module):
    """
    Learned prototypes of both modalities, in the space of the pooled embeddings.

    Args:
        config ([`UncertaintyConfig`]): Says how many there are and how their loss is weighted.
        dim (`int`): Width of the embeddings.

    Attributes:
        image, text (`torch.nn.Parameter` of shape `(prototypes, dim)`):
            Prototypes of images, with which texts are compared, and of texts, with which images are.
    """

    def __init__(self, config: UncertaintyConfig, dim: int):
        super().__init__()
        self.config = config
        size = (config.num_prototypes, dim)
        self.image = nn.Parameter(torch.empty(size))
        self.text = nn.Parameter(torch.empty(size))

    def forward(self, pooled: Tensor, scale: Tensor | float, modality: str) -> Tensor:
        """
        Args:
            pooled (`torch.Tensor` of shape `(batch, dim)`): One unit vector per sample.
            scale (`torch.Tensor` or `float`): Inverse temperature of the scores.
            modality (`str`): That of the samples, `"image"` or `"text"`.

        Returns:
            `torch.Tensor` of shape `(batch,)`: Uncertainty, see [`prototype_uncertainty`].
        """
        others = self.text if modality == "image" else self.image
        with torch.autocast(pooled.device.type, enabled=False):
            cosines = pooled.float() @ nn.functional.normalize(others.float(), dim=-1).T
        return prototype_uncertainty(scale * cosines, self.config.temperature)

    def losses(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor | float,
        image_ids: Tensor | None = None,
        caption_codes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Weighted losses of matched pairs: `uncertainty`, which is [`uncertainty_loss`] averaged over both directions
        times `config.weight`, and `uncertainty_diversity`, which is [`diversity_loss`] summed over both
        sides times `config.diversity_weight`.

        As in PAU the gradient reaches the embeddings, unless `config.gradient` is off. It never reaches
        `scale` *(ours)*: the diversity loss would be lowered by a higher temperature, at the cost of retrieval.

        Args:
            images (`torch.Tensor` of shape `(pairs, dim)`): Unit vectors.
            texts (`torch.Tensor` of shape `(pairs, dim)`): Unit vectors; row `i` belongs to image `i`.
            scale (`torch.Tensor` or `float`): Inverse temperature of the scores.
            image_ids (`torch.Tensor` of shape `(pairs,)`, *optional*):
                Identity of each pair's meaning; all meanings are distinct by default.
            caption_codes (`torch.Tensor` of shape `(pairs,)`, *optional*):
                Identity of each pair's caption; all captions are distinct by default.

        Returns:
            `dict[str, torch.Tensor]`: Two scalars.
        """
        config = self.config
        if not config.gradient:
            images, texts = images.detach(), texts.detach()
        if isinstance(scale, Tensor):
            scale = scale.detach()
        matching = torch.eye(len(images), dtype=torch.bool, device=images.device)
        for identity in (image_ids, caption_codes):
            if identity is not None:
                matching |= identity[:, None] == identity[None, :]
        with torch.autocast(images.device.type, enabled=False):
            similarity = images.float() @ texts.float().T
            image_side, text_side = (
                diversity_loss(nn.functional.normalize(side.float(), dim=-1), scale)
                for side in (self.image, self.text)
            )
        per_image = uncertainty_loss(self(images, scale, "image"), similarity, matching)
        per_text = uncertainty_loss(self(texts, scale, "text"), similarity.T, matching)
        return {
            "uncertainty": config.weight * (per_image + per_text) / 2,
            "uncertainty_diversity": config.diversity_weight * (image_side + text_side),
        }
