from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "emoji-styles"

BIRD = {
    "label": "bird",
    "hexcode": "1F426",
    "tags": ["animal", "ornithology"],
    "group": 3,
    "subgroup": 38,
}
JAPAN = {"label": "flag: Japan", "hexcode": "1F1EF-1F1F5", "tags": ["JP", "flag"], "group": 9, "subgroup": 98}
PIRATE = {
    "label": "pirate flag",
    "hexcode": "1F3F4-200D-2620-FE0F",
    "tags": ["flag", "jolly"],
    "group": 9,
    "subgroup": 97,
}
SKIN = {"label": "dark skin tone", "hexcode": "1F3FF", "group": 2, "subgroup": 32}
LETTER = {"label": "regional indicator A", "hexcode": "1F1E6"}
PIRATE_KEYWORDS = ["flag", "Jolly", "pirate", "plunder", "Roger", "treasure"]
EMOJIBASE = {
    "en/data.json": [PIRATE, SKIN, BIRD, LETTER, JAPAN],
    "en/messages.json": {
        "groups": [{"order": 3, "message": "animals & nature"}, {"order": 9, "message": "flags"}],
        "subgroups": [
            {"order": 38, "message": "birds"},
            {"order": 97, "message": "other flags"},
            {"order": 98, "message": "country flags"},
        ],
    },
    "en/shortcodes/cldr.json": {"1F426": "bird", "1F1EF-1F1F5": "flag_japan", "1F3F4-200D-2620-FE0F": "pirate_flag"},
    "en/shortcodes/iamcal.json": {"1F426": "bird", "1F1EF-1F1F5": ["jp", "flag-jp"]},
    "en/shortcodes/github.json": {"1F1EF-1F1F5": "jp", "1F3F4-200D-2620-FE0F": "pirate_flag"},
    "en/shortcodes/joypixels.json": {"1F3F4-200D-2620-FE0F": ["pirate_flag", "jolly_roger"]},
    "en/shortcodes/emojibase.json": {"1F426": ["bird", "bird_face"]},
}
CLDR = {
    "annotations": {
        "annotations": {"🏴‍☠": {"default": PIRATE_KEYWORDS}, "🐦": {"default": ["animal", "bird", "ornithology"]}}
    }
}
RED = '<path fill="red" d="M0 0h4v4H0z"/>'
BLUE = '<path fill="blue" d="M0 0h4v2H0z"/>'
# The first style is found by code points, the second by names.
FIRST = {
    "icons.json": {"icons": {"a": {"body": RED}, "japan": {"body": BLUE, "height": 2}}, "width": 4, "height": 4},
    "chars.json": {"1f3f4-200d-2620": "a", "1f1ef-1f1f5": "japan"},
}
SECOND = {
    "icons.json": {
        "icons": {"jolly-roger": {"body": RED}, "flag-for-japan": {"body": BLUE, "height": 2}},
        "aliases": {"jp": {"parent": "flag-for-japan", "hFlip": True}},
        "width": 4,
        "height": 4,
    },
    "chars.json": {},
}

