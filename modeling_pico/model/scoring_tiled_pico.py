"""The pair score in tiles: no work on padding, and workspace that does not grow with the number of pairs.

Samples are sorted by their number of real tokens and packed. One matrix product then gives a tile of similarities with
words as rows and patches as columns, in which samples of equal length form dense blocks, so that both maxima are plain
reductions that run over contiguous memory. For training, the positions of the maxima are kept instead of the
similarities: the backward pass turns them into a sparse tile of weights and two matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import max_pool2d


# Elements (4 bytes each in float32). A tile of similarities should stay in the cache of a CPU core and is larger on
# accelerators, which hide small tiles badly. A chunk holds the packed real tokens of one side.
CPU_TILE_ELEMENTS = 2**21
DEVICE_TILE_ELEMENTS = 2**24
CHUNK_ELEMENTS = 2**23


class _Run(NamedTuple):
    """Neighbouring samples of equal length; ranges are relative to the tile."""

    samples: slice
    tokens: slice
    shape: tuple[int, int]  # (samples, tokens of each)


class _Tile(NamedTuple):
    """Neighbouring samples that are scored together; ranges are relative to the chunk."""

    samples: slice
    tokens: slice
    runs: list[_Run]

    @property
    def size(self) -> int:
        return self.tokens.stop - self.tokens.start


class _Side:
    """The images or the texts, sorted by their number of real tokens; samples without any are left out."""

    def __init__(self, embeds: Tensor, mask: Tensor, dtype: torch.dtype):
        counts, order = mask.sum(dim=1).sort(stable=True)
        lengths = counts.tolist()
        empty = lengths.count(0)
        self.embeds, self.mask, self.dtype = embeds, mask, dtype
        self.order, self.counts, self.lengths = order[empty:], counts[empty:], lengths[empty:]
        # Without padding the stable order is the given one, and packing is a mere view.
        self.dense = lengths[:1] == [mask.shape[1]] and not empty

    def chunks(self, tile_tokens: int) -> Iterator[_Chunk]:
        limit = max(CHUNK_ELEMENTS // max(self.embeds.shape[2], 1), tile_tokens)
        for start, stop in _split(self.lengths, limit):
            yield _Chunk(self, slice(start, stop), tile_tokens)


class _Chunk:
    """As many sorted samples of one side as are packed at a time."""

    def __init__(self, side: _Side, samples: slice, tile_tokens: int):
        self.side, self.samples = side, samples
        self.order, self.counts = side.order[samples], side.counts[samples]
        lengths = side.lengths[samples]
        self.offset = sum(side.lengths[: samples.start])  # tokens of the side before this chunk
        self.tiles, start = [], 0
        for first, last in _split(lengths, tile_tokens):
            stop = start + sum(lengths[first:last])
            self.tiles.append(_Tile(slice(first, last), slice(start, stop), _runs(lengths[first:last])))
            start = stop

    def positions(self) -> tuple[Tensor, Tensor]:
        """Returns where the real tokens lie in the padded tensor, as row and column indices."""
        row, column = self.side.mask[self.order].nonzero(as_tuple=True)
        return self.order[row], column

    def pack(self) -> Tensor:
        """Returns the real tokens as `(tokens, dim)`."""
        embeds = self.side.embeds
        tokens = embeds[self.samples].flatten(0, 1) if self.side.dense else embeds[self.positions()]
        return tokens.to(self.side.dtype)

    def collector(self, padded: Tensor) -> Tensor:
        """Returns where to add up packed values `(tokens, dim)`: `padded` itself if nothing is padding."""
        if self.side.dense:
            return padded[self.samples].view(-1, padded.shape[2])
        return padded.new_zeros(self.tiles[-1].tokens.stop, padded.shape[2])

    def deliver(self, padded: Tensor, tokens: Tensor) -> None:
        """Adds what a collector holds to `padded`."""
        if not self.side.dense:
            padded[self.positions()] += tokens


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
        return _forward(_sides(*arguments[:4]), _tile_tokens(tile_elements))


def _sides(image_embeds: Tensor, text_embeds: Tensor, image_mask: Tensor, text_mask: Tensor) -> tuple[_Side, _Side]:
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    return _Side(image_embeds, image_mask, dtype), _Side(text_embeds, text_mask, dtype)


def _tile_tokens(tile_elements: int) -> tuple[int, int]:
    """Returns how many words and patches span a tile: more patches, as both reductions read along them."""
    words = max(1, int((tile_elements / 4) ** 0.5))
    return words, max(1, tile_elements // words)


def _matrix(workspace: Tensor, rows: int, columns: int) -> Tensor:
    """Returns a matrix in the memory of `workspace`, which grows where needed."""
    if workspace.numel() < rows * columns:
        workspace.resize_(rows * columns)
    return workspace[: rows * columns].view(rows, columns)


def _forward(
    sides: tuple[_Side, _Side],
    tile_tokens: tuple[int, int],
    positions: _Positions | None = None,
) -> Tensor:
    """Scores tile by tile; `positions`, if given, receives where the maxima are."""
    images, texts = sides
    scores = images.embeds.new_zeros(len(images.mask), len(texts.mask), dtype=images.dtype)
    workspace = scores.new_empty(0)
    for text in texts.chunks(tile_tokens[0]):
        words = text.pack()
        for image in images.chunks(tile_tokens[1]):
            patches = image.pack()
            block = scores.new_empty(len(text.order), len(image.order))
            for text_tile, image_tile in product(text.tiles, image.tiles):
                runs = text_tile.runs, image_tile.runs
                similarity = _matrix(workspace, text_tile.size, image_tile.size)
                torch.mm(words[text_tile.tokens], patches[image_tile.tokens].T, out=similarity)
                if positions is None:
                    best = _maxima(similarity, *runs)
                else:
                    at = positions.of_tile(text, text_tile, image, image_tile)
                    best = _maxima_with_positions(similarity, *runs, *at)
                block[text_tile.samples, image_tile.samples] = _mean_scores(*best, *runs)
            scores[image.order[:, None], text.order] = block.T
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

    def of_tile(self, text: _Chunk, text_tile: _Tile, image: _Chunk, image_tile: _Tile) -> tuple[Tensor, Tensor]:
        """Returns the part of one tile: patch positions `(words, images)` and word positions `(texts, patches)`."""
        word_at = self.word_at[_shift(text_tile.tokens, text.offset), _shift(image_tile.samples, image.samples.start)]
        patch_at = self.patch_at[
            _shift(text_tile.samples, text.samples.start), _shift(image_tile.tokens, image.offset)
        ]
        return word_at, patch_at


def _shift(part: slice, offset: int) -> slice:
    return slice(part.start + offset, part.stop + offset)


class _PairScores(torch.autograd.Function):
    """Tiled scores with a backward pass that knows only the positions of the maxima."""

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, image_mask, text_mask, tile_elements):
        images, texts = sides = _sides(image_embeds, text_embeds, image_mask, text_mask)
        positions = _Positions.empty(images, texts)
        tile_tokens = _tile_tokens(tile_elements)
        scores = _forward(sides, tile_tokens, positions)
        ctx.save_for_backward(image_embeds, text_embeds, image_mask, text_mask, positions.word_at, positions.patch_at)
        ctx.tile_tokens = tile_tokens
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, word_at, patch_at = ctx.saved_tensors
        grads = _backward(grad, _sides(*inputs), _Positions(word_at, patch_at), ctx.needs_input_grad, ctx.tile_tokens)
        return *grads, None, None, None


def _backward(
    grad: Tensor,
    sides: tuple[_Side, _Side],
    positions: _Positions,
    needed: tuple[bool, ...],
    tile_tokens: tuple[int, int],
) -> list[Tensor | None]:
    """Returns the gradients of image and text embeddings, `None` where not needed."""
    images, texts = sides
    grads = [
        torch.zeros(side.embeds.shape, dtype=side.dtype, device=grad.device) if need else None
        for side, need in zip(sides, needed[:2], strict=True)
    ]
    workspace = grad.new_empty(0)
    for text in texts.chunks(tile_tokens[0]):
        words = text.pack()
        word_grad = None if grads[1] is None else text.collector(grads[1])
        for image in images.chunks(tile_tokens[1]):
            patches = image.pack()
            patch_grad = None if grads[0] is None else image.collector(grads[0])
            block = grad[image.order[:, None], text.order].T
            for text_tile, image_tile in product(text.tiles, image.tiles):
                part = block[text_tile.samples, image_tile.samples]
                shares = part / text.counts[text_tile.samples, None], part / image.counts[image_tile.samples]
                at = positions.of_tile(text, text_tile, image, image_tile)
                weights = _matrix(workspace, text_tile.size, image_tile.size)
                _fill_weights(weights, shares, at, text_tile.runs, image_tile.runs)
                if patch_grad is not None:
                    patch_grad[image_tile.tokens].addmm_(weights.T, words[text_tile.tokens])
                if word_grad is not None:
                    word_grad[text_tile.tokens].addmm_(weights, patches[image_tile.tokens])
            if grads[0] is not None and patch_grad is not None:
                image.deliver(grads[0], patch_grad)
        if grads[1] is not None and word_grad is not None:
            text.deliver(grads[1], word_grad)
    return [None if value is None else value.to(side.embeds.dtype) for side, value in zip(sides, grads, strict=True)]


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
