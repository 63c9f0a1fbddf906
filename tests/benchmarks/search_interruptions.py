"""
Kills the build of an index again and again, and compares what comes out with one that nobody killed.

    python tests/benchmarks/search_interruptions.py --kills 20 --seed 0 [--quick]

A process builds an index of 240 pictures, in commits of 8, and is killed by SIGKILL at a random moment; the next one
continues, for up to four kills a build. After every kill the index must open, and every image in it must be whole: its
embeddings those of its picture. When it has ended it must be equal to the one that nobody killed, and give the same
hits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "search"))

import numpy as np
from gallery_encoder import PlainEncoder, draw

from modeling_pico.data import decode_image
from modeling_pico.search import PicoIndex
from modeling_pico.search import index as index_module


PICTURES = 240
KILLS_A_BUILD = 4


class SlowEncoder(PlainEncoder):
    """Takes its time, as a model does, so that a build lasts for some seconds."""

    def encode_images(self, images, batch_size=32):
        time.sleep(0.05)
        return super().encode_images(images, batch_size)


def build(folder: Path, pictures: Path, started) -> None:
    import modeling_pico.search.store_lancedb  # noqa: F401  before the clock runs

    index_module.COMMIT_IMAGES, index_module.CANDIDATES = 8, 100
    if (folder / "index.json").exists():
        index = PicoIndex.open(folder, SlowEncoder())
    else:
        index = PicoIndex.create(folder, SlowEncoder())
    started.set()
    index.add(pictures, progress=False)


def contents(index: PicoIndex) -> dict[str, tuple]:
    return {row.id: (row.path, row.data) for row in index._store.all()} if index._about["dim"] else {}


def check(folder: Path) -> int:
    """How many images an index holds; AssertionError if one of them is not whole."""
    index = PicoIndex.open(folder, PlainEncoder())
    held = contents(index)
    for id, (path, data) in held.items():
        expected = PlainEncoder().encode_images([decode_image(path)])[0]
        assert data == expected.astype("<f2").tobytes(), f"{id} of {path} is not whole"
    assert len(index) == len(held) and len(index.search("a red circle", 5)) == min(5, len(held))
    return len(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="3 kills")
    args = parser.parse_args()
    kills = 3 if args.quick else args.kills
    rng = random.Random(args.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_pico.search.index", "modeling_pico.data", "gallery_encoder"])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw(root / "pictures", range(PICTURES))

        def run(folder: Path, seconds: float | None) -> tuple[bool, float]:
            started = context.Event()
            process = context.Process(target=build, args=(folder, root / "pictures", started))
            process.start()
            assert started.wait(120), "the build did not start"
            begin = time.perf_counter()
            process.join(seconds)
            killed = process.is_alive()
            if killed:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            else:
                assert process.exitcode == 0, f"the build ended with {process.exitcode}"
            return killed, time.perf_counter() - begin

        _, whole_seconds = run(root / "whole", None)
        whole = PicoIndex.open(root / "whole", PlainEncoder())
        expected = contents(whole)
        assert len(expected) == PICTURES
        done, builds, moments = 0, 0, []
        while done < kills:
            folder = root / f"build-{builds}"
            builds += 1
            for _ in range(min(KILLS_A_BUILD, kills - done)):
                if not run(folder, rng.uniform(0, whole_seconds))[0]:
                    break
                done += 1
                moments.append(check(folder))
            run(folder, None)
            found = PicoIndex.open(folder, PlainEncoder())
            assert contents(found) == expected, "the index differs from the one that nobody killed"
            for query in ("a red circle", "blue"):
                hits, other = (index.search(query, 10, candidates=100) for index in (found, whole))
                assert np.allclose([hit.score for hit in hits], [hit.score for hit in other])
        print(f"{done} kills in {builds} builds, none lost; images held at a kill: {sorted(moments)} of {PICTURES}")


if __name__ == "__main__":
    main()
