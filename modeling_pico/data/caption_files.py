"""The text formats of retrieval research: JSON of Karpathy and of COCO, and pairs of caption and id files."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .splits import find_split, split_of_file


logger = logging.get_logger(__name__)

# One entry of `read_*`: the image's path (None without images), its captions, and its id. An id counts within its file
# alone, so that a digest of the file is a part of it: image 7 of one data set is not image 7 of another.
CaptionRow = dict[str, Any]
CAPTIONS_PER_IMAGE = 5
# Halves of a character that JSON can write (\ud83d) and text cannot hold.
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


def has_image_list(path: Path) -> bool:
    """Whether a JSON file is laid out as `{"images": [...]}` (Karpathy's splits, COCO), judged by its beginning."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        start = file.read(1 << 16).lstrip()
    return start.startswith("{") and re.search(r'"images"\s*:\s*\[', start) is not None


def read_image_list(path: Path, split: str, image_dir: Path, with_images: bool) -> list[CaptionRow]:
    """
    Reads one split of a file in one of two layouts.

    - Karpathy's: `{"images": [{"filename", "filepath"?, "split", "imgid", "sentences"}]}`. `restval` counts as
      `train`, as is usual for MS-COCO. The image lies at `image_dir/filepath/filename`, or at `image_dir/filename`
      where there is no folder `filepath`.
    - COCO's: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, all of which is the split
      that the name of the file says (`captions_val2017.json`). The image lies at `image_dir/file_name`.
    """
    contents = _read_json(path)
    entries = contents.get("images") if isinstance(contents, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} must be an object with a list 'images'.")
    if "annotations" in contents:
        entries = _as_karpathy(path, entries, contents["annotations"])
    problems = [(number, problem) for number, entry in enumerate(entries) if (problem := _entry_problem(entry))]
    if problems:
        first = "; ".join(f"entry {number} {problem}" for number, problem in problems[:5])
        raise ValueError(f"{len(problems)} of {len(entries)} entries of 'images' in {str(path)!r} are wrong: {first}.")
    splits = ["train" if entry["split"] == "restval" else entry["split"] for entry in entries]
    split = find_split(split, sorted(set(splits)), repr(str(path)))
    scope = _digest(path)
    folders: dict[str, Path] = {}
    rows = []
    replaced = 0
    for number, (entry, entry_split) in enumerate(zip(entries, splits, strict=True)):
        if entry_split != split:
            continue
        sub = entry.get("filepath", "")
        if sub not in folders:
            folders[sub] = image_dir / sub if (image_dir / sub).is_dir() else image_dir
        captions = [sentence["raw"] for sentence in entry["sentences"]]
        repaired = [_LONE_SURROGATES.sub("\ufffd", caption) for caption in captions]
        replaced += sum(old != new for old, new in zip(captions, repaired, strict=True))
        rows.append(
            {
                "image": str(folders[sub] / entry["filename"]) if with_images else None,
                "captions": repaired,
                "image_id": f"{scope}:{entry.get('imgid', number)}",
            }
        )
    if replaced:
        logger.warning(f"{replaced} captions of {str(path)!r} hold halves of characters, which became \ufffd.")
    return rows


def _as_karpathy(path: Path, images: list[Any], annotations: Any) -> list[dict[str, Any]]:
    """Lists of COCO as entries of Karpathy's list."""
    split = split_of_file(path)
    try:
        entries = {
            image["id"]: {"filename": image["file_name"], "split": split, "imgid": image["id"], "sentences": []}
            for image in images
        }
        for annotation in annotations:
            entries[annotation["image_id"]]["sentences"].append({"raw": annotation["caption"]})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not laid out like COCO's captions ({type(error).__name__}: {error}): each of its "
            "'images' needs an 'id' and a 'file_name', each of its 'annotations' the 'image_id' of an image and a "
            "'caption'."
        ) from error
    if len(entries) < len(images):
        raise ValueError(f"{str(path)!r} gives one id to several images.")
    return list(entries.values())


def _entry_problem(entry: Any) -> str:
    """What is wrong with an entry of Karpathy's `images`, or an empty string."""
    if not isinstance(entry, dict):
        return "is not an object"
    for name in ("filename", "split", "filepath"):
        value = entry.get(name, "" if name == "filepath" else None)
        if not isinstance(value, str) or "\0" in value or _LONE_SURROGATES.search(value):
            return f"has the {name} {json.dumps(value)[:80]} (text is needed)"
    image_id = entry.get("imgid", 0)
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)) or _LONE_SURROGATES.search(str(image_id)):
        return f"has the imgid {json.dumps(image_id)[:80]} (an integer or text is needed)"
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not all(
        isinstance(sentence, dict) and isinstance(sentence.get("raw"), str) for sentence in sentences
    ):
        return "has 'sentences' that are not a list of {'raw': caption}"
    return ""


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
    available = sorted(file.name for file in folder.glob(f"{glob.escape(prefix)}*_caps.txt"))
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
    scope = _digest(captions_path, ids_path)
    return [
        {
            "image": str(image_dir / files[image_id]) if with_images else None,
            "captions": image_captions,
            "image_id": f"{scope}:{image_id}",
        }
        for image_id, image_captions in grouped.items()
    ]


def _image_files(ids: list[str], mapping_path: Path | None, ids_path: Path) -> dict[str, str]:
    if mapping_path is None:
        raise ValueError(
            f"There is no 'id_mapping.json' beside {str(ids_path)!r}, so the images of the ids are unknown. "
            "Pass with_images=False to load the captions alone."
        )
    mapping = _read_json(mapping_path)
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise ValueError(f"{str(mapping_path)!r} must be an object that gives the file name of each id.")
    unknown = [image_id for image_id in ids if image_id not in mapping]
    if unknown:
        raise ValueError(f"{str(mapping_path)!r} lacks {len(unknown)} of {len(ids)} ids, the first are {unknown[:5]}.")
    return mapping


def _digest(*paths: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    # Some editors put a mark at the beginning, which would become a part of the first id.
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{str(path)!r} is not text in UTF-8: line {line} holds the byte {error.object[error.start]:#x}."
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path), object_pairs_hook=_unique_names)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} is nested too deeply.") from error
    except _DuplicateName as error:
        raise ValueError(f"{str(path)!r} says twice what {error.args[0]!r} is.") from error


class _DuplicateName(Exception):
    pass


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON readers take the last of two values; which of two files is the image of an id must not be left to that.
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateName(name)
            seen.add(name)
    return found


def _read_lines(path: Path) -> list[str]:
    # Not `splitlines`: it also breaks at characters that may stand inside a caption, and the count of lines matters.
    lines = _read_text(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.rstrip("\r") for line in lines]
