"""Registers PICO and CDDS with the auto classes of transformers when it is imported."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from .model.configuration_cdds import CddsConfig
from .model.configuration_pico import PicoConfig
from .model.modeling_cdds import CddsModel
from .model.modeling_pico import PicoModel
from .model.processing_pico import PicoProcessor


for _config, _model in ((PicoConfig, PicoModel), (CddsConfig, CddsModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    # The class of the pipeline "zero-shot-image-classification".
    AutoModelForZeroShotImageClassification.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, PicoProcessor, exist_ok=True)
    # `save_pretrained` then writes the code files beside the weights, for `trust_remote_code` without this package.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
PicoProcessor.register_for_auto_class("AutoProcessor")


def load_checkpoint(name: Any, **options: Any) -> PicoModel:
    """A checkpoint of either class as `AutoModel.from_pretrained` loads it; ValueError for that of another model."""
    model = AutoModel.from_pretrained(name, **options)
    if not isinstance(model, PicoModel):
        raise ValueError(f"{str(name)!r} is a {type(model).__name__} and no checkpoint of PICO or CDDS.")
    return model
