"""
Every block of the README and of `docs/` is run, on tiny models and data under the names that it uses; what cannot be
run here is parsed. So are the commands of the other pages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import backbone_families
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from readme_blocks import (
    DOCUMENTATION,
    PAGES,
    ROOT,
    Block,
    blocks,
    check,
    extras,
    pins,
    shell_commands,
    split_launch,
)

import train_pico
from modeling_pico import PicoModel, export
from modeling_pico.search import __main__ as search


styled_shapes = sys.modules["modeling_pico.data.styled_shapes"]

BLOCKS = [block for page in DOCUMENTATION for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [words for page in DOCUMENTATION for words in shell_commands(page)]
# Why a command is parsed alone, by something that only such commands hold.
NOT_RUN = {
    "pip install": "installs from the network",
    "pytest": "is all tests",
    "--multi_gpu": "starts two processes: tests/distributed",
    "examples/accelerate/": "wants two GPUs: tests/examples/test_accelerate.py",
    "examples/flickr30k.yaml": "wants Flickr30K: tests/examples/test_examples.py runs the recipe",
    "mscoco": "wants MS-COCO: tests/examples/test_examples.py runs the recipe and its second command",
    "tests/benchmarks/": "takes minutes: tests/test_benchmarks.py runs each with --quick",
    "--align_gallery": "wants more images than are made here: tests/test_train_pico.py aligns",
    "modeling_pico.search serve": "serves until it is interrupted: tests/search/test_page.py",
    "style_study/study.py": "tests/examples/test_style_study.py compares its report with the pages",
}
MODULES = {"modeling_pico.export": export.main, "modeling_pico.search": search.main}
QUIET = shlex.split("--log_level error --disable_tqdm true --plots false")
# What makes a recipe small; blocks with settings of their own are run as they are.
SMALL = shlex.split("--per_device_train_batch_size 8 --num_train_epochs 3 --num_style_prototypes 3")


RUN = [words for words in COMMANDS if not any(part in " ".join(words) for part in NOT_RUN)]


class World:
    """A folder in which the names of the pages exist; commands and blocks run in it, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results: dict[str, Any] = {}
        # Where a training was moved to: two that claim to be the same write to one folder.
        self.trainings: dict[str, Path] = {}
        backbone_families.save("clip", folder / "openai" / "clip-vit-base-patch32")
        (folder / "examples").symlink_to(ROOT / "examples")
        pictures = [Image.fromarray(tiny.pixels(number)) for number in range(90)]
        names = ["a.png", "b.png", "Pictures/a.png", "Pictures/b.jpg"]
        names += [f"new_style/{number}.png" for number in range(40)]
        for name, picture in zip(names, pictures, strict=False):
            (folder / name).parent.mkdir(exist_ok=True)
            picture.save(folder / name)
        (line,) = (json.loads(block.code) for block in BLOCKS if block.language == "json")
        for name, first in (
            ("user/my_captions", {"file_name": "0.png", "captions": ["a star"]}),
            ("my_pictures", line),
        ):
            # More than a batch to train on.
            for split, rows in (("train", slice(72)), ("validation", slice(72, 81)), ("test", slice(81, 90))):
                write_split(folder / name / split, first, pictures[rows])

    def run(self, words: list[str]) -> Any:
        """Runs a command, in this process."""
        key = shlex.join(words)
        if key not in self.results:
            launch, (script, *arguments) = split_launch(words)
            arguments = [word.replace("~", str(self.folder)) for word in arguments]
            if script == "train_pico.py":
                assert launch is None or launch.num_processes in (None, 1)
                small = SMALL if "examples/quickstart.yaml" in arguments else []
                self.results[key] = train_pico.main([*arguments, *small, *QUIET])
            elif script == "-m":
                self.results[key] = MODULES[arguments[0]](arguments[1:])
            else:
                raise AssertionError(words)
            self._put_away(key)
        return self.results[key]

    def execute(self, block: Block) -> dict[str, Any]:
        """Executes a block after those above it on its page; returns the names that they leave."""
        key = str(block)
        if key not in self.results:
            above = [part for part in blocks(block.page) if part.language == "python" and part.line < block.line]
            names = dict(self.execute(above[-1])) if above else {}
            # Lines as on the page, for tracebacks.
            exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
            self.results[key] = names
            self._put_away(key)
        return self.results[key]

    def _put_away(self, key: str) -> None:
        if (self.folder / "outputs" / "my_clip").exists():
            self.trainings[key] = self.folder / "outputs" / f"my_clip_{len(self.results)}"
            (self.folder / "outputs" / "my_clip").rename(self.trainings[key])


def write_split(folder: Path, first: dict[str, Any], pictures: list[Image.Image]) -> None:
    """A folder of pictures with `metadata.jsonl`, of which `first` is the first line."""
    folder.mkdir(parents=True)
    names = ["red circle above", "blue star", "two green square on the circle"]
    rows = [{"file_name": f"{row}.png", "captions": [f"a {names[row % 3]}", f"{row}"]} for row in range(len(pictures))]
    rows[0] = first
    for row, picture in zip(rows, pictures, strict=True):
        picture.save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


class Hub:
    """Takes the place of `HfApi`: what is uploaded lies in a folder of the repository's name."""

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list, **options: Any) -> None:
        for operation in operations:
            Path(repo_id).mkdir(exist_ok=True)
            Path(repo_id, operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())


