"""A retrieval set whose images are moved to where images of training lie, on one process or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..distributed import gather_object
from ..model.gallery_alignment_pico import (
    GalleryMoments,
    ImageMoments,
    measure_galleries,
    moved_layers,
    num_together,
    together,
)
from ..model.modeling_pico import PicoModel, PicoOutput, image_inputs
from .evaluator import EncodedRetrieval, concatenate_padded


Batches = Iterable[Mapping[str, Any]]


@torch.no_grad()
def measure_gallery(
    model: nn.Module,
    batches: Batches,
    styles: Sequence[str] | None = None,
    target: ImageMoments | None = None,
    num_batches: int | None = None,
) -> dict[str | None, GalleryMoments]:
    r"""
    Moments of the images of all processes at the outputs of the tower and before its batch normalisation, of each
    style by itself where there are some.

    Args:
        model (`nn.Module`): A [`PicoModel`], or one wrapped for distributed use.
        batches (iterable of `dict`): This process's images, as in [`RetrievalEvaluator.encode`].
        styles (`Sequence[str]`, *optional*): The style of each of them.
        target ([`ImageMoments`], *optional*): Where they are to be moved, see [`measure_galleries`].
        num_batches (`int`, *optional*): Batches of the longest block, as in [`RetrievalEvaluator.encode`].

    Returns:
        `dict` of style (None without styles) to [`GalleryMoments`], the same on every process (with batch
        normalisation it depends a little on how images are dealt to these, each of which moves layers by its own):
        [`ImageMoments.fit`] and [`ImageMoments.align`] take it.
    """
    tower = _pico_model(model).vision_model
    size: int = getattr(batches, "batch_size", None) or 0
    # Other processes must know how many batches are joined, and a list does not say that before it is read.
    if target is not None and moved_layers(tower) and (num_batches is None or size):
        num_batches = None if num_batches is None else -(-num_batches // num_together(size))
        batches = together(batches)
    states = (outputs.image_states for outputs in _run(model, batches, num_batches, return_states=True))
    found: dict[str | None, GalleryMoments] = {}
    for own in gather_object([measure_galleries(states, styles, tower, target)]):
        for label, moments in own.items():
            found[label] = found[label].merge(moments) if label in found else moments
    return found


@torch.no_grad()
def align_encoded(
    model: nn.Module,
    encoded: EncodedRetrieval,
    batches: Batches,
    styles: Sequence[str] | None = None,
    *,
    leave_small: bool = False,
    num_batches: int | None = None,
) -> EncodedRetrieval:
    r"""
    Encodes the images of a retrieval set anew, moved to where images of training lie; texts stay as they are. The
    tower is run twice over the images, to measure them and to move them, and nothing is kept in between.

    Args:
        model (`nn.Module`): A [`PicoModel`] with moments of training, or one wrapped for distributed use.
        encoded ([`EncodedRetrieval`]): What [`RetrievalEvaluator.encode`] made of the batches.
        batches (iterable of `dict`):
            The same batches again, with `pixel_values` or `image_states`; gone through twice, as a `DataLoader` or a
            list can be.
        styles (`Sequence[str]`, *optional*):
            The style of each image of all processes, in order; each style is moved by itself. By default all images
            are one gallery, which should have one look.
        leave_small (`bool`, *optional*, defaults to `False`):
            Whether styles with too few images stay where they are; else they are refused.
        num_batches (`int`, *optional*): Batches of the longest block, as in [`RetrievalEvaluator.encode`].

    Returns:
        [`EncodedRetrieval`]

    Raises:
        ValueError: if the model has no moments of training, a gallery is too small, or styles, batches and the set do
            not fit.

    Example:

    ```python
    >>> evaluator = RetrievalEvaluator()
    >>> encoded = evaluator.encode(model, loader)
    >>> evaluator.retrieval_metrics(model, align_encoded(model, encoded, loader))["rsum"]
    ```
    """
    if isinstance(batches, Iterator):
        raise ValueError("Batches are gone through twice; give a DataLoader or a list, not an iterator.")
    moments = _pico_model(model).image_moments
    moments.check_fitted()
    if styles is not None and len(styles) != len(encoded.image_ids):
        raise ValueError(f"There are {len(styles)} styles for {len(encoded.image_ids)} images.")
    first, count = encoded.first_image(), len(encoded.image_tokens)
    own = None if styles is None else styles[first : first + count]
    alignment = moments.align(measure_gallery(model, batches, own, moments, num_batches), leave_small)

    def alignments() -> Iterator[dict[str, Any]]:
        start = 0
        for batch in batches:
            size = next(len(batch[name]) for name in ("pixel_values", "image_states") if name in batch)
            of_batch = None if own is None else own[start : start + size]
            yield {**batch, "image_alignment": alignment.for_images(of_batch)}
            start += size

    tokens, mask = encode_images(model, alignments(), num_batches)
    if len(tokens) != count:
        raise ValueError(f"The batches have {len(tokens)} images, but the encoded set has {count}.")
    return replace(encoded, image_tokens=tokens.to(encoded.image_tokens.dtype), image_mask=mask)


@torch.no_grad()
def encode_images(
    model: nn.Module, batches: Batches, num_batches: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Encodes this process's images alone; arguments as in [`RetrievalEvaluator.encode`], and each batch may hold an
    `image_alignment`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: tokens before weighting of shape `(own images, patches, dim)`, and their
        mask `(own images, patches)`.
    """
    parts = [(outputs.image_tokens, outputs.image_mask) for outputs in _run(model, batches, num_batches)]
    tokens, mask = (concatenate_padded(tensors) for tensors in zip(*parts, strict=True))
    return tokens, mask


def _pico_model(model: nn.Module) -> PicoModel:
    """The model itself, or the one that is wrapped."""
    return next(module for module in model.modules() if isinstance(module, PicoModel))


def _run(model: nn.Module, batches: Batches, num_batches: int | None, **options: Any) -> Iterator[PicoOutput]:
    """
    The images of each batch, encoded in evaluation mode; a process with fewer batches repeats its last one without
    effect.
    """
    # Compiled, a tower passes over what moves its layers.
    model = extract_model_from_parallel(model, keep_torch_compile=False).eval()
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {}
    done = 0
    for batch in batches:
        inputs = image_inputs(batch, device)
        if "image_alignment" in batch:
            inputs["image_alignment"] = batch["image_alignment"].to(device)
        yield model(**inputs, **options, return_logits=False)
        done += 1
    if not done:
        raise ValueError("The gallery is empty (or has fewer images than there are processes).")
    for _ in range(done, num_batches or 0):
        model(**inputs, **options, return_logits=False)


__all__ = ["align_encoded", "encode_images", "measure_gallery"]
