"""What reproduces a run (versions, machine, command, options, data and code), written once when it starts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..data import CaptionedImageDataset
from ..data.images import file_state, image_keys
from ..durable import write_text
from ..training.secrets import without_secrets


RUN_RECORD = "run.json"
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "pillow")


def describe_run(
    command: str,
    options: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, CaptionedImageDataset],
    secrets: Collection[str] = (),
) -> dict[str, Any]:
    r"""
    Describes a run by what its results depend on. Environment variables are not read, and secrets are left out.

    Args:
        command (`str`): The command, without its secrets.
        options (`Mapping[str, Mapping[str, Any]]`): Groups of options with their values.
        splits (`Mapping[str, CaptionedImageDataset]`): The data, by name of the split.
        secrets (`Collection[str]`, *optional*): Values that must not be written, as [`find_secrets`] finds them.
    """
    return {
        "command": command,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        # What the last bits of a result depend on, beside versions and seed.
        "machine": {
            "platform": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "git": git_state(Path(__file__).parent),
        "data": {
            name: {"images": len(split), "texts": int(split.num_captions.sum()), "fingerprint": fingerprint(split)}
            for name, split in splits.items()
        },
        "configuration": without_secrets(options, secrets),
    }


def write_run_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> Path:
    """
    Writes a record as `run.json`. One that is there stays as it is: a run that is continued with other options,
    versions or data leaves `run-2.json`, `run-3.json`, and so on; one that differs in nothing leaves no file.
    """
    text = json.dumps(record, indent=4, ensure_ascii=False, default=str) + "\n"
    number = 1
    while (path := Path(folder, RUN_RECORD if number == 1 else f"run-{number}.json")).exists():
        if path.read_text(encoding="utf-8") == text:
            return path
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def fingerprint(dataset: CaptionedImageDataset, images: bool = True) -> str:
    r"""
    Names the data by its content: which rows share an id, captions, styles, and images in their order. Of images that
    are files, the name and the size count, not the folder and not the pixels.

    Args:
        dataset ([`CaptionedImageDataset`]): The data.
        images (`bool`, *optional*, defaults to `True`): Whether images count; without, nothing large is read.
    """
    # Not the ids themselves: where none are given they are made of paths, which differ between machines.
    known = [dataset.ids.tolist(), dataset.dataset["captions"][:], dataset.styles]
    digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=16)
    if images:
        for kind, value in image_keys(dataset.dataset.select_columns("image")):
            if kind != "bytes":
                value = repr((os.path.basename(str(value)), file_state(str(value))[:1])).encode()
            digest.update(value)
    return digest.hexdigest()


def git_state(folder: str | os.PathLike) -> str | None:
    """Commit of the repository around a folder, with `-dirty` if files have changed; None without git."""
    command = ["git", "-C", os.fspath(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


__all__ = [
    "RUN_RECORD",
    "describe_run",
    "fingerprint",
    "git_state",
    "write_run_record",
]
