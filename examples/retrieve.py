#!/usr/bin/env python
"""
Searches a folder of pictures by text and lays the best ones out on a contact sheet.

    python examples/retrieve.py outputs/quickstart ~/Pictures "a red circle above a blue star" --output hits.png

What a file holds decides whether it is a picture, not its name. Each picture is encoded once: its embeddings stay in
`--cache_dir` and are used again for as long as neither the file nor the model changes. Where all pictures have one
look that training has not shown (drawings, scans), `--align` moves them to where images of training lie; then they are
all encoded again when one of them changes, since the move is that of the whole folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_pico import GalleryAlignment, PicoModel, PicoProcessor, decode_image
from modeling_pico.data import BadImageError
from modeling_pico.model.gallery_alignment_pico import spread_rows


BATCH = 32
# Tells a contact sheet among the pictures, as EXIF's name of the software.
SOFTWARE, MARK = 0x0131, "PICO contact sheet"
# Layout of the contact sheet in pixels.
COLUMNS, TILE, GAP, MARGIN, LABEL = 4, 240, 20, 32, 54
PAPER, CARD, EDGE, INK, FAINT = "white", "#f1f2f4", "#d9dce1", "#1c1e21", "#7a7f87"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a PICO checkpoint")
    parser.add_argument("pictures", type=Path, help="folder, searched with all folders in it")
    parser.add_argument("query", help="what to look for")
    parser.add_argument("--top_k", type=int, default=8, help="number of pictures to show (default: 8)")
    parser.add_argument("--align", action="store_true", help="the pictures have one look, which training did not show")
    parser.add_argument("--output", type=Path, default=Path("hits.png"), help="contact sheet (default: hits.png)")
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "pico", help="for embeddings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def find_files(folder: Path) -> dict[str, Path]:
    """All files under a folder, by a name that changes when the file does."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder.")
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            # Files that change places keep size and time of their content, but not their number (inode) and its time.
            state = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
            files["|".join([path.relative_to(folder).as_posix(), *map(str, state)])] = path
    if not files:
        raise SystemExit(f"There is no file in {folder}.")
    return files


def cache_file(
    cache_dir: Path, folder: Path, model: PicoModel, processor: PicoProcessor, aligned: dict[str, Path] | None = None
) -> Path:
    """One file for each folder and model, and of aligned pictures for each state of the folder, which moves them."""
    digest = hashlib.blake2b(digest_size=12)
    parts = [str(folder.resolve()), model.config.to_json_string(), processor.image_processor.to_json_string()]
    for text in parts if aligned is None else [*parts, "aligned", *aligned]:
        digest.update(text.encode(errors="surrogateescape"))
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return cache_dir / f"{digest.hexdigest()}.safetensors"


def read_picture(path: Path) -> Image.Image:
    """The picture in a file; `BadImageError` for what is none, and for a contact sheet of an earlier search."""
    picture = decode_image(path)
    with Image.open(path) as opened:
        if opened.getexif().get(SOFTWARE) == MARK:
            raise BadImageError(f"{str(path)!r} is a contact sheet.")
    return picture


def measure(files: dict[str, Path], model: PicoModel, processor: PicoProcessor) -> GalleryAlignment:
    """What moves the pictures to where images of training lie, from as many of them as it takes."""

    def batches() -> Iterator[Mapping[str, torch.Tensor]]:
        paths = list(files.values())
        chosen = spread_rows([None] * len(paths))
        for start in range(0, len(chosen), BATCH):
            pictures = []
            for row in chosen[start : start + BATCH]:
                with contextlib.suppress(BadImageError):  # named when it is to be encoded
                    pictures.append(read_picture(paths[row]))
            if pictures:
                yield processor(images=pictures, return_tensors="pt")

    try:
        return model.align(batches())
    except ValueError as error:
        raise SystemExit(f"--align: {error}") from None


def encode(
    files: dict[str, Path], model: PicoModel, processor: PicoProcessor, align: bool = False
) -> dict[str, torch.Tensor]:
    """Embeddings `(tokens, dim)` of each picture in half precision; what is no picture is named and left out."""
    alignment = measure(files, model, processor) if align else False
    embeddings = {}
    names = list(files)
    for start in range(0, len(names), BATCH):
        images = {}
        for name in names[start : start + BATCH]:
            try:
                images[name] = read_picture(files[name])
            except BadImageError as error:
                print(f"Left out: {error}")
        encoded = processor.encode_images(model, list(images.values()), align=alignment, batch_size=BATCH)
        for name, tokens in zip(images, encoded, strict=True):
            if tokens.isfinite().all():
                embeddings[name] = tokens.half().cpu()
            else:
                print(f"Left out: the model gives no numbers for {str(files[name])!r}.")
    return embeddings


