"""A gallery is found as an exact search finds it, follows its folder, and survives whatever happens to a build."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess

import datasets
import numpy as np
import pytest
import torch
from gallery_encoder import DIM, PlainEncoder, draw, picture
from PIL import Image
from processes import run_processes

from modeling_pico import pair_scores
from modeling_pico.data import CaptionedImageDataset
from modeling_pico.search import PicoIndex
from modeling_pico.search import index as index_module
from modeling_pico.search.embeddings import exact_scores, pack, unpack
from modeling_pico.search.first_stage import FirstStage


QUERY = "a red circle"


@pytest.fixture(params=["lancedb", "qdrant"])
def store(request) -> str:
    return request.param


@pytest.fixture
def make(tmp_path, store):
    """Makes an index; closed afterwards."""
    made = []

    def build(name: str = "index", encoder=None, **options) -> PicoIndex:
        index = PicoIndex.create(tmp_path / name, encoder or PlainEncoder(), store=store, **options)
        made.append(index)
        return index

    yield build
    for index in made:
        index.close()


def add(index, images, **options):
    return index.add(images, progress=False, **options)


def names(hits) -> list[str]:
    return [os.path.basename(hit.path) for hit in hits]


def contents(index) -> dict[str, tuple]:
    rows = index._store.all()
    return {row.id: (row.path, row.data, row.columns) for row in rows}


def exact(query: str, numbers) -> list[tuple[str, float]]:
    """Names and scores of pictures, best first, from the definition."""
    encoder = PlainEncoder()
    words = torch.from_numpy(encoder.encode_texts([query])[0])[None]
    found = {}
    for number in numbers:
        patches = torch.from_numpy(encoder.encode_images([picture(number)])[0]).half().float()[None]
        masks = (torch.ones(part.shape[:2], dtype=torch.bool) for part in (patches, words))
        found[f"{number}.png"] = pair_scores(patches, words, *masks).item()
    return sorted(found.items(), key=lambda item: -item[1])


# What is found


def test_hits_and_scores_are_those_of_the_definition(make, tmp_path):
    draw(tmp_path / "pictures", range(30))
    index = make()
    assert add(index, tmp_path / "pictures").added == 30
    hits = index.search(QUERY, k=5)
    expected = exact(QUERY, range(30))[:5]
    assert names(hits) == [name for name, _ in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], rtol=1e-5)
    assert all(os.path.isabs(hit.path) for hit in hits)
    assert len(index.search(QUERY, k=100)) == 30


def test_first_stage_finds_the_best_of_a_gallery_that_is_not_scored_whole(make, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CANDIDATES", 100)
    draw(tmp_path / "pictures", range(400))
    index = make()
    add(index, tmp_path / "pictures")
    assert (index.folder / "first_stage.npz").exists()
    shares = []
    for query in ("a red circle", "two blue stars", "green", "the square above it"):
        best = {name for name, _ in exact(query, range(400))[:10]}
        shares.append(len(best & set(names(index.search(query, 10, candidates=100)))) / 10)
    # By chance a quarter.
    assert np.mean(shares) >= 0.9
    assert names(index.search(picture(7), 1, candidates=100)) == ["7.png"]


def test_first_stage_of_a_gallery_that_grows_sees_what_was_there_before(make, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CANDIDATES", 50)
    index = make()
    add(index, draw(tmp_path / "early", range(40)))
    assert not (index.folder / "first_stage.npz").exists()
    add(index, draw(tmp_path / "late", range(40, 120)))
    for number in (3, 17, 39, 80):
        assert names(index.search(picture(number), 1, candidates=5)) == [f"{number}.png"]


class Kinds(PlainEncoder):
    """Images of two kinds that have nothing in common: the tokens of pictures from 1,000 on lie elsewhere."""

    def encode_images(self, images, batch_size=32):
        encoded = super().encode_images(images, batch_size)
        return [
            tokens if image.width == DIM else 0.2 * tokens + 3 for image, tokens in zip(images, encoded, strict=True)
        ]


def test_first_stage_is_fitted_to_another_kind_of_images_that_came_later(make, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CANDIDATES", 40)
    index = make(encoder=Kinds())
    add(index, draw(tmp_path / "early", range(100)))
    other = [picture(number).resize((DIM + 8, 4)) for number in range(1000, 1200)]
    first_stage = index._first_stage()
    add(index, other[:20])
    assert index._first_stage() is first_stage and first_stage.size == 100
    add(index, other)
    assert index._first_stage().size == len(index) == 300
    shares = []
    for number in range(0, 200, 10):
        best = {hit.id for hit in index.search(other[number], 10, candidates=1000)}
        shares.append(len(best & {hit.id for hit in index.search(other[number], 10, candidates=40)}) / 10)
    (index.folder / "first_stage.npz").unlink()
    assert index._first_stage() is None
    assert np.mean(shares) >= 0.9


def test_processes_meet_equally_often_whatever_lies_on_the_disk(tmp_path, monkeypatch):
    met = []
    from_main = index_module.Processes.from_main
    monkeypatch.setattr(index_module.Processes, "from_main", lambda *given: met.append(0) or from_main(*given))
    monkeypatch.setattr(index_module, "CANDIDATES", 20)
    index = PicoIndex.create(tmp_path / "index", PlainEncoder())
    add(index, [picture(100)])
    counts = []
    for _ in range(2):  # the first stage is fitted once
        met.clear()
        add(index, [picture(number) for number in range(30)])
        counts.append(len(met))
        index.delete([hit.id for hit in index.search(QUERY, 40)])
    assert (index.folder / index_module.FIRST_STAGE_FILE).exists() and counts[0] == counts[1]


def test_first_stage_is_exact_where_tokens_are_centroids():
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((5, DIM)).astype(np.float32)
    stage = FirstStage.fit(np.repeat(centroids, 60, axis=0), 6)
    image, query = centroids[[0, 3, 3]], centroids[[1, 3, 4, 4]]
    expected = exact_scores(query, image, np.array([3]))[0]
    assert stage.of_image(image) @ stage.of_query(query) == pytest.approx(expected, rel=1e-5)
    # What differs alike from the centroids counts in full: all centroids meet the one token that there is.
    query = rng.standard_normal((1, DIM)).astype(np.float32)
    moved = image + 0.01
    first_mean = (moved @ query.T).max(axis=1).mean()
    size = len(stage.centroids) + DIM
    assert stage.of_image(moved)[:size] @ stage.of_query(query)[:size] == pytest.approx(first_mean, rel=1e-4)


def test_int8_takes_half_and_ranks_alike(make, tmp_path):
    paths = draw(tmp_path / "pictures", range(50))
    index = make(precision="int8")
    add(index, paths)
    hits = index.search(QUERY, 5)
    expected = dict(exact(QUERY, range(50)))
    for hit in hits:
        assert hit.score == pytest.approx(expected[os.path.basename(hit.path)], abs=0.02)
    tokens = np.random.default_rng(0).standard_normal((49, 128)).astype(np.float32)
    tokens[3] = 0
    assert len(pack(tokens, "int8")) == 49 * (128 + 4)
    error = np.abs(unpack(pack(tokens, "int8"), 128, "int8") - tokens).max(axis=1)
    assert (error <= np.abs(tokens).max(axis=1) / 254 * 1.001).all()


def test_scores_in_numpy_are_pair_scores():
    rng = np.random.default_rng(1)
    query = rng.standard_normal((5, DIM)).astype(np.float32)
    items = [rng.standard_normal((count, DIM)).astype(np.float32) for count in (3, 0, 7, 1, 0)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(item) for item in items], batch_first=True)
    mask = torch.arange(7)[None] < torch.tensor([len(item) for item in items])[:, None]
    whole = pair_scores(padded, torch.from_numpy(query)[None], mask, torch.ones(1, 5, dtype=torch.bool))
    tokens, counts = np.concatenate(items), np.array([len(item) for item in items])
    np.testing.assert_allclose(exact_scores(query, tokens, counts), whole[:, 0].numpy(), rtol=1e-5, atol=1e-6)
    assert not exact_scores(query[:0], tokens, counts).any()
    assert not exact_scores(query, tokens[:0], 0 * counts).any()


def test_every_float16_is_read_back():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    whole = values[: len(values) // 8 * 8].reshape(-1, 8)
    read = unpack(pack(whole, "float16"), 8, "float16")
    assert read.dtype == np.float32 and (read == whole.astype(np.float32)).all()


def test_search_with_a_model_scores_as_its_processor(tmp_path, tiny_model, tiny_processor, use_prototypes):
    model = use_prototypes(tiny_model())
    paths = draw(tmp_path / "pictures", range(6))
    index = PicoIndex.create(tmp_path / "index", model, tiny_processor)
    add(index, paths)
    hits = PicoIndex.open(tmp_path / "index", model, tiny_processor).search(QUERY, 6)
    embeds = tiny_processor.encode_images(model, [hit.path for hit in hits])
    expected = tiny_processor.score_retrieval(embeds, tiny_processor.encode_texts(model, [QUERY]))[:, 0]
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=2e-3)


# Filters


def test_filters(make, tmp_path):
    columns = {
        "style": ["ink", "pen", "it's", None] * 5,
        "year": list(range(1990, 2010)),
        "share": [number / 2 for number in range(20)],
        "kept": [number % 2 == 0 for number in range(20)],
        "tags": [["a", "b"]] * 20,
    }
    index = make()
    add(index, draw(tmp_path / "pictures", range(20)), columns=columns)

    def found(where) -> set[int]:
        return {int(name.split(".")[0]) for name in names(index.search(QUERY, 20, where=where))}

    assert found("style = 'ink'") == set(range(0, 20, 4)) == found({"style": "ink"})
    assert found("style in ('ink', 'it''s')") == set(range(0, 20, 2)) == found({"style": ["ink", "it's"]})
    assert found("style != 'ink'") == set(range(1, 20, 4)) | set(range(2, 20, 4))
    assert found("year >= 2005 and kept = true") == {16, 18}
    assert found("share = 1.5") == {3} and found("share < 1 AND `year` <> 1990") == {1}
    assert found("year > 2100") == set()
    hit = index.search(QUERY, 1, where={"year": 1993})[0]
    assert hit.columns == {"style": None, "year": 1993, "share": 1.5, "kept": False, "tags": ["a", "b"]}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("color = 'red'", "no column 'color'.*style .text., year .integer."),
        ({"color": "red"}, "no column 'color'.*style .text., year .integer."),
        ("tags = 'a'", "no column 'tags'"),
        ("style = ink", "'ink' is no value; texts stand in single quotes.*style .text."),
        ("style = 'ink' or year = 1990", "'or' stands where one of and must"),
        ("style = 'ink'; drop table images", "cannot be read"),
        ("style like 'i%'", "'like' stands where"),
        ("year = 'old'", "'year' .integer. cannot be compared with 'old'"),
        ("style > 'ink'", "compared by =, != and in alone"),
        ("year = 1990.5", "'year' .integer. cannot be compared with 1990.5"),
        ("year < 9223372036854775808", "cannot be compared with 9223372036854775808"),
        ("share < 1e400", "'share' .number. cannot be compared with inf"),
        ({"share": float("nan")}, "cannot be compared with nan"),
        ({"year": None}, "cannot be compared with None"),
        ({"year": []}, "cannot be compared"),
        ("year =", "a value .* is missing at the end"),
        ("", "a column is missing at the end"),
    ],
)
def test_filters_that_cannot_be_read_name_the_columns(tmp_path, where, message):
    index = PicoIndex.create(tmp_path / "index", PlainEncoder())
    columns = {"style": ["ink"], "year": [1990], "tags": [["a"]], "share": [0.5]}
    add(index, draw(tmp_path / "pictures", [0]), columns=columns)
    with pytest.raises(ValueError, match=message):
        index.search(QUERY, where=where)


def test_values_are_compared_as_the_columns_hold_them(make, tmp_path):
    columns = {
        "number": [2**53 + 1, -5, 3, None],
        "share": [np.nan, np.float32(0.5), 1e-7, 1e22],
        "text": ["a\\b", "x\ny", "'ü🎉'", np.nan],  # as pandas writes it where there is none
    }
    index = make()
    add(index, draw(tmp_path / "pictures", range(4)), columns=columns)

    def found(where) -> set[int]:
        return {int(name.split(".")[0]) for name in names(index.search(QUERY, 4, where=where))}

    assert found({"number": 2**53 + 1}) == {0} and found({"number": 2**53}) == set()
    assert found("number = 3.0") == found({"number": np.int64(3)}) == found("number in (3.0, 4)") == {2}
    assert found("share > 1e21") == {3} and found("share <= 1e-7") == {2} and found({"share": 0.5}) == {1}
    assert found("share != 0.5") == {2, 3}  # what is no number is unknown, and differs from nothing
    for number, text in enumerate(columns["text"][:3]):
        assert found({"text": text}) == {number}
    assert found("text != 'a'") == {0, 1, 2}


# What an index follows


def test_folder_is_followed(make, tmp_path):
    folder, encoder = tmp_path / "pictures", PlainEncoder()
    draw(folder, range(6))
    index = make(encoder=encoder)
    add(index, folder)
    assert encoder.encoded == 6
    assert vars(add(index, folder)) == {"added": 0, "changed": 0, "removed": 0, "unchanged": 6, "skipped": {}}
    assert encoder.encoded == 6
    picture(100).save(folder / "0.png")  # another picture
    (folder / "1.png").unlink()
    (folder / "2.png").rename(folder / "two.png")
    os.utime(folder / "3.png", (1, 1))  # the same picture
    draw(folder, [9])
    changes = add(index, folder, remove_missing=True)
    assert (changes.added, changes.changed, changes.removed, changes.unchanged) == (1, 2, 1, 3)
    assert encoder.encoded == 8
    assert {os.path.basename(path) for path, *_ in contents(index).values()} == {
        "0.png", "two.png", "3.png", "4.png", "5.png", "9.png",
    }  # fmt: skip
    assert names(index.search(picture(100), 1)) == ["0.png"]


def test_pictures_that_change_places_and_missing_ones_elsewhere(make, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    draw(first, range(3))
    draw(second, range(5, 7))
    index = make()
    add(index, first)
    add(index, second)
    (first / "0.png").rename(first / "x")
    (first / "1.png").rename(first / "0.png")
    (first / "x").rename(first / "1.png")
    (first / "2.png").unlink()
    changes = add(index, first, remove_missing=True)
    assert (changes.changed, changes.removed) == (2, 1)
    assert names(index.search(picture(0), 1)) == ["1.png"] and names(index.search(picture(1), 1)) == ["0.png"]
    assert len(index) == 4  # of the other folder nothing is missing


def test_same_picture_twice_is_one_and_said(make, tmp_path):
    folder = tmp_path / "pictures"
    draw(folder, range(2))
    shutil.copy(folder / "0.png", folder / "copy.png")
    index = make()
    changes = add(index, folder)
    assert changes.added == len(index) == 2
    assert changes.skipped == {str(folder / "copy.png"): f"the same image as {folder / '0.png'}"}
    changes = add(index, folder)
    assert changes.unchanged == 2 and list(changes.skipped) == [str(folder / "copy.png")]
    changes = add(index, [folder / "copy.png"])
    assert changes.skipped == {str(folder / "copy.png"): f"the same image as {folder / '0.png'}"}
    (folder / "0.png").unlink()
    assert add(index, folder, remove_missing=True).removed == 0
    assert names(index.search(picture(0), 1)) == ["copy.png"]


def test_a_file_that_is_given_twice_is_one(make, tmp_path):
    first, second = draw(tmp_path / "pictures", range(2))
    index = make()
    columns = {"caption": ["one", "two", "three"]}
    for expected in ((2, 0), (0, 2)):
        changes = add(index, [first, first, second], columns=columns)
        assert (changes.added, changes.unchanged) == expected
        assert list(changes.skipped) == [str(first)] and "more than once" in changes.skipped[str(first)]
    assert index.search(first, 1)[0].columns == {"caption": "one"} and len(index) == 2


def test_a_file_that_takes_the_place_of_another_leaves_one_and_removes_one(make, tmp_path):
    first, second = draw(tmp_path / "pictures", range(2))
    index = make()
    add(index, tmp_path / "pictures")
    second.rename(first)
    changes = add(index, tmp_path / "pictures")
    assert (changes.changed, changes.removed, len(index)) == (1, 1, 1)
    assert names(index.search(picture(1))) == ["0.png"]


@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0"])
def test_damaged_metadata_leave_a_picture(make, tmp_path, exif):
    picture(0).save(tmp_path / "a.png", exif=exif)
    picture(1).save(tmp_path / "b.webp", exif=exif, lossless=True)
    assert add(make(), [tmp_path / "a.png", tmp_path / "b.webp"]).added == 2


def test_an_index_that_was_opened_empty_sees_what_another_adds(tmp_path):
    index = PicoIndex.create(tmp_path / "index", PlainEncoder())
    other = PicoIndex.open(tmp_path / "index", PlainEncoder())
    assert other.search(QUERY) == [] and len(other) == 0
    add(index, [picture(0)], columns={"style": ["ink"]})
    assert len(other.search(QUERY, where="style = 'ink'")) == len(other) == 1
    assert other.values("style") == ["ink"] and len(other.embeddings(other.search(QUERY)[0].id)) == 4


def test_first_stage_holds_one_batch_of_pictures_at_a_time(make, monkeypatch):
    class Batches(PlainEncoder):
        def encode_images(self, images, batch_size=32):
            assert len(images) <= batch_size
            return super().encode_images(images, batch_size)

    monkeypatch.setattr(index_module, "CANDIDATES", 20)
    index = make(encoder=Batches())
    add(index, [picture(number) for number in range(30)], batch_size=7)
    assert (index.folder / "first_stage.npz").exists()


def test_unreadable_pictures_are_counted_and_named(make, tmp_path):
    folder = tmp_path / "pictures"
    draw(folder, range(3))
    (folder / "text.jpg").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    os.mkfifo(folder / "pipe.png")
    (folder / ".hidden").write_text("left out")
    shutil.copy(folder / "1.png", os.fsencode(folder) + b"/\xff.png")
    index = make()
    changes = add(index, folder)
    assert changes.added == len(index) == 3 and len(changes.skipped) == 4
    assert "not an image" in changes.skipped[str(folder / "text.jpg")]
    assert "truncated" in changes.skipped[str(folder / "cut.png")]
    assert "not a file" in changes.skipped[str(folder / "pipe.png")]
    only = tmp_path / "only"
    only.mkdir()
    (only / "text.jpg").write_text("no picture")
    other = make("other")
    assert len(add(other, only).skipped) == 1 and len(other) == 0 and other.search(QUERY) == []


def test_images_without_numbers_are_skipped(make):
    class Broken(PlainEncoder):
        def encode_images(self, images, batch_size=32):
            encoded = super().encode_images(images, batch_size)
            encoded[0][0, 0] = np.nan
            return encoded

    index = make(encoder=Broken())
    changes = add(index, [picture(0), picture(1)])
    assert changes.added == 1 and "NaN" in changes.skipped["image 0"]


def test_pil_images_bytes_and_data_sets(make, tmp_path):
    paths = draw(tmp_path / "pictures", range(4))
    index = make()
    assert add(index, [picture(0), picture(1), picture(0)]).added == 2
    assert add(index, [picture(0)]).unchanged == 1
    files = make("files")
    assert add(files, [path.read_bytes() for path in paths]).added == 4
    assert files.search(paths[2].read_bytes(), 1)[0].id == files.search(paths[2], 1)[0].id
    assert index.search(picture(1), 1)[0].path is None
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"path": None, "bytes": paths[0].read_bytes()}, {"path": str(paths[1]), "bytes": None}],
            "captions": [["one", "two"], ["three"]],
            "image_id": [5, 6],
            "style": [0, 1],
            "other": [{"x": 1}, {"x": 2}],
            "kinds": [[1, 0], [-1]],
        },
        features=datasets.Features(
            image=datasets.Image(),
            captions=datasets.List(datasets.Value("string")),
            image_id=datasets.Value("int64"),
            style=datasets.ClassLabel(names=["ink", "pen"]),
            other={"x": datasets.Value("int64")},
            kinds=datasets.List(datasets.ClassLabel(names=["plant", "animal"])),
        ),
    )
    index = make("rows")
    assert add(index, rows).added == 2
    hits = index.search(picture(1), 2)
    assert hits[0].columns == {"captions": ["three"], "image_id": 6, "style": "pen", "kinds": [None]}
    assert hits[1].columns["kinds"] == ["animal", "plant"]
    assert hits[0].path == str(paths[1]) and hits[1].path is None
    assert add(index, rows).unchanged == 2
    changes = add(index, rows.select([1]).map(lambda row: {"image_id": 7}), remove_missing=True)
    assert (changes.changed, changes.removed, len(index)) == (1, 1, 1)
    assert index.search(picture(1), 1)[0].columns["image_id"] == 7
    captioned = CaptionedImageDataset(rows.remove_columns("other").cast_column("style", datasets.Value("string")))
    index = make("captioned")
    assert add(index, captioned).added == 2 and add(index, captioned.in_look("gray")).added == 2


def test_delete_and_info(make, tmp_path, store):
    index = make()
    assert index.info()["images"] == 0 and index.delete("0" * 32) == 0
    add(index, draw(tmp_path / "pictures", range(4)), columns={"style": list("abcd")})
    hit = index.search(QUERY, 1)[0]
    assert index.delete(hit.id) == 1 and index.delete([hit.id, "none'"]) == 0 and len(index) == 3
    assert hit.id not in {other.id for other in index.search(QUERY)}
    info = index.info()
    assert (info["images"], info["store"], info["dim"], info["columns"]) == (3, store, DIM, {"style": "text"})
    assert info["bytes"] > 1000 and info["model"]["name"] == "plain"
    index.close()
    again = PicoIndex.open(index.folder)
    assert len(again) == 3 and again.info()["model"] == info["model"]
    with pytest.raises(ValueError, match="opened without a model"):
        again.search(QUERY)
    again.close()


# What is refused


def test_a_model_without_its_processor_is_refused(tmp_path, tiny_model, tiny_processor):
    PicoIndex.create(tmp_path / "index", tiny_model(), tiny_processor)
    with pytest.raises(ValueError, match="processor as well"):
        PicoIndex.open(tmp_path / "index", tiny_model())


def test_qdrant_without_a_server_lets_in_one_at_a_time(tmp_path):
    index = PicoIndex.create(tmp_path / "index", PlainEncoder(), store="qdrant")
    add(index, [picture(0)])
    with pytest.raises(ValueError, match="open elsewhere: .*one process"):
        len(PicoIndex.open(tmp_path / "index"))
    index.close()


def test_another_model_is_refused_by_name(tmp_path, tiny_model, tiny_processor):
    model = tiny_model()
    model.config._name_or_path = "user/first"
    PicoIndex.create(tmp_path / "index", model, tiny_processor)
    PicoIndex.open(tmp_path / "index", model, tiny_processor)
    with torch.no_grad():
        model.alignment_head.style_prototypes["image"].column_scale.add_(1)
    model.config._name_or_path = "user/second"
    with pytest.raises(ValueError, match="another model: user/first .pico, .*This is user/second .pico"):
        PicoIndex.open(tmp_path / "index", model, tiny_processor)


def test_model_saved_and_loaded_is_the_same(tmp_path, tiny_model, tiny_processor):
    model = tiny_model()
    PicoIndex.create(tmp_path / "index", model, tiny_processor)
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    PicoIndex.open(tmp_path / "index", loaded, type(tiny_processor).from_pretrained(tmp_path / "model"))


def test_bad_input_is_refused(make, tmp_path):
    index = make()
    (tmp_path / "empty").mkdir()
    for images, message in (
        (tmp_path / "empty", "no file in"),
        (tmp_path / "missing", "not a folder"),
        ([], "no image to add"),
        (5, "got int"),
    ):
        with pytest.raises(ValueError, match=message):
            add(index, images)
    with pytest.raises(ValueError, match="2 values for 1 images"):
        add(index, [picture(0)], columns={"style": ["a", "b"]})
    with pytest.raises(ValueError, match="'style' holds values of the type.s. int, str"):
        add(index, [picture(0), picture(1)], columns={"style": ["a", 1]})
    assert index.search(QUERY) == []
    add(index, [picture(0)], columns={"style": ["a"]})
    with pytest.raises(ValueError, match="'look' .text. is none of the index.*style .text."):
        add(index, [picture(1)], columns={"look": ["a"]})
    with pytest.raises(ValueError, match="integers of more than 64 bits"):
        add(index, [picture(1)], columns={"style": [2**63]})
    with pytest.raises(ValueError, match="NaN or infinite"):
        Nowhere = type("Nowhere", (PlainEncoder,), {"encode_texts": lambda self, texts: [np.full((1, DIM), np.nan)]})
        index._encoder, kept = Nowhere(), index._encoder
        index.search(QUERY)
    index._encoder = kept
    for query in ("", "  \n"):
        with pytest.raises(ValueError, match="query is empty"):
            index.search(query)
    for options in ({"k": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            index.search(QUERY, **options)
    with pytest.raises(ValueError, match="does not exist"):
        index.search(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="holds an index already"):
        make()


def test_folders_that_are_no_index(tmp_path):
    with pytest.raises(ValueError, match="holds no index"):
        PicoIndex.open(tmp_path / "missing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        PicoIndex.create(tmp_path / "full", PlainEncoder())
    index_file = tmp_path / "full" / "index.json"
    for text, message in (
        ("{", "not that of an index"),
        ("[]", "not that of"),
        ('{"schema_version": 99}', "version 99"),
    ):
        index_file.write_text(text)
        with pytest.raises(ValueError, match=message):
            PicoIndex.open(tmp_path / "full")
    for options, message in (
        ({"precision": "int4"}, "'float16', 'int8'"),
        ({"store": "faiss"}, "'lancedb', 'qdrant'"),
        ({"url": "http://localhost:6333"}, "store='qdrant' alone"),
        ({"align": True}, "needs a PicoModel"),
    ):
        with pytest.raises(ValueError, match=message):
            PicoIndex.create(tmp_path / "new", PlainEncoder(), **options)
    assert not (tmp_path / "new").exists()


# What happens to builds


class Interrupted(PlainEncoder):
    """Ends the build at the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def encode_images(self, images, batch_size=32):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().encode_images(images, batch_size)


