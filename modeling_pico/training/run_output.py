"""What a run of `train_pico.py` says on the terminal: one table, one line where the user made a mistake."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging as hf_logging

from .run_record import without_secrets


logger = hf_logging.get_logger(__name__)

# Of an evaluation during training; the rest stands in the log of the trainer's state.
_SHOWN = ("loss", "rsum", "image_to_text_recall_at_1", "text_to_image_recall_at_1")


def set_up_logging(level: int) -> None:
    """Shows the messages of `modeling_pico` as those of transformers are shown."""
    hf_logging.set_verbosity(level)
    named = logging.getLogger("modeling_pico")
    named.setLevel(level)
    if not named.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(levelname)s: %(message)s"))
        named.addHandler(handler)
        named.propagate = False


class OneLineErrors(TrainerCallback):
    """
    A context in which a mistake of the user ends the process with one line and exit status 2.

    That is what a ValueError, OSError or ImportError is until, as a callback, it sees the first batch: checks of
    options, data and checkpoints raise these, with messages that say what to do. Later errors are not expected and
    keep their traceback.
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


class _Survivor(io.TextIOBase):
    """A stream that falls silent once the one beneath it is closed or full."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with self._survives():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._survives():
            self.stream.flush()

    @contextmanager
    def _survives(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the latter of a file that this process closed
            # What is left in the buffer goes nowhere, else the interpreter fails on it when it ends.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def isatty(self) -> bool:
        return not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


@contextmanager
def surviving_streams() -> Iterator[None]:
    """No run is lost because nobody reads what it prints any more (`| head`) or the disk of its log is full."""
    streams = sys.stdout, sys.stderr
    # A process that was started without one has None in its place.
    sys.stdout, sys.stderr = (_Survivor(stream or io.StringIO()) for stream in streams)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


@contextmanager
def ornament(name: str) -> Iterator[None]:
    """Reports an error of what a run can do without; the model and the results are on the disk by then."""
    try:
        yield
    except Exception:
        logger.exception(f"The {name} could not be made. The model and the results are complete without.")


# Metrics


class _ProgressLines(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(logs, state.global_step))


class _PrintedLines(PrinterCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            print(log_line(logs, state.global_step))


def log_in_lines(trainer: Trainer) -> None:
    """Makes a trainer print each log as one line instead of a dictionary."""
    for wordy, short in ((ProgressCallback, _ProgressLines), (PrinterCallback, _PrintedLines)):
        if trainer.pop_callback(wordy) is not None:
            trainer.add_callback(short)


def log_line(logs: Mapping[str, Any], step: int) -> str:
    """One line of a log; of an evaluation the loss and the main recalls."""
    prefix = next((name.removesuffix("rsum") for name in logs if name.endswith("_rsum")), None)
    if prefix is not None:
        logs = {
            name: value for name, value in logs.items() if not name.startswith(prefix) or name[len(prefix) :] in _SHOWN
        }
    shown = [f"{name} {_number(value)}" for name, value in logs.items() if name not in ("epoch", "total_flos")]
    epoch = f", epoch {logs['epoch']:.2f}" if "epoch" in logs else ""
    return f"step {step}{epoch}: {', '.join(shown)}"


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics of several evaluations as a table with a column for each, named without their prefixes."""
    columns = {
        name: {key.removeprefix(f"{name}_"): value for key, value in metrics.items() if key != "total_flos"}
        for name, metrics in results.items()
    }
    rows = [["", *columns]]
    keys = dict.fromkeys(key for metrics in columns.values() for key in metrics)
    for key in sorted(keys, key=lambda key: key.endswith(("epoch", "runtime", "per_second"))):  # these come last
        rows.append([key, *(_number(metrics[key]) if key in metrics else "" for metrics in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines, strict=True))


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


__all__ = [
    "OneLineErrors",
    "log_in_lines",
    "log_line",
    "metrics_table",
    "ornament",
    "set_up_logging",
    "surviving_streams",
]
