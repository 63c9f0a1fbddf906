"""Draws all pictures that fit a model and its training, and never lets one stop a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..data import CaptionedImageDataset, PicoDataCollator
from ..model.modeling_pico import PicoModel
from .canvas import NothingToDrawError, require_matplotlib
from .features import plot_pair_scores, plot_prototypes, plot_semantic_probability
from .gather import (
    EncodedPairs,
    encode_pairs,
    gather_match,
    gather_pair_scores,
    gather_prototypes,
    gather_risk_coverage,
    gather_semantic_probability,
    spread_rows,
)
from .history import plot_stage_timeline, plot_training_curves, read_history
from .matches import plot_matches
from .risk_coverage import plot_risk_coverage


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..training import PicoTrainer


logger = logging.get_logger(__name__)

FOLDER = "plots"


def save_plots(
    folder: str | os.PathLike,
    *,
    model: PicoModel | None = None,
    collator: PicoDataCollator | None = None,
    splits: Mapping[str, CaptionedImageDataset] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    num_samples: int = 200,
    num_matches: int = 4,
    on_figure: Callable[[str, Figure], None] | None = None,
) -> list[str]:
    r"""
    Draws every picture that what is given allows, as `{folder}/{name}.png`, 1000 pixels wide.

    A picture without a subject (prototypes of a model that has none) is left out with a log line; one that fails is
    left out with a warning that says why.

    Args:
        folder (`str`): Made if it does not exist.
        model ([`PicoModel`], *optional*): The model, unwrapped, for the pictures of what it does with samples.
        collator ([`PicoDataCollator`], *optional*): Makes batches; needed with `model`.
        splits (`dict[str, CaptionedImageDataset]`, *optional*):
            Data by name; needed with `model`. Pairs are scored and matches drawn on the first; styles of all are
            compared.
        log_history (`list[dict]`, *optional*): `trainer.state.log_history`, for the pictures of the training.
        num_samples (`int`, *optional*, defaults to 200): Images, each with its first caption, behind the statistics.
        num_matches (`int`, *optional*, defaults to 4): Images whose patch-word matches are drawn.
        on_figure (`Callable`, *optional*): Called with the name and the figure of each picture after it was saved.

    Returns:
        `list[str]`: Paths of the pictures.

    Raises:
        ImportError: without matplotlib.
        ValueError: with a model but without data or collator.
    """
    require_matplotlib()
    drawings: list[tuple[str, Callable[[], Figure]]] = []
    if log_history:
        drawings += _training_drawings(log_history, model)
    if model is not None:
        if not splits or collator is None:
            raise ValueError("Pictures of a model need `collator` and at least one data set in `splits`.")
        drawings += _model_drawings(model, collator, splits, num_samples, num_matches)
    os.makedirs(folder, exist_ok=True)
    paths = []
    for name, draw in logging.tqdm(drawings, desc="Pictures", unit="picture"):
        path = os.path.join(folder, f"{name}.png")
        try:
            figure = draw()
            figure.savefig(path)
            paths.append(path)
            if on_figure is not None:
                on_figure(name, figure)
        except NothingToDrawError as reason:
            logger.info(f"Picture {name} is left out: {reason}.")
        except Exception as error:  # A run must not fail because of a picture.
            logger.warning(f"Picture {name} failed: {type(error).__name__}: {error}")
    return paths


def _training_drawings(
    log_history: Sequence[Mapping[str, Any]], model: PicoModel | None
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    yield "training_curves", lambda: plot_training_curves(read_history(log_history))
    if model is None or model.style_prototypes is not None:
        yield "stage_timeline", lambda: plot_stage_timeline(read_history(log_history))


def _model_drawings(
    model: PicoModel,
    collator: PicoDataCollator,
    splits: Mapping[str, CaptionedImageDataset],
    num_samples: int,
    num_matches: int,
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    dataset = next(iter(splits.values()))
    encoded: list[EncodedPairs] = []

    def pairs() -> EncodedPairs:
        if not encoded:
            encoded.append(encode_pairs(model, collator, dataset, spread_rows(len(dataset), num_samples)))
        return encoded[0]

    yield "pair_scores", lambda: plot_pair_scores(gather_pair_scores(model, pairs()))
    yield "risk_coverage", lambda: plot_risk_coverage(gather_risk_coverage(model, pairs()))
    yield "prototypes", lambda: plot_prototypes(gather_prototypes(model, pairs()))
    yield (
        "semantic_probability",
        lambda: plot_semantic_probability(gather_semantic_probability(model, collator, splits, num_samples)),
    )
    for row in spread_rows(len(dataset), num_matches):
        yield f"matches_{row}", partial(_draw_match, model, collator, dataset, row)


def _draw_match(model: PicoModel, collator: PicoDataCollator, dataset: CaptionedImageDataset, row: int) -> Figure:
    return plot_matches(gather_match(model, collator, dataset, row))


def save_run_plots(
    trainer: PicoTrainer, splits: Mapping[str, CaptionedImageDataset], main: str | None = None
) -> list[str]:
    r"""
    Draws all pictures of a run into `{output_dir}/plots` and, where the run reports to TensorBoard, logs them there.

    Never fails: what goes wrong is a warning. Only the main process draws. Sharded models (FSDP, DeepSpeed) get the
    pictures of their training alone, since one process cannot run them.

    Args:
        trainer ([`PicoTrainer`]): After its training or evaluation.
        splits (`dict[str, CaptionedImageDataset]`): Data by name.
        main (`str`, *optional*): The split on which pairs are scored and matches drawn; the first one by default.

    Returns:
        `list[str]`: Paths of the pictures.
    """
    if not trainer.is_world_process_zero():
        return []
    folder = os.path.join(str(trainer.args.output_dir), FOLDER)
    try:
        subjects: dict[str, Any] = {}
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.info("The model is sharded, so that pictures of what it does with samples are left out.")
        elif splits:
            first = {main: splits[main]} if main is not None and main in splits else {}
            model = trainer.accelerator.unwrap_model(trainer.model)
            subjects = {"model": model, "collator": trainer.data_collator, "splits": {**first, **splits}}
        with trainer.accelerator.autocast():
            paths = save_plots(
                folder,
                log_history=trainer.state.log_history,
                on_figure=lambda name, figure: _to_tensorboard(trainer, name, figure),
                **subjects,
            )
    except Exception as error:  # As above: pictures are a report on a run that is already saved.
        logger.warning(f"No pictures: {type(error).__name__}: {error}")
        return []
    logger.info(f"{len(paths)} pictures are in {folder}.")
    return paths


def _to_tensorboard(trainer: PicoTrainer, name: str, figure: Figure) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            # It closes its writer at the end of training and opens one when something is logged, be it nothing.
            callback.on_log(trainer.args, trainer.state, trainer.control, logs={})
            canvas: Any = figure.canvas
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            callback.tb_writer.add_image(f"{FOLDER}/{name}", pixels, trainer.state.global_step, dataformats="HWC")
            callback.tb_writer.flush()


__all__ = ["save_plots", "save_run_plots"]
