"""
The equations of CDDS (arXiv 2603.05566) that are no network: which feature columns of images and texts are related,
what a column looks like in the other modality's distribution, and the four losses.

Column `d` of a batch is the vector of feature `d`'s values over all its real tokens. Some printed formulas do not do
what the paper says of them; each repair is documented where it is made. Everything here is a pure function of tensors.
"""

import torch
from torch import nn

from .alignment_heads_pico import MIN_NORM


# Added to variances: the divergence of two columns stays finite where one of them is constant. Tokens have unit
# root mean square, so that it is a thousandth of a usual one.
VARIANCE_FLOOR = 1e-3


def column_moments(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Mean and variance of each feature column, the latter raised by `VARIANCE_FLOOR`.

    Args:
        tokens (`torch.Tensor` of shape `(..., tokens, dim)`): Values.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*, defaults to all): True at tokens that count.

    Returns:
        Mean and variance, each `(..., dim)`.
    """
    if mask is None:
        mask = torch.ones(tokens.shape[:-1], dtype=torch.bool, device=tokens.device)
    weights = mask.to(tokens.dtype) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = (weights.unsqueeze(-1) * tokens).sum(dim=-2)
    variance = (weights.unsqueeze(-1) * (tokens - mean.unsqueeze(-2)).square()).sum(dim=-2)
    return mean, variance + VARIANCE_FLOOR


def gaussian_divergence(
    mean: torch.Tensor, variance: torch.Tensor, other_mean: torch.Tensor, other_variance: torch.Tensor
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of normal distributions from others, elementwise with broadcasting. The paper does not
    say how it estimates the divergence of two columns; this closed form of their moments is our choice.
    """
    scatter = variance + (mean - other_mean).square()
    return ((other_variance / variance).log() + scatter / other_variance - 1) / 2


def column_divergence(image_tokens: torch.Tensor, text_tokens: torch.Tensor) -> torch.Tensor:
    """
    `KL(C_i^v, C_j^t)` of every column of the image tokens `(patches, dim)` with every column of the text tokens
    `(words, dim)`, all real tokens of the batch; the similarity of Eq. 5 is `s_ij = exp(-KL)`. Returns `(dim, dim)`,
    image columns in rows.
    """
    mean, variance = column_moments(image_tokens)
    other_mean, other_variance = column_moments(text_tokens)
    return gaussian_divergence(mean[:, None], variance[:, None], other_mean, other_variance)


