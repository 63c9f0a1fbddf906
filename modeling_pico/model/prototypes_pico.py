"""
Style prototypes and the semantic probability of feature columns.

Column `d` of one sample is the vector of feature `d`'s values over that sample's tokens. Style prototypes are
centroids of such columns; how a column relates to them gives the probability that it carries style, and one minus
that is its semantic probability. Method: PICO (arXiv 2510.11175); what the paper leaves open is marked *ours*.

Everything here is a pure function of tensors, except [`StylePrototypes`], which holds the state as buffers.
"""

from __future__ import annotations

import torch
from torch import nn

from .configuration_pico import PicoConfig
from .feature_columns_pico import column_weights, feature_columns


STAGE_PLAIN, STAGE_INITIAL, STAGE_UPDATED = 0, 1, 2
"""Plain alignment; first prototypes in use; prototypes updated by performance feedback."""


def sign_shares(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Shares of a sample's real tokens at which each feature is positive, and at which it is negative.

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Token embeddings; only their signs matter.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.

    Returns:
        `torch.Tensor` of shape `(batch, 2, dim)` in float32: positive and negative shares.
    """
    real = mask.bool().float().unsqueeze(1)  # (batch, 1, tokens)
    signs = tokens.detach().sign().float()
    # Positive minus negative, and positive plus negative: two products instead of four passes over the tokens.
    difference = real @ signs
    total = real @ signs.abs_()
    return torch.cat([total + difference, total - difference], dim=1) / 2 / real.sum(dim=2, keepdim=True).clamp(min=1)


def sign_agreement(
    image_tokens: torch.Tensor, image_mask: torch.Tensor, text_tokens: torch.Tensor, text_mask: torch.Tensor
) -> torch.Tensor:
    r"""
    Share of positive products `v_id * t_jd` of each matched pair, `1/(nv*nt) * sum_ij [v_id * t_jd > 0]` (PICO). Its
    mean over pairs is the pseudo-semantic probability of feature column `d`.

    It equals `a+ b+ + a- b-` with the shares of positive and negative values on either side, so no
    `(patches, words, dim)` tensor is needed.

    Args:
        image_tokens (`torch.Tensor` of shape `(batch, patches, dim)`): Token embeddings of the images.
        image_mask (`torch.Tensor` of shape `(batch, patches)`): True at real tokens.
        text_tokens (`torch.Tensor` of shape `(batch, words, dim)`): Token embeddings of their texts.
        text_mask (`torch.Tensor` of shape `(batch, words)`): True at real tokens.

    Returns:
        `torch.Tensor` of shape `(batch, dim)` in float32.
    """
    return (sign_shares(image_tokens, image_mask) * sign_shares(text_tokens, text_mask)).sum(dim=1)


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
    r"""
    Probability that a feature column carries style: the style rates of the prototypes, weighted by how near the column
    is to each *(ours)*.

    Args:
        columns (`torch.Tensor` of shape `(..., length)`): The columns.
        prototypes (`torch.Tensor` of shape `(prototypes, length)`): Style prototypes.
        style_rate (`torch.Tensor` of shape `(prototypes,)`): Mean pseudo-style probability of each cluster.
        scale (`torch.Tensor` of shape `(length,)`): Unit of each coordinate.
        temperature (`torch.Tensor`, scalar): Mean squared distance of a column to its nearest prototype.

    Returns:
        `torch.Tensor` of shape `(...)`, values in [0, 1].
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
        Args:
            columns (`torch.Tensor` of shape `(batch, dim, length)`): The columns.
            prototypes (`torch.Tensor` of shape `(prototypes, length)`): Style prototypes.
            scale (`torch.Tensor` of shape `(length,)`): Unit of each coordinate.
            temperature (`torch.Tensor`, scalar): Mean squared distance of a column to its nearest prototype.

        Returns:
            `torch.Tensor` of shape `(batch, dim)`: semantic probability in (0, 1).
        """
        # The squared length of the column is the same for all prototypes and cancels in the softmax.
        unit = scale.square() * temperature
        nearness = nn.functional.linear(columns, 2 * prototypes / unit, -(prototypes.square() / unit).sum(dim=-1))
        style = (nearness.softmax(dim=-1) * self.rate.float()).sum(dim=-1)
        return (self.bias.float() - self.gain * style).sigmoid()


class StylePrototypes(nn.Module):
    r"""
    Style prototypes of both modalities and all state of their staged construction, as persistent buffers.

    A checkpoint therefore carries its prototypes. Before the first construction (`stage` 0) all weights are exactly 1.

    Buffers, with `K` prototypes, columns of `L` values and `D` features:
        visual_prototypes, textual_prototypes `(K, L)`: centroids of feature columns.
        visual_style_rate, textual_style_rate `(K,)`: mean pseudo-style probability of each cluster.
        visual_column_scale, textual_column_scale `(L,)`: unit of each coordinate of a column.
        visual_temperature, textual_temperature: mean squared distance of a column to its nearest prototype.
        pseudo_semantic_probability `(D,)`: of each feature column, from the last construction.
        stage, num_constructions (int64): stage, and how many constructions went into the prototypes.
        feedback_log_sum: log of the sum of `exp(gain / kappa)` over these constructions.
        matched_sum `(D,)`, matched_count: [`sign_agreement`] of matched pairs since the last construction, summed.
    """

    visual_prototypes: torch.Tensor
    textual_prototypes: torch.Tensor
    visual_style_rate: torch.Tensor
    textual_style_rate: torch.Tensor
    visual_column_scale: torch.Tensor
    textual_column_scale: torch.Tensor
    visual_temperature: torch.Tensor
    textual_temperature: torch.Tensor
    pseudo_semantic_probability: torch.Tensor
    stage: torch.Tensor
    num_constructions: torch.Tensor
    feedback_log_sum: torch.Tensor
    matched_sum: torch.Tensor
    matched_count: torch.Tensor

    def __init__(self, config: PicoConfig):
        super().__init__()
        self.config = config
        num_prototypes, length, dim = config.num_style_prototypes, config.column_size, config.embedding_dim
        for side in ("visual", "textual"):
            self.register_buffer(f"{side}_prototypes", torch.zeros(num_prototypes, length))
            self.register_buffer(f"{side}_style_rate", torch.zeros(num_prototypes))
            self.register_buffer(f"{side}_column_scale", torch.ones(length))
            self.register_buffer(f"{side}_temperature", torch.ones(()))
        self.register_buffer("pseudo_semantic_probability", torch.ones(dim))
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_constructions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("feedback_log_sum", torch.full((), -torch.inf))
        self.register_buffer("matched_sum", torch.zeros(dim))
        self.register_buffer("matched_count", torch.zeros(()))
        if config.style_probability == "style_rates":
            self.visual_rates = StyleRates(config)
            self.textual_rates = StyleRates(config)

    def initial_buffers(self) -> dict[str, float]:
        """Value that each buffer has before training."""
        ones = ("column_scale", "temperature", "pseudo_semantic_probability")
        values = {name: 1.0 if name.endswith(ones) else 0.0 for name, _ in self.named_buffers(recurse=False)}
        values["feedback_log_sum"] = -torch.inf
        return values

    def columns(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Feature columns `(batch, dim, length)` of tokens `(batch, tokens, dim)`, as this model describes them."""
        return feature_columns(tokens, mask, self.config.column_mode, self.config.column_size)

    def semantic_probability(self, tokens: torch.Tensor, mask: torch.Tensor, modality: str) -> torch.Tensor:
        r"""
        Semantic probability of each feature column of each sample.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Normalised token embeddings before weighting.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
            modality (`str`): `"image"` or `"text"`.

        Returns:
            `torch.Tensor` of shape `(batch, dim)` in float32, values in [0, 1]. Before the first construction the
            result is constant.
        """
        side = {"image": "visual", "text": "textual"}[modality]
        # In float32 also where the whole model was cast to another type.
        names = ("prototypes", "style_rate", "column_scale", "temperature")
        prototypes, rate, scale, temperature = (getattr(self, f"{side}_{name}").float() for name in names)
        if self.config.style_probability == "style_rates":
            rates = self.visual_rates if modality == "image" else self.textual_rates
            probability = rates(self.columns(tokens, mask), prototypes, scale, temperature)
        else:
            columns = self.columns(tokens.detach(), mask)
            probability = 1 - style_probability(columns, prototypes, rate, scale, temperature)
        # `torch.where` and no branch: the stage lives on the device, and every parameter keeps a (zero) gradient.
        return torch.where(self.stage > STAGE_PLAIN, probability, torch.ones_like(probability))

    def weight_tokens(
        self, tokens: torch.Tensor, mask: torch.Tensor, modality: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Folds the column weights into one side's tokens: `s_ij = sum_d p_d v_id t_jd = <p_v v_i, p_t t_j>`.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Normalised token embeddings.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
            modality (`str`): `"image"` or `"text"`.

        Returns:
            Score-ready tokens `(batch, tokens, dim)` and the semantic probability `(batch, dim)`.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            probability = self.semantic_probability(tokens, mask, modality)
            weights = column_weights(probability)
            return tokens * weights.unsqueeze(1), probability

    @torch.no_grad()
    def add_agreement(self, agreement: torch.Tensor, valid: torch.Tensor) -> None:
        """
        Adds one batch of all processes to the running statistics.

        Args:
            agreement (`torch.Tensor` of shape `(batch, dim)`): [`sign_agreement`] of the pairs.
            valid (`torch.Tensor` of shape `(batch,)`): True where both sides of the pair have a real token.
        """
        self.matched_sum += (agreement * valid[:, None]).sum(dim=0)
        self.matched_count += valid.sum()

    def pseudo_probability(self) -> torch.Tensor:
        """Pseudo-semantic probability `(dim,)`: mean agreement of the pairs seen since the last construction."""
        return self.matched_sum / self.matched_count.clamp(min=1)

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Starts a new collection of statistics of pairs."""
        self.matched_sum.zero_()
        self.matched_count.zero_()


__all__ = [
    "StyleRates",
    "StylePrototypes",
    "column_weights",
    "feature_columns",
    "sign_agreement",
    "sign_shares",
    "squared_distances",
    "style_probability",
]
