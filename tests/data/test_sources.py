from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_pico.data import CaptionedImageDataset, SampleKey, load_captioned_images


sources = importlib.import_module("modeling_pico.data.sources")
JOINED = "has captions with line breaks, which became spaces,"


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


def known_ids(dataset):
    """The ids as the files give them, without the digest that makes them unique."""
    return [image_id.split(":")[1] for image_id in dataset["image_id"]]


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
    assert len(set(loaded["image_id"])) == 2
    assert loaded["style"][:] == ["x", "y"]
    assert loaded[1]["image"]["bytes"] == two.read_bytes()


@pytest.mark.parametrize("name", ["styled_shapes", "folder", "folder/train.parquet", "folder/*.parquet"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path, monkeypatch, make_images, name):
    (one,) = make_images("images/one.png")
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    save_parquet(Path("folder/train.parquet"), [{"image": png(one), "caption": "a"}], image=datasets.Image())
    what = "is generated" if name == "styled_shapes" else "lies on this disk"
    message = rf"`revision` \(--dataset_revision\) is 'v2', .* but '{re.escape(name)}' {what}\. Leave it out"
    with pytest.raises(ValueError, match=message):
        load_captioned_images(name, split="train", revision="v2")


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


def test_metadata_csv_is_read_as_any_csv(tmp_path, make_images):
    make_images(*(f"folder/train/images/{name}.png" for name in "abcd"))
    lines = ["images/a.png,NA,0012", "images/b.png,None,012", "images/c.png,null,12", 'images/d.png,"1.50",1e3']
    (tmp_path / "folder/train/metadata.csv").write_text("\n".join(["file_name,text,meaning", *lines]))
    loaded = load_captioned_images(str(tmp_path / "folder"), split="train", id_column="meaning")
    check_canonical(loaded)
    assert loaded["captions"][:] == [["NA"], ["None"], ["null"], ["1.50"]]
    assert loaded["image_id"][:] == ["0012", "012", "12", "1e3"]
    assert [image["path"][-12:] for image in loaded["image"][:]] == [f"images/{name}.png" for name in "abcd"]
    (tmp_path / "folder/train/metadata.csv").write_text("file_name,text\nimages/a.png,red, blue\n")
    with pytest.raises(ValueError, match=r"1 of 1 rows of .*metadata.csv.*\[\(2, 3\)\].*need quotes"):
        load_captioned_images(str(tmp_path / "folder"), split="train")


def test_a_folder_of_csv_files_is_read_as_any_csv(tmp_path, make_images):
    make_images("folder/a.png")
    for name in ("train-1", "train-2", "test"):
        (tmp_path / f"folder/{name}.csv").write_text(f"image,caption,meaning\na.png,NA,0012\na.png,{name},012\n")
    loaded = load_captioned_images(str(tmp_path / "folder"), split="train", id_column="meaning")
    assert loaded["captions"][:] == [["NA", "NA"], ["train-1", "train-2"]]
    assert loaded["image_id"][:] == ["0012", "012"]
    (tmp_path / "folder/train-2.csv").write_text("image,text\na.png,x\n")
    with pytest.raises(ValueError, match="the files of one split have different columns"):
        load_captioned_images(str(tmp_path / "folder"), split="train")


def test_lines_of_other_texts_are_never_joined_in_silence(tmp_path, warnings_of):
    (tmp_path / "data.csv").write_text('image,caption\na.png,"one\ntwo"\nb.png,"three\n"\n')
    with pytest.raises(
        ValueError, match=r"'caption' holds texts of several lines in 1 of 2 rows, the first are \[0\]"
    ):
        load_captioned_images(str(tmp_path / "data.csv"), split="train")
    messages = warnings_of(sources)
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "a.png", "captions": ["one\ntwo", "three\n"]}))
    loaded = load_captioned_images(str(tmp_path / "data.jsonl"), split="train")
    assert loaded["captions"][:] == [["one two", "three"]]
    assert messages == [f"The column 'captions' {JOINED} in 1 of 1 rows, the first are [0]."]


