"""The faults of `tests/faults.py` fit the sources as they are."""

from __future__ import annotations

import ast

import pytest
from faults import FAULTS, REPOSITORY, Fault, planted


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_changes_one_place_and_names_tests_that_exist(fault):
    source = (REPOSITORY / fault.file).read_text(encoding="utf-8")
    changed = planted(fault, REPOSITORY)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (REPOSITORY / file).read_text(encoding="utf-8")


def test_names_are_given_once():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 40


@pytest.mark.parametrize(("old", "found"), [("nowhere to be found", 0), ("import ", 2)])
def test_a_text_that_is_not_there_once_is_an_error(tmp_path, old, found):
    (tmp_path / "file.py").write_text("import os\nimport sys\n")
    with pytest.raises(ValueError, match=f"'gone' replaces a text that is {found} times in file.py"):
        planted(Fault("gone", "", "file.py", old, "", ()), tmp_path)
