"""Model cards of trained PICO and CDDS checkpoints, rendered from `model_card_template.md`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from transformers import PreTrainedConfig

from ..markdown import code_fence, escape_markdown, signed_number


TAGS = ["image-text-retrieval", "cross-modal-retrieval", "late-interaction"]

# Task of the metadata and pretty name by metric; also the columns of the recall tables, in this order.
_METRICS = {
    **{
        f"{direction}_recall_at_{k}": (f"{direction.replace('_', '-')}-retrieval", f"{label} R@{k}")
        for direction, label in (("image_to_text", "Image→text"), ("text_to_image", "Text→image"))
        for k in (1, 5, 10)
    },
    "rsum": ("image-text-retrieval", "rSum"),
}
# Further columns of these tables, before and after the recalls.
_GALLERY = {"images": "Images", "texts": "Texts"}
_COMPARISONS = {"chance_rsum": "Chance", "equal_rsum": "rSum, equal galleries"}
_OPTIONS = (
    "method",
    "embedding_dim",
    "pooling",
    "vision_special_tokens",
    "text_special_tokens",
    "loss_type",
)
_PROTOTYPE_OPTIONS = (
    "num_style_prototypes",
    "column_mode",
    "style_probability",
)
_DECOUPLING_OPTIONS = (
    "unet_num_layers",
    "unet_num_heads",
    "noise_groups",
    "threshold_init",
    "semantic_weight",
    "modality_weight",
    "integrity_weight",
    "ranking_weight",
    "semantic_probability",
)
_STAGE_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "epoch": ("Epoch", "{:g}".format),
    "prototype_stage": ("Stage", "{:.0f}".format),
    "prototype_feedback_gain": ("Δ rSum", signed_number),
    "prototype_feedback_weight": ("Feedback weight", "{:.2f}".format),
    "image_prototype_movement": ("Movement, image side", "{:.3g}".format),
    "text_prototype_movement": ("Movement, text side", "{:.3g}".format),
}
_STAGES = {
    0: "0, plain alignment: no prototypes yet, so every column has the weight 1",
    1: "1, first prototypes",
    2: "2, prototypes updated",
}
_NO_VALUE = "–"


def create_model_card(
    *,
    model_id: str,
    config: PreTrainedConfig | Mapping[str, Any],
    base_models: Sequence[str] | str | None = None,
    dataset_name: str | None = None,
    splits: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    stage_log: Sequence[Mapping[str, Any]] | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    style_metrics: Mapping[str, Mapping[str, float]] | None = None,
    command: str | None = None,
    framework_versions: Mapping[str, str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Renders the card of a checkpoint. Whatever is left out, its section is left out too. Nothing is sent anywhere.

    Args:
        model_id (`str`):
            Hub id, or a folder, of which the title names only the last part. The code to load the model names it as
            it is.
        config (`PreTrainedConfig` or `dict`): The model's configuration.
        base_models (`list[str]`, *optional*):
            Checkpoints the backbones came from. Hub ids enter the metadata; local folders are only mentioned as such.
        dataset_name (`str`, *optional*):
            Hub id (with its namespace) or plain name of the data. Results enter the metadata only if it is given.
        splits (`dict`, *optional*):
            By split, its number of images or a dictionary such as `{"images": 1000, "texts": 5000}`.
        training (`dict`, *optional*): Hyper-parameters by name.
        stage_log (`list[dict]`, *optional*):
            The trainer's log history: rows with any of `prototype_stage`, `prototype_feedback_gain`,
            `prototype_feedback_weight`, `image_prototype_movement` and `text_prototype_movement`, and their
            `epoch`. Other rows and keys are ignored.
        metrics (`dict[str, dict[str, float]]`, *optional*):
            By split, the result of [`~modeling_pico.evaluation.retrieval_metrics`], in percent, and the `chance_rsum`
            of a random ranking. Other keys are ignored.
        style_metrics (`dict[str, dict[str, float]]`, *optional*):
            The same by style, with the size of each gallery as `images` and `texts`.
        command (`str`, *optional*): Command that reproduces the checkpoint.
        framework_versions (`dict[str, str]`, *optional*): Version by library.
        language (`str` or `list[str]`, *optional*): ISO codes of the captions' languages.
        license (`str`, *optional*): Licence identifier of the Hub.

    Returns:
        `huggingface_hub.ModelCard`: The card; `card.save(path)` writes it.

    Raises:
        `ValueError`: If `model_id` is empty.
    """
    model_id = " ".join(model_id.split())
    if not model_id:
        raise ValueError("model_id must not be empty.")
    is_on_hub = _is_hub_id(model_id)
    name = model_id if is_on_hub else _last_part(model_id)
    options = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    head = options.get("method", "pico")
    has_prototypes = _has_prototypes(options)
    backbones = list(dict.fromkeys([base_models] if isinstance(base_models, str) else base_models or []))
    dataset = _described_dataset(dataset_name)
    results = _eval_results(metrics or {}, dataset) if dataset else []
    data = ModelCardData(
        model_name=name.split("/")[-1] if results else None,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[name for name, known in (("cdds", head == "cdds"), ("pico", head != "cdds" or has_prototypes)) if known]
        + TAGS,
        base_model=[backbone for backbone in backbones if _is_hub_id(backbone)] or None,
        datasets=[dataset["id"]] if dataset and dataset["id"] else None,
        metrics=["recall"] if results else None,
        eval_results=results or None,
        language=language,
        license=license,
    )
    template = _environment().from_string(
        Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8")
    )
    body = template.render(
        name=name,
        literal=json.dumps(model_id, ensure_ascii=False),
        head=head,
        has_prototypes=has_prototypes,
        has_uncertainty=options.get("uncertainty_config") is not None,
        model_class="CddsModel" if head == "cdds" else "PicoModel",
        backbones=[backbone if _is_hub_id(backbone) else None for backbone in backbones],
        dataset=dataset,
        splits=_split_table(splits or {}),
        options=_option_table(options),
        stage=_final_stage(stage_log or []) if has_prototypes else None,
        training=[(key, value) for key, value in (training or {}).items() if value is not None],
        stage_log=_stage_table(stage_log or []),
        metrics=_recall_table(_with_reranked(metrics or {}), "Split"),
        style_metrics=_recall_table(style_metrics or {}, "Style"),
        equal_galleries=any("equal_rsum" in values for values in (style_metrics or {}).values()),
        command=(command or "").strip(),
        fence=code_fence(command or ""),
        versions=[(key, value) for key, value in (framework_versions or {}).items() if value is not None],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _has_prototypes(options: Mapping[str, Any]) -> bool:
    head = options.get("method", "pico")
    return head == "pico" or (head == "cdds" and bool(options.get("semantic_probability")))


def _environment() -> Environment:
    """Every value is escaped unless it is marked as safe: code, titles, and ids that were checked."""
    return Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escape_markdown(value)),
    )


