"""
PICO for Hugging Face: image-text retrieval that holds when the style of pictures and sentences changes.

Importing the package registers PICO with the auto classes of transformers, and so with its pipelines. Its names are
imported on first use. Without PyTorch nothing is registered, and what does not compute with it can be used:
`modeling_pico.search` with ONNX encoders.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from .lazy_names import import_on_use


if importlib.util.find_spec("torch") is not None:
    from . import registration as registration

if TYPE_CHECKING:
    from .data import CaptionedImageDataset, PicoDataCollator, load_captioned_images, styled_shapes
    from .evaluation import (
        RetrievalEvaluator,
        StyleReport,
        StyleStress,
        align_encoded,
        measure_style_stress,
        measure_styles,
    )
    from .evaluation.recall_metric import ImageTextRecall
    from .model.configuration_cdds import CddsConfig
    from .model.configuration_pico import PICO_LITERAL, PicoConfig
    from .model.gallery_alignment_pico import GalleryAlignment
    from .model.image_decoding_pico import decode_image
    from .model.loss_pico import image_text_loss
    from .model.modeling_cdds import CddsModel
    from .model.modeling_pico import PicoFeatures, PicoModel, PicoOutput, PicoPreTrainedModel
    from .model.processing_pico import PicoProcessor
    from .model.prototypes_pico import StylePrototypes
    from .model.scoring_pico import pair_scores
    from .plots import save_plots
    from .training import PicoTrainer, PicoTrainingArguments


__version__ = "0.1.0"

_LAZY = {
    "CaptionedImageDataset": "data",
    "PicoDataCollator": "data",
    "load_captioned_images": "data",
    "styled_shapes": "data",
    "ImageTextRecall": "evaluation.recall_metric",
    "RetrievalEvaluator": "evaluation",
    "StyleReport": "evaluation",
    "StyleStress": "evaluation",
    "align_encoded": "evaluation",
    "measure_style_stress": "evaluation",
    "measure_styles": "evaluation",
    "CddsConfig": "model.configuration_cdds",
    "PICO_LITERAL": "model.configuration_pico",
    "PicoConfig": "model.configuration_pico",
    "GalleryAlignment": "model.gallery_alignment_pico",
    "decode_image": "model.image_decoding_pico",
    "image_text_loss": "model.loss_pico",
    "CddsModel": "model.modeling_cdds",
    "PicoFeatures": "model.modeling_pico",
    "PicoModel": "model.modeling_pico",
    "PicoOutput": "model.modeling_pico",
    "PicoPreTrainedModel": "model.modeling_pico",
    "PicoProcessor": "model.processing_pico",
    "StylePrototypes": "model.prototypes_pico",
    "pair_scores": "model.scoring_pico",
    "save_plots": "plots",
    "PicoTrainer": "training",
    "PicoTrainingArguments": "training",
}

__all__ = [
    "PICO_LITERAL",
    "CaptionedImageDataset",
    "CddsConfig",
    "CddsModel",
    "GalleryAlignment",
    "ImageTextRecall",
    "PicoConfig",
    "PicoDataCollator",
    "PicoFeatures",
    "PicoModel",
    "PicoOutput",
    "PicoPreTrainedModel",
    "PicoProcessor",
    "PicoTrainer",
    "PicoTrainingArguments",
    "RetrievalEvaluator",
    "StylePrototypes",
    "StyleReport",
    "StyleStress",
    "align_encoded",
    "decode_image",
    "image_text_loss",
    "load_captioned_images",
    "measure_style_stress",
    "measure_styles",
    "pair_scores",
    "save_plots",
    "styled_shapes",
]


__getattr__ = import_on_use(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)
