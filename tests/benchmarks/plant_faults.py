"""
Plants faults one by one and names those that no test notices.

    python tests/benchmarks/plant_faults.py [--only NAME ...] [--quick]

Each fault of `tests/faults.py` is planted in a copy of the working tree, and the tests that are to notice it run
there; the checkout itself is never written to. First they all run without a fault, since a test that fails anyway
notices nothing. Ends with an error if a fault survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import FAULTS, REPOSITORY, Fault, planted


# Seconds after which tests count as hanging: the slowest ones start several processes.
TIMEOUT = 1200
# What pytest returns: all passed, some failed. Anything else says that they did not run.
PASSED, FAILED = 0, 1


def copy_tree(folder: Path) -> Path:
    """Copies what git knows of or would add, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return folder


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """The exit status of pytest in the copy, and what it printed."""
    environment = {
        **os.environ,
        # Before the package that is installed, which is that of the checkout.
        "PYTHONPATH": str(tree),
        # Two versions of a file may have one size and one time, by which bytecode is taken for up to date.
        "PYTHONDONTWRITEBYTECODE": "1",
        # What a faulty version caches is nobody's but its own.
        "HF_HOME": tempfile.mkdtemp(dir=tree.parent),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


def check_copy(tree: Path, faults: Sequence[Fault]) -> None:
    """Ends the script unless the copy is what is tested, and all tests pass in it without a fault."""
    imported = subprocess.run(
        [sys.executable, "-c", "import modeling_pico; print(modeling_pico.__file__)"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if Path(imported.stdout.strip()).parents[1] != tree:
        sys.exit(f"The tests would run on {imported.stdout.strip()!r} and not on the copy. {imported.stderr}")
    status, output = run_tests(tree, list(dict.fromkeys(test for fault in faults for test in fault.tests)))
    if status != PASSED:
        sys.exit(f"Without a fault not all tests pass (pytest returned {status}):\n{output[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="plant these alone")
    parser.add_argument("--quick", action="store_true", help="three faults: does it run?")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.name in options.only][: 3 if options.quick else None]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder).resolve() / "tree")
        check_copy(tree, faults)
        for fault in faults:
            path, started = tree / fault.file, time.monotonic()
            original = path.read_bytes()
            path.write_text(planted(fault, tree), encoding="utf-8")
            status, output = run_tests(tree, fault.tests)
            path.write_bytes(original)
            if status not in (PASSED, FAILED):
                sys.exit(f"With {fault.name!r} the tests do not run (pytest returned {status}):\n{output[-3000:]}")
            survivors += [fault] if status == PASSED else []
            verdict = "SURVIVES" if status == PASSED else "noticed"
            print(f"{verdict:8} {time.monotonic() - started:5.0f} s  {fault.name}: {fault.what}", flush=True)
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults are noticed.")
    if survivors:
        sys.exit("Not noticed: " + ", ".join(fault.name for fault in survivors))


if __name__ == "__main__":
    main()
