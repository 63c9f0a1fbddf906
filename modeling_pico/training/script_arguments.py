"""
Options of `train_pico.py`, each declared once.

Those of the model are the fields of its configuration. Flags, the help, and the check of values in a file follow from
the declarations (`option_parser.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from types import NoneType
from typing import Any, get_args

from ..model.configuration_cdds import CddsConfig
from ..model.configuration_pico import CHOICES, PICO_LITERAL, PicoConfig
from ..model.modeling_cdds import CddsModel
from ..model.modeling_pico import PicoModel
from .arguments import PicoTrainingArguments
from .option_parser import OptionParser, shown


# The type of model that each method is a head of.
METHODS = {method: kind for kind in (PicoModel, CddsModel) for method in kind.head_classes}
METHODS["pico_literal"] = PicoModel  # the head of "pico" with options of its own

# Fields of the configurations that are no options: what the backbones decide, what is learned, and the method itself.
_NO_OPTIONS = {
    *("vision_config", "text_config", "projection_bias", "method"),
}


def _described(kind: type) -> dict[str, str]:
    """Arguments of a class, and what its docstring says of each: the first sentence and that on the default."""
    text = re.sub(r"[`\"]| \*\([^)]*\)\*|\[(?=`)|(?<=`)\]", "", inspect.cleandoc(kind.__doc__ or ""))
    described = {}
    for name, words in re.findall(r"^ {4}(\w+) \(.*\):\n((?: {8}.*(?:\n|$))+)", text, flags=re.MULTILINE):
        first, *others = re.split(r"(?<=\.) (?=[A-Z])", " ".join(words.split()))
        described[name] = " ".join([first, *(sentence for sentence in others if sentence.startswith("By default"))])
    return described


def _options_of(kind: type[PicoConfig]) -> list[tuple[str, Any, Any]]:
    """The fields that a configuration adds to that of its parent, as options whose help names the default."""
    described, options = _described(kind), []
    for item in fields(kind):
        if item.name in inspect.get_annotations(kind).keys() - _NO_OPTIONS:
            types = set(get_args(item.type) or (item.type,)) - {NoneType}
            wanted = float if float in types else types.pop()
            default = "" if item.default is None else f" (default: {shown(item.default)})"
            metadata: dict[str, Any] = {"help": described[item.name] + default}
            if item.name in CHOICES:
                metadata["choices"] = CHOICES[item.name]
            options.append((item.name, wanted | None, field(default=None, metadata=metadata)))
    return options


_PICO_OPTIONS = _options_of(PicoConfig)
_CDDS_OPTIONS = _options_of(CddsConfig)
_ModelOptions: Any = make_dataclass("_ModelOptions", [*_PICO_OPTIONS, *_CDDS_OPTIONS])


def _method_help() -> str:
    """Every method with the first sentence that its head's class says of itself."""
    heads = {name: head for kind in (PicoModel, CddsModel) for name, head in kind.head_classes.items()}
    said = {name: " ".join((head.__doc__ or "").split()).partition(". ")[0] for name, head in heads.items()}
    return "; ".join(f"{name}: {text.replace('`', '').rstrip('.')}" for name, text in said.items())


