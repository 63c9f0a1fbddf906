"""
How backbones are built and loaded, and how tokens leave each family of them.

Adding a family: if its vision tower puts special tokens before the patches, add a line to `_PREFIX_TOKENS`; if its
`last_hidden_state` lacks what the tower applies to its pooled token, add a case to `_finish`; if `AutoModel` does not
know the tower by itself, add a line to `_TOWER_CLASSES`. Nothing else knows families.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .untrusted_pico import HUB_OPTIONS, read_config


# Special tokens before the patches (CLS, distillation token); registers are counted from the configuration.
_PREFIX_TOKENS = {
    "align_vision_model": 0,
    "beit": 1,
    "blip_vision_model": 1,
    "clip_vision_model": 1,
    "chinese_clip_vision_model": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_convnext": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "swin": 0,
    "swinv2": 0,
    "vit": 1,
}

# Towers of joint models that `AutoModel` does not build from their own configuration. Looked up by name, because
# importing all of them would make every import of this file pay for families that are not used.
_TOWER_CLASSES = {
    "align_text_model": "AlignTextModel",
    "align_vision_model": "AlignVisionModel",
    "blip_text_model": "BlipTextModel",
    "blip_vision_model": "BlipVisionModel",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}

_SIGLIP_TEXT = ("siglip_text_model", "siglip2_text_model")
# SigLIP 2 uses Gemma's vocabulary, which pads with 0; the configurations of its checkpoints do not say so.
_GEMMA_VOCABULARY = 256_000


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Number of special tokens before the patches of a vision backbone; ValueError for an unknown family."""
    if config.model_type == "timm_wrapper":
        return config.num_prefix_tokens
    if config.model_type not in _PREFIX_TOKENS:
        raise ValueError(
            f"It is not known how many special tokens the vision family {config.model_type!r} puts before its "
            "patches, which vision_special_tokens=False and pooling='class_token' need. "
            f"Known: {', '.join(sorted(_PREFIX_TOKENS))}."
        )
    registers = config.to_dict().get("num_register_tokens", 0)
    return _PREFIX_TOKENS[config.model_type] + registers


def complete_config(vision_model: PreTrainedModel) -> None:
    """
    Writes into the configuration of a tower of timm what it lacks and its module knows: the width of its tokens and
    how many special ones come first. Its pooling, which nothing here needs, is left out.
    """
    if vision_model.config.model_type == "timm_wrapper":
        timm_model: Any = vision_model.timm_model
        vision_model.config.hidden_size = timm_model.num_features
        # Models without such tokens do not state their number.
        vision_model.config.num_prefix_tokens = getattr(timm_model, "num_prefix_tokens", 0)
        vision_model.config.do_pooling = False


def max_text_length(text_model: PreTrainedModel) -> int | None:
    """Tokens that a text tower has positions for, or `None` if it states no number."""
    for name, module in text_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin (MPNet, Data2Vec, Longformer, ...) count positions from behind that of padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(text_model.config, "max_position_embeddings", None)


