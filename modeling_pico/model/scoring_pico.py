"""The pair score of PICO: how well every image of a batch or gallery agrees with every text, token by token.

`pair_scores` is the one entry point. `reference_pair_scores` says in a few lines what it computes; the faster paths in
`scoring_tiled_pico` and, for CUDA devices, `scoring_triton_pico` compute the same without the
`(images, texts, patches, words)` tensor and without work on padding.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.utils import logging

from .scoring_tiled_pico import tiled_pair_scores


logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "PICO_SCORES_BACKEND"
BACKENDS = ("auto", "reference", "tiled", "triton")


class ScoresBackendError(RuntimeError):
    """The backend that `PICO_SCORES_BACKEND` asks for cannot serve this call."""


def reference_pair_scores(image_embeds: Tensor, text_embeds: Tensor, image_mask: Tensor, text_mask: Tensor) -> Tensor:
    """Literal form of [`pair_scores`], which documents the arguments; the masks are required and boolean."""
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    image_embeds = image_embeds.to(dtype).masked_fill(~image_mask[:, :, None], 0)
    text_embeds = text_embeds.to(dtype).masked_fill(~text_mask[:, :, None], 0)
    similarity = torch.einsum("ipd,twd->itpw", image_embeds, text_embeds)
    if 0 in similarity.shape[2:]:
        return similarity.sum(dim=(2, 3))  # no token at all on one side: zeros that keep the graph
    real = image_mask[:, None, :, None] & text_mask[None, :, None, :]
    similarity = similarity.masked_fill(~real, torch.finfo(dtype).min)
    # `max` sends the gradient to the first of equal maxima, `amax` would split it.
    patch_best = similarity.max(dim=3).values.masked_fill(~real.any(dim=3), 0)
    word_best = similarity.max(dim=2).values.masked_fill(~real.any(dim=2), 0)
    patch_mean = patch_best.sum(dim=2) / image_mask.sum(dim=1)[:, None].clamp(min=1)
    return patch_mean + word_best.sum(dim=2) / text_mask.sum(dim=1)[None, :].clamp(min=1)


def pair_scores(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    r"""
    Scores every image with every text: `S(V, T) = mean_i max_j s_ij + mean_j max_i s_ij` with `s_ij = <v_i, t_j>` over
    the real patches `i` and the real words `j` (method: PICO, arXiv 2510.11175, without its column weights, which are
    folded into the embeddings beforehand).

    An image or a text without a real token scores 0 with every partner and receives no gradient. Of equal maxima the
    first one receives the gradient.

    The environment variable `PICO_SCORES_BACKEND` chooses how: `tiled`, `triton` (CUDA kernels, which need the package
    triton), `reference`, which holds the similarities of all tokens at once, or `auto` (default): `triton` on CUDA
    where it can serve the call, else `tiled`, with a warning on CUDA. Compiled and traced calls record the reference;
    `torch.compiler.disable` around the call keeps it fast inside of a compiled model.

    Args:
        image_embeds (`torch.Tensor` of shape `(images, patches, dim)`):
            Patch embeddings, usually of unit length, in any floating-point type.
        text_embeds (`torch.Tensor` of shape `(texts, words, dim)`):
            Word embeddings on the same device.
        image_mask (`torch.Tensor` of shape `(images, patches)`, *optional*, defaults to all real):
            Boolean or integer, `True` or non-zero where a patch is real.
        text_mask (`torch.Tensor` of shape `(texts, words)`, *optional*, defaults to all real):
            The same for words.

    Returns:
        `torch.Tensor` of shape `(images, texts)`: the scores, accumulated in float32 (float64 for float64 inputs)
        whatever the input type and autocast.

    Raises:
        `ValueError`: if shapes, types or devices do not fit together, or `PICO_SCORES_BACKEND` has an unknown value.
        `ScoresBackendError`: if `PICO_SCORES_BACKEND` names a backend that cannot serve the call.
    """
    _check_embeds(image_embeds, text_embeds)
    image_mask = _boolean_mask("image", image_mask, image_embeds)
    text_mask = _boolean_mask("text", text_mask, text_embeds)
    backend = _backend(image_embeds, text_embeds)
    if backend == "triton":
        from .scoring_triton_pico import triton_pair_scores as compute
    else:
        compute = reference_pair_scores if backend == "reference" else tiled_pair_scores
    device_type = image_embeds.device.type
    with torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext():
        return compute(image_embeds, text_embeds, image_mask, text_mask)


def _backend(image_embeds: Tensor, text_embeds: Tensor) -> str:
    """Returns the backend for this call: the one that the environment asks for, else the best that can serve it."""
    wanted = os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE} is {wanted!r}; allowed are {', '.join(BACKENDS)}")
    # The tiled path reads token counts in Python, which a recorded call must not and a call without data cannot; a
    # kernel is no operator that could be recorded.
    tracing = torch.jit.is_tracing()
    if torch.compiler.is_compiling() or tracing or image_embeds.device.type == "meta":
        if wanted in ("tiled", "triton"):
            raise ScoresBackendError(
                f"{BACKEND_VARIABLE}={wanted} cannot serve a compiled or traced call, nor one on the meta device; "
                "use auto"
            )
        if tracing and wanted == "auto":  # torch.compile cannot log
            logger.warning_once(
                "pair_scores records its reference path, which holds the similarities of all tokens at once"
            )
        return "reference"
    if wanted == "triton" or (wanted == "auto" and image_embeds.device.type == "cuda"):
        return _triton_or_tiled(image_embeds, text_embeds, wanted)
    return "tiled" if wanted == "auto" else wanted


def _triton_or_tiled(image_embeds: Tensor, text_embeds: Tensor, wanted: str) -> str:
    # Imported on first use: Triton takes long to load, and only CUDA devices use it.
    from .scoring_triton_pico import refusal

    reason = refusal(image_embeds, text_embeds)
    if reason is None:
        return "triton"
    if wanted == "triton":
        raise ScoresBackendError(f"{BACKEND_VARIABLE}=triton cannot serve this call: {reason}")
    logger.warning_once(
        f"pair_scores takes its tiled path on a CUDA device instead of the faster Triton kernels: {reason}"
    )
    return "tiled"


def _check_embeds(image_embeds: Tensor, text_embeds: Tensor) -> None:
    for name, layout, embeds in (
        ("image_embeds", "(images, patches, dim)", image_embeds),
        ("text_embeds", "(texts, words, dim)", text_embeds),
    ):
        if embeds.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(embeds.shape)}; expected {layout}")
        if not embeds.is_floating_point():
            raise ValueError(f"{name} has type {embeds.dtype}; expected a floating-point type")
    if image_embeds.shape[2] != text_embeds.shape[2]:
        raise ValueError(
            f"image_embeds has dim {image_embeds.shape[2]} and text_embeds has dim {text_embeds.shape[2]}; "
            "they must be equal"
        )
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            f"image_embeds is on {image_embeds.device} and text_embeds on {text_embeds.device}; "
            "both must be on one device"
        )


def _boolean_mask(side: str, mask: Tensor | None, embeds: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{side}_mask has shape {tuple(mask.shape)}; {side}_embeds of shape {tuple(embeds.shape)} "
            f"needs {tuple(embeds.shape[:2])}"
        )
    if mask.device != embeds.device:
        raise ValueError(f"{side}_mask is on {mask.device} and {side}_embeds on {embeds.device}; both must be on one")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"{side}_mask has type {mask.dtype}; expected a boolean or integer type")
    return mask.bool()
