"""Alignment heads of PICO: from the hidden states of a backbone to score-ready token embeddings."""

from typing import Any

import torch
from torch import nn

from .backbones_pico import hidden_size
from .configuration_pico import PicoConfig
from .prototypes_pico import StylePrototypes


# Shorter vectors are divided by this instead of their length: a token of zeros stays one, rounding left of a constant
# image is not blown up to unit length, and their gradient, which is divided too, stays within the range of float16.
MIN_NORM = 1e-4


class TokenProjection(nn.Linear):
    """Linear map from hidden states to token embeddings."""


class FineGrainedHead(nn.Module):
    """
    Projects hidden states to unit token embeddings and leaves them unweighted: the fine-grained baseline.

    The interface of every alignment head: [`embed`] makes token embeddings that depend on the sample alone, [`weight`]
    makes them score-ready, and [`auxiliary_losses`] says what training minimises beside the loss of the pairs. Whoever
    caches embeddings may call the second again, for instance with other prototypes.
    """

    def __init__(self, config: PicoConfig):
        super().__init__()
        self.config = config
        dim, bias = config.embedding_dim, config.projection_bias
        self.visual_projection = TokenProjection(hidden_size(config.vision_config), dim, bias=bias)
        self.text_projection = TokenProjection(hidden_size(config.text_config), dim, bias=bias)

    def project(self, hidden_states: torch.Tensor, modality: str) -> torch.Tensor:
        """Projects `(..., hidden)` to unit vectors `(..., dim)` in float32."""
        projection = self.visual_projection if modality == "image" else self.text_projection
        return nn.functional.normalize(projection(hidden_states).float(), dim=-1, eps=MIN_NORM)

    def pool(
        self, tokens: torch.Tensor, mask: torch.Tensor, class_state: torch.Tensor | None, modality: str
    ) -> torch.Tensor:
        """
        One unit vector `(batch, dim)` per sample: its projected `class_state` `(batch, hidden)` where one is given,
        else the direction of the mean of its tokens `(batch, tokens, dim)`.
        """
        if class_state is not None:
            return self.project(class_state, modality)
        return nn.functional.normalize((tokens * mask.unsqueeze(-1)).sum(dim=1), dim=-1, eps=MIN_NORM)

    def embed(
        self, token_states: torch.Tensor, mask: torch.Tensor, class_state: torch.Tensor | None, modality: str
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """
        Args:
            token_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): Hidden states of the backbone.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at tokens that take part.
            class_state (`torch.Tensor` of shape `(batch, hidden)`, *optional*): State of the class token.
            modality (`str`): `"image"` or `"text"`.

        Returns:
            Token embeddings `(batch, tokens, dim)`, their mask, and whatever [`auxiliary_losses`] needs to know of
            this side (None where there is nothing). Masked tokens are zero.
        """
        return self.project(token_states, modality) * mask.unsqueeze(-1), mask, None

    def weight(
        self, tokens: torch.Tensor, mask: torch.Tensor, modality: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score-ready tokens, and the semantic probability `(batch, dim)` where there is one."""
        return tokens, None

    def auxiliary_losses(self, image: Any, text: Any) -> dict[str, torch.Tensor]:
        """
        Losses beside that of the pairs, over this process's batch, by name and already weighted; the loss adds them
        up. They are asked for in training and where a loss is returned, and never needed to score.

        Args:
            image: What [`embed`] returned third for the images.
            text: The same for the texts.
        """
        return {}


class ClipStyleHead(FineGrainedHead):
    """One pooled vector per sample, scored by cosine: the CLIP-style baseline."""

    def embed(self, token_states, mask, class_state, modality):
        tokens, _, _ = super().embed(token_states, mask, class_state, modality)
        # The pair score of two single-token samples is twice their inner product; this makes it the cosine.
        pooled = self.pool(tokens, mask, class_state, modality) * 0.5**0.5
        return pooled.unsqueeze(1), mask.any(dim=1, keepdim=True), None


class InstanceNormHead(FineGrainedHead):
    """
    Subtracts each feature column's mean over the sample's tokens and scores without weights: the simple remedy for
    style from image stylisation.
    """

    def embed(self, token_states, mask, class_state, modality):
        projection = self.visual_projection if modality == "image" else self.text_projection
        states, valid = projection(token_states).float(), mask.unsqueeze(-1)
        mean = (states * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
        return nn.functional.normalize(states - mean, dim=-1, eps=MIN_NORM) * valid, mask, None


class PicoHead(FineGrainedHead):
    """Weights every feature column by its semantic probability, which style prototypes give."""

    def __init__(self, config: PicoConfig):
        super().__init__(config)
        self.style_prototypes = nn.ModuleDict({side: StylePrototypes(config) for side in ("image", "text")})

    def weight(self, tokens, mask, modality):
        return self.style_prototypes[modality].weight_tokens(tokens, mask)


# By the name of the option `method`. Choices, help and tests of all methods follow from here.
HEADS: dict[str, type[FineGrainedHead]] = {
    "pico": PicoHead,
    "fine_grained": FineGrainedHead,
    "instance_norm": InstanceNormHead,
    "clip_style": ClipStyleHead,
}