def limit_text_length(tokenizer: Any, text_model: PreTrainedModel, max_length: int | None = None) -> None:
    """
    Sets the tokenizer's `model_max_length`, by which texts are cut in training and in use and which is saved with it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of `text_model`.
        text_model (`PreTrainedModel`): A text tower; texts never get longer than it has positions for.
        max_length (`int`, *optional*): Length in tokens to cut at; defaults to the tokenizer's own.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"The `max_length` of texts must be a positive number of tokens, got {max_length}.")
    length = tokenizer.model_max_length if max_length is None else max_length
    tokenizer.model_max_length = min(length, max_text_length(text_model) or length)


def hidden_size(config: Any) -> int:
    """Width of the tokens that leave a backbone; convolutional families state it elsewhere than transformers."""
    if config.model_type in _SIGLIP_TEXT:
        return config.projection_size
    if config.model_type == "align_vision_model":
        # Its `hidden_dim` is none: the last block's channels are scaled and rounded.
        from transformers.models.align.modeling_align import round_filters

        return round_filters(config, config.out_channels[-1])
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


# Building and loading


def _tower_class(config: PreTrainedConfig) -> Any:
    if config.model_type in _TOWER_CLASSES:
        return getattr(transformers, _TOWER_CLASSES[config.model_type])
    model_class = MODEL_MAPPING.get(type(config), None)
    return model_class[0] if isinstance(model_class, tuple) else model_class


def _pooling_kwargs(config: PreTrainedConfig) -> dict[str, bool]:
    # Poolers never see a gradient here, which distributed training would report as unused parameters.
    model_class = _tower_class(config)
    if model_class is None or "add_pooling_layer" not in inspect.signature(model_class.__init__).parameters:
        return {}
    return {"add_pooling_layer": False}


def _as_encoder(config: PreTrainedConfig) -> PreTrainedConfig:
    # BLIP's text tower is a decoder on paper: its cross-attention to images is no part of a tower of its own.
    if config.model_type == "blip_text_model" and config.is_decoder:
        config = copy.deepcopy(config)
        config.is_decoder = False
    return config


def check_vision_family(config: PreTrainedConfig) -> None:
    """ValueError for the vision towers that do not encode whole images from plain `pixel_values`."""
    if config.model_type == "vit_mae":
        raise ValueError(
            "ViT-MAE (vit_mae) hides three quarters of each image at random, in evaluation mode too. Its encoder is "
            "that of a ViT: load the checkpoint with `ViTModel.from_pretrained`, set `config.model_type = 'vit'`, and "
            "give that model as the vision tower."
        )
    if config.model_type == "siglip2_vision_model":
        raise ValueError(
            "The NaFlex variant of SigLIP 2 (siglip2_vision_model) takes patches of any aspect ratio with "
            "`pixel_attention_mask` and `spatial_shapes`, which PICO does not. Use a SigLIP 2 checkpoint of fixed "
            "resolution, such as google/siglip2-base-patch16-224: those are of model type 'siglip'."
        )


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a backbone with fresh weights from its configuration, without a pooler where the family allows it."""
    check_vision_family(config)
    config = _as_encoder(config)
    if config.model_type in _TOWER_CLASSES:
        return _tower_class(config)._from_config(config, **_pooling_kwargs(config))
    return AutoModel.from_config(config, **_pooling_kwargs(config))


def load_config(name_or_path: str, kwargs: dict) -> PreTrainedConfig:
    """Configuration of a checkpoint that will be loaded with the keyword arguments `kwargs`."""
    names = (*HUB_OPTIONS, "trust_remote_code")
    return AutoConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in names if name in kwargs})


