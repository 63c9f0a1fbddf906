#!/usr/bin/env python
"""
Builds the emoji-styles data set (one meaning drawn by nine design teams) from published npm packages.

    pip install -e ".[emoji]"
    python examples/emoji_styles/build.py --output_dir DIR
    python examples/emoji_styles/build.py --output_dir DIR --check REFERENCE_DIR

The packages are downloaded over HTTPS, once; their versions and SHA-512 are pinned. Where they already lie in
`--cache_dir`, no network is used. The second form also compares the result with another copy, and exits with 1 where
rows, captions or order differ, or pixels by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import tarfile
import unicodedata
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HOME
from PIL import Image
from tqdm import tqdm


@dataclass(frozen=True)
class Package:
    """
    A pinned npm package.

    Args:
        name (`str`): Its name on npm.
        version (`str`): Its version.
        integrity (`str`): `"sha512-"` and the hash of its tarball in base64, as npm publishes it.
    """

    name: str
    version: str
    integrity: str

    @property
    def file_name(self) -> str:
        return f"{self.name.split('/')[-1]}-{self.version}.tgz"

    @property
    def url(self) -> str:
        return f"https://registry.npmjs.org/{self.name}/-/{self.file_name}"


PACKAGES = {
    name: Package(name, **pinned)
    for name, pinned in json.loads(Path(__file__).with_name("packages.json").read_text()).items()
}
SPLITS = {
    "train": ("twemoji", "noto", "openmoji", "fluent-emoji-flat", "noto-v1", "emojione"),
    "validation": ("emojione-v1",),
    "test": ("fluent-emoji",),
    "far": ("fluent-emoji-high-contrast",),
}
MESSENGERS = ("iamcal", "github", "joypixels", "emojibase")
# Skin tones and hair alone are parts of emoji, not concepts.
COMPONENT_GROUP = 2
RENDER_SIZE, IMAGE_SIZE = 72, 64


# --- packages -------------------------------------------------------------------------------------


def fetch(package: Package, cache_dir: Path) -> Path:
    """
    Returns a package's tarball in `cache_dir`, downloaded where it is not there yet.

    Raises:
        `ConnectionError`: where it is neither there nor can be downloaded.
        `ValueError`: where its SHA-512 is not the pinned one.
    """
    path = cache_dir / package.file_name
    if path.is_file():
        source, content = str(path), path.read_bytes()
    else:
        source = package.url
        try:
            with urllib.request.urlopen(package.url, timeout=60) as response:
                content = response.read()
        except (OSError, HTTPException) as error:
            raise ConnectionError(
                f"cannot download {package.url} ({error}); without network, put the file at {path}"
            ) from error
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if integrity != package.integrity:
        hint = "; remove the file to download it again" if path.is_file() else ""
        raise ValueError(f"{source} is {integrity}, but {package.integrity} is pinned{hint}")
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def read_json(tarball: Path, *members: str) -> list[Any]:
    """
    Reads JSON files of a package. Nothing is ever extracted to disk, and links are not followed.

    Args:
        tarball (`Path`): The package.
        members (`str`): Their paths within it.

    Raises:
        `ValueError`: where a file is missing, is not a regular file, or is not JSON.
    """
    contents = []
    with tarfile.open(tarball, "r:gz") as archive:
        regular = {member.name: member for member in archive if member.isreg()}
        for name in members:
            if name not in regular:
                raise ValueError(f"{tarball} has no regular file {name!r}")
            try:
                contents.append(json.loads(archive.extractfile(regular[name]).read()))
            except ValueError as error:
                raise ValueError(f"{name!r} in {tarball} is not JSON: {error}") from error
    return contents


# --- concepts and captions ------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """
    One meaning.

    Args:
        concept_id (`str`): Its Unicode code points, for instance `"1F3F4-200D-2620-FE0F"`.
        name (`str`): Its Unicode short name.
        group (`str`): Its Unicode group, for instance `"flags"`.
        captions (`list[str]`): Five different ones.
        icon_names (`list[str]`): What an icon of it may be called, the likeliest first.
    """

    concept_id: str
    name: str
    group: str
    captions: list[str]
    icon_names: list[str]


def slugify(name: str) -> str:
    """`"flag: Côte d'Ivoire"` as `"flag-cote-divoire"`, the way icon sets name their icons."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", ascii_name.replace("&", "and").replace("'", "")).strip("-")


