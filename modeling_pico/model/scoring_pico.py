"""The pair score of PICO: how well every image of a batch or gallery agrees with every text, token by token.

`pair_scores` is the one entry point. `reference_pair_scores` says in a few lines what it computes;
`scoring_tiled_pico` computes the same without the `(images, texts, patches, words)` tensor and without work on
padding.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.utils import logging

from .scoring_tiled_pico import tiled_pair_scores


logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "PICO_SCORES_BACKEND"
BACKENDS = ("auto", "reference", "tiled", "late_interaction")


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

    The environment variable `PICO_SCORES_BACKEND` chooses how: `auto` (default), which is `tiled`; `reference`, which
    holds the similarities of all tokens at once; or `late_interaction`, the CUDA kernels of the package
    late-interaction-kernels, which multiply in half precision. Compiled and traced calls record the reference;
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
        `ValueError`: if shapes do not fit together, or `PICO_SCORES_BACKEND` has an unknown value.
        `ScoresBackendError`: if `PICO_SCORES_BACKEND` names a backend that cannot serve the call.
    """
    _check_embeds(image_embeds, text_embeds)
    image_mask = _boolean_mask("image", image_mask, image_embeds)
    text_mask = _boolean_mask("text", text_mask, text_embeds)
    compute = _path(image_embeds)
    device_type = image_embeds.device.type
    with torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext():
        return compute(image_embeds, text_embeds, image_mask, text_mask)


def _path(image_embeds: Tensor) -> Callable[..., Tensor]:
    """Returns what computes this call: what the environment asks for, else the best that can serve it."""
    wanted = os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE} is {wanted!r}; allowed are {', '.join(BACKENDS)}")
    # The tiled path reads token counts in Python, which a recorded call must not and a call without data cannot; a
    # kernel is no operator that could be recorded.
    tracing = torch.jit.is_tracing()
    if torch.compiler.is_compiling() or tracing or image_embeds.device.type == "meta":
        if wanted in ("tiled", "late_interaction"):
            raise ScoresBackendError(
                f"{BACKEND_VARIABLE}={wanted} cannot serve a compiled or traced call, nor one on the meta device; "
                "use auto"
            )
        if tracing and wanted == "auto":  # torch.compile cannot log
            logger.warning_once(
                "pair_scores records its reference path, which holds the similarities of all tokens at once"
            )
        return reference_pair_scores
    if wanted == "late_interaction":
        if image_embeds.device.type != "cuda" or importlib.util.find_spec("late_interaction_kernels") is None:
            raise ScoresBackendError(
                f"{BACKEND_VARIABLE}=late_interaction needs tensors on a CUDA device (they are on "
                f"{image_embeds.device}) and the package late-interaction-kernels: pip install "
                '"modeling-pico[kernels]"'
            )
        return late_interaction_pair_scores
    return reference_pair_scores if wanted == "reference" else tiled_pair_scores


def late_interaction_pair_scores(
    image_embeds: Tensor, text_embeds: Tensor, image_mask: Tensor, text_mask: Tensor
) -> Tensor:
    """
    [`pair_scores`] as two MaxSim scores of late-interaction-kernels, with patches and with words as the query. They
    multiply in half precision (bfloat16 where one side is, else float16) and add up in float32.
    """
    # Weighted tokens are not of unit length, of which the package warns.
    os.environ.setdefault("LIK_SUPPRESS_NORM_WARN", "1")
    # Not by a statement, which loading code of the Hub would take for a requirement.
    maxsim = importlib.import_module("late_interaction_kernels").maxsim
    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    # Padding may hold NaN, which masks do not take out of products.
    images = image_embeds.to(dtype).masked_fill(~image_mask[:, :, None], 0)
    texts = text_embeds.to(dtype).masked_fill(~text_mask[:, :, None], 0)
    # The other form of its backward pass multiplies in half precision as well.
    of_patches = maxsim(images, texts, image_mask, text_mask, backward="unified")
    of_words = maxsim(texts, images, text_mask, image_mask, backward="unified").T
    num_patches, num_words = (mask.sum(dim=1).clamp(min=1) for mask in (image_mask, text_mask))
    return of_patches / num_patches[:, None] + of_words / num_words


def _check_embeds(image_embeds: Tensor, text_embeds: Tensor) -> None:
    for name, layout, embeds in (
        ("image_embeds", "(images, patches, dim)", image_embeds),
        ("text_embeds", "(texts, words, dim)", text_embeds),
    ):
        if embeds.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(embeds.shape)}; expected {layout}")
    if image_embeds.shape[2] != text_embeds.shape[2]:
        raise ValueError(
            f"image_embeds has dim {image_embeds.shape[2]} and text_embeds has dim {text_embeds.shape[2]}; "
            "they must be equal"
        )


def _boolean_mask(side: str, mask: Tensor | None, embeds: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{side}_mask has shape {tuple(mask.shape)}; {side}_embeds of shape {tuple(embeds.shape)} "
            f"needs {tuple(embeds.shape[:2])}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"{side}_mask has type {mask.dtype}; expected a boolean or integer type")
    return mask.bool()
