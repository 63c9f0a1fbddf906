"""
ONNX export of the two encoders, to encode galleries and queries without PyTorch:

    python -m modeling_pico.export outputs/quickstart outputs/quickstart_onnx

Needs the packages onnx and onnxscript (`pip install "modeling-pico[onnx]"`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging as python_logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers.utils import logging

from .fingerprint import model_identity
from .model.modeling_pico import PicoModel
from .model.processing_pico import PicoProcessor
from .onnx_files import ABOUT_FILE, IMAGE_ENCODER, TEXT_ENCODER
from .registration import load_checkpoint


logger = logging.get_logger(__name__)

# A protobuf file ends at 2 GB; larger weights go into a file beside it.
_LARGEST_FILE = 1_900_000_000


class _Encoder(nn.Module):
    def __init__(self, model: PicoModel):
        super().__init__()
        self.model = model


class ImageEncoder(_Encoder):
    """A [`PicoModel`]'s image side with tensors in and out, as exporters want it: score-ready embeddings and mask."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.get_image_features(pixel_values=pixel_values)
        return features.embeds, features.mask


class TextEncoder(_Encoder):
    """Its text side, likewise."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return features.embeds, features.mask


def export_onnx(model: PicoModel, processor: PicoProcessor, output_dir: str | os.PathLike) -> tuple[Path, Path]:
    r"""
    Writes `image_encoder.onnx` and `text_encoder.onnx`, and beside them the image processor, the tokenizer and
    `encoders.json`, which names the model. [`~modeling_pico.search.OnnxEncoder`] reads the folder.

    Both files give `embeds`, with the semantic probability folded in, and `mask`. The image encoder takes
    `pixel_values`, any number of images of the processor's size; the text encoder takes `input_ids` and
    `attention_mask` of any number and, up to the backbone's limit, any length of texts. Neither gives the uncertainty,
    which a model with an `uncertainty_config` has.

    Args:
        model ([`PicoModel`]): The model, in float32.
        processor ([`PicoProcessor`]): Its processor, which decides the size of the images.
        output_dir (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `tuple(Path, Path)`: The files of the image encoder and of the text encoder.

    Raises:
        `ImportError`: If onnx or onnxscript is missing.
        `ValueError`: If the model is not in float32.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX export needs {" and ".join(missing)}: pip install "modeling-pico[onnx]"')
    if model.dtype != torch.float32:
        raise ValueError(
            f"The model is in {model.dtype}; ONNX export takes float32: PicoModel.from_pretrained(path, "
            "dtype=torch.float32)."
        )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT_FILE).unlink(missing_ok=True)
    # The parts and not the whole: a processor of ours would copy its code along.
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    images, texts = _examples(processor, model.device)
    training = model.training
    model.eval()
    try:
        _export(ImageEncoder(model), images, {0: "batch"}, folder / IMAGE_ENCODER)
        _export(TextEncoder(model), texts, {0: "batch", 1: "sequence"}, folder / TEXT_ENCODER)
    finally:
        model.train(training)
    # Last: a folder that has it is whole.
    about = {"identity": model_identity(model, processor), "image_backend": processor.image_backend}
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    logger.info(f"Encoders are written to {folder}.")
    return folder / IMAGE_ENCODER, folder / TEXT_ENCODER


def _examples(
    processor: PicoProcessor, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    # Two of each and texts of unequal lengths: an axis of size one would be taken for constant.
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("white", "grey")]
    images = processor.image_processor(pictures, return_tensors="pt").to(device)
    texts = processor(text=["a red circle", "a blue star above"], padding=True, return_tensors="pt").to(device)
    return (
        {"pixel_values": images["pixel_values"]},
        {name: texts[name] for name in ("input_ids", "attention_mask")},
    )


def _export(encoder: nn.Module, inputs: dict[str, torch.Tensor], axes: dict[int, str], path: Path) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    with _quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            encoder.eval(),
            kwargs=inputs,
            f=path,
            input_names=list(inputs),
            output_names=["embeds", "mask"],
            dynamic_shapes=dict.fromkeys(inputs, axes),
            external_data=size > _LARGEST_FILE,
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """
    Leaves out what the exporter says of itself: deprecations inside of it, equal axes of which it keeps one name,
    operators of packages that are not installed. What fails raises an error.
    """
    exporter = python_logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def main(argv: list[str] | None = None) -> None:
    """Exports a checkpoint from the command line."""
    parser = argparse.ArgumentParser(prog="python -m modeling_pico.export", description=main.__doc__)
    parser.add_argument("model", help="folder or Hub id of a PICO or CDDS checkpoint")
    parser.add_argument("output_dir", help="folder for the ONNX files, the image processor and the tokenizer")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.model, dtype=torch.float32)
    image_encoder, text_encoder = export_onnx(model, PicoProcessor.from_pretrained(args.model), args.output_dir)
    print(f"{args.output_dir}: {image_encoder.name} and {text_encoder.name} are written, with their preprocessing.")


__all__ = ["ImageEncoder", "TextEncoder", "export_onnx"]


if __name__ == "__main__":
    main()
