from __future__ import annotations

import importlib
import json

import datasets
import pytest

from modeling_pico.data import load_captioned_images


sources = importlib.import_module("modeling_pico.data.sources")


def save_parquet(path, rows, **features):
    dataset = datasets.Dataset.from_list(rows)
    for column, feature in features.items():
        dataset = dataset.cast_column(column, feature)
    dataset.to_parquet(str(path))
    return str(path)


def png(path):
    return {"bytes": path.read_bytes(), "path": None}


def check_canonical(dataset, with_style=False):
    assert dataset.features["image"] == datasets.Image(decode=False)
    assert dataset.features["captions"] == datasets.List(datasets.Value("string"))
    assert dataset.features["image_id"] == datasets.Value("string")
    assert dataset.column_names == ["image", "captions", "image_id"] + ["style"] * with_style


# Sources


def test_parquet_file_with_bytes(tmp_path, make_images):
    one, two = make_images("one.png", "two.png")
    rows = [
        {"image": png(one), "captions": ["a", "b"], "style": "x"},
        {"image": png(two), "captions": ["c"], "style": "y"},
    ]
    file = save_parquet(tmp_path / "data.parquet", rows, image=datasets.Image())
    loaded = load_captioned_images(file, split="train", cache_dir=str(tmp_path / "cache"))
    check_canonical(loaded, with_style=True)
    assert loaded["captions"][:] == [["a", "b"], ["c"]]
    assert loaded["image_id"][:] == ["0", "1"]
    assert loaded["style"][:] == ["x", "y"]
    assert loaded[1]["image"]["bytes"] == two.read_bytes()


def test_parquet_folder_finds_its_splits(tmp_path, make_images):
    one, two = make_images("images/one.png", "images/two.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_parquet(folder / "train.parquet", [{"image": png(one), "caption": "a"}], image=datasets.Image())
    save_parquet(folder / "test.parquet", [{"image": png(two), "caption": "b"}], image=datasets.Image())
    cache = str(tmp_path / "cache")
    assert load_captioned_images(str(folder), split="test", cache_dir=cache)["captions"][:] == [["b"]]
    with pytest.raises(ValueError, match="'dev'.*train.*test"):
        load_captioned_images(str(folder), split="dev", cache_dir=cache)


def test_image_folder_with_metadata(tmp_path, make_images):
    make_images("folder/train/a.png", "folder/train/b.png")
    lines = [{"file_name": "a.png", "text": "first"}, {"file_name": "b.png", "text": "second"}]
    (tmp_path / "folder/train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    loaded = load_captioned_images(str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "cache"))
    check_canonical(loaded)
    assert sorted(zip(loaded["captions"][:], [i["path"][-5:] for i in loaded["image"][:]], strict=True)) == [
        (["first"], "a.png"),
        (["second"], "b.png"),
    ]


def test_saved_to_disk(tmp_path, make_images):
    (one,) = make_images("one.png")
    dataset = datasets.Dataset.from_dict({"image": [str(one)], "caption": ["x"]})
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "splits"))
    loaded = load_captioned_images(str(tmp_path / "splits"), split="train", image_dir=str(tmp_path))
    check_canonical(loaded)
    assert loaded[0]["image"]["path"] == str(one)
    with pytest.raises(ValueError, match="no split 'test'; it has \\['train'\\]"):
        load_captioned_images(str(tmp_path / "splits"), split="test")
    datasets.Dataset.from_dict(dataset[:], split="dev").save_to_disk(str(tmp_path / "single"))
    assert len(load_captioned_images(str(tmp_path / "single"), split="dev", image_dir=str(tmp_path))) == 1
    with pytest.raises(ValueError, match="no split 'train'; it has \\['dev'\\]"):
        load_captioned_images(str(tmp_path / "single"), split="train")


def test_csv_file_with_relative_paths(tmp_path, make_images):
    (one,) = make_images("pictures/one.png")
    (tmp_path / "data.csv").write_text("image,caption\npictures/one.png,hello\n")
    cache = str(tmp_path / "cache")
    loaded = load_captioned_images(str(tmp_path / "data.csv"), split="train", cache_dir=cache)
    assert loaded[0]["image"]["path"] == str(one)
    (tmp_path / "data.csv").write_text("image,caption\none.png,hello\n")
    options = {"split": "train", "cache_dir": cache, "image_dir": str(tmp_path / "pictures")}
    assert load_captioned_images(str(tmp_path / "data.csv"), **options)[0]["image"]["path"] == str(one)


