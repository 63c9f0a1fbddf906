"""Which rows are a split: no row is training and test data at once, and no id means two pictures."""

from __future__ import annotations

import json
import logging
import re
import shutil

import datasets
import pytest
from PIL import Image

from modeling_pico.data import CaptionedImageDataset, check_distinct, load_captioned_images
from modeling_pico.data.splits import find_split, split_of_file


@pytest.fixture
def table(tmp_path):
    """Writes rows as a file of a kind; returns its path."""

    def write(rows, kind, name="data"):
        path = tmp_path / f"{name}.{kind}"
        if kind in ("csv", "CSV"):
            lines = [list(rows[0]), *(row.values() for row in rows)]
            path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        elif kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif kind == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        elif kind == "folder":
            path.mkdir()
            write(rows, "csv", f"{name}.folder/rows")
        else:
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        return str(path)

    return write


KINDS = ["csv", "CSV", "jsonl", "parquet", "saved", "folder"]
ROWS = [{"image": f"{name}.png", "caption": name} for name in "abc"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_without_splits_serves_one_purpose(table, kind):
    source = table(ROWS, kind)
    assert len(load_captioned_images(source, split="train")) == 3
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=rf"no split '{split}'; it has \['train'\].*train.csv.*a column 'split'"):
            load_captioned_images(source, split=split)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_says_which_rows_are_a_split(table, kind):
    source = table([{**row, "split": split} for row, split in zip(ROWS, ("train", "val", "test"), strict=True)], kind)

    def captions(split):
        return load_captioned_images(source, split=split)["captions"][:]

    assert captions("train") == [["a"]] and captions("test") == [["c"]]
    assert captions("validation") == captions("val") == captions("dev") == [["b"]]
    assert captions("train+test") == [["a"], ["c"]] and captions("test[:100%]") == [["c"]]
    with pytest.raises(ValueError, match=r"The column 'split' of .*no split 'far'; it has \['train', 'val', 'test'\]"):
        captions("far")


def test_a_column_that_does_not_say_it_of_every_row(table):
    source = table([{**row, "split": split} for row, split in zip(ROWS, ("train", "", "test"), strict=True)], "csv")
    with pytest.raises(ValueError, match=r"The column 'split' is empty in 1 rows, the first are \[1\]"):
        load_captioned_images(source, split="train")


def test_names_of_splits(tmp_path):
    names = {"test.csv": "test", "captions_val2017.json": "validation", "my-dev.parquet": "validation"}
    names |= {"data.csv": "train", "train_test.csv": "train", "contest.csv": "train", "TEST.CSV": "test"}
    for name, split in names.items():
        assert split_of_file(tmp_path / name) == split, name
    assert find_split("validation", ["train", "dev"], "x") == "dev"
    assert find_split("val", ["val", "validation"], "x") == "val"
    with pytest.raises(ValueError, match=r"x has no split 'validation'; it has \['dev', 'val'\]"):
        find_split("validation", ["dev", "val"], "x")  # which of them is not known


def test_a_file_is_the_split_of_its_name(table):
    source = table(ROWS, "csv", "test")
    assert len(load_captioned_images(source, split="test")) == 3
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['test'\]"):
        load_captioned_images(source, split="train")


def test_splits_of_a_folder_are_those_of_its_files(table):
    for name in ("train", "validation"):
        source = table([{**ROWS[0], "caption": f"{name} row", "split": "test"}], "csv", name)
    folder = source.rsplit("/", 1)[0]
    assert load_captioned_images(folder, split="validation")["captions"][:] == [["validation row"]]


# Equal data under two names


@pytest.fixture
def pictures(tmp_path):
    def make(folder, colors, caption="a picture"):
        (tmp_path / folder).mkdir()
        lines = ["image,caption"]
        for number, color in enumerate(colors):
            Image.new("RGB", (6, 4), color).save(tmp_path / folder / f"{number}.bmp")
            lines.append(f"{number}.bmp,{caption} {number}")
        (tmp_path / folder / "data.csv").write_text("\n".join(lines))
        return load_captioned_images(str(tmp_path / folder / "data.csv"), split="train")

    return make


def test_equal_data_under_two_names_are_refused(pictures, tmp_path):
    rows = pictures("a", ["red", "green", "blue"])
    message = "The splits 'train' and 'test' hold the same data: each of the 2 rows of 'test' is also a row of 'train'"
    with pytest.raises(ValueError, match=message):
        check_distinct({"train": rows, "validation": rows.select([]), "test": rows.select([2, 0])})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copied = load_captioned_images(str(tmp_path / "copy" / "data.csv"), split="train")
    with pytest.raises(ValueError, match="'a' and 'copy' hold the same data: each of the 3 rows of 'a'"):
        check_distinct({"a": rows, "copy": copied})