def test_layouts_of_well_known_data(tmp_path):
    (tmp_path / "results.csv").write_text(
        'image_name| comment_number| comment\n1.jpg| 0| Two "young" guys, one "old" .\n1.jpg| 1| "Hi" , he said\n'
    )
    loaded = load_captioned_images(str(tmp_path / "results.csv"), split="train")
    assert loaded["captions"][:] == [['Two "young" guys, one "old" .', '"Hi" , he said']]
    assert Path(loaded[0]["image"]["path"]) == tmp_path / "1.jpg"
    for name in ("captions.txt", "CAPTIONS.CSV"):
        (tmp_path / name).write_text('image,caption\n1.jpg,A child .\n2.jpg,"A dog , running"\n')
        loaded = load_captioned_images(str(tmp_path / name), split="train")
        assert loaded["captions"][:] == [["A child ."], ["A dog , running"]]
    (tmp_path / "tokens.txt").write_text("1.jpg#0\tA child .\n1.jpg#1\tA girl .\n")
    with pytest.raises(ValueError, match=r"tokens.txt' must name the columns \(for example `image,caption`\)"):
        load_captioned_images(str(tmp_path / "tokens.txt"), split="train")


def test_captions_of_coco(tmp_path):
    contents = {
        "info": {"year": 2017},
        "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 4, "file_name": "b.jpg"}],
        "annotations": [
            {"id": n, "image_id": i, "caption": c} for n, i, c in ((1, 4, "b1"), (2, 9, "a1"), (3, 4, "b2"))
        ],
    }
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps(contents))
    loaded = load_captioned_images(str(file), split="validation")
    check_canonical(loaded)
    assert loaded["captions"][:] == [["a1"], ["b1", "b2"]]
    assert [Path(image["path"]) for image in loaded["image"]] == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['validation'\]"):
        load_captioned_images(str(file), split="train")
    for change in ({"annotations": [{"image_id": 5, "caption": "x"}]}, {"annotations": [{"image_id": 9, "id": 1}]}):
        file.write_text(json.dumps({**contents, **change}))
        with pytest.raises(ValueError, match="is not laid out like COCO's captions"):
            load_captioned_images(str(file), split="val")


@pytest.mark.parametrize("wide", [False, True])
def test_images_stored_without_the_feature(tmp_path, make_images, wide):
    one, two = (path.read_bytes() for path in make_images("one.png", "two.png"))
    kinds = (pa.large_binary(), pa.large_string()) if wide else (pa.binary(), pa.string())
    images = [{"bytes": one, "path": "x.png"}, {"bytes": two, "path": None}]
    struct = pa.struct(list(zip(("bytes", "path"), kinds, strict=True)))
    pq.write_table(pa.table({"image": pa.array(images, struct), "caption": ["a", "b"]}), tmp_path / "data.parquet")
    loaded = load_captioned_images(str(tmp_path / "data.parquet"), split="train")
    check_canonical(loaded)
    assert [image["bytes"] for image in loaded["image"][:]] == [one, two]


