"""The two text formats of retrieval research: Karpathy's JSON and pairs of caption and id files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


# One entry of `read_*`: the image's path (None without images), its captions, and its id.
CaptionRow = dict[str, Any]
CAPTIONS_PER_IMAGE = 5


def is_karpathy_json(path: Path) -> bool:
    """Whether a JSON file is laid out like Karpathy's splits, judged by its beginning."""
    with open(path, encoding="utf-8") as file:
        start = file.read(1 << 16).lstrip()
    return start.startswith("{") and re.search(r'"images"\s*:\s*\[', start) is not None


def read_karpathy_json(path: Path, split: str, image_dir: Path, with_images: bool) -> list[CaptionRow]:
    """
    Reads one split of a file laid out as `{"images": [{"filename", "filepath"?, "split", "imgid", "sentences"}]}`.

    `restval` counts as `train`, as is usual for MS-COCO. The image lies at `image_dir/filepath/filename`, or at
    `image_dir/filename` where there is no folder `filepath`.
    """
    with open(path, encoding="utf-8") as file:
        entries = json.load(file)["images"]
    splits = ["train" if entry["split"] == "restval" else entry["split"] for entry in entries]
    if split not in splits:
        raise ValueError(f"{str(path)!r} has no split {split!r}; it has {sorted(set(splits))}.")
    folders: dict[str, Path] = {}
    rows = []
    for number, (entry, entry_split) in enumerate(zip(entries, splits, strict=True)):
        if entry_split != split:
            continue
        sub = entry.get("filepath", "")
        if sub not in folders:
            folders[sub] = image_dir / sub if (image_dir / sub).is_dir() else image_dir
        rows.append(
            {
                "image": str(folders[sub] / entry["filename"]) if with_images else None,
                "captions": [sentence["raw"] for sentence in entry["sentences"]],
                "image_id": str(entry.get("imgid", number)),
            }
        )
    return rows


def find_caption_files(name: str, split: str) -> tuple[Path, Path, Path | None] | None:
    """
    Finds `[prefix_]{split}_caps.txt`, `[prefix_]{split}_ids.txt` and `[prefix_]id_mapping.json`.

    `name` is their folder, or their folder and prefix (`data/f30k` for `data/f30k_test_caps.txt`).

    Returns:
        The three paths (the last `None` if there is no mapping), or `None` if `name` holds no such files at all.

    Raises:
        ValueError: if there are such files, but not for this split, for more than one prefix, or without their ids.
    """
    path = Path(name)
    folder, prefix = (path, "") if path.is_dir() else (path.parent, path.name + "_")
    if not folder.is_dir():
        return None
    available = sorted(file.name for file in folder.glob(f"{prefix}*_caps.txt"))
    if not available:
        return None
    exact = f"{prefix}{split}_caps.txt"
    matches = [exact] if exact in available else []
    if not matches and not prefix:
        matches = [file for file in available if file.endswith(f"_{split}_caps.txt")]
    if len(matches) != 1:
        problem = "no captions of" if not matches else "more than one caption file for"
        raise ValueError(
            f"{name!r} has {problem} the split {split!r}; its caption files are {available}. A split is what stands "
            "before `_caps.txt`; a prefix before that belongs to the name (`folder/prefix`)."
        )
    stem = matches[0].removesuffix(f"{split}_caps.txt")
    ids = folder / f"{stem}{split}_ids.txt"
    if not ids.is_file():
        raise ValueError(f"{str(folder / matches[0])!r} has no ids beside it: {ids.name!r} does not exist.")
    mappings = [folder / f"{stem}id_mapping.json", folder / "id_mapping.json"]
    return folder / matches[0], ids, next((file for file in mappings if file.is_file()), None)


def read_caption_files(
    captions_path: Path, ids_path: Path, mapping_path: Path | None, image_dir: Path, with_images: bool
) -> list[CaptionRow]:
    """
    Reads captions (one a line) and the ids of their images (one a caption, or one an image with five captions each).

    Which of the two it is follows from the numbers of lines. The mapping gives the file name of an id, below
    `image_dir`.
    """
    captions, ids = _read_lines(captions_path), _read_lines(ids_path)
    if len(captions) == CAPTIONS_PER_IMAGE * len(ids):
        ids = [image_id for image_id in ids for _ in range(CAPTIONS_PER_IMAGE)]
    elif len(captions) != len(ids):
        raise ValueError(
            f"{str(ids_path)!r} must have one line a caption ({len(captions)}) or one line an image with "
            f"{CAPTIONS_PER_IMAGE} captions each ({len(captions) / CAPTIONS_PER_IMAGE:g}), but has {len(ids)}."
        )
    grouped: dict[str, list[str]] = {}
    for image_id, caption in zip(ids, captions, strict=True):
        grouped.setdefault(image_id.strip(), []).append(caption)
    if "" in grouped:
        raise ValueError(f"{str(ids_path)!r} has an empty line among the ids (line {ids.index('') + 1}).")
    files = _image_files(list(grouped), mapping_path, ids_path) if with_images else {}
    return [
        {
            "image": str(image_dir / files[image_id]) if with_images else None,
            "captions": image_captions,
            "image_id": image_id,
        }
        for image_id, image_captions in grouped.items()
    ]


def _image_files(ids: list[str], mapping_path: Path | None, ids_path: Path) -> dict[str, str]:
    if mapping_path is None:
        raise ValueError(
            f"There is no 'id_mapping.json' beside {str(ids_path)!r}, so the images of the ids are unknown. "
            "Pass with_images=False to load the captions alone."
        )
    with open(mapping_path, encoding="utf-8") as file:
        mapping = json.load(file)
    unknown = [image_id for image_id in ids if image_id not in mapping]
    if unknown:
        raise ValueError(f"{str(mapping_path)!r} lacks {len(unknown)} of {len(ids)} ids, the first are {unknown[:5]}.")
    return mapping


def _read_lines(path: Path) -> list[str]:
    # Not `splitlines`: it also breaks at characters that may stand inside a caption, and the count of lines matters.
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.rstrip("\r") for line in lines]
