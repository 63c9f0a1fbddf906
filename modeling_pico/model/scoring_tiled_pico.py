"""The pair score in tiles: no work on padding, and workspace that does not grow with the number of pairs.

Samples are sorted by their number of real tokens and packed. One matrix product then gives a tile of similarities with
words as rows and patches as columns, in which samples of equal length form dense blocks, so that both maxima are plain
reductions that run over contiguous memory. For training, the positions of the maxima are kept instead of the
similarities: the backward pass turns them into a sparse tile of weights and two matrix products.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import max_pool2d


# Elements of a tile of similarities (4 bytes each in float32). It should stay in the cache of a CPU core and is larger
# on accelerators, which hide small tiles badly.
CPU_TILE_ELEMENTS = 2**21
DEVICE_TILE_ELEMENTS = 2**24


class _Run(NamedTuple):
    """Neighbouring samples of equal length; ranges are relative to the tile."""

    samples: slice
    tokens: slice
    shape: tuple[int, int]  # (samples, tokens of each)


class _Tile(NamedTuple):
    """Neighbouring samples that are scored together; ranges are among the sorted samples and their packed tokens."""

    samples: slice
    tokens: slice
    runs: list[_Run]

    @property
    def size(self) -> int:
        return self.tokens.stop - self.tokens.start


class _Side:
    """The images or the texts, sorted by their number of real tokens; samples without any are left out."""

    def __init__(self, embeds: Tensor, mask: Tensor, dtype: torch.dtype, tile_tokens: int):
        counts, order = mask.sum(dim=1).sort(stable=True)
        lengths = counts.tolist()
        empty = lengths.count(0)
        self.embeds, self.mask, self.dtype = embeds, mask, dtype
        self.order, self.counts, self.lengths = order[empty:], counts[empty:], lengths[empty:]
        # Without padding the stable order is the given one, and packing is a mere view.
        self.dense = lengths[:1] == [mask.shape[1]] and not empty
        self.tiles, start = [], 0
        for first, last in _split(self.lengths, tile_tokens):
            stop = start + sum(self.lengths[first:last])
            self.tiles.append(_Tile(slice(first, last), slice(start, stop), _runs(self.lengths[first:last])))
            start = stop

    def positions(self) -> tuple[Tensor, Tensor]:
        """Returns where the real tokens lie in the padded tensor, as row and column indices."""
        row, column = self.mask[self.order].nonzero(as_tuple=True)
        return self.order[row], column

    def pack(self) -> Tensor:
        """Returns the real tokens as `(tokens, dim)`."""
        tokens = self.embeds.flatten(0, 1) if self.dense else self.embeds[self.positions()]
        return tokens.to(self.dtype)

    def unpack(self, tokens: Tensor) -> Tensor:
        """Returns packed values in the form and type of the embeddings, zero at padding."""
        if self.dense:
            return tokens.view(self.embeds.shape).to(self.embeds.dtype)
        padded = tokens.new_zeros(self.embeds.shape)
        padded[self.positions()] = tokens
        return padded.to(self.embeds.dtype)


def _split(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """Cuts samples into ranges of at most `limit` tokens, but at least one sample each."""
    ranges, start, used = [], 0, 0
    for index, length in enumerate(lengths):
        if used and used + length > limit:
            ranges.append((start, index))
            start, used = index, 0
        used += length
    return [*ranges, (start, len(lengths))] if lengths else []


def _runs(lengths: list[int]) -> list[_Run]:
    runs, token, start = [], 0, 0
    for index, length in enumerate(lengths):
        if index + 1 == len(lengths) or lengths[index + 1] != length:
            count = index + 1 - start
            runs.append(_Run(slice(start, index + 1), slice(token, token + count * length), (count, length)))
            start, token = index + 1, token + count * length
    return runs


def tiled_pair_scores(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_mask: Tensor,
    text_mask: Tensor,
    tile_elements: int | None = None,
) -> Tensor:
    """Tiled form of `pair_scores`, which documents the arguments; the masks are required and boolean.

    `tile_elements` bounds a tile of similarities and by default follows the device.
    """
    if tile_elements is None:
        tile_elements = CPU_TILE_ELEMENTS if image_embeds.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    arguments = (image_embeds, text_embeds, image_mask, text_mask, tile_elements)
    if torch.is_grad_enabled() and (image_embeds.requires_grad or text_embeds.requires_grad):
        return _PairScores.apply(*arguments)
    with torch.no_grad():
        return _forward(*_sides(*arguments))


def _sides(
    image_embeds: Tensor, text_embeds: Tensor, image_mask: Tensor, text_mask: Tensor, tile_elements: int
) -> tuple[_Side, _Side]:
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    # More patches than words span a tile, as both reductions read along them.
    words = max(1, int((tile_elements / 4) ** 0.5))
    patches = max(1, tile_elements // words)
    return _Side(image_embeds, image_mask, dtype, patches), _Side(text_embeds, text_mask, dtype, words)


def _matrix(workspace: Tensor, rows: int, columns: int) -> Tensor:
    """Returns a matrix in the memory of `workspace`, which grows where needed."""
    if workspace.numel() < rows * columns:
        workspace.resize_(rows * columns)
    return workspace[: rows * columns].view(rows, columns)


def _forward(images: _Side, texts: _Side, positions: _Positions | None = None) -> Tensor:
    """Scores tile by tile; `positions`, if given, receives where the maxima are."""
    scores = images.embeds.new_zeros(len(images.mask), len(texts.mask), dtype=images.dtype)
    block = scores.new_empty(len(texts.order), len(images.order))
    words, patches, workspace = texts.pack(), images.pack(), scores.new_empty(0)
    for text, image in product(texts.tiles, images.tiles):
        runs = text.runs, image.runs
        similarity = _matrix(workspace, text.size, image.size)
        torch.mm(words[text.tokens], patches[image.tokens].T, out=similarity)
        if positions is None:
            best = _maxima(similarity, *runs)
        else:
            best = _maxima_with_positions(similarity, *runs, *positions.of_tile(text, image))
        block[text.samples, image.samples] = _mean_scores(*best, *runs)
    scores[images.order[:, None], texts.order] = block.T
    return scores


def _maxima(similarity: Tensor, text_runs: list[_Run], image_runs: list[_Run]) -> tuple[Tensor, Tensor]:
    """Returns the maxima over the patches `(words, images)` and over the words `(texts, patches)` of each sample."""
    word_best = similarity.new_empty(similarity.shape[0], image_runs[-1].samples.stop)
    patch_best = similarity.new_empty(text_runs[-1].samples.stop, similarity.shape[1])
    for samples, tokens, shape in image_runs:
        torch.amax(similarity[:, tokens].unflatten(1, shape), dim=2, out=word_best[:, samples])
    for samples, tokens, shape in text_runs:
        torch.amax(similarity[tokens].unflatten(0, shape), dim=1, out=patch_best[samples])
    return word_best, patch_best


def _maxima_with_positions(
    similarity: Tensor,
    text_runs: list[_Run],
    image_runs: list[_Run],
    word_at: Tensor,
    patch_at: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns what `_maxima` returns and writes the first position of each maximum."""
    word_best = similarity.new_empty(word_at.shape)
    patch_best = similarity.new_empty(patch_at.shape)
    for samples, tokens, shape in image_runs:
        word_best[:, samples], at = similarity[:, tokens].unflatten(1, shape).max(dim=2)
        word_at[:, samples] = at
    for samples, tokens, shape in text_runs:
        patch_best[samples], patch_at[samples] = _max_over_words(similarity[tokens].unflatten(0, shape))
    return word_best, patch_best


