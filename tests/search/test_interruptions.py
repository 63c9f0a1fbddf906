"""A build that is killed at random moments ends equal to one that nobody killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "search_interruptions.py"


def test_killed_builds_end_equal():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout and "none lost" in result.stdout