@pytest.fixture(scope="module")
def world(tmp_path_factory, no_progress_bars) -> Iterator[World]:
    folder, before = tmp_path_factory.mktemp("world"), os.getcwd()
    os.chdir(folder)
    with (
        mock.patch.dict(styled_shapes.SPLITS, dict.fromkeys(styled_shapes.SPLITS, 16)),
        mock.patch("datasets.config.HF_DATASETS_CACHE", folder / "cache_of_datasets"),
        mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules")),
        mock.patch("transformers.utils.hub.hf_api", Hub),
        mock.patch("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# Card")),
        # It would download the tasks; tests/evaluation/test_mteb_encoder.py evaluates.
        mock.patch("mteb.evaluate", lambda model, tasks, cache: sorted(task.metadata.name for task in tasks)),
    ):
        made = World(folder)
        # What later blocks build upon.
        for words in COMMANDS:
            if words[-1] == "examples/quickstart.yaml" or "modeling_pico.export" in words or words[3:4] == ["build"]:
                made.run(words)
        yield made
    os.chdir(before)


@pytest.mark.parametrize("words", RUN, ids=shlex.join)
def test_command(world, words):
    result = world.run(words)
    if "train_pico.py" in words:
        assert result
    if "--sheet" in words:
        assert len(result["hits"]) == 2 and (world.folder / "hits.png").is_file()


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(world, block):
    names = world.execute(block)
    if "score" in names:  # of the ONNX files and numpy alone
        with torch.no_grad():
            inputs = names["processor"](images=["a.png"], text=["a red circle"], return_tensors="pt")
            outputs = names["model"](**inputs)
        expected = (outputs.logits_per_image / outputs.logit_scale).item()
        assert float(names["score"]) == pytest.approx(expected, abs=1e-4)
    if "MtebEncoder" in block.code:
        assert names["results"] == ["Flickr30kI2TRetrieval", "Flickr30kT2IRetrieval"]


def test_the_command_and_the_python_that_are_the_same_train_the_same(world):
    (words,) = (words for words in COMMANDS if {"user/my_captions", "--do_train"} <= set(words))
    (block,) = (block for block in PYTHON if "user/my_captions" in block.code and "trainer.train()" in block.code)
    world.run(words)
    world.execute(block)
    command, python = world.trainings[shlex.join(words)], world.trainings[str(block)]
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (command, python)]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert (command / "README.md").is_file() and (python / "README.md").is_file()
    logs = []
    for folder in (command, python):
        log = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
        logs.append(
            [{name: value for name, value in row.items() if not name.endswith(("time", "second"))} for row in log]
        )
    assert logs[0] == logs[1] and sum("eval_rsum" in row for row in logs[0]) == 10
    # First prototypes at the second epoch, updates from the fourth on.
    assert [row["prototype_stage"] for row in logs[0] if "prototype_stage" in row] == [1, 2, 2, 2, 2, 2, 2]


def test_the_snippets_of_a_card_load_the_model_that_it_is_of(world):
    for name in ("first.jpg", "second.jpg"):
        Image.fromarray(tiny.pixels(0)).save(world.folder / name)
    card = world.folder / "outputs" / "quickstart" / "README.md"
    installed, remote = (block for block in blocks(str(card)) if block.language == "python")
    assert world.execute(installed)["scores"].shape == (2, 3)
    assert 'from_pretrained("outputs/quickstart"' in remote.code and world.execute(remote)["model"]
    # The card in the repository is that of the same command.
    assert [block.code for block in blocks("model_cards/quickstart.md")[:2]] == [installed.code, remote.code]


def test_your_own_pictures_get_prototypes_that_are_updated(world):
    (words,) = (words for words in COMMANDS if "my_pictures" in words)
    world.run(words)
    assert PicoModel.from_pretrained("outputs/my_pictures").style_prototypes["image"].stage == 2


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_every_page_can_be_read(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in shell_commands(page):
        check(words)


def test_layouts_of_data_are_read_by_options_that_exist():
    options = re.findall(r"\| `(--dataset_name .*)` \|$", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE)
    assert len(options) == 14
    for words in map(shlex.split, options):
        _, data_args, _ = train_pico.parse_arguments([*words, "--use_cpu", "true"])
        assert data_args.dataset_name == words[1]


def test_what_is_not_run_is_there():
    commands = [" ".join(words) for words in COMMANDS]
    assert [part for part in NOT_RUN if not any(part in command for command in commands)] == []
    assert {block.language for block in BLOCKS} == {"bash", "python", "json", "bibtex", "text"}
    # The second command of the README is what continuous integration runs.
    assert blocks("README.md")[1].code.strip() in (ROOT / ".ci" / "run").read_text().splitlines()


def test_pins_fit_every_extra():
    pinned = pins()
    asked = [
        requirement
        for of_extra in extras().values()
        for requirement in of_extra
        if requirement.name != "modeling-pico"
    ]
    wrong = [
        str(requirement)
        for requirement in asked
        if not requirement.specifier.contains(pinned.get(requirement.name, "0"))
    ]
    assert wrong == []


def test_a_commit_is_checked_by_the_ruff_of_continuous_integration():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    wanted = [hook["additional_dependencies"] for hook in repository["hooks"]]
    assert wanted == [[f"ruff=={pins()['ruff']}"]] * 2


def test_the_workflow_of_github_is_that_of_continuous_integration():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
