"""
A page to search an index in: a text or a picture finds pictures, and on a hit the patches that each word matches best.
It needs gradio: `pip install modeling-pico[demo]`.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


try:
    import gradio
except ImportError as error:
    raise ImportError("The page needs gradio, which is not installed: pip install modeling-pico[demo]") from error

from ..markdown import escape_markdown
from ..model.image_decoding_pico import BadImageError
from ..plots import NothingToDrawError, patch_grid, shown_image, token_names
from .contact_sheet import find_picture, hit_name, hit_picture
from .embeddings import exact_scores
from .encoders import ModelEncoder
from .heat_map import heat_maps
from .index import CANDIDATES, Hit, PicoIndex


# Sides in pixels. Pictures leave as copies of these sizes, never as their files.
_THUMBNAIL, _LARGE = 320, 640
MAX_FILE_SIZE = "20mb"
# What is shown at most: words, captions, and values of a column to choose from.
_MAX_WORDS, _MAX_CAPTIONS, _MAX_VALUES = 24, 10, 200
_CAPTION_COLUMNS = ("captions", "caption")
# Similar pictures whose captions are scored for a picture.
_CAPTIONED = 20

_THEME = gradio.themes.Default(
    primary_hue="blue",
    font=("ui-sans-serif", "system-ui", "sans-serif"),  # nothing is loaded from elsewhere
    font_mono=("ui-monospace", "monospace"),
)
_CSS = """
.gradio-container { width: 100%; }
.gradio-container > .main { width: 100%; max-width: 1240px !important; margin: 0 auto; }
#hits .grid-container { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
#words .grid-container { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); }
#hits .grid-wrap, #words .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
#hits .caption-label, #words .caption-label {
  left: 0; right: 0; bottom: 0; max-width: none; border-width: 1px 0 0; border-radius: 0; text-align: center;
}
#hits button img, #words button img { padding-bottom: 26px; }
#detail { position: sticky; top: 8px; align-self: flex-start; }
#large img { width: 100%; height: 100%; object-fit: contain; }
#said ol { padding-left: 2em; }
#about code, #said code { padding: 0; border: 0; background: none; font: inherit; }
"""


# On a narrow screen the hit that was chosen opens below the hits.
_SHOW_DETAIL = "() => { if (innerWidth < 768) document.querySelector('#detail').scrollIntoView({behavior: 'smooth'}) }"


@dataclass
class Found:
    """A search of one visitor: what was asked, a text or the embeddings of a picture, and what was found."""

    query: str | np.ndarray
    hits: list[Hit]


def build_page(
    index: PicoIndex, *, k: int = 24, candidates: int = CANDIDATES, pictures: str | os.PathLike | None = None
) -> gradio.Blocks:
    r"""
    The page of an index. It hands out small copies of pictures of the index alone, and sends nothing elsewhere.

    Args:
        index ([`PicoIndex`]): An index that was opened with its model.
        k (`int`, *optional*, defaults to 24): Hits of a search.
        candidates (`int`, *optional*, defaults to 500): As in [`PicoIndex.search`].
        pictures (`str`, *optional*):
            Folder where the pictures are now, if they were moved since they were added. Those in the folder of the
            index are found without.

    Returns:
        `gradio.Blocks`: for [`serve`], or to be mounted in another application.
    """
    hidden = gradio.update(visible=False)
    folders = [index.folder] if pictures is None else [pictures, index.folder]

    @_said
    def find(query: str | np.ndarray, column: str | None, value: Any, where: str | None):
        hits = index.search(query, k, where=_condition(column, value, where), candidates=candidates)
        items = [(_small(hit_picture(hit, folders), _THUMBNAIL), f"{hit.score:.3f} · {hit_name(hit)}") for hit in hits]
        said = "" if hits else "Nothing was found. Is the filter too narrow?"
        captions = ""
        if not isinstance(query, str) and (best := best_captions(index, query, hits)):
            captions = "**Captions of similar pictures, best first**\n\n" + "\n".join(
                f"1. {escape_markdown(caption)} · {score:.3f}" for caption, score in best
            )
        return gradio.update(value=items, visible=bool(hits)), Found(query, hits), said or captions, hidden

    def find_text(text: str | None, *filters: Any):
        return find((text or "").strip(), *filters)

    def find_similar(path: str | None, *filters: Any):
        if path is None:
            return hidden, None, "", hidden
        return find(_uploaded(index, path), *filters)

    @_said
    def explain(found: Found | None, event: gradio.SelectData):
        if found is None or not 0 <= event.index < len(found.hits):
            raise ValueError("Search first, then choose one of the hits.")
        hit = found.hits[event.index]
        words, said = matching_patches(index, found.query, hit, find_picture(hit, folders))
        return (
            gradio.update(visible=True),
            _small(hit_picture(hit, folders), _LARGE),
            said,
            gradio.update(value=words, visible=bool(words)),
            describe_hit(hit),
        )

    def offer(column: str | None):
        return gradio.update(choices=_values(index, column), value=None)

    def greet():
        columns = [("any", ""), *((name, name) for name in filter_choices(index))]
        name = Path(index.model["name"])
        model = escape_markdown(name.name if name.is_absolute() else name)
        return f"# Search {len(index):,} pictures\n\nModel: {model}", gradio.update(choices=columns)

    with gradio.Blocks(title="Search pictures", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        found = gradio.State()
        title = gradio.Markdown()
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                with gradio.Row(equal_height=True):
                    text = gradio.Textbox(
                        placeholder="What should the picture show?",
                        show_label=False,
                        container=False,
                        max_lines=1,
                        max_length=1000,
                        scale=5,
                        elem_id="query",
                    )
                    button = gradio.Button("Search", variant="primary", scale=1, min_width=90)
                with gradio.Accordion("Search by a picture", open=False):
                    picture = gradio.Image(
                        type="filepath",
                        image_mode=None,  # the file as it is
                        sources=["upload", "clipboard"],
                        buttons=[],
                        height=200,
                        show_label=False,
                        elem_id="picture",
                    )
                with gradio.Accordion("Filter", open=False):
                    with gradio.Row():
                        column = gradio.Dropdown(
                            [("any", "")], value="", label="Column", min_width=120, elem_id="column"
                        )
                        value = gradio.Dropdown([], label="Value", min_width=120, elem_id="value")
                    where = gradio.Textbox(
                        label="Condition", placeholder="style = 'sketch' AND year > 2020", max_lines=1, elem_id="where"
                    )
                said = gradio.Markdown(elem_id="said")
                hits = gradio.Gallery(
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    buttons=[],
                    interactive=False,
                    visible=False,
                    elem_id="hits",
                )
            with gradio.Column(scale=2, min_width=320, visible=False, elem_id="detail") as detail:
                large = gradio.Image(
                    show_label=False, buttons=[], height=280, interactive=False, elem_id="large", format="webp"
                )
                how = gradio.Markdown(elem_id="how")
                words = gradio.Gallery(
                    label="Words",
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    buttons=[],
                    interactive=False,
                    elem_id="words",
                )
                about = gradio.Markdown(elem_id="about")
        filters, results = [column, value, where], [hits, found, said, detail]
        page.load(greet, None, [title, column], api_visibility="private")
        for trigger in (text.submit, button.click):
            trigger(find_text, [text, *filters], results, api_name="search", show_progress_on=hits)
        picture.change(find_similar, [picture, *filters], results, api_name="similar", show_progress_on=hits)
        column.change(offer, column, value, api_visibility="private")
        hits.select(explain, found, [detail, large, how, words, about], api_visibility="private").success(
            None, js=_SHOW_DETAIL
        )
    return page


def serve(
    index: PicoIndex,
    *,
    host: str | None = None,
    port: int | None = None,
    k: int = 24,
    candidates: int = CANDIDATES,
    pictures: str | os.PathLike | None = None,
    wait: bool = True,
) -> gradio.Blocks:
    r"""
    Serves [`build_page`] until it is interrupted.

    Args:
        index ([`PicoIndex`]): An index that was opened with its model.
        host (`str`, *optional*):
            Address to listen on; by default what `GRADIO_SERVER_NAME` says, as on Spaces, or else 127.0.0.1, which
            this machine alone reaches. `"0.0.0.0"` is open to the network, without any password.
        port (`int`, *optional*): By default the first free one from 7860 on.
        k (`int`, *optional*, defaults to 24): Hits of a search.
        candidates (`int`, *optional*, defaults to 500): As in [`PicoIndex.search`].
        pictures (`str`, *optional*): As in [`build_page`].
        wait (`bool`, *optional*, defaults to `True`): False returns while the page is served.

    Returns:
        `gradio.Blocks`: the page, of which `close()` ends it.

    Raises:
        OSError: if the port is taken.
    """
    page = build_page(index, k=k, candidates=candidates, pictures=pictures)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=not wait,
        max_file_size=MAX_FILE_SIZE,
        allowed_paths=[],
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        theme=_THEME,
        css=_CSS,
    )
    return page


def _said(function: Callable) -> Callable:
    """Shows what was wrong with a visitor's input, as text: gradio takes messages for HTML."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except ValueError as error:
            raise gradio.Error(html.escape(str(error)), print_exception=False) from error

    return run


