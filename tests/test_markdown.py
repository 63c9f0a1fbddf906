"""What comes from data and configuration is text in every Markdown that is written, and nothing but text."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, ViTConfig

from modeling_pico import PicoConfig
from modeling_pico.evaluation import StyleReport
from modeling_pico.evaluation.style_report import StyleRetrieval
from modeling_pico.markdown import code_fence, escape_markdown, signed_number
from modeling_pico.training.model_card import create_model_card


markdown_it = pytest.importorskip("markdown_it")
READER = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])

HOSTILE = [
    "![i](http://evil.example/i.png)",
    "[c](javascript:alert(1))",
    "[c]: http://evil.example",
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<http://evil.example>",
    "http://evil.example",
    "www.evil.example/x",
    "WWW.evil.example",
    "mail@evil.example",
    "a | b",
    "a|`b`|c",
    "`` ` ```",
    "**bold** _em_ ~~gone~~ __init__",
    "&lt;b&gt; &copy;",
    "back\\slash \\",
    "$$x$$ \\\\(y\\\\)",
    "```\n\n# heading\n\n- item",
    "{{ 7 * 7 }} {% raw %}",
]
METRICS = {"rsum": 10.0, "text_to_image_recall_at_1": 1.0}


def live(markdown: str) -> tuple[list[str], list[str]]:
    """Targets of links and images with all raw HTML, and the texts outside of code that some readers make links of."""
    found, texts = [], []
    for token in READER.parse(markdown):
        for part in [token, *(token.children or [])]:
            if part.type in ("html_block", "html_inline"):
                found.append(part.content)
            found += [str(part.attrs[name]) for name in ("href", "src") if name in part.attrs]
            if part.type == "text" and re.search(r"://|www\.|\w@\w+\.", part.content, flags=re.IGNORECASE):
                texts.append(part.content)
    return found, texts


def shown(markdown: str) -> str:
    """What a reader of the first inline text sees."""
    inline = next(token for token in READER.parse(markdown) if token.type == "inline")
    return "".join(part.content for part in inline.children)


@pytest.mark.parametrize("place", ["# {}", "| {} |\n| --- |\n| x |", "It is {}.", "a [{}](b)"])
def test_text_is_shown_as_it_is_and_does_nothing(place):
    allowed = ["b"] if place.endswith("(b)") else []
    for text in HOSTILE:
        markdown = place.format(escape_markdown(text))
        assert live(markdown) == (allowed, [])
        assert " ".join(text.split()) in shown(markdown)


@given(st.text(alphabet=st.sampled_from("`|\\<>[]()!*_~&@:/.w \nax1é"), min_size=1))
def test_any_text_is_shown_as_it_is(text):
    line = " ".join(text.split())
    if line:
        table = f"| {escape_markdown(text)} |\n| --- |\n| x |"
        assert live(table) == ([], []) and shown(table).strip() == line.strip()


@pytest.mark.parametrize(
    "text", ["validation_seen", "emoji styles (2026)", "someone/pico-v1.2", "0.0002", "+1.3", "ü é"]
)
def test_plain_words_stay_plain(text):
    assert escape_markdown(text) == text


def test_no_code_ends_its_fence():
    assert code_fence("a") == "```" and code_fence("a ```` b") == "`````"


def test_zero_has_no_sign_of_rounding():
    assert [signed_number(value) for value in (-0.04, 0.0, 0.04, -0.06, 1.25)] == [
        "+0.0",
        "+0.0",
        "+0.0",
        "-0.1",
        "+1.2",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_card_is_live(text):
    config = PicoConfig(vision_config=ViTConfig(), text_config=BertConfig())
    card = create_model_card(
        model_id=text,
        config={**config.to_dict(), "loss_type": text, "vision_config": {"model_type": text}},
        base_models=[text],
        dataset_name=text,
        splits={text: {"images": 3, text: text}},
        training={text: text},
        metrics={text: METRICS},
        style_metrics={text: METRICS},
        stage_log=[{"prototype_stage": 1, "epoch": 1}],
        command=f"train {text}",
        framework_versions={text: text},
    )
    clean = create_model_card(
        model_id="x", config=config, splits={"a": {"images": 3}}, metrics={"a": METRICS}, command="train"
    )
    found, texts = live(card.text)
    # An id of the Hub may look like an address; it is a page of the Hub all the same.
    assert {link for link in found if not link.startswith("https://huggingface.co/")} == set(live(clean.text)[0])
    assert texts == []
    kinds = [[part.type for part in READER.parse(of.text) if part.level == 0] for of in (card, clean)]
    assert kinds[0].count("heading_open") == kinds[1].count("heading_open")
    # The snippets name the model by a string that is this text.
    for snippet in re.findall(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL):
        strings = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
        assert " ".join(text.split()) in strings


def test_nothing_in_a_style_report_is_live():
    style = StyleRetrieval(
        images=3,
        texts=3,
        seen=False,
        retrieval={f"{side}_recall_at_{k}": 1.0 for side in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        | {"rsum": 6.0},
        chance_rsum=1.0,
        equal_rsum=6.0,
        gap=-0.01,
        aligned_rsum=None,
        gallery_share=100.0,
        top_shares={"1": 1.0, "10": 1.0},
    )
    report = StyleReport(dict.fromkeys(HOSTILE, style), 2, 2, None).to_markdown()
    assert live(report) == ([], [])
    assert "+0.0" in report and "-0.0" not in report
