"""What a run was: versions, machine, command, configuration, data and code, written once when it starts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets.utils import tqdm

from ..data import CaptionedImageDataset
from ..data.images import iter_encoded
from ..durable import write_text


RUN_RECORD = "run.json"
_PACKAGES = ("modeling-pico", "torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "pillow")
# Names of options whose values are secrets.
_SECRET = re.compile(r"(token|password|secret|api_?key)$", re.IGNORECASE)
# Secrets wherever they stand: user and password of a URL, signed or secret parts of its query, tokens by their form.
_SECRETS_IN_TEXT = re.compile(r"(?<=://)[^/\s@]+(?=@)|\b(hf|gh[opsu])_[A-Za-z0-9]{20,}")
_SECRET_IN_QUERY = re.compile(
    r"([?&;#][\w.-]*(?:token|secret|password|signature|sig|key|credential|auth)[\w.-]*=)[^&;#\s]+", re.IGNORECASE
)


def describe_run(
    argv: Sequence[str],
    configuration: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, CaptionedImageDataset],
    code: str | os.PathLike,
    secrets: Collection[str] = (),
) -> dict[str, Any]:
    r"""
    Describes a run by what its results depend on. Environment variables are not read, and secrets are left out.

    Args:
        argv (`Sequence[str]`): The command, word by word.
        configuration (`Mapping[str, Mapping[str, Any]]`): Groups of options with their values.
        splits (`Mapping[str, CaptionedImageDataset]`): The data, by name of the split.
        code (`str` or `os.PathLike`): A folder of the git repository that the code was run from.
        secrets (`Collection[str]`, *optional*): Values that must not be written, as [`find_secrets`] finds them.

    Returns:
        `dict[str, Any]`: JSON values only.
    """
    return {
        "command": shlex.join(without_secrets(list(argv), secrets)),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
        "git": git_state(code),
        "data": {name: _describe_split(split) for name, split in splits.items()},
        "configuration": without_secrets(_plain(configuration), secrets),
    }


def write_run_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> Path:
    """
    Writes a record as `run.json`. A record that is there stays as it is: a run that is continued in another way (other
    options, versions, data) leaves `run-2.json`, `run-3.json`, and so on; one that differs in nothing leaves no file.
    """
    text = json.dumps(record, indent=4, ensure_ascii=False) + "\n"
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
    digest = hashlib.blake2b(digest_size=16)
    rows = dataset.dataset
    # Not the ids themselves: where none are given they are made of paths, which differ between machines.
    digest.update(json.dumps(dataset.ids.tolist()).encode())
    for name in ("captions", "style"):
        if name in rows.column_names:
            digest.update(json.dumps([name, rows[name][:]]).encode())
    if images:
        with tqdm(total=len(rows), desc="Fingerprint of the images", delay=5) as bar:
            for piece in iter_encoded(rows.select_columns("image")):
                for image in piece.to_pylist():
                    content = _content(image or {})
                    digest.update(len(content).to_bytes(8, "little"))
                    digest.update(content)
                bar.update(len(piece))
    return digest.hexdigest()


def _content(image: Mapping[str, Any]) -> bytes:
    content, path = image.get("bytes"), image.get("path")
    if content is None:
        size = os.path.getsize(path) if path and os.path.isfile(path) else None
        content = json.dumps([os.path.basename(path or ""), size]).encode()
    return content


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


def find_secrets(options: Mapping[str, Any]) -> set[str]:
    """Values of tokens and passwords, by the names of the options that were parsed; also in mappings among them."""
    secrets: set[str] = set()
    for name, value in options.items():
        if isinstance(value, Mapping):
            secrets |= find_secrets(value)
        elif isinstance(value, str) and value and _SECRET.search(name):
            secrets.add(value)
    return secrets


def without_secrets(value: Any, secrets: Collection[str] = ()) -> Any:
    """A text, or all texts in lists and mappings, with `...` in place of secrets: those given, and those of a URL."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item, secrets) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in sorted(secrets, key=len, reverse=True):
            value = value.replace(secret, "...")
        value = _SECRET_IN_QUERY.sub(r"\1...", value)
        return _SECRETS_IN_TEXT.sub("...", value)
    return value


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


def _plain(value: Any) -> Any:
    """The same in JSON's types; what has none becomes text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


__all__ = [
    "RUN_RECORD",
    "describe_run",
    "find_secrets",
    "fingerprint",
    "git_state",
    "without_secrets",
    "write_run_record",
]