@pytest.mark.parametrize(
    "kind", ["csv", "jsonl", "bytes", "metadata.csv", "metadata.jsonl", "karpathy", "caption files"]
)
def test_every_caption_stays_with_its_image(kind, tmp_path):
    """Of more rows than small tests have, in the table and in the samples made of it."""
    count = 130
    (tmp_path / "train").mkdir()
    names, texts = [f"train/{row}.png" for row in range(count)], [f"picture {row}" for row in range(count)]
    for row, name in enumerate(names):
        Image.new("RGB", (1, 1), (row, 255 - row, 7)).save(tmp_path / name)
    source = tmp_path / f"data.{kind}"
    pairs = list(zip(names, texts, strict=True))
    if kind == "csv":
        source.write_text("\n".join(["image,caption", *map(",".join, pairs)]))
    elif kind == "jsonl":
        source.write_text("\n".join(json.dumps({"image": name, "caption": text}) for name, text in pairs))
    elif kind == "bytes":
        rows = [{"image": png(tmp_path / name), "caption": text} for name, text in pairs]
        source = save_parquet(tmp_path / "data.parquet", rows, image=datasets.Image())
    elif kind == "metadata.csv":
        lines = [f"{row}.png,{text}" for row, text in enumerate(texts)]
        (tmp_path / "train" / kind).write_text("\n".join(["file_name,text", *lines]))
        source = tmp_path
    elif kind == "metadata.jsonl":
        lines = [json.dumps({"file_name": f"{row}.png", "text": text}) for row, text in enumerate(texts)]
        (tmp_path / "train" / kind).write_text("\n".join(lines))
        source = tmp_path
    elif kind == "karpathy":
        entries = [{"filename": n, "split": "train", "sentences": [{"raw": t}]} for n, t in pairs]
        source = tmp_path / "data.json"
        source.write_text(json.dumps({"images": entries}))
    else:
        write_lines(tmp_path / "train_caps.txt", texts)
        write_lines(tmp_path / "train_ids.txt", map(str, range(count)))
        (tmp_path / "id_mapping.json").write_text(json.dumps(dict(enumerate(names))))
        source = tmp_path
    data = CaptionedImageDataset(load_captioned_images(str(source), split="train"))
    assert len(data) == count
    for row in range(count):
        whole, sample = data[row], data[SampleKey(row, 0, 0)]
        shown = whole["image"].getpixel((0, 0))[0]
        assert whole["captions"] == [sample["caption"]] == [f"picture {shown}"]
        assert sample["image"].getpixel((0, 0))[0] == shown
        assert whole["image_id"] == sample["image_id"] == data.ids[row]


def test_saved_to_disk(tmp_path, make_images):
    (one,) = make_images("one.png")
    dataset = datasets.Dataset.from_dict({"image": [str(one)], "caption": ["x"]})
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "splits"))
    loaded = load_captioned_images(str(tmp_path / "splits"), split="train", image_dir=str(tmp_path))
    check_canonical(loaded)
    assert Path(loaded[0]["image"]["path"]) == one
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
    assert Path(loaded[0]["image"]["path"]) == one
    (tmp_path / "data.csv").write_text("image,caption\none.png,hello\n")
    options = {"split": "train", "cache_dir": cache, "image_dir": str(tmp_path / "pictures")}
    assert Path(load_captioned_images(str(tmp_path / "data.csv"), **options)[0]["image"]["path"]) == one


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
    assert known_ids(loaded) == ["7", "3"]
    assert [Path(i["path"]) for i in loaded["image"]] == [
        tmp_path / "images/val2014/a.jpg",
        tmp_path / "images/b.jpg",
    ]
    # Without `image_dir` the images lie beside the file; a folder `filepath` that does not exist is left out.
    assert Path(load_captioned_images(str(file), split="train")[0]["image"]["path"]) == tmp_path / "a.jpg"
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
    loaded = load_captioned_images(str(tmp_path / "f30k"), split="test")
    check_canonical(loaded)
    assert loaded["captions"][:] == [["a1", "a2 still a2"], ["b1"]]
    assert known_ids(loaded) == ["10", "11"]
    assert Path(loaded[0]["image"]["path"]) == tmp_path / "x/a.jpg"


def test_caption_files_one_id_an_image(tmp_path):
    write_lines(tmp_path / "train_caps.txt", [f"caption {i}" for i in range(10)])
    write_lines(tmp_path / "train_ids.txt", ["4", "2"])
    loaded = load_captioned_images(str(tmp_path), split="train")
    assert loaded["image"][:] == [None, None]  # without a mapping there are no images
    assert known_ids(loaded) == ["4", "2"]
    assert loaded["captions"][:] == [[f"caption {i}" for i in range(5)], [f"caption {i}" for i in range(5, 10)]]


