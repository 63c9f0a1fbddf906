"""Links between the project's pages, and to headings on them, lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_blocks import PAGES, ROOT


markdown_it = pytest.importorskip("markdown_it")
READER = markdown_it.MarkdownIt("commonmark").enable("table")


def links(page: Path) -> Iterator[str]:
    """Targets of all links and images of a page that are not on the network."""
    for token in READER.parse(page.read_text(encoding="utf-8")):
        for part in token.children or []:
            target = str(part.attrs.get("href") or part.attrs.get("src") or "")
            if target and not re.match(r"[a-z]+:", target):
                yield target


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them: lower case, hyphens for spaces, no punctuation."""
    tokens = READER.parse(page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(part.content for part in inline.children)
            anchor = name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = 0
            while anchor in found:
                count += 1
                anchor = f"{name}-{count}"
            found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for link in links(ROOT / page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if (
            not target.exists()
            or not target.resolve().is_relative_to(ROOT)
            or (anchor and (target.suffix != ".md" or anchor not in anchors(target)))
        ):
            broken.append(link)
    assert broken == []


def test_every_page_of_the_documentation_is_reached_from_the_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        page = ROOT / ahead.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            ahead += [str((page.parent / link.partition("#")[0]).resolve()) for link in links(page) if link[0] != "#"]
    assert {ROOT / page for page in PAGES if page.startswith("docs/") or "/" not in page} <= reached


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# What's `new`?\n\n## Two words\n\n## Two words\n\n```\n# no heading\n```\n\n## style_rates\n")
    assert anchors(page) == {"whats-new", "two-words", "two-words-1", "style_rates"}
