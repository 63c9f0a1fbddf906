"""Scripts that run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_script(script: str, *arguments: object, options: Sequence[str] = (), cwd: Path, **environment: str) -> str:
    """Runs a script with arguments, offline, in a process of its own that must succeed; returns what it prints."""
    result = subprocess.run(
        [sys.executable, *options, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
