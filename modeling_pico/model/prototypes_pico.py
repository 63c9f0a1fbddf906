"""
Style prototypes: from the tokens of one side to the weights of its feature columns.

Column `d` of one sample is the vector of feature `d`'s values over that sample's tokens. Style prototypes are
centroids of such columns; how a column relates to them gives the probability that it carries style, and one minus
that is its semantic probability. Method: PICO (arXiv 2510.11175); what the paper leaves open is marked *ours*.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .configuration_pico import PicoConfig


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


def squared_distances(columns: torch.Tensor, prototypes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    Squared Euclidean distances of `columns` `(..., length)` to `prototypes` `(prototypes, length)`, every coordinate
    divided by `scale` `(length,)` first. Returns `(..., prototypes)`.
    """
    columns, prototypes = columns / scale, prototypes / scale
    cross = columns @ prototypes.T
    squares = columns.square().sum(dim=-1, keepdim=True) + prototypes.square().sum(dim=-1)
    return (squares - 2 * cross).clamp(min=0)


def style_probability(
    columns: torch.Tensor,
    prototypes: torch.Tensor,
    style_rate: torch.Tensor,
    scale: torch.Tensor,
    temperature: torch.Tensor,
) -> torch.Tensor:
    """
    Probability, in [0, 1], that each of the columns `(..., length)` carries style: the style rates of the prototypes,
    weighted by how near the column is to each *(ours)*. The rest are buffers of [`StylePrototypes`].
    """
    distances = squared_distances(columns, prototypes, scale) / temperature
    return (-distances).softmax(dim=-1) @ style_rate


class StyleRates(nn.Module):
    r"""
    Style rates of the prototypes, learned for each feature column *(ours)*.

    `p_d = sigmoid(b_d - sum_k a_dk r_dk)` with the soft assignment `a_dk` of column `d` to prototype `k`, which is
    that of `style_probability="purity"`. Where purity takes one measured rate per prototype for all columns, each
    feature learns here in which looks it speaks of style. It starts constant, that is, with weights of exactly one.
    """

    # Rates are stored divided by this, so that a step of the optimizer moves the probability as fast as the tokens.
    gain = 4.0

    def __init__(self, config: PicoConfig):
        super().__init__()
        # Parameters of its own and no `nn.Linear`: transformers takes a module that only has sub-modules for
        # initialised when it is defined outside of transformers, and would leave the start to `nn.Linear`.
        self.rate = nn.Parameter(torch.empty(config.embedding_dim, config.num_style_prototypes))
        self.bias = nn.Parameter(torch.empty(config.embedding_dim))

    def forward(
        self, columns: torch.Tensor, prototypes: torch.Tensor, scale: torch.Tensor, temperature: torch.Tensor
    ) -> torch.Tensor:
        """
        Semantic probability `(batch, dim)`, in (0, 1), of columns `(batch, dim, length)`; the rest are buffers of
        [`StylePrototypes`].
        """
        # The squared length of the column is the same for all prototypes and cancels in the softmax.
        unit = scale.square() * temperature
        nearness = nn.functional.linear(columns, 2 * prototypes / unit, -(prototypes.square() / unit).sum(dim=-1))
        style = (nearness.softmax(dim=-1) * self.rate.float()).sum(dim=-1)
        return (self.bias.float() - self.gain * style).sigmoid()


class StylePrototypes(nn.Module):
    r"""
    Style prototypes of one side, images or texts; a model holds one for each.

    They are persistent buffers, so a checkpoint carries them. Before the first construction (`stage` 0) all weights
    are exactly 1.

    Buffers, with `K` prototypes and columns of `L` values:
        prototypes `(K, L)`: centroids of feature columns.
        style_rate `(K,)`: mean pseudo-style probability of each cluster.
        column_scale `(L,)`: unit of each coordinate of a column.
        temperature: mean squared distance of a column to its nearest prototype.
        stage (int64): 0 before the first construction, 1 with the first prototypes, 2 with updated ones.
    """

    prototypes: torch.Tensor
    style_rate: torch.Tensor
    column_scale: torch.Tensor
    temperature: torch.Tensor
    stage: torch.Tensor

    def __init__(self, config: PicoConfig):
        super().__init__()
        self.config = config
        self.register_buffer("prototypes", torch.zeros(config.num_style_prototypes, config.column_size))
        self.register_buffer("style_rate", torch.zeros(config.num_style_prototypes))
        self.register_buffer("column_scale", torch.ones(config.column_size))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.rates = StyleRates(config) if config.style_probability == "style_rates" else None

    def columns(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Feature columns `(batch, dim, length)` of tokens `(batch, tokens, dim)`, as this model describes them."""
        return feature_columns(tokens, mask, self.config.column_mode, self.config.column_size)

    def semantic_probability(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        r"""
        Semantic probability of each feature column of each sample.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Normalised token embeddings before weighting.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.

        Returns:
            `torch.Tensor` of shape `(batch, dim)` in float32, values in [0, 1]; ones before the first construction.
        """
        # In float32 also where the whole model was cast to another type.
        prototypes, rate = self.prototypes.float(), self.style_rate.float()
        scale, temperature = self.column_scale.float(), self.temperature.float()
        if self.rates is not None:
            probability = self.rates(self.columns(tokens, mask), prototypes, scale, temperature)
        else:
            columns = self.columns(tokens.detach(), mask)
            probability = 1 - style_probability(columns, prototypes, rate, scale, temperature)
        # `torch.where` and no branch: the stage lives on the device, and every parameter keeps a (zero) gradient.
        return torch.where(self.stage > 0, probability, torch.ones_like(probability))

    def weight_tokens(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score-ready tokens `(batch, tokens, dim)`, and the semantic probability `(batch, dim)` that weights them."""
        with torch.autocast(tokens.device.type, enabled=False):
            probability = self.semantic_probability(tokens, mask)
            return tokens * column_weights(probability).unsqueeze(1), probability


__all__ = [
    "StylePrototypes",
    "StyleRates",
    "column_weights",
    "feature_columns",
    "squared_distances",
    "style_probability",
]