def find_keywords(entry: dict[str, Any], annotations: dict[str, Any]) -> list[str]:
    """
    An emoji's keywords without its name: those of CLDR, which keep capitals, or emojibase's tags where CLDR has none.

    Args:
        entry (`dict`): The emoji in emojibase's `data.json`.
        annotations (`dict`): CLDR's annotations by character.
    """
    character = "".join(chr(int(code, 16)) for code in entry["hexcode"].split("-"))
    annotation = annotations.get(character) or annotations.get(character.replace("\ufe0f", ""))
    keywords = annotation["default"] if annotation else entry.get("tags", [])
    return [keyword for keyword in keywords if keyword.lower() != entry["label"].lower()]


def messenger_text(name: str, shortcodes: Iterable[str]) -> str:
    """The first shortcode that says more than the name does and is no mere abbreviation, as words."""
    for shortcode in shortcodes:
        text = re.sub("[_-]", " ", shortcode)
        if text.lower() != name.lower() and re.search("[a-z]{3}", shortcode):
            return text
    return f"{name} symbol"


def make_captions(entry: dict[str, Any], keywords: list[str], shortcodes: Iterable[str], category: str) -> list[str]:
    """
    An emoji's five captions: short name; up to four keywords; a sentence; a messenger's shortcode; category and name.

    Keywords are drawn with the code points as the seed, so that captions depend on nothing but the emoji. Where two
    captions coincide (no keywords, or the shortcode is the only one), a sixth manner fills in.

    Args:
        entry (`dict`): The emoji in emojibase's `data.json`.
        keywords (`list[str]`): See [`find_keywords`].
        shortcodes (`Iterable[str]`): Of messengers, in order of preference.
        category (`str`): The name of its Unicode subgroup.
    """
    name = entry["label"]
    generator = random.Random(entry["hexcode"])
    label = name
    if name.startswith("flag: "):
        label, category = name.removeprefix("flag: "), "country flags"
        listed, sentence = f"flag of {label}", f"a small picture of the flag of {label}"
    elif keywords:
        listed = ", ".join(generator.sample(keywords, min(4, len(keywords))))
        sentence = f"a small picture of {name}, {generator.choice(keywords)}"
    else:
        listed, sentence = name, f"a small picture of {name}"
    messenger = messenger_text(name, shortcodes)
    captions = [name, listed, sentence, messenger, f"{category}: {label}", f"an emoji of {name}"]
    return list(dict.fromkeys(captions))[:5]


def load_concepts(emojibase: Path, cldr: Path) -> list[Concept]:
    """
    Reads all concepts, in the order of their code points (as text): every emoji without skin tones.

    Args:
        emojibase (`Path`): Tarball of `emojibase-data`.
        cldr (`Path`): Tarball of `cldr-annotations-full`.
    """
    sources = ("cldr", *MESSENGERS)
    entries, messages, *files = read_json(
        emojibase,
        "package/en/data.json",
        "package/en/messages.json",
        *(f"package/en/shortcodes/{source}.json" for source in sources),
    )
    (annotations,) = read_json(cldr, "package/annotations/en/annotations.json")
    groups, subgroups = ({m["order"]: m["message"] for m in messages[key]} for key in ("groups", "subgroups"))
    concepts = []
    for entry in sorted(entries, key=lambda entry: entry["hexcode"]):
        if entry.get("group") in (None, COMPONENT_GROUP):
            continue
        named = [file.get(entry["hexcode"], []) for file in files]
        cldr_name, *messengers = ([names] if isinstance(names, str) else names for names in named)
        shortcodes = [shortcode for names in messengers for shortcode in names]
        keywords = find_keywords(entry, annotations["annotations"]["annotations"])
        concepts.append(
            Concept(
                concept_id=entry["hexcode"],
                name=entry["label"],
                group=groups[entry["group"]],
                captions=make_captions(entry, keywords, shortcodes, subgroups[entry["subgroup"]]),
                icon_names=[slugify(name) for name in (entry["label"], *cldr_name, *shortcodes)],
            )
        )
    return concepts


# --- pictures -------------------------------------------------------------------------------------


