"""Every script of `tests/benchmarks` runs from its first line to its last, on small sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("tests/benchmarks/*.py") if "__main__" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_run(name, tmp_path):
    script = REPOSITORY / "tests" / "benchmarks" / name
    output = ["--output", str(tmp_path)] if '"--output"' in script.read_text() else []
    result = subprocess.run(
        [sys.executable, str(script), "--quick", *output],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout and bool(output) == any(tmp_path.iterdir())
