"""Loads a fuzzed corpus by every route and checks that nothing goes wrong in silence.

    python tests/benchmarks/dirty_data.py --output DIR [--mutations 10000] [--seed 0] [--quick]

Mutations, routes and the judge are those of tests/data/dirty_images.py and tests/data/dirty_tables.py.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from dirty_tables import FILES, MESSAGES, ROUTES, TABLES, all_mutations, fits, make_row, run_corpus, run_table


ROWS = 60


def run(total: int, seed: int, folder: Path, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """
    Runs about `total` mutations, a sixteenth of them of whole tables; returns the number of each outcome by mutation.
    """
    rng = np.random.default_rng(seed)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    tables = [(name, kind) for name in [*TABLES, *FILES] for kind in ("jsonl", "csv", "json", "parquet")]
    number, done = 0, 0
    while done < total:
        route = ROUTES[number % len(ROUTES)]
        names = [name for name in all_mutations() if fits(name, route)]
        chosen = [names[(number * ROWS // len(ROUTES) + i) % len(names)] for i in range(min(ROWS, total - done))]
        rows = [make_row(done + i, name, rng) for i, name in enumerate(chosen)]
        outcomes = run_corpus(rows, route, folder / str(number))
        for row in rows:
            counts[row.mutation][outcomes.get(row.identity, "WRONG: not judged")] += 1
        for identity in outcomes.keys() - {row.identity for row in rows}:
            counts["unknown row"][outcomes[identity]] += 1
        done += len(rows)
        for i in range(4):
            name, kind = tables[(4 * number + i) % len(tables)]
            outcome = run_table(name, kind, rng, folder / f"{number}-{i}")
            if outcome is not None:
                counts[f"table: {name}"][outcome] += 1
                done += 1
        number += 1
        if number % 20 == 0:
            show(f"{done} of {total}")
    return {name: dict(outcomes) for name, outcomes in sorted(counts.items())}


def wrong(counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The outcomes that must not be."""
    found = {name: {k: n for k, n in outcomes.items() if k.startswith("WRONG")} for name, outcomes in counts.items()}
    return {name: outcomes for name, outcomes in found.items() if outcomes}


def to_markdown(counts: dict[str, dict[str, int]]) -> str:
    lines = ["| mutation | loaded rightly | left out and counted | refused with a message | wrong |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, outcomes in counts.items():
        bad = sum(n for outcome, n in outcomes.items() if outcome.startswith("WRONG"))
        cells = [outcomes.get(outcome, 0) for outcome in ("loaded", "reported", "refused")]
        lines.append(f"| {name} | {' | '.join(map(str, [*cells, bad]))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for dirty_data.json and dirty_data.md")
    parser.add_argument("--mutations", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="decides every mutation")
    parser.add_argument("--quick", action="store_true", help="500 mutations")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        counts = run(
            500 if args.quick else args.mutations, args.seed, Path(folder), lambda text: print(text, flush=True)
        )
    bad = wrong(counts)
    results = {
        "mutations": sum(sum(outcomes.values()) for outcomes in counts.values()),
        "wrong": sum(sum(outcomes.values()) for outcomes in bad.values()),
        "seconds": time.perf_counter() - start,
        "seed": args.seed,
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "counts": counts,
        "messages": MESSAGES,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "dirty_data.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output / "dirty_data.md").write_text(to_markdown(counts))
    print(to_markdown(counts))
    print(f"{results['mutations']} mutations in {results['seconds']:.0f} s, {results['wrong']} wrong.")
    if bad:
        print(json.dumps(bad, indent=2))
        sys.exit(1)


if __name__ == "__main__":
    main()