def test_interrupted_build_continues_and_ends_equal(make, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "COMMIT_IMAGES", 8)
    monkeypatch.setattr(index_module, "CANDIDATES", 20)
    folder = tmp_path / "pictures"
    draw(folder, range(50))
    whole = make("whole")
    add(whole, folder)
    broken = make("broken", Interrupted(13 + 4))  # of those that fit the first stage, and of two commits
    with pytest.raises(KeyboardInterrupt):
        add(broken, folder, batch_size=4)
    held = len(broken)
    assert 0 < held < 50 and held % 8 == 0
    broken._encoder = encoder = PlainEncoder()
    changes = add(broken, folder)
    assert (changes.unchanged, changes.added, encoder.encoded) == (held, 50 - held, 50 - held)
    assert contents(broken) == contents(whole)
    assert broken.search(QUERY, 5, candidates=10) == whole.search(QUERY, 5, candidates=10)


def _write_and_wait(folder, started, go_on) -> None:
    class Slow(PlainEncoder):
        def encode_images(self, images, batch_size=32):
            started.set()
            go_on.wait(60)
            return super().encode_images(images, batch_size)

    PicoIndex.open(folder, Slow()).add([picture(0)], progress=False)


def test_second_writer_is_refused_and_readers_are_not(tmp_path):
    index = PicoIndex.create(tmp_path / "index", PlainEncoder())
    add(index, [picture(5)])
    context = multiprocessing.get_context("forkserver")
    started, go_on = context.Event(), context.Event()
    other = context.Process(target=_write_and_wait, args=(tmp_path / "index", started, go_on))
    other.start()
    try:
        assert started.wait(60)
        with pytest.raises(ValueError, match="Another process is writing"):
            add(index, [picture(1)])
        with pytest.raises(ValueError, match="Another process is writing"):
            index.delete("0" * 32)
        assert len(index.search(QUERY)) == 1
    finally:
        go_on.set()
        other.join(60)
    assert other.exitcode == 0 and len(index) == 2
    assert add(index, [picture(1)]).added == 1


