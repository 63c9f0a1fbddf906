"""
Runs transformers' own model tests, which are in its source archive only, on PICO: `pytest -m upstream`.

Opt-in because it needs the network (or `PICO_TRANSFORMERS_SDIST`, the path of `transformers-VERSION.tar.gz`) and
because any release of transformers may change its tests. What is skipped, and why, stands in `suite_pico.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers


ROOT = Path(__file__).resolve().parents[2]
# The tests import three modules that the archive leaves out.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'output_hidden_states': True}\n",
}


def source_archive(cache: Path) -> Path:
    """The archive of the installed version: given, downloaded earlier, or downloaded now."""
    if given := os.environ.get("PICO_TRANSFORMERS_SDIST"):
        return Path(given)
    archive = cache / f"transformers-{transformers.__version__}.tar.gz"
    if not archive.exists():
        options = ["--no-deps", "--no-build-isolation", "--no-binary", "transformers", "--dest", str(cache)]
        requirement = f"transformers=={transformers.__version__}"
        download = [sys.executable, "-m", "pip", "download", "-q", *options, requirement]
        result = subprocess.run(download, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"{requirement} cannot be downloaded; set PICO_TRANSFORMERS_SDIST. {result.stderr[-300:]}")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the archive's `tests` into `folder`, with what they lack and with PICO's."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        for member in members:
            member.name = member.name.split("/", 1)[1]
        tar.extractall(folder, members=members, filter="data")
    tests = folder / "tests"
    for name, text in STUBS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        (tests / name).write_text(text, encoding="utf-8")
    shutil.copy(Path(__file__).parent / "suite_pico.py", tests / "test_pico.py")
    return tests


@pytest.mark.upstream
def test_transformers_own_model_tests(request, tmp_path, capsys):
    pytest.importorskip("parameterized", reason="pip install parameterized: transformers' tests import it")
    archive = source_archive(request.config.cache.mkdir("transformers"))
    tests = unpack(archive, tmp_path)
    report = tmp_path / "report.xml"
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    result = subprocess.run(
        [*command, f"--rootdir={tmp_path}", f"--junitxml={report}", str(tests / "test_pico.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), result.stdout[-3000:] + result.stderr[-3000:]
    outcomes = {"passed": [], "skipped": [], "failed": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "skipped" if "skipped" in kinds else "failed" if kinds & {"failure", "error"} else "passed"
        outcomes[outcome].append(f"{case.get('classname').split('.')[-1]}.{case.get('name')}")
    with capsys.disabled():
        counts = ", ".join(f"{len(names)} {outcome}" for outcome, names in outcomes.items())
        sys.stdout.write(f"\ntransformers {transformers.__version__}: {counts}\n")
    assert not outcomes["failed"], "\n".join(outcomes["failed"]) + result.stdout[-6000:]
    assert len(outcomes["passed"]) > 60
