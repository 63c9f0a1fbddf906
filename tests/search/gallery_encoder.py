"""An encoder that needs no model, and pictures that it tells apart."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image


DIM = 8


class PlainEncoder:
    """Tokens of an image are rows of its pixels; those of a text are drawn from its words."""

    def __init__(self, name: str = "plain") -> None:
        self.identity = {"fingerprint": f"{name:0<32}", "name": name, "revision": "", "method": "none"}
        self.encoded = 0

    def encode_images(self, images, batch_size=32):
        self.encoded += len(images)
        assert batch_size >= 1
        pixels = [np.asarray(image.convert("L").resize((DIM, 4)), dtype=np.float32) for image in images]
        return [rows / 128 - 1 for rows in pixels]

    def encode_texts(self, texts):
        def token(word: str) -> np.ndarray:
            return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIM).astype(np.float32)

        return [np.stack([token(word) for word in text.split()]) for text in texts]


def picture(number: int) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (4, DIM, 3), dtype=np.uint8)
    return Image.fromarray(values)


def draw(folder: Path, numbers) -> list[Path]:
    """Pictures `0.png`, `1.png`, ... of these numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        picture(number).save(path)
    return paths