def test_search_while_files_are_brought_together(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CANDIDATES", 20)
    monkeypatch.setattr(index_module, "COMMIT_IMAGES", 5)
    monkeypatch.setattr("modeling_pico.search.store_lancedb._MOST_FILES", 1)
    index = PicoIndex.create(tmp_path / "index", PlainEncoder())
    paths = draw(tmp_path / "pictures", range(60))
    add(index, paths)
    expected = index.search(QUERY, 5, candidates=20)
    size = index.info()["bytes"]
    for path in paths[:3]:  # so that there is something to bring together
        index.delete(index.search(path, 1)[0].id)
        add(index, [path])
    table, take = index._store._table, index._store._table.take_row_ids

    def tidy_first(rows):
        monkeypatch.setattr(table, "take_row_ids", take)
        PicoIndex.open(index.folder)._store.tidy()
        return take(rows)

    monkeypatch.setattr(table, "take_row_ids", tidy_first)
    assert index.search(QUERY, 5, candidates=20) == expected
    assert index.info()["bytes"] < 1.5 * size  # what was brought together is not kept twice


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("IO error: No space left on device")])
def test_full_disk_is_named_and_leaves_the_index_as_it_was(make, tmp_path, monkeypatch, error):
    index = make()
    add(index, draw(tmp_path / "pictures", range(3)))
    before = contents(index)

    def fail(self, rows):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(index._store), "add", fail)
        with pytest.raises(OSError, match="disk is full") as raised:
            add(index, draw(tmp_path / "more", range(3, 6)))
    assert raised.value.errno == errno.ENOSPC
    assert contents(index) == before
    assert add(index, tmp_path / "more").added == 3


