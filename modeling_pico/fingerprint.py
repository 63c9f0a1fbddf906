"""Digests that tell models, options and data apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import is_peft_available


# A model just trained and the same one loaded again differ in these, and give the same embeddings.
_SET_BY_SAVING = ("_name_or_path", "architectures", "auto_map", "dtype", "processor_class", "transformers_version")
# What image and text embeddings are made by; neither the uncertainty nor the moments of training.
_EMBEDDING_WEIGHTS = ("vision_model.", "text_model.", "alignment_head.")


def digest(parts: Iterable[Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of values, as bytes or as they are printed, and of named tensors."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        # With its length, so that no part can pass for a piece of another.
        data = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sorted_options(value: Any) -> Any:
    """Options without those that saving sets, in one order."""
    if not isinstance(value, dict):
        return value
    # Keys of JSON are strings, those of the labels of a tower that was not saved are not.
    return {str(name): sorted_options(value[name]) for name in sorted(value, key=str) if name not in _SET_BY_SAVING}


def describe_tower(config: PreTrainedConfig) -> Any:
    """Options of a tower."""
    return sorted_options(config.to_dict()), config._attn_implementation


def embedding_weights(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model that its embeddings are made by."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_EMBEDDING_WEIGHTS)}


def has_adapters(module: nn.Module) -> bool:
    """Whether adapters (PEFT) change what a module gives."""
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def model_fingerprint(model: Any, processor: Any) -> str:
    r"""
    Names what a model makes of images and texts: its configuration, its weights with the prototypes, the
    preprocessing of both sides. A model just trained and the same one loaded again have the same one, also where it is
    loaded in a wider type than it was saved in. With weights that were rounded to half precision it is another.

    Args:
        model ([`PicoModel`]): The model, without adapters.
        processor ([`PicoProcessor`]): Its processor.

    Raises:
        ValueError: if the model has adapters, since what these do is not in the weights alone.
    """
    if has_adapters(model):
        raise ValueError("What adapters do is not in the weights alone. Merge them into the model first.")
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    parts = [
        _as_saved({**model.config.to_dict(), "uncertainty_config": None}),
        type(image_processor).__name__,
        _as_saved(image_processor.to_dict()),
        tokenizer.model_max_length,
        sorted(tokenizer.get_vocab().items()),
        # What becomes of letters that no vocabulary shows: case, accents, spaces.
        tokenizer("A Red  Circle, déjà vu: 3½ ﬁsh!")["input_ids"],
    ]
    weights = embedding_weights(model).items()
    return digest(parts, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights})


def model_identity(model: Any, processor: Any) -> dict[str, str]:
    """
    Names a model for code, by `fingerprint` (see [`model_fingerprint`]), and for people, by `name`, `revision` and
    `method`.
    """
    config = model.config
    return {
        "fingerprint": model_fingerprint(model, processor),
        "name": config._name_or_path or "",
        # Set where the configuration came from the Hub.
        "revision": getattr(config, "_commit_hash", None) or "",
        "method": config.method,
    }


def _as_saved(options: dict[str, Any]) -> str:
    """Options as JSON has them, where tuples are lists and enumerations are numbers."""
    return json.dumps(sorted_options(options), default=str)


__all__ = [
    "describe_tower",
    "digest",
    "embedding_weights",
    "has_adapters",
    "model_fingerprint",
    "model_identity",
    "sorted_options",
]
