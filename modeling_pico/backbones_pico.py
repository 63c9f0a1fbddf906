"""
How backbones are built, and how tokens leave each family of them.

Adding a family: if its vision tower puts special tokens before the patches, add a line to `_PREFIX_TOKENS`; if its
`last_hidden_state` still lacks the tower's final norm, add a line to `final_norm`. Nothing else knows families.
"""

from __future__ import annotations

import inspect

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING


# Special tokens before the patches (CLS, distillation token); registers are counted from the configuration.
_PREFIX_TOKENS = {
    "beit": 1,
    "blip_vision_model": 1,
    "clip_vision_model": 1,
    "chinese_clip_vision_model": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "swin": 0,
    "swinv2": 0,
    "vit": 1,
}


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Number of special tokens before the patches of a vision backbone; ValueError for an unknown family."""
    if config.model_type not in _PREFIX_TOKENS:
        raise ValueError(
            f"It is not known how many special tokens the vision family {config.model_type!r} puts before its "
            "patches, which vision_special_tokens=False, pooling='class_token' and column_mode='position' need. "
            f"Known: {', '.join(sorted(_PREFIX_TOKENS))}."
        )
    registers = config.to_dict().get("num_register_tokens", 0)
    return _PREFIX_TOKENS[config.model_type] + registers


def _pooling_kwargs(config: PreTrainedConfig) -> dict[str, bool]:
    # Poolers never see a gradient here, which distributed training would report as unused parameters.
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None:
        return {}
    accepted = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a backbone with fresh weights from its configuration, without a pooler where the family allows it."""
    return AutoModel.from_config(config, **_pooling_kwargs(config))


def hidden_size(config: PreTrainedConfig) -> int:
    """Width of a backbone's `last_hidden_state`; convolutional families state one width per stage."""
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


def load_config(name_or_path: str, kwargs: dict) -> PreTrainedConfig:
    """Configuration of a checkpoint that will be loaded with the keyword arguments `kwargs`."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return AutoConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in names if name in kwargs})


def load_backbone(name_or_path: str, modality: str, **kwargs) -> PreTrainedModel:
    """
    Loads one tower from a checkpoint of its own, or out of a joint vision-language checkpoint such as CLIP.

    Args:
        name_or_path (`str`): Hub id or folder.
        modality (`str`): `"image"` or `"text"`.
        kwargs: Passed to `from_pretrained` (`revision`, `token`, `dtype`, ...).
    """
    config = load_config(name_or_path, kwargs)
    if "vision_config" in config.sub_configs:
        joint = AutoModel.from_pretrained(name_or_path, **kwargs)
        return joint.vision_model if modality == "image" else joint.text_model
    return AutoModel.from_pretrained(name_or_path, **_pooling_kwargs(config), **kwargs)


def final_norm(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Applies a vision tower's last norm to all tokens where the tower applies it to its pooled token only (CLIP).
    """
    if model.config.model_type in ("clip_vision_model", "chinese_clip_vision_model"):
        return model.post_layernorm(hidden_states)
    return hidden_states


def image_token_states(model: PreTrainedModel, outputs) -> torch.Tensor:
    """
    Hidden states `(batch, tokens, hidden)` of an image's tokens, special ones included. Feature maps
    `(batch, hidden, height, width)` of convolutional backbones are laid out as tokens.
    """
    hidden_states = outputs.last_hidden_state
    if hidden_states.dim() == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    return final_norm(model, hidden_states)


def text_token_mask(attention_mask: torch.Tensor, keep_special_tokens: bool) -> torch.Tensor:
    """
    Boolean mask `(batch, tokens)` of the words that take part in the score: the attention mask, on request without the
    first and the last real token (CLS and SEP, begin and end of text).
    """
    mask = attention_mask.bool()
    if keep_special_tokens:
        return mask
    order = mask.cumsum(dim=1)
    return mask & (order > 1) & (order < order[:, -1:])


def class_token_state(
    model: PreTrainedModel, outputs, token_states: torch.Tensor, modality: str
) -> torch.Tensor | None:
    """
    Hidden state `(batch, hidden)` of the token that stands for the whole sample, None where the family has none.

    `token_states` are the tower's normed hidden states with special tokens kept.
    """
    if modality == "image":
        return token_states[:, 0] if num_prefix_tokens(model.config) else None
    # CLIP's text tower is causal: its summary is the state at the end of the text, which it returns as pooled output.
    if "clip_text" in model.config.model_type and outputs.pooler_output is not None:
        return outputs.pooler_output
    return token_states[:, 0]


__all__ = [
    "build_backbone",
    "class_token_state",
    "hidden_size",
    "image_token_states",
    "load_backbone",
    "load_config",
    "num_prefix_tokens",
    "text_token_mask",
]
