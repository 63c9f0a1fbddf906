"""The page in a browser, what it serves, and what of the data it shows as markup: nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from readme_blocks import ROOT, extras, pins

from modeling_pico import PicoModel
from modeling_pico.search import Hit, PicoIndex
from modeling_pico.search.contact_sheet import find_picture


gradio = pytest.importorskip("gradio", reason="the page needs gradio")
page = pytest.importorskip("modeling_pico.search.page")

CHROMIUM = Path("/usr/bin/chromium")
STYLES = ("ink", "oil <b>on</b> canvas")
CAPTION = "a red star ![x](http://localhost:9/x.png) <img src=http://localhost:9/y.png>"


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, tiny_model, use_prototypes, tiny_processor) -> SimpleNamespace:
    """An index of eight pictures in two styles, and a picture beside them that is not in it."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "pictures").mkdir()
    paths = [folder / "pictures" / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        noise(number).save(path)
    noise(99).save(folder / "secret.png")
    use_prototypes(tiny_model()).save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    model = PicoModel.from_pretrained(folder / "model").eval()
    index = PicoIndex.create(folder / "index", model, tiny_processor)
    columns = {"style": [STYLES[number % 2] for number in range(8)], "captions": [[CAPTION, f"{n}"] for n in range(8)]}
    index.add(paths, columns=columns, progress=False)
    return SimpleNamespace(folder=folder, index=index, paths=paths)


@pytest.fixture(scope="module")
def url(gallery) -> Iterator[str]:
    served = page.serve(gallery.index, wait=False)
    yield served.local_url.rstrip("/")
    served.close()


def post(url: str, name: str, *data: Any) -> tuple[int, str]:
    """Calls a function of the page as its own script does; the status and what came."""
    request = urllib.request.Request(
        f"{url}/gradio_api/call/{name}", json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    return get(f"{url}/gradio_api/call/{name}/{event}")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


# What it serves


def test_it_listens_on_this_machine_alone_and_calls_nobody(url):
    assert re.match(r"http://127\.0\.0\.1:\d+$", url)
    config = json.loads(get(f"{url}/config")[1])
    assert config["analytics_enabled"] is False
    assert "fonts.googleapis" not in get(f"{url}/theme.css")[1]


def test_no_file_is_served_but_copies_of_hits(gallery, url):
    asked = ["/etc/passwd", gallery.folder / "secret.png", gallery.folder / "index" / "index.json", gallery.paths[0]]
    asked += [f"{gallery.folder}/pictures/../secret.png", ROOT / "README.md"]
    for path in asked:
        assert get(f"{url}/gradio_api/file={path}")[0] in (403, 404), path
    _, answer = post(url, "search", "red star", "", None, "")
    (copy,) = re.findall(r'"path": "([^"]+)"', answer)[:1]
    assert get(f"{url}/gradio_api/file={copy}")[0] == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "secret.png"])
def test_a_file_of_this_machine_is_no_upload(gallery, url, path):
    given = {"path": str(gallery.folder / path), "meta": {"_type": "gradio.FileData"}}
    _, answer = post(url, "similar", given, "", None, "")
    assert "event: error" in answer and "event: complete" not in answer


