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

from .backbones_pico import num_prefix_tokens
from .configuration_pico import NUM_COLUMN_STATISTICS, PicoConfig
from .feature_columns_pico import column_weights, feature_columns
from .pseudo_probability_pico import best_aligned_agreement, pseudo_semantic_probability, sign_agreement, sign_shares


STAGE_PLAIN, STAGE_INITIAL, STAGE_UPDATED = 0, 1, 2
"""Plain alignment; first prototypes in use; prototypes updated by performance feedback."""


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
    form: str,
) -> torch.Tensor:
    r"""
    Probability that a feature column carries style, by a fixed form *(ours)*.

    Args:
        columns (`torch.Tensor` of shape `(..., length)`): The columns.
        prototypes (`torch.Tensor` of shape `(prototypes, length)`): Style prototypes.
        style_rate (`torch.Tensor` of shape `(prototypes,)`): Mean pseudo-style probability of each cluster.
        scale (`torch.Tensor` of shape `(length,)`): Unit of each coordinate.
        temperature (`torch.Tensor`, scalar): Mean squared distance of a column to its nearest prototype.
        form (`str`): `"purity"`, `"nearest"` or `"cosine"`.

    Returns:
        `torch.Tensor` of shape `(...)`, values in [0, 1].
    """
    if form == "cosine":
        similarity = nn.functional.normalize(columns / scale, dim=-1) @ nn.functional.normalize(prototypes / scale).T
        return similarity.amax(dim=-1).clamp(0, 1)
    distances = squared_distances(columns, prototypes, scale) / temperature
    if form == "purity":
        return (-distances).softmax(dim=-1) @ style_rate
    if form == "nearest":
        return (-distances.amin(dim=-1)).exp()
    raise ValueError(f"the fixed forms are 'purity', 'nearest', 'cosine', but got {form!r}.")


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