KARPATHY = [
    {
        "filename": "a.jpg",
        "filepath": "val2014",
        "split": "train",
        "imgid": 7,
        "sentences": [{"raw": "a1"}, {"raw": "a2"}],
    },
    {"filename": "b.jpg", "split": "restval", "imgid": 3, "sentences": [{"raw": "b1"}]},
    {"filename": "c.jpg", "split": "test", "imgid": 9, "sentences": [{"raw": "c1"}]},
]


def test_karpathy_json(tmp_path):
    (tmp_path / "images/val2014").mkdir(parents=True)
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": KARPATHY, "dataset": "coco"}))
    loaded = load_captioned_images(str(file), split="train", image_dir=str(tmp_path / "images"))
    check_canonical(loaded)
    assert loaded["captions"][:] == [["a1", "a2"], ["b1"]]
    assert loaded["image_id"][:] == ["7", "3"]
    assert [i["path"] for i in loaded["image"][:]] == [
        str(tmp_path / "images/val2014/a.jpg"),
        str(tmp_path / "images/b.jpg"),
    ]
    # Without `image_dir` the images lie beside the file; a folder `filepath` that does not exist is left out.
    assert load_captioned_images(str(file), split="train")[0]["image"]["path"] == str(tmp_path / "a.jpg")
    assert load_captioned_images(str(file), split="test", with_images=False)[0]["image"] is None
    with pytest.raises(ValueError, match="no split 'val'; it has \\['test', 'train'\\]"):
        load_captioned_images(str(file), split="val")
    with pytest.raises(ValueError, match="image_dir.*nowhere.*not a folder"):
        load_captioned_images(str(file), split="train", image_dir=str(tmp_path / "nowhere"))


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_caption_files_one_id_a_caption(tmp_path):
    write_lines(tmp_path / "f30k_test_caps.txt", ["a1", "a2\u2028still a2", "b1"])
    write_lines(tmp_path / "f30k_test_ids.txt", ["10", "10", "11"])
    (tmp_path / "f30k_id_mapping.json").write_text('{"10": "x/a.jpg", "11": "b.jpg", "12": "c.jpg"}')
    loaded = load_captioned_images(str(tmp_path), split="test", image_dir=str(tmp_path))
    check_canonical(loaded)
    assert loaded["captions"][:] == [["a1", "a2 still a2"], ["b1"]]
    assert loaded["image_id"][:] == ["10", "11"]
    assert loaded[0]["image"]["path"] == str(tmp_path / "x/a.jpg")
    assert load_captioned_images(str(tmp_path / "f30k"), split="test")["image"][:] == loaded["image"][:]


def test_caption_files_one_id_an_image(tmp_path):
    write_lines(tmp_path / "train_caps.txt", [f"caption {i}" for i in range(10)])
    write_lines(tmp_path / "train_ids.txt", ["4", "2"])
    loaded = load_captioned_images(str(tmp_path), split="train", with_images=False)
    assert loaded["image"][:] == [None, None]
    assert loaded["image_id"][:] == ["4", "2"]
    assert loaded["captions"][:] == [[f"caption {i}" for i in range(5)], [f"caption {i}" for i in range(5, 10)]]


def test_caption_files_that_do_not_fit(tmp_path):
    write_lines(tmp_path / "a_test_caps.txt", ["x", "y", "z"])
    with pytest.raises(ValueError, match="a_test_ids.txt.*does not exist"):
        load_captioned_images(str(tmp_path), split="test")
    write_lines(tmp_path / "a_test_ids.txt", ["1", "2"])
    with pytest.raises(ValueError, match=r"one line a caption \(3\).*\(0.6\), but has 2"):
        load_captioned_images(str(tmp_path), split="test", with_images=False)
    write_lines(tmp_path / "a_test_ids.txt", ["1", "1", "2"])
    with pytest.raises(ValueError, match="no 'id_mapping.json'.*with_images=False"):
        load_captioned_images(str(tmp_path), split="test")
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg"}')
    with pytest.raises(ValueError, match="lacks 1 of 2 ids, the first are \\['2'\\]"):
        load_captioned_images(str(tmp_path), split="test")
    with pytest.raises(ValueError, match="no captions of the split 'dev'.*a_test_caps.txt"):
        load_captioned_images(str(tmp_path), split="dev")
    write_lines(tmp_path / "b_test_caps.txt", ["x"])
    with pytest.raises(ValueError, match="more than one caption file for the split 'test'"):
        load_captioned_images(str(tmp_path), split="test")


