"""Configuration of PICO: two backbone configurations and every switch of the alignment head."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig


POOLINGS = ("mean", "class_token")
COLUMN_MODES = ("moments", "quantile")
STYLE_PROBABILITIES = ("style_rates", "purity")
LOSS_TYPES = ("infonce", "hinge")

# The options of the literal reconstruction of the paper: no part of the weights is learned.
PICO_LITERAL: dict[str, Any] = {
    "method": "pico",
    "column_mode": "quantile",
    "style_probability": "purity",
}

CHOICES = {
    "pooling": POOLINGS,
    "column_mode": COLUMN_MODES,
    "style_probability": STYLE_PROBABILITIES,
    "loss_type": LOSS_TYPES,
}
# Smallest and largest values. The upper ones are far beyond any use: what exceeds them is a mistake, or meant to
# exhaust memory.
_BOUNDS = {
    "embedding_dim": (1, 2**16),
    "num_style_prototypes": (1, 2**16),
    "column_length": (2, 2**16),
    "margin": (0, 1e30),
    "logit_scale_init_value": (-1e30, 1e30),
}
_UNCERTAINTY_BOUNDS = {
    "num_prototypes": (1, 2**16),
    "temperature": (1e-6, 1e30),
    "weight": (0, 1e30),
    "diversity_weight": (0, 1e30),
}


@strict
@dataclass
class UncertaintyConfig:
    r"""
    Options of the uncertainty of images and texts. Method: PAU, "Prototype-based Aleatoric Uncertainty"
    (arXiv 2309.17093).

    Args:
        num_prototypes (`int`, *optional*, defaults to 8):
            Prototypes of each modality.
        temperature (`float`, *optional*, defaults to 5.0):
            Divides the logits of evidence (tau of PAU).
        weight (`float`, *optional*, defaults to 100.0):
            Weight in the loss of the difference between uncertainty and its target.
        diversity_weight (`float`, *optional*, defaults to 0.015):
            Weight in the loss of the similarity of prototypes to one another.
        gradient (`bool`, *optional*, defaults to `True`):
            Whether the loss trains the embeddings too, as in PAU, or the prototypes alone *(ours)*.
        reranking (`dict`, *optional*):
            Weights by which the uncertainty re-ranks scores, as learned on validation data.
    """

    num_prototypes: int = 8
    temperature: int | float = 5.0
    weight: int | float = 100.0
    diversity_weight: int | float = 0.015
    gradient: bool = True
    reranking: dict | None = None

    def validate_options(self):
        """Checks every option."""
        check_bounds(vars(self), _UNCERTAINTY_BOUNDS)
        check_bounds(self.reranking or {}, dict.fromkeys(self.reranking or {}, (-1e30, 1e30)))


@strict
class PicoConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PicoModel`]: a vision and a text backbone and the alignment head between them and the score.

    Method: PICO, "Reliable Cross-modal Alignment via Prototype Iterative Construction" (arXiv 2510.11175). Where the
    paper's formula is not published, the form is our reconstruction; those options are marked *(ours)*. The literal
    reconstruction is `PicoConfig(**PICO_LITERAL)`.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a `ViTConfig`):
            Configuration of the vision backbone.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a `BertConfig`):
            Configuration of the text backbone.
        embedding_dim (`int`, *optional*, defaults to 512):
            Number of features (feature columns) of a token embedding.
        projection_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of hidden states to token embeddings have a bias, as those of BLIP and ALIGN do.
        method (`str`, *optional*, defaults to `"pico"`):
            The alignment head, a name in `PicoModel.head_classes`: `"pico"`, a patch-by-word score with every feature
            column weighted by its semantic probability; `"fine_grained"`, the same score without weights;
            `"instance_norm"`, the same with the mean of each feature column subtracted (style as a column's mean:
            instance normalisation, arXiv 1607.08022); `"clip_style"`, the cosine of two pooled vectors.
        pooling (`str`, *optional*, defaults to `"mean"`):
            What `"clip_style"` scores: `"mean"` over a sample's tokens, or `"class_token"` (CLS; end of text for CLIP
            text towers; the mean where the backbone has no such token). The other heads do not use it.
        vision_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether CLS and register tokens take part in the fine-grained score.
        text_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether the first and the last token of a text (CLS and SEP, begin and end of text) take part.
        num_style_prototypes (`int`, *optional*, defaults to 16):
            Style prototypes of each modality.
        column_mode (`str`, *optional*, defaults to `"moments"`):
            How a feature column is described *(ours)*: its mean and standard deviation, what image stylisation takes
            for style (`"moments"`); or its sorted values at `column_length` points (`"quantile"`).
        column_length (`int`, *optional*, defaults to 16):
            Points of a `"quantile"` column; `"moments"` has two values.
        style_probability (`str`, *optional*, defaults to `"style_rates"`):
            How a column's style probability follows from the prototypes *(ours)*: soft assignment times style rates of
            the prototypes that are learned for every feature and start neutral (`"style_rates"`), or times the rate
            that was measured for each prototype, without gradient (`"purity"`).
        loss_type (`str`, *optional*, defaults to `"infonce"`):
            `"infonce"` with learned temperature, or `"hinge"` with hardest in-batch negatives.
        margin (`float`, *optional*, defaults to 0.2):
            Margin of the hinge loss.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Initial logarithm of the inverse temperature of InfoNCE; clamped to ln 100 in training.
        uncertainty_config (`dict`, *optional*):
            Options of [`UncertaintyConfig`], with which a model of any method also learns how uncertain images and
            texts are. By default it does not.

    Example:

    ```python
    >>> from transformers import BertConfig, ViTConfig
    >>> from modeling_pico import PicoConfig, PicoModel

    >>> config = PicoConfig(vision_config=ViTConfig(), text_config=BertConfig(), num_style_prototypes=8)
    >>> model = PicoModel(config)
    ```
    """

    model_type = "pico"
    # The older form of composite configurations: files on the Hub then load with transformers before 5.20 as well.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # Weight of the loss of the pairs beside auxiliary losses; types of models with such losses say otherwise.
    ranking_weight = 1.0
    keys_to_ignore_at_inference = [
        "image_embeds",
        "text_embeds",
        "image_tokens",
        "text_tokens",
        "image_mask",
        "text_mask",
        "image_semantic_probability",
        "text_semantic_probability",
        "image_uncertainty",
        "text_uncertainty",
        "auxiliary_loss",
        "auxiliary_losses",
        "vision_model_output",
        "text_model_output",
    ]

    if TYPE_CHECKING:
        # What they are once the configuration is made.
        vision_config: PreTrainedConfig
        text_config: PreTrainedConfig
    else:
        vision_config: PreTrainedConfig | dict | None = None
        text_config: PreTrainedConfig | dict | None = None
    embedding_dim: int = 512
    projection_bias: bool = False
    method: str = "pico"
    pooling: str = "mean"
    vision_special_tokens: bool = True
    text_special_tokens: bool = True
    num_style_prototypes: int = 16
    column_mode: str = "moments"
    column_length: int = 16
    style_probability: str = "style_rates"
    loss_type: str = "infonce"
    margin: int | float = 0.2
    logit_scale_init_value: int | float = 2.6592
    uncertainty_config: dict | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = _backbone_config(self.vision_config, "vision_config", "vit")
        self.text_config = _backbone_config(self.text_config, "text_config", "bert")
        # Any other name becomes an attribute; this would shadow what the type of model says.
        if "ranking_weight" in kwargs:
            raise ValueError(f"`ranking_weight` is no option of {type(self).__name__}.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As `PreTrainedConfig.from_dict`. Of another type of model, its head and what it alone knows is left out."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            known = {option.name for option in fields(cls)} - {"method"}
            config_dict = {name: value for name, value in config_dict.items() if name in known}
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Refuses a wrong option with the values that are allowed. (The model checks `method`: it knows the heads.)"""
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, but got {value!r}.")
        check_bounds(vars(self), _BOUNDS)
        if self.uncertainty_config is not None:
            try:
                UncertaintyConfig(**self.uncertainty_config)
            except (TypeError, StrictDataclassError) as error:
                options = ", ".join(option.name for option in fields(UncertaintyConfig))
                raise ValueError(
                    f"`uncertainty_config` is wrong: {error.__cause__ or error}. Its options are {options}."
                ) from error

    @property
    def uses_prototypes(self) -> bool:
        """Whether the model has style prototypes."""
        return self.method == "pico"

    @property
    def column_size(self) -> int:
        """Numbers that describe one feature column."""
        return 2 if self.column_mode == "moments" else self.column_length


def check_bounds(options: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]]) -> None:
    """ValueError for an option outside of its smallest and largest value, as NaN is."""
    for name, (smallest, largest) in bounds.items():
        if not smallest <= options[name] <= largest:
            raise ValueError(f"`{name}` must be from {smallest} to {largest}, but got {options[name]!r}.")


def _backbone_config(config: PreTrainedConfig | dict | None, name: str, default_type: str) -> PreTrainedConfig:
    if config is None:
        return AutoConfig.for_model(default_type)
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError(f"`{name}` must contain `model_type` (such as {default_type!r}), but has {sorted(config)}.")
    return AutoConfig.for_model(**config)
