"""
Kills a tiny training again and again, and compares what comes out with a training that nobody killed.

    python tests/benchmarks/interruptions.py --kills 50 --seed 0 [--quick]

Trainings of `train_pico.py` are killed by SIGKILL or SIGTERM at random moments and in chosen ones (the n-th training
step, evaluation, construction of prototypes, or file operation of a checkpoint), and resumed, until they end. After
every kill each checkpoint that can be seen must be complete and, bit for bit, that of the uninterrupted training. At
the end weights, buffers, optimiser, random state, log and `all_results.json` must be equal, times aside.

Processes are forked from one that has imported everything, since imports take longer than the training.
"""

from __future__ import annotations

import os


os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import argparse
import collections
import difflib
import importlib
import json
import mmap
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import safetensors.torch
import torch

import train_pico
from modeling_pico.data import load_captioned_images
from modeling_pico.training import PicoTrainer, PrototypeConstruction


PHASES = ("elsewhere", "training", "evaluation", "construction", "checkpoint")
TARGETS = (*PHASES[1:], "checkpoint", "anywhere")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
OPTIONS = {
    "image_size": 16,
    "patch_size": 8,
    "vision_hidden_size": 16,
    "vision_num_layers": 1,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "embedding_dim": 8,
    "num_style_prototypes": 3,
    "min_crop_scale": 0.7,
    "random_flip": True,
    "do_train": True,
    "do_eval": True,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 4,
    "prototype_start": 1,
    "prototype_update_start": 2,
    "feedback_images": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "rsum",
    "logging_steps": 5,
    "resume_from_checkpoint": "auto",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "log_level": "error",
    "plots": "false",
}
TIMES = ("runtime", "per_second")


@dataclass
class Kill:
    """When a training gets which signal: at the n-th event of a kind, or so many seconds after its start."""

    signal: int
    phase: str
    number: int
    # Of checkpoints: the audit event (a file operation) that is counted; None counts entries into the phase.
    operation: str | None
    # Seconds after the event.
    delay: float


class Child:
    """In the forked process: notes the phase in shared memory, and kills itself as planned."""

    def __init__(self, memory: mmap.mmap, kill: Kill | None):
        self.memory, self.kill = memory, kill
        self.stack = [0]
        self.seen = 0
        for owner, name, phase in (
            (PicoTrainer, "training_step", "training"),
            (PicoTrainer, "evaluation_loop", "evaluation"),
            (PrototypeConstruction, "propose", "construction"),
            (PicoTrainer, "_save_checkpoint", "checkpoint"),
        ):
            self.watch(owner, name, phase)
        if kill is not None and kill.phase == "anywhere":
            self.fire_after(kill.delay)
        if kill is not None and kill.operation is not None:
            sys.addaudithook(self.audit)

    def watch(self, owner: type, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self.stack.append(PHASES.index(phase))
            self.memory[0] = self.stack[-1]
            if self.kill is not None and self.kill.phase == phase and self.kill.operation is None:
                self.count()
            try:
                return original(*args, **kwargs)
            finally:
                self.stack.pop()
                self.memory[0] = self.stack[-1]

        setattr(owner, name, watched)

    def audit(self, event: str, _arguments: tuple) -> None:
        kill = self.kill
        if self.stack[-1] == PHASES.index("checkpoint") and event.startswith(kill.operation):
            self.count()

    def count(self) -> None:
        self.seen += 1
        if self.seen == self.kill.number:
            if self.kill.delay:
                self.fire_after(self.kill.delay)
            else:
                self.fire()

    def fire_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self.fire)
        timer.daemon = True
        timer.start()

    def fire(self) -> None:
        self.memory[1] = 1 + self.memory[0]
        os.kill(os.getpid(), self.kill.signal)


def run(folder: Path, data: Path, kill: Kill | None = None, **options) -> tuple[int, str | None]:
    """One process of a training; its exit status (negative: the signal), and the phase in which it was killed."""
    memory = mmap.mmap(-1, 2)
    options = {**OPTIONS, "output_dir": folder, "dataset_name": data, **options}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    folder.mkdir(exist_ok=True)
    if (process := os.fork()) == 0:
        status = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            Child(memory, kill)
            train_pico.main(argv)
            folder.with_suffix(".modules").write_text("\n".join(sys.modules))
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, PHASES[memory[1] - 1] if memory[1] else None


def without_times(value):
    """JSON values without what depends on the clock."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if not name.endswith(TIMES)}
    return value


def same(first, second) -> bool:
    """Whether nested values are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool((first == second).all()) if hasattr(first, "all") else first == second


def differing_lines(first: Path, second: Path) -> str:
    """Of text files, the lines that differ."""
    if first.suffix not in (".json", ".md", ".txt"):
        return ""
    lines = (path.read_text().splitlines() for path in (first, second))
    return "".join("\n" + line for line in difflib.ndiff(*lines) if line[0] in "+-")


def same_files(first: Path, second: Path) -> bool:
    """Whether two files of a run say the same, times aside."""
    if first.suffix == ".safetensors":
        return same(*(safetensors.torch.load_file(path) for path in (first, second)))
    if first.suffix in (".pt", ".pth"):
        return same(*(torch.load(path, weights_only=False) for path in (first, second)))
    if first.name == "training_args.bin":
        return second.is_file()  # it names the output folder
    if first.suffix != ".json":
        return first.read_bytes() == second.read_bytes()
    contents = [without_times(json.loads(path.read_text())) for path in (first, second)]
    if first.name == "trainer_state.json":
        return contents[0]["log_history"] == contents[1]["log_history"]
    if first.name == "tokenizer.json":
        for content in contents:
            del content["padding"]  # whether it has padded a batch yet
    if first.name == "tokenizer_config.json":
        return contents[0] == {
            name: contents[1].get(name) for name in contents[0]
        }  # a tokenizer that was loaded adds where from
    return contents[0] == contents[1]


