"""A day of training in miniature: does a long run grow?

    python tests/benchmarks/endurance.py [--steps 10000] [--interval 500] [--tolerance 2] [--quick]

Thousands of small steps with evaluation, checkpoints, constructions of prototypes and a data worker in one process.
Prints a table of resident memory, open files, threads and child processes over time, and ends with an error if one of
them grows: memory of the last quarter by more than `--tolerance` percent of that after the first one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from transformers import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from held_resources import growth, problems, train_and_watch


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
            watch = train_and_watch(
                Path(folder), options.steps, options.interval, options.every, logging_steps=options.every
            )
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