def test_caption_files_that_do_not_fit(tmp_path):
    source = str(tmp_path / "a")
    write_lines(tmp_path / "a_test_caps.txt", ["x", "y", "z"])
    with pytest.raises(FileNotFoundError, match="a_test_ids.txt"):
        load_captioned_images(source, split="test")
    write_lines(tmp_path / "a_test_ids.txt", ["1", "2"])
    with pytest.raises(ValueError, match=r"one line a caption \(3\).*\(0.6\), but has 2"):
        load_captioned_images(source, split="test")
    write_lines(tmp_path / "a_test_ids.txt", ["1", "1", "2"])
    (tmp_path / "id_mapping.json").write_text('{"1": "a.jpg"}')
    with pytest.raises(ValueError, match="lacks 1 of 2 ids, the first are \\['2'\\]"):
        load_captioned_images(source, split="test")
    for name, split in (("a", "dev"), (".", "test")):
        with pytest.raises(ValueError, match="does not exist; the files with captions are .*a_test_caps.txt"):
            load_captioned_images(str(tmp_path / name), split=split)


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
    assert len(set(loaded["image_id"])) == 2
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
    with pytest.raises(ValueError, match=r"none of the usual columns .* \(`caption_column`\).*'words'"):
        load_rows([{"image": "a", "words": "x"}])
    with pytest.raises(ValueError, match=r"none of the usual columns \['image', .* \(`image_column`\)"):
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
    assert messages == [
        f"The column 'captions' {JOINED} in 1 of 1 rows, the first are [0].",
        "3 of 5 captions are empty and were dropped.",
    ]


def test_captions_of_characters_newer_than_python_are_not_empty(load_rows):
    signs = ["\U0001fae9", "\U0001faea", "\ue000"]  # of Unicode 16, of Unicode 17, of a font of one's own
    assert load_rows([{"image": "a", "captions": [*signs, "\u200b\ufeff", "\u00ad"]}])[0]["captions"] == signs


def test_rows_without_captions(load_rows, warnings_of):
    rows = [{"image": "a", "captions": ["x"]}, {"image": "b", "captions": [" "]}, {"image": "c", "captions": []}]
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption.*rows \[1, 2\]"):
        load_rows(rows)
    messages = warnings_of(sources)
    with pytest.raises(ValueError, match="(?s)2 of 3 images have no caption.*more than the share of 0.5"):
        load_rows(rows, on_empty_captions="skip")
    assert load_rows(rows[:2], on_empty_captions="skip")["captions"][:] == [["x"]]
    assert any("1 of 2 images have no caption" in message for message in messages)
    assert load_rows(rows, on_empty_captions="keep")["captions"][:] == [["x"], [], []]
    with pytest.raises(ValueError, match="'error', 'skip' or 'keep', got 'maybe'"):
        load_rows(rows, on_empty_captions="maybe")


def test_unknown_file_type(tmp_path):
    (tmp_path / "data.xyz").write_text("x")
    with pytest.raises(ValueError, match="a data file ends in one of .*parquet"):
        load_captioned_images(str(tmp_path / "data.xyz"), split="train")


# The real data beside the checkout


@pytest.mark.shared
@pytest.mark.parametrize(("name", "split", "images"), [("f30k", "test", 1000), ("coco", "testall", 5000)])
def test_benchmark_captions(shared_data, name, split, images):
    source = shared_data / "captions" / name
    loaded = load_captioned_images(str(source), split=split)
    assert len(loaded) == images
    assert {len(captions) for captions in loaded["captions"]} == {5}
    assert len(set(loaded["image_id"])) == images
    if name == "f30k":
        with_paths = load_captioned_images(str(source), split=split, image_dir=str(shared_data))
        assert Path(with_paths[0]["image"]["path"]) == shared_data / "1007129816.jpg"


@pytest.mark.shared
def test_emoji_styles(shared_data, tmp_path):
    file = str(shared_data / "emoji-styles" / "train.parquet")
    loaded = load_captioned_images(file, split="train", id_column="concept_id", cache_dir=str(tmp_path))
    assert len(loaded) == 9401
    assert len(set(loaded["image_id"])) < 2000
    assert set(loaded["style"]) == {"twemoji", "noto", "openmoji", "fluent-emoji-flat", "noto-v1", "emojione"}