def _max_over_words(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Returns maximum and first position over dimension 1 of `(texts, words, patches)`."""
    if similarity.device.type != "cpu":
        return similarity.max(dim=1)
    # With patches as channels this is a pooling, which has a vectorised kernel on CPU: 8 times faster than `max`.
    pooled = max_pool2d(similarity.unsqueeze(2).permute(0, 3, 1, 2), (similarity.shape[1], 1), return_indices=True)
    return pooled[0].flatten(1), pooled[1].flatten(1)


def _mean_scores(word_best: Tensor, patch_best: Tensor, text_runs: list[_Run], image_runs: list[_Run]) -> Tensor:
    """Averages the maxima of each sample to scores `(texts, images)`."""
    scores = word_best.new_empty(patch_best.shape[0], word_best.shape[1])
    for samples, tokens, shape in text_runs:
        torch.mean(word_best[tokens].unflatten(0, shape), dim=1, out=scores[samples])
    for samples, tokens, shape in image_runs:
        scores[:, samples] += patch_best[:, tokens].unflatten(1, shape).mean(dim=2)
    return scores


class _Positions:
    """Where the maxima of all pairs are, in the smallest signed type: counted from each sample's first token."""

    def __init__(self, word_at: Tensor, patch_at: Tensor):
        self.word_at, self.patch_at = word_at, patch_at

    @classmethod
    def empty(cls, images: _Side, texts: _Side) -> _Positions:
        def new(rows: int, columns: int, longest: int) -> Tensor:
            dtype = next(t for t in (torch.int8, torch.int16, torch.int32) if longest <= torch.iinfo(t).max + 1)
            return torch.empty(rows, columns, dtype=dtype, device=images.embeds.device)

        return cls(
            new(sum(texts.lengths), len(images.lengths), images.mask.shape[1]),
            new(len(texts.lengths), sum(images.lengths), texts.mask.shape[1]),
        )

    def of_tile(self, text: _Tile, image: _Tile) -> tuple[Tensor, Tensor]:
        """Returns the part of one tile: patch positions `(words, images)` and word positions `(texts, patches)`."""
        return self.word_at[text.tokens, image.samples], self.patch_at[text.samples, image.tokens]


class _PairScores(torch.autograd.Function):
    """Tiled scores with a backward pass that knows only the positions of the maxima."""

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, image_mask, text_mask, tile_elements):
        images, texts = _sides(image_embeds, text_embeds, image_mask, text_mask, tile_elements)
        positions = _Positions.empty(images, texts)
        scores = _forward(images, texts, positions)
        ctx.save_for_backward(image_embeds, text_embeds, image_mask, text_mask, positions.word_at, positions.patch_at)
        ctx.tile_elements = tile_elements
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, word_at, patch_at = ctx.saved_tensors
        sides = _sides(*inputs, ctx.tile_elements)
        return *_backward(grad, *sides, _Positions(word_at, patch_at), ctx.needs_input_grad), None, None, None


