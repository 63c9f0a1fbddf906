"""What a checkpoint must be like before it is used: checkpoints are untrusted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from .configuration_pico import PicoConfig


# Elements that a configuration may ask for beyond what a file holds: a fresh alignment head on towers that were
# trained without one is far smaller, and a size that exhausts memory far larger.
MAX_MISSING_ELEMENTS = 2**27

# Towers are built layer by layer, before the file is looked at.
MAX_DEPTH = 256
_DEPTH = re.compile(r"(layers|n_layer|depths?|blocks)$")

# Options with which a checkpoint may be loaded otherwise than it was saved, and what is then freshly initialised.
FRESH_WITH = {
    "method": ("style_prototypes.",),
    "style_probability": (".rates.",),
    "semantic_probability": ("style_prototypes.",),
    "uncertainty_config": ("uncertainty_prototypes.",),
    "pooling": ("image_moments.class_",),
}

# Arguments of `from_pretrained` that say where files are.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")

_BACKBONES = ("vision_model.", "text_model.")


def read_config(source: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Reads the `config.json` of a checkpoint and refuses what it must not decide: code that is run, and files that are
    not safetensors.

    Args:
        source (`str` or `os.PathLike`): Hub id or folder.
        kwargs (`Mapping`): Keyword arguments of `from_pretrained`, of which those that find the file are used.

    Returns:
        `dict`: the contents.

    Raises:
        ValueError: if it names a kernel of the Hub as its attention, or weights in another kind of file, or holds
            numbers that make scores NaN or loading endless.
    """
    config, _ = PreTrainedConfig.get_config_dict(
        source, **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    )
    for part in (config, config.get("vision_config"), config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        _check_timm(source, part)
        for name, value in part.items():
            if name.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
                raise ValueError(
                    f"The configuration of {str(source)!r} names code of the Hub as its `{name}`: {value!r}. Take "
                    f"that out of the file; whoever trusts the code passes `{name.lstrip('_')}` on loading."
                )
    _check_numbers(config)
    weights = config.get("transformers_weights")
    if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"The configuration of {str(source)!r} names {weights!r} as its weights; only safetensors are read."
        )
    return config


