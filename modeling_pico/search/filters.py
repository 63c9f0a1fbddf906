"""What `where` says, in a form that every database is asked in."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


Value = str | int | float | bool
# What columns that can be filtered by hold, and what they are compared with.
KINDS: dict[str, Any] = {"text": str, "integer": (int, float), "number": (int, float), "truth": bool}
OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in")
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])"""
    r"""|(?P<name>[^\W\d]\w*)|`(?P<quoted>[^`]+)`|(?P<sign><=|>=|!=|<>|==|=|<|>|\(|\)|,))"""
)


@dataclass(frozen=True)
class Condition:
    """A column, an operator of `OPERATORS`, and the value or, for `in`, the values that it is compared with."""

    column: str
    operator: str
    value: Any


def parse_where(where: str | Mapping[str, Any] | None, columns: Mapping[str, str]) -> list[Condition]:
    r"""
    Reads a filter.

    Args:
        where (`str` or `Mapping[str, Any]`, *optional*):
            Comparisons that must all hold, as in SQL: `"style = 'ink' and year >= 1990 and topic in ('a', 'b')"`. Or
            the value, or the list of values, that each column must have: `{"style": "ink", "topic": ["a", "b"]}`.
        columns (`Mapping[str, str]`): The columns that there are, with the kind of each: a key of [`KINDS`].

    Raises:
        ValueError: if it cannot be read, a column does not exist or holds something else; the message names the
            columns that there are.
    """
    if where is None:
        return []
    known = {name: kind for name, kind in columns.items() if kind in KINDS}
    if isinstance(where, Mapping):
        conditions = [
            Condition(name, "in" if isinstance(value, (list, tuple)) else "=", value) for name, value in where.items()
        ]
    else:
        conditions = _parse(where, known)
    return [_checked(condition, known) for condition in conditions]


def _checked(condition: Condition, known: Mapping[str, str]) -> Condition:
    """The condition with values as the column holds them."""
    column, operator, value = condition.column, condition.operator, condition.value
    if column not in known:
        raise ValueError(f"There is no column {column!r} to filter by. {_columns(known)}")
    kind = known[column]
    values = [_as_kind(one, kind) for one in (value if operator == "in" else [value])]
    if not values or None in values:
        raise ValueError(f"The column {column!r} ({kind}) cannot be compared with {value!r}. {_columns(known)}")
    if kind in ("text", "truth") and operator not in ("=", "!=", "in"):
        raise ValueError(f"The column {column!r} ({kind}) is compared by =, != and in alone, not by {operator}.")
    return Condition(column, operator, values if operator == "in" else values[0])


def _as_kind(value: Any, kind: str) -> Any:
    """A value as columns of a kind hold it; None for what they cannot be compared with."""
    value = value.item() if isinstance(value, np.generic) else value
    # True is an integer to Python.
    if not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind == "truth"):
        return None
    if kind == "integer":
        return int(value) if -(2**63) <= value < 2**63 and value == int(value) else None
    if kind == "number":
        return float(value) if abs(value) <= sys.float_info.max else None
    return value


def _columns(known: Mapping[str, str]) -> str:
    if not known:
        return "The index has no columns to filter by."
    return f"The columns are: {', '.join(f'{name} ({kind})' for name, kind in sorted(known.items()))}."


def _parse(where: str, known: Mapping[str, str]) -> list[Condition]:
    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"The filter {where!r} cannot be read: {reason}. It is made of comparisons such as \"style = 'ink'\", "
            f"\"year >= 1990\" or \"topic in ('a', 'b')\", joined by `and`. {_columns(known)}"
        )

    tokens: list[tuple[str, str]] = []
    place, end = 0, len(where.rstrip())
    while place < end:
        found = _TOKEN.match(where, place)
        if found is None:
            raise refuse(f"there is {where[place:].strip()[:20]!r}")
        tokens.append((str(found.lastgroup), str(found[str(found.lastgroup)])))
        place = found.end()

    def take(*kinds: str, what: str) -> tuple[str, str]:
        if not tokens or tokens[0][0] not in kinds:
            raise refuse(f"{what} is missing {f'before {tokens[0][1]!r}' if tokens else 'at the end'}")
        return tokens.pop(0)

    def take_value() -> Value:
        kind, text = take("text", "number", "name", what="a value (texts stand in single quotes)")
        if kind == "text":
            return text[1:-1].replace("''", "'")
        if kind == "number":
            return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
        if text.lower() not in ("true", "false"):
            raise refuse(f"{text!r} is no value; texts stand in single quotes")
        return text.lower() == "true"

    def take_sign(*signs: str) -> str:
        kind, text = take("sign", "name", what=f"one of {', '.join(signs)}")
        text = {"==": "=", "<>": "!="}.get(text.lower(), text.lower())
        if text not in signs:
            raise refuse(f"{text!r} stands where one of {', '.join(signs)} must")
        return text

    conditions = []
    while True:
        _, column = take("name", "quoted", what="a column")
        operator = take_sign(*OPERATORS)
        if operator == "in":
            take_sign("(")
            values = [take_value()]
            while take_sign(",", ")") == ",":
                values.append(take_value())
            conditions.append(Condition(column, operator, values))
        else:
            conditions.append(Condition(column, operator, take_value()))
        if not tokens:
            return conditions
        take_sign("and")


__all__ = ["KINDS", "OPERATORS", "Condition", "parse_where"]
