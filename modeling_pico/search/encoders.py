"""What turns images and texts into score-ready embeddings for an index."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..model.image_decoding_pico import BadImageError
from .files import written_whole
from .gallery import read_image


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
    """

    def __init__(self, model: PicoModel, processor: PicoProcessor) -> None:
        from ..fingerprint import model_identity

        self.model, self.processor = model, processor
        self.identity = model_identity(model, processor)

    def encode_images(
        self, images: Sequence[Any], batch_size: int = 32, alignment: GalleryAlignment | None = None
    ) -> list[np.ndarray]:
        """Embeddings of images, moved by `alignment` if there is one; see [`Encoder`]."""
        encoded = self.processor.encode_images(
            self.model, images, align=alignment or False, batch_size=batch_size, convert_to_numpy=True
        )
        return [np.asarray(tokens, dtype=np.float32) for tokens in encoded]

    def measure(self, gallery: Any) -> GalleryAlignment:
        """What moves a [`Gallery`] to where images of training lie, from some that are spread over it."""
        from ..model.gallery_alignment_pico import spread_rows

        def batches() -> Iterator[Any]:
            rows = spread_rows([None] * len(gallery))
            for start in range(0, len(rows), 32):
                pictures = []
                for row in rows[start : start + 32]:
                    with contextlib.suppress(BadImageError):  # named when it is to be encoded
                        pictures.append(read_image(gallery[row].value)[1])
                if pictures:
                    yield self.processor(images=pictures, return_tensors="pt")

        return self.model.align(batches())

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Embeddings of texts; see [`Encoder`]."""
        encoded = self.processor.encode_texts(self.model, list(texts), convert_to_numpy=True)
        return [np.asarray(tokens, dtype=np.float32) for tokens in encoded]


def save_alignment(alignment: GalleryAlignment, path: Path) -> None:
    """Writes what moves a gallery, complete or not at all."""
    from safetensors.torch import save_file

    names = ("scale", "shift", "class_scale", "class_shift")
    tensors = {name: value for name, value in vars(alignment).items() if name in names and value is not None}
    for name, parts in alignment.layers.items():
        tensors.update({f"layers.{name}.{place}": part for place, part in enumerate(parts)})
    with written_whole(path) as part:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part)


def load_alignment(path: Path) -> GalleryAlignment:
    """Reads what [`save_alignment`] wrote."""
    from safetensors.torch import load_file

    from ..model.gallery_alignment_pico import GalleryAlignment

    tensors = load_file(path)
    names = {name.rpartition(".")[0] for name in tensors if name.startswith("layers.")}
    layers = {name.removeprefix("layers."): (tensors[f"{name}.0"], tensors[f"{name}.1"]) for name in names}
    return GalleryAlignment(
        tensors["scale"], tensors["shift"], tensors.get("class_scale"), tensors.get("class_shift"), layers=layers
    )


__all__ = ["Encoder", "ModelEncoder", "load_alignment", "save_alignment"]
