"""
Every collective operation, that is, all by which processes wait for each other. All processes have to call them, in
the same order. Those of Accelerate that do what is needed are imported from here too: one file shows them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, gather_object, reduce, wait_for_everyone
from torch import distributed
from torch.distributed.tensor import DTensor


@dataclass
class GatheredBatch:
    """
    Score-ready embeddings, masks, ids and captions of the pairs of all processes, in the order of the processes;
    `own` are this process's pairs.

    `loss_share` is their number over the mean number of pairs, 1 for equal batches: with it a mean over processes of
    per-process mean losses is the mean over all pairs.
    """

    image_embeds: torch.Tensor
    image_mask: torch.Tensor
    text_embeds: torch.Tensor
    text_mask: torch.Tensor
    ids: torch.Tensor
    caption_codes: torch.Tensor | None
    own: slice
    loss_share: float


def gather_batch(
    outputs, ids: torch.Tensor, caption_codes: torch.Tensor | None = None, gather_negatives: bool = True
) -> GatheredBatch:
    """
    Gathers the pairs of all processes; the gradient of a process's loss reaches the others' embeddings.

    Args:
        outputs ([`PicoOutput`]): Output of the model on this process's pairs.
        ids (`torch.Tensor` of shape `(pairs,)`): Identity of each pair's meaning.
        caption_codes (`torch.Tensor` of shape `(pairs,)`, *optional*): Identity of each pair's caption.
        gather_negatives (`bool`, *optional*, defaults to `True`): False leaves every process with its own pairs.
    """
    local = (outputs.image_embeds, outputs.image_mask, outputs.text_embeds, outputs.text_mask, ids, caption_codes)
    if not gather_negatives or PartialState().num_processes == 1:
        return GatheredBatch(*local, own=slice(0, len(ids)), loss_share=1.0)
    # One small collective tells every process how far to pad: captions differ in length, last batches in size.
    shape = torch.tensor([[len(ids), outputs.image_mask.shape[1], outputs.text_mask.shape[1]]], device=ids.device)
    shapes = gather(shape)
    counts = shapes[:, 0].tolist()
    rows, patches, words = shapes.amax(dim=0).tolist()

    def of_all(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
        blocks = _AllGather.apply(_pad(tensor, rows, *sizes))
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    process = PartialState().process_index
    start = sum(counts[:process])
    return GatheredBatch(
        image_embeds=of_all(outputs.image_embeds, patches),
        image_mask=of_all(outputs.image_mask.to(torch.uint8), patches).bool(),
        text_embeds=of_all(outputs.text_embeds, words),
        text_mask=of_all(outputs.text_mask.to(torch.uint8), words).bool(),
        ids=of_all(ids),
        caption_codes=None if caption_codes is None else of_all(caption_codes),
        own=slice(start, start + counts[process]),
        loss_share=counts[process] * len(counts) / sum(counts),
    )


class _AllGather(torch.autograd.Function):
    """
    Stacks a tensor of all processes; the gradient of each process's loss reaches the process the tensor came from.

    torch's own function with a gradient is deprecated, and its successor is newer than the oldest torch we support.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, tensor)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]


def own_rows(num_images: int) -> range:
    """This process's contiguous block of the images; ValueError if there are fewer images than processes."""
    state = PartialState()
    processes, process = state.num_processes, state.process_index
    if num_images < processes:
        # Raised on every process: the ones with images would wait for ever for the others.
        raise ValueError(f"The data set has {num_images} images, fewer than the {processes} processes.")
    return range(num_images * process // processes, num_images * (process + 1) // processes)


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """
    Concatenates a tensor of all processes along its first dimension; the first two dimensions may differ between
    processes, the second is padded with zeros.
    """
    if PartialState().num_processes == 1:
        return tensor
    sizes = gather(torch.tensor([tensor.shape[:2]], device=tensor.device))
    counts = sizes[:, 0].tolist()
    # Not `pad_across_processes`, which makes integers of the booleans that it pads, on that process alone.
    padded = _pad(tensor, *sizes.amax(dim=0).tolist())
    # No `split`, which cannot cut a tensor without rows.
    blocks = gather(padded).unflatten(0, (len(counts), max(counts)))
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def raise_together(error: Exception | None) -> None:
    """Raises the error of the first process that has one, on all of them: none waits for one that has left."""
    for found in [error] if PartialState().num_processes == 1 else gather_object([error]):
        if found is not None:
            raise found


def whole(tensor: Any) -> Any:
    """All of a tensor of which every process holds a part; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_(tensor: torch.Tensor) -> None:
    """Replaces a tensor by its mean over the processes."""
    distributed.all_reduce(tensor)
    tensor /= distributed.get_world_size()


def _pad(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    padding: list[int] = []
    for dim in range(tensor.dim() - 1, -1, -1):
        padding += [0, (sizes[dim] - tensor.shape[dim]) if dim < len(sizes) else 0]
    return torch.nn.functional.pad(tensor, padding).contiguous()


__all__ = [
    "GatheredBatch",
    "average_",
    "broadcast",
    "gather",
    "gather_batch",
    "gather_object",
    "gather_rows",
    "own_rows",
    "raise_together",
    "reduce",
    "wait_for_everyone",
    "whole",
]
