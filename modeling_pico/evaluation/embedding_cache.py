"""Encoded retrieval sets on disk, so that a trained model is evaluated again without encoding again."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path

import safetensors.torch
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data import CaptionedImageDataset, PicoDataCollator
from ..modeling_pico import PicoModel
from .evaluator import EncodedRetrieval


logger = logging.get_logger(__name__)


def cache_key(model: PicoModel, loader: DataLoader) -> str:
    r"""
    Names an encoded retrieval set by all that its embeddings depend on: weights of backbones and projections, options,
    data, and how they are preprocessed. Prototypes of style and of uncertainty are not among it, since embeddings are
    kept unweighted, and neither are the weights of a re-ranking.

    Args:
        model (`nn.Module`): The [`PicoModel`], unwrapped.
        loader (`DataLoader`): Batches of a [`CaptionedImageDataset`] made by a [`PicoDataCollator`].
    """
    dataset, collator = loader.dataset, loader.collate_fn
    if not isinstance(dataset, CaptionedImageDataset) or not isinstance(collator, PicoDataCollator):
        raise ValueError(
            "embeddings are cached on disk for a CaptionedImageDataset with a PicoDataCollator only, but got "
            f"{type(dataset).__name__} and {type(collator).__name__}."
        )
    digest = hashlib.blake2b(digest_size=16)
    processor = collator.processor
    tokenizer = processor.tokenizer
    config = copy.deepcopy(model.config)
    config.uncertainty_reranking = None
    described = (
        config.to_json_string(),
        dataset.dataset._fingerprint,
        str(collator.max_length),
        processor.image_processor.to_json_string(),
        # Without the place it came from: a model just trained and the same one loaded again share a key.
        repr(tokenizer).replace(f"'{tokenizer.name_or_path}'", "", 1),
        # The vocabulary as well: the representation names its size alone.
        str(sorted(tokenizer.get_vocab().items())),
    )
    for text in described:
        digest.update(text.encode())
    for name, tensor in model.state_dict().items():
        if "_prototypes." not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_embeddings(folder: str | os.PathLike, key: str, device: torch.device) -> EncodedRetrieval | None:
    """Reads what [`save_embeddings`] wrote under this key for as many processes as there are now; None if nothing."""
    path = _path(folder, key)
    if not path.is_file():
        return None
    logger.info(f"Embeddings are read from {path}.")
    tensors = safetensors.torch.load_file(path, device=str(device))
    return EncodedRetrieval(**tensors)


def save_embeddings(encoded: EncodedRetrieval, folder: str | os.PathLike, key: str) -> None:
    """Writes an encoded retrieval set with its embeddings in float16; complete or not at all."""
    path = _path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in vars(encoded).items()
    }
    unfinished = path.with_suffix(".part")
    safetensors.torch.save_file(tensors, unfinished)
    unfinished.replace(path)


def _path(folder: str | os.PathLike, key: str) -> Path:
    state = PartialState()
    return Path(folder) / f"{key}-{state.process_index}-of-{state.num_processes}.safetensors"


__all__ = ["cache_key", "load_embeddings", "save_embeddings"]
