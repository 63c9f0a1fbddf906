"""
Builds, searches and shows an index from the command line.

    python -m modeling_pico.search build outputs/gallery ~/Pictures --model outputs/quickstart
    python -m modeling_pico.search query outputs/gallery "a red circle above a blue star" --sheet hits.png
    python -m modeling_pico.search serve outputs/gallery

`accelerate launch -m modeling_pico.search build ...` encodes with several processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..model.image_decoding_pico import decode_image
from .contact_sheet import PICTURES, SHEET_FORMATS, contact_sheet, save_sheet
from .embeddings import PRECISIONS
from .encoders import Encoder, ModelEncoder
from .files import content_id
from .gallery import Gallery
from .index import CANDIDATES, STORES, PicoIndex, make_encoder
from .processes import Processes


if TYPE_CHECKING:
    import datasets


# Pictures that are named when they are left out.
_SHOWN = 10
_PROGRAM = "python -m modeling_pico.search"


class _Parser(argparse.ArgumentParser):
    """Mistakes are ValueErrors of one line, and options cannot be cut short."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **options,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port, from 1 to 65535, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    of_all, of_model, of_gallery, of_search = (_Parser(add_help=False) for _ in range(4))
    of_all.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    of_all.add_argument("--url", help="server of the store qdrant (default: in this process)")
    of_all.add_argument("--json", action="store_true", help="print JSON and nothing else")

    of_model.add_argument("--model", help="folder or Hub id of a PICO checkpoint, or of its ONNX export")
    of_model.add_argument("--revision", help="revision of the checkpoint on the Hub")
    of_model.add_argument("--device", help="such as cpu or cuda:1 (default: an accelerator if there is one)")

    of_gallery.add_argument(
        "gallery",
        metavar="GALLERY",
        help="folder of pictures, searched with all folders in it; with --split a data set, as for train_pico.py",
    )
    of_gallery.add_argument("--split", help="the split of the data set")
    of_gallery.add_argument(
        "--columns", nargs="+", metavar="NAME", help="its columns to keep, beside captions and style"
    )
    of_gallery.add_argument("--batch_size", type=_count, default=32, help="pictures encoded at a time (default: 32)")

    of_search.add_argument("--k", type=int, help="number of hits (default: 10; of serve: 24)")
    of_search.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATES,
        help=f"pictures of the first stage, which are scored exactly (default: {CANDIDATES})",
    )

    parser = _Parser(prog=_PROGRAM, description="Searches a gallery of pictures by text or by picture.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, *parents: _Parser) -> _Parser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=parents)

    build = command("build", "make an index of a gallery", of_all, of_model, of_gallery)
    build.add_argument("--precision", choices=PRECISIONS, default="float16", help="of embeddings (default: float16)")
    build.add_argument("--store", choices=STORES, default="lancedb", help="database (default: lancedb)")
    build.add_argument(
        "--align", action="store_true", help="the pictures have one look, which training did not show: move them"
    )
    add = command("add", "add pictures, or bring an index up to date", of_all, of_model, of_gallery)
    add.add_argument("--remove_missing", action="store_true", help="remove what the gallery no longer has")
    query = command("query", "find the pictures that fit a text or a picture best", of_all, of_model, of_search)
    query.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    query.add_argument("--image", type=Path, metavar="FILE", help="find pictures like this one")
    query.add_argument("--where", help="filter, such as \"style = 'ink' and year >= 1990\"")
    query.add_argument("--sheet", type=Path, metavar="FILE", help="write the hits as one picture")
    delete = command("delete", "remove pictures by their ids", of_all)
    delete.add_argument("ids", nargs="+", metavar="ID", help="as query --json prints it")
    command("info", "say what an index holds and which model made it", of_all)
    serve = command("serve", "serve a page to search in", of_all, of_model, of_search)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=_port, help="(default: the first free one from 7860 on)")
    serve.add_argument("--pictures", type=Path, metavar="FOLDER", help="where moved pictures are now")
    return parser


def _encoder(args: argparse.Namespace, name: str) -> Encoder:
    """What encodes: a checkpoint, or the ONNX encoders that a folder holds."""
    if Path(name, "image_encoder.onnx").is_file():
        if args.device is not None:
            raise ValueError("--device is that of a checkpoint: ONNX encoders compute on the CPU.")
        return make_encoder(name)
    import torch
    from accelerate import PartialState

    from .. import PicoProcessor
    from ..registration import load_checkpoint

    device = args.device or PartialState().device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device!r} cannot be used here: {reason}") from error
    if Path(name).is_dir():  # by which the index finds it from wherever it is searched
        name = str(Path(name).absolute())
    revision = {} if args.revision is None else {"revision": args.revision}
    model = load_checkpoint(name, dtype=torch.float32, **revision).to(device).eval()
    return ModelEncoder(model, PicoProcessor.from_pretrained(name, **revision))


def _open(args: argparse.Namespace) -> PicoIndex:
    """The index with its model: the one that is named, or else the one that made it."""
    made_by = PicoIndex.open(args.index, url=args.url).model
    if args.model is None and not made_by["name"]:
        raise ValueError(f"The index in {str(args.index)!r} does not know where its model lies: name it by --model.")
    args.revision = args.revision or (made_by["revision"] or None if args.model is None else None)
    return PicoIndex.open(args.index, _encoder(args, args.model or made_by["name"]), url=args.url)


