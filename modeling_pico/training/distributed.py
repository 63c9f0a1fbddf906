"""Gathering a batch over processes, with gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import distributed


@dataclass
class GatheredBatch:
    """
    Score-ready embeddings of the pairs of all processes, and where this process's own pairs stand among them.

    Attributes:
        image_embeds `(all, patches, dim)`, image_mask `(all, patches)`, text_embeds `(all, words, dim)`,
        text_mask `(all, words)`, ids `(all,)`: Everything, in the order of the processes.
        own (`slice`): This process's pairs.
        loss_share (`float`): Own pairs over the mean number of pairs, 1 for equal batches. With it a mean over
            processes of per-process mean losses is the mean over all pairs.
    """

    image_embeds: torch.Tensor
    image_mask: torch.Tensor
    text_embeds: torch.Tensor
    text_mask: torch.Tensor
    ids: torch.Tensor
    own: slice
    loss_share: float


def gather_batch(outputs, ids: torch.Tensor) -> GatheredBatch:
    r"""
    Gathers the embeddings of all processes; the gradient of a process's loss reaches the others' embeddings.

    Args:
        outputs ([`PicoOutput`]): Output of the model on this process's pairs.
        ids (`torch.Tensor` of shape `(pairs,)`): Identity of each pair's meaning.
    """
    local = (outputs.image_embeds, outputs.image_mask, outputs.text_embeds, outputs.text_mask, ids)
    if PartialState().num_processes == 1:
        return GatheredBatch(*local, own=slice(0, len(ids)), loss_share=1.0)
    # One small collective tells every process how far to pad: captions differ in length, last batches in size.
    shape = torch.tensor([[len(ids), outputs.image_mask.shape[1], outputs.text_mask.shape[1]]], device=ids.device)
    shapes = gather(shape)
    counts = shapes[:, 0].tolist()
    rows, patches, words = shapes.amax(dim=0).tolist()
    gathered = [
        torch.cat([block[:count] for block, count in zip(_AllGather.apply(padded), counts, strict=True)])
        for padded in (
            _pad(outputs.image_embeds, rows, patches),
            _pad(outputs.image_mask.to(torch.uint8), rows, patches),
            _pad(outputs.text_embeds, rows, words),
            _pad(outputs.text_mask.to(torch.uint8), rows, words),
            _pad(ids, rows),
        )
    ]
    image_embeds, image_mask, text_embeds, text_mask, all_ids = gathered
    process = PartialState().process_index
    start = sum(counts[:process])
    return GatheredBatch(
        image_embeds,
        image_mask.bool(),
        text_embeds,
        text_mask.bool(),
        all_ids,
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


def _pad(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    padding: list[int] = []
    for dim in range(tensor.dim() - 1, -1, -1):
        padding += [0, (sizes[dim] - tensor.shape[dim]) if dim < len(sizes) else 0]
    return torch.nn.functional.pad(tensor, padding).contiguous()


__all__ = ["GatheredBatch", "gather_batch"]
