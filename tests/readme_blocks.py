"""Code blocks of the project's Markdown, and what their commands mean: where they lie, and how they are parsed."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tomllib
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

from modeling_pico.script.arguments import parse_arguments


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "model_cards/*.md", "examples/*/README.md", "tests/benchmarks/README.md")
    for path in ROOT.glob(pattern)
)
# Those whose blocks are run.
DOCUMENTATION = ["README.md", *(page for page in PAGES if page.startswith("docs/"))]


@dataclass(frozen=True)
class Block:
    """A code block: its page, the line where its code begins, its language and the code."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """All code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})(\w+)\n(.*?)^\1$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start()].count("\n") + 2, match[2], match[3]) for match in found]


# Takes the place of each command that pages use: prints its words.
_RECORD = r"""
for name in accelerate cp pip pytest python; do
  eval "$name() { printf '%s\037' $name \"\$@\"; printf '\036'; }"
done
"""


def shell_commands(page: str) -> list[list[str]]:
    """The words of all commands of a page, as a shell gives them to the programs."""
    script = _RECORD + "".join(block.code for block in blocks(page) if block.language in ("bash", "shell"))
    # Nothing else is found, and nothing is expanded but what the page says.
    environment = {"PATH": "/nonexistent", "HOME": "~"}
    result = subprocess.run(
        [shutil.which("bash") or "bash", "-euf", "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [command.split("\x1f")[:-1] for command in result.stdout.split("\x1e")[:-1]]


def split_launch(words: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """What a command says to `accelerate launch`, if it does, and the script with its arguments."""
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        return launch, [launch.training_script, *launch.training_script_args]
    assert words[0] == "python", words
    return None, words[1:]


def check(words: list[str]) -> None:
    """Fails on a command whose script does not exist or takes other arguments."""
    if words[0] == "pip":
        check_installation(words)
    elif words[0] in ("pytest", "cp"):
        named = [word for word in words[1:] if word.startswith(("tests/", "model_cards/"))]
        assert all((ROOT / name).is_file() for name in named), words
    else:
        _, (script, *arguments) = split_launch(words)
        if script == "train_pico.py":
            parse_arguments([*arguments, "--use_cpu", "true"])  # bfloat16 is refused on a CPU that was not asked for
        elif script == "-m":
            spec = importlib.util.find_spec(arguments[0])
            name = (
                f"{spec.name}.__main__" if spec.submodule_search_locations else spec.name
            )  # as Python runs a package
            reads_arguments(importlib.import_module(name).main, arguments)
        else:
            folder = str((ROOT / script).parent)
            with mock.patch.object(sys, "path", [folder, *sys.path]):
                reads_arguments(lambda: runpy.run_path(script, run_name="__main__"), [script, *arguments])


class _Parsed(Exception):
    """Ends a script when it has read its arguments."""


def reads_arguments(script: Callable[[], object], words: list[str]) -> None:
    """Runs a script until it has read its arguments; fails if it does not take them."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: None = None) -> None:
        parse_args(parser, args, namespace)
        raise _Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ),
    ):
        try:
            script()
        except _Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"{words[0]} does not take {words[1:]}") from error
    raise AssertionError(f"{words[0]} reads no arguments")


def extras() -> dict[str, list[Requirement]]:
    """What each extra of the package asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: list(map(Requirement, asked)) for name, asked in project["optional-dependencies"].items()}


def pins() -> dict[str, str]:
    """The version of each package in `constraints.txt`, by its normal name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }


def check_installation(words: list[str]) -> None:
    """Fails on an installation that leaves the constraints out or names an extra that does not exist."""
    arguments = [word for word in words[2:] if word != "-q"]
    if arguments == ["--no-deps", "-e", "."]:
        return
    if arguments[0] == "--no-deps":
        assert [len(Requirement(word).specifier) for word in arguments[1:]] == [1], words
        return
    if "-e" not in arguments:
        assert arguments[:2] == ["-c", "constraints.txt"] and set(arguments[2:]) <= pins().keys(), words
        return
    *constraints, editable, target = arguments
    assert constraints == ["-c", "constraints.txt"] and editable == "-e", words
    assert Requirement(f"modeling-pico{target.removeprefix('.')}").extras <= extras().keys(), words
