"""The text formats of retrieval research: JSON of Karpathy and of COCO, and pairs of caption and id files."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .splits import find_split, join_restval, split_of_file


# One entry of `read_*`: the image's path (None without images), its captions, and its id. An id counts within its file
# alone, so that a digest of the file is a part of it: image 7 of one data set is not image 7 of another.
CaptionRow = dict[str, Any]
CAPTIONS_PER_IMAGE = 5
_COCO_PREFIX = "captions_"


def has_image_list(path: Path) -> bool:
    """Whether a JSON file is laid out as `{"images": [...]}` (Karpathy's splits, COCO), judged by its beginning."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        start = file.read(1 << 16).lstrip()
    return start.startswith("{") and re.search(r'"images"\s*:\s*\[', start) is not None


def find_image_lists(folder: Path) -> list[Path]:
    """COCO's files of captions in a folder, such as its `annotations`."""
    return [path for path in sorted(folder.glob(f"{_COCO_PREFIX}*.json")) if has_image_list(path)]


def choose_image_list(paths: Sequence[Path], split: str) -> Path:
    """The only one of the paths, or else the one that is the split by its name; ValueError if none or several are."""
    if len(paths) == 1:
        return paths[0]
    files = [path.name for path in paths]
    splits = [split_of_file(path) for path in paths]
    wanted = find_split(split, sorted(set(splits)), f"{files} in {str(paths[0].parent)!r}")
    chosen = [path for path, own in zip(paths, splits, strict=True) if own == wanted]
    if len(chosen) > 1:
        raise ValueError(
            f"{[path.name for path in chosen]} in {str(paths[0].parent)!r} are all the split {wanted!r}. Name one of "
            "the files, or a pattern that leaves one of each split (`captions_*2017.json`)."
        )
    return chosen[0]


def read_image_list(path: Path, split: str, image_dir: Path) -> list[CaptionRow]:
    """
    Reads one split of a file in one of two layouts.

    - Karpathy's: `{"images": [{"filename", "filepath"?, "split", "imgid", "sentences"}]}`. `restval` counts as
      `train`, as is usual for MS-COCO. The image lies at `image_dir/filepath/filename`, or at `image_dir/filename`
      where there is no folder `filepath`.
    - COCO's: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, all of which is the split
      that the name of the file says (`captions_val2017.json`). The image lies at `image_dir/val2017/file_name`, or at
      `image_dir/file_name` where there is no such folder.
    """
    contents = _read_json(path)
    entries = contents.get("images") if isinstance(contents, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} must be an object with a list 'images'.")
    if "annotations" in contents:
        entries = _as_karpathy(path, entries, contents["annotations"])
    wrong = [number for number, entry in enumerate(entries) if not _is_entry(entry)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(entries)} entries of 'images' in {str(path)!r} are wrong, the first: {wrong[:5]}. "
            "Each needs a 'filename', a 'split' and 'sentences', a list of {'raw': caption}; it may have a 'filepath' "
            "(text) and an 'imgid' (an integer or text)."
        )
    splits = join_restval([entry["split"] for entry in entries])
    split = find_split(split, sorted(set(splits)), repr(str(path)))
    parts = {entry.get("filepath", "") for entry in entries}
    folders = {part: image_dir / part if (image_dir / part).is_dir() else image_dir for part in parts}
    scope = _digest(path)
    rows: list[CaptionRow] = [
        {
            "image": str(folders[entry.get("filepath", "")] / entry["filename"]),
            # JSON can write halves of a character (\ud83d), which text cannot hold.
            "captions": [sentence["raw"].encode(errors="replace").decode() for sentence in entry["sentences"]],
            "image_id": f"{scope}:{entry.get('imgid', number)}",
        }
        for number, (entry, entry_split) in enumerate(zip(entries, splits, strict=True))
        if entry_split == split
    ]
    images: dict[str, str] = {}
    for row in rows:
        # As in lists of two data sets that were joined, which both count from 0.
        if images.setdefault(row["image_id"], row["image"]) != row["image"]:
            image_id = row["image_id"].removeprefix(f"{scope}:")
            raise ValueError(f"{str(path)!r} gives one id ({image_id}) to several images.")
    return rows


def _as_karpathy(path: Path, images: list[Any], annotations: Any) -> list[dict[str, Any]]:
    """Lists of COCO as entries of Karpathy's list."""
    common = {"split": split_of_file(path), "filepath": path.stem.removeprefix(_COCO_PREFIX)}
    try:
        entries = {
            image["id"]: {**common, "filename": image["file_name"], "imgid": image["id"], "sentences": []}
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


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("sentences"), list):
        return False
    image_id, names = entry.get("imgid", 0), [entry.get("filename"), entry.get("split"), entry.get("filepath", "")]
    captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in entry["sentences"]]
    return (
        all(isinstance(text, str) for text in (*names, *captions))
        and isinstance(image_id, (int, str))
        and not isinstance(image_id, bool)
    )


def find_caption_files(path: Path, split: str) -> tuple[Path, Path, Path] | None:
    """
    Finds `{path}/{split}_caps.txt` or `{path}_{split}_caps.txt`, and `..._ids.txt` and `..._id_mapping.json` there.

    Returns:
        The three paths, or `None` if there are no such files at all; ValueError if there are, but not for this split.
    """
    folder, prefix = (path, "") if path.is_dir() else (path.parent, path.name + "_")
    available = sorted(file.name for file in folder.glob(f"{glob.escape(prefix)}*_caps.txt"))
    if not available:
        return None
    captions = folder / f"{prefix}{split}_caps.txt"
    if not captions.is_file():
        raise ValueError(
            f"{str(captions)!r} does not exist; the files with captions are {available}. A split is what stands "
            "before `_caps.txt`; a prefix before that belongs to the name of the data (`folder/prefix`)."
        )
    mappings = [folder / f"{prefix}id_mapping.json", folder / "id_mapping.json"]
    return captions, folder / f"{prefix}{split}_ids.txt", next(filter(Path.is_file, mappings), mappings[0])


def read_caption_files(captions_path: Path, ids_path: Path, mapping_path: Path) -> list[CaptionRow]:
    """
    Reads captions (one a line) and the ids of their images (one a caption, or one an image with five captions each,
    which follows from the numbers of lines). The mapping gives the file name of an id; without it there are no images.
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
    files = dict.fromkeys(grouped)
    if mapping_path.is_file():
        files = _read_json(mapping_path)
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{str(mapping_path)!r} must be an object that gives the file name of each id.")
        if unknown := [image_id for image_id in grouped if image_id not in files]:
            raise ValueError(
                f"{str(mapping_path)!r} lacks {len(unknown)} of {len(grouped)} ids, the first are {unknown[:5]}."
            )
    scope = _digest(captions_path, ids_path)
    return [
        {"image": files[image_id], "captions": texts, "image_id": f"{scope}:{image_id}"}
        for image_id, texts in grouped.items()
    ]


def _digest(*paths: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    try:
        # Some editors put a mark at the beginning, which would become a part of the first id.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not text in UTF-8: {error}.") from error


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique_names)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {error}.") from error


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # `json` takes the last of two values; which of two files is the image of an id must not be left to that.
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"says twice what {name!r} is")
        found[name] = value
    return found


def _read_lines(path: Path) -> list[str]:
    # Not `splitlines`: it also breaks at characters that may stand inside a caption, and the count of lines matters.
    return [line.rstrip("\r") for line in _read_text(path).removesuffix("\n").split("\n")]