def load_cache(file: Path) -> dict[str, torch.Tensor]:
    """What was encoded before. A cache is a help and no reason to fail: a damaged one counts as empty."""
    if not file.is_file():
        return {}
    try:
        cached = load_file(file)
    except (OSError, SafetensorError) as error:
        print(f"Warning: the cache {file} cannot be read ({error}); all pictures are encoded again.")
        return {}
    return {name: tokens for name, tokens in cached.items() if tokens.isfinite().all()}


def save_cache(gallery: dict[str, torch.Tensor], file: Path) -> None:
    """Writes the cache, complete or not at all; where that fails it warns."""
    unfinished = file.with_suffix(f".{os.getpid()}.part")  # another search may write as well
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(gallery, unfinished)
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        print(f"Warning: the cache {file} cannot be written ({error}); the next search encodes the pictures again.")
        if file.parent.is_dir():
            unfinished.unlink(missing_ok=True)


def load_gallery(
    files: dict[str, Path], file: Path, model: PicoModel, processor: PicoProcessor, align: bool = False
) -> dict[str, torch.Tensor]:
    """Embeddings of all pictures, from the cache as far as they are there; the cache is brought up to date."""
    cached = load_cache(file)
    # Aligned ones are kept all or none: the whole gallery says where each picture goes.
    missing = {name: path for name, path in files.items() if name not in cached and not (align and cached)}
    print(f"{len(files)} files, {len(missing)} of them to encode.")
    known = {**cached, **encode(missing, model, processor, align and bool(missing))}
    gallery = {name: known[name] for name in files if name in known}
    if not gallery:
        raise SystemExit("None of the files is a picture that can be read.")
    if gallery.keys() != cached.keys():
        save_cache(gallery, file)
    return gallery


def search(
    query: str, gallery: dict[str, torch.Tensor], model: PicoModel, processor: PicoProcessor, k: int
) -> list[tuple[str, float]]:
    """The names of the `k` best pictures with their scores, best first."""
    text = processor.encode_texts(model, [query])
    found = processor.retrieve(text, list(gallery.values()), k=k, batch_size=1024)
    names = list(gallery)
    scores, indices = (tensor[0].tolist() for tensor in found)
    return [(names[index], score) for score, index in zip(scores, indices, strict=True)]


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cuts a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def contact_sheet(query: str, hits: list[tuple[Path, float]]) -> Image.Image:
    """The query and below it the pictures in rows, best first, each with its rank, name and score."""
    large, small = ImageFont.load_default(26), ImageFont.load_default(15)
    columns = min(max(len(hits), 2), COLUMNS)
    rows = -(-len(hits) // columns)
    inside = columns * TILE + (columns - 1) * GAP
    top = MARGIN + 52
    sheet = Image.new("RGB", (inside + 2 * MARGIN, top + rows * (TILE + LABEL) + MARGIN - 18), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN + 12), shorten(f"“{query}”", large, inside), INK, large, anchor="lm")
    corners = Image.new("L", (2 * TILE, 2 * TILE))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 2 * TILE - 1, 2 * TILE - 1), 28, fill=255)
    corners = corners.resize((TILE, TILE), Image.Resampling.LANCZOS)
    for place, (path, score) in enumerate(hits):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (TILE + GAP), top + row * (TILE + LABEL)
        picture = ImageOps.pad(decode_image(path), (TILE, TILE), Image.Resampling.LANCZOS, color=CARD)
        sheet.paste(picture, (x, y), corners)
        draw.rounded_rectangle((x, y, x + TILE - 1, y + TILE - 1), 14, outline=EDGE)
        shown, middle = f"{score:.3f}", y + TILE + 18
        name = shorten(f"{place + 1}. {path.name}", small, TILE - int(small.getlength(shown)) - 14)
        draw.text((x + 2, middle), name, INK, small, anchor="lm")
        draw.text((x + TILE - 2, middle), shown, FAINT, small, anchor="rm")
    return sheet


def main(argv: list[str] | None = None) -> list[tuple[Path, float]]:
    args = parse_arguments(argv)
    files = find_files(args.pictures)
    model = PicoModel.from_pretrained(args.model).to(args.device).eval()
    processor = PicoProcessor.from_pretrained(args.model)
    aligned = files if args.align else None
    file = cache_file(args.cache_dir, args.pictures, model, processor, aligned)
    gallery = load_gallery(files, file, model, processor, args.align)
    found = search(args.query, gallery, model, processor, args.top_k)
    hits = [(files[name], score) for name, score in found]
    for rank, (path, score) in enumerate(hits, start=1):
        print(f"{rank:3}. {score:7.3f}  {path}")
    exif = Image.Exif()
    exif[SOFTWARE] = MARK
    contact_sheet(args.query, hits).save(args.output, exif=exif)
    print(f"Contact sheet: {args.output}")
    return hits


if __name__ == "__main__":
    main()
