"""Feature columns: the values of one feature over a sample's tokens, how they are described, and their weights."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .configuration_pico import COLUMN_MODES


# Semantic probabilities are kept above this, so that a sample in which every column looks like style has equal
# weights instead of a division by zero.
MIN_PROBABILITY = 1e-6


def feature_columns(
    tokens: torch.Tensor, mask: torch.Tensor, mode: str = "moments", length: int | None = None
) -> torch.Tensor:
    r"""
    Describes each feature column of each sample by a fixed number of values *(ours)*.

    Values are multiplied by `sqrt(dim)`, since tokens are unit vectors.

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, dim)`):
            L2-normalised token embeddings.
        mask (`torch.Tensor` of shape `(batch, tokens)`):
            True at real tokens. A sample without any gives zeros.
        mode (`str`, *optional*, defaults to `"moments"`):
            `"moments"`: mean and standard deviation. `"quantile"`: the sorted values, linearly interpolated to
            `length` points.
        length (`int`, *optional*):
            Number of values for `"quantile"`.

    Returns:
        `torch.Tensor` of shape `(batch, dim, length)` in float32; `length` is 2 for `"moments"`.
    """
    if mode == "moments":
        return _ColumnMoments.apply(tokens, mask.bool())
    if mode != "quantile":
        raise ValueError(f"column mode must be one of {', '.join(map(repr, COLUMN_MODES))}, but got {mode!r}.")
    values = tokens.float() * tokens.shape[-1] ** 0.5
    valid = mask.bool().unsqueeze(-1)
    count = valid.sum(dim=1).clamp(min=1)  # (batch, 1)
    ordered = values.masked_fill(~valid, torch.inf).sort(dim=1).values
    place = torch.linspace(0, 1, length, device=values.device) * (count - 1)  # (batch, length)
    below = place.floor().long()
    above = torch.minimum(below + 1, count - 1)
    fraction = (place - below).unsqueeze(-1)
    shape = (-1, -1, values.shape[-1])
    low = ordered.gather(1, below.unsqueeze(-1).expand(shape))
    high = ordered.gather(1, above.unsqueeze(-1).expand(shape))
    columns = (low + (high - low) * fraction).transpose(1, 2)
    # A sample without a real token has infinities above.
    return columns.masked_fill(~mask.bool().any(dim=1).view(-1, 1, 1), 0.0)


class _ColumnMoments(torch.autograd.Function):
    """
    Mean and standard deviation of each column, with a gradient in few passes over the tokens.

    The gradient that autograd derives from the two reductions takes longer than a small tower's; the values are the
    same.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        unit = tokens.shape[-1] ** 0.5
        values = tokens.detach().float()
        # Looked at only where that neither waits for a device nor breaks a graph that is being traced.
        looks = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        ctx.has_padding = not (looks and bool(mask.all()))
        count = mask.sum(dim=1, keepdim=True).clamp(min=1).float()  # (batch, 1)
        weights = mask.float().div(count).unsqueeze(1)  # (batch, 1, tokens)
        mean = (weights @ values).squeeze(1)
        # The small constant keeps the gradient of the root finite at a constant column.
        centred = values - mean.unsqueeze(1)
        spread = ((weights @ centred.square_()).squeeze(1) + 1e-8 / unit**2).sqrt()
        ctx.save_for_backward(tokens, mask, count, mean, spread)
        columns = torch.stack([mean, spread], dim=-1) * unit
        # A sample without a real token has the root of the small constant above.
        return columns.masked_fill(~mask.any(dim=1).view(-1, 1, 1), 0.0) if ctx.has_padding else columns

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens, mask, count, mean, spread = ctx.saved_tensors
        values = tokens.float()
        gradient = gradient * (tokens.shape[-1] ** 0.5 * mask.any(dim=1).view(-1, 1, 1))
        of_mean, of_spread = gradient.unbind(dim=-1)
        slope = of_spread / (count * spread)
        offset = of_mean / count - slope * mean
        result = torch.addcmul(offset.unsqueeze(1), slope.unsqueeze(1), values)
        if ctx.has_padding:
            result *= mask.unsqueeze(-1)
        return result.to(tokens.dtype), None


def column_weights(semantic_probability: torch.Tensor) -> torch.Tensor:
    """
    Weights of the feature columns: probabilities `(..., dim)` rescaled to a mean of one, so that a constant
    probability gives the unweighted score *(ours)*.
    """
    probability = semantic_probability.clamp(min=MIN_PROBABILITY)
    # The rescaling cancels any common factor; this one keeps the weights of a constant probability at exactly one.
    probability = probability / probability.detach().amax(dim=-1, keepdim=True)
    return probability / probability.mean(dim=-1, keepdim=True)


__all__ = ["MIN_PROBABILITY", "column_weights", "feature_columns"]