BIRD_CAPTIONS = ["bird", "animal, ornithology", "a small picture of bird, ornithology", "bird face", "birds: bird"]
JAPAN_CAPTIONS = [
    "flag: Japan",
    "flag of Japan",
    "a small picture of the flag of Japan",
    "flag jp",
    "country flags: Japan",
]
PIRATE_CAPTIONS = [
    "pirate flag",
    "Roger, plunder, treasure, Jolly",
    "a small picture of pirate flag, pirate",
    "jolly roger",
    "other flags: pirate flag",
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "emoji_styles_build", ROOT / "examples" / "emoji_styles" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_tarball(path: Path, files: dict) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def integrity(content: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


@pytest.fixture
def concepts(script, tmp_path):
    emojibase = write_tarball(tmp_path / "emojibase.tgz", EMOJIBASE)
    cldr = write_tarball(tmp_path / "cldr.tgz", {"annotations/en/annotations.json": CLDR})
    return script.load_concepts(emojibase, cldr)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def png(value: int, size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def packages(script, tmp_path, monkeypatch, no_network):
    """A cache of four packages whose hashes are pinned: two styles, emojibase, CLDR."""
    cache = tmp_path / "cache"
    cache.mkdir()
    contents = {
        "emojibase-data": EMOJIBASE,
        "cldr-annotations-full": {"annotations/en/annotations.json": CLDR},
        "@iconify-json/first": FIRST,
        "@iconify-json/second": SECOND,
    }
    pinned = {}
    for name, files in contents.items():
        path = write_tarball(cache / f"{name.split('/')[-1]}-1.0.0.tgz", files)
        pinned[name] = script.Package(name, "1.0.0", integrity(path.read_bytes()))
    monkeypatch.setattr(script, "PACKAGES", pinned)
    monkeypatch.setattr(script, "SPLITS", {"train": ("second", "first"), "test": ("first",)})
    return cache


# Concepts and captions


def test_concepts_come_in_the_order_of_code_points_without_components(concepts):
    assert [concept.concept_id for concept in concepts] == ["1F1EF-1F1F5", "1F3F4-200D-2620-FE0F", "1F426"]
    assert [concept.captions for concept in concepts] == [JAPAN_CAPTIONS, PIRATE_CAPTIONS, BIRD_CAPTIONS]
    assert [(concept.name, concept.group) for concept in concepts[1:]] == [
        ("pirate flag", "flags"),
        ("bird", "animals & nature"),
    ]
    assert concepts[0].icon_names == ["flag-japan", "flag-japan", "jp", "flag-jp", "jp"]


def test_keywords_are_those_of_cldr_without_the_name_or_else_the_tags(script):
    annotations = CLDR["annotations"]["annotations"]
    # CLDR writes the pirate flag without the variation selector.
    assert script.find_keywords(PIRATE, annotations) == PIRATE_KEYWORDS
    assert script.find_keywords(BIRD, annotations) == ["animal", "ornithology"]
    assert script.find_keywords(JAPAN, annotations) == ["JP", "flag"]
    assert script.find_keywords({"label": "Hole", "hexcode": "1F573", "tags": ["hole"]}, {}) == []


@pytest.mark.parametrize(
    "name, shortcodes, text",
    [
        ("koala", ["koala", "koala_face"], "koala face"),
        ("OK button", ["ok", "u7a7a", "+1"], "OK button symbol"),
        ("yo-yo", ["yo-yo", "yo_yo"], "yo-yo symbol"),
        ("white medium-small square", ["white_medium_small_square"], "white medium small square"),
    ],
)
def test_messenger_text_is_no_abbreviation_and_not_the_name(script, name, shortcodes, text):
    assert script.messenger_text(name, shortcodes) == text


def test_coinciding_captions_are_replaced(script):
    pencil = {"label": "pencil", "hexcode": "270F"}
    assert script.make_captions(pencil, [], ["pencil2"], "writing") == [
        "pencil",
        "a small picture of pencil",
        "pencil2",
        "writing: pencil",
        "an emoji of pencil",
    ]
    calendar = {"label": "calendar", "hexcode": "1F4C5"}
    assert script.make_captions(calendar, ["date"], ["date"], "office supplies") == [
        "calendar",
        "date",
        "a small picture of calendar, date",
        "office supplies: calendar",
        "an emoji of calendar",
    ]


@pytest.mark.parametrize(
    "name, slug",
    [
        ("flag: Côte d'Ivoire", "flag-cote-divoire"),
        ("flag: Antigua & Barbuda", "flag-antigua-and-barbuda"),
        ("keycap: #", "keycap"),
        ("UP! button", "up-button"),
    ],
)
def test_slugs(script, name, slug):
    assert script.slugify(name) == slug


@pytest.mark.shared
def test_captions_of_the_published_copy_follow_from_their_own_words(script):
    if not SHARED.is_dir():
        pytest.skip(f"the optional data folder {SHARED} is absent")
    columns = ["concept_id", "concept", "captions"]
    rows = {row["concept_id"]: row for row in pq.read_table(SHARED / "train.parquet", columns=columns).to_pylist()}
    checked = 0
    for row in rows.values():
        name, listed, _, messenger, category = captions = row["captions"]
        keywords = sorted(listed.split(", "), key=str.lower)
        # Up to three keywords are all there were; CLDR sorts them.
        if len(keywords) > 3 or category.startswith("an emoji of"):
            continue
        entry = {"label": name, "hexcode": row["concept_id"]}
        shortcodes = [] if messenger == f"{name} symbol" else [messenger.replace(" ", "_")]
        made = script.make_captions(entry, keywords, shortcodes, category.removesuffix(f": {name}"))
        assert made == captions
        checked += 1
    assert checked > 500


# Icons


def test_rows_of_a_style_that_knows_code_points(script, concepts, tmp_path):
    rows = script.style_rows("first", write_tarball(tmp_path / "first.tgz", FIRST), concepts)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="72" height="72" '
    assert rows == [
        {
            "image": {"bytes": f'{svg}viewBox="0 0 4 2">{BLUE}</svg>', "path": "first/1F1EF-1F1F5.png"},
            "captions": JAPAN_CAPTIONS,
            "style": "first",
            "concept": "flag: Japan",
            "concept_id": "1F1EF-1F1F5",
            "group": "flags",
        },
        {
            "image": {"bytes": f'{svg}viewBox="0 0 4 4">{RED}</svg>', "path": "first/1F3F4-200D-2620-FE0F.png"},
            "captions": PIRATE_CAPTIONS,
            "style": "first",
            "concept": "pirate flag",
            "concept_id": "1F3F4-200D-2620-FE0F",
            "group": "flags",
        },
    ]


def test_a_style_without_code_points_is_searched_by_name(script, concepts):
    names = [script.find_icon(concept, SECOND["icons.json"], {}) for concept in concepts]
    assert names == ["jp", "jolly-roger", None]
    # The alias draws its parent.
    assert script.icon_svg(SECOND["icons.json"], "jp") == script.icon_svg(SECOND["icons.json"], "flag-for-japan")


def test_rendering_puts_the_icon_in_the_middle_of_white(script):
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    for name, top in (("jolly-roger", (255, 0, 0)), ("jp", (255, 255, 255))):
        image = Image.open(io.BytesIO(script.render(script.icon_svg(SECOND["icons.json"], name))))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        assert image.getpixel((32, 8)) == image.getpixel((32, 56)) == top
    assert image.getpixel((32, 32)) == (0, 0, 255)


def test_an_icon_that_cannot_be_drawn_is_named(script):
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    with pytest.raises(ValueError, match=r"cannot draw first/1F426\.png: "):
        script.draw([{"image": {"bytes": "<svg", "path": "first/1F426.png"}}], 1)


# Packages


def test_pinned_packages_cover_all_styles(script):
    styles = [style for styles in script.SPLITS.values() for style in styles]
    assert len(styles) == len(set(styles)) == 9
    names = {"emojibase-data", "cldr-annotations-full", *(f"@iconify-json/{style}" for style in styles)}
    assert set(script.PACKAGES) == names
    for package in script.PACKAGES.values():
        digest = base64.b64decode(package.integrity.removeprefix("sha512-"), validate=True)
        assert len(digest) == 64
    url = "https://registry.npmjs.org/@iconify-json/noto-v1/-/noto-v1-1.2.5.tgz"
    assert script.PACKAGES["@iconify-json/noto-v1"].url == url


def test_downloads_are_kept_and_not_repeated(script, tmp_path, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(b"content")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    package = script.Package("@scope/name", "1.2.3", integrity(b"content"))
    for _ in range(2):
        assert script.fetch(package, tmp_path / "cache").read_bytes() == b"content"
    assert asked == ["https://registry.npmjs.org/@scope/name/-/name-1.2.3.tgz"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["name-1.2.3.tgz"]


def test_a_wrong_hash_is_refused_and_not_kept(script, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"forged"))
    package = script.Package("name", "1.0.0", integrity(b"content"))
    with pytest.raises(ValueError, match=r"https://registry\S+ is sha512-\S+, but sha512-\S+ is pinned$"):
        script.fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "name-1.0.0.tgz").write_bytes(b"broken")
    with pytest.raises(ValueError, match="name-1.0.0.tgz is sha512-.*; remove the file to download it again"):
        script.fetch(package, tmp_path)


def test_without_network_the_error_says_what_to_put_where(script, tmp_path, no_network):
    package = script.Package("name", "1.0.0", "sha512-")
    with pytest.raises(
        ConnectionError, match=r"cannot download https://.*no route.*put the file at .*name-1\.0\.0\.tgz"
    ):
        script.fetch(package, tmp_path)


def test_reading_a_package_never_leaves_it(script, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('"secret"')
    tarball = tmp_path / "folder" / "package.tgz"
    tarball.parent.mkdir()
    with tarfile.open(tarball, "w:gz") as archive:
        for name, kind in (("package/symbolic.json", tarfile.SYMTYPE), ("package/hard.json", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        member = tarfile.TarInfo("../written.json")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"{}"))
        member = tarfile.TarInfo("package/broken.json")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"{"))
    for name in ("package/symbolic.json", "package/hard.json", "package/absent.json"):
        with pytest.raises(ValueError, match=f"no regular file '{name}'"):
            script.read_json(tarball, name)
    with pytest.raises(ValueError, match=r"'package/broken.json' in .* is not JSON"):
        script.read_json(tarball, "package/broken.json")
    assert script.read_json(tarball, "../written.json") == [{}]
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["secret.json"]


# The whole, and the comparison


@pytest.fixture
def no_drawing(script, monkeypatch):
    """Images whose grey is the height of the view; and resvg-py counts as installed."""
    monkeypatch.setattr(script, "render", lambda svg: png(100 if 'viewBox="0 0 4 4"' in svg else 50))
    monkeypatch.setattr(script, "find_spec", lambda name: object())


def test_build_writes_and_checks(script, packages, no_drawing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    output, reference = tmp_path / "output", tmp_path / "reference"
    options = ["--cache_dir", str(packages), "--num_processes", "1"]
    script.main(["--output_dir", str(reference), *options])
    counts = ["train: 4 rows", "    second: 2", "    first: 2", "test: 2 rows", "    first: 2"]
    assert capsys.readouterr().out.splitlines() == counts

    rows = datasets.load_dataset(str(reference), split="train")
    assert rows["style"][:] == ["second", "second", "first", "first"]
    assert rows["concept_id"][:] == ["1F1EF-1F1F5", "1F3F4-200D-2620-FE0F"] * 2
    assert rows["captions"][0] == JAPAN_CAPTIONS
    assert rows["group"][:] == ["flags"] * 4
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == [50, 100, 50, 100]

    script.main(["--output_dir", str(output), *options, "--check", str(reference)])
    monkeypatch.setattr(script, "render", lambda svg: png(102 if 'viewBox="0 0 4 4"' in svg else 50))
    assert "mean_difference 0," in capsys.readouterr().out
    again = ["--output_dir", str(output), *options, "--check", str(reference)]
    script.main([*again, "--tolerance", "2"])
    assert (
        "train: rows 4, missing 0, extra 0, same_order 1, captions 0, labels 0, mean_difference 1, worst_image 2"
        in (capsys.readouterr().out)
    )
    with pytest.raises(SystemExit, match="differ"):
        script.main(again)


def write_rows(path: Path, rows: list[tuple[str, str, bytes]]) -> Path:
    """Rows from concept, caption and image."""
    table = [
        {
            "image": {"bytes": image, "path": None},
            "captions": [caption],
            "style": "first",
            "concept": concept,
            "concept_id": concept,
            "group": "flags",
        }
        for concept, caption, image in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def test_comparison_counts_what_differs(script, tmp_path):
    spotted = np.full((64, 64, 3), 10, dtype=np.uint8)
    spotted[0, 0] = 10 + 64
    file = io.BytesIO()
    Image.fromarray(spotted).save(file, "PNG")
    reference = write_rows(
        tmp_path / "reference.parquet",
        [("a", "x", png(10)), ("b", "x", png(10)), ("c", "x", png(10)), ("d", "x", png(10))],
    )
    built = write_rows(
        tmp_path / "built.parquet",
        [("b", "y", file.getvalue()), ("a", "x", png(10)), ("e", "x", png(0)), ("e", "x", png(0))],
    )
    assert script.compare_split(built, reference) == {
        "rows": 2,
        "missing": 2,
        "extra": 2,
        "same_order": False,
        "captions": 1,
        "labels": 0,
        # One of 4096 pixels, in one of two images, differs by 64.
        "mean_difference": 64 / 4096 / 2,
        "worst_image": 64 / 4096,
        "max_difference": 64,
    }
    small = write_rows(tmp_path / "small.parquet", [("a", "x", png(10, 32))])
    assert script.compare_split(small, reference)["worst_image"] == 255
    with pytest.raises(ValueError, match=r"absent\.parquet does not exist"):
        script.compare_split(built, tmp_path / "absent.parquet")


@pytest.mark.parametrize("change", ["missing", "captions", "order"])
def test_check_fails_where_rows_differ_and_pixels_do_not(script, tmp_path, monkeypatch, capsys, change):
    monkeypatch.setattr(script, "SPLITS", {"test": ("first",)})
    rows = [("a", "x", png(1)), ("b", "x", png(2))]
    changed = {"missing": rows[:1], "captions": [rows[0], ("b", "y", png(2))], "order": rows[::-1]}[change]
    for name, content in (("reference", rows), ("same", rows), ("built", changed)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "test.parquet", content)
    assert script.check(tmp_path / "same", tmp_path / "reference", 0.0)
    assert not script.check(tmp_path / "built", tmp_path / "reference", 255.0)
    assert capsys.readouterr().out.count("test: ") == 2


def test_errors_end_the_program_with_one_line(script, tmp_path, no_network, monkeypatch, capsys):
    options = ["--output_dir", str(tmp_path / "output"), "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: drawing needs resvg-py: pip install"):
        script.main(options)
    monkeypatch.setattr(script, "find_spec", lambda name: object())
    with pytest.raises(SystemExit, match="error: cannot download https://"):
        script.main(options)
    for wrong, message in (
        (["--num_processes", "0"], "--num_processes is 0, but must be at least 1"),
        (["--check", str(tmp_path / "absent")], "absent, which is not a folder"),
        (["--check", str(tmp_path / "output")], "the folder that is written; give another copy"),
    ):
        with pytest.raises(SystemExit):
            script.main([*options, *wrong])
        assert message in capsys.readouterr().err
