"""Files of an index, which hold their old or their new content whenever the process dies; and what names a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The file to write in its place, which takes it once all of it is on the disk."""
    part = path.with_name(f"_{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def content_id(content: bytes) -> str:
    """What a picture is known by: 32 hexadecimal digits of its file's bytes, wherever it lies."""
    return blake2b(content, digest_size=16).hexdigest()


__all__ = ["content_id", "written_whole"]
