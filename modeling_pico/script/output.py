"""What a run of `train_pico.py` prints: short logs, and one line where the user made a mistake."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging as hf_logging

from ..training.secrets import without_secrets


logger = hf_logging.get_logger(__name__)

# Of an evaluation during training; the rest stands in the log of the trainer's state.
_MAIN_METRICS = ("loss", "rsum", "aligned_rsum", "image_to_text_recall_at_1", "text_to_image_recall_at_1")


def set_up_logging(level: int) -> None:
    """Shows the messages of `modeling_pico` as those of transformers are shown."""
    logging.basicConfig(format="[%(name)s] %(levelname)s: %(message)s")
    logging.getLogger("modeling_pico").setLevel(level)
    hf_logging.set_verbosity(level)


class OneLineErrors(TrainerCallback):
    """
    A context in which a mistake of the user ends the process with one line and exit status 2.

    That is what a ValueError, OSError or ImportError is until, as a callback, it sees the first batch: checks of
    options, data and checkpoints raise these, with messages that say what to do. Later errors keep their traceback.
    """

    def __init__(self) -> None:
        self.has_begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.has_begun = True

    def on_prediction_step(self, args, state, control, **kwargs):
        self.has_begun = True

    def __enter__(self) -> OneLineErrors:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (ValueError, OSError, ImportError)) and not self.has_begun:
            print(f"train_pico.py: error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
            raise SystemExit(2)


class _LenientStream(io.TextIOWrapper):
    """Falls silent once nobody reads it any more or the disk that it goes to is full."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # the latter of a file that this process closed
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().flush()


def ignore_closed_streams() -> None:
    """Loses no run because its output goes nowhere any more (`| head`) or the disk of its log is full."""

    def lenient(stream: TextIO | None) -> TextIO:
        if stream is None:  # a process may be started without one
            return io.StringIO()
        return _LenientStream(stream.buffer, stream.encoding, stream.errors, line_buffering=True)

    sys.stdout, sys.stderr = lenient(sys.stdout), lenient(sys.stderr)


@contextlib.contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Reports an error of what a run can do without; the model and the results are on the disk by then."""
    try:
        yield
    except Exception:
        logger.exception(f"The {what} could not be made. The model and the results are complete without.")


class _ShortLogs(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=main_metrics(logs or {}), **kwargs)


class _ShortProgress(_ShortLogs, ProgressCallback):
    """A progress bar with short logs."""


class _ShortPrinter(_ShortLogs, PrinterCallback):
    """Short logs alone."""


def shorten_logs(trainer: Trainer) -> None:
    """Makes a trainer print only the main metrics of an evaluation."""
    for long, short in ((ProgressCallback, _ShortProgress), (PrinterCallback, _ShortPrinter)):
        if trainer.pop_callback(long) is not None:
            trainer.add_callback(short)


def main_metrics(logs: dict[str, Any]) -> dict[str, Any]:
    """A log, of an evaluation without all but its main metrics."""
    prefix = next((name.removesuffix("rsum") for name in logs if name.endswith("_rsum")), None)
    if prefix is None:
        return dict(logs)
    return {name: value for name, value in logs.items() if name.removeprefix(prefix) in (*_MAIN_METRICS, "epoch")}


__all__ = ["OneLineErrors", "ignore_closed_streams", "main_metrics", "never_fatal", "set_up_logging", "shorten_logs"]