@_said
def _uploaded(index: PicoIndex, path: str) -> np.ndarray:
    """Embeddings of a visitor's picture; its name is not repeated in messages."""
    try:
        return index.encode_query(Path(path))
    except BadImageError as error:
        raise ValueError(str(error).replace(repr(path), "that was uploaded")) from error


def _small(picture: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels a side; a small picture stays as it is."""
    return ImageOps.contain(picture, (side, side)) if max(picture.size) > side else picture


def filter_choices(index: PicoIndex) -> dict[str, list[Any]]:
    """The columns that can be chosen from, each with its values in order."""
    return {column: values for column in index.columns if (values := _values(index, column))}


def _values(index: PicoIndex, column: str | None) -> list[Any]:
    return index.values(column, _MAX_VALUES) if column and column not in ("id", "path") else []


def _condition(column: str | None, value: Any, where: str | None) -> str | None:
    """What filters by the chosen value and by the condition that was typed."""
    parts = [where] if where and where.strip() else []
    if column and value is not None:
        quoted = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
        parts.append(f"`{column}` = {quoted}")
    return " and ".join(parts) or None


def captions_of(hit: Hit) -> list[str]:
    """The captions of a hit, where the index has a column of them."""
    for column in _CAPTION_COLUMNS:
        value = hit.columns.get(column)
        if value is not None:
            return [value] if isinstance(value, str) else list(value)
    return []


def describe_hit(hit: Hit) -> str:
    """Score, name, captions and columns of a hit, as Markdown in which nothing of the data is more than text."""
    lines = [f"**{escape_markdown(hit_name(hit))}** · score {hit.score:.3f}", ""]
    lines += [f"- {escape_markdown(caption)}" for caption in captions_of(hit)[:_MAX_CAPTIONS]]
    rest = {name: value for name, value in hit.columns.items() if name not in _CAPTION_COLUMNS and value is not None}
    lines += ["", *(f"{escape_markdown(name)}: {escape_markdown(value)}<br>" for name, value in rest.items())]
    return "\n".join(lines)


def best_captions(index: PicoIndex, query: np.ndarray, hits: Sequence[Hit]) -> list[tuple[str, float]]:
    """Captions of similar pictures with their scores for the picture of these embeddings, best first."""
    captions = list(dict.fromkeys(caption for hit in hits[:_CAPTIONED] for caption in captions_of(hit)))
    if not captions:
        return []
    texts = index.encoder.encode_texts(captions)
    scores = exact_scores(query, np.concatenate(texts), np.array([len(text) for text in texts])).tolist()
    return sorted(zip(captions, scores, strict=True), key=lambda pair: -pair[1])[:_MAX_CAPTIONS]


@torch.no_grad()
def matching_patches(
    index: PicoIndex, query: str | np.ndarray, hit: Hit, picture: Image.Image | None
) -> tuple[list[tuple[Image.Image, str]], str]:
    """
    Maps of where a hit, of this picture, matches each word, or the embeddings of the picture that was asked with, and
    a sentence on how to read them; no maps and the reason where there are no patches to show.
    """
    encoder = index.encoder
    if not isinstance(encoder, ModelEncoder):
        return [], "Words are shown on pictures where the index is opened with its PyTorch model."
    model, processor = encoder.model, encoder.processor
    if picture is None:
        return [], "The picture is no longer there."
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    tokens = index.embeddings(hit.id)
    try:
        grid = patch_grid(model, len(tokens), pixels.shape[-2:])
    except NothingToDrawError:
        return [], "The model compares whole pictures: there are no patches to show."
    patches = tokens[len(tokens) - grid[0] * grid[1] :]
    options = processor.image_processor.to_dict()
    if options.get("do_center_crop") or options.get("do_pad"):
        # The patches do not cover the picture but what is made of it.
        seen = shown_image(pixels, processor.image_processor).permute(1, 2, 0).numpy()
        picture = Image.fromarray((255 * seen).round().astype(np.uint8))
    if isinstance(query, str):
        inputs = processor(text=[query], padding=True, return_tensors="pt").to(model.device)
        features = model.get_text_features(**inputs)
        taking_part = features.mask[0]
        ids, words = (
            inputs["input_ids"][0, taking_part].tolist(),
            features.embeds[0, taking_part].float().cpu().numpy(),
        )
        # [CLS] and the like count in the score, and say nothing to a reader.
        chosen = [row for row, id in enumerate(ids) if id not in processor.tokenizer.all_special_ids][:_MAX_WORDS]
        names, similarity = token_names(processor.tokenizer, [ids[row] for row in chosen]), patches @ words[chosen].T
        said = "Where each word matches: light is high, the best patch is outlined."
    else:
        names, similarity = ["your picture"], (patches @ query.T).max(axis=1, keepdims=True)
        said = "Where it is like some part of your picture: light is high, the best patch is outlined."
    best = similarity.max(axis=0)
    maps = heat_maps(picture, similarity, grid)
    return [(drawn, f"{name} {value:.2f}") for drawn, name, value in zip(maps, names, best, strict=True)], said


__all__ = ["MAX_FILE_SIZE", "build_page", "serve"]
