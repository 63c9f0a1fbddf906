"""What a checkpoint must be like before memory is taken for it: checkpoints are untrusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from .configuration_pico import PicoConfig


# Elements that a configuration may ask for beyond what a file holds: a fresh alignment head on towers that were
# trained without one is far smaller, and a size that exhausts memory far larger.
MAX_FRESH_ELEMENTS = 2**27

# Options with which a checkpoint may be loaded otherwise than it was saved, and what is then freshly initialised.
_FRESH = {
    "alignment_head": ("style_prototypes.",),
    "style_probability": (".rates.",),
    "num_uncertainty_prototypes": ("uncertainty_prototypes.",),
    "semantic_probability": ("style_prototypes.",),
}


_BACKBONES = ("vision_model.", "text_model.")

# What finds a file of a checkpoint.
FINDING = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")

# Files that pickle writes, and reads by running what they say.
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class CheckpointError(ValueError):
    """A checkpoint holds what it must not hold, or lacks what it must hold."""


class TensorSizeError(CheckpointError):
    """Tensors of a checkpoint have other sizes than the configuration asks for."""


def prefer_safetensors(source: Any, kwargs: dict[str, Any]) -> None:
    """
    Makes safetensors the only files that are read, unless `use_safetensors=False` was passed, and refuses a folder
    whose weights are in pickles only.

    Args:
        source (`str` or `os.PathLike`): A folder; names on the Hub are passed over.
        kwargs (`dict`): Keyword arguments of `from_pretrained`, completed in place.

    Raises:
        OSError: names the files.
    """
    # None is the default of transformers, which reads pickles where there is nothing else.
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    folder = Path(source, kwargs.get("subfolder") or "")
    if not kwargs["use_safetensors"] or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _no_safetensors(str(folder), f"only {', '.join(map(repr, pickles[:5]))}")


@contextmanager
def explained_load_errors(source: Any) -> Iterator[None]:
    """Around loading by transformers: says of weights that are damaged, or in other files, what to do."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"The weights of {str(source)!r} are damaged: {error}.") from error
    except OSError as error:
        if "use_safetensors" in str(error):
            raise _no_safetensors(source, "as far as can be seen from here") from error
        raise