def _backward(
    grad: Tensor, images: _Side, texts: _Side, positions: _Positions, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Returns the gradients of image and text embeddings, `None` where not needed."""
    words, patches, workspace = texts.pack(), images.pack(), grad.new_empty(0)
    patch_grad, word_grad = (
        torch.zeros_like(tokens) if need else None for tokens, need in zip((patches, words), needed, strict=False)
    )
    block = grad[images.order[:, None], texts.order].T
    for text, image in product(texts.tiles, images.tiles):
        part = block[text.samples, image.samples]
        shares = part / texts.counts[text.samples, None], part / images.counts[image.samples]
        weights = _matrix(workspace, text.size, image.size)
        _fill_weights(weights, shares, positions.of_tile(text, image), text.runs, image.runs)
        if patch_grad is not None:
            patch_grad[image.tokens].addmm_(weights.T, words[text.tokens])
        if word_grad is not None:
            word_grad[text.tokens].addmm_(weights, patches[image.tokens])
    sides = ((images, patch_grad), (texts, word_grad))
    return [None if tokens is None else side.unpack(tokens) for side, tokens in sides]


def _fill_weights(
    weights: Tensor,
    shares: tuple[Tensor, Tensor],
    at: tuple[Tensor, Tensor],
    text_runs: list[_Run],
    image_runs: list[_Run],
) -> None:
    """Writes the derivative of the loss by each similarity of a tile: non-zero only where a maximum is.

    `shares` are the derivatives by one word's and by one patch's maximum, both `(texts, images)`.
    """
    weights.zero_()
    for text_samples, rows, text_shape in text_runs:
        for image_samples, columns, image_shape in image_runs:
            # (texts, words, images, patches)
            block = weights[rows, columns].unflatten(0, text_shape).unflatten(2, image_shape)
            patch_of_word = at[0][rows, image_samples].unflatten(0, text_shape).unsqueeze(3)
            word_of_patch = at[1][text_samples, columns].unflatten(1, image_shape).unsqueeze(1)
            for dim, index, share in ((3, patch_of_word, shares[0]), (1, word_of_patch, shares[1])):
                share = share[text_samples, None, image_samples, None].expand(index.shape)
                block.scatter_add_(dim, index.long(), share)
