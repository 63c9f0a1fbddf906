"""Image and text encoders of an ONNX export, without PyTorch and without the model's code."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..model.image_decoding_pico import decode_image
from ..onnx_files import ABOUT_FILE, IMAGE_ENCODER, TEXT_ENCODER


_TEXTS = 32


class OnnxEncoder:
    r"""
    An [`Encoder`] of the folder that `python -m modeling_pico.export` wrote, which prepares images and texts as
    training does. An encoder is loaded when it is first used: who asks by text alone never loads that of images. It
    needs onnxruntime and transformers, neither PyTorch nor the model's code.

    Args:
        folder (`str` or `os.PathLike`): Folder of the export.
        providers (`Sequence[str]`, *optional*, defaults to `("CPUExecutionProvider",)`):
            What computes, as onnxruntime names it, by preference.

    Attributes:
        identity (`dict[str, str]`): That of the model which was exported: an index of the one is searched with the
            other.

    Raises:
        ImportError: If onnxruntime is missing.
        ValueError: If the folder holds no whole export.
    """

    def __init__(self, folder: str | os.PathLike, *, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.folder, self.providers = Path(folder), list(providers)
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError('ONNX encoders need onnxruntime: pip install "modeling-pico[onnx]"') from error
        self._runtime = onnxruntime
        missing = [name for name in (ABOUT_FILE, IMAGE_ENCODER, TEXT_ENCODER) if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{str(folder)!r} holds no ONNX export: {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Export a checkpoint by "
                "python -m modeling_pico.export CHECKPOINT FOLDER."
            )
        about = json.loads((self.folder / ABOUT_FILE).read_text(encoding="utf-8"))
        self.identity: dict[str, str] = about["identity"]
        self._image_backend = about["image_backend"]

    def encode_images(self, images: Sequence[Any], batch_size: int = 32) -> list[np.ndarray]:
        r"""
        Encodes images batch by batch.

        Args:
            images (sequence of `str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): Paths, files or PIL images.
            batch_size (`int`, *optional*, defaults to 32): Images encoded at a time.

        Returns:
            `list[numpy.ndarray]`: of each its score-ready embeddings `(tokens, dim)` in float32, without padding.

        Raises:
            ValueError: For an image that cannot be decoded.
        """
        encoded: list[np.ndarray] = []
        for batch in _batches(images, batch_size):
            pixels = self._image_processor([decode_image(image) for image in batch], return_tensors="np")
            encoded += _run(self._image_encoder, {"pixel_values": pixels["pixel_values"].astype(np.float32)})
        return encoded

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts as [`encode_images`] does images; they are cut to the tokenizer's `model_max_length`."""
        encoded: list[np.ndarray] = []
        for batch in _batches(texts, _TEXTS):
            words = self._tokenizer(
                list(batch), padding=True, truncation=True, return_attention_mask=True, return_tensors="np"
            )
            inputs = {name: words[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
            encoded += _run(self._text_encoder, inputs)
        return encoded

    @functools.cached_property
    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        # That of training: the two backends round pixels differently.
        return AutoImageProcessor.from_pretrained(self.folder, backend=self._image_backend)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @functools.cached_property
    def _image_encoder(self) -> Any:
        return self._runtime.InferenceSession(self.folder / IMAGE_ENCODER, providers=self.providers)

    @functools.cached_property
    def _text_encoder(self) -> Any:
        return self._runtime.InferenceSession(self.folder / TEXT_ENCODER, providers=self.providers)


def _batches(samples: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    if isinstance(samples, str):
        raise ValueError(f"Give a sequence of images or texts, not the string {samples!r} alone.")
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}.")
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _run(session: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    embeds, mask = session.run(["embeds", "mask"], inputs)
    return [tokens[real] for tokens, real in zip(embeds, mask, strict=True)]


__all__ = ["OnnxEncoder"]