def test_styled_shapes_is_a_source():
    loaded = load_captioned_images("styled_shapes", split="test")
    check_canonical(loaded, with_style=True)
    assert len(loaded) == 400
    assert set(loaded["style"][:]) == {"neon"}


# Columns and rows


@pytest.fixture
def load_rows(tmp_path):
    def load(rows, features=None, **options):
        dataset = datasets.Dataset.from_list(rows, features=features)
        dataset.save_to_disk(str(tmp_path / "rows"))
        return load_captioned_images(str(tmp_path / "rows"), split="train", **options)

    return load


def test_rows_of_one_image_become_one_row(load_rows):
    rows = [
        {"image": "a.png", "caption": "a1"},
        {"image": "b.png", "caption": "b1"},
        {"image": "a.png", "caption": "a2"},
    ]
    loaded = load_rows(rows)
    assert loaded["captions"][:] == [["a1", "a2"], ["b1"]]
    assert loaded["image_id"][:] == ["0", "1"]
    assert [image["path"].rsplit("/")[-1] for image in loaded["image"][:]] == ["a.png", "b.png"]


def test_equal_bytes_are_one_image_whatever_their_path(load_rows):
    image = datasets.Image(decode=False)
    features = datasets.Features(image=image, caption=datasets.Value("string"))
    rows = [
        {"image": {"bytes": b"1", "path": "x.png"}, "caption": "one"},
        {"image": {"bytes": b"2", "path": "x.png"}, "caption": "two"},
        {"image": {"bytes": b"1", "path": "y.png"}, "caption": "three"},
    ]
    loaded = load_rows(rows, features)
    assert loaded["captions"][:] == [["one", "three"], ["two"]]
    assert [image["bytes"] for image in loaded["image"][:]] == [b"1", b"2"]


def test_one_id_with_different_images_stays_separate(load_rows):
    rows = [
        {"image": "a.png", "caption": "a1", "meaning": 5},
        {"image": "b.png", "caption": "b1", "meaning": 5},
        {"image": "a.png", "caption": "a2", "meaning": 6},
        {"image": "a.png", "caption": "a3", "meaning": 5},
    ]
    loaded = load_rows(rows, id_column="meaning")
    assert loaded["captions"][:] == [["a1", "a3"], ["b1"], ["a2"]]
    assert loaded["image_id"][:] == ["5", "5", "6"]
    # Without the pictures the rows are the same.
    alone = load_rows(rows, id_column="meaning", with_images=False)
    assert alone["captions"][:] == loaded["captions"][:]
    assert alone["image"][:] == [None, None, None]


def test_shapes_of_captions(load_rows):
    assert load_rows([{"image": "a", "sentences": [{"raw": "x", "tokens": ["x"]}, {"raw": "y", "tokens": []}]}])[0][
        "captions"
    ] == ["x", "y"]
    assert load_rows([{"image": "a", "text": "x", "caption": "y"}])[0]["captions"] == ["y"]
    assert load_rows([{"image": "a", "text": "x", "caption": "y"}], caption_column="text")[0]["captions"] == ["x"]
    with pytest.raises(ValueError, match="must hold a caption.*1 of 1 rows do not, the first is row 0"):
        load_rows([{"image": "a", "caption": 5}])


def test_class_labels_are_named(load_rows):
    features = datasets.Features(
        image=datasets.Value("string"), text=datasets.Value("string"), kind=datasets.ClassLabel(names=["oil", "ink"])
    )
    rows = [{"image": "a", "text": "x", "kind": 1}]
    assert load_rows(rows, features, style_column="kind")["style"][:] == ["ink"]


