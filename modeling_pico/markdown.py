"""What cards and reports take from data and configuration, as Markdown that can be nothing but text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


# Letters, numbers and what opens neither markup nor a link; underscores only within words.
_PLAIN = re.compile(r"(?:(?<=\w)_+(?=\w)|[^\W_]|[ .,/+–()%=-])*")
_LINK = re.compile(r"\bwww\.", re.IGNORECASE)


def escape_markdown(text: object) -> str:
    r"""
    A value as one line of Markdown that shows it as it is, in running text, a heading, a link's text or a table cell.

    Plain words stay as they are. Anything else becomes code, in which no dialect of Markdown looks for images, links
    (those of bare addresses as well, which no backslash prevents everywhere), HTML or formulas.

    Args:
        text (`object`): The value, of which `str` is shown; runs of white space count as one space.

    Returns:
        `str`

    Example:

    ```python
    >>> escape_markdown("validation_seen"), escape_markdown("![x](http://a.b)"), escape_markdown("a|*b*")
    ('validation_seen', '`![x](http://a.b)`', '`a`\\|`*b*`')
    ```
    """
    line = " ".join(str(text).split())
    if _PLAIN.fullmatch(line) and not _LINK.search(line):
        return line
    # A table ends its cell at a bar even in code, and only there takes the backslash away: so bars stand outside.
    return "\\|".join(_code(part) for part in line.split("|"))


def _code(text: str) -> str:
    if not text:
        return ""
    fence = code_fence(text, shortest=1)
    # Of code between two spaces, both are taken away.
    space = " " if "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_fence(code: str, shortest: int = 3) -> str:
    """Backticks around `code` that no run of them in it can end; at least `shortest`."""
    return "`" * max(shortest, 1 + max(map(len, re.findall("`+", code)), default=0))


def signed_number(value: float, digits: int = 1) -> str:
    """A number with its sign, `"+1.5"`; what rounds to zero is `"+0.0"`, from whichever side."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def number_cell(value: float | None, form: Callable[[float], str] = "{:.1f}".format) -> str:
    """A number in a table, or a dash where there is none."""
    return "–" if value is None else form(value)


def markdown_table(title: str, rows: Mapping[str, Mapping[str, str]]) -> str:
    """One line for each row, with its name under `title`; the other columns are those of the first row."""
    headers = [title, *next(iter(rows.values()))]
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)]]
    lines += [[escape_markdown(name), *cells.values()] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = ["code_fence", "escape_markdown", "markdown_table", "number_cell", "signed_number"]
