"""What turns images and texts into score-ready embeddings for an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np


if TYPE_CHECKING:
    from ..model.gallery_alignment_pico import GalleryAlignment
    from ..model.modeling_pico import PicoModel
    from ..model.processing_pico import PicoProcessor


@runtime_checkable
class Encoder(Protocol):
    """
    Encodes images and texts.

    Attributes:
        identity (`dict[str, str]`): What names the model: `fingerprint` of configuration, weights and preprocessing,
            which decides, and for people `name`, `revision` and `method`.
    """

    identity: dict[str, str]

    def encode_images(self, images: Sequence[Any], batch_size: int = 32) -> list[np.ndarray]:
        """Score-ready embeddings `(tokens, dim)` of each image (path, bytes or PIL), float32, without padding."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same of texts."""
        ...


class ModelEncoder:
    r"""
    An [`Encoder`] of a model in PyTorch.

    Args:
        model ([`PicoModel`]): The model, on the device that it is to run on.
        processor ([`PicoProcessor`]): Its processor.
        revision (`str`, *optional*): The revision on the Hub that they were loaded from, to name the model by.
    """

    def __init__(self, model: PicoModel, processor: PicoProcessor, revision: str | None = None) -> None:
        from ..fingerprint import model_fingerprint

        self.model, self.processor = model, processor
        config = model.config
        self.identity = {
            "fingerprint": model_fingerprint(model, processor),
            "name": config._name_or_path or "",
            "revision": revision or "",
            "method": config.method,
        }

    def encode_images(
        self, images: Sequence[Any], batch_size: int = 32, alignment: GalleryAlignment | None = None
    ) -> list[np.ndarray]:
        """Embeddings of images, moved by `alignment` if there is one; see [`Encoder`]."""
        encoded = self.processor.encode_images(
            self.model, images, align=alignment or False, batch_size=batch_size, convert_to_numpy=True
        )
        return [np.asarray(tokens, dtype=np.float32) for tokens in encoded]

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Embeddings of texts; see [`Encoder`]."""
        encoded = self.processor.encode_texts(self.model, list(texts), convert_to_numpy=True)
        return [np.asarray(tokens, dtype=np.float32) for tokens in encoded]


__all__ = ["Encoder", "ModelEncoder"]
