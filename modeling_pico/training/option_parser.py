"""A parser of the fields of dataclasses: a value of a file is parsed as the flag of its name would be."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


def number_or_none(kind: type) -> Callable[[str], float | None]:
    """What `kind` makes of a flag's value, and None of the word none: in a file that is `null`."""

    def convert(text: str) -> float | None:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its errors
    return convert


def mapping(text: str) -> Any:
    """A mapping in JSON, or the path of a file."""
    return json.loads(text) if text.startswith("{") else text


class OptionParser(HfArgumentParser):
    r"""
    Parses flags, or a file and flags that override it. Mistakes are ValueErrors of one line.

    Args:
        kinds (`Sequence[type]`): Dataclasses whose fields are the options.
        groups (`Mapping[str, tuple[str | None, Sequence[str]]]`):
            Groups of the help: their titles, with a description and the names of their options. Of two groups that
            name an option, the later one has it.
        folded (`str`): Title of the group of all others, which only `--help-all` shows.
        helps (`Mapping[str, str]`): Helps that replace those of the fields.
        show_all (`bool`, *optional*, defaults to `False`): Whether the help shows the folded ones.
    """

    def __init__(
        self,
        kinds: Sequence[Any],
        groups: Mapping[str, tuple[str | None, Sequence[str]]],
        folded: str,
        helps: Mapping[str, str],
        show_all: bool = False,
    ):
        super().__init__(
            (),
            add_help=False,
            allow_abbrev=False,
            usage="train_pico.py [FILE.yaml] [--option VALUE ...]",
            description="Fine-tunes a vision-language model for image-text retrieval with PICO. Options come from a "
            "YAML or JSON file (`name: value`), from flags, or from a file and flags that override it.",
            formatter_class=_Help,
        )
        self.show_all, self.helps = show_all, helps
        self.dataclass_types = kinds
        self.hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        help_group = self.add_argument_group("help")
        help_group.add_argument("-h", "--help", action="help", help="Show this help.")
        help_group.add_argument("--help-all", action="help", help="Show all options of transformers as well.")
        self._group_of: dict[str, argparse._ArgumentGroup] = {}
        for title, (description, names) in groups.items():
            group = self.add_argument_group(title, description)
            self._group_of.update(dict.fromkeys(names, group))  # the later group counts
        self._folded = self.add_argument_group(folded, None if show_all else "--help-all shows them.")
        for kind in kinds:
            self._add_dataclass_arguments(kind)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        """Puts an option into its group, with a help that is worth its lines."""
        name = names[0].lstrip("-")
        negates = options.get("action") == "store_false"  # --no_name beside --name
        hint = self.hints[options.get("dest", name)]
        group = self._group_of.get(options.get("dest", name), self._folded)
        options["help"] = self.helps.get(name, options["help"])
        if options.get("default") not in (None, "", []):
            options["help"] += f" (default: {shown(options['default'])})"
        if negates or (group is self._folded and not self.show_all):
            options["help"] = argparse.SUPPRESS
        if not negates:
            choices: Any = options.get("choices") or ()
            options["metavar"] = (
                "{" + ",".join(choices) + "}" if 0 < len(choices) < 9 else _METAVARS.get(hint, "VALUE")
            )
            if _allows(hint, dict):
                options["type"] = mapping
            elif options.get("type") in (int, float) and NoneType in get_args(hint):
                options["type"] = number_or_none(options["type"])
        return group.add_argument(*names, **options)

    def error(self, message: str) -> Any:
        """Raises what argparse prints with its usage."""
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
        if "expected one argument" in message:
            message += "; a value that begins with a dash is given as --name=-value"
        raise ValueError(message)

    def parse(self, argv: Sequence[str]) -> Any:
        """An instance of each dataclass, from flags, or from a file followed by flags that override it."""
        if argv and _is_file(argv[0]):
            self.set_defaults(**self._read(Path(argv[0])))
            argv = argv[1:]
        unknown = self.parse_known_args(argv)[1]
        if unknown:
            # The value after an unknown option may be a secret whose name was mistyped.
            words = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            if words:
                raise ValueError(f"There is no option {words[0]}.{self._suggestion(words[0], '--')}")
            place = " The file with options comes first." if _is_file(unknown[0]) else ""
            raise ValueError(f"{unknown[0]!r} belongs to no option.{place}")
        return self.parse_args_into_dataclasses(argv, look_for_args_file=False)

    def _suggestion(self, name: str, dashes: str = "") -> str:
        close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), self.hints, n=3)
        return f" Did you mean {', '.join(dashes + found for found in close)}?" if close else " See --help."

    def _read(self, path: Path) -> dict[str, Any]:
        """The options of a file, each as its flag would be parsed."""
        if not path.is_file():
            raise ValueError(f"The configuration file {str(path)!r} does not exist.")
        values = {}
        for name, value in read_options(path).items():
            if name not in self.hints:
                raise ValueError(f"{path}: unknown option {name!r}.{self._suggestion(name)}")
            try:
                values[name] = self._value(name, value)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return values

    def _value(self, name: str, value: Any) -> Any:
        hint = self.hints[name]
        if value is None or isinstance(value, dict):
            if not _allows(hint, NoneType if value is None else dict):
                raise ValueError(f"{name} must have a value{'' if value is None else ', not a mapping'}.")
            return value
        if isinstance(value, list):
            if not _allows(hint, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} must have one value, not a list.")
            parsed = [self._flag(name, item) for item in value]
            return [part for item in parsed for part in (item if isinstance(item, list) else [item])]
        return self._flag(name, value)

    def _flag(self, name: str, text: str) -> Any:
        return getattr(self.parse_known_args([f"--{name}={text}"])[0], name)


class _Help(argparse.HelpFormatter):
    """One spelling of each option: the one with hyphens is accepted as well."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1] if action.option_strings[0] == "-h" else action.option_strings[0]
        return f"{name} {action.metavar or ''}".rstrip()


_METAVARS: dict[Any, str] = {
    bool: "{true,false}",
    bool | None: "{true,false}",
    **dict.fromkeys((int, float, int | None, float | None), "NUMBER"),
    str: "TEXT",
    str | None: "TEXT",
    list[str]: "TEXT ...",
    list[str] | None: "TEXT ...",
}


def _allows(hint: Any, kind: type) -> bool:
    return kind in {get_origin(part) or part for part in (hint, *get_args(hint))}


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml", ".json")) and not word.startswith("-")


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 and JSON write them (1e-3), and no aliases that grow."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            if isinstance(self.anchors.get(event.anchor), yaml.CollectionNode):
                problem = f"the alias *{event.anchor} stands for a list or a mapping; it may stand for one value only"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_options(path: Path) -> dict[str, Any]:
    """
    Options of a YAML or JSON file: single values as the text that stands there, `null` as None, lists as lists of
    texts, and nested mappings with the types of YAML.

    Raises:
        ValueError: if it is neither, states an option twice, or an alias stands for more than one value.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            kind = "list" if isinstance(root, yaml.SequenceNode) else "text"
            raise ValueError(f"expected options as `name: value`, but found a {kind}")
        options: dict[str, Any] = {}
        for key, value in root.value:
            if key.value in options:
                raise ValueError(f"the option {key.value!r} is stated twice (line {key.start_mark.line + 1})")
            options[key.value] = _plain(loader, value)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ValueError(f"{path}: {error.problem}{line}.") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}.") from error
    return options


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item) for item in node.value]
    return loader.construct_object(node, deep=True)


def shown(value: Any) -> str:
    """A value as it is written behind its flag."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


__all__ = ["OptionParser", "read_options", "shown"]