def find_icon(concept: Concept, icon_set: dict[str, Any], characters: dict[str, str]) -> str | None:
    """
    The name of a concept's icon in an icon set, or `None`: by code points where the set has them, else by name.

    Args:
        concept (`Concept`): The meaning.
        icon_set (`dict`): A style's `icons.json`.
        characters (`dict`): Its `chars.json`: icon names by code points; empty for some styles.
    """
    own = characters.get(concept.concept_id.lower().replace("-fe0f", ""))
    for name in [own, *concept.icon_names]:
        if name in icon_set["icons"] or name in icon_set.get("aliases", {}):
            return name
    return None


def icon_svg(icon_set: dict[str, Any], name: str) -> str:
    """
    An icon as a square SVG; a narrow icon stands in its middle. Aliases draw their parent, unmirrored.

    Args:
        icon_set (`dict`): A style's `icons.json`.
        name (`str`): Of an icon or alias in it.
    """
    while name not in icon_set["icons"]:
        name = icon_set["aliases"][name]["parent"]
    icon = {"left": 0, "top": 0, "width": 16, "height": 16, **icon_set, **icon_set["icons"][name]}
    view = " ".join(str(icon[side]) for side in ("left", "top", "width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" viewBox="{view}">{icon["body"]}</svg>'
    )


def render(svg: str) -> bytes:
    """Draws an SVG as a PNG of 64x64 pixels on white."""
    from resvg_py import svg_to_bytes

    # System fonts would make the result depend on the machine.
    drawn = Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    file = io.BytesIO()
    on_white.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
    return file.getvalue()


def _draw(picture: dict[str, Any]) -> bytes:
    try:
        return render(picture["bytes"])
    except ValueError as error:
        raise ValueError(f"cannot draw {picture['path']}: {error}") from error


def style_rows(style: str, tarball: Path, concepts: list[Concept]) -> list[dict[str, Any]]:
    """
    The rows of a style, not drawn yet: `image` holds a path, and under `"bytes"` the SVG's text.

    Args:
        style (`str`): Its name.
        tarball (`Path`): Its package.
        concepts (`list[Concept]`): All concepts; those that the style has no icon of are left out.
    """
    icon_set, characters = read_json(tarball, "package/icons.json", "package/chars.json")
    rows = []
    for concept in concepts:
        name = find_icon(concept, icon_set, characters)
        if name is not None:
            rows.append(
                {
                    "image": {"bytes": icon_svg(icon_set, name), "path": f"{style}/{concept.concept_id}.png"},
                    "captions": concept.captions,
                    "style": style,
                    "concept": concept.name,
                    "concept_id": concept.concept_id,
                    "group": concept.group,
                }
            )
    return rows


def draw(rows: list[dict[str, Any]], num_processes: int) -> None:
    """Replaces the SVG of every row by its PNG, in several processes."""
    pictures = [row["image"] for row in rows]
    progress = {"total": len(rows), "desc": "Drawing", "unit": "image"}
    if num_processes == 1:
        images = list(tqdm(map(_draw, pictures), **progress))
    else:
        # A forked child could inherit a lock that a thread of pyarrow holds.
        with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
            images = list(tqdm(pool.imap(_draw, pictures, chunksize=32), **progress))
    for row, image in zip(rows, images, strict=True):
        row["image"]["bytes"] = image


# --- files ----------------------------------------------------------------------------------------


def write_split(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes rows as parquet that `datasets` reads with its `Image` feature; an old file stays whole until the end."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    columns = ("style", "concept", "concept_id", "group")
    texts = {column: Value("string") for column in columns}
    features = Features({"image": ImageFeature(), "captions": List(Value("string")), **texts})
    partial = path.with_suffix(".part")
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    pq.write_table(table, partial, row_group_size=500, compression="zstd")
    partial.replace(path)


def build(output_dir: Path, cache_dir: Path, num_processes: int) -> None:
    """
    Downloads, draws and writes the data set, then prints the rows of each split and style.

    Args:
        output_dir (`Path`): Gets `train.parquet`, `validation.parquet`, `test.parquet` and `far.parquet`.
        cache_dir (`Path`): Keeps the packages.
        num_processes (`int`): That draw.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    tarballs = {name: fetch(package, cache_dir) for name, package in tqdm(PACKAGES.items(), desc="Packages")}
    concepts = load_concepts(tarballs["emojibase-data"], tarballs["cldr-annotations-full"])
    rows = {
        style: style_rows(style, tarballs[f"@iconify-json/{style}"], concepts)
        for styles in SPLITS.values()
        for style in styles
    }
    draw([row for of_style in rows.values() for row in of_style], num_processes)
    for split, styles in SPLITS.items():
        write_split([row for style in styles for row in rows[style]], output_dir / f"{split}.parquet")
        print(f"{split}: {sum(len(rows[style]) for style in styles)} rows")
        for style in styles:
            print(f"    {style}: {len(rows[style])}")


# --- comparison -----------------------------------------------------------------------------------


def _pixels(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"), dtype=np.int16)


def compare_split(built: Path, reference: Path) -> dict[str, Any]:
    """
    Compares two parquet files row by row; a row is named by its style and concept.

    Returns:
        `dict`: `rows` that both have; `missing` and `extra` rows of the built file (doubled ones are extra);
        `same_order`; how many rows have other `captions` or other `labels` (`concept`, `group`); `mean_difference` of
        pixels over all rows (absolute, of 255), `worst_image`, the largest mean of one image, and `max_difference` of
        one pixel. Images of unequal sizes differ by 255.
    """
    for path in (built, reference):
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
    built_rows, reference_rows = (pq.read_table(path).to_pylist() for path in (built, reference))
    ours, theirs = ({(r["style"], r["concept_id"]): r for r in rows} for rows in (built_rows, reference_rows))
    both = [key for key in theirs if key in ours]
    means, largest = [0.0], 0
    for key in both:
        a, b = _pixels(ours[key]["image"]), _pixels(theirs[key]["image"])
        difference = np.abs(a - b) if a.shape == b.shape else np.array([255])
        means.append(float(difference.mean()))
        largest = max(largest, int(difference.max()))
    return {
        "rows": len(both),
        "missing": len(reference_rows) - len(both),
        "extra": len(built_rows) - len(both),
        "same_order": [key for key in ours if key in theirs] == both,
        "captions": sum(ours[key]["captions"] != theirs[key]["captions"] for key in both),
        "labels": sum(any(ours[key][c] != theirs[key][c] for c in ("concept", "group")) for key in both),
        "mean_difference": sum(means) / max(len(both), 1),
        "worst_image": max(means),
        "max_difference": largest,
    }


def check(output_dir: Path, reference_dir: Path, tolerance: float) -> bool:
    """
    Prints how every split differs from a reference copy; returns whether all agree.

    Args:
        output_dir (`Path`): The built copy.
        reference_dir (`Path`): The other one.
        tolerance (`float`): Largest mean absolute difference of one image's pixels, of 255.
    """
    agree = True
    for split in SPLITS:
        result = compare_split(output_dir / f"{split}.parquet", reference_dir / f"{split}.parquet")
        print(f"{split}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()))
        same = result["same_order"] and not any(result[key] for key in ("missing", "extra", "captions", "labels"))
        agree = agree and same and result["worst_image"] <= tolerance
    return agree


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    cache = Path(HF_HOME) / "emoji_styles"
    parser = argparse.ArgumentParser(description="Builds the emoji-styles data set from published npm packages.")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets the four parquet files")
    parser.add_argument("--cache_dir", type=Path, default=cache, help="keeps the packages (default: %(default)s)")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--check", type=Path, metavar="REFERENCE_DIR", help="compare with this copy afterwards")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        help="of --check: largest mean absolute difference of one image's pixels, of 255 (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.num_processes < 1:
        parser.error(f"--num_processes is {options.num_processes}, but must be at least 1")
    if options.check is not None and not options.check.is_dir():
        parser.error(f"--check is {options.check}, which is not a folder")
    if options.check is not None and options.check.resolve() == options.output_dir.resolve():
        parser.error(f"--check is {options.check}, the folder that is written; give another copy")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Builds, and compares where asked to. Exits with 1 where anything fails or differs."""
    options = parse_arguments(arguments)
    if find_spec("resvg_py") is None:
        raise SystemExit('error: drawing needs resvg-py: pip install -e ".[emoji]" (or: pip install resvg-py)')
    try:
        build(options.output_dir, options.cache_dir, options.num_processes)
        if options.check is not None and not check(options.output_dir, options.check, options.tolerance):
            raise SystemExit(f"error: {options.output_dir} and {options.check} differ")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
