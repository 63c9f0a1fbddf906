"""What a run was: versions, machine, command, configuration, data and code, written once when it starts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..data import CaptionedImageDataset
from ..data.images import iter_encoded
from .checkpoint_files import write_text


_PACKAGES = ("modeling-pico", "torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "pillow")
_SECRET = re.compile(r"(token|password|secret|api_?key)$", re.IGNORECASE)


def describe_run(
    argv: Sequence[str],
    configuration: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, CaptionedImageDataset],
    code: str | os.PathLike,
) -> dict[str, Any]:
    r"""
    Describes a run by what its results depend on. Environment variables are not read, and secrets are left out.

    Args:
        argv (`Sequence[str]`): The command, word by word.
        configuration (`Mapping[str, Mapping[str, Any]]`): Groups of options with their values.
        splits (`Mapping[str, CaptionedImageDataset]`): The data, by name of the split.
        code (`str` or `os.PathLike`): A folder of the git repository that the code was run from.

    Returns:
        `dict[str, Any]`: JSON values only.
    """
    return {
        "command": shlex.join(without_secrets(argv)),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
        "git": git_state(code),
        "data": {name: _describe_split(split) for name, split in splits.items()},
        "configuration": {
            group: {name: _plain(name, value) for name, value in options.items()}
            for group, options in configuration.items()
        },
    }


def write_run_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> Path:
    """
    Writes a record as `run.json`. A record that is there stays as it is: a run that is continued in another way (other
    options, versions, data) leaves `run-2.json`, `run-3.json`, and so on; one that differs in nothing leaves no file.
    """
    text = json.dumps(record, indent=4, ensure_ascii=False) + "\n"
    number = 1
    while (path := Path(folder, "run.json" if number == 1 else f"run-{number}.json")).exists():
        if path.read_text(encoding="utf-8") == text:
            return path
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def fingerprint(dataset: CaptionedImageDataset) -> str:
    """
    Names the data by its content: which rows share an id, captions, styles, and images in their order. Of images that
    are files, the name and the size count, not the folder and not the pixels.
    """
    digest = hashlib.blake2b(digest_size=16)
    rows = dataset.dataset
    # Not the ids themselves: where none are given they are made of paths, which differ between machines.
    digest.update(json.dumps(dataset.ids.tolist()).encode())
    for name in ("captions", "style"):
        if name in rows.column_names:
            digest.update(json.dumps([name, rows[name][:]]).encode())
    for piece in iter_encoded(rows.select_columns("image")):
        for image in piece.to_pylist():
            image = image or {}
            content, path = image.get("bytes"), image.get("path")
            if content is None:
                size = os.path.getsize(path) if path and os.path.isfile(path) else None
                content = json.dumps([os.path.basename(path or ""), size]).encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


def git_state(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Commit of the repository around a folder and a digest of changes to it; None without git or a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", os.fspath(folder), *words]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode(errors="replace")

    try:
        commit = git("rev-parse", "HEAD").strip()
        changes = git("status", "--porcelain", "--untracked-files=no") and git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changes": hashlib.sha256(changes.encode()).hexdigest() if changes else None}


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The words of a command, with `...` in place of the values of tokens and passwords."""
    words: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("-") and _SECRET.search(name) is not None
        words.append("..." if hide and not word.startswith("-") else f"{name}=..." if is_secret and equals else word)
        hide = is_secret and not equals
    return words


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    # What the last bits of a result depend on, beside versions and seed.
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _describe_split(split: CaptionedImageDataset) -> dict[str, Any]:
    return {"images": len(split), "texts": int(split.num_captions.sum()), "fingerprint": fingerprint(split)}


def _plain(name: str, value: Any) -> Any:
    if _SECRET.search(name) and value is not None:
        return "..."
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value


__all__ = ["describe_run", "fingerprint", "git_state", "without_secrets", "write_run_record"]
