"""The pair score on CUDA devices: Triton kernels for both directions at once, without the similarities in memory.

A program owns one image and a group of captions that are neighbours by length. It walks over the words of all its
captions in step: one matrix product gives the similarities of every caption's `j`-th word with a block of patches, so
the maximum over words is an element-wise running maximum and the maximum over patches a reduction along rows. Both are
complete when the program ends: no atomics, hardly any work on padding, and nothing is packed, as tables of rows lead
straight to the real tokens. For training, the positions of the maxima are kept; the backward kernels turn them into
sparse tiles of weights and write every gradient once, so that the same inputs give the same bits.

The module can be imported without Triton; [`refusal`] says whether the kernels can serve a call.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


try:
    import triton
    import triton.language as tl

    _jit = triton.jit
except ImportError:
    triton = tl = None

    def _jit(function: Any) -> Any:
        return function


# The maxima of all words of a group stay in registers, and a word's position in one byte.
MAX_WORDS = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@_jit
def _score_patches(
    image_embeds,
    text_embeds,
    image_rows,
    text_rows,
    patch_at,
    first_patch,
    patches,
    texts,
    rank,
    text_count,
    longest,
    word_best,
    word_at,
    patch_sum,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Takes one block of patches into the running maxima of the words and the sum of the patches' maxima."""
    p = first_patch + tl.arange(0, BLOCK_P)
    real = p < patches
    image_row = tl.load(image_rows + p, mask=real, other=0)
    columns = tl.arange(0, WORDS)
    best = tl.full((rank.shape[0], BLOCK_P), float("-inf"), tl.float32)
    at = tl.zeros((rank.shape[0], BLOCK_P), tl.int32)
    for j in range(0, longest):
        spoken = j < text_count
        text_row = tl.load(text_rows + j, mask=spoken, other=0)
        similarity = tl.zeros((rank.shape[0], BLOCK_P), tl.float32)
        for start in range(0, DIM, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = d < DIM
            word = tl.load(
                text_embeds + text_row[:, None] * DIM + d[None, :], mask=spoken[:, None] & inside[None, :], other=0.0
            )
            patch = tl.load(
                image_embeds + image_row[None, :] * DIM + d[:, None], mask=real[None, :] & inside[:, None], other=0.0
            )
            if UPCAST:
                word, patch = word.to(tl.float32), patch.to(tl.float32)
            similarity = tl.dot(word, patch, similarity, input_precision=PRECISION)
        similarity = tl.where(spoken[:, None] & real[None, :], similarity, float("-inf"))
        word_max = tl.max(similarity, axis=1)
        here = columns[None, :] == j
        if TRAIN:  # strictly better alone moves a position: the first of equal maxima keeps it
            first = tl.min(tl.where(similarity == word_max[:, None], p[None, :], patches), axis=1)
            word_at = tl.where(here & (word_max[:, None] > word_best), first[:, None], word_at)
            at = tl.where(similarity > best, j, at)
        word_best = tl.where(here, tl.maximum(word_best, word_max[:, None]), word_best)
        # NaN must reach the score. Every similarity passes here, so one side that keeps NaN is enough.
        best = tl.maximum(best, similarity, propagate_nan=tl.PropagateNan.ALL)
    patch_sum += tl.sum(tl.where(real[None, :], best, 0.0), axis=1)
    if TRAIN:
        tl.store(
            patch_at + image_row[None, :] * texts + rank[:, None], at, mask=real[None, :] & (rank < texts)[:, None]
        )
    return word_best, word_at, patch_sum


@_jit
def _score_kernel(
    image_embeds,
    text_embeds,
    image_rows,
    text_rows,
    image_counts,
    text_counts,
    scores,
    patch_at,
    word_at,
    images,
    texts,
    patches,
    words,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores one image with one group of captions."""
    # The longest captions start first, for an even end. Neighbouring programs share a group, as its words take more
    # memory than the patches of an image.
    group = tl.cdiv(texts, ROWS) - 1 - tl.program_id(0) // images
    image = (tl.program_id(0) % images).to(tl.int64)
    rank = group * ROWS + tl.arange(0, ROWS)
    text_count = tl.load(text_counts + rank, mask=rank < texts, other=0)
    image_count = tl.load(image_counts + image)
    longest = tl.max(text_count, axis=0)
    word_best = tl.full((ROWS, WORDS), float("-inf"), tl.float32)
    best_patch = tl.zeros((ROWS, WORDS), tl.int32)
    patch_sum = tl.zeros((ROWS,), tl.float32)
    image_rows += image * patches
    text_rows += rank * words
    # Whole blocks, then a narrow one if it suffices: 197 patches are 3 * 64 + 16, not 4 * 64.
    split = tl.maximum(tl.cdiv(image_count - TAIL, BLOCK_P), 0) * BLOCK_P
    for first_patch in range(0, split, BLOCK_P):
        word_best, best_patch, patch_sum = _score_patches(
            image_embeds, text_embeds, image_rows, text_rows, patch_at, first_patch, image_count, texts, rank,
            text_count, longest, word_best, best_patch, patch_sum, DIM, WORDS, BLOCK_P, BLOCK_D, TRAIN,
            PRECISION, UPCAST,
        )  # fmt: skip
    if split < image_count:
        word_best, best_patch, patch_sum = _score_patches(
            image_embeds, text_embeds, image_rows, text_rows, patch_at, split, image_count, texts, rank,
            text_count, longest, word_best, best_patch, patch_sum, DIM, WORDS, TAIL, BLOCK_D, TRAIN,
            PRECISION, UPCAST,
        )  # fmt: skip
    columns = tl.arange(0, WORDS)
    spoken = columns[None, :] < text_count[:, None]
    word_sum = tl.sum(tl.where(spoken, word_best, 0.0), axis=1)
    score = patch_sum / tl.maximum(image_count, 1) + word_sum / tl.maximum(text_count, 1)
    score = tl.where((text_count > 0) & (image_count > 0), score, 0.0)
    tl.store(scores + image * texts + rank, score, mask=rank < texts)
    if TRAIN:
        tl.store(word_at + (image * words + columns[None, :]) * texts + rank[:, None], best_patch, mask=spoken)


@_jit
def _image_grad_kernel(
    grad,
    text_embeds,
    image_rows,
    text_rows,
    image_counts,
    text_counts,
    image_grad,
    patch_at,
    word_at,
    images,
    texts,
    patches,
    words,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradient of one block of patches of one image in some dimensions."""
    blocks = tl.cdiv(patches, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < DIM
    image_count = tl.load(image_counts + image)
    real = p < image_count
    image_row = tl.load(image_rows + image * patches + p, mask=real, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    stop = tl.where(tl.max(real.to(tl.int32), axis=0) > 0, texts, 0)
    for start in range(0, stop, ROWS):
        rank = start + tl.arange(0, ROWS)
        text_count = tl.load(text_counts + rank, mask=rank < texts, other=0)
        share = tl.load(grad + image * texts + rank, mask=text_count > 0, other=0.0)
        patch_share, word_share = share / image_count, share / tl.maximum(text_count, 1)
        best_word = tl.load(
            patch_at + image_row[:, None] * texts + rank[None, :],
            mask=real[:, None] & (text_count > 0)[None, :],
            other=0,
        ).to(tl.int32)
        for j in range(0, tl.max(text_count, axis=0)):
            spoken = j < text_count
            text_row = tl.load(text_rows + rank * words + j, mask=spoken, other=0)
            best_patch = tl.load(word_at + (image * words + j) * texts + rank, mask=spoken, other=0).to(tl.int32)
            weights = tl.where(best_word == j, patch_share[None, :], 0.0)
            weights += tl.where(best_patch[None, :] == p[:, None], word_share[None, :], 0.0)
            word = tl.load(
                text_embeds + text_row[:, None] * DIM + d[None, :], mask=spoken[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(weights, word.to(tl.float32), total, input_precision=PRECISION)
    tl.store(image_grad + image_row[:, None] * DIM + d[None, :], total, mask=real[:, None] & inside[None, :])


@_jit
def _text_grad_kernel(
    grad,
    image_embeds,
    image_rows,
    text_rows,
    image_counts,
    text_counts,
    text_grad,
    patch_at,
    word_at,
    images,
    texts,
    patches,
    words,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradient of the `j`-th words of one group of captions in some dimensions."""
    j = tl.program_id(0) % words
    rank = (tl.program_id(0) // words) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < DIM
    text_count = tl.load(text_counts + rank, mask=rank < texts, other=0)
    spoken = j < text_count
    text_row = tl.load(text_rows + rank * words + j, mask=spoken, other=0)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    stop = tl.where(tl.max(spoken.to(tl.int32), axis=0) > 0, images, 0)
    for image in range(0, stop):
        image_count = tl.load(image_counts + image)
        share = tl.load(grad + tl.cast(image, tl.int64) * texts + rank, mask=spoken, other=0.0)
        patch_share, word_share = share / tl.maximum(image_count, 1), share / tl.maximum(text_count, 1)
        best_patch = tl.load(word_at + (tl.cast(image, tl.int64) * words + j) * texts + rank, mask=spoken, other=0).to(
            tl.int32
        )
        for start in range(0, image_count, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            real = p < image_count
            image_row = tl.load(image_rows + tl.cast(image, tl.int64) * patches + p, mask=real, other=0)
            best_word = tl.load(
                patch_at + image_row[None, :] * texts + rank[:, None], mask=real[None, :] & spoken[:, None], other=0
            ).to(tl.int32)
            weights = tl.where(best_word == j, patch_share[:, None], 0.0)
            weights += tl.where(best_patch[:, None] == p[None, :], word_share[:, None], 0.0)
            patch = tl.load(
                image_embeds + image_row[:, None] * DIM + d[None, :], mask=real[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(weights, patch.to(tl.float32), total, input_precision=PRECISION)
    tl.store(text_grad + text_row[:, None] * DIM + d[None, :], total, mask=spoken[:, None] & inside[None, :])


def _interpreted() -> bool:
    return not isinstance(_score_kernel, triton.runtime.JITFunction)


def refusal(image_embeds: Tensor, text_embeds: Tensor) -> str | None:
    """Returns why the kernels cannot serve these embeddings, `None` if they can."""
    if triton is None:
        return "the package triton is not installed"
    device = image_embeds.device
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are made for NVIDIA devices"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif device.type != "cpu" or not _interpreted():
        return (
            f"the device is {device.type} (on cpu, set TRITON_INTERPRET=1 before the first call to debug the kernels)"
        )
    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    if dtype not in DTYPES:
        return f"the type is {dtype}; the kernels know float32, bfloat16 and float16"
    if text_embeds.shape[1] > MAX_WORDS:
        return f"texts have {text_embeds.shape[1]} words, padding included; the kernels hold at most {MAX_WORDS}"
    return None


def triton_pair_scores(image_embeds: Tensor, text_embeds: Tensor, image_mask: Tensor, text_mask: Tensor) -> Tensor:
    """Triton form of `pair_scores`, which documents the arguments; the masks are required and boolean.

    The call must be one that [`refusal`] does not refuse. Similarities of float32 embeddings are multiplied in TF32
    where torch allows it for CUDA products; those of half-precision embeddings are exact up to the order of summation.
    Gradients of half-precision embeddings are summed in float32 from products in TF32.
    """
    dtype = image_embeds.dtype
    if dtype != text_embeds.dtype:
        dtype = torch.promote_types(torch.promote_types(dtype, text_embeds.dtype), torch.float32)
    embeds = image_embeds.to(dtype).contiguous(), text_embeds.to(dtype).contiguous()
    if torch.is_grad_enabled() and (image_embeds.requires_grad or text_embeds.requires_grad):
        return _PairScores.apply(*embeds, image_mask, text_mask)
    return _forward(*embeds, _Tables.of(image_mask, text_mask))


class _Tables(NamedTuple):
    """Where the real tokens are; texts are ordered by their number of words."""

    image_rows: Tensor  # (images, patches): rows of the flattened embeddings, the real ones first
    text_rows: Tensor  # (texts, words)
    image_counts: Tensor
    text_counts: Tensor
    order: Tensor  # the text at each rank

    @classmethod
    def of(cls, image_mask: Tensor, text_mask: Tensor) -> _Tables:
        order = text_mask.sum(dim=1).argsort(stable=True)
        image_rows, image_counts = cls._of_side(image_mask, torch.arange(len(image_mask), device=order.device))
        text_rows, text_counts = cls._of_side(text_mask, order)
        return cls(image_rows, text_rows, image_counts, text_counts, order)

    @staticmethod
    def _of_side(mask: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        tokens = mask.shape[1]
        mask = mask[order]
        columns = mask.byte().argsort(dim=1, descending=True, stable=True)
        return order[:, None] * tokens + columns, mask.sum(dim=1, dtype=torch.int32)


class _Positions(NamedTuple):
    """Where the maxima of all pairs are, counted in real tokens."""

    patch_at: Tensor  # (images * patches, texts): words
    word_at: Tensor  # (images, words, texts): patches

    @classmethod
    def empty(cls, image_mask: Tensor, text_mask: Tensor) -> _Positions:
        (images, patches), (texts, words) = image_mask.shape, text_mask.shape
        patch_type = torch.int16 if patches <= torch.iinfo(torch.int16).max else torch.int32
        device = image_mask.device
        return cls(
            torch.empty(images * patches, texts, dtype=torch.int8, device=device),
            torch.empty(images, words, texts, dtype=patch_type, device=device),
        )


def _on(tensor: Tensor) -> Any:
    # Triton launches on the current device, whatever device the tensors are on.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _rows(texts: int, most: int) -> int:
    """Returns how many captions form a group; a matrix product needs 16."""
    return min(most, max(16, triton.next_power_of_2(texts)))


def _block_d(dim: int, widest: int) -> int:
    """Returns the widest block that divides `dim`, else the narrowest that a matrix product takes."""
    while widest > 16 and dim % widest:
        widest //= 2
    return widest


def _precision(dtype: torch.dtype, grads: bool) -> str:
    if dtype == torch.float32:
        matmul = torch.backends.cuda.matmul
        # Newer versions of torch refuse to read the old setting once the new one has been used.
        allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
        return "tf32" if allowed else "ieee"
    # Half-precision products are exact. In the backward pass TF32 holds half-precision embeddings exactly and rounds
    # the weights, which are float32 and may be too small for float16, to 11 bits.
    return "tf32" if grads else "ieee"


def _forward(
    image_embeds: Tensor,
    text_embeds: Tensor,
    tables: _Tables,
    positions: _Positions | None = None,
) -> Tensor:
    """Scores all pairs; `positions`, if given, receives where the maxima are."""
    (images, patches, dim), (texts, words, _) = image_embeds.shape, text_embeds.shape
    scores = torch.zeros(images, texts, dtype=torch.float32, device=image_embeds.device)
    if not image_embeds.numel() or not text_embeds.numel():
        return scores
    width = max(16, triton.next_power_of_2(words))
    half = image_embeds.dtype != torch.float32
    rows = _rows(texts, 128 if half and width <= 32 else 64)
    block = 64 if patches > 32 else 32
    with _on(scores):
        _score_kernel[(images * triton.cdiv(texts, rows),)](
            image_embeds, text_embeds, *tables[:4], scores, *(positions or (scores, scores)),
            images, texts, patches, words,
            DIM=dim, WORDS=width, ROWS=rows, BLOCK_P=block,
            TAIL=min(block, max(16, triton.next_power_of_2(patches % block))),
            BLOCK_D=_block_d(dim, 64 if half else 32), TRAIN=positions is not None,
            PRECISION=_precision(image_embeds.dtype, grads=False),
            UPCAST=_interpreted(),  # the interpreter would multiply the bits of bfloat16
            num_warps=4 if half and rows * width < 64 * 64 else 8, num_stages=3 if half else 2,
        )  # fmt: skip
    ordered = torch.empty_like(scores)
    ordered[:, tables.order] = scores
    return ordered


class _PairScores(torch.autograd.Function):
    """Scores by kernel with a backward pass that knows only the positions of the maxima."""

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, image_mask, text_mask):
        tables, positions = _Tables.of(image_mask, text_mask), _Positions.empty(image_mask, text_mask)
        scores = _forward(image_embeds, text_embeds, tables, positions)
        ctx.save_for_backward(image_embeds, text_embeds, *tables, *positions)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image_embeds, text_embeds, *kept = ctx.saved_tensors
        tables, positions = _Tables(*kept[:5]), _Positions(*kept[5:])
        grad = grad[:, tables.order].contiguous()
        grads = [
            torch.zeros_like(embeds) if need else None
            for embeds, need in zip((image_embeds, text_embeds), ctx.needs_input_grad[:2], strict=True)
        ]
        if image_embeds.numel() and text_embeds.numel():
            _backward(grad, image_embeds, text_embeds, tables, positions, grads)
        return *grads, None, None


def _backward(
    grad: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    tables: _Tables,
    positions: _Positions,
    grads: list[Tensor | None],
) -> None:
    """Writes the gradients of image and text embeddings into `grads` where not `None`."""
    (images, patches, dim), (texts, words, _) = image_embeds.shape, text_embeds.shape
    rows, block_p = _rows(texts, 64), 64 if patches > 32 else 32
    block_d = _block_d(dim, 128)
    blocks_d = triton.cdiv(dim, block_d)
    for kernel, programs, other, target in (
        (_image_grad_kernel, images * triton.cdiv(patches, block_p), text_embeds, grads[0]),
        (_text_grad_kernel, words * triton.cdiv(texts, rows), image_embeds, grads[1]),
    ):
        if target is None:
            continue
        with _on(grad):
            kernel[(programs, blocks_d)](
                grad, other, *tables[:4], target, *positions, images, texts, patches, words,
                DIM=dim, ROWS=rows, BLOCK_P=block_p, BLOCK_D=block_d, PRECISION=_precision(other.dtype, grads=True),
                num_warps=8, num_stages=2,
            )  # fmt: skip