def test_uploads_are_limited(gallery, url, tmp_path, monkeypatch):
    def upload(content: bytes) -> tuple[int, str]:
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            + content
            + b"\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/gradio_api/upload", body, headers), timeout=60
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    # Of much more the last part would meet a connection that is closed already.
    assert upload(bytes(20 * 2**20 + 1))[0] == 413
    status, stored = upload(gallery.paths[3].read_bytes())
    given = {"path": json.loads(stored)[0], "meta": {"_type": "gradio.FileData"}}
    assert status == 200 and "event: complete" in post(url, "similar", given, "", None, "")[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _, answer = post(url, "similar", given, "", None, "")
    assert "event: error" in answer and "too large" in answer and given["path"] not in answer


# What it says


def test_what_comes_from_data_is_text():
    hit = Hit("id", 1.0, "/a/<b>.png", {"captions": [CAPTION], "style": STYLES[1], "note": "x\n\n# y"})
    shown = page.describe_hit(hit)
    assert re.sub(r"`[^`\n]*`", "", shown).count("<") == shown.count("<br>")
    assert "\n# y" not in shown and f"`{CAPTION}`" in shown


def test_filters_offer_the_values_of_columns_and_join_conditions(gallery):
    assert page.filter_choices(gallery.index) == {"style": sorted(STYLES)}
    assert page._condition("", None, " ") is None
    where = page._condition("style", "it's", "year > 3")
    assert where == "year > 3 and `style` = 'it''s'"
    found = gallery.index.search("a star", where=page._condition("style", STYLES[1], None))
    assert len(found) == 4 and {hit.columns["style"] for hit in found} == {STYLES[1]}


@pytest.mark.parametrize("store", ["lancedb", "qdrant"])
def test_an_index_tells_its_values_and_embeddings(gallery, tmp_path, store):
    encoder = gallery.index.encoder
    index = PicoIndex.create(tmp_path / "index", encoder, store=store)
    assert index.values("style") == []
    index.add(gallery.paths[:3], columns={"style": ["oil", None, "ink"], "notes": [["a"]] * 3}, progress=False)
    assert index.values("style") == ["ink", "oil"] and index.values("style", limit=1) == []
    assert index.values("notes") == [] and index.values("gone") == []
    (hit,) = index.search(gallery.paths[1], k=1)
    (expected,) = encoder.encode_images([gallery.paths[1]])
    np.testing.assert_allclose(index.embeddings(hit.id), expected, atol=2e-3)
    with pytest.raises(ValueError, match="holds no image 'gone'"):
        index.embeddings("gone")
    index.close()


def test_maps_are_of_the_similarities_that_the_score_is_made_of(gallery):
    index = gallery.index
    (hit,) = index.search("red star", k=1)
    maps, said = page.matching_patches(index, "red star", hit, find_picture(hit))
    patches = index.embeddings(hit.id)[-4:]  # without [CLS]
    words = index.encoder.encode_texts(["red star"])[0][1:-1]  # without [CLS] and [SEP]
    best = (patches @ words.T).max(axis=0)
    assert [label for _, label in maps] == [f"red {best[0]:.2f}", f"star {best[1]:.2f}"]
    assert "light is high" in said
    maps, _ = page.matching_patches(index, index.encode_query(gallery.paths[0]), hit, find_picture(hit))
    assert [label.rsplit(" ", 1)[0] for _, label in maps] == ["your picture"]
    assert page.matching_patches(index, "red star", hit, None)[0] == []


def test_captions_of_a_picture_are_ordered_by_their_scores(gallery):
    index = gallery.index
    picture = Image.open(gallery.paths[5]).convert("RGB")
    hits = index.search(picture)
    found = page.best_captions(index, index.encode_query(picture), hits)
    captions = {CAPTION, *map(str, range(8))}
    processor, model = index.encoder.processor, index.encoder.model
    texts = sorted(captions)
    scores = processor.score_retrieval(
        processor.encode_images(model, [picture]), processor.encode_texts(model, texts)
    )[0]
    expected = sorted(zip(texts, scores.tolist(), strict=True), key=lambda pair: -pair[1])
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert found[0][0] == expected[0][0] and {caption for caption, _ in found} == captions


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra browser")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "phone"])
def tab(browser, url, request) -> Iterator[Any]:
    """A fresh visit; fails if the page asks another machine for anything."""
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    asked: list[str] = []
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.goto(url)
    opened.wait_for_selector("#query textarea, #query input")
    yield opened
    # Nothing is wider than the screen.
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []


def search(tab: Any, text: str) -> None:
    tab.locator("#query textarea, #query input").first.fill(text)
    tab.get_by_role("button", name="Search", exact=True).click()


def test_a_visitor_searches_and_sees_where_words_match(gallery, tab):
    search(tab, "red star")
    tab.wait_for_selector("#hits img")
    expected = gallery.index.search("red star")
    shown = tab.locator("#hits .caption-label").all_inner_texts()
    assert shown == [f"{hit.score:.3f} · {Path(hit.path).name}" for hit in expected]
    assert not tab.locator("#detail").is_visible()
    tab.locator("#hits button img").nth(1).click()
    tab.wait_for_selector("#words img")
    labels = tab.locator("#words .caption-label").all_inner_texts()
    assert [label.split()[0] for label in labels] == ["red", "star"]
    about = tab.locator("#about").inner_text()
    assert Path(expected[1].path).name in about and CAPTION in about  # as text
    tab.wait_for_function("document.querySelector('#large img')?.naturalWidth > 0")
    tab.wait_for_function("document.querySelector('#large').getBoundingClientRect().top < innerHeight - 100")


def test_a_visitor_filters(gallery, tab):
    tab.get_by_text("Filter", exact=True).click()
    tab.locator("#where textarea, #where input").first.fill("style = 'ink'")
    search(tab, "a red star")
    tab.wait_for_selector("#hits img")
    assert tab.locator("#hits img").count() == 4
    for name, choice in (("column", "style"), ("value", STYLES[1])):
        tab.locator(f"#{name} input").click()
        tab.get_by_role("option", name=choice).click()
    tab.locator("#where textarea, #where input").first.fill("")
    search(tab, "a red star")
    wanted = gallery.index.search("a red star", where={"style": STYLES[1]})
    names = [Path(hit.path).name for hit in wanted]
    tab.wait_for_function(
        "names => JSON.stringify([...document.querySelectorAll('#hits .caption-label')]"
        ".map(e => e.innerText.split(' ').pop())) == JSON.stringify(names)",
        arg=names,
    )


def test_a_visitor_searches_by_a_picture(gallery, tab):
    tab.get_by_text("Search by a picture").click()
    tab.locator("#picture input[type=file]").set_input_files(str(gallery.paths[6]))
    tab.wait_for_selector("#hits img")
    assert tab.locator("#hits .caption-label").first.inner_text().endswith("6.png")
    assert "Captions of similar pictures" in tab.locator("#said").inner_text()


def test_a_mistake_is_told_as_text(tab):
    tab.get_by_text("Filter", exact=True).click()
    tab.locator("#where textarea, #where input").first.fill("<img src=x> = 1")
    search(tab, "a red star")
    toast = tab.locator(".toast-body")
    toast.wait_for()
    assert "<img src=x>" in toast.inner_text() and toast.locator("img").count() == 0


def test_a_page_that_was_opened_on_an_empty_index_shows_what_was_added(gallery, tmp_path, browser):
    index = PicoIndex.create(tmp_path / "index", gallery.index.encoder)
    served = page.serve(index, wait=False)
    try:
        tab = browser.new_page()
        tab.goto(served.local_url)
        tab.get_by_text("Search 0 pictures").wait_for()
        index.add(gallery.paths[:3], columns={"style": ["ink", "oil", "ink"]}, progress=False)
        tab.reload()
        tab.get_by_text("Search 3 pictures").wait_for()
        tab.get_by_text("Filter", exact=True).click()
        for name, choice in (("column", "style"), ("value", "oil")):
            tab.locator(f"#{name} input").click()
            tab.get_by_role("option", name=choice).click()
        search(tab, "a red star")
        tab.wait_for_selector("#hits img")
        assert tab.locator("#hits img").count() == 1
        tab.close()
    finally:
        served.close()


# As a Space


def test_the_space_builds_the_page(gallery, monkeypatch):
    monkeypatch.setenv("PICO_MODEL", str(gallery.folder / "model"))
    monkeypatch.setenv("PICO_INDEX", str(gallery.folder / "index"))
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "examples" / "space" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    index = app.load()
    assert len(index) == 8 and isinstance(page.build_page(index), gradio.Blocks)


def test_the_space_asks_for_what_the_package_needs():
    folder = ROOT / "examples" / "space"
    asked = {line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    project = (ROOT / "pyproject.toml").read_text()
    own = set(re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1]))
    needed = own | {str(requirement) for requirement in extras()["search"]}
    assert asked == needed
    header = (folder / "README.md").read_text().split("---")[1]
    assert f"sdk_version: {pins()['gradio']}\n" in header and "sdk: gradio\n" in header