@pytest.mark.parametrize("argument", ["image_column", "caption_column", "id_column", "style_column"])
def test_missing_column(load_rows, argument):
    with pytest.raises(
        ValueError, match=rf"no column 'nope' \(`{argument}`\); the columns are \['image', 'caption'\]"
    ):
        load_rows([{"image": "a", "caption": "x"}], **{argument: "nope"})


def test_missing_default_columns(load_rows):
    with pytest.raises(ValueError, match="none of the usual caption columns.*'words'"):
        load_rows([{"image": "a", "words": "x"}])
    with pytest.raises(ValueError, match="no column 'image'"):
        load_rows([{"picture": "a", "caption": "x"}])
    with pytest.raises(ValueError, match="'meaning' is empty in 1 rows, the first are \\[1\\]"):
        load_rows(
            [{"image": c, "caption": "x", "meaning": m} for c, m in (("a", "1"), ("b", None))], id_column="meaning"
        )
    with pytest.raises(ValueError, match="must hold images, bytes or paths"):
        load_rows([{"image": 3, "caption": "x"}])


def test_captions_are_cleaned_and_empty_ones_dropped(load_rows, warnings_of):
    messages = warnings_of(sources)
    loaded = load_rows([{"image": "a", "captions": [" two\r\nlines\x00 ", "  ", "", None, "caf\u00e9"]}])
    assert loaded[0]["captions"] == ["two lines", "caf\u00e9"]
    assert messages == ["3 of 5 captions are empty and were dropped."]


def test_rows_without_captions(load_rows, warnings_of):
    rows = [{"image": "a", "captions": ["x"]}, {"image": "b", "captions": [" "]}, {"image": "c", "captions": []}]
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption.*rows \[1, 2\]"):
        load_rows(rows)
    messages = warnings_of(sources)
    with pytest.raises(ValueError, match=r"2 of 3 rows are more than may be left out: at most a share of 0.5 \("):
        load_rows(rows, on_empty_captions="skip")
    with pytest.raises(ValueError, match="3 of 3 rows are more than may be left out: not all"):
        load_rows([{**row, "captions": [""]} for row in rows], on_empty_captions="skip", max_skipped=1.0)
    with pytest.raises(ValueError, match=r"`max_skipped` is a share of the rows in \[0, 1\], got 50"):
        load_rows(rows, on_empty_captions="skip", max_skipped=50)
    assert load_rows(rows, on_empty_captions="skip", max_skipped=0.7)["captions"][:] == [["x"]]
    assert any("2 of 3 images have no caption" in message for message in messages)
    with pytest.raises(ValueError, match="'error' or 'skip', got 'maybe'"):
        load_rows(rows, on_empty_captions="maybe")


def test_unknown_file_type(tmp_path):
    (tmp_path / "data.xyz").write_text("x")
    with pytest.raises(ValueError, match="a data file ends in one of .*parquet"):
        load_captioned_images(str(tmp_path / "data.xyz"), split="train")


# The real data beside the checkout


@pytest.mark.shared
@pytest.mark.parametrize(("name", "split", "images"), [("f30k", "test", 1000), ("coco", "testall", 5000)])
def test_benchmark_captions(shared_data, name, split, images):
    for source in (shared_data / "captions", shared_data / "captions" / name):
        loaded = load_captioned_images(str(source), split=split, with_images=False)
        assert len(loaded) == images
        assert {len(captions) for captions in loaded["captions"]} == {5}
        assert len(set(loaded["image_id"])) == images
    if name == "f30k":
        with_paths = load_captioned_images(str(source), split=split, image_dir=str(shared_data))
        assert with_paths[0]["image"]["path"] == str(shared_data / "1007129816.jpg")


@pytest.mark.shared
def test_emoji_styles(shared_data, tmp_path):
    file = str(shared_data / "emoji-styles" / "train.parquet")
    loaded = load_captioned_images(file, split="train", id_column="concept_id", cache_dir=str(tmp_path))
    assert len(loaded) == 9401
    assert len(set(loaded["image_id"])) < 2000
    assert set(loaded["style"]) == {"twemoji", "noto", "openmoji", "fluent-emoji-flat", "noto-v1", "emojione"}
