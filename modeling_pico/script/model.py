"""Which model a run of `train_pico.py` has: decided and checked before any data is read, built afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..durable.files import last_checkpoint, remove_unfinished, resumable_state
from ..model.backbones_pico import build_backbone, load_backbone
from ..model.configuration_pico import PicoConfig
from ..model.modeling_pico import PicoModel
from ..model.processing_pico import PicoProcessor
from ..training.arguments import PicoTrainingArguments
from ..training.secrets import without_secrets
from .arguments import METHODS, TEXT_TOWER, VISION_TOWER, DataArguments, ModelArguments
from .from_scratch import (
    check_division,
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)
from .option_parser import shown
from .record import RUN_RECORD


# Options of the model that a resumed run may be given anew: how its first checkpoints were read.
_FREE_ON_RESUMING = ("model_revision", "use_safetensors", "attn_implementation")
_HEADS_FROM_SCRATCH = 4


def find_checkpoint(args: PicoTrainingArguments) -> str | None:
    """The checkpoint to resume from; refuses an output folder that already holds a run."""
    wanted, folder = args.resume_from_checkpoint or "false", str(args.output_dir)
    checkpoint: str | None = wanted
    if wanted.lower() in ("true", "auto", "false"):
        with args.main_process_first(local=False, desc="looking for checkpoints"):
            if args.do_train and args.should_save:
                remove_unfinished(folder)
        checkpoint = last_checkpoint(folder)
        if wanted.lower() == "false" or (wanted.lower() == "auto" and checkpoint is None):
            if args.do_train and (checkpoint is not None or Path(folder, "all_results.json").is_file()):
                raise ValueError(
                    f"The output folder {folder!r} already holds a run. Continue it with --resume_from_checkpoint "
                    "true, or choose another --output_dir; nothing was changed."
                )
            return None
    if checkpoint is None:
        raise ValueError(
            f"--resume_from_checkpoint: {folder!r} holds no complete checkpoint. With auto, a run starts anew where "
            "there is none."
        )
    resumable_state(checkpoint)
    return checkpoint


@dataclass
class ModelPlan:
    """
    What the model of a run will be: its type, the options of its configuration that were given, and the PICO
    checkpoint to load (`source`), if any. The backbones of `config` are those of the model only where there is one.
    """

    args: ModelArguments
    model_class: type[PicoModel]
    config: PicoConfig
    options: dict[str, Any]
    source: str | None
    loading: dict[str, Any]
    revision: dict[str, Any]

    def build(self, captions: Sequence[str] | None, data_args: DataArguments) -> tuple[PicoModel, PicoProcessor]:
        """
        Model and processor: from a PICO checkpoint, from pretrained backbones, from scratch, or a mixture. The
        tokenizer of a text tower from scratch is trained on `captions`.
        """
        args = self.args
        if self.source is not None:
            model = self.model_class.from_pretrained(self.source, dtype=torch.float32, **self.loading, **self.options)
            return model, PicoProcessor.from_pretrained(self.source, **self.revision)
        if args.model_name_or_path is not None:
            joint = args.model_name_or_path
            model = self.model_class.from_backbones(joint, backbone_kwargs=self.loading, **self.options)
            return model, PicoProcessor.from_backbones(joint, **self.revision)
        vision_model, image_processor = self._build_vision()
        text_model, tokenizer = self._build_text(captions, data_args.max_text_length or 64)
        processor = PicoProcessor(image_processor=image_processor, tokenizer=tokenizer)
        return self.model_class.from_backbones(vision_model, text_model, **self.options), processor

    def _build_vision(self) -> tuple[Any, Any]:
        path = self.args.vision_model_name_or_path
        if path is not None:
            image_processor = AutoImageProcessor.from_pretrained(path, **self.revision)
            return load_backbone(path, "image", dtype="float32", **self.loading), image_processor
        return self._from_scratch(_vision_config(self.args)), small_image_processor(self.args.image_size)

    def _build_text(self, captions: Sequence[str] | None, max_length: int) -> tuple[Any, Any]:
        path = self.args.text_model_name_or_path
        if path is not None:
            tokenizer = AutoTokenizer.from_pretrained(path, **self.revision)
            return load_backbone(path, "text", dtype="float32", **self.loading), tokenizer
        tokenizer = train_tokenizer(captions or (), max_length=max_length)
        config = small_text_config(
            self.args.text_hidden_size, self.args.text_num_layers, _HEADS_FROM_SCRATCH, tokenizer
        )
        return self._from_scratch(config), tokenizer

    def _from_scratch(self, config: PreTrainedConfig) -> Any:
        config._attn_implementation = self.args.attn_implementation
        return build_backbone(config)


def plan_model(args: ModelArguments, checkpoint: str | None, training: bool) -> ModelPlan:
    r"""
    Decides what the model of a run will be; weights and data are not read.

    Args:
        args (`ModelArguments`): What was asked for.
        checkpoint (`str`, *optional*): Checkpoint of this run to resume from.
        training (`bool`): Whether there will be captions to train a tokenizer on.

    Raises:
        ValueError: for a checkpoint that does not exist, options that contradict each other or a resumed run, and
            options that this model does not have.
    """
    paths = {
        name: path
        for name in ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
        if (path := getattr(args, name)) is not None
    }
    if "model_name_or_path" in paths and len(paths) > 1:
        raise ValueError("Give either --model_name_or_path or --vision/text_model_name_or_path, not both.")
    if args.model_revision is not None and not paths:
        raise ValueError("--model_revision is that of a checkpoint, but none is named.")
    attentions = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # A name with a slash is that of a kernel on the Hub.
    if "/" not in (args.attn_implementation or "/") and args.attn_implementation not in attentions:
        raise ValueError(
            f"--attn_implementation must be one of {', '.join(attentions)}, but got {args.attn_implementation!r}."
        )
    # Revision and file type are those of the checkpoints that a run begins with; its own are safetensors.
    begins = checkpoint is None
    revision: dict[str, Any] = {"revision": args.model_revision} if begins and args.model_revision else {}
    loading: dict[str, Any] = {**revision, "use_safetensors": args.use_safetensors or not begins}
    if args.attn_implementation is not None:
        loading["attn_implementation"] = args.attn_implementation
    if checkpoint is not None:
        config = _read_config("resume_from_checkpoint", checkpoint, {})
        if not isinstance(config, PicoConfig):
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint!r} holds no PICO model, but {config.model_type!r}."
            )
        _check_resumed(args, checkpoint)
        return ModelPlan(args, METHODS[config.method], config, {}, checkpoint, loading, revision)
    configs = {name: _read_config(name, path, revision) for name, path in paths.items()}
    _check_towers(args, training)
    found = configs.get("model_name_or_path")
    trained = found if isinstance(found, PicoConfig) else None
    method = args.method or (trained.method if trained else "pico")
    model_class = METHODS[method]
    options = args.config_options(model_class)
    source = args.model_name_or_path if trained else None
    try:
        if source is not None:
            config = model_class.config_class.from_pretrained(source, **revision, **options)
        else:
            # A joint model has an embedding size of its own, which these must divide.
            later = {"unet_num_heads"} if found and "embedding_dim" not in options else set()
            config = model_class.config_class(**{name: options[name] for name in options.keys() - later})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    return ModelPlan(args, model_class, config, options, source, loading, revision)


def _read_config(option: str, path: str, revision: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, **revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--{option}: {path!r} is no checkpoint that can be read. Give a folder with a config.json, or a name on "
            f"the Hub. ({reason})"
        ) from error


def _check_towers(args: ModelArguments, training: bool) -> None:
    """Refuses what is said of towers from scratch where there are none, and sizes that no tower can have."""
    default = ModelArguments()
    for options, path in ((VISION_TOWER, args.vision_model_name_or_path), (TEXT_TOWER, args.text_model_name_or_path)):
        checkpoint = args.model_name_or_path or path
        given = [f"--{name}" for name in options if getattr(args, name) != getattr(default, name)]
        if given and checkpoint is not None:
            raise ValueError(
                f"{', '.join(given)}: only for a tower from scratch, but this one is that of {checkpoint!r}. Leave it "
                "out."
            )
    if args.model_name_or_path is not None:
        return
    if args.vision_model_name_or_path is None:
        _vision_config(args)
    if args.text_model_name_or_path is None:
        check_division("text_hidden_size", args.text_hidden_size, "its attention heads", _HEADS_FROM_SCRATCH)
        if not training:
            raise ValueError(
                "Without a text checkpoint the tokenizer is trained on the captions of --train_split, which only "
                "--do_train loads. Give --model_name_or_path to evaluate a trained model."
            )


def _vision_config(args: ModelArguments) -> PreTrainedConfig:
    return small_vision_config(
        args.vision_hidden_size, args.vision_num_layers, _HEADS_FROM_SCRATCH, args.image_size, args.patch_size
    )


def _check_resumed(args: ModelArguments, checkpoint: str) -> None:
    """A resumed run goes on with the options that it was begun with: others are refused, not ignored."""
    record = Path(checkpoint).absolute().parent / RUN_RECORD
    if not record.is_file():  # not begun by the script
        return
    recorded = json.loads(record.read_text(encoding="utf-8"))["configuration"]["model"]
    changed = [
        f"--{name} {shown(value)} (the run has {shown(recorded.get(name))})"
        for name, value in without_secrets(asdict(args)).items()
        if name not in _FREE_ON_RESUMING and value is not None and value != recorded.get(name)
    ]
    if changed:
        raise ValueError(
            f"A resumed run keeps the model that it was begun with, but these options differ: {', '.join(changed)}. "
            "Give what the run was given, or start another run (--model_name_or_path takes a checkpoint) in a new "
            "--output_dir."
        )


__all__ = ["ModelPlan", "find_checkpoint", "plan_model"]
