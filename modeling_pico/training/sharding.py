"""What FSDP needs to know of PICO: which layers are sharded, and that what is beside the towers is not."""

from __future__ import annotations

import functools
import operator

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.modeling_layers import GradientCheckpointingLayer

from ..distributed import average_
from ..model.modeling_pico import PicoModel


def prepare_fsdp(accelerator, model: nn.Module, pico: PicoModel) -> None:
    """
    Configures Accelerate's FSDP for a model (`model`: `pico`, or an adapter around it) before it is sharded: towers
    are sharded layer by layer, what is beside them and the temperature stay whole on every process.

    They are small, and evaluation uses them outside of the model's forward pass, where sharded parameters are not
    there. Their gradients are averaged here, as FSDP averages its own.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} is not supported: with bf16 it rounds the style prototypes. Set "
            "`fsdp_version: 2`; see examples/accelerate/fsdp.yaml."
        )
    whole = list(pico.beside_towers().values())
    if isinstance(pico.logit_scale, nn.Parameter):
        whole.append(nn.ParameterList([pico.logit_scale]))
    plugin.ignored_modules = whole
    for module in whole:
        module.to(accelerator.device)
        for parameter in filter(operator.attrgetter("requires_grad"), module.parameters()):
            if not parameter._post_accumulate_grad_hooks:  # left by an earlier training
                parameter.register_post_accumulate_grad_hook(_average_gradient)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _layer_classes(model, pico)
    if plugin.mixed_precision_policy is not None:
        _mix_precision(accelerator, model)


def _layer_classes(model: nn.Module, pico: PicoModel) -> list[str]:
    # Not all families name their layers (BLIP's and ALIGN's texts).
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    # Accelerate shards the embedding of words on its own and cannot once the module around it is sharded.
    words = pico.get_input_embeddings()
    around_words = {type(module).__name__ for module in model.modules() if words in module.modules()}
    return sorted((layers | set(pico._no_split_modules or ())) - around_words)


def _mix_precision(accelerator, model: nn.Module) -> None:
    # As under DDP: autocast decides what is computed in half precision, and embeddings leave in float32. FSDP alone
    # would hand half-precision states to the whole head and round what the model returns.
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
    )
    forward = model.forward

    @functools.wraps(forward)
    def autocast_forward(*args, **kwargs):
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = autocast_forward


def _average_gradient(parameter: torch.Tensor) -> None:
    # What earlier micro-batches of the step left is equal on all processes and remains as it is.
    gradient = parameter.grad
    assert gradient is not None
    average_(gradient)


__all__ = ["prepare_fsdp"]