def _check_timm(source: Any, config: Mapping[str, Any]) -> None:
    # By these timm would read other files than the checkpoint's weights, pickles among them.
    arguments = config.get("model_args") or {}
    given = [name for name in arguments if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir")]
    if given or ":" in str(config.get("architecture")):
        what = f"`model_args` {', '.join(given)}" if given else f"the architecture {config['architecture']!r}"
        raise ValueError(
            f"The configuration of {str(source)!r} has timm read other files: {what}. Take that out of it."
        )


def _check_numbers(options: Mapping[str, Any], path: str = "") -> None:
    """ValueError for a number in a configuration, of any family, that makes scores NaN or loading endless."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            _check_numbers(value, f"{path}{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            allowed = None
            if isinstance(number, float) and not math.isfinite(number):
                allowed = "finite"
            elif name.endswith(("eps", "epsilon", "rope_theta")) and number <= 0:
                allowed = "greater than 0"
            elif _DEPTH.search(name) and number > MAX_DEPTH:
                allowed = f"at most {MAX_DEPTH}"
            if allowed:
                raise ValueError(f"`{path}{name}` must be {allowed}, but got {value!r}.")


def check_tensors(model: nn.Module, files: Sequence[str], ignore_mismatched_sizes: bool = False) -> None:
    """
    Compares the sizes of the tensors that safetensors files hold with those that a model asks for; reads the headers
    alone.

    Args:
        model (`nn.Module`): The model, best on the meta device.
        files (`Sequence[str]`): The files; others than safetensors are left out.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`):
            Whether tensors of the backbones may have other sizes. All others never may.

    Raises:
        OSError: if a file is damaged; names it.
        ValueError: if sizes differ, or far more is asked for than the files hold; names the tensors.
    """
    held: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            return
        try:
            with safe_open(file, framework="pt") as tensors:
                held |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise OSError(f"{str(file)!r} is not a whole safetensors file: {error}.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent = {name: math.prod(shape) for name, shape in expected.items() if name not in held}
    # Backbones may be stored under older names, so what is absent is counted against what is left over.
    left_over = sum(math.prod(shape) for name, shape in held.items() if name not in expected)
    if (excess := sum(absent.values()) - left_over) > MAX_MISSING_ELEMENTS:
        name = max(absent, key=lambda name: absent[name])
        raise ValueError(
            f"The configuration asks for {excess:,} numbers that {str(files[0])!r} does not hold, above all for "
            f"{name} of shape {expected[name]}."
        )
    wrong = [
        f"{name} is {held[name]} in the file, the configuration asks for {expected[name]}"
        for name in sorted(expected.keys() & held.keys())
        if held[name] != expected[name] and not (ignore_mismatched_sizes and name.startswith(_BACKBONES))
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors of {str(files[0])!r} have other sizes than the configuration asks for: "
            f"{_first(wrong)}. Numbers and lengths of prototypes and embedding_dim belong to a trained checkpoint and "
            "cannot be changed on loading; for others, train from the backbones (PicoModel.from_backbones)."
        )


def check_missing(source: Any, saved: Mapping[str, Any], config: PicoConfig, missing: Sequence[str]) -> None:
    """
    Refuses weights that were made up because the checkpoint lacks them.

    Args:
        source (`str` or `os.PathLike`): Hub id or folder, for the message.
        saved (`Mapping`): The options in the checkpoint's `config.json`.
        config ([`PicoConfig`]): The options of the model, which may be others.
        missing (`Sequence[str]`): Names of the tensors that the checkpoint lacks.

    Raises:
        ValueError: names the tensors.
    """
    defaults = {option.name: option.default for option in fields(config)}
    allowed = [
        part
        for name, parts in FRESH_WITH.items()
        if name in defaults and getattr(config, name) != saved.get(name, defaults[name])
        for part in parts
    ]
    if saved.get("model_type") != config.model_type:
        # Another type of model starts from the backbones and projections that they share.
        allowed.append("alignment_head.")
    lost = sorted(name for name in missing if not any(part in name for part in allowed))
    if lost:
        raise ValueError(f"{str(source)!r} lacks {len(lost)} tensors that its configuration asks for: {_first(lost)}.")


def check_prototypes(buffers: Mapping[str, torch.Tensor]) -> None:
    """
    Refuses the state of style prototypes that no training leaves behind.

    Args:
        buffers (`Mapping[str, torch.Tensor]`): Buffers of [`StylePrototypes`] of both sides by name.

    Raises:
        ValueError: names the buffer and the values that are allowed.
    """
    for name, buffer in buffers.items():
        low, high = _allowed_range(name)
        if buffer.is_meta or not buffer.numel():
            continue
        if not bool(((buffer >= low) & (buffer <= high)).all()):  # NaN is neither
            found = f"values from {buffer.min().item():g} to {buffer.max().item():g}"
            raise ValueError(
                f"The buffer {name!r} of the checkpoint holds {found}; allowed are values from {low:g} to {high:g}."
            )


def check_image_moments(buffers: Mapping[str, torch.Tensor]) -> None:
    """ValueError for moments of training ([`ImageMoments`]) that no measurement leaves behind."""
    for name, buffer in buffers.items():
        if buffer.is_meta:
            continue
        signed = name.endswith("mean")
        if not bool(buffer.isfinite().all()) or (not signed and bool((buffer < 0).any())):
            raise ValueError(
                f"The buffer 'image_moments.{name}' of the checkpoint holds values from {buffer.min().item():g} to "
                f"{buffer.max().item():g}; allowed are finite numbers{'' if signed else ' of at least 0'}."
            )


def _allowed_range(name: str) -> tuple[float, float]:
    largest = torch.finfo(torch.float32).max
    if name.endswith("stage"):
        return 0, 2
    if name.endswith("style_rate"):
        return -1e-3, 1 + 1e-3  # rounding may lead out of [0, 1]
    if name.endswith(("temperature", "column_scale")):
        return torch.finfo(torch.float32).tiny, largest
    return -largest, largest


def _first(items: Sequence[str]) -> str:
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")