def _build(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.model is None:
        raise ValueError("--model names the checkpoint that encodes the pictures, such as --model outputs/quickstart.")
    gallery = _gallery(args)
    options = {"precision": args.precision, "store": args.store, "url": args.url, "align": args.align}
    return _add_to(PicoIndex.create(args.index, _encoder(args, args.model), **options), gallery, args)


def _add(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    gallery = _gallery(args)
    return _add_to(_open(args), gallery, args, remove_missing=args.remove_missing)


def _gallery(args: argparse.Namespace) -> datasets.Dataset | None:
    """The rows of a data set, or None for a folder of pictures. Looked for before anything slow."""
    if args.split is not None:
        from ..data import load_captioned_images

        columns = args.columns or ()
        rows = load_captioned_images(args.gallery, split=args.split, on_empty_captions="keep", keep_columns=columns)
        if lost := set(columns) - {"image", *Gallery(rows).kinds}:
            raise ValueError(
                f"--columns are texts, numbers, truth values or lists of texts, but {min(lost)!r} holds "
                f"{rows.features[min(lost)]}."
            )
        return rows
    if args.columns:
        raise ValueError("--columns are those of a data set, whose split --split names.")
    if not Path(args.gallery).is_dir():
        raise ValueError(f"{args.gallery!r} is not a folder of pictures. Of a data set name the split: --split train.")
    Gallery(args.gallery, leave_out=args.index)
    return None


def _add_to(
    index: PicoIndex, rows: datasets.Dataset | None, args: argparse.Namespace, **options: Any
) -> tuple[dict[str, Any], str]:
    images: Any = args.gallery
    if rows is not None:
        images = _in_files(rows, args.index.absolute() / PICTURES)
    changes = index.add(images, batch_size=args.batch_size, **options)
    # A database may let in the process that writes alone.
    (count,) = Processes().from_main(lambda: [len(index)])
    lines = [f"Left out: {name}: {reason}" for name, reason in itertools.islice(changes.skipped.items(), _SHOWN)]
    if len(changes.skipped) > _SHOWN:
        lines.append(f"Left out: {len(changes.skipped) - _SHOWN:,} more, which --json names.")
    counts = {name: getattr(changes, name) for name in ("added", "changed", "removed", "unchanged")}
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"
    lines.append(f"{args.index}: {count:,} pictures ({said}).")
    return {**asdict(changes), "images": count}, "\n".join(lines)


def _in_files(rows: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """The rows with pictures in files. What lies in none is written to a folder, to be shown from there."""
    import datasets
    from accelerate import PartialState

    with PartialState().main_process_first():
        folder.mkdir(exist_ok=True)
        files = [{"path": _file_of(image, folder), "bytes": None} for image in rows["image"]]
    images = datasets.Dataset.from_dict(
        {"image": files}, features=datasets.Features(image=datasets.Image(decode=False))
    )
    return datasets.concatenate_datasets([images, rows.remove_columns(["image", "image_id"])], axis=1)


def _file_of(image: dict[str, Any] | None, folder: Path) -> str | None:
    """Where a picture lies, after it has been written if it lies in no file; None of a row without one."""
    if image is None:
        return None
    if image["bytes"] is None:
        return image["path"]
    file = folder / f"{content_id(image['bytes'])}{Path(image['path'] or '').suffix}"
    if not file.exists():
        part = file.with_name(f"_{file.name}.part")
        part.write_bytes(image["bytes"])
        part.replace(file)
    return str(file)


def _query(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if (args.text is None) == (args.image is None):
        raise ValueError("Give what to look for: either a text or --image FILE.")
    if args.sheet is not None and args.sheet.suffix.lower() not in SHEET_FORMATS:
        raise ValueError(f"--sheet {str(args.sheet)!r} must end in one of {', '.join(SHEET_FORMATS)}.")
    shown = args.text if args.image is None else decode_image(args.image)
    query, k = args.text if args.image is None else args.image, 10 if args.k is None else args.k
    found = _open(args).search(query, k, where=args.where, candidates=args.candidates)
    if args.sheet is not None:
        save_sheet(contact_sheet(shown, found, [args.index]), args.sheet)
    lines = [f"{rank:3}. {hit.score:7.3f}  {hit.path or hit.id}" for rank, hit in enumerate(found, start=1)]
    lines = lines or ["Nothing was found."]
    if args.sheet is not None:
        lines.append(f"Contact sheet: {args.sheet}")
    return {"query": args.text or str(args.image), "hits": [asdict(hit) for hit in found]}, "\n".join(lines)


def _delete(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    index = PicoIndex.open(args.index, url=args.url)
    deleted = index.delete(args.ids)
    return {"deleted": deleted, "images": len(index)}, f"{args.index}: {len(index):,} pictures ({deleted:,} removed)."


def _info(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    info = PicoIndex.open(args.index, url=args.url).info()
    shown = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in info.items()}
    width = max(map(len, shown))
    return info, "\n".join(f"{name:{width}}  {value}" for name, value in shown.items())


def _serve(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from .page import serve

    if args.pictures is not None and not args.pictures.is_dir():
        raise ValueError(f"--pictures {str(args.pictures)!r} is not a folder.")
    index = _open(args)
    k = 24 if args.k is None else args.k
    serve(index, host=args.host, port=args.port, k=k, candidates=args.candidates, pictures=args.pictures)
    return {}, "The page is closed."


_COMMANDS = {"build": _build, "add": _add, "query": _query, "delete": _delete, "info": _info, "serve": _serve}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    r"""
    Does what the arguments ask for.

    Args:
        argv (`Sequence[str]`, *optional*): The words of the command; by default those of this process.

    Returns:
        `dict[str, Any]`: what `--json` prints.

    Raises:
        ValueError, OSError, ImportError: say what is wrong and what to do.
    """
    args = _parser().parse_args(argv)
    result, text = _COMMANDS[args.command](args)
    if Processes().is_main:
        print(json.dumps(result, ensure_ascii=False, default=str) if args.json else text, flush=True)
    return result


def _run() -> int:
    """Exit status 2 and one line for a mistake of the user."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_run())
