"""What PICO models return: encoded samples and scored pairs."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class PicoFeatures(BaseModelOutputWithPooling):
    r"""
    One modality, encoded: all that is needed to score it against the other one.

    Args:
        embeds (`torch.Tensor` of shape `(batch, tokens, dim)`):
            Score-ready token embeddings; semantic probability is folded in unless `weighted=False` was asked for.
        mask (`torch.Tensor` of shape `(batch, tokens)`):
            True at tokens that take part in the score.
        pooler_output (`torch.Tensor` of shape `(batch, dim)`):
            One unit vector per sample, for coarse search.
        semantic_probability (`torch.Tensor` of shape `(batch, dim)`, *optional*):
            Semantic probability of each feature column, where this side is weighted.
        uncertainty (`torch.Tensor` of shape `(batch,)`, *optional*):
            Uncertainty of each sample, with `num_uncertainty_prototypes`; the more ambiguous, the higher.
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, hidden)`), hidden_states, attentions:
            The backbone's outputs.
    """

    embeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    semantic_probability: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None


@dataclass
class PicoOutput(ModelOutput):
    r"""
    Output of [`PicoModel`].

    Args:
        loss (`torch.Tensor`, *optional*, returned with `return_loss=True`):
            Loss over the pairs of the batch, `auxiliary_loss` included.
        logits_per_image (`torch.Tensor` of shape `(images, texts)`): Scores times `logit_scale`.
        logits_per_text (`torch.Tensor` of shape `(texts, images)`): The transpose.
        image_embeds (`torch.Tensor` of shape `(images, patches, dim)`): Score-ready image token embeddings.
        text_embeds (`torch.Tensor` of shape `(texts, words, dim)`): Score-ready text token embeddings.
        image_mask (`torch.Tensor` of shape `(images, patches)`): True at tokens that take part in the score.
        text_mask (`torch.Tensor` of shape `(texts, words)`): True at tokens that take part in the score.
        image_tokens (`torch.Tensor` of shape `(images, patches, dim)`): Image token embeddings before weighting.
        text_tokens (`torch.Tensor` of shape `(texts, words, dim)`): Text token embeddings before weighting.
        image_semantic_probability (`torch.Tensor` of shape `(images, dim)`, *optional*): Where images are weighted.
        text_semantic_probability (`torch.Tensor` of shape `(texts, dim)`, *optional*): Where texts are weighted.
        image_uncertainty (`torch.Tensor` of shape `(images,)`, *optional*): With `num_uncertainty_prototypes`.
        text_uncertainty (`torch.Tensor` of shape `(texts,)`, *optional*): With `num_uncertainty_prototypes`.
        pooler_output (`torch.Tensor` of shape `(batch, dim)`, *optional*):
            One unit vector per sample, for coarse search; where only one side was given.
        logit_scale (`torch.Tensor`, scalar): Inverse temperature by which logits are multiplied.
        auxiliary_loss (`torch.Tensor`, scalar, *optional*, in training mode or with `return_loss=True`):
            What is minimised beside the loss of the pairs; None for a model that has no such losses.
        auxiliary_losses (`dict[str, torch.Tensor]`, *optional*, where `auxiliary_loss` is):
            Its terms by name, weighted: their sum is `auxiliary_loss`.
        vision_model_output, text_model_output: Outputs of the backbones.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    image_semantic_probability: torch.Tensor | None = None
    text_semantic_probability: torch.Tensor | None = None
    image_uncertainty: torch.Tensor | None = None
    text_uncertainty: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    auxiliary_losses: dict[str, torch.Tensor] | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


__all__ = ["PicoFeatures", "PicoOutput"]
