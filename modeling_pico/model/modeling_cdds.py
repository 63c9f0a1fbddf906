"""
CDDS model (arXiv 2603.05566): tokens are decoupled into semantic and modality components, and the semantic ones are
scored.

First the equations that are no network, as pure functions of tensors. Column `d` of a batch is the vector of feature
`d`'s values over all its real tokens. Some printed formulas do not do what the paper says of them; each repair is
documented where it is made.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .alignment_heads_pico import MIN_NORM, FineGrainedHead, TokenProjection
from .configuration_cdds import CddsConfig
from .modeling_pico import PicoModel
from .prototypes_pico import StylePrototypes


# Added to variances: the divergence of two columns stays finite where one of them is constant. Tokens have unit
# root mean square, so that it is a thousandth of a usual one.
VARIANCE_FLOOR = 1e-3


def column_moments(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and variance `(..., dim)` of each feature column of tokens `(..., tokens, dim)`, the latter raised by
    `VARIANCE_FLOOR`; `mask` `(..., tokens)` is True at tokens that count, all by default.
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

    This is quantile mapping, linear between the sorted values of the other column. Since `M` reads no more of `C_i`
    than ranks, the sum over `j` is one matrix product. The gradient reaches the values of the other side and the
    weights; ranks have none.

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


def _transformer_layer(config: CddsConfig) -> nn.TransformerEncoderLayer:
    """A layer of ViT's form at the width of the token embeddings."""
    dim = config.embedding_dim
    return nn.TransformerEncoderLayer(
        dim, config.unet_num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class SkipProjection(nn.Linear):
    """
    Linear map of a decoder layer's output and the encoder layer's it belongs to, `(..., 2 * dim)`, to `(..., dim)`. It
    starts as their mean, so that fresh components are close to the tokens that are decoupled and training starts near
    the fine-grained baseline *(ours)*.
    """


class Decoder(nn.Module):
    """Transformer layers, each followed by a [`SkipProjection`] (Eq. 3)."""

    def __init__(self, config: CddsConfig):
        super().__init__()
        dim = config.embedding_dim
        self.layers = nn.ModuleList(_transformer_layer(config) for _ in range(config.unet_num_layers))
        self.projections = nn.ModuleList(SkipProjection(2 * dim, dim) for _ in range(config.unet_num_layers))

    def forward(self, states: torch.Tensor, skips: list[torch.Tensor], padding: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(batch, tokens, dim)`): What is decoded.
            skips (`list[torch.Tensor]`): Outputs of the encoder's layers, of the same shape, in their order.
            padding (`torch.Tensor` of shape `(batch, tokens)`): True at tokens that attention passes over.
        """
        for layer, projection, skip in zip(self.layers, self.projections, reversed(skips), strict=True):
            states = projection(torch.cat([layer(states, src_key_padding_mask=padding), skip], dim=-1))
        return states


@dataclass
class EncodedTokens:
    """
    One modality's tokens on their way through a [`DualPathUNet`], noise groups stacked in the first dimension.

    Attributes:
        noisy (`torch.Tensor` of shape `(groups * batch, tokens, dim)`): What the decoders decode.
        skips (`list[torch.Tensor]`): Outputs of the encoder's layers, in the same shape.
        padding (`torch.Tensor` of shape `(groups * batch, tokens)`): True at tokens that attention passes over.
        groups (`int`): Number of groups.
    """

    noisy: torch.Tensor
    skips: list[torch.Tensor]
    padding: torch.Tensor
    groups: int


class DualPathUNet(nn.Module):
    """
    Decouples the tokens of one modality: a shared encoder (Eq. 1), noise that a transformer layer has given structure
    (Eq. 2), and one decoder each for semantic and modality components (Eq. 3), averaged over the noise groups (Eq. 4).

    The noise is drawn in training only. Evaluation has one group with noise zero, its mean, so that a sample always
    gets the same embeddings *(ours)*.
    """

    def __init__(self, config: CddsConfig):
        super().__init__()
        self.noise_groups = config.noise_groups
        self.encoder = nn.ModuleList(_transformer_layer(config) for _ in range(config.unet_num_layers))
        self.noise_layer = _transformer_layer(config)
        self.semantic_decoder = Decoder(config)
        self.modality_decoder = Decoder(config)

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> EncodedTokens:
        """
        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Token embeddings.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
        """
        # A sample without a real token attends to all of them: attention to none is no number.
        padding = ~mask & mask.any(dim=1, keepdim=True)
        states = tokens.to(next(self.parameters()).dtype)
        skips = []
        for layer in self.encoder:
            states = layer(states, src_key_padding_mask=padding)
            skips.append(states)
        groups = self.noise_groups if self.training else 1
        stacked, padding = states.repeat(groups, 1, 1), padding.repeat(groups, 1)
        if self.training:
            noise = self.noise_layer(torch.randn_like(stacked), src_key_padding_mask=padding)
        else:
            # Zero is alike at all tokens, and so is what the layer makes of it.
            noise = self.noise_layer(torch.zeros_like(states[:1, :1]), src_key_padding_mask=None)
        return EncodedTokens(stacked + noise, [skip.repeat(groups, 1, 1) for skip in skips], padding, groups)

    def decode(self, decoder: Decoder, encoded: EncodedTokens) -> torch.Tensor:
        """Components `(batch, tokens, dim)` in float32, the mean over the noise groups."""
        components = decoder(encoded.noisy, encoded.skips, encoded.padding).float()
        return components.unflatten(0, (encoded.groups, -1)).mean(dim=0)


@dataclass
class DecoupledSide:
    """
    What the losses need of one modality.

    Attributes:
        tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Token embeddings before decoupling.
        semantic (`torch.Tensor` of shape `(batch, tokens, dim)`): Semantic components.
        encoded ([`EncodedTokens`]): For the modality components, which nothing but the losses needs.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at real tokens.
    """

    tokens: torch.Tensor
    semantic: torch.Tensor
    encoded: EncodedTokens
    mask: torch.Tensor


class CddsHead(FineGrainedHead):
    """
    Scores semantic components; with `semantic_probability`, weighted by PICO's style prototypes.

    Token embeddings enter the networks, and the losses, with unit root mean square: their scale is fixed, since the
    loss of information (Eqs. 13 and 14) could else be reduced by shrinking them *(ours)*.
    """

    def __init__(self, config: CddsConfig):
        super().__init__(config)
        self.image_unet = DualPathUNet(config)
        self.text_unet = DualPathUNet(config)
        # alpha of Eq. 7, and w_m, w_s and w_x of Eqs. 13 and 14.
        self.image_threshold = nn.Parameter(torch.empty(config.embedding_dim))
        self.text_threshold = nn.Parameter(torch.empty(config.embedding_dim))
        self.component_weights = nn.Parameter(torch.empty(3))
        self.style_prototypes = None
        if config.semantic_probability:
            self.style_prototypes = nn.ModuleDict({side: StylePrototypes(config) for side in ("image", "text")})

    def embed(self, token_states, mask, class_state, modality):
        unet = self.image_unet if modality == "image" else self.text_unet
        tokens = self.project(token_states, modality) * self.config.embedding_dim**0.5
        encoded = unet.encode(tokens, mask)
        semantic = unet.decode(unet.semantic_decoder, encoded)
        scored = nn.functional.normalize(semantic, dim=-1, eps=MIN_NORM) * mask.unsqueeze(-1)
        return scored, mask, DecoupledSide(tokens, semantic, encoded, mask)

    def weight(self, tokens, mask, modality):
        if self.style_prototypes is None:
            return tokens, None
        return self.style_prototypes[modality].weight_tokens(tokens, mask)

    def auxiliary_losses(self, image: DecoupledSide, text: DecoupledSide) -> dict[str, torch.Tensor]:
        """
        The terms of the printed objective, `a_s L_s + a_m L_m + a_f L_f + (1 - a_f) L_x` (Eq. 15), each the sum of
        that of the images and that of the texts.

        Args:
            image: The images of this process's batch, decoupled.
            text: Its texts; they need not be as many.
        """
        image_modality = self.image_unet.decode(self.image_unet.modality_decoder, image.encoded)
        text_modality = self.text_unet.decode(self.text_unet.modality_decoder, text.encoded)
        with torch.autocast(image.tokens.device.type, enabled=False):
            sampled_images, sampled_texts = self._sample(image, text)
            sides = ((image, image_modality, sampled_images), (text, text_modality, sampled_texts))
            # Without a token on the other side nothing was sampled.
            both = image.mask.any() & text.mask.any()
            w_m, w_s, w_x = self.component_weights.float()
            terms = [
                (
                    semantic_loss(sampled, side.semantic, side.mask & both),
                    modality_loss(modality, side.mask),
                    integrity_loss(side.tokens, w_m * modality + w_s * side.semantic, side.mask),
                    integrity_loss(side.tokens, w_m * modality + w_x * sampled, side.mask & both),
                )
                for side, modality, sampled in sides
            ]
        share = self.config.integrity_weight
        weights = {
            "semantic": self.config.semantic_weight,
            "modality": self.config.modality_weight,
            "integrity": share,
            "sampled_integrity": 1 - share,
        }
        return {
            name: weight * (of_images + of_texts)
            for (name, weight), of_images, of_texts in zip(weights.items(), *terms, strict=True)
        }

    def _sample(self, image: DecoupledSide, text: DecoupledSide) -> tuple[torch.Tensor, torch.Tensor]:
        """
        V_x and T_x: the semantic components of either side in the form of the other; zero at padding, and where the
        other side has no real token.
        """
        image_values, text_values = image.semantic[image.mask], text.semantic[text.mask]
        if not len(image_values) or not len(text_values):
            # Nothing to estimate a distribution from. The thresholds stay in the graph: DDP waits for their gradient.
            nothing = 0.0 * (self.image_threshold.sum() + self.text_threshold.sum())
            return 0.0 * image.semantic + nothing, 0.0 * text.semantic + nothing
        divergence = column_divergence(image_values, text_values)
        image_weights = related_semantics(divergence, self.image_threshold.float())
        text_weights = related_semantics(divergence.T, self.text_threshold.float())
        sampled_images = sample_distribution(image_values, text_values, image_weights)
        sampled_texts = sample_distribution(text_values, image_values, text_weights)
        return (
            torch.zeros_like(image.semantic).masked_scatter(image.mask.unsqueeze(-1), sampled_images),
            torch.zeros_like(text.semantic).masked_scatter(text.mask.unsqueeze(-1), sampled_texts),
        )


class CddsModel(PicoModel):
    r"""
    Two-tower vision-language model that decouples the tokens of both modalities into semantic and modality components
    and scores the semantic ones, patch by word (CDDS, arXiv 2603.05566).

    Loads, trains, evaluates and exports as [`PicoModel`] does. In training mode outputs carry the losses of the
    decoupling as `auxiliary_loss`. They are over the batch of one process.

    Args:
        config ([`CddsConfig`]): Configuration; all weights are fresh.
        vision_model (`PreTrainedModel`, *optional*): Vision backbone to use instead of a fresh one.
        text_model (`PreTrainedModel`, *optional*): Text backbone to use instead of a fresh one.
    """

    config: CddsConfig
    config_class = CddsConfig
    base_model_prefix = "cdds"
    alignment_head: CddsHead
    head_classes = {"cdds": CddsHead}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CddsHead):
            for threshold in (module.image_threshold, module.text_threshold):
                init.constant_(threshold, self.config.threshold_init)
            init.constant_(module.component_weights, 0.5)
        elif isinstance(module, SkipProjection):
            half = torch.eye(module.out_features, device=module.weight.device) / 2
            init.copy_(module.weight, half.repeat(1, 2))
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)) and not isinstance(
            module, TokenProjection
        ):
            PreTrainedModel._init_weights(self, module)
        else:
            super()._init_weights(module)
