"""Configuration of CDDS: that of PICO, with the decoupling network and the weights of its losses."""

import math
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict

from .configuration_pico import PicoConfig, check_bounds


# Smallest and largest values. The upper ones are far beyond any use: what exceeds them is a mistake, or meant to
# exhaust memory.
_BOUNDS = {
    "unet_num_layers": (1, 256),
    "unet_num_heads": (1, 2**16),
    "noise_groups": (1, 1000),
    "threshold_init": (-1e30, 1e30),
    "semantic_weight": (0, 1e30),
    "modality_weight": (0, 1e30),
    "integrity_weight": (0, 1),
    "ranking_weight": (0, 1e30),
}


@strict
class CddsConfig(PicoConfig):
    r"""
    Configuration of a [`CddsModel`].

    Method: CDDS (arXiv 2603.05566). The paper publishes neither the number of noise groups nor the weights of the
    losses; those defaults are ours.

    Args:
        method (`str`, *optional*, defaults to `"cdds"`):
            The only one of this type of model.
        unet_num_layers (`int`, *optional*, defaults to 2):
            Transformer layers of the encoder and of each decoder.
        unet_num_heads (`int`, *optional*):
            Attention heads of these layers; must divide `embedding_dim`. By default 8, fewer where they would be
            narrower than 16 features.
        noise_groups (`int`, *optional*, defaults to 2):
            Noisy copies over which components are averaged in training (z). Evaluation is without noise.
        threshold_init (`float`, *optional*, defaults to 1.0):
            Initial value of every column's learned threshold: standard deviations above the mean relation from which
            a column of the other modality counts as related.
        semantic_weight (`float`, *optional*, defaults to 0.1):
            Weight of the loss that pulls sampled tokens to semantic components (a_s).
        modality_weight (`float`, *optional*, defaults to 0.1):
            Weight of the loss that makes modality components of all samples alike (a_m).
        integrity_weight (`float`, *optional*, defaults to 0.5):
            Weight of the reconstruction from semantic components (a_f), between 0 and 1; the reconstruction from
            sampled ones has the rest.
        ranking_weight (`float`, *optional*, defaults to 1.0):
            Weight of the loss of the pairs (`loss_type`) *(ours)*. The printed objective has none and cannot rank by
            itself: it stays the same when the texts of a batch change places.
        semantic_probability (`bool`, *optional*, defaults to `False`):
            Whether PICO's column weights apply to the semantic components; the options of [`PicoConfig`] that concern
            style prototypes count then *(ours)*.
        kwargs: Options of [`PicoConfig`].

    Example:

    ```python
    >>> from transformers import BertConfig, ViTConfig
    >>> from modeling_pico import CddsConfig, CddsModel

    >>> config = CddsConfig(vision_config=ViTConfig(), text_config=BertConfig())
    >>> model = CddsModel(config)
    ```
    """

    model_type = "cdds"

    method: str = "cdds"
    unet_num_layers: int = 2
    if TYPE_CHECKING:
        # What it is once the configuration is made.
        unet_num_heads: int
    else:
        unet_num_heads: int | None = None
    noise_groups: int = 2
    threshold_init: int | float = 1.0
    semantic_weight: int | float = 0.1
    modality_weight: int | float = 0.1
    integrity_weight: int | float = 0.5
    ranking_weight: int | float = 1.0
    semantic_probability: bool = False

    def __post_init__(self, **kwargs):
        if self.unet_num_heads is None:
            self.unet_num_heads = math.gcd(8, self.embedding_dim, max(self.embedding_dim // 16, 1))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks every option; a wrong one is refused with the values that are allowed."""
        super().validate_architecture()
        check_bounds(vars(self), _BOUNDS)
        if self.embedding_dim % self.unet_num_heads:
            raise ValueError(
                f"`unet_num_heads` must divide `embedding_dim`, but got {self.unet_num_heads} and "
                f"{self.embedding_dim}."
            )

    @property
    def uses_prototypes(self) -> bool:
        """Whether the model has style prototypes."""
        return self.semantic_probability