class Wide(PlainEncoder):
    """Tokens that take their room on a disk."""

    def encode_images(self, images, batch_size=32):
        seeds = [int(np.asarray(image).astype(np.int64).sum()) for image in images]
        return [np.random.default_rng(seed).standard_normal((49, 64)).astype(np.float32) for seed in seeds]


def test_disk_that_is_full(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount") and ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not mount or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        monkeypatch.setattr(index_module, "COMMIT_IMAGES", 40)
        pictures = [picture(number) for number in range(400)]
        index = PicoIndex.create(disk / "index", Wide())
        add(index, pictures[:40])
        before = contents(index)
        for _ in range(2):
            with pytest.raises(OSError, match="disk is full"):
                add(index, pictures)
        index = PicoIndex.open(disk / "index", Wide())
        held = contents(index)
        assert before.items() <= held.items() and len(held) % 40 == 0 and len(held) < 400
        assert len(index.search(pictures[3], 5)) == 5
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert add(index, pictures).added == 400 - len(held) and len(index) == 400
        assert held.items() <= contents(index).items()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# Alignment


def test_moved_gallery_keeps_what_moves_it(tmp_path, tiny_model, tiny_processor):
    model = tiny_model()
    paths = draw(tmp_path / "pictures", range(40))
    colours = [Image.new("RGB", (16, 16), (6 * number, 90, 200)) for number in range(40)]
    model.fit_alignment([tiny_processor(images=colours, return_tensors="pt")])
    index = PicoIndex.create(tmp_path / "index", model, tiny_processor, align=True)
    add(index, paths[:36])
    alignment = model.align([tiny_processor(images=paths[:36], return_tensors="pt")])
    late = PicoIndex.open(tmp_path / "index", model, tiny_processor)
    add(late, paths[36:])
    expected = tiny_processor.encode_images(model, paths, align=alignment, convert_to_numpy=True)
    held = {row.path: late._unpack(row) for row in late._store.all()}
    for path, tokens in zip(paths, expected, strict=True):
        np.testing.assert_allclose(held[str(path)], tokens, atol=2e-3)
    plain = tiny_processor.encode_images(model, paths[:1], convert_to_numpy=True)[0]
    assert np.abs(held[str(paths[0])] - plain).max() > 0.02
    # A picture of the gallery is asked for as it was moved.
    assert late.search(paths[3], 1)[0].path == str(paths[3])
    with pytest.raises(ValueError, match="at least 32"):
        add(PicoIndex.create(tmp_path / "few", model, tiny_processor, align=True), paths[:5])


# Several processes


def _build(folder, pictures):
    from accelerate import PartialState

    index_module.COMMIT_IMAGES, index_module.CANDIDATES = 4, 20
    encoder = PlainEncoder()
    index = PicoIndex.create(folder, encoder)
    changes = index.add(pictures, progress=False)
    main = PartialState().is_main_process
    return encoder.encoded, vars(changes), contents(index) if main else None


@pytest.mark.distributed
def test_processes_share_the_work_and_make_one_index(tmp_path):
    folder = tmp_path / "pictures"
    draw(folder, range(29))
    shutil.copy(folder / "0.png", folder / "zz.png")
    (folder / "bad.png").write_text("no picture")
    alone = PicoIndex.create(tmp_path / "alone", PlainEncoder())
    expected = vars(alone.add(folder, progress=False))
    (first, changes, held), (second, other_changes, _) = run_processes(_build, 2, tmp_path / "both", folder)
    assert changes == other_changes == expected and held == contents(alone)
    # Both encode about half, and the main process some more to fit the first stage.
    assert 13 <= second <= 16 and 13 + 20 <= first <= 17 + 31
    assert json.loads((tmp_path / "both" / "index.json").read_text())["dim"] == DIM


def _refused(folder, pictures):
    try:
        PicoIndex.create(folder, PlainEncoder())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_what_one_process_is_refused_ends_all(tmp_path):
    PicoIndex.create(tmp_path / "index", PlainEncoder())
    assert all("holds an index already" in text for text in run_processes(_refused, 2, tmp_path / "index", None))
