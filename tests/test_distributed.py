"""Processes talk to each other through one file, so that it shows who waits for whom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import modeling_pico


PACKAGE = Path(modeling_pico.__file__).parent
COLLECTIVES = "gather|gather_object|gather_for_metrics|reduce|broadcast|broadcast_object_list|pad_across_processes"
ELSEWHERE = re.compile(
    r"torch\.distributed(?!\.fsdp)|from torch import .*\bdistributed\b"
    rf"|from accelerate.*import .*\b({COLLECTIVES})\b"
    r"|\.full_tensor\("
    rf"|(accelerator|state|State\(\))\.({COLLECTIVES}|wait_for_everyone)\("
)


@pytest.mark.parametrize(
    "line",
    [
        "from torch import distributed, nn",
        "torch.distributed.all_reduce(gradient)",
        "from accelerate.utils import gather",
        "self.accelerator.reduce(means, 'mean')",
        "PartialState().wait_for_everyone()",
        "norm.full_tensor()",
    ],
)
def test_a_collective_is_recognised(line):
    assert ELSEWHERE.search(line)


def test_collectives_are_in_one_file():
    files = [*PACKAGE.rglob("*.py"), PACKAGE.with_name("train_pico.py")]
    found = {
        f"{file.relative_to(PACKAGE.parent)}: {match[0]}"
        for file in files
        for match in ELSEWHERE.finditer(file.read_text())
        if file != PACKAGE / "distributed.py"
    }
    assert not found
