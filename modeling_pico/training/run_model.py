"""Which model a run of `train_pico.py` has: decided and checked before any data is read, built afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
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
from .arguments import PicoTrainingArguments
from .from_scratch import (
    check_division,
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)
from .option_parser import shown
from .run_record import RUN_RECORD, without_secrets
from .script_arguments import METHODS, TEXT_TOWER, VISION_TOWER, DataArguments, ModelArguments


# Where the configuration of a saved model states the options of towers from scratch.
_STATED = {
    "vision_hidden_size": ("vision_config", "hidden_size"),
    "vision_num_layers": ("vision_config", "num_hidden_layers"),
    "vision_num_heads": ("vision_config", "num_attention_heads"),
    "image_size": ("vision_config", "image_size"),
    "patch_size": ("vision_config", "patch_size"),
    "text_hidden_size": ("text_config", "hidden_size"),
    "text_num_layers": ("text_config", "num_hidden_layers"),
    "text_num_heads": ("text_config", "num_attention_heads"),
}
# What it does not state, but the record of the run does.
_RECORDED = (
    *("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path", "vocab_size"),
    *("freeze_vision", "freeze_text", "train_uncertainty_only"),
)


def find_checkpoint(args: PicoTrainingArguments) -> str | None:
    """The checkpoint to resume from; refuses an output folder that already holds a run."""
    wanted, folder = args.resume_from_checkpoint, str(args.output_dir)
    if wanted is not None and wanted.lower() not in ("true", "false", "last", "auto"):
        resumable_state(wanted)
        return wanted
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        if args.do_train and args.should_save:
            remove_unfinished(folder)
    last = last_checkpoint(folder)
    if wanted is not None and wanted.lower() != "false" and (last is not None or wanted.lower() != "auto"):
        if last is None:
            raise ValueError(
                f"--resume_from_checkpoint: {folder!r} holds no complete checkpoint. With auto, a run starts "
                "anew where there is none."
            )
        resumable_state(last)
        return last
    finished = os.path.isfile(os.path.join(folder, "all_results.json"))
    if args.do_train and (last is not None or finished):
        raise ValueError(
            f"The output folder {folder!r} already holds a run "
            f"({os.path.basename(last) if last else 'all_results.json'}). Continue it with --resume_from_checkpoint "
            "true, or choose another --output_dir; nothing was changed."
        )
    return None


@dataclass
class ModelPlan:
    """
    What the model of a run will be.

    Attributes:
        args (`ModelArguments`): What was asked for.
        model_class (`type[PicoModel]`): Its type.
        config (`PicoConfig`): Its options; the backbones are those of the model only where it is a checkpoint of PICO.
        options (`dict`): The options of its configuration that were given and are to be applied.
        source (`str` or `None`): Checkpoint of PICO to load: the one to resume from, or `--model_name_or_path`.
    """

    args: ModelArguments
    model_class: type[PicoModel]
    config: PicoConfig
    options: dict[str, Any]
    source: str | None
    loading: dict[str, Any]
    revision: dict[str, Any]

    def build(self, captions: Sequence[str] | None, data_args: DataArguments) -> tuple[PicoModel, PicoProcessor]:
        r"""
        Model and processor: from a PICO checkpoint, from pretrained backbones, from scratch, or a mixture.

        Args:
            captions (`Sequence[str]`, *optional*): What the tokenizer of a text tower from scratch is trained on.
            data_args (`DataArguments`): Says how long texts may be.
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
        sizes = self.args.tower_options(VISION_TOWER)
        config = _scratch_vision_config(self.args)
        return self._fresh(config), small_image_processor(sizes["image_size"])

    def _build_text(self, captions: Sequence[str] | None, max_length: int) -> tuple[Any, Any]:
        path = self.args.text_model_name_or_path
        if path is not None:
            tokenizer = AutoTokenizer.from_pretrained(path, **self.revision)
            return load_backbone(path, "text", dtype="float32", **self.loading), tokenizer
        sizes = self.args.tower_options(TEXT_TOWER)
        tokenizer = train_tokenizer(captions or (), sizes["vocab_size"], max_length)
        config = small_text_config(
            sizes["text_hidden_size"], sizes["text_num_layers"], sizes["text_num_heads"], tokenizer
        )
        return self._fresh(config), tokenizer

    def _fresh(self, config: PreTrainedConfig) -> Any:
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
    _check_attention(args.attn_implementation)
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
        _check_resumed(args, config, _recorded_options(checkpoint))
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


def _check_attention(name: str | None) -> None:
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # A name with a slash is that of a kernel on the Hub.
    if name is not None and "/" not in name and name not in known:
        raise ValueError(f"--attn_implementation must be one of {', '.join(known)}, but got {name!r}.")


def _check_towers(args: ModelArguments, training: bool) -> None:
    """Refuses what is said of towers from scratch where there are none, and sizes that no tower can have."""
    for options, path in ((VISION_TOWER, args.vision_model_name_or_path), (TEXT_TOWER, args.text_model_name_or_path)):
        given = [f"--{name}" for name in options if getattr(args, name) is not None]
        checkpoint = args.model_name_or_path or path
        if given and checkpoint is not None:
            raise ValueError(
                f"{', '.join(given)}: only for a tower from scratch, but this one is that of {checkpoint!r}. Leave it "
                f"out; one of a file is taken back by {given[0]} none."
            )
    if args.model_name_or_path is not None:
        return
    if args.vision_model_name_or_path is None:
        _scratch_vision_config(args)
    if args.text_model_name_or_path is None:
        sizes = args.tower_options(TEXT_TOWER)
        check_division("text_hidden_size", sizes["text_hidden_size"], "text_num_heads", sizes["text_num_heads"])
        if not training:
            raise ValueError(
                "Without a text checkpoint the tokenizer is trained on the captions of --train_split, which only "
                "--do_train loads. Give --model_name_or_path to evaluate a trained model."
            )


def _scratch_vision_config(args: ModelArguments) -> PreTrainedConfig:
    sizes = args.tower_options(VISION_TOWER)
    return small_vision_config(
        sizes["vision_hidden_size"],
        sizes["vision_num_layers"],
        sizes["vision_num_heads"],
        sizes["image_size"],
        sizes["patch_size"],
    )


def _recorded_options(checkpoint: str) -> dict[str, Any]:
    """The options of the model that the run of a checkpoint was begun with; empty where no record says them."""
    record = Path(checkpoint).absolute().parent / RUN_RECORD
    try:
        return json.loads(record.read_text(encoding="utf-8"))["configuration"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_resumed(args: ModelArguments, config: PicoConfig, recorded: dict[str, Any]) -> None:
    """A resumed run goes on with the options that it was begun with: others are refused, not ignored."""
    given = args.config_options(METHODS[args.method or config.method])
    stated = {name: getattr(config, name, None) for name in given}
    for name, (part, attribute) in _STATED.items():
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
            stated[name] = getattr(getattr(config, part), attribute, None)
    for name in _RECORDED:
        if name in recorded and getattr(args, name) is not None:
            given[name], stated[name] = without_secrets(getattr(args, name)), recorded[name]
    changed = [
        f"--{name} {shown(value)} (the run has {shown(stated[name])})"
        for name, value in given.items()
        if value != stated[name]
    ]
    if changed:
        raise ValueError(
            f"A resumed run keeps the model that it was begun with, but these options differ: {', '.join(changed)}. "
            "Give what the run has, or start another run (--model_name_or_path takes a checkpoint) in a new "
            "--output_dir."
        )


__all__ = ["ModelPlan", "find_checkpoint", "plan_model"]
