"""PICO model: backbones → token embeddings → alignment head → score."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging

from .alignment_heads_pico import HEADS, FineGrainedHead, TokenProjection
from .backbones_pico import (
    batch_norm_layers,
    build_backbone,
    check_vision_family,
    class_token_state,
    complete_config,
    freeze_unused,
    has_class_token,
    hidden_size,
    image_token_states,
    is_joint,
    joint_logit_scale,
    joint_projections,
    left_aligned,
    load_backbone,
    load_config,
    load_model,
    max_text_length,
    num_prefix_tokens,
    plain_tower,
    run_text_tower,
    text_token_mask,
    tower_of,
)
from .configuration_pico import PicoConfig, UncertaintyConfig
from .gallery_alignment_pico import (
    GalleryAlignment,
    GalleryMoments,
    ImageMoments,
    measure_galleries,
    moved_layers,
    together,
)
from .loss_pico import image_text_loss
from .prototypes_pico import StylePrototypes, StyleRates
from .scoring_pico import pair_scores
from .uncertainty_pico import UncertaintyPrototypes
from .untrusted_pico import check_image_moments, check_missing, check_prototypes, check_tensors, read_config


logger = logging.get_logger(__name__)


@dataclass
class PicoFeatures(BaseModelOutputWithPooling):
    r"""
    One modality, encoded: all that is needed to score it against the other one.

    Args:
        embeds (`torch.Tensor` of shape `(batch, tokens, dim)`):
            Score-ready token embeddings; semantic probability is folded in unless `weighted=False` was asked for.
        mask (`torch.Tensor` of shape `(batch, tokens)`):
            True at tokens that take part in the score.
        pooler_output (`torch.Tensor` of shape `(batch, dim)`):
            One unit vector per sample, for coarse search.
        semantic_probability (`torch.Tensor` of shape `(batch, dim)`, *optional*):
            Semantic probability of each feature column, where this side is weighted.
        uncertainty (`torch.Tensor` of shape `(batch,)`, *optional*):
            Uncertainty of each sample, with an `uncertainty_config`; the more ambiguous, the higher.
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, hidden)`), hidden_states, attentions:
            The backbone's outputs.
    """

    embeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    semantic_probability: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None


class TokenStates(NamedTuple):
    """
    What a tower gives the alignment head.

    Attributes:
        states (`torch.Tensor` of shape `(batch, tokens, hidden)`): Hidden states of the tokens.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True at tokens that take part.
        class_state (`torch.Tensor` of shape `(batch, hidden)`, *optional*):
            State of the class token, with `pooling="class_token"`.
    """

    states: torch.Tensor
    mask: torch.Tensor
    class_state: torch.Tensor | None = None


@dataclass
class PicoOutput(ModelOutput):
    r"""
    Output of [`PicoModel`].

    Args:
        loss (`torch.Tensor`, *optional*, returned with `return_loss=True`):
            Loss over the pairs of the batch, `auxiliary_loss` included.
        logits_per_image (`torch.Tensor` of shape `(images, texts)`): Scores times `logit_scale`.
        logits_per_text (`torch.Tensor` of shape `(texts, images)`): The transpose.
        image_embeds (`torch.Tensor` of shape `(images, patches, dim)`): Score-ready image token embeddings.
        text_embeds (`torch.Tensor` of shape `(texts, words, dim)`): Score-ready text token embeddings.
        image_mask (`torch.Tensor` of shape `(images, patches)`): True at tokens that take part in the score.
        text_mask (`torch.Tensor` of shape `(texts, words)`): True at tokens that take part in the score.
        image_tokens (`torch.Tensor` of shape `(images, patches, dim)`): Image token embeddings before weighting.
        text_tokens (`torch.Tensor` of shape `(texts, words, dim)`): Text token embeddings before weighting.
        image_semantic_probability (`torch.Tensor` of shape `(images, dim)`, *optional*): Where images are weighted.
        text_semantic_probability (`torch.Tensor` of shape `(texts, dim)`, *optional*): Where texts are weighted.
        image_uncertainty (`torch.Tensor` of shape `(images,)`, *optional*): With an `uncertainty_config`.
        text_uncertainty (`torch.Tensor` of shape `(texts,)`, *optional*): With an `uncertainty_config`.
        pooler_output (`torch.Tensor` of shape `(batch, dim)`, *optional*):
            One unit vector per sample, for coarse search; where only one side was given.
        logit_scale (`torch.Tensor`, scalar): Inverse temperature by which logits are multiplied.
        auxiliary_loss (`torch.Tensor`, scalar, *optional*, in training mode or with `return_loss=True`):
            What is minimised beside the loss of the pairs; None for a model that has no such losses.
        auxiliary_losses (`dict[str, torch.Tensor]`, *optional*, where `auxiliary_loss` is):
            Its terms by name, weighted: their sum is `auxiliary_loss`.
        vision_model_output, text_model_output: Outputs of the backbones.
        image_states, text_states ([`TokenStates`], *optional*, returned with `return_states=True`):
            What the alignment head was given.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    image_semantic_probability: torch.Tensor | None = None
    text_semantic_probability: torch.Tensor | None = None
    image_uncertainty: torch.Tensor | None = None
    text_uncertainty: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    auxiliary_losses: dict[str, torch.Tensor] | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    image_states: TokenStates | None = None
    text_states: TokenStates | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class PicoPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading, shared by PICO models."""

    config: PicoConfig
    logit_scale: torch.Tensor
    config_class: type[PicoConfig] = PicoConfig
    vision_model: PreTrainedModel
    image_moments: ImageMoments
    base_model_prefix = "pico"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch; `Trainer` must not divide it by a number of items.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = []
    # One by one: a pattern that matched the integer `stage` as well would turn it into a float.
    _keep_in_fp32_modules_strict = [
        "logit_scale",
        "style_prototypes.*.prototypes",
        "style_prototypes.*.style_rate",
        "style_prototypes.*.column_scale",
        "style_prototypes.*.temperature",
        "style_prototypes.*.rates",
        "uncertainty_prototypes",
        "image_moments.mean",
        "image_moments.std",
        "image_moments.class_mean",
        "image_moments.class_std",
        "image_moments.layer_mean",
        "image_moments.layer_std",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, for untrusted checkpoints: only safetensors are read, unless
        `use_safetensors=False` is passed; no weight is made up because the file lacks it or has it in another size
        (with `ignore_mismatched_sizes` too, but for the backbones); the state of the prototypes is checked.

        Raises:
            ValueError: names the tensor or the option that is wrong.
            OSError: names the file that is missing or damaged.
        """
        source = pretrained_model_name_or_path
        # None is the default of transformers, which reads pickles where there is nothing else.
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        saved = None if source is None else read_config(source, kwargs)
        kind = (saved or {}).get("model_type")
        if kind not in (None, cls.config_class.model_type) and "method" not in (saved or {}):
            raise ValueError(
                f"{str(source)!r} is a model of type {kind!r} and has no alignment head. Make a {cls.__name__} of it "
                f"with {cls.__name__}.from_backbones, which takes a joint model, or a vision and a text model."
            )
        loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        if saved is not None:
            check_missing(source, saved, model.config, info["missing_keys"])
        if model.style_prototypes is not None:
            check_prototypes(dict(model.style_prototypes.named_buffers()))
        check_image_moments(dict(model.image_moments.named_buffers()))
        # Loading makes every parameter trainable.
        model._freeze_unused()
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Here the files are known and the model is still without memory, unless it has long been there and is given
        # an adapter.
        if checkpoint_files is not None and load_config.hf_quantizer is None and model.logit_scale.is_meta:
            check_tensors(model, checkpoint_files, load_config.ignore_mismatched_sizes)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """
        As `PreTrainedModel.save_pretrained`, naming the code for every auto class that loads PICO, so that a pipeline
        made from the folder with `trust_remote_code=True` finds it too.
        """
        if self._auto_class is not None:
            code = f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"
            named = dict.fromkeys(("AutoModel", "AutoModelForZeroShotImageClassification"), code)
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **named}
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the backbones: the temperature and the prototypes are in float32 whatever that is."""
        return self.vision_model.dtype

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        False, also outside of transformers: for custom code it skips modules without parameters of their own, by which
        CLIP and ModernBERT scale their initial weights. It does so to protect loaded weights from initialisation that
        does not heed them; `_init_weights` here does.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PicoPreTrainedModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, StylePrototypes):
            for buffer in (module.prototypes, module.style_rate, module.stage):
                init.zeros_(buffer)
            for buffer in (module.column_scale, module.temperature):
                init.ones_(buffer)
        elif isinstance(module, StyleRates):
            init.zeros_(module.rate)
            init.constant_(module.bias, 2.0)
        elif isinstance(module, TokenProjection):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, UncertaintyPrototypes):
            init.xavier_uniform_(module.image)
            init.xavier_uniform_(module.text)
        elif isinstance(module, ImageMoments):
            for buffer in module.buffers():
                init.zeros_(buffer)


class PicoModel(PicoPreTrainedModel):
    r"""
    Two-tower vision-language model with a patch-by-word score whose feature columns are weighted by the probability
    that they carry meaning and not style (PICO, arXiv 2510.11175).

    Args:
        config ([`PicoConfig`]): Configuration; all weights are fresh.
        vision_model (`PreTrainedModel`, *optional*): Vision backbone to use instead of a fresh one.
        text_model (`PreTrainedModel`, *optional*): Text backbone to use instead of a fresh one.

    Example:

    ```python
    >>> from modeling_pico import PicoModel, PicoProcessor

    >>> model = PicoModel.from_pretrained("path/to/checkpoint").eval()
    >>> processor = PicoProcessor.from_pretrained("path/to/checkpoint")
    >>> texts = ["a red circle", "a blue star"]
    >>> inputs = processor(images=["a.png", "b.png"], text=texts, return_tensors="pt", padding=True)
    >>> scores = model(**inputs).logits_per_image  # (images, texts)
    ```
    """

    text_model: PreTrainedModel
    alignment_head: FineGrainedHead
    logit_scale: torch.Tensor
    head_classes: dict[str, type[FineGrainedHead]] = HEADS

    def __init__(
        self,
        config: PicoConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        check_vision_family(config.vision_config)
        self.vision_model = build_backbone(config.vision_config) if vision_model is None else vision_model
        self.text_model = build_backbone(config.text_config) if text_model is None else text_model
        complete_config(self.vision_model)
        # One object for the composite, the tower and its layers, so that later changes reach them all.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        if config.method not in self.head_classes:
            allowed = ", ".join(map(repr, self.head_classes))
            raise ValueError(
                f"`method` must be one of {allowed} for {type(self).__name__}, but got {config.method!r}."
            )
        self.alignment_head = self.head_classes[config.method](config)
        self.max_text_length = max_text_length(self.text_model)
        self.uncertainty_prototypes = None
        if config.uncertainty_config is not None:
            options = UncertaintyConfig(**config.uncertainty_config)
            self.uncertainty_prototypes = UncertaintyPrototypes(options, config.embedding_dim)
        layers = {name: layer.num_features for name, layer in moved_layers(self.vision_model).items()}
        self.image_moments = ImageMoments(hidden_size(config.vision_config), config.pooling == "class_token", layers)
        # With a dimension: neither FSDP nor DeepSpeed takes parameters without one.
        logit_scale = torch.tensor([float(config.logit_scale_init_value)])
        if config.loss_type == "infonce":
            self.logit_scale = nn.Parameter(logit_scale)
        else:
            # A buffer and no frozen parameter: `from_pretrained` makes every parameter trainable.
            self.register_buffer("logit_scale", logit_scale)
        # Whether batch normalisation of the towers keeps its statistics in training; for trainers to set.
        self.freeze_batch_norm = False
        self._freeze_unused()
        self.post_init()

    def _freeze_unused(self) -> None:
        config = self.config
        freeze_unused(self.vision_model, config.method == "clip_style" and config.pooling == "class_token")

    def enable_input_require_grads(self) -> None:
        """As in transformers, also for embeddings that return more than their tensor (Swin) or are none (ConvNeXt)."""

        def require_grads(module, inputs, output):
            (output[0] if isinstance(output, tuple) else output).requires_grad_(True)

        hooks = []
        for tower in (self.vision_model, self.text_model):
            try:
                embeddings = tower.get_input_embeddings()
            except NotImplementedError:
                continue
            if embeddings is not None:
                hooks.append(embeddings.register_forward_hook(require_grads))
        self._require_grads_hooks, self._require_grads_hook = hooks, hooks[0]

    @property
    def style_prototypes(self) -> nn.ModuleDict | None:
        """[`StylePrototypes`] by side, `"image"` and `"text"`; None for the heads without them."""
        # By name and not by type: adapters (PEFT) put a wrapper here that passes on to the head they train.
        return getattr(self.alignment_head, "style_prototypes", None)

    def beside_towers(self) -> dict[str, nn.Module]:
        """By name, the modules that are no towers: the alignment head, and what is beside it."""
        return {name: part for name, part in self.named_children() if name not in ("vision_model", "text_model")}

    @property
    def trains_embeddings(self) -> bool:
        """Whether anything is trained that embeddings depend on."""
        modules = (self.vision_model, self.text_model, self.alignment_head)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def train(self, mode: bool = True) -> "PicoModel":
        """
        As `nn.Module.train`; frozen towers stay in evaluation mode, where no dropout and no statistics of a batch
        change what they give, and so does the head where no embedding is trained. With `freeze_batch_norm` so do the
        towers' layers of batch normalisation.
        """
        super().train(mode)
        for tower in (self.vision_model, self.text_model):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
            elif self.freeze_batch_norm:
                for layer in batch_norm_layers(tower).values():
                    layer.eval()
        if not self.trains_embeddings:
            self.alignment_head.eval()
        return self

    def train_uncertainty_only(self) -> None:
        """
        Freezes all but the prototypes of the uncertainty. Scores then stay as they are, in training mode as well:
        there is no dropout, and no statistics of batches are taken.
        """
        if self.uncertainty_prototypes is None:
            raise ValueError("The model has no uncertainty to train; load it with an `uncertainty_config`.")
        self.requires_grad_(False)
        self.uncertainty_prototypes.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel | None = None,
        *,
        backbone_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "PicoModel":
        r"""
        Builds a PICO model from pretrained backbones.

        Args:
            vision (`str` or `PreTrainedModel`):
                Vision checkpoint (ViT, Swin, DINOv2, ...) or, without `text`, a joint one (CLIP, SigLIP, BLIP, ALIGN,
                ...). Its projections, its temperature and its class-token pooling come along, as far as
                `config_kwargs` do not say otherwise.
            text (`str` or `PreTrainedModel`, *optional*):
                Text checkpoint (BERT, RoBERTa, MiniLM, ...).
            backbone_kwargs (`dict`, *optional*):
                Passed to the backbones' `from_pretrained` (`revision`, `token`, `attn_implementation`, ...).
            config_kwargs: Options of [`PicoConfig`].

        Returns:
            [`PicoModel`] in float32 in evaluation mode; what the checkpoints do not hold is freshly initialised.
        """
        # The configuration takes any name as an attribute; a mistyped option would do nothing.
        if unknown := sorted(config_kwargs.keys() - {option.name for option in fields(cls.config_class)}):
            raise ValueError(
                f"{cls.config_class.__name__} has no option {', '.join(map(repr, unknown))}. What is meant for the "
                "backbones is given as `backbone_kwargs`."
            )
        # Checkpoints in half precision are loaded as such by default, which is no precision to train in.
        kwargs = {"dtype": torch.float32, **(backbone_kwargs or {})}
        if text is None:
            return cls._from_joint(vision, kwargs, config_kwargs)
        vision_model = load_backbone(vision, "image", **kwargs) if isinstance(vision, str) else plain_tower(vision)
        text_model = load_backbone(text, "text", **kwargs) if isinstance(text, str) else plain_tower(text)
        return cls._assemble(vision_model, text_model, config_kwargs).eval()

    @classmethod
    def _assemble(cls, vision_model: PreTrainedModel, text_model: PreTrainedModel, config_kwargs: dict) -> "PicoModel":
        # Copies: a composite configuration resets the attention implementation of the parts it is given.
        vision_config, text_config = copy.deepcopy(vision_model.config), copy.deepcopy(text_model.config)
        config = cls.config_class(vision_config=vision_config, text_config=text_config, **config_kwargs)
        return cls(config, vision_model=vision_model, text_model=text_model)

    @classmethod
    def _from_joint(cls, joint: str | PreTrainedModel, kwargs: dict, config_kwargs: dict) -> "PicoModel":
        joint_config = load_config(joint, kwargs) if isinstance(joint, str) else joint.config
        if not is_joint(joint_config):
            raise ValueError(
                f"{joint if isinstance(joint, str) else type(joint).__name__!r} is a single tower "
                f"({joint_config.model_type}); give a text checkpoint as well, or a joint vision-language checkpoint "
                "such as CLIP."
            )
        check_vision_family(joint_config.vision_config)
        if isinstance(joint, str):
            joint = load_model(joint, **kwargs)
        projections = joint_projections(joint)
        if projections:
            config_kwargs = {
                "embedding_dim": projections["text_projection.weight"].shape[0],
                "projection_bias": "text_projection.bias" in projections,
                "pooling": "class_token",
                **config_kwargs,
            }
        model = cls._assemble(tower_of(joint, "image"), tower_of(joint, "text"), config_kwargs)
        config = model.config
        head = model.alignment_head.state_dict()
        if projections and all(
            name in head and head[name].shape == given.shape for name, given in projections.items()
        ):
            model.alignment_head.load_state_dict(projections, strict=False)
            logit_scale = joint_logit_scale(joint)
            if logit_scale is not None and "logit_scale_init_value" not in config_kwargs:
                with torch.no_grad():
                    model.logit_scale.copy_(logit_scale)
        else:
            logger.warning(
                f"The projections to {config.embedding_dim} features are freshly initialised: the checkpoint has none "
                f"{'like them' if projections else 'for the tokens of both sides'}."
            )
        return model.eval()

    def _features(self, states: TokenStates, modality: str, weighted: bool = True) -> dict[str, Any]:
        head = self.alignment_head
        tokens, mask, state = head.embed(states.states, states.mask, states.class_state, modality)
        embeds, probability = head.weight(tokens, mask, modality) if weighted else (tokens, None)
        return {
            "embeds": embeds,
            "mask": mask,
            "tokens": tokens,
            "semantic_probability": probability,
            "uncertainty": self.uncertainty(tokens, mask, modality),
            "state": state,
        }

    def uncertainty(self, tokens: torch.Tensor, mask: torch.Tensor, modality: str) -> torch.Tensor | None:
        """
        Uncertainty of encoded samples. It is that of the tokens before weighting, so that it stays as it is when style
        prototypes change.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Token embeddings before weighting.
            mask (`torch.Tensor` of shape `(batch, tokens)`): True at tokens that take part.
            modality (`str`): `"image"` or `"text"`.

        Returns:
            `torch.Tensor` of shape `(batch,)`, or None without `config.uncertainty_config`.
        """
        if self.uncertainty_prototypes is None:
            return None
        pooled = self.alignment_head.pool(tokens, mask, None, modality)
        return self.uncertainty_prototypes(pooled, self.logit_scale.detach().float().exp(), modality)

    def _features_output(self, outputs, features: dict[str, Any], modality: str) -> PicoFeatures:
        # Pooled here and not in `_features`: training never asks for it.
        return PicoFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.alignment_head.pool(features["embeds"], features["mask"], None, modality),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
            **{name: features[name] for name in ("embeds", "mask", "semantic_probability", "uncertainty")},
        )

    @staticmethod
    def _output_of(modality: str, outputs, features: dict[str, Any]) -> dict[str, Any]:
        """What the output holds of one side."""
        named = {f"{modality}_{name}": value for name, value in features.items() if name != "state"}
        return {**named, "vision_model_output" if modality == "image" else "text_model_output": outputs}

    def _image_states(self, pixel_values: torch.Tensor, alignment: GalleryAlignment | None = None, **kwargs):
        config = self.config
        if pixel_values.dtype == torch.float32:
            # As image processors give them; only some towers change the type themselves.
            pixel_values = pixel_values.to(self.dtype)
        if alignment is not None:
            alignment.check(len(pixel_values))
        with nullcontext() if alignment is None else alignment.in_layers(self.vision_model):
            outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        states = image_token_states(self.vision_model, outputs)
        class_state = None
        if config.pooling == "class_token":
            class_state = class_token_state(self.vision_model, outputs, states, "image")
        if not config.vision_special_tokens:
            states = states[:, num_prefix_tokens(config.vision_config) :]
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        given = TokenStates(states, mask, class_state)
        return outputs, given if alignment is None else alignment(given)

    def _text_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        config = self.config
        if self.max_text_length is not None and input_ids.shape[1] > self.max_text_length:
            raise ValueError(
                f"The texts have {input_ids.shape[1]} tokens, but the text tower has positions for "
                f"{self.max_text_length}. Let the tokenizer cut them: truncation=True, "
                f"max_length={self.max_text_length}."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask, input_ids, position_ids, token_type_ids = left_aligned(
            attention_mask, input_ids, position_ids, token_type_ids
        )
        kwargs = {"position_ids": position_ids, "token_type_ids": token_type_ids, **kwargs}
        given = {name: value for name, value in kwargs.items() if value is not None}
        outputs, states = run_text_tower(self.text_model, input_ids, attention_mask, **given)
        class_state = None
        if config.pooling == "class_token":
            class_state = class_token_state(self.text_model, outputs, states, "text")
        return outputs, TokenStates(states, self._text_mask(attention_mask), class_state)

    def _check_class_state(self, tower: PreTrainedModel, class_state: torch.Tensor | None, modality: str) -> None:
        scored = (self.config.method, self.config.pooling) == ("clip_style", "class_token")
        if scored and class_state is None and has_class_token(tower, modality):
            raise ValueError(
                f"This model scores the states of class tokens: give `{modality}_class_state` beside "
                f"`{modality}_states`, both as `get_{modality}_states` returns them."
            )

    def _text_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return text_token_mask(attention_mask, self.config.text_special_tokens, self.config.text_config.model_type)

    def _auxiliary_losses(
        self,
        image: dict[str, Any],
        text: dict[str, Any],
        image_ids: torch.Tensor | None,
        caption_codes: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        head = self.alignment_head
        # Where no embedding is trained, `train` leaves the head in evaluation mode.
        frozen = self.training and not head.training
        losses = {} if frozen else head.auxiliary_losses(image["state"], text["state"])
        # Texts that are not the images' partners, one by one, are no pairs to learn from.
        if self.uncertainty_prototypes is None or len(image["tokens"]) != len(text["tokens"]):
            return losses
        images, texts = (
            self.alignment_head.pool(side["tokens"], side["mask"], None, modality)
            for side, modality in ((image, "image"), (text, "text"))
        )
        scale = self.logit_scale.float().exp()
        return {**losses, **self.uncertainty_prototypes.losses(images, texts, scale, image_ids, caption_codes)}

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        weighted: bool = True,
        alignment: GalleryAlignment | None = None,
        **kwargs,
    ) -> PicoFeatures:
        r"""
        Encodes images, so that a gallery is encoded once and scored with [`pair_scores`] or
        [`PicoProcessor.score_retrieval`].

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Preprocessed images.
            weighted (`bool`, *optional*, defaults to `True`):
                Whether the semantic probability is folded into `embeds`. Embeddings cached without it can be made
                score-ready later by `model.alignment_head.weight(embeds, mask, "image")`.
            alignment ([`GalleryAlignment`], *optional*):
                Moves the images' hidden states before the head: what [`align`] gives for the gallery they belong to.
            kwargs: Passed to the vision backbone (`interpolate_pos_encoding`, `output_hidden_states`, ...).

        Returns:
            [`PicoFeatures`]
        """
        outputs, states = self._image_states(pixel_values, alignment, **kwargs)
        return self._features_output(outputs, self._features(states, "image", weighted), "image")

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        weighted: bool = True,
        **kwargs,
    ) -> PicoFeatures:
        r"""
        Encodes texts; see [`PicoModel.get_image_features`]. Texts that are padded on the left come out padded on the
        right, as all others.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, words)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch, words)`, *optional*): 1 at real tokens; all by default.
            position_ids (`torch.Tensor` of shape `(batch, words)`, *optional*): Positions, if the backbone takes them.
            token_type_ids (`torch.Tensor` of shape `(batch, words)`, *optional*): Segments, if it takes them.
            weighted (`bool`, *optional*, defaults to `True`): Whether semantic probability is folded into `embeds`.
            kwargs: Passed to the text backbone (`output_hidden_states`, ...).

        Returns:
            [`PicoFeatures`]
        """
        outputs, states = self._text_states(input_ids, attention_mask, position_ids, token_type_ids, **kwargs)
        return self._features_output(outputs, self._features(states, "text", weighted), "text")

    def get_image_states(self, pixel_values: torch.Tensor, **kwargs) -> TokenStates:
        """
        What the image tower gives the alignment head; arguments are those of [`get_image_features`]. The states of a
        frozen tower may be kept, and given to [`forward`] in place of the images.
        """
        return self._image_states(pixel_values, **kwargs)[1]

    def get_text_states(self, input_ids: torch.Tensor, **kwargs) -> TokenStates:
        """What the text tower gives the alignment head; arguments are those of [`get_text_features`]."""
        return self._text_states(input_ids, **kwargs)[1]

    def fit_alignment(self, reference: Iterable[Mapping[str, Any]]) -> None:
        """
        Measures where images of training lie, so that [`align`] can move galleries there. The moments are part of the
        model: `save_pretrained` keeps them, and another training forgets them.

        Args:
            reference (iterable of `dict`):
                Batches of a few hundred images as training has shown them, as an image processor, a collator or a
                `DataLoader` gives them: with `pixel_values`, or with `image_states` (and `image_class_state`).
                Whatever else they hold is left alone.

        Raises:
            ValueError: if there are too few images, or their states are not finite.

        Example:

        ```python
        >>> model.fit_alignment([processor(images=training_pictures, return_tensors="pt")])
        >>> model.save_pretrained("path/to/checkpoint")
        ```
        """
        self.image_moments.fit(self._measure(reference))

    def align(self, gallery: Iterable[Mapping[str, Any]], styles: Sequence[str] | None = None) -> GalleryAlignment:
        """
        Measures a gallery of one look and gives what moves it to the mean and spread that images of training have: at
        the outputs of the tower and, up to half of the way, before its layers of batch normalisation but for the first
        third *(ours)*. No caption is needed. It may be used for images that are added later.

        Args:
            gallery (iterable of `dict`):
                Batches of its images as in [`fit_alignment`]; all of them, or some that are spread evenly over it.
            styles (`Sequence[str]`, *optional*):
                The style of each image. A gallery that mixes looks is only helped when each is moved by itself.

        Returns:
            [`GalleryAlignment`], for [`get_image_features`] and [`PicoProcessor.encode_images`].

        Raises:
            ValueError: if the model has no moments of training, the gallery or one of its styles has too few images,
                or there is not one style for each image.
        """
        self.image_moments.check_fitted()
        return self.image_moments.align(self._measure(gallery, styles, self.image_moments))

    @torch.no_grad()
    def _measure(
        self, batches: Any, styles: Sequence[str] | None = None, target: ImageMoments | None = None
    ) -> dict[str | None, GalleryMoments]:
        def checked() -> Iterator[Mapping[str, Any]]:
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise ValueError(
                        "Images are given as batches, such as [processor(images=pictures, return_tensors='pt')] or a "
                        f"DataLoader, but this holds {type(batch).__name__}."
                    )
                yield batch

        def states() -> Iterator[TokenStates]:
            in_layers = target is not None and moved_layers(self.vision_model)
            for batch in together(checked()) if in_layers else checked():
                yield self(**image_inputs(batch, self.device), return_states=True).image_states

        training = self.training
        self.eval()
        try:
            return measure_galleries(states(), styles, self.vision_model, target)
        finally:
            self.train(training)

    def score(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores `(images, texts)` of score-ready embeddings; arguments are those of [`pair_scores`]."""
        return pair_scores(image_embeds, text_embeds, image_mask, text_mask)

    def loss_of_scores(
        self,
        scores_per_image: torch.Tensor,
        scores_per_text: torch.Tensor,
        logit_scale: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Loss of the pairs alone, by the options of the configuration.

        Args:
            scores_per_image (`torch.Tensor` of shape `(own, all)`): Own images against all texts.
            scores_per_text (`torch.Tensor` of shape `(own, all)`): Own texts against all images.
            logit_scale (`torch.Tensor`, *optional*): Inverse temperature; the model's by default.
            kwargs: `image_ids`, `caption_codes`, `offset` and `hardest` of [`image_text_loss`].

        Returns:
            `torch.Tensor`: Scalar.
        """
        config = self.config
        return image_text_loss(
            scores_per_image,
            scores_per_text,
            loss_type=config.loss_type,
            logit_scale=self.logit_scale.float().exp().squeeze() if logit_scale is None else logit_scale,
            margin=config.margin,
            **kwargs,
        )

    def pair_loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        image_mask: torch.Tensor,
        text_mask: torch.Tensor,
        *,
        own: slice | None = None,
        auxiliary_loss: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        What is minimised, from score-ready embeddings: the loss of the pairs times `config.ranking_weight`, and the
        auxiliary loss.

        Args:
            image_embeds (`torch.Tensor` of shape `(pairs, patches, dim)`): Images, of all processes with `own`.
            text_embeds (`torch.Tensor` of shape `(pairs, words, dim)`): Their texts.
            image_mask (`torch.Tensor` of shape `(pairs, patches)`): True at tokens that take part.
            text_mask (`torch.Tensor` of shape `(pairs, words)`): Likewise for the texts.
            own (`slice`, *optional*): This process's pairs, whose rows and columns alone are scored; all by default.
            auxiliary_loss (`torch.Tensor`, *optional*): What [`PicoOutput`] holds.
            kwargs: `image_ids`, `caption_codes` and `hardest` of [`image_text_loss`], and `logit_scale`.

        Returns:
            `torch.Tensor`: Scalar.
        """
        if own is None or (own.start, own.stop) == (0, len(image_embeds)):
            scores = self.score(image_embeds, text_embeds, image_mask, text_mask)
            return self._total_loss(self.loss_of_scores(scores, scores.T, **kwargs), auxiliary_loss)
        per_image = self.score(image_embeds[own], text_embeds, image_mask[own], text_mask)
        per_text = self.score(image_embeds, text_embeds[own], image_mask, text_mask[own]).T
        return self._total_loss(self.loss_of_scores(per_image, per_text, offset=own.start, **kwargs), auxiliary_loss)

    def _total_loss(self, pair_loss: torch.Tensor, auxiliary_loss: torch.Tensor | None) -> torch.Tensor:
        loss = self.config.ranking_weight * pair_loss
        return loss if auxiliary_loss is None else loss + auxiliary_loss

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        caption_codes: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool = True,
        interpolate_pos_encoding: bool = False,
        image_states: torch.FloatTensor | None = None,
        text_states: torch.FloatTensor | None = None,
        image_class_state: torch.FloatTensor | None = None,
        text_class_state: torch.FloatTensor | None = None,
        image_alignment: GalleryAlignment | None = None,
        return_states: bool = False,
        **kwargs,
    ) -> PicoOutput:
        r"""
        Encodes images and texts and scores every pair. Images alone or texts alone, as feature extraction pipelines
        give them, are only encoded: the output holds that side and its `pooler_output`.

        Args:
            input_ids (`torch.LongTensor` of shape `(texts, words)`): Token ids.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): Preprocessed images.
            attention_mask (`torch.Tensor` of shape `(texts, words)`, *optional*): 1 at real tokens.
            position_ids (`torch.LongTensor` of shape `(texts, words)`, *optional*): Positions.
            token_type_ids (`torch.LongTensor` of shape `(texts, words)`, *optional*): Segments.
            image_ids (`torch.LongTensor` of shape `(images,)`, *optional*):
                Identity of each pair's meaning, for the loss: pairs of equal identity are never negatives.
            caption_codes (`torch.LongTensor` of shape `(texts,)`, *optional*):
                Identity of each pair's caption, for the loss: pairs of equal captions are never negatives.
            return_loss (`bool`, *optional*):
                Whether to return the loss over the batch, in which image `i` and text `i` are a pair. For negatives
                from all processes train with [`PicoTrainer`].
            return_logits (`bool`, *optional*, defaults to `True`):
                Whether to score the pairs; the trainer scores over all processes itself.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether the vision backbone stretches its position encodings to images of another size than it was
                trained on. Some (DINOv2, DINOv3, Swin, ConvNeXt) take any size without it.
            image_states (`torch.FloatTensor` of shape `(images, tokens, hidden)`, *optional*):
                Those of [`get_image_states`] in place of `pixel_values`: the tower is not run.
            text_states (`torch.FloatTensor` of shape `(texts, words, hidden)`, *optional*):
                Those of [`get_text_states`] in place of `input_ids`; `attention_mask` says which are real tokens.
            image_class_state (`torch.FloatTensor` of shape `(images, hidden)`, *optional*):
                Beside `image_states`, with `pooling="class_token"`.
            text_class_state (`torch.FloatTensor` of shape `(texts, hidden)`, *optional*): Beside `text_states`.
            image_alignment ([`GalleryAlignment`], *optional*): Moves the images' hidden states; see [`align`].
            return_states (`bool`, *optional*, defaults to `False`):
                Whether to return the hidden states that the alignment head is given.
            kwargs: Passed to both backbones (`output_hidden_states`, `output_attentions`, ...).

        Returns:
            [`PicoOutput`]
        """
        inputs = {"input_ids": (input_ids, text_states), "pixel_values": (pixel_values, image_states)}
        twice = [name for name, (raw, states) in inputs.items() if raw is not None and states is not None]
        if twice:
            raise ValueError(f"Given twice: {', '.join(twice)}, and the hidden states of a tower in its place.")
        missing = [name for name, (raw, states) in inputs.items() if raw is None and states is None]
        for_loss = return_loss or image_ids is not None or caption_codes is not None
        if len(missing) == 2 or (missing and for_loss):
            raise ValueError(
                f"Missing: {', '.join(missing)}. PicoModel takes images and texts together, or one of them "
                "without `return_loss`, `image_ids` and `caption_codes`; see also `get_image_features` and "
                "`get_text_features`."
            )
        # Only where it is asked for, because not every vision backbone knows it.
        image_kwargs = {**kwargs, "interpolate_pos_encoding": True} if interpolate_pos_encoding else kwargs
        # Outputs of the tower, of which there are none where its states are given, and what the head is given.
        towers: dict[str, tuple[Any, TokenStates]] = {}
        if image_states is not None:
            self._check_class_state(self.vision_model, image_class_state, "image")
            mask = torch.ones(image_states.shape[:2], dtype=torch.bool, device=image_states.device)
            given = TokenStates(image_states.to(self.dtype), mask, image_class_state)
            if image_alignment is not None and image_alignment.layers:
                raise ValueError(
                    "The gallery was measured with the layers of the tower, which do not run where `image_states` are "
                    "given. Measure it on these states, or give `pixel_values`."
                )
            towers["image"] = None, given if image_alignment is None else image_alignment(given)
        elif pixel_values is not None:
            towers["image"] = self._image_states(pixel_values, image_alignment, **image_kwargs)
        if text_states is not None:
            self._check_class_state(self.text_model, text_class_state, "text")
            mask = self._text_mask(torch.ones_like(text_states[..., 0]) if attention_mask is None else attention_mask)
            towers["text"] = None, TokenStates(text_states.to(self.dtype), mask, text_class_state)
        elif input_ids is not None:
            towers["text"] = self._text_states(input_ids, attention_mask, position_ids, token_type_ids, **kwargs)
        sides = {
            modality: (outputs, self._features(states, modality)) for modality, (outputs, states) in towers.items()
        }
        encoded: dict[str, Any] = {}
        for modality, side in sides.items():
            encoded |= self._output_of(modality, *side)
            if return_states:
                encoded[f"{modality}_states"] = towers[modality][1]
        if missing:
            modality, (_, features) = next(iter(sides.items()))
            pooled = self.alignment_head.pool(features["embeds"], features["mask"], None, modality)
            return PicoOutput(**encoded, pooler_output=pooled)
        image, text = sides["image"][1], sides["text"][1]
        logit_scale = self.logit_scale.float().exp().squeeze()
        auxiliary = {}
        if self.training or return_loss:
            auxiliary = self._auxiliary_losses(image, text, image_ids, caption_codes)
        auxiliary_loss = torch.stack([*auxiliary.values()]).sum() if auxiliary else None
        loss = logits = None
        if return_logits or return_loss:
            scores = self.score(image["embeds"], text["embeds"], image["mask"], text["mask"])
            logits = scores * logit_scale if return_logits else None
            if return_loss:
                loss = self.loss_of_scores(
                    scores, scores.T, logit_scale, image_ids=image_ids, caption_codes=caption_codes
                )
                loss = self._total_loss(loss, auxiliary_loss)
        return PicoOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T if logits is not None else None,
            logit_scale=logit_scale,
            auxiliary_loss=auxiliary_loss,
            auxiliary_losses=auxiliary or None,
            **encoded,
        )


def image_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """What a batch holds of its images, `pixel_values` or the states of the tower, on a device."""
    names = ("pixel_values", "image_states", "image_class_state")
    return {name: batch[name].to(device) for name in names if name in batch}
