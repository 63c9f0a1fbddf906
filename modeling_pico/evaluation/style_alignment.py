"""Images of a new style, moved to where training has put the features of the styles it has shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def match_moments(tokens: Tensor, mask: Tensor, reference_tokens: Tensor, reference_mask: Tensor) -> Tensor:
    r"""
    Gives every feature of a gallery the mean and the standard deviation that it has in a reference *(ours)*.

    What all images of a new style share lies in the mean and spread of their features, as it does within an image in
    image stylisation. Both are over all real tokens of all images; no caption and no label is needed. The same is done
    to the statistics of batch normalisation when a network meets a new domain (arXiv 1603.04779). Gallery and
    reference should show alike meanings, and enough images to estimate two numbers a feature: what differs between
    their contents is removed as well.

    Args:
        tokens (`torch.Tensor` of shape `(images, patches, dim)`):
            Token embeddings before weighting, of images in one style.
        mask (`torch.Tensor` of shape `(images, patches)`): True at real tokens.
        reference_tokens (`torch.Tensor` of shape `(reference images, patches, dim)`):
            The same of images in the styles of training.
        reference_mask (`torch.Tensor` of shape `(reference images, patches)`): True at real tokens.

    Returns:
        `torch.Tensor` of shape `(images, patches, dim)` in float32. Tokens keep their lengths; masked ones are zero.

    Raises:
        `ValueError`: if either side has no real token, a mask does not fit, or the numbers of features differ.

    Example:

    ```python
    >>> gallery, known = evaluator.encode(model, new_style), evaluator.encode(model, training_styles)
    >>> tokens = match_moments(gallery.image_tokens, gallery.image_mask, known.image_tokens, known.image_mask)
    >>> embeds, _ = model.alignment_head.weight(tokens, gallery.image_mask, "image")  # score-ready
    ```
    """
    for values, valid in ((tokens, mask), (reference_tokens, reference_mask)):
        if values.shape[:-1] != valid.shape:
            raise ValueError(f"A mask must have the shape {tuple(values.shape[:-1])}, but has {tuple(valid.shape)}.")
    if tokens.shape[-1] != reference_tokens.shape[-1]:
        raise ValueError(
            f"Gallery and reference must have the same features, but have {tokens.shape[-1]} and "
            f"{reference_tokens.shape[-1]}."
        )
    mask, reference_mask = mask.bool(), reference_mask.bool()
    if not mask.any() or not reference_mask.any():
        raise ValueError("Means and spreads need real tokens, but the gallery or the reference has none.")
    values = tokens.float()
    spread, mean = torch.std_mean(values[mask], dim=0, correction=0)
    reference_spread, reference_mean = torch.std_mean(reference_tokens[reference_mask].float(), dim=0, correction=0)
    # A feature that never varies has only a mean.
    moved = (values - mean) * (reference_spread / spread.clamp(min=1e-6)) + reference_mean
    lengths = values.norm(dim=-1, keepdim=True)
    aligned = nn.functional.normalize(moved, dim=-1) * lengths
    return aligned.masked_fill(~mask.unsqueeze(-1), 0.0)


__all__ = ["match_moments"]
