"""Options of `train_pico.py`: what its flags and files say of the model and the data."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import AutoConfig, HfArgumentParser

from ..configuration_pico import PicoConfig
from ..modeling_cdds import CddsModel
from ..modeling_pico import PicoModel
from .arguments import PicoTrainingArguments


# The type of model that each method is a head of.
METHODS = {head: kind for kind in (PicoModel, CddsModel) for head in kind.config_class.alignment_heads}


@dataclass
class ModelArguments:
    """What is trained. Options of the model that are left out keep their default, or the checkpoint's value."""

    method: str | None = field(
        default=None,
        metadata={
            "help": "pico: weighted patch-by-word score; fine_grained: the same score without weights; "
            "instance_norm: the same with column means removed; clip_style: pooled embeddings; cdds: semantic "
            "components of the tokens alone. Default: pico, or what the checkpoint is.",
            "choices": list(METHODS),
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "PICO checkpoint, or a joint vision-language checkpoint such as CLIP."}
    )
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Vision checkpoint (ViT, Swin, ...)."}
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Text checkpoint (BERT, MiniLM, ...)."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the checkpoints."})
    use_safetensors: bool = field(
        default=True, metadata={"help": "false reads pickles, which can run code, where there are no safetensors."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision backbone."})
    freeze_text: bool = field(default=False, metadata={"help": "Do not train the text backbone."})
    train_uncertainty_only: bool = field(
        default=False, metadata={"help": "Train the prototypes of the uncertainty alone; scores stay as they are."}
    )
    # Towers made from scratch, where no checkpoint is given.
    image_size: int = field(default=48, metadata={"help": "Side of the images in pixels."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch in pixels."})
    vision_hidden_size: int = field(default=96, metadata={"help": "Width of the vision tower."})
    vision_num_layers: int = field(default=4, metadata={"help": "Layers of the vision tower."})
    vision_num_heads: int = field(default=4, metadata={"help": "Attention heads of the vision tower."})
    text_hidden_size: int = field(default=96, metadata={"help": "Width of the text tower."})
    text_num_layers: int = field(default=2, metadata={"help": "Layers of the text tower."})
    text_num_heads: int = field(default=4, metadata={"help": "Attention heads of the text tower."})
    vocab_size: int = field(
        default=8000, metadata={"help": "Largest vocabulary of the tokenizer trained on captions."}
    )
    # Options of PicoConfig and, at the end, of CddsConfig.
    embedding_dim: int | None = field(default=None, metadata={"help": "Features of a token embedding."})
    pooling: str | None = field(default=None, metadata={"help": "mean or class_token."})
    vision_special_tokens: bool | None = field(default=None, metadata={"help": "CLS and registers take part."})
    text_special_tokens: bool | None = field(default=None, metadata={"help": "First and last token take part."})
    num_style_prototypes: int | None = field(default=None, metadata={"help": "Style prototypes of each modality."})
    column_mode: str | None = field(default=None, metadata={"help": "moments, statistics, quantile or position."})
    column_length: int | None = field(default=None, metadata={"help": "Points of a quantile or position column."})
    probability_estimator: str | None = field(
        default=None, metadata={"help": "matched, chance_corrected, magnitude, best_aligned or meaning_share."}
    )
    style_probability: str | None = field(default=None, metadata={"help": "learned, purity, nearest, cosine, global."})
    comparator: str | None = field(default=None, metadata={"help": "style_rates, network or free_gate, for learned."})
    comparator_statistics: bool | None = field(default=None, metadata={"help": "The comparator reads statistics too."})
    probability_combination: str | None = field(default=None, metadata={"help": "product, image or text."})
    probability_gradient: bool | None = field(default=None, metadata={"help": "Gradient through the probability."})
    sharpness: float | None = field(default=None, metadata={"help": "Power of the semantic probability."})
    loss_type: str | None = field(default=None, metadata={"help": "infonce or hinge."})
    margin: float | None = field(default=None, metadata={"help": "Margin of the hinge loss."})
    logit_scale_init_value: float | None = field(default=None, metadata={"help": "Initial log inverse temperature."})
    num_uncertainty_prototypes: int | None = field(
        default=None, metadata={"help": "Prototypes of each modality for the uncertainty (PAU uses 8); 0 is off."}
    )
    uncertainty_temperature: float | None = field(default=None, metadata={"help": "Divides the logits of evidence."})
    uncertainty_weight: float | None = field(default=None, metadata={"help": "Weight of the loss of uncertainty."})
    uncertainty_diversity_weight: float | None = field(
        default=None, metadata={"help": "Weight of the similarity of its prototypes to one another."}
    )
    uncertainty_gradient: bool | None = field(default=None, metadata={"help": "Its loss trains the embeddings too."})

    unet_num_layers: int | None = field(default=None, metadata={"help": "Layers of the encoder and each decoder."})
    unet_num_heads: int | None = field(default=None, metadata={"help": "Attention heads of these layers."})
    noise_groups: int | None = field(default=None, metadata={"help": "Noisy copies that are averaged in training."})
    threshold_init: float | None = field(default=None, metadata={"help": "Initial threshold of related columns."})
    semantic_weight: float | None = field(default=None, metadata={"help": "Weight of the semantic loss."})
    modality_weight: float | None = field(default=None, metadata={"help": "Weight of the modality loss."})
    integrity_weight: float | None = field(default=None, metadata={"help": "Share of the plain reconstruction."})
    ranking_weight: float | None = field(default=None, metadata={"help": "Weight of the loss of the pairs."})
    semantic_probability: bool | None = field(default=None, metadata={"help": "Column weights on components."})

    def model_class(self, checkpoint: str | None = None) -> type[PicoModel]:
        """The type of model: of the checkpoint to go on with, else of the method, else of the checkpoint given."""
        if checkpoint is None and self.method is not None:
            return METHODS[self.method]
        source = checkpoint or self.model_name_or_path
        if source is not None:
            config = AutoConfig.from_pretrained(source, revision=None if checkpoint else self.model_revision)
            if isinstance(config, PicoConfig):
                return METHODS[config.alignment_head]
        return PicoModel

    def config_options(self, model_class: type[PicoModel]) -> dict:
        """The model's options that were given; ValueError for one that this type of model does not have."""
        names = {kind: {option.name for option in fields(kind.config_class)} for kind in METHODS.values()}
        known = set().union(*names.values())
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name in known}
        given["alignment_head"] = self.method
        given = {name: value for name, value in given.items() if value is not None}
        strays = sorted(given.keys() - names[model_class])
        if strays:
            methods = [method for method, kind in METHODS.items() if names[kind].issuperset(strays)]
            raise ValueError(
                f"{model_class.__name__} has no option {', '.join(map(repr, strays))}; these are options of --method "
                f"{', '.join(methods)}."
            )
        return given


@dataclass
class DataArguments:
    """What is trained on and evaluated on."""

    dataset_name: str = field(
        default="styled_shapes",
        metadata={
            "help": "Hub id, folder (parquet, images with metadata.jsonl, caption files), Karpathy's JSON, or "
            "styled_shapes, which is generated."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split for selection and feedback."})
    test_split: list[str] = field(
        default_factory=lambda: ["test"], metadata={"help": "Splits that --do_predict reports, never selects on."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column with images (default: image)."})
    caption_column: str | None = field(default=None, metadata={"help": "Column with a caption or a list of captions."})
    id_column: str | None = field(default=None, metadata={"help": "Column with the identity of the meaning."})
    style_column: str | None = field(default=None, metadata={"help": "Column with the style (default: style)."})
    style_report: bool = field(
        default=False,
        metadata={
            "help": "With --do_predict: also report on all test splits together how retrieval depends on the style of "
            "the images (style_report.json, style_report.md)."
        },
    )
    seen_styles: list[str] | None = field(
        default=None,
        metadata={"help": "Styles that training has shown, for the style report (default: those of --train_split)."},
    )
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder of downloaded data."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first images only."})
    max_text_length: int | None = field(default=None, metadata={"help": "Longest caption in tokens; the rest is cut."})
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "error: stop before training and list them; skip: leave them out.",
            "choices": ["error", "skip"],
        },
    )
    on_empty_captions: str = field(
        default="error", metadata={"help": "For images whose captions are all empty.", "choices": ["error", "skip"]}
    )
    max_skipped: float = field(
        default=0.5, metadata={"help": "Largest share of the rows that skip leaves out; more is an error."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that check images."})
    min_crop_scale: float = field(default=1.0, metadata={"help": "Smallest area of random training crops; 1 is off."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    plots: str = field(
        default="auto",
        metadata={
            "help": "Draw pictures of the run into output_dir/plots; auto: where matplotlib is installed.",
            "choices": ["auto", "true", "false"],
        },
    )


def number_or_none(kind: type) -> Callable[[str], float | None]:
    """What `kind` makes of a flag's value, and None of the word none: in a file that is `null`."""

    def convert(text: str) -> float | None:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its errors
    return convert


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PicoTrainingArguments]:
    """Parses flags, or a YAML or JSON file followed by flags that override it."""
    classes = (ModelArguments, DataArguments, PicoTrainingArguments)
    parser = HfArgumentParser(classes)  # type: ignore[arg-type]
    hints = {name: hint for arguments in classes for name, hint in get_type_hints(arguments).items()}
    for action in parser._actions:
        if action.type in (int, float) and type(None) in get_args(hints.get(action.dest)):
            action.type = number_or_none(action.type)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        path, argv = Path(argv[0]), argv[1:]
        if not path.is_file():
            raise ValueError(f"The configuration file {str(path)!r} does not exist.")
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(options, dict):
            raise ValueError(f"{path}: expected options as `name: value`, but found a {type(options).__name__}.")
        known = {action.dest for action in parser._actions}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f" Did you mean {', '.join(close)}?" if close else ""
                raise ValueError(f"{path}: unknown option {name!r}.{hint}")
        # Lists and the words true and false are values of a file, but strings on the command line.
        for name in ("test_split", "seen_styles"):
            if isinstance(options.get(name), str):
                options[name] = [options[name]]
        for name in ("resume_from_checkpoint", "plots"):
            if isinstance(options.get(name), bool):
                options[name] = str(options[name]).lower()
        parser.set_defaults(**options)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return model_args, data_args, training_args


__all__ = ["METHODS", "DataArguments", "ModelArguments", "parse_arguments"]
