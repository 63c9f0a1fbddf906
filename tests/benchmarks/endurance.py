"""A day of training in miniature: does a long run grow?

    python tests/benchmarks/endurance.py [--steps 10000] [--interval 500] [--tolerance 2] [--quick]

Thousands of small steps with evaluation, checkpoints, constructions of prototypes and a data worker in one process.
Prints a table of resident memory, open files, threads and child processes over time, and ends with an error if one of
them grows: memory of the last quarter by more than `--tolerance` percent of that after the first one.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback, logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from tiny import trainer

from modeling_pico.data import RandomCropFlip


OPTIONS: dict[str, Any] = {
    "model_options": {"style_probability": "purity"},
    "transform": RandomCropFlip(0.6),
    "prototype_start": 1,
    "prototype_update_start": 2,
    "prototype_interval": 10,
    "feedback_images": 5,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "rsum",
    "dataloader_num_workers": 1,
    # Else each epoch of three steps would start workers of its own.
    "dataloader_persistent_workers": True,
}


@dataclass
class Reading:
    """
    What the process holds at one moment.

    Attributes:
        step (`int`): Optimizer steps so far.
        seconds (`float`): Time since the start.
        resident (`float`): Resident memory in MiB.
        files, threads, children (`int`): Open file descriptors, threads, child processes that were not there before.
    """

    step: int
    seconds: float
    resident: float
    files: int
    threads: int
    children: int


class Watch(TrainerCallback):
    """Reads what the process holds every `interval` steps."""

    def __init__(self, interval: int):
        self.interval = interval
        self.readings: list[Reading] = []
        self._process, self._start = psutil.Process(), time.perf_counter()
        self._children_before = set(self._process.children(recursive=True))

    def read(self, step: int) -> Reading:
        # What waits for the collector is no leak.
        gc.collect()
        process = self._process
        reading = Reading(
            step=step,
            seconds=time.perf_counter() - self._start,
            resident=process.memory_info().rss / 2**20,
            files=process.num_fds(),
            threads=process.num_threads(),
            children=len(set(process.children(recursive=True)) - self._children_before),
        )
        self.readings.append(reading)
        return reading

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.interval == 0:
            self.read(state.global_step)


def train(folder: Path, steps: int, interval: int, every: int, **options: Any) -> Watch:
    """Trains with an evaluation and a checkpoint each `every` steps; gives readings, the last one after the end."""
    watch = Watch(interval)
    made = trainer(
        folder,
        callbacks=[watch],
        **{**OPTIONS, "max_steps": steps, "eval_steps": every, "save_steps": every, **options},
    )
    made.train()
    watch.made = made
    return watch


def growth(readings: list[Reading]) -> dict[str, float]:
    """
    How much each number grew from the second quarter of the readings, when all is warm, to the last: the median of
    resident memory in percent, the largest number of the rest.
    """
    quarter = max(1, len(readings) // 4)
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    before, after = (statistics.median(reading.resident for reading in part) for part in (early, late))
    counts = {
        name: max(getattr(reading, name) for reading in late) - max(getattr(reading, name) for reading in early)
        for name in ("files", "threads", "children")
    }
    return {"resident_percent": 100 * (after - before) / before, **counts}


def problems(readings: list[Reading], grown: dict[str, float], tolerance: float) -> list[str]:
    """What grew, and processes that are still there at the end."""
    found = [f"{name} grew by {value:.0f}" for name, value in grown.items() if name in vars(readings[0]) and value > 0]
    if grown["resident_percent"] > tolerance:
        found.append(f"resident memory grew by {grown['resident_percent']:.1f}%, more than {tolerance}%")
    if readings[-1].children > 0:
        found.append(f"{readings[-1].children} child processes are left after the end")
    return found


def main() -> None:
    """Runs, prints and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--interval", type=int, default=500, help="steps between two lines of the table")
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations and checkpoints")
    parser.add_argument("--tolerance", type=float, default=2.0, help="growth of resident memory in percent")
    parser.add_argument("--quick", action="store_true", help="200 steps: checks the script, says little of leaks")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.interval, options.every, options.tolerance = 200, 20, 25, 5.0
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        printed, sys.stdout = sys.stdout, silence
        try:
            watch = train(Path(folder), options.steps, options.interval, options.every, logging_steps=options.every)
        finally:
            sys.stdout = printed
    readings, log = watch.readings, watch.made.state.log_history
    del watch.made
    watch.read(options.steps)
    print("| step | seconds | resident MiB | files | threads | children |\n|---|---|---|---|---|---|")
    for reading in readings:
        numbers = f"{reading.seconds:.0f} | {reading.resident:.1f} | {reading.files}"
        print(f"| {reading.step} | {numbers} | {reading.threads} | {reading.children} |")
    evaluations = sum("eval_rsum" in entry for entry in log)
    built = sum("prototype_stage" in entry for entry in log)
    grown = growth(readings[:-1])
    print(f"{options.steps} steps, {evaluations} evaluations and checkpoints, {built} constructions of prototypes")
    print("growth after warm-up:", ", ".join(f"{name} {value:.2f}" for name, value in grown.items()))
    found = problems(readings, grown, options.tolerance)
    sys.exit("; ".join(found) if found else 0)


if __name__ == "__main__":
    main()