def test_images_that_two_splits_share_are_a_warning(pictures, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modeling_pico"), "propagate", True)
    pictures("a", ["red", "green", "blue"])
    table = tmp_path / "a" / "rows.csv"
    # A caption a row, dealt out one by one: the picture 1.bmp is in both splits.
    table.write_text("image,caption,split\n0.bmp,one,train\n1.bmp,two,train\n1.bmp,three,test\n2.bmp,four,test\n")
    parts = {name: load_captioned_images(str(table), split=name) for name in ("train", "test")}
    check_distinct(parts)
    assert "1 of 2 images of the split 'train' are also images of 'test'" in caplog.text
    caplog.clear()
    check_distinct({"train": parts["train"].select([0]), "test": parts["test"]})
    assert not caplog.text


def test_other_pictures_or_captions_are_other_data(pictures):
    rows = pictures("a", ["red", "green"])
    # The same names, captions and sizes of files.
    check_distinct({"train": rows, "test": pictures("b", ["red", "blue"])})
    check_distinct({"train": rows, "test": pictures("c", ["red", "green"], "another")})
    check_distinct({"train": rows.select([0]), "test": rows.select([1])})


# Ids


def test_ids_that_were_made_are_unique_across_sources(pictures):
    one, two = pictures("a", ["red", "green"]), pictures("b", ["red", "blue"])
    for join in (datasets.concatenate_datasets, datasets.interleave_datasets):
        assert len(set(join([one, two])["image_id"])) == 4
        assert CaptionedImageDataset(join([one, two])).ids.unique().numel() == 4


def test_ids_that_were_made_are_the_same_in_every_load(pictures, tmp_path):
    first = pictures("a", ["red", "green"])
    again = load_captioned_images(str(tmp_path / "a" / "data.csv"), split="train")
    assert again["image_id"][:] == first["image_id"][:]
    content = [(tmp_path / "a" / f"{number}.bmp").read_bytes() for number in (0, 1, 0)]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = {"image": [{"bytes": image, "path": None} for image in content], "caption": ["x", "y", "z"]}
    for name, order in (("p", [0, 1, 2]), ("q", [1, 2])):
        datasets.Dataset.from_dict(rows, features=features).select(order).to_parquet(str(tmp_path / f"{name}.parquet"))
    p, q = (load_captioned_images(str(tmp_path / f"{name}.parquet"), split="train") for name in "pq")
    assert p["captions"][:] == [["x", "z"], ["y"]]
    assert q["image_id"][:] == p["image_id"][::-1]  # the same pictures, wherever they come from


def test_rows_without_images_are_told_apart_too(table):
    one, two = (
        load_captioned_images(table([{"image": "", "caption": c} for c in captions], "jsonl", name), split="train")
        for name, captions in (("one", "aab"), ("two", "ab"))
    )
    assert len(set(one["image_id"]) | set(two["image_id"])) == 5


def test_ids_of_two_files_of_captions_are_not_one_meaning(tmp_path):
    sets = []
    for name in ("coco", "flickr30k"):
        entry = {"filename": f"{name}.png", "split": "train", "imgid": 0, "sentences": [{"raw": name}]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": [entry]}))
        sets.append(load_captioned_images(str(tmp_path / f"{name}.json"), split="train"))
        (tmp_path / f"{name}_train_caps.txt").write_text(f"{name}\n")
        (tmp_path / f"{name}_train_ids.txt").write_text("0\n")
        sets.append(load_captioned_images(str(tmp_path / name), split="train"))
    assert len(set(datasets.concatenate_datasets(sets)["image_id"])) == 4
    assert {image_id.split(":")[1] for rows in sets for image_id in rows["image_id"]} == {"0"}


def test_one_id_for_several_images_of_a_list_is_refused(tmp_path):
    entries = [
        {"filename": f"{name}.png", "split": "train", "imgid": number, "sentences": [{"raw": name}]}
        for name, number in (("a", 7), ("b", 8), ("a", 7), ("c", "7"))
    ]
    path = tmp_path / "joined.json"
    path.write_text(json.dumps({"images": entries}))
    with pytest.raises(ValueError, match=r"joined.json' gives one id \(7\) to several images"):
        load_captioned_images(str(path), split="train")
    path.write_text(json.dumps({"images": entries[:3]}))
    assert len(load_captioned_images(str(path), split="train")) == 2


def test_styles_of_captions_are_no_styles_of_images(table, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modeling_pico"), "propagate", True)
    tones = [{**ROWS[0], "style": "plain"}, {**ROWS[0], "caption": "another", "style": "romantic"}]
    source = table([*tones, {**ROWS[1], "style": "plain"}], "csv")
    problem = r"gives 1 of 2 images several styles, the first at the rows \[0, 1\]: it is not the style of the image"
    assert load_captioned_images(source, split="train").column_names == ["image", "captions", "image_id"]
    assert re.search(rf"'style' {problem} and is left out", caplog.text)
    with pytest.raises(ValueError, match=problem):
        load_captioned_images(source, split="train", style_column="style")


def test_ids_of_a_column_are_kept(table):
    source = table([{**row, "meaning": f"0{number}"} for number, row in enumerate(ROWS)], "csv")
    assert load_captioned_images(source, split="train", id_column="meaning")["image_id"][:] == ["00", "01", "02"]