def related_semantics(divergence: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    r"""
    Weights of the related columns of the other modality (Eqs. 6-9): `p = sigmoid(s)` of `s = exp(-KL)`, the threshold
    of a row is `k_i = mean(p_i) + alpha_i * std(p_i)`, what exceeds it keeps its `s`, and every row is rescaled to
    sum 1.

    Three repairs. Printed, `s_ij` itself is compared with `k_i`, which lies in (0.5, 0.74]: a row of small
    similarities would keep nothing however much one of them stands out, so `p_ij` is compared. A comparison gives
    `alpha` no gradient; it has that of `sigmoid((p_ij - k_i) / std(p_i))` here, while the value remains the
    comparison's (straight-through). And a row in which nothing exceeds the threshold keeps its largest entry, since it
    could not be rescaled otherwise.

    Args:
        divergence (`torch.Tensor` of shape `(columns, others)`): `KL`, or its transpose for the texts' columns.
        threshold (`torch.Tensor` of shape `(columns,)`): `alpha`.

    Returns:
        `torch.Tensor` of shape `(columns, others)`.
    """
    probability = (-divergence).exp().sigmoid()
    # The constant keeps rows of equal entries, whose deviation is zero, finite in value and gradient.
    variance, mean = torch.var_mean(probability, dim=1, correction=0, keepdim=True)
    excess = (probability - mean) * (variance + 1e-12).rsqrt() - threshold.unsqueeze(1)
    soft = excess.sigmoid()
    hard = (excess > 0) | (excess == excess.amax(dim=1, keepdim=True))
    # Similarities over the row's largest: of columns that have nothing in common they would all be zero.
    relative = (divergence.amin(dim=1, keepdim=True) - divergence).exp()
    kept = relative * (hard.to(soft) - soft.detach() + soft)
    return kept / kept.sum(dim=1, keepdim=True)


def sample_distribution(own: torch.Tensor, other: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""
    Distribution sampling (Eq. 10): `C_i^x = sum_j w_ij M(C_j | C_i)`, where `M` replaces each value of column `i` by
    the value of the other modality's column `j` at which as large a share of that column lies above.

    This is quantile mapping. The value of rank `r` among `n` has the share `(n - r - 1/2) / n` above it; between the
    sorted values of the other column it is interpolated linearly. Equal values are ordered by position. Since `M`
    reads no more of `C_i` than ranks, the sum over `j` is one matrix product. The gradient reaches the values of the
    other side and the weights; ranks have none.

    Args:
        own (`torch.Tensor` of shape `(tokens, dim)`): Values of this side, which only give the order.
        other (`torch.Tensor` of shape `(others, dim)`): Values of the other side.
        weights (`torch.Tensor` of shape `(dim, dim)`): [`related_semantics`] of this side's columns.

    Returns:
        `torch.Tensor` of shape `(tokens, dim)`: this side's tokens in the other side's form.
    """
    ordered, last = other.sort(dim=0).values, len(other) - 1
    # `nn.functional.interpolate` has a gradient on GPUs that differs from run to run.
    places = (torch.arange(len(own), dtype=torch.float64, device=own.device) + 0.5) * len(other) / len(own) - 0.5
    places = places.clamp(0, last)
    below = places.floor().long()
    above = (below + 1).clamp(max=last)
    quantiles = ordered[below].lerp(ordered[above], (places - below).to(ordered).unsqueeze(1))
    mixed = quantiles @ weights.T
    return torch.zeros_like(mixed).scatter(0, own.argsort(dim=0, stable=True), mixed)


def semantic_loss(sampled: torch.Tensor, semantic: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Pulls every sampled token to its semantic token and pushes it from the others of its sample (Eq. 11), the mean over
    tokens. Printed with `exp(-cosine)`, which minimisation would turn round; this is InfoNCE of `exp(cosine)`.

    Args:
        sampled (`torch.Tensor` of shape `(batch, tokens, dim)`): Tokens in the other modality's form.
        semantic (`torch.Tensor` of shape `(batch, tokens, dim)`): Semantic components.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
    """
    sampled, semantic = (nn.functional.normalize(side, dim=-1, eps=MIN_NORM) for side in (sampled, semantic))
    cosine = sampled @ semantic.transpose(1, 2)
    cosine = cosine.masked_fill(~mask.unsqueeze(1), -torch.inf)
    own = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    # Divided here, since the mean over no token at all is NaN.
    return nn.functional.cross_entropy(cosine[mask], own[mask], reduction="sum") / mask.sum().clamp(min=1)


def modality_loss(modality: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Makes the modality components of all samples of a batch alike (Eq. 12): `1 - exp(-KL)`, the mean over all ordered
    pairs of samples. Printed as the sum of `exp(-KL)`, which is smallest when samples differ most. The divergence of
    two samples is the mean over their feature columns, taken as normal distributions: a sum over hundreds of columns
    would leave `exp` without gradient.

    Args:
        modality (`torch.Tensor` of shape `(batch, tokens, dim)`): Modality components.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens; a sample without any takes no part.
    """
    real = mask.any(dim=1)
    if not real.any():
        return 0.0 * modality.sum()
    mean, variance = column_moments(modality[real], mask[real])
    # `gaussian_divergence`, its mean over columns as matrix products: no tensor is `(batch, batch, dim)`. Only
    # differences of means count, and those of centred ones lose less to rounding.
    mean = mean - mean.mean(dim=0)
    inverse, log = 1 / variance, variance.log().sum(dim=1)
    scatter = (variance + mean.square()) @ inverse.T - 2 * mean @ (mean * inverse).T
    scatter = scatter + (mean.square() * inverse).sum(dim=1)
    divergence = (log[None] - log[:, None] + scatter - mean.shape[1]) / (2 * mean.shape[1])
    # Far from the others, rounding alone could make the divergence of two like samples negative, and `exp` infinite.
    return (1 - (-divergence.clamp(min=0)).exp()).mean()


def integrity_loss(tokens: torch.Tensor, rebuilt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    What is lost of the tokens when they are put together again from their components (Eqs. 13 and 14; the second
    prints `v_i` in the term of the texts, where `t_i` is meant): the squared distance, the mean over real tokens and
    features where the paper sums, so that neither the batch nor the width changes its weight. Tokens have unit root
    mean square, so it is the share that is lost.

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Token embeddings before decoupling.
        rebuilt (`torch.Tensor` of shape `(batch, tokens, dim)`): Weighted sum of their components.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
    """
    lost = (tokens - rebuilt)[mask].square()
    return lost.sum() / max(lost.numel(), 1)


__all__ = [
    "column_divergence",
    "column_moments",
    "gaussian_divergence",
    "integrity_loss",
    "modality_loss",
    "related_semantics",
    "sample_distribution",
    "semantic_loss",
]
