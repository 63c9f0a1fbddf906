"""What a training holds while it runs, memory, files, threads and processes, and whether that grows."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tiny import trainer
from transformers import TrainerCallback

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


class ResourceWatch(TrainerCallback):
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


def train_and_watch(folder: Path, steps: int, interval: int, every: int, **options: Any) -> ResourceWatch:
    """Trains with an evaluation and a checkpoint each `every` steps; gives readings, the last one after the end."""
    watch = ResourceWatch(interval)
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
