"""Encoded retrieval sets on disk, so that a trained model is evaluated again without encoding again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import PIL
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers.utils import is_timm_available, logging

from ..data import CaptionedImageDataset, PicoDataCollator
from ..data.images import file_state, iter_encoded
from ..distributed import gather
from ..fingerprint import describe_tower, digest, embedding_weights, has_adapters, sorted_options
from ..model.modeling_pico import PicoModel
from ..model.prototypes_pico import StylePrototypes
from .evaluator import EncodedRetrieval


logger = logging.get_logger(__name__)

_PACKAGE = Path(__file__).parents[1]


def cached_embeddings(
    folder: str | os.PathLike,
    model: PicoModel,
    loader: DataLoader,
    encode: Callable[[], EncodedRetrieval],
    *,
    precision: str = "no",
    aligned: bool = False,
) -> EncodedRetrieval:
    r"""
    Reads an encoded retrieval set from `folder`, or encodes it and keeps it there: all processes read, or all encode.
    What cannot be read is encoded again, and what cannot be written or must not be kept is a warning.

    Args:
        folder (`str` or `os.PathLike`): Folder of the cache, made if need be.
        model ([`PicoModel`]): The model, unwrapped.
        loader (`DataLoader`): Batches of a [`CaptionedImageDataset`] made by a [`PicoDataCollator`].
        encode (`Callable`): Encodes what `loader` gives.
        precision (`str`, *optional*, defaults to `"no"`): Names the mixed precision that `encode` uses.
        aligned (`bool`, *optional*, defaults to `False`): Whether `encode` moves the images to those of training.

    Returns:
        [`EncodedRetrieval`]: with embeddings in float16, whether they were read or encoded, so that this evaluation
        and the next give the same numbers.
    """
    reason = _why_not_cached(model, loader)
    if reason is not None:
        logger.warning(f"Embeddings are not kept in {str(folder)!r}: {reason}")
        return encode()
    key = cache_key(model, loader, precision, aligned)
    encoded = load_embeddings(folder, key, model.device)
    if not gather(torch.tensor([encoded is not None], device=model.device)).all():
        encoded = _halved(encode())
        save_embeddings(encoded, folder, key)
    assert encoded is not None
    return encoded


def cache_key(model: PicoModel, loader: DataLoader, precision: str = "no", aligned: bool = False) -> str:
    r"""
    Names an encoded retrieval set by all that its embeddings depend on: the weights of backbones and projections, the
    options, the precision, images (by their bytes or by name, size and times of their files) and the look they are
    drawn in, captions as they are tokenized, preprocessing, and the code; of an aligned one also styles and the
    moments of training. Prototypes are not among it, since embeddings are kept unweighted.
    """
    config = model.config
    dataset: Any = loader.dataset
    collator: Any = loader.collate_fn
    # Embeddings are kept before weighting.
    weighting = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, StylePrototypes))
    moments = model.image_moments.state_dict(prefix="image_moments.") if aligned else {}
    tensors = {
        name: tensor
        for name, tensor in {**embedding_weights(model), **moments}.items()
        if not name.startswith(weighting)
    }
    parts = [
        sorted_options({**config.to_dict(), "uncertainty_config": None}),
        *map(describe_tower, (config.vision_config, config.text_config)),
        *describe_software(precision, model.device),
        dataset.ids.tolist(),
        f"aligned by {dataset.styles}" if aligned else "",
        *describe_images(dataset, collator),
        *describe_texts(dataset, collator),
    ]
    return digest(parts, tensors)


def describe_software(precision: str, device: torch.device) -> Iterator[Any]:
    """What embeddings depend on beside model and data."""
    yield precision, device.type
    yield PIL.__version__, torch.__version__, transformers.__version__
    # Which has the code of some towers.
    yield metadata.version("timm") if is_timm_available() else None
    # The code itself: during development its version stays while its maths change.
    for file in sorted(_PACKAGE.rglob("*.py")):
        yield file.read_bytes()


def describe_images(dataset: CaptionedImageDataset, collator: PicoDataCollator) -> Iterator[Any]:
    """Images, by their bytes or by name, size and times of their files, and their preprocessing."""
    image_processor = collator.processor.image_processor
    yield type(image_processor).__name__, sorted_options(image_processor.to_dict())
    yield dataset.look
    yield from _images(dataset.dataset)


def describe_texts(dataset: CaptionedImageDataset, collator: PicoDataCollator) -> Iterator[Any]:
    """Tokens, which say all that vocabulary, normalizer and limit make of a caption."""
    tokenizer = collator.processor.tokenizer
    yield tokenizer.padding_side
    for captions in dataset.dataset["captions"]:
        limit = {"truncation": collator.max_length is not None, "max_length": collator.max_length}
        yield tokenizer(captions, **limit, verbose=False)["input_ids"]


def _images(dataset: datasets.Dataset) -> Iterator[Any]:
    for chunk in iter_encoded(dataset.select_columns(["image"])):
        for content, path in zip(chunk.field("bytes"), chunk.field("path").to_pylist(), strict=True):
            if content.is_valid:
                yield hashlib.blake2b(content.as_buffer()).digest()
            else:
                yield path, file_state(path)


def _why_not_cached(model: PicoModel, loader: DataLoader) -> str | None:
    found = type(loader.dataset), type(loader.collate_fn)
    if found != (CaptionedImageDataset, PicoDataCollator):
        return (
            "only those of a CaptionedImageDataset with a PicoDataCollator can be told apart, but got "
            f"{found[0].__name__} and {found[1].__name__}."
        )
    if has_adapters(model):
        return "what adapters do is not in the weights alone. Merge them into the model to have them kept."
    return None


def load_embeddings(folder: str | os.PathLike, key: str, device: torch.device) -> EncodedRetrieval | None:
    """What [`save_embeddings`] wrote for as many processes as there are now; None if nothing can be read."""
    path = _path(folder, key)
    try:
        encoded = EncodedRetrieval(**safetensors.torch.load_file(path, device=str(device)))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, TypeError) as error:
        logger.warning(f"The embeddings in {str(path)!r} cannot be read and are encoded again: {error}")
        return None
    logger.info(f"Embeddings are read from {path}.")
    return encoded


def save_embeddings(encoded: EncodedRetrieval, folder: str | os.PathLike, key: str) -> None:
    """Writes an encoded retrieval set, with its embeddings in float16, complete or not at all; the latter warns."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in vars(_halved(encoded)).items()}
    path = _path(folder, key)
    # A name of its own: another evaluation may be writing the same embeddings.
    unfinished = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning(f"Embeddings are not kept in {str(folder)!r}, which cannot be written: {error}")
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _halved(encoded: EncodedRetrieval) -> EncodedRetrieval:
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in vars(encoded).items()}
    return EncodedRetrieval(**tensors)


def _path(folder: str | os.PathLike, key: str) -> Path:
    state = PartialState()
    return Path(folder) / f"{key}-{state.process_index}-of-{state.num_processes}.safetensors"


__all__ = [
    "cache_key",
    "cached_embeddings",
    "describe_images",
    "describe_software",
    "describe_texts",
    "load_embeddings",
    "save_embeddings",
]
