"""
Large batches on small memory: the loss of the whole batch, encoded in chunks (GradCache, arXiv 2101.06983).

Every chunk is encoded twice: without gradient to get the embeddings that the loss needs, and, once the loss's gradient
with respect to them is known, with gradient to carry it into the weights. Auxiliary losses of the model are those of
each chunk, averaged over the chunks by their pairs: what they compare within a batch is then the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from ..evaluation.evaluator import concatenate_padded
from ..model.modeling_pico import PicoOutput


# Outputs that the loss and the staged construction read; the first two carry the gradient.
_EMBEDS = ("image_embeds", "text_embeds")
_OTHERS = ("image_mask", "text_mask", "image_tokens", "text_tokens")


def _random_state(device: torch.device) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    return torch.get_rng_state(), *get_device_states(torch.empty(0, device=device))


@contextmanager
def _replay(cpu: torch.Tensor, devices: list[int], states: list[torch.Tensor]) -> Iterator[None]:
    """The generators as they were before a chunk, so that its second pass drops out the same units."""
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def split_inputs(inputs: dict[str, torch.Tensor], chunk_size: int) -> list[dict[str, torch.Tensor]]:
    """Splits a batch into chunks of at most `chunk_size` pairs; every tensor has the pairs in its first dimension."""
    count = len(inputs["image_ids"])
    return [
        {name: value[start : start + chunk_size] for name, value in inputs.items()}
        for start in range(0, count, chunk_size)
    ]


def cached_backward(
    model: torch.nn.Module,
    chunks: list[dict[str, torch.Tensor]],
    loss_function: Callable[[PicoOutput], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    r"""
    Computes the loss of all chunks together, detached, and accumulates its gradient in the model.

    Args:
        model (`torch.nn.Module`): A [`PicoModel`], or one wrapped for distributed use.
        chunks (`list[dict[str, torch.Tensor]]`): The batch in chunks, see [`split_inputs`].
        loss_function (`Callable`): Gives the loss of a [`PicoOutput`] of the whole batch.
        backward (`Callable`): Runs backward on a scalar (with the scaling that mixed precision and accumulation ask).
        no_sync (`Callable`): Context in which gradients are not exchanged; used for all chunks but the last.
    """
    states: list[tuple[Any, ...]] = []
    outputs: list[PicoOutput] = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(chunk["image_ids"].device))
            outputs.append(model(**chunk, return_logits=False))
    if len(chunks) > 1 and len(chunks[0]["image_ids"]) == 1 and outputs[0].auxiliary_losses is not None:
        raise ValueError(
            f"The losses {', '.join(outputs[0].auxiliary_losses)} compare the samples of a chunk, and in chunks of "
            "one pair there is nothing to compare; set gradient_cache_chunk_size to 2 or, better, much more."
        )
    shares = [len(chunk["image_ids"]) / sum(len(other["image_ids"]) for other in chunks) for chunk in chunks]
    batch = _join(outputs, shares)
    loss = loss_function(batch)
    # A scalar takes the place of auxiliary losses where there are none; it has no gradient.
    auxiliary = batch.get("auxiliary_loss", torch.zeros((), device=loss.device, requires_grad=True))
    leaves = [*(batch[name] for name in (*_EMBEDS, "logit_scale")), auxiliary]
    image_gradients, text_gradients, scale_gradient, auxiliary_gradient = (
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
    )

    start = 0
    for index, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        last = index == len(chunks) - 1
        with nullcontext() if last else no_sync(), _replay(*state):
            output = model(**chunk, return_logits=False)
            end = start + len(output.image_embeds)
            words = output.text_embeds.shape[1]
            surrogate = (output.image_embeds * image_gradients[start:end]).sum()
            surrogate = surrogate + (output.text_embeds * text_gradients[start:end, :words]).sum()
            # The temperature belongs to the batch and not to a chunk: it counts once.
            surrogate = surrogate + output.logit_scale * (scale_gradient if last else 0.0)
            if output.auxiliary_loss is not None:
                surrogate = surrogate + output.auxiliary_loss * (auxiliary_gradient * shares[index])
            backward(surrogate)
        start = end
    return loss.detach()


def _join(outputs: list[PicoOutput], shares: list[float]) -> PicoOutput:
    names = (*_EMBEDS, *_OTHERS)
    joined: dict[str, Any] = {
        name: concatenate_padded([getattr(output, name) for output in outputs]) for name in names
    }
    for name in _EMBEDS:
        joined[name].requires_grad_()
    if outputs[0].auxiliary_losses is not None:
        terms: dict[str, Any] = {
            name: sum(share * output["auxiliary_losses"][name] for share, output in zip(shares, outputs, strict=True))
            for name in outputs[0].auxiliary_losses
        }
        joined["auxiliary_losses"] = terms
        joined["auxiliary_loss"] = torch.stack([*terms.values()]).sum().requires_grad_()
    return PicoOutput(**joined, logit_scale=outputs[0]["logit_scale"].clone().requires_grad_())


__all__ = ["cached_backward", "split_inputs"]
