"""Small copies of the layouts that data sets have on the Hub, read by the options that docs/data.md gives."""

from __future__ import annotations

import csv
import importlib
import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from modeling_pico.data import check_distinct, check_images, load_captioned_images


sources = importlib.import_module("modeling_pico.data.sources")


def picture(number: int, kind: str = "jpeg") -> bytes:
    """A picture that no other number has."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (20 * number, 255 - 20 * number, 60)).save(stream, kind)
    return stream.getvalue()


def shown(loaded: datasets.Dataset) -> list[int]:
    """The numbers of the pictures, as their pixels say them."""
    decoded = loaded.cast_column("image", datasets.Image())["image"]
    return [round(image.convert("RGB").getpixel((0, 0))[0] / 20) for image in decoded]


@pytest.fixture
def hub(tmp_path):
    """Writes the parquet files of a data set as the Hub holds them (its rows by split); returns its name."""

    def write(splits, image="image", pattern="data/{}-00000-of-00001.parquet"):
        for split, rows in splits.items():
            rows = [{image: {"bytes": picture(number), "path": f"{number}.jpg"}, **row} for number, row in rows]
            table = datasets.Dataset.from_list(rows).cast_column(image, datasets.Image())
            path = tmp_path / "set" / pattern.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(str(path))
        return str(tmp_path / "set")

    return write


def captions(*arguments, **options):
    return load_captioned_images(*arguments, **options)["captions"][:]


# A caption a column: jxie/flickr8k


FIVE = [f"caption_{number}" for number in range(5)]


def five(name):
    return {column: f"{name}{number}" for number, column in enumerate(FIVE)}


def test_a_caption_a_column(hub, monkeypatch):
    rows = [(1, five("a")), (2, {**five("b"), "caption_1": None, "caption_4": " "})]
    source = hub({"train": rows, "validation": [(3, five("c"))], "test": [(4, five("d"))]})
    messages: list[str] = []
    monkeypatch.setattr(sources.logger, "warning", messages.append)
    loaded = load_captioned_images(source, split="train", caption_column=FIVE)
    assert loaded["captions"][:] == [["a0", "a1", "a2", "a3", "a4"], ["b0", "b2", "b3"]]
    assert shown(loaded) == [1, 2]
    assert messages == ["2 of 10 captions are empty and were dropped."]
    assert captions(source, split="val", caption_column=("caption_4", "caption_0")) == [["c4", "c0"]]
    assert captions(source, split="test", caption_column="caption_2") == [["d2"]]
    assert captions(source, split="test", caption_column=["caption_2"]) == [["d2"]]


def test_columns_of_captions_that_cannot_be_meant(hub):
    source = hub({"train": [(1, five("a")), (2, {**five("b"), "caption_3": "b3\nb4"})]})
    with pytest.raises(ValueError, match=r"none of the usual columns .*the columns are \['image', 'caption_0', 'capt"):
        load_captioned_images(source, split="train")
    with pytest.raises(ValueError, match="`caption_column` names 'caption_0' more than once"):
        load_captioned_images(source, split="train", caption_column=["caption_0", "caption_1", "caption_0"])
    with pytest.raises(ValueError, match=r"no column 'caption_5' \(`caption_column`\); the columns are .*'caption_4'"):
        load_captioned_images(source, split="train", caption_column=[*FIVE, "caption_5"])
    with pytest.raises(ValueError, match=r"'caption_3' holds texts of several lines in 1 of 2 rows, .* \[1\]"):
        load_captioned_images(source, split="train", caption_column=FIVE)
    with pytest.raises(ValueError, match="'image' must hold text"):
        load_captioned_images(source, split="train", caption_column=["caption_0", "image"])


def test_columns_of_lists_and_of_texts_count_alike(hub):
    source = hub({"train": [(1, {"caption": ["a", "b"], "title": "c"}), (2, {"caption": [], "title": "d"})]})
    assert captions(source, split="train", caption_column=["caption", "title"]) == [["a", "b", "c"], ["d"]]


# All splits in one: the parquet copy of nlphuji/flickr30k


def karpathy_rows(column):
    words = ["train", "restval", "val", "test", "train"]
    return [(number, {"caption": [f"{word} {number}"], column: word}) for number, word in enumerate(words)]


@pytest.mark.parametrize(
    ("column", "options"),
    [("split", {"split_column": "split"}), ("split", {}), ("karpathy", {"split_column": "karpathy"})],
)
def test_all_splits_in_one(hub, column, options):
    source = hub({"test": karpathy_rows(column)}, pattern="TEST/{}/0000.parquet")
    loaded = load_captioned_images(source, split="train", **options)
    assert loaded["captions"][:] == [["train 0"], ["restval 1"], ["train 4"]]  # as in Karpathy's files
    assert shown(loaded) == [0, 1, 4]
    assert captions(source, split="validation", **options) == [["val 2"]]
    assert captions(source, split="test", **options) == [["test 3"]]
    for split in ("far", "restval"):
        with pytest.raises(
            ValueError, match=rf"column '{column}' of .* no split '{split}'; it has \['train', 'val', 't"
        ):
            load_captioned_images(source, split=split, **options)


def test_another_column_says_more_than_split(hub):
    rows = [(n, {"caption": [w], "split": "x", "fold": w}) for n, w in enumerate(("train", "test"))]
    source = hub({"train": rows})
    assert captions(source, split="test", split_column="fold") == [["test"]]
    with pytest.raises(ValueError, match=r"'split' of .* has no split 'test'; it has \['x'\]"):
        load_captioned_images(source, split="test")


def test_a_column_of_splits_that_cannot_be_meant(hub, tmp_path):
    source = hub({"test": karpathy_rows("fold")}, pattern="TEST/{}/0000.parquet")
    with pytest.raises(ValueError, match=r"no column 'split' \(`split_column`\); the columns are .*'fold'"):
        load_captioned_images(source, split="train", split_column="split")
    with pytest.raises(ValueError, match="no split 'train'.*name the one that does by `split_column`"):
        load_captioned_images(source, split="train")
    parts = hub({"train": karpathy_rows("fold"), "val": karpathy_rows("fold")}, pattern="parts/{}.parquet")
    with pytest.raises(ValueError, match=r"has the splits \['train', 'validation'\] of its own. Leave out `split_col"):
        load_captioned_images(f"{parts}/parts", split="train", split_column="fold")
    write_coco(tmp_path / "captions_val2017.json", [1])
    for name in (str(tmp_path / "captions_val2017.json"), "styled_shapes"):
        with pytest.raises(ValueError, match="says which of its rows are a split without a column. Leave out"):
            load_captioned_images(name, split="validation", split_column="split")


SPLITS = ("train", "restval", "test")


# Lists under other names: AnyModal/flickr30k, patomp/thai-mscoco-2014-captions


def test_a_list_under_another_name(hub):
    row = {"alt_text": ["a", "b"], "original_alt_text": ["c", "d"], "split": "train", "sentids": ["0", "1"]}
    source = hub({"train": [(1, row)], "validation": [(2, row)], "test": [(3, {**row, "alt_text": ["e"]})]})
    assert captions(source, split="test", caption_column="alt_text") == [["e"]]
    assert captions(source, split="test", caption_column="original_alt_text") == [["c", "d"]]
    with pytest.raises(ValueError, match=r"none of the usual columns .*'alt_text', 'original_alt_text'"):
        load_captioned_images(source, split="test")  # which of them people wrote is not known


def test_sentences_of_karpathy_in_columns(hub):
    row = {"sentences_raw": ["a\nb", "c"], "sentences_tokens": [["a", "b"], ["c"]], "th_sentences_raw": ["d"]}
    source = hub({"train": [(1, row)], "test": [(2, {**row, "sentences_raw": ["e", "f"]})]})
    assert captions(source, split="test") == [["e", "f"]]
    assert captions(source, split="train") == [["a b", "c"]]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_lists_as_text(tmp_path, write):
    """The annotations of nlphuji/flickr30k, and what pandas makes of lists."""
    texts = {"a": ['A "young" man.', "It's, here"], "b": ["c"], "d": ["e\nf", "g"]}
    with open(tmp_path / "flickr_annotations.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["raw", "split", "filename"])
        for (name, lines), split in zip(texts.items(), SPLITS, strict=True):
            table.writerow([write(lines), split, f"{name}.jpg"])
        table.writerow(["[sic] a sign, no list]", "test", "h.jpg"])
    options = {"caption_column": "raw", "image_column": "filename"}
    source = str(tmp_path / "flickr_annotations.csv")
    assert captions(source, split="train", **options) == [texts["a"], texts["b"]]
    assert captions(source, split="test", **options) == [["e f", "g"], ["[sic] a sign, no list]"]]


@pytest.mark.parametrize(
    "text", ["['a b' 'c']", "['a b'\n 'c']", "[ 'a', 'b' ]", "['a', \"b]", "['a', 1]", ' ["a" "b"]\n']
)
def test_lists_as_other_texts_are_not_one_caption(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": text}))
    with pytest.raises(ValueError, match=r"'caption' holds lists as text in 1 of 1 rows, the first are \[0\], which"):
        load_captioned_images(str(tmp_path / "train.jsonl"), split="train")


def test_a_sentence_a_row(hub):
    source = hub(
        {"train": [(n, {"sentences": {"raw": text, "imgid": n}}) for n, text in ((1, "a"), (2, "b"), (1, "c"))]}
    )
    assert captions(source, split="train") == [["a", "c"], ["b"]]


def test_the_only_column_of_images_needs_no_name(hub):
    source = hub({"train": [(1, {"caption": "a"})]}, image="photo")
    assert shown(load_captioned_images(source, split="train")) == [1]


# WebDataset: clip-benchmark/wds_flickr8k, and what img2dataset writes


def write_shard(path: Path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def pairs(numbers, kind="jpg", lines=5):
    samples = {}
    for number in numbers:
        samples[f"s{number:07d}.{kind}"] = picture(number, {"jpg": "jpeg"}.get(kind, kind))
        samples[f"s{number:07d}.txt"] = "\n".join(f"{number} {line}" for line in range(lines))
    return samples


@pytest.fixture
def shards(tmp_path):
    """The layout of clip-benchmark: folders of shards and their number."""
    folder = tmp_path / "wds"
    write_shard(folder / "train/0.tar", pairs([1, 2]))
    write_shard(folder / "train/1.tar", pairs([3, 4]))
    write_shard(folder / "test/0.tar", pairs([5]))
    write_shard(folder / "test/1.tar", pairs([6]))
    for split in ("train", "test"):
        (folder / split / "nshards.txt").write_text("2")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def lines_of(*numbers, lines=5):
    return [[f"{number} {line}" for line in range(lines)] for number in numbers]


def test_a_webdataset_has_a_caption_a_line(shards, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(sources.logger, "warning", messages.append)
    train = load_captioned_images(str(shards), split="train")
    assert train["captions"][:] == lines_of(1, 2, 3, 4) and shown(train) == [1, 2, 3, 4]
    assert captions(str(shards), split="test") == lines_of(5, 6)
    assert captions(str(shards), split="train[:1]+test") == lines_of(1, 5, 6)
    assert not messages
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['train', 'test'\]"):
        load_captioned_images(str(shards), split="validation")


def test_shards_by_their_names(shards, tmp_path):
    assert captions(str(shards / "test/0.tar"), split="train") == lines_of(5)
    assert captions(str(shards / "train/*.tar"), split="train") == lines_of(1, 2, 3, 4)
    for source in (shards / "*/*.tar", shards / "**/*.tar"):
        assert captions(str(source), split="train") == lines_of(1, 2, 3, 4)
        assert captions(str(source), split="test") == lines_of(5, 6)
    (tmp_path / "flat").mkdir()
    for name, part in (("train-000", "train/0"), ("train-001", "train/1"), ("test-000", "test/0")):
        (shards / f"{part}.tar").rename(tmp_path / f"flat/{name}.tar")
    for source in (tmp_path / "flat", tmp_path / "flat/*.tar", tmp_path / "flat/t*-00?.tar"):
        assert captions(str(source), split="train") == lines_of(1, 2, 3, 4)
        assert captions(str(source), split="test") == lines_of(5)
    assert captions("webdataset", split="test", data_files={"test": f"{tmp_path}/flat/test-*.tar"}) == lines_of(5)
    with pytest.raises(ValueError, match="No file matches .*val-"):
        load_captioned_images(str(tmp_path / "flat/val-*.tar"), split="val")
    (tmp_path / "flat/train-002.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"files of several kinds: \['.csv', '.tar'\]"):
        load_captioned_images(str(tmp_path / "flat/train-*"), split="train")
    (tmp_path / "flat/train-003.tar").symlink_to(shards / "dataset_type.txt")
    with pytest.raises(ValueError, match=r"1 of 3 files .* lie outside of its folder"):
        load_captioned_images(str(tmp_path / "flat/train-*.tar"), split="train")


def test_tables_by_a_pattern(tmp_path):
    for name in ("train-0", "train-1", "test"):
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{name}.png,{name}\n")
    loaded = load_captioned_images(f"{tmp_path}/*.csv", split="train")
    assert loaded["captions"][:] == [["train-0"], ["train-1"]]
    assert Path(loaded[0]["image"]["path"]) == tmp_path / "train-0.png"


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp"])
def test_pictures_of_a_webdataset_by_their_endings(tmp_path, kind):
    write_shard(tmp_path / "0.tar", pairs([1, 2], kind, lines=1))
    loaded = load_captioned_images(str(tmp_path / "0.tar"), split="train")
    assert loaded["captions"][:] == [["1 0"], ["2 0"]]
    assert check_images(loaded, "error") is loaded


def test_two_pictures_a_sample_are_not_chosen_from(tmp_path):
    write_shard(tmp_path / "0.tar", {"1.jpg": picture(1), "1.mask.png": picture(2, "png"), "1.txt": "a"})
    with pytest.raises(ValueError, match=r"several columns with images: \['jpg', 'mask.png'\]. Name one"):
        load_captioned_images(str(tmp_path), split="train")
    assert shown(load_captioned_images(str(tmp_path), split="train", image_column="mask.png")) == [2]


def test_samples_of_other_parts_are_not_read_in_part(tmp_path):
    write_shard(tmp_path / "0.tar", {**pairs(range(6)), **pairs([7], "png")})
    with pytest.raises(ValueError, match="1 of 7 images"):
        check_images(load_captioned_images(str(tmp_path), split="train"), "error")


def test_json_of_a_webdataset(tmp_path):
    samples = {}
    for number in (1, 2):
        record = {"caption": f"short {number}", "captions": [f"{number} a", f"{number} b"], "key": f"k{number}"}
        samples |= {f"{number}.jpg": picture(number), f"{number}.json": json.dumps(record)}
    write_shard(tmp_path / "json/0.tar", samples)
    source = str(tmp_path / "json")
    loaded = load_captioned_images(source, split="train", id_column="json.key")
    assert loaded["captions"][:] == [["1 a", "1 b"], ["2 a", "2 b"]] and loaded["image_id"][:] == ["k1", "k2"]
    assert captions(source, split="train", caption_column="json.caption") == [["short 1"], ["short 2"]]
    with pytest.raises(ValueError, match=r"the columns are \['jpg', 'json.caption', 'json.captions', 'json.key'"):
        load_captioned_images(source, split="train", caption_column="json.text")
    # As img2dataset writes it: the text is the caption, and JSON says it again.
    texts = {f"{number}.txt": f"text {number}" for number in (1, 2)}
    write_shard(tmp_path / "both/0.tar", dict(sorted({**samples, **texts}.items())))
    assert captions(str(tmp_path / "both"), split="train") == [["text 1"], ["text 2"]]


def test_lines_in_json_are_not_captions(tmp_path):
    write_shard(tmp_path / "0.tar", {"1.jpg": picture(1), "1.json": json.dumps({"caption": "one\ntwo"})})
    with pytest.raises(ValueError, match="'json.caption' holds texts of several lines in 1 of 1 rows"):
        load_captioned_images(str(tmp_path), split="train")


def test_texts_of_one_line_among_texts_of_several(tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", {**pairs([1]), **pairs([2, 3], lines=1)})
    messages: list[str] = []
    monkeypatch.setattr(sources.logger, "warning", messages.append)
    assert captions(str(tmp_path), split="train") == [*lines_of(1), ["2 0"], ["3 0"]]
    assert messages == [
        "Each line of 'txt' counts as a caption: 1 of 3 rows have several, up to 5, and the others one."
    ]


def test_shards_as_a_table_do_not_lose_their_lines(shards, tmp_path):
    rows = datasets.load_dataset(str(shards), split="train", cache_dir=str(tmp_path / "cache"))
    rows.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="'txt' holds texts of several lines in 4 of 4 rows"):
        load_captioned_images(str(tmp_path / "train.parquet"), split="train")
    rows.save_to_disk(str(tmp_path / "saved"))
    assert captions(str(tmp_path / "saved"), split="train") == lines_of(1, 2, 3, 4)


# COCO's own annotations


def write_coco(path: Path, numbers, name="{:012d}.jpg"):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": name.format(number)} for number in numbers]
    annotations = [{"image_id": n, "id": 10 * n + k, "caption": f"{n} {k}"} for k in range(5) for n in numbers]
    contents = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    path.write_text(json.dumps(contents))


@pytest.fixture
def coco(tmp_path):
    """COCO of 2017 as its archives unpack."""
    for split, numbers in (("train2017", (1, 2, 3)), ("val2017", (4, 5))):
        write_coco(tmp_path / f"mscoco/annotations/captions_{split}.json", numbers)
        instances = tmp_path / f"mscoco/annotations/instances_{split}.json"
        instances.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
        (tmp_path / "mscoco" / split).mkdir()
        for number in numbers:
            (tmp_path / "mscoco" / split / f"{number:012d}.jpg").write_bytes(picture(number))
    return tmp_path / "mscoco"


def test_annotations_of_coco(coco):
    options = {"image_dir": str(coco)}
    train = load_captioned_images(str(coco / "annotations"), split="train", **options)
    validation = load_captioned_images(str(coco / "annotations"), split="val", **options)
    assert train["captions"][:] == lines_of(1, 2, 3) and shown(train) == [1, 2, 3]
    assert validation["captions"][:] == lines_of(4, 5) and shown(validation) == [4, 5]
    check_distinct({"train": train, "val": validation})
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train', 'validation'\]"):
        load_captioned_images(str(coco / "annotations"), split="test", **options)
    for folder in (coco, coco / "val2017"):
        file = str(coco / "annotations/captions_val2017.json")
        assert shown(load_captioned_images(file, split="validation", image_dir=str(folder))) == [4, 5]
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['validation'\]"):
        load_captioned_images(str(coco / "annotations/captions_val2017.json"), split="train", **options)


def test_two_years_of_coco(coco):
    write_coco(coco / "annotations/captions_val2014.json", [8], "COCO_val2014_{:012d}.jpg")
    message = r"\['captions_val2014.json', 'captions_val2017.json'\] in .* are all the split 'validation'. Name one"
    with pytest.raises(ValueError, match=message):
        load_captioned_images(str(coco / "annotations"), split="val", image_dir=str(coco))
    source = str(coco / "annotations/captions_*2017.json")
    for split, numbers in (("train", [1, 2, 3]), ("val", [4, 5])):
        assert shown(load_captioned_images(source, split=split, image_dir=str(coco))) == numbers


def test_a_file_of_coco_for_one_split_serves_no_other(coco):
    (coco / "annotations/captions_train2017.json").unlink()
    assert captions(str(coco / "annotations"), split="val", image_dir=str(coco)) == lines_of(4, 5)
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['validation'\]"):
        load_captioned_images(str(coco / "annotations"), split="train", image_dir=str(coco))


# Line breaks


def test_a_list_of_one_text_is_no_more_than_the_text(hub):
    source = hub({"train": [(1, {"caption": ["a\nb", ""]}), (2, {"caption": ["c"]})]})
    with pytest.raises(
        ValueError, match=r"'caption' holds texts of several lines in 1 of 2 rows, the first are \[0\]"
    ):
        load_captioned_images(source, split="train")


def test_entries_of_coco_are_captions_whatever_is_in_them(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(sources.logger, "warning", messages.append)
    entry = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one\ncaption"}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [entry]}))
    assert captions(str(tmp_path / "dataset.json"), split="train") == [["one caption"]]
    assert ["1 of 1 rows" in message for message in messages] == [True]