# Towers made from scratch: what they are like where nothing else is said.
VISION_TOWER = {
    "vision_hidden_size": 96,
    "vision_num_layers": 4,
    "vision_num_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
TEXT_TOWER = {"text_hidden_size": 96, "text_num_layers": 2, "text_num_heads": 4, "vocab_size": 8000}


def _tower_option(name: str, text: str) -> Any:
    return field(default=None, metadata={"help": f"{text} (default: {(VISION_TOWER | TEXT_TOWER)[name]})"})


@dataclass
class ModelArguments(_ModelOptions):
    """What is trained. Options of the model that are left out keep their default, or the checkpoint's value."""

    method: str | None = field(
        default=None,
        metadata={
            "help": f"{_method_help()}; pico_literal: pico by the literal reading of the paper, of which no part is "
            "learned (default: pico, or what the checkpoint is)",
            "choices": list(METHODS),
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "PICO checkpoint, or a joint vision-language checkpoint such as CLIP; else two towers."},
    )
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Vision checkpoint (ViT, Swin, ...) (default: a tower from scratch)"}
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Text checkpoint (BERT, MiniLM, ...) (default: a tower from scratch)"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the checkpoints (default: main)"})
    use_safetensors: bool = field(
        default=True, metadata={"help": "false reads pickles, which can run code, where there are no safetensors."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ... (default: what the backbone prefers)"}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision backbone."})
    freeze_text: bool = field(default=False, metadata={"help": "Do not train the text backbone."})
    train_uncertainty_only: bool = field(
        default=False, metadata={"help": "Train the prototypes of the uncertainty alone; scores stay as they are."}
    )
    image_size: int | None = _tower_option("image_size", "Side of the images in pixels")
    patch_size: int | None = _tower_option("patch_size", "Side of a patch in pixels")
    vision_hidden_size: int | None = _tower_option("vision_hidden_size", "Width of the vision tower")
    vision_num_layers: int | None = _tower_option("vision_num_layers", "Layers of the vision tower")
    vision_num_heads: int | None = _tower_option("vision_num_heads", "Attention heads of the vision tower")
    text_hidden_size: int | None = _tower_option("text_hidden_size", "Width of the text tower")
    text_num_layers: int | None = _tower_option("text_num_layers", "Layers of the text tower")
    text_num_heads: int | None = _tower_option("text_num_heads", "Attention heads of the text tower")
    vocab_size: int | None = _tower_option("vocab_size", "Largest vocabulary of the tokenizer trained on captions")

    def config_options(self, model_class: type[PicoModel]) -> dict[str, Any]:
        """The model's options that were given; ValueError for one that this type of model does not have."""
        names = {kind: {option.name for option in fields(kind.config_class)} for kind in METHODS.values()}
        given = {item.name: getattr(self, item.name) for item in fields(_ModelOptions)}
        given["method"] = self.method
        given = {name: value for name, value in given.items() if value is not None}
        if self.method == "pico_literal":
            others = {name: given[name] for name in PICO_LITERAL.keys() - {"method"} & given.keys()}
            if any(value != PICO_LITERAL[name] for name, value in others.items()):
                raise ValueError(
                    f"--method pico_literal is {PICO_LITERAL}, but {others} was given. Leave that out, or choose "
                    "--method pico."
                )
            given |= PICO_LITERAL
        strays = sorted(given.keys() - names[model_class])
        if strays:
            methods = [method for method, kind in METHODS.items() if names[kind].issuperset(strays)]
            raise ValueError(
                f"{model_class.__name__} has no option {', '.join(map(repr, strays))}; these are options of --method "
                f"{', '.join(methods)}."
            )
        return given

    def tower_options(self, defaults: Mapping[str, int]) -> dict[str, int]:
        """The options of a tower from scratch, completed by their defaults."""
        return {
            name: default if (value := getattr(self, name)) is None else value for name, default in defaults.items()
        }


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
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set (default: its only one)"}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split for selection and feedback."})
    test_split: list[str] = field(
        default_factory=lambda: ["test"], metadata={"help": "Splits that --do_predict reports, never selects on."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column with images (default: image)"})
    caption_column: str | None = field(
        default=None,
        metadata={"help": "Column with a caption or a list of captions (default: the one that is named like it)"},
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column with the identity of the meaning (default: every image its own)"}
    )
    style_column: str | None = field(default=None, metadata={"help": "Column with the style (default: style)"})
    style_report: bool = field(
        default=False,
        metadata={
            "help": "With --do_predict: also report on all test splits together how retrieval depends on the style of "
            "the images (style_report.json, style_report.md)."
        },
    )
    seen_styles: list[str] | None = field(
        default=None,
        metadata={"help": "Styles that training has shown, for the style report (default: those of --train_split)"},
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to (default: that of the data)"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Cache folder of downloaded data (default: that of datasets)"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first images only (default: all)"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first images only (default: all)"})
    max_text_length: int | None = field(
        default=None,
        metadata={"help": "Longest caption in tokens; the rest is cut (default: what tokenizer and tower take)"},
    )
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
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that check images (default: this one alone)"}
    )
    min_crop_scale: float = field(default=1.0, metadata={"help": "Smallest area of random training crops; 1 is off."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    plots: str = field(
        default="auto",
        metadata={
            "help": "Draw pictures of the run into output_dir/plots; auto: where matplotlib is installed.",
            "choices": ["auto", "true", "false"],
        },
    )


# The help, from what one asks first. What is named nowhere, all of transformers' own but a few, is folded.
_HEAD = "Options of the model. One that is left out keeps its default, or the checkpoint's value."
_GROUPS: dict[str, tuple[str | None, Sequence[str]]] = {
    "what is run": (
        None,
        ("output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "seed", "use_cpu"),
    ),
    "model and method": (
        None,
        [item.name for item in fields(ModelArguments) if item.name not in VISION_TOWER | TEXT_TOWER],
    ),
    "towers from scratch, where no checkpoint is given": (None, [*VISION_TOWER, *TEXT_TOWER]),
    "alignment head": (_HEAD, [option[0] for option in _PICO_OPTIONS]),
    "alignment head of --method cdds": (None, [option[0] for option in _CDDS_OPTIONS]),
    "data": (None, [item.name for item in fields(DataArguments)]),
    "training": (
        None,
        [
            *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
            *("gradient_cache_chunk_size", "learning_rate", "backbone_learning_rate", "lr_scheduler_type"),
            *("warmup_steps", "weight_decay", "bf16", "caption_sampling", "gather_negatives", "hinge_warmup_epochs"),
            *("non_finite_loss", "dataloader_num_workers"),
        ],
    ),
    "staged construction of prototypes": (
        None,
        [
            *("prototype_start", "prototype_update_start", "prototype_interval"),
            *("reservoir_pairs", "feedback", "feedback_images", "feedback_kappa", "feedback_weight"),
        ],
    ),
    "evaluation": (
        None,
        [
            *("eval_split", "test_split", "max_eval_samples", "eval_strategy", "eval_steps", "eval_num_folds"),
            *("per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "eval_cache_dir"),
            *("style_report", "seen_styles", "uncertainty_reranking"),
        ],
    ),
    "output and logging": (
        None,
        [
            *("save_strategy", "save_steps", "save_total_limit", "logging_steps", "report_to", "disable_tqdm"),
            *("plots", "push_to_hub", "hub_model_id", "hub_token"),
        ],
    ),
}
_HELP = {
    "output_dir": "Folder of the run: model, checkpoints, results, card, pictures (default: trainer_output)",
    "do_train": "Train on --train_split.",
    "do_eval": "Evaluate on --eval_split.",
    "do_predict": "Evaluate on --test_split.",
    "resume_from_checkpoint": "true: go on from the last checkpoint in output_dir; auto: the same, or start anew "
    "where there is none; or the folder of a checkpoint (default: start anew)",
    "metric_for_best_model": "Metric of the best checkpoint (default: rsum)",
    "save_total_limit": "Checkpoints that are kept, the best one among them (default: all)",
    "hub_model_id": "Name of the repository on the Hub (default: that of output_dir)",
}
_FOLDED = "all other options of transformers' TrainingArguments"


def option_parser(show_all: bool = False) -> OptionParser:
    """The parser of the script; `show_all` is for the help."""
    kinds = (ModelArguments, DataArguments, PicoTrainingArguments)
    return OptionParser(kinds, _GROUPS, _FOLDED, _HELP, show_all)


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PicoTrainingArguments]:
    """Parses flags, or a YAML or JSON file followed by flags that override it."""
    return option_parser(show_all="--help-all" in argv).parse(argv)


__all__ = [
    "METHODS",
    "TEXT_TOWER",
    "VISION_TOWER",
    "DataArguments",
    "ModelArguments",
    "option_parser",
    "parse_arguments",
]
