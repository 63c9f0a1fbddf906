"""
Options of `train_pico.py`, each declared once.

Those of the model are the fields of its configuration. Flags, the help, and the check of values in a file follow from
the declarations (`option_parser.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from types import NoneType
from typing import Any, get_args

from ..data.looks import LOOKS, check_looks
from ..model.configuration_cdds import CddsConfig
from ..model.configuration_pico import CHOICES, PICO_LITERAL, PicoConfig
from ..model.modeling_cdds import CddsModel
from ..model.modeling_pico import PicoModel
from ..training.arguments import PicoTrainingArguments, Range, option_field
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


# Options of towers from scratch, of use only where no checkpoint is given.
VISION_TOWER = ("image_size", "patch_size", "vision_hidden_size", "vision_num_layers")
TEXT_TOWER = ("text_hidden_size", "text_num_layers")


@dataclass
class ModelArguments(_ModelOptions):
    """What is trained. Options of the model that are left out keep their default, or the checkpoint's value."""

    _argument_group_name = "model"

    method: str | None = option_field(
        None,
        f"{_method_help()}; pico_literal: pico by the literal reading of the paper, of which no part is learned "
        "(default: pico, or what the checkpoint is)",
        choices=list(METHODS),
    )
    model_name_or_path: str | None = option_field(
        None, "PICO checkpoint, or a joint vision-language checkpoint such as CLIP; else two towers."
    )
    vision_model_name_or_path: str | None = option_field(
        None, "Vision checkpoint (ViT, Swin, ...) (default: a tower from scratch)"
    )
    text_model_name_or_path: str | None = option_field(
        None, "Text checkpoint (BERT, MiniLM, ...) (default: a tower from scratch)"
    )
    model_revision: str | None = option_field(None, "Revision of the checkpoints (default: main)")
    use_safetensors: bool = option_field(
        True, "false reads pickles, which can run code, where there are no safetensors."
    )
    attn_implementation: str | None = option_field(
        None, "eager, sdpa, flash_attention_2, ... (default: what the backbone prefers)"
    )
    freeze_vision: bool = option_field(False, "Do not train the vision backbone.")
    freeze_text: bool = option_field(False, "Do not train the text backbone.")
    train_uncertainty_only: bool = option_field(
        False, "Train the prototypes of the uncertainty alone; scores stay as they are."
    )
    image_size: int = option_field(48, "Tower from scratch: side of the images in pixels")
    patch_size: int = option_field(8, "Tower from scratch: side of a patch in pixels")
    vision_hidden_size: int = option_field(96, "Tower from scratch: width")
    vision_num_layers: int = option_field(4, "Tower from scratch: layers")
    text_hidden_size: int = option_field(96, "Tower from scratch: width")
    text_num_layers: int = option_field(2, "Tower from scratch: layers")

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


@dataclass
class DataArguments:
    """What is trained on and evaluated on."""

    _argument_group_name = "data"

    dataset_name: str = option_field(
        "styled_shapes",
        "Hub id, folder (parquet, images with metadata.jsonl, WebDataset shards, caption files), file or pattern of "
        "files (also Karpathy's and COCO's JSON), or styled_shapes, which is generated.",
    )
    dataset_config_name: str | None = option_field(None, "Configuration of a Hub data set (default: its only one)")
    dataset_revision: str | None = option_field(None, "Revision of a Hub data set (default: main)")
    train_split: str = option_field("train", "Split to train on.")
    eval_split: str = option_field("validation", "Split for selection and feedback.")
    test_split: list[str] = field(
        default_factory=lambda: ["test"], metadata={"help": "Splits that --do_predict reports, never selects on."}
    )
    image_column: str | None = option_field(None, "Column with images (default: image)")
    caption_column: list[str] | None = option_field(
        None, "Columns with a caption or a list of captions (default: the one that is named like it)"
    )
    id_column: str | None = option_field(
        None, "Column with the identity of the meaning (default: every image its own)"
    )
    style_column: str | None = option_field(None, "Column with the style (default: style)")
    split_column: str | None = option_field(
        None, "Column with the split of each row, where all rows come in one (default: split)"
    )
    style_report: bool = option_field(
        False,
        "With --do_predict: also report on all test splits together how retrieval depends on the style of the images "
        "(style_report.json, style_report.md).",
    )
    seen_styles: list[str] | None = option_field(
        None, "Styles that training has shown, for the style report (default: those that this run trains on)"
    )
    style_stress: list[str] | None = option_field(
        None,
        "With --do_predict: also draw the images of the test splits again in these looks, and report what each costs "
        "(style_stress.json, style_stress.md).",
        choices=[*LOOKS, "all"],
    )
    caption_style_columns: list[str] | None = option_field(
        None,
        "With --do_predict: other columns of captions that ask in place of the plain ones, compared with as many of "
        "these (style_stress.json, style_stress.md).",
    )
    image_dir: str | None = option_field(None, "Folder that image paths are relative to (default: that of the data)")
    cache_dir: str | None = option_field(None, "Cache folder of downloaded data (default: that of datasets)")
    max_train_samples: int | None = option_field(None, "Use the first images only (default: all)")
    max_eval_samples: int | None = option_field(None, "Use the first images only (default: all)")
    max_text_length: int | None = option_field(
        None, "Longest caption in tokens; the rest is cut (default: what tokenizer and tower take)"
    )
    on_bad_image: str = option_field(
        "error", "error: stop before training and list them; skip: leave them out.", choices=["error", "skip"]
    )
    on_empty_captions: str = option_field(
        "error", "For images whose captions are all empty.", choices=["error", "skip"]
    )
    preprocessing_num_workers: int | None = option_field(None, "Processes that check images (default: this one alone)")
    min_crop_scale: float = option_field(1.0, "Smallest area of random training crops; 1 is off.")
    random_flip: bool = option_field(False, "Mirror half of the training images.")
    style_augmentation: float = option_field(
        0.0, "Share of the training images that are drawn again in a random style, each anew; 0 is off."
    )
    plots: bool = option_field(True, "Draw pictures of the run into output_dir/plots, if matplotlib is installed.")

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_text_length"):
            value = getattr(self, name)
            if value is not None:
                Range(1).check(name, value)
        Range(0.0, 1.0).check("style_augmentation", self.style_augmentation)
        if self.style_stress is not None:
            self.style_stress = check_looks(LOOKS if "all" in self.style_stress else self.style_stress)
        if self.seen_styles is not None and not self.style_report:
            raise ValueError("--seen_styles is for the style report; give --style_report true as well.")


# The options of `TrainingArguments` that the help shows without --help-all.
_USUAL = (
    *("output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "seed", "use_cpu"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16"),
    *("dataloader_num_workers", "eval_strategy", "save_strategy", "save_total_limit", "load_best_model_at_end"),
    *("metric_for_best_model", "report_to", "push_to_hub", "hub_model_id"),
)


def option_parser(show_all: bool = False) -> OptionParser:
    """The parser of the script; `show_all` is for the help."""
    own = inspect.get_annotations(PicoTrainingArguments).keys()
    hidden = {item.name for item in fields(PicoTrainingArguments)} - own - set(_USUAL)
    return OptionParser((ModelArguments, DataArguments, PicoTrainingArguments), () if show_all else hidden)


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