def _is_hub_id(name: str) -> bool:
    if os.path.isabs(name) or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _last_part(path: str) -> str:
    """What a card may say of a local path: no more than its last part."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "model"


def _described_dataset(name: str | None) -> dict[str, str | None] | None:
    name = " ".join((name or "").split())
    if not name:
        return None
    # Data sets of the Hub have a namespace; a bare word is the name of something else.
    if "/" in name and _is_hub_id(name):
        return {"id": name, "name": name, "type": name}
    is_path = os.path.isabs(name) or os.path.exists(name)
    name = _last_part(name) if is_path else name
    return {"id": None, "name": name, "type": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset"}


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _eval_results(metrics: Mapping[str, Mapping[str, float]], dataset: Mapping[str, str | None]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=str(dataset["type"]),
            dataset_name=str(dataset["name"]),
            dataset_split=str(split),
            metric_type=metric,
            metric_name=label,
            metric_value=round(float(values[metric]), 1),
        )
        for split, values in metrics.items()
        for metric, (task, label) in _METRICS.items()
        if _is_finite(values.get(metric))
    ]


def _with_reranked(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Below each split that was re-ranked too, what that gave."""
    rows: dict[str, Mapping[str, float]] = {}
    for split, values in metrics.items():
        rows[split] = values
        reranked = {key: values[f"reranked_{key}"] for key in _METRICS if f"reranked_{key}" in values}
        if reranked:
            same = {key: values[key] for key in _COMPARISONS if key in values}
            rows[f"{split}, re-ranked by uncertainty"] = {**reranked, **same}
    return rows


