"""A parser of the fields of dataclasses: a value in a file is parsed as the flag of its name would be."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


class OptionParser(HfArgumentParser):
    r"""
    Parses flags, or a YAML or JSON file followed by flags that override it. Mistakes are ValueErrors of one line.

    Args:
        kinds (`Sequence[type]`): Dataclasses whose fields are the options.
        hidden (`Collection[str]`): Names of options that the help leaves out.
    """

    def __init__(self, kinds: Sequence[Any], hidden: Collection[str] = ()):
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        super().__init__(
            kinds,
            allow_abbrev=False,
            usage="train_pico.py [FILE.yaml] [--option VALUE ...]",
            description="Fine-tunes a vision-language model for image-text retrieval with PICO. Options come from a "
            "YAML or JSON file (`name: value`), from flags, or from a file and flags that override it.",
            formatter_class=_Help,
        )
        self.add_argument("--help-all", action="help", help="Show all options of transformers as well.")
        for action in self._actions:
            if action.dest in hidden or action.const is False:  # the latter are --no_name beside --name
                action.help = argparse.SUPPRESS
            elif action.default not in (None, argparse.SUPPRESS, "", []):
                action.help = f"{action.help} (default: {shown(action.default)})"
            kind: Any = action.type
            if dict in (kind, get_origin(kind)):
                action.type = json.loads
            elif kind in (int, float) and NoneType in get_args(hints[action.dest]):
                action.type = _number_or_none(kind)

    def error(self, message: str) -> Any:
        """Raises what argparse prints with its usage."""
        raise ValueError(message)

    def parse(self, argv: Sequence[str]) -> Any:
        """An instance of each dataclass, from flags, or from a file followed by flags that override it."""
        words = list(argv)
        if words and words[0].endswith((".yaml", ".yml", ".json")):
            path = Path(words.pop(0))
            try:
                of_file = self._words(path.read_text(encoding="utf-8"))
                self._check(of_file)
            except (ValueError, RecursionError, yaml.YAMLError) as error:
                raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
            words = of_file + words
        self._check(words)
        return self.parse_args_into_dataclasses(words, look_for_args_file=False)

    def _check(self, words: Sequence[str]) -> None:
        unknown = self.parse_known_args(words)[1]
        if unknown:
            # The value after an unknown option may be a secret whose name was mistyped.
            name = unknown[0].partition("=")[0]
            names = [action.dest for action in self._actions]
            close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), names)
            hint = f"Did you mean {', '.join(close)}?" if close else "See --help."
            if not name.startswith("-"):
                hint = "A file with options comes first."
            raise ValueError(f"There is no option {name}. {hint}")

    def _words(self, text: str) -> list[str]:
        """The options of a YAML or JSON text as flags, each value as it is written there."""
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("expected options as `name: value`")
        names = [key.value for key, _ in root.value]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"options are stated twice: {', '.join(sorted(repeated))}")
        none_by_default = {action.dest for action in self._actions if action.default is None}
        words = []
        for name, (_, node) in zip(names, root.value, strict=True):
            if isinstance(node, yaml.MappingNode):
                words.append(f"--{name}={json.dumps(loader.construct_object(node, deep=True), default=str)}")
            elif isinstance(node, yaml.SequenceNode):
                words += [f"--{name}", *(str(item.value) for item in node.value)]
            elif node.tag != "tag:yaml.org,2002:null":
                words.append(f"--{name}={node.value}")
            elif name not in none_by_default:
                words.append(f"--{name}=none")
        return words


class _Loader(yaml.SafeLoader):
    """Takes for numbers what YAML 1.2 and JSON do (1e-3), and no aliases that grow."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and isinstance(node, yaml.CollectionNode):
            line = node.start_mark.line + 1
            raise ValueError(
                f"an alias stands for the list or mapping of line {line}; it may stand for one value only"
            )
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Help(argparse.HelpFormatter):
    """One spelling of each option: the one with hyphens is accepted as well."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = self._format_args(action, "VALUE") if action.nargs != 0 else ""
        return f"{action.option_strings[0]} {value}".rstrip()


def _number_or_none(kind: type) -> Callable[[str], float | None]:
    """What `kind` makes of a flag's value, and None of the word none: in a file that is `null`."""

    def convert(text: str) -> float | None:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its errors
    return convert


def shown(value: Any) -> str:
    """A value as it is written behind its flag."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


__all__ = ["OptionParser", "shown"]
