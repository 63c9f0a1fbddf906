"""Search in a gallery that lies in a vector database: the index, its stores and its encoders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