def _recall_table(metrics: Mapping[str, Mapping[str, float]], title: str) -> dict[str, list] | None:
    """One row for each of `metrics` that has results; of the sizes and chance, columns that some row has."""
    rows = {name: values for name, values in metrics.items() if any(_is_finite(values.get(key)) for key in _METRICS)}
    columns = {
        **{key: label for key, label in _GALLERY.items() if any(key in values for values in rows.values())},
        **{key: label for key, (_, label) in _METRICS.items()},
        **{key: label for key, label in _COMPARISONS.items() if any(key in values for values in rows.values())},
    }
    cells = [[name, *(_recall_cell(key, values.get(key)) for key in columns)] for name, values in rows.items()]
    return {"headers": [title, *map(Markup, columns.values())], "rows": cells} if rows else None


def _recall_cell(key: str, value: float | None) -> str:
    if value is None or not _is_finite(value):
        return _NO_VALUE
    return f"{value:,}" if key in _GALLERY else f"{value:.1f}"


def _split_table(splits: Mapping[str, Any]) -> dict[str, list] | None:
    described = {
        name: dict(split) if isinstance(split, Mapping) else {"images": split}
        for name, split in splits.items()
        if split is not None
    }
    keys = list(
        dict.fromkeys(key for split in described.values() for key, value in split.items() if value is not None)
    )
    rows = [[name, *(_cell(split.get(key)) for key in keys)] for name, split in described.items()]
    return (
        {"headers": ["Split", *(key.replace("_", " ").capitalize() for key in keys)], "rows": rows} if keys else None
    )


def _cell(value: object) -> str:
    if value is None:
        return _NO_VALUE
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _option_table(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The options that matter to this configuration, and the types of its backbones."""
    names = list(_OPTIONS)
    if config.get("loss_type") == "hinge":
        names.append("margin")
    if config.get("method") == "cdds":
        names += _DECOUPLING_OPTIONS
    if _has_prototypes(config):
        names += _PROTOTYPE_OPTIONS
        if config.get("column_mode") == "quantile":
            names.append("column_length")
    sides = [side for side in ("vision_config", "text_config") if config.get(side)]
    rows = [(f"{side}.model_type", config[side].get("model_type")) for side in sides]
    rows += [(name, config.get(name)) for name in names]
    for name, value in (config.get("uncertainty_config") or {}).items():
        if name == "reranking":
            value = ", ".join(f"{side}s {value.get(f'{side}_weight', 0.0):.3g}" for side in ("image", "text"))
            value += " (learned on validation)"
        rows.append((f"uncertainty_config.{name}", value))
    return [(name, value) for name, value in rows if value is not None]


def _stage_table(stage_log: Sequence[Mapping[str, Any]]) -> dict[str, list] | None:
    log = [row for row in stage_log if any(_is_finite(row.get(key)) for key in _STAGE_COLUMNS if key != "epoch")]
    keys = [key for key in _STAGE_COLUMNS if any(_is_finite(row.get(key)) for row in log)]
    rows = [
        [_STAGE_COLUMNS[key][1](row[key]) if _is_finite(row.get(key)) else _NO_VALUE for key in keys] for row in log
    ]
    return {"headers": [_STAGE_COLUMNS[key][0] for key in keys], "rows": rows} if rows else None


def _final_stage(stage_log: Sequence[Mapping[str, Any]]) -> str | None:
    stages = [int(row["prototype_stage"]) for row in stage_log if _is_finite(row.get("prototype_stage"))]
    return _STAGES.get(stages[-1], str(stages[-1])) if stages else None
