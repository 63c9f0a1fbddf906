"""Search in a gallery that lies in a vector database: the index, its stores and its encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_names import import_on_use


if TYPE_CHECKING:
    from .encoder_onnx import OnnxEncoder
    from .encoders import Encoder, ModelEncoder
    from .index import Changes, Hit, PicoIndex

_LAZY = {
    "Changes": "index",
    "Encoder": "encoders",
    "Hit": "index",
    "ModelEncoder": "encoders",
    "OnnxEncoder": "encoder_onnx",
    "PicoIndex": "index",
}

__all__ = ["Changes", "Encoder", "Hit", "ModelEncoder", "OnnxEncoder", "PicoIndex"]


__getattr__ = import_on_use(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)