class ColumnComparator(nn.Module):
    """
    Small network, shared by all columns of a modality, that gives a column's semantic probability *(ours)*.

    Its inputs are `log(1 + distance² / temperature)` to each prototype, smooth also where a column meets a prototype,
    and on request the column's four statistics; or, as a free gate, these statistics alone. It starts constant, that
    is, with weights of exactly one.
    """

    def __init__(self, config: PicoConfig):
        super().__init__()
        reads_prototypes = config.comparator == "network"
        num_inputs = config.num_style_prototypes if reads_prototypes else 0
        if config.comparator_statistics or not reads_prototypes:
            num_inputs += NUM_COLUMN_STATISTICS
        self.hidden_weight = nn.Parameter(torch.empty(config.comparator_hidden_size, num_inputs))
        self.hidden_bias = nn.Parameter(torch.empty(config.comparator_hidden_size))
        self.output_weight = nn.Parameter(torch.empty(1, config.comparator_hidden_size))
        self.output_bias = nn.Parameter(torch.empty(1))

    def forward(self, distances: torch.Tensor | None, statistics: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            distances (`torch.Tensor` of shape `(..., prototypes)`, *optional*):
                Squared distances divided by the temperature.
            statistics (`torch.Tensor` of shape `(..., 4)`, *optional*): The column's statistics.

        Returns:
            `torch.Tensor` of shape `(...)`: semantic probability in (0, 1).
        """
        features = [] if distances is None else [torch.log1p(distances)]
        if statistics is not None:
            features.append(statistics)
        hidden = nn.functional.gelu(
            nn.functional.linear(torch.cat(features, dim=-1), self.hidden_weight.float(), self.hidden_bias.float())
        )
        logit = nn.functional.linear(hidden, self.output_weight.float(), self.output_bias.float())
        return logit.squeeze(-1).sigmoid()


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
        matched_sum, mismatched_sum `(D,)`, matched_count, mismatched_count: statistics of pairs since the
            last construction (`probability_estimator="best_aligned"` leaves those of mismatched pairs at 0, and
            `"meaning_share"`, which reads columns alone, all of them).
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
    mismatched_sum: torch.Tensor
    matched_count: torch.Tensor
    mismatched_count: torch.Tensor

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
        self.register_buffer("mismatched_sum", torch.zeros(dim))
        self.register_buffer("matched_count", torch.zeros(()))
        self.register_buffer("mismatched_count", torch.zeros(()))
        if config.style_probability == "learned":
            comparator = StyleRates if config.comparator == "style_rates" else ColumnComparator
            self.visual_comparator = comparator(config)
            self.textual_comparator = comparator(config)

    def initial_buffers(self) -> dict[str, float]:
        """Value that each buffer has before training."""
        ones = ("column_scale", "temperature", "pseudo_semantic_probability")
        values = {name: 1.0 if name.endswith(ones) else 0.0 for name, _ in self.named_buffers(recurse=False)}
        values["feedback_log_sum"] = -torch.inf
        return values

    def is_weighted(self, modality: str) -> bool:
        """Whether the columns of this side are weighted, by `config.probability_combination`."""
        return self.config.probability_combination in ("product", modality)

    def columns(self, tokens: torch.Tensor, mask: torch.Tensor, modality: str) -> torch.Tensor:
        """Feature columns `(batch, dim, length)` of tokens `(batch, tokens, dim)`, as this model describes them."""
        config = self.config
        if modality == "text":
            return feature_columns(tokens, mask, config.textual_column_mode, config.column_size)
        if config.column_mode == "position":
            # The grid is what remains without the leading special tokens.
            first = num_prefix_tokens(config.vision_config) if config.vision_special_tokens else 0
            tokens, mask = tokens[:, first:], mask[:, first:]
        return feature_columns(tokens, mask, config.column_mode, config.column_size)

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
        config = self.config
        learned = config.style_probability == "learned"
        keep_gradient = learned if config.probability_gradient is None else config.probability_gradient
        if not keep_gradient:
            tokens = tokens.detach()
        if config.style_probability == "global":
            probability = self.pseudo_semantic_probability.float().expand(len(tokens), -1)
        elif learned and config.comparator == "free_gate":
            # Without prototypes there is nothing to wait for.
            return self._comparator(modality)(None, feature_columns(tokens, mask, "statistics"))
        else:
            columns = self.columns(tokens, mask, modality)
            side = {"image": "visual", "text": "textual"}[modality]
            # In float32 also where the whole model was cast to another type.
            names = ("prototypes", "style_rate", "column_scale", "temperature")
            prototypes, rate, scale, temperature = (getattr(self, f"{side}_{name}").float() for name in names)
            if not learned:
                style = style_probability(columns, prototypes, rate, scale, temperature, config.style_probability)
                probability = 1 - style
            elif config.comparator == "style_rates":
                probability = self._comparator(modality)(columns, prototypes, scale, temperature)
            else:
                distances = squared_distances(columns, prototypes, scale) / temperature
                statistics = None
                if config.comparator_statistics:
                    statistics = feature_columns(tokens, mask, "statistics")
                probability = self._comparator(modality)(distances, statistics)
        # `torch.where` and no branch: the stage lives on the device, and every parameter keeps a (zero) gradient.
        return torch.where(self.stage > STAGE_PLAIN, probability, torch.ones_like(probability))

    def _comparator(self, modality: str) -> nn.Module:
        return self.visual_comparator if modality == "image" else self.textual_comparator

    def weight_tokens(
        self, tokens: torch.Tensor, mask: torch.Tensor, modality: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Folds the column weights into one side's tokens: `s_ij = sum_d p_d v_id t_jd = <p_v v_i, p_t t_j>`.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Normalised token embeddings.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
            modality (`str`): `"image"` or `"text"`.

        Returns:
            Score-ready tokens `(batch, tokens, dim)` and the semantic probability `(batch, dim)`, None for a side that
            is not weighted.
        """
        if not self.is_weighted(modality):
            return tokens, None
        with torch.autocast(tokens.device.type, enabled=False):
            probability = self.semantic_probability(tokens, mask, modality)
            weights = column_weights(probability, self.config.sharpness)
            return tokens * weights.unsqueeze(1), probability

    @torch.no_grad()
    def pair_shares(
        self, image_tokens: torch.Tensor, image_mask: torch.Tensor, text_tokens: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        What the estimator of the pseudo-semantic probability has to know of each matched pair: the [`sign_shares`] of
        both sides, `(batch, 4, dim)`, or the [`best_aligned_agreement`], `(batch, 1, dim)`. For the arguments see
        there.
        """
        estimator = self.config.probability_estimator
        if estimator == "best_aligned":
            return best_aligned_agreement(image_tokens, image_mask, text_tokens, text_mask).unsqueeze(1)
        sides = ((image_tokens, image_mask), (text_tokens, text_mask))
        return torch.cat([sign_shares(*side, by_magnitude=estimator == "magnitude") for side in sides], dim=1)

    @torch.no_grad()
    def add_pair_shares(self, shares: torch.Tensor, valid: torch.Tensor, ids: torch.Tensor) -> None:
        """
        Adds one batch of all processes to the running statistics.

        Args:
            shares (`torch.Tensor` of shape `(batch, 4 or 1, dim)`): [`pair_shares`] of all processes.
            valid (`torch.Tensor` of shape `(batch,)`): True where both sides of the pair have a real token.
            ids (`torch.Tensor` of shape `(batch,)`): Identity of the meaning.
        """
        if self.config.probability_estimator == "best_aligned":
            # Mismatched pairs would have to be aligned first, and this estimator does not ask for them.
            self.matched_sum += (shares[:, 0] * valid[:, None]).sum(dim=0)
            self.matched_count += valid.sum()
            return
        image_shares, text_shares = shares.chunk(2, dim=1)
        sums = sign_agreement(image_shares, text_shares, valid, ids)
        names = ("matched_sum", "mismatched_sum", "matched_count", "mismatched_count")
        for name, value in zip(names, sums, strict=True):
            getattr(self, name).add_(value)

    def pseudo_probability(self) -> torch.Tensor:
        """Pseudo-semantic probability `(dim,)` of the statistics collected since the last construction."""
        return pseudo_semantic_probability(
            self.matched_sum / self.matched_count.clamp(min=1),
            self.mismatched_sum / self.mismatched_count.clamp(min=1),
            self.config.probability_estimator,
        )

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Starts a new collection of statistics of pairs."""
        for name in ("matched_sum", "mismatched_sum", "matched_count", "mismatched_count"):
            getattr(self, name).zero_()


__all__ = [
    "ColumnComparator",
    "StyleRates",
    "StylePrototypes",
    "column_weights",
    "feature_columns",
    "squared_distances",
    "style_probability",
]