def is_joint(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a joint vision-language model such as CLIP."""
    return "vision_config" in config.sub_configs


def load_model(name_or_path: str, **kwargs) -> PreTrainedModel:
    """
    Loads the checkpoint of a tower or of a joint vision-language model.

    Only safetensors are read, unless `use_safetensors=False` is passed.

    Args:
        name_or_path (`str`): Hub id or folder.
        kwargs: Passed to `from_pretrained` (`revision`, `token`, `dtype`, ...).

    Raises:
        ValueError: if the checkpoint lacks weights of the model, which `from_pretrained` would make up, or names code
            that is to be run.
        OSError: if its files are missing, damaged, or no safetensors.
    """
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    read_config(name_or_path, kwargs)
    config = load_config(name_or_path, kwargs)
    check_vision_family(config.vision_config if is_joint(config) else config)
    model_class: Any = AutoModel
    if config.model_type in _TOWER_CLASSES:
        model_class, config = _tower_class(config), _as_encoder(config)
    elif config.model_type == "blip":
        config.text_config = _as_encoder(config.text_config)
        if "BlipForImageTextRetrieval" in (config.architectures or ()):
            model_class = transformers.BlipForImageTextRetrieval
    pooling = {} if is_joint(config) else _pooling_kwargs(config)
    try:
        model, info = model_class.from_pretrained(
            name_or_path, config=config, output_loading_info=True, **pooling, **kwargs
        )
    except SafetensorError as error:
        raise OSError(f"The weights of {str(name_or_path)!r} are damaged: {error}.") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"The checkpoint {str(name_or_path)!r} (architectures: {config.architectures}) has no weights for "
            f"{len(missing)} tensors of {type(model).__name__}, such as {', '.join(missing[:3])}. It is a checkpoint "
            "of another kind of model; towers and models of two encoders (CLIP, SigLIP, BLIP for retrieval) work."
        )
    return model


def plain_tower(tower: PreTrainedModel) -> PreTrainedModel:
    """
    The tower itself, or a copy without what [`build_backbone`] leaves out: a pooler, BLIP's cross-attention.
    """
    pooler = tower._modules.get("pooler")
    has_pooler = bool(_pooling_kwargs(tower.config)) and pooler is not None and any(True for _ in pooler.parameters())
    if not has_pooler and _as_encoder(tower.config) is tower.config:
        return tower
    plain = build_backbone(tower.config)
    nn.Module.to(plain, device=tower.device, dtype=tower.dtype)
    missing = plain.load_state_dict(tower.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"{type(tower).__name__} lacks {', '.join(missing[:3])} of {type(plain).__name__}.")
    return plain


def tower_of(joint: PreTrainedModel, modality: str) -> PreTrainedModel:
    """The tower of a joint model for `"image"` or `"text"`."""
    for name in ("vision_model",) if modality == "image" else ("text_model", "text_encoder"):
        if name in joint._modules:
            return plain_tower(getattr(joint, name))
    raise ValueError(
        f"{type(joint).__name__} has no {'vision' if modality == 'image' else 'text'} tower of its own; models of two "
        "encoders (CLIP, SigLIP, BLIP for retrieval, ...) have."
    )


def load_backbone(name_or_path: str, modality: str, **kwargs) -> PreTrainedModel:
    """
    Loads one tower from a checkpoint of its own, or out of a joint vision-language checkpoint such as CLIP.

    Args:
        name_or_path (`str`): Hub id or folder.
        modality (`str`): `"image"` or `"text"`.
        kwargs: Passed to `from_pretrained` (`revision`, `token`, `dtype`, ...).
    """
    model = load_model(name_or_path, **kwargs)
    return tower_of(model, modality) if is_joint(model.config) else model


def joint_projections(joint: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Weights `(dim, hidden)` and biases `(dim,)` by which a joint model maps its two towers into one space, by the names
    of the alignment head. A side that ends in that space already gets the identity. Empty where the model has none,
    or has those of poolers, through which no token passes.
    """
    config, modules = joint.config, joint._modules
    if config.model_type == "vision-text-dual-encoder":
        return {}
    width = hidden_size(config.vision_config)
    identity = nn.Linear(width, width, bias=False)
    nn.init.eye_(identity.weight)
    visual = modules.get("visual_projection", modules.get("vision_proj"))
    text = modules.get("text_projection", modules.get("text_proj"))
    if config.model_type == "siglip" and config.vision_config.vision_use_head:
        visual = text = identity
        if hidden_size(config.text_config) != width:
            return {}
    elif config.model_type == "align":
        visual = identity
    if not (isinstance(visual, nn.Linear) and isinstance(text, nn.Linear)):
        return {}
    if visual.out_features != text.out_features:
        return {}
    projections = {"visual_projection": visual, "text_projection": text}
    found = {f"{name}.weight": module.weight.detach() for name, module in projections.items()}
    if visual.bias is not None or text.bias is not None:
        for name, module in projections.items():
            bias = torch.zeros(module.out_features) if module.bias is None else module.bias.detach()
            found[f"{name}.bias"] = bias
    return found


def joint_logit_scale(joint: PreTrainedModel) -> torch.Tensor | None:
    """Logarithm `(1,)` of a joint model's learned inverse temperature, None where it has none."""
    parameters = dict(joint.named_parameters(recurse=False))
    if "logit_scale" in parameters:
        return parameters["logit_scale"].detach().reshape(1)
    if "temperature" in parameters:  # ALIGN divides by it
        return -parameters["temperature"].detach().log().reshape(1)
    return None


def batch_norm_layers(tower: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of batch normalisation in a tower, of which many have none, by name and from the first on."""
    return {name: layer for name, layer in tower.named_modules() if isinstance(layer, _BatchNorm)}


def freeze_unused(vision_model: PreTrainedModel, pooled: bool) -> None:
    """
    Freezes what never sees a gradient, which distributed training would otherwise wait for: the mask token of DINO's
    pretraining, timm's pooling and head, and, unless the score is that of pooled vectors (`pooled`), the query of
    SigLIP's.
    """
    unused = ["timm_model.head.", "timm_model.fc_norm.", "timm_model.attn_pool."]
    # Of MobileNets these come after pooling; of EfficientNets `conv_head` comes before it.
    if any(name.startswith("timm_model.norm_head") for name, _ in vision_model.named_modules()):
        unused += ["timm_model.conv_head.", "timm_model.norm_head."]
    for name, parameter in vision_model.named_parameters():
        is_pooling = name.startswith(tuple(unused))
        if name.endswith("mask_token") or is_pooling or (name == "head.probe" and not pooled):
            parameter.requires_grad_(False)


# Tokens


def run_text_tower(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs
) -> tuple[transformers.utils.ModelOutput, torch.Tensor]:
    """
    Runs a text tower.

    SigLIP is trained on texts of full length without an attention mask, and reads its summary off the last place. So
    its texts are padded here to full length, whatever the width of the batch, and the mask is not shown to the tower;
    it still says which tokens take part in the score. All other families are given the mask.

    Args:
        model (`PreTrainedModel`): Text tower.
        input_ids (`torch.Tensor` of shape `(batch, tokens)`): Token ids.
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`): 1 at real tokens.
        kwargs: Passed to the tower.

    Returns:
        The tower's outputs, and the finished hidden states `(batch, tokens, hidden)` of all tokens.
    """
    config = model.config
    width = input_ids.shape[1]
    if config.model_type in _SIGLIP_TEXT:
        pad = 0 if config.vocab_size == _GEMMA_VOCABULARY else config.pad_token_id
        missing = max(config.max_position_embeddings - width, 0)
        input_ids = nn.functional.pad(input_ids.masked_fill(attention_mask == 0, pad), (0, missing), value=pad)
        outputs = model(input_ids=input_ids, return_dict=True, **kwargs)
    else:
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
    return outputs, _finish(model, outputs.last_hidden_state[:, :width])


def image_token_states(model: PreTrainedModel, outputs) -> torch.Tensor:
    """
    Hidden states `(batch, tokens, hidden)` of an image's tokens, special ones included. Feature maps, with their
    features first or last (timm's Swin), are laid out as tokens.
    """
    hidden_states = outputs.last_hidden_state
    if hidden_states.dim() == 4:
        if hidden_states.shape[1] == hidden_size(model.config):
            hidden_states = hidden_states.movedim(1, -1)
        hidden_states = hidden_states.flatten(1, 2)
    return _finish(model, hidden_states)


def _finish(model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Applies to all tokens what a tower applies to its pooled token only: they are to live in one space."""
    family = model.config.model_type
    if family in ("clip_vision_model", "chinese_clip_vision_model"):
        return model.post_layernorm(hidden_states)
    if family in _SIGLIP_TEXT:
        return model.head(hidden_states)
    if family == "siglip_vision_model" and model.use_head:
        # What the attention pooling gives for a patch that gets all the attention: its value, then the MLP.
        head = model.head
        weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        size = model.config.hidden_size
        value = head.attention.out_proj(nn.functional.linear(hidden_states, weight[2 * size :], bias[2 * size :]))
        return value + head.mlp(head.layernorm(value))
    return hidden_states


def left_aligned(attention_mask: torch.Tensor, *values: torch.Tensor | None) -> list[Any]:
    """
    Moves texts that were padded on the left to the front of their rows, where towers count positions from and have the
    class token.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`): 1 at real tokens.
        values (`torch.Tensor` of shape `(batch, tokens)`, *optional*): What is moved along; None stays None.

    Returns:
        The mask and the values, moved.
    """
    leading = (attention_mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    width = attention_mask.shape[1]
    places = torch.arange(width, device=attention_mask.device) + leading
    # Around the end of the row; as a remainder it could not be exported to ONNX.
    places = torch.where(places < width, places, places - width)
    return [None if value is None else value.gather(1, places) for value in (attention_mask, *values)]


def text_token_mask(attention_mask: torch.Tensor, keep_special_tokens: bool, family: str = "bert") -> torch.Tensor:
    """
    Boolean mask `(batch, tokens)` of the words that take part in the score: the attention mask, on request without the
    first and the last real token (CLS and SEP, begin and end of text). SigLIP's texts have the last one only.
    """
    mask = attention_mask.bool()
    if keep_special_tokens:
        return mask
    order = mask.cumsum(dim=1)
    return mask & (order > (0 if family in _SIGLIP_TEXT else 1)) & (order < order[:, -1:])


def _pools_itself(model: PreTrainedModel) -> bool:
    # CLIP's text tower is causal: its summary is the state at the end of the text. SigLIP's is the last place of a
    # text of full length, and attention over all patches of an image; ALIGN's of an image is the mean of its patches.
    # All of them return it as pooled output.
    family = model.config.model_type
    pooled = ("clip_text_model", "align_vision_model", *_SIGLIP_TEXT)
    return family in pooled or (family == "siglip_vision_model" and bool(model.use_head))


def has_class_token(model: PreTrainedModel, modality: str) -> bool:
    """Whether [`class_token_state`] gives a state; ValueError where that is not known of a vision family."""
    return modality == "text" or _pools_itself(model) or num_prefix_tokens(model.config) > 0


def class_token_state(
    model: PreTrainedModel, outputs, token_states: torch.Tensor, modality: str
) -> torch.Tensor | None:
    """
    Hidden state `(batch, hidden)` of the token that stands for the whole sample, None where the family has none.

    `token_states` are the tower's finished hidden states with special tokens kept.
    """
    if _pools_itself(model):
        return outputs.pooler_output
    return token_states[:, 0] if has_class_token(model, modality) else None
