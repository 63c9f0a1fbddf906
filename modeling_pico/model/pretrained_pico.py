"""What PICO models share: weight initialisation, saving, and the loading of checkpoints that may be anybody's."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .alignment_heads_pico import TokenProjection
from .configuration_pico import PicoConfig
from .prototypes_pico import StylePrototypes, StyleRates
from .uncertainty_pico import UncertaintyPrototypes
from .untrusted_pico import (
    CheckpointError,
    TensorSizeError,
    check_missing,
    check_prototypes,
    check_tensors,
    explained_load_errors,
    prefer_safetensors,
    read_config,
)


class PicoPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading, shared by PICO models."""

    config: PicoConfig
    logit_scale: torch.Tensor
    config_class: type[PicoConfig] = PicoConfig
    vision_model: PreTrainedModel
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
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, for untrusted checkpoints: only safetensors are read, unless
        `use_safetensors=False` is passed; no weight is made up because the file lacks it or has it in another size
        (with `ignore_mismatched_sizes` too, but for the backbones); the state of the prototypes is checked.

        Raises:
            ValueError: names the option or the tensor that is wrong.
            OSError: names the file that is missing or damaged.
        """
        source = pretrained_model_name_or_path
        saved = None
        if source is not None:
            prefer_safetensors(source, kwargs)
            saved = read_config(source, kwargs)
            kind = saved.get("model_type")
            if kind not in (None, cls.config_class.model_type) and "alignment_head" not in saved:
                raise ValueError(
                    f"{str(source)!r} is a model of type {kind!r} and has no alignment head. Make a {cls.__name__} of "
                    f"it with {cls.__name__}.from_backbones, which takes a joint model, or a vision and a text model."
                )
        try:
            with explained_load_errors(source):
                loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
            model, info = loaded
            if saved is not None:
                check_missing(saved, model.config, info["missing_keys"])
            if model.style_prototypes is not None:
                check_prototypes(dict(model.style_prototypes.named_buffers()))
        except TensorSizeError as error:
            raise ValueError(_size_message(source, kwargs, str(error))) from error
        except CheckpointError as error:
            raise ValueError(f"{str(source)!r} cannot be loaded. {error}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error):
                raise ValueError(_size_message(source, kwargs, "see the report above")) from error
            raise
        except (StrictDataclassError, ArithmeticError, LookupError) as error:
            raise ValueError(
                f"The configuration of {str(source)!r} cannot be used: {type(error).__name__}: {error}."
            ) from error
        # Loading makes every parameter trainable.
        model._freeze_unused()
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Here the files are known and the model is still without memory.
        if checkpoint_files is not None and load_config.hf_quantizer is None:
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


def _size_message(path, kwargs: dict, details: str) -> str:
    names = (
        "num_style_prototypes",
        "column_mode",
        "column_length",
        "embedding_dim",
        "num_uncertainty_prototypes",
    )
    asked = ", ".join(f"{name}={kwargs[name]!r}" for name in names if name in kwargs)
    return (
        f"The tensors of {str(path)!r} do not have the sizes that the configuration asks for"
        f"{f' ({asked})' if asked else ''}: {details}. The number and length of prototypes "
        "(num_style_prototypes, column_mode, column_length, num_uncertainty_prototypes) and embedding_dim belong to a "
        "trained checkpoint and cannot be changed on loading. Load it without them, or build the prototypes anew by "
        "training from the backbones (PicoModel.from_backbones)."
    )


__all__ = ["PicoPreTrainedModel"]