def _no_safetensors(source: Any, instead: str) -> OSError:
    """The error for a checkpoint without safetensors; `instead` says what it has."""
    return OSError(
        f"There is no file named model.safetensors in {str(source)!r}, {instead}. Other files can run code when they "
        "are read, so only safetensors are. If the checkpoint is to be trusted, pass use_safetensors=False "
        "(train_pico.py: --use_safetensors false) once and save the model anew."
    )


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
        CheckpointError: if it names a kernel of the Hub as its attention, or weights in another kind of file.
        OSError: if there is none, or it is not JSON.
    """
    options = {name: kwargs[name] for name in FINDING if name in kwargs}
    config, _ = PreTrainedConfig.get_config_dict(source, **options)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"The config.json of {str(source)!r} must be an object, but is a {type(config).__name__}."
        )
    for part in (config, config.get("vision_config"), config.get("text_config")):
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if name.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
                raise CheckpointError(
                    f"The configuration of {str(source)!r} names code of the Hub as its `{name}`: {value!r}. Take "
                    f"that out of the file; whoever trusts the code passes `{name.lstrip('_')}` on loading."
                )
    weights = config.get("transformers_weights")
    if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"The configuration of {str(source)!r} names {weights!r} as its weights; only safetensors are read."
        )
    return config


def check_tensors(model: nn.Module, files: Sequence[str], ignore_mismatched_sizes: bool = False) -> None:
    """
    Compares the tensors that safetensors files say they hold with those that a model asks for; reads none of them.

    Args:
        model (`nn.Module`): The model, best on the meta device.
        files (`Sequence[str]`): The files; others than safetensors are left out.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`):
            Whether tensors of the backbones may have other sizes. All others never may.

    Raises:
        OSError: if a file is damaged; names it.
        TensorSizeError: if sizes differ; names the tensors.
        CheckpointError: for another kind of numbers, or if far more is asked for than the files hold.
    """
    held = _read_headers(files)
    if not held:
        return
    expected = dict(model.state_dict())
    sizes, types = [], []
    for name in expected.keys() & held.keys():
        tensor, (shape, dtype) = expected[name], held[name]
        if tuple(tensor.shape) != shape and not (ignore_mismatched_sizes and name.startswith(_BACKBONES)):
            sizes.append(f"{name} is {shape} in the file, the configuration asks for {tuple(tensor.shape)}")
        if tensor.is_floating_point() != dtype.startswith(("F", "BF")):
            types.append(f"{name} holds {dtype}, {tensor.dtype} is needed")
    if types:
        raise CheckpointError(f"{len(types)} tensors hold another kind of numbers: {_first(types)}.")
    absent = {name: tensor for name, tensor in expected.items() if name not in held}
    # Backbones may be stored under older names, so what is absent is counted against what is left over.
    spare = sum(math.prod(shape) for name, (shape, _) in held.items() if name not in expected)
    needed = sum(math.prod(tensor.shape) for tensor in absent.values())
    # What few tensors are lost is said by [`check_missing`]; many more of them than there are would take long to make.
    num_spare, num_lost = len(held.keys() - expected.keys()), sum(name.startswith(_BACKBONES) for name in absent)
    if needed > spare + MAX_FRESH_ELEMENTS or num_lost - num_spare > len(held):
        name, tensor = max(absent.items(), key=lambda item: math.prod(item[1].shape))
        raise CheckpointError(
            f"The configuration asks for {needed - spare:,} numbers that the file does not hold, above all for {name} "
            f"of shape {tuple(tensor.shape)}."
        )
    if sizes:
        raise TensorSizeError(_first(sizes))


def check_missing(saved: Mapping[str, Any], config: PicoConfig, missing: Sequence[str]) -> None:
    """
    Refuses weights that were made up because the checkpoint lacks them.

    Args:
        saved (`Mapping`): The options in the checkpoint's `config.json`.
        config ([`PicoConfig`]): The options of the model, which may be others.
        missing (`Sequence[str]`): Names of the tensors that the checkpoint lacks.

    Raises:
        CheckpointError: names the tensors.
    """
    # Some of the options are those of other types of models alone.
    options = [name for name in _FRESH if hasattr(type(config), name)]
    changed = [name for name in options if getattr(config, name) != saved.get(name, getattr(type(config), name))]
    allowed = [part for name in changed for part in _FRESH[name]]
    if saved.get("model_type") != type(config).model_type:
        # Another type of model starts from the backbones and projections that they share.
        allowed.append("alignment_head.")
    lost = sorted(name for name in missing if not any(part in name for part in allowed))
    if lost:
        raise CheckpointError(
            f"The checkpoint lacks {len(lost)} tensors that its configuration asks for: {_first(lost)}."
        )


def check_prototypes(buffers: Mapping[str, torch.Tensor]) -> None:
    """
    Refuses the state of style prototypes that no training leaves behind.

    Args:
        buffers (`Mapping[str, torch.Tensor]`): Buffers of [`StylePrototypes`] of both sides by name.

    Raises:
        CheckpointError: names the buffer and the values that are allowed.
    """
    for name, buffer in buffers.items():
        low, high = _allowed_range(name)
        if buffer.is_meta or not buffer.numel():
            continue
        if not bool(((buffer >= low) & (buffer <= high)).all()):  # NaN is neither
            found = f"values from {buffer.min().item():g} to {buffer.max().item():g}"
            raise CheckpointError(
                f"The buffer {name!r} of the checkpoint holds {found}; allowed are values from {low:g} to {high:g}."
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


def _read_headers(files: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    held: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    held[name] = (tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise OSError(f"{str(file)!r} is not a whole safetensors file: {error}.") from error
    return held


def _first(items: Sequence[str]) -> str:
    return "; ".join(sorted(items)[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")


__all__ = [
    "FINDING",
    "CheckpointError",
    "TensorSizeError",
    "check_missing",
    "check_prototypes",
    "check_tensors",
    "explained_load_errors",
    "prefer_safetensors",
    "read_config",
]