def compare(folder: Path, reference: Path, left_out: tuple[str, ...] = ()) -> None:
    """Raises where the files of two folders hold different states."""
    for path in sorted(reference.iterdir()):
        other = folder / path.name
        if path.is_file() and path.name not in left_out and not same_files(path, other):
            raise AssertionError(f"{other} is not {path}{differing_lines(path, other)}")


def checkpoints(folder: Path) -> list[Path]:
    """All that `Trainer` would take for a checkpoint."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def check_after_kill(folder: Path, reference: Path) -> None:
    """Every checkpoint in sight is that of the uninterrupted training; the best one is there."""
    for checkpoint in checkpoints(folder):
        # Steps at which only SIGTERM saves have no counterpart; that they are right shows at the end.
        if (reference / checkpoint.name).is_dir():
            compare(checkpoint, reference / checkpoint.name)
        best = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
        if checkpoint == checkpoints(folder)[-1] and best is not None and not Path(best).is_dir():
            raise AssertionError(f"{checkpoint} names {best} as the best, which is gone")


def check_at_end(folder: Path, reference: Path) -> None:
    """The end of a killed training is the end of the uninterrupted one."""
    compare(checkpoints(folder)[-1], checkpoints(reference)[-1])
    # The model card shows times and names the folder; so does the record.
    compare(folder, reference, left_out=("README.md", "run.json"))
    if (folder / "_unfinished").exists():
        raise AssertionError(f"{folder} holds leftovers")


def draw(rng: random.Random, seconds: float, target: str) -> Kill:
    """A kill at a random moment; `seconds` is how long the uninterrupted training took."""
    kind = rng.choice(SIGNALS)
    if target == "anywhere":
        return Kill(kind, target, 0, None, rng.uniform(0.0, seconds))
    if target == "checkpoint":
        # The moves are few among the operations, and matter most.
        operation, most = rng.choice([("open", 60), ("os.rename", 4), ("shutil.rmtree", 4), ("os.", 40), ("", 90)])
        return Kill(kind, target, rng.randint(1, most), operation, 0.0)
    number = {"training": 6, "evaluation": 3, "construction": 1}[target]
    return Kill(kind, target, rng.randint(1, number), None, rng.choice([0.0, rng.uniform(0.0, 0.05)]))


def main() -> None:
    """Prints how many kills fell where; exits with an error at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="Kills, at least.")
    parser.add_argument("--kills_per_run", type=int, default=10, help="Then a training may end.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_const", dest="kills", const=3, help="Three kills: does it run?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        kill_and_compare(Path(place), arguments)


def prepare(data: Path, reference: Path) -> None:
    """Writes the data, and trains without a kill; what that imported is imported here too, for all that is forked."""
    if (process := os.fork()) == 0:
        rows = {"train": 40, "validation": 12, "test": 1}
        splits = {
            name: load_captioned_images("styled_shapes", split=name).select(range(n)) for name, n in rows.items()
        }
        datasets.DatasetDict(splits).save_to_disk(data)
        os._exit(0)
    os.waitpid(process, 0)
    status, _ = run(reference, data)
    if status != 0:
        raise AssertionError(reference.with_suffix(".log").read_text())
    for name in reference.with_suffix(".modules").read_text().split():
        if name.split(".")[0] in ("transformers", "torch", "datasets", "accelerate", "evaluate"):
            importlib.import_module(name)


def kill_and_compare(place: Path, arguments: argparse.Namespace) -> None:
    """Kills trainings until there were kills enough and each phase has its share."""
    rng, begun = random.Random(arguments.seed), time.time()
    datasets.disable_progress_bars()
    data, reference = place / "data", place / "whole"
    prepare(data, reference)
    seconds = time.time() - begun
    if arguments.kills >= 10:
        started = time.time()
        run(place / "again", data)
        seconds = time.time() - started
        check_at_end(place / "again", reference)
        print(f"an uninterrupted training takes {seconds:.1f} s; repeated, it is equal", flush=True)

    fell: collections.Counter = collections.Counter()
    share = arguments.kills // 10
    runs = killed = 0
    enough = False
    while not enough or killed:
        folder = place / f"run-{runs}"
        target = TARGETS[sum(fell.values()) % len(TARGETS)]
        kill = None if enough or killed == arguments.kills_per_run else draw(rng, seconds, target)
        # All but the best and the newest checkpoint are deleted, so that this is interrupted too.
        status, phase = run(folder, data, kill, save_total_limit=1)
        if status == 0:
            check_at_end(folder, reference)
            runs, killed = runs + 1, 0
        elif kill is not None and phase is not None and status in (-kill.signal, 128 + kill.signal):
            fell[phase, kill.signal] += 1
            killed += 1
            check_after_kill(folder, reference)
        else:
            raise AssertionError(f"exit status {status} after {kill}:\n{folder.with_suffix('.log').read_text()}")
        in_phases = [sum(count for (at, _), count in fell.items() if at == phase) for phase in PHASES]
        enough = sum(in_phases) >= arguments.kills and min(in_phases) >= share
    print("| killed in | SIGKILL | SIGTERM |\n| --- | ---: | ---: |")
    for phase in PHASES:
        print(f"| {phase} | {fell[phase, signal.SIGKILL]} | {fell[phase, signal.SIGTERM]} |")
    print(
        f"{sum(fell.values())} kills; {runs} trainings ended equal to the uninterrupted one; "
        f"{time.time() - begun:.0f} s, seed {arguments.seed}"
    )


if __name__ == "__main__":
    main()
