"""Model cards of trained PICO and CDDS checkpoints, rendered from `model_card_template.md`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
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
from ..model.configuration_cdds import CddsConfig


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
# Columns of the tables: title, and how a number is written.
_Columns = Mapping[str, tuple[str, Callable[[float], str]]]
_GALLERY: _Columns = {"images": ("Images", "{:,}".format), "texts": ("Texts", "{:,}".format)}
_RECALLS: _Columns = {
    **_GALLERY,
    **{metric: (label, "{:.1f}".format) for metric, (_, label) in _METRICS.items()},
    "chance_rsum": ("Chance", "{:.1f}".format),
    "equal_rsum": ("rSum, equal galleries", "{:.1f}".format),
}
_STAGE_COLUMNS: _Columns = {
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
_PROTOTYPE_OPTIONS = ("num_style_prototypes", "column_mode", "column_length", "style_probability")
# Options that matter only beside a value of another one.
_ONLY_WITH = {
    "pooling": ("method", "clip_style"),
    "margin": ("loss_type", "hinge"),
    "column_length": ("column_mode", "quantile"),
}


def create_model_card(
    *,
    model_id: str,
    config: PreTrainedConfig | Mapping[str, Any],
    base_models: Sequence[str] = (),
    dataset_name: str | None = None,
    splits: Mapping[str, Mapping[str, int]] | None = None,
    training: Mapping[str, Any] | None = None,
    stage_log: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    style_metrics: Mapping[str, Mapping[str, float]] | None = None,
    num_folds: int = 1,
    command: str = "",
    framework_versions: Mapping[str, str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Renders the card of a checkpoint. Whatever is left out, its section is left out too. Nothing is sent anywhere.

    Args:
        model_id (`str`):
            Hub id, or a folder, of which the title names only the last part; the code to load the model names it all.
        config (`PreTrainedConfig` or `dict`): The model's configuration.
        base_models (`list[str]`, *optional*):
            Checkpoints the backbones came from. Hub ids enter the metadata; local folders are only mentioned as such.
        dataset_name (`str`, *optional*):
            Hub id (with its namespace) or plain name of the data. Results enter the metadata only if it is given.
        splits (`dict[str, dict[str, int]]`, *optional*): By split, its number of `images` and `texts`.
        training (`dict`, *optional*): Hyper-parameters by name.
        stage_log (`list[dict]`, *optional*): The trainer's log history, of which what prototypes log is shown.
        metrics (`dict[str, dict[str, float]]`, *optional*):
            By split, the result of [`~modeling_pico.evaluation.retrieval_metrics`], in percent, `chance_rsum`, and the
            size of the gallery as `images` and `texts`.
        style_metrics (`dict[str, dict[str, float]]`, *optional*):
            The same by style.
        num_folds (`int`, *optional*, defaults to 1): Galleries of each split that `metrics` are the mean of.
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
    name = model_id if _is_hub_id(model_id) else _last_part(model_id)
    options = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    head = options.get("method", "pico")
    has_prototypes = head == "pico" or (head == "cdds" and bool(options.get("semantic_probability")))
    metrics, style_metrics, backbones = metrics or {}, style_metrics or {}, list(dict.fromkeys(base_models))
    stages = [int(row["prototype_stage"]) for row in stage_log if _is_finite(row.get("prototype_stage"))]
    dataset = _described_dataset(dataset_name)
    results = _eval_results(metrics, dataset, num_folds) if dataset else []
    data = ModelCardData(
        model_name=name.split("/")[-1] if results else None,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["cdds"] * (head == "cdds") + ["pico"] * (head != "cdds" or has_prototypes) + TAGS,
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
        splits=_table("Split", _GALLERY, (splits or {}).items()),
        options=_option_table(options, has_prototypes),
        stage=_STAGES[stages[-1]] if has_prototypes and stages else None,
        training=[(key, value) for key, value in (training or {}).items() if value is not None],
        stage_log=_table("Epoch", _STAGE_COLUMNS, ((f"{row.get('epoch', math.nan):g}", row) for row in stage_log)),
        num_folds=num_folds,
        metrics=_table("Split", _RECALLS, _with_reranked(metrics), _METRICS),
        style_metrics=_table("Style", _RECALLS, style_metrics.items(), _METRICS),
        equal_galleries=any("equal_rsum" in values for values in style_metrics.values()),
        command=command.strip(),
        fence=code_fence(command),
        versions=[(key, value) for key, value in (framework_versions or {}).items() if value is not None],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


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


def _eval_results(
    metrics: Mapping[str, Mapping[str, float]], dataset: Mapping[str, str | None], num_folds: int
) -> list[EvalResult]:
    folds = {"folds": num_folds} if num_folds > 1 else {}
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=str(dataset["type"]),
            dataset_name=str(dataset["name"]),
            dataset_split=str(split),
            # Recall falls as a gallery grows: without its size a number says little.
            dataset_args={key: values[key] for key in _GALLERY if key in values} | folds or None,
            metric_type=metric,
            metric_name=label,
            metric_value=round(float(values[metric]), 1),
        )
        for split, values in metrics.items()
        for metric, (task, label) in _METRICS.items()
        if _is_finite(values.get(metric))
    ]


def _with_reranked(metrics: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Below each split that was re-ranked too, what that gave."""
    for split, values in metrics.items():
        yield split, values
        reranked = {key: values[f"reranked_{key}"] for key in _METRICS if f"reranked_{key}" in values}
        if reranked:
            yield f"{split}, re-ranked by uncertainty", {**values, **reranked}


def _table(
    title: str,
    columns: _Columns,
    rows: Iterable[tuple[object, Mapping[str, float]]],
    needed: Iterable[str] | None = None,
) -> dict[str, list] | None:
    """Rows that have a finite number of those `needed` (by default of any column), in the columns that they need."""
    written = [
        (name, {key: form(values[key]) for key, (_, form) in columns.items() if _is_finite(values.get(key))})
        for name, values in rows
    ]
    written = [(name, cells) for name, cells in written if not cells.keys().isdisjoint(needed or columns)]
    shown = [key for key in columns if any(key in cells for _, cells in written)]
    headers = [title, *(Markup(columns[key][0]) for key in shown)]
    lines = [[name, *(cells.get(key, "–") for key in shown)] for name, cells in written]
    return {"headers": headers, "rows": lines} if lines else None


def _option_table(config: Mapping[str, Any], has_prototypes: bool) -> list[tuple[str, Any]]:
    """The types of the backbones, and the options that matter to this configuration."""
    sides = [side for side in ("vision_config", "text_config") if config.get(side)]
    rows = [(f"{side}.model_type", config[side].get("model_type")) for side in sides]
    inherited = {option.name for option in fields(PreTrainedConfig)}
    for name in (option.name for option in fields(CddsConfig) if option.name not in inherited):
        other, value = _ONLY_WITH.get(name, ("", None))
        unused = config.get(other) != value or (name in _PROTOTYPE_OPTIONS and not has_prototypes)
        if not unused and not name.endswith("_config"):
            rows.append((name, config.get(name)))
    for name, value in (config.get("uncertainty_config") or {}).items():
        if name == "reranking":
            value = ", ".join(f"{side}s {value.get(f'{side}_weight', 0.0):.3g}" for side in ("image", "text"))
            value += " (learned on validation)"
        rows.append((f"uncertainty_config.{name}", value))
    return [(name, value) for name, value in rows if value is not None]
