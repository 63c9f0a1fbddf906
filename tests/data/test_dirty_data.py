"""A few hundred of the mutations that `tests/benchmarks/dirty_data.py` runs, and the rules that they have led to."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
from pathlib import Path

import datasets
import dirty_images
import dirty_tables
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_images import decode_bytes, encode

from modeling_pico.data import BadImageError, CaptionedImageDataset, check_images, decode_image, load_captioned_images
from modeling_pico.data.paths import Fence, check_mark


images = importlib.import_module("modeling_pico.data.images")


def test_the_judge_sees_what_it_has_to_see(tmp_path):
    rng = np.random.default_rng(0)
    rows = [dirty_tables.make_row(identity, "image: png", rng) for identity in range(4)]
    rows[1].image = rows[0].image  # the picture of another one
    rows[2].expected = ["another caption"]
    rows[3].image = dirty_images.Dirty(b"", rows[3].image.expected)  # should be good, and is not
    outcome = dirty_tables.run_corpus(rows, dirty_tables.csv_file, tmp_path)
    assert outcome[1].startswith("WRONG")
    assert outcome[2].startswith("WRONG: captions")
    assert outcome[3] == "WRONG: a good row was left out"


def test_the_judge_sees_that_the_fence_is_off(tmp_path, monkeypatch):
    names = ["a path out of the folder", "an absolute path", "a link out of the folder"]

    def outcomes(folder):
        rng = np.random.default_rng(3)
        return {dirty_tables.run_table(name, "csv", rng, tmp_path / folder / name) for name in names}

    assert outcomes("on") == {"refused"}
    monkeypatch.setattr(Fence, "mark", lambda self, path: path)
    assert outcomes("off") == {"WRONG: it was not refused"}


def test_every_mutation_by_one_of_the_routes(tmp_path):
    rng = np.random.default_rng(1)
    routes = [dirty_tables.csv_file, dirty_tables.karpathy, dirty_tables.saved_to_disk]
    counts = dict.fromkeys(("loaded", "reported"), 0)
    for number, route in enumerate(routes):
        names = [name for name in dirty_tables.all_mutations() if dirty_tables.fits(name, route)]
        rows = [dirty_tables.make_row(100 * number + i, name, rng) for i, name in enumerate(names)]
        outcomes = dirty_tables.run_corpus(rows, route, tmp_path / str(number))
        for row in rows:
            assert outcomes.pop(row.identity) in counts, row.mutation
        assert not outcomes
    assert len(names) > 60


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_tables_that_are_broken_as_a_whole(kind, tmp_path):
    rng = np.random.default_rng(2)
    names = [*dirty_tables.TABLES, *dirty_tables.FILES] if kind != "jsonl" else [*dirty_tables.TABLES][::5]
    outcomes = {name: dirty_tables.run_table(name, kind, rng, tmp_path / str(i)) for i, name in enumerate(names)}
    assert {name: outcome for name, outcome in outcomes.items() if outcome and outcome.startswith("WRONG")} == {}
    if kind != "jsonl":
        assert outcomes["nothing"] == outcomes["a row twice"] == outcomes["file with a byte order mark"] == "loaded"
        assert outcomes["a path out of the folder"] == outcomes["an absolute path"] == "refused"
        assert outcomes["a caption of several lines"] == ("refused" if kind == "csv" else "loaded")


# Images


def test_a_drawing_is_not_handed_to_another_program(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    with pytest.raises(BadImageError, match=r"not an image of a format that is read \(.*JPEG, .*PNG"):
        decode_bytes(dirty_images._EPS)


def test_sizes_are_refused_before_pixels_are_made(monkeypatch):
    content = dirty_images.png_header(20000, 6000)
    with pytest.raises(BadImageError, match=r"too large: 20000 x 6000 pixels, at most 89,478,485"):
        decode_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImageError, match="too large: 4 x 3 pixels, at most 10"):
        decode_image(Image.new("RGB", (4, 3)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(Image.new("RGB", (400, 2))).size == (400, 2)
    with pytest.raises(BadImageError, match="too narrow: 402 x 2 pixels, a side may be at most 200 times the other"):
        decode_image(Image.new("RGB", (402, 2)))
    with pytest.raises(BadImageError, match="no pixels: its size is 0 x 3"):
        decode_image(Image.new("RGB", (0, 3)))


def test_numbers_without_a_known_white_are_refused():
    for mode, value, said in (("I", 70000, "70000"), ("I", -1, "-1"), ("F", float("nan"), "nan"), ("F", 300.0, "300")):
        with pytest.raises(BadImageError, match=rf"values reach from .* to {said}.*, known are those from 0 to"):
            decode_image(Image.new(mode, (2, 2), value))
    assert decode_image(Image.new("F", (1, 1), 200.0)).getpixel((0, 0)) == (200, 200, 200)


def test_a_transparent_level_of_16_bits_is_white():
    content = encode(Image.fromarray(np.array([[257, 514]], dtype=np.uint16)))
    content = content[:33] + dirty_images._chunk(b"tRNS", struct.pack(">H", 257)) + content[33:]
    decoded = decode_bytes(content)
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (2, 2, 2)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_keeps_the_transparent_colour(orientation):
    picture = Image.new("RGB", (3, 2), (9, 9, 9))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_bytes(encode(picture, exif=exif, transparency=(9, 9, 9)))
    corner = {1: (0, 0), 2: (2, 0), 3: (2, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 2), 8: (0, 2)}[orientation]
    assert decoded.size == ((3, 2) if orientation < 5 else (2, 3))
    assert decoded.getpixel(corner) == (255, 0, 0)
    assert (
        sum(decoded.getpixel((x, y)) == (255, 255, 255) for x in range(decoded.width) for y in range(decoded.height))
        == 5
    )


def test_the_check_finds_a_changed_bit_of_a_png():
    content = encode(dirty_images.draw(dirty_images.colors(3)))
    first, last = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for place in range(first, last, 5):
        changed = bytearray(content)
        changed[place] ^= 4
        assert images._find_problem({"bytes": bytes(changed), "path": None})
    assert images._find_problem({"bytes": content, "path": None}) == ""


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        with pytest.raises(BadImageError, match="is not a file"):
            decode_image(path)
    rows = datasets.Dataset.from_dict({"image": ["a\0b.png"]}).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(BadImageError, match="1 of 1 images cannot be read.*\n.*null byte"):
        check_images(rows)
    with pytest.raises(BadImageError, match=r"x\.\.\. \(5000 characters\)' .*: File name too long$"):
        decode_image("x" * 5000)


# Tables


def test_csv_is_read_as_text(tmp_path, make_images):
    make_images("a.png", "b.png")
    lines = ["image,caption,meaning", "a.png,NA,012345678901234567890", 'b.png,"one, ""two"" words",1e3', ""]
    (tmp_path / "data.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    loaded = load_captioned_images(str(tmp_path / "data.csv"), split="train", id_column="meaning")
    assert loaded["captions"][:] == [["NA"], ['one, "two" words']]
    assert loaded["image_id"][:] == ["012345678901234567890", "1e3"]


def test_csv_with_a_comma_too_many(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("image,caption\na.png,red, blue\nb.png,green\nc.png\n")
    with pytest.raises(ValueError, match=r"2 of 3 rows of .*data.csv.* its 2 columns.*\[\(2, 3\), \(4, 1\)\].*quotes"):
        load_captioned_images(str(file), split="train")
    file.write_text("image,image\na.png,red\n")
    with pytest.raises(ValueError, match="must name the columns .*, each once; it holds .*'image', 'image'"):
        load_captioned_images(str(file), split="train")
    file.write_bytes(b"image,caption\na.png,caf\xe9\n")
    with pytest.raises(ValueError, match="Cannot read .*data.csv.*0xe9"):
        load_captioned_images(str(file), split="train")


def test_a_name_is_no_pattern(tmp_path):
    (tmp_path / "a[1]*").mkdir()
    (tmp_path / "a[1]*" / "data[2].jsonl").write_text('{"image": "a.png", "caption": "x"}')
    assert len(load_captioned_images(str(tmp_path / "a[1]*" / "data[2].jsonl"), split="train")) == 1


def test_missing_ids_are_never_one_meaning(tmp_path):
    rows = {"image": ["a", "b", "c"], "caption": ["x", "y", "z"]}

    def load(ids):
        datasets.Dataset.from_dict({**rows, "meaning": ids}).save_to_disk(str(tmp_path / "rows"))
        return load_captioned_images(str(tmp_path / "rows"), split="train", id_column="meaning")

    for missing in ([1.0, float("nan"), float("nan")], [1.0, None, None], ["1", "", ""]):
        with pytest.raises(ValueError, match=r"'meaning' is empty in 2 rows, the first are \[1, 2\]"):
            load(missing)
    with pytest.raises(ValueError, match="floating-point numbers of 2\\*\\*53 or more"):
        load([1.0, 2.0**53, 2.0**53 + 2])
    assert load([1.0, 2.5, -3.0])["image_id"][:] == ["1.0", "2.5", "-3.0"]


def known_ids(rows):
    """The ids as the files give them, without the digest that makes them unique."""
    return [image_id.split(":")[1] for image_id in rows["image_id"]]


def test_files_of_captions_name_what_is_wrong(tmp_path):
    (tmp_path / "train_caps.txt").write_bytes(b"one\ntwo caf\xe9\n")
    (tmp_path / "train_ids.txt").write_bytes(b"\xef\xbb\xbf1\n2\n")
    mapping = tmp_path / "id_mapping.json"
    mapping.write_text('{"1": "a.png", "2": "b.png"}')
    with pytest.raises(ValueError, match=r"train_caps.txt' is not text in UTF-8: .*0xe9"):
        load_captioned_images(str(tmp_path), split="train")
    (tmp_path / "train_caps.txt").write_text("one\ntwo\n")
    assert known_ids(load_captioned_images(str(tmp_path), split="train")) == ["1", "2"]
    for text, message in (
        ('{"1": "a.png", "2": 5}', "an object that gives the file name of each id"),
        ('{"1": ', "is not JSON: .*line 1 column 7"),
        ('{"1": "a.png", "2": "b.png", "1": "c.png"}', "says twice what '1' is"),
        ("[" * 100_000, "is not JSON: maximum recursion"),
    ):
        mapping.write_text(text)
        with pytest.raises(ValueError, match=f"id_mapping.json' (must be )?{message}"):
            load_captioned_images(str(tmp_path), split="train")


def test_karpathy_entries_that_are_wrong_are_counted(tmp_path):
    good = {"filename": "a.png", "split": "train", "imgid": 0, "sentences": [{"raw": "red \ud83d"}, {"raw": "blue"}]}
    file = tmp_path / "dataset.json"

    def load(*entries):
        file.write_text(json.dumps({"images": entries}))
        return load_captioned_images(str(file), split="train")

    assert load(good)["captions"][:] == [["red ?", "blue"]]
    wrong = [{**good, "sentences": ["red"]}, {**good, "imgid": None}, {**good, "filename": None}, 5]
    with pytest.raises(ValueError, match=r"4 of 5 entries of 'images' .* are wrong, the first: \[1, 2, 3, 4\]"):
        load(good, *wrong)


# Paths


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder with an image, and a secret beside it."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "data" / "images" / "a.png")
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret" / "s.png")
    return tmp_path / "data"


def test_the_fence(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret" / "s.png")
    (folder / "linked").symlink_to(folder.parent / "secret")
    (folder / "inner").symlink_to(folder / "images")
    (folder.parent / "data2").mkdir()
    for path, inside in {
        "images/a.png": True,
        "images/../images/a.png": True,
        "inner/a.png": True,
        "not/there.png": True,
        "zero\0byte": True,
        "../secret/s.png": False,
        "../data2/a.png": False,
        "images/..": False,
        "images/../..": False,
        "link.png": False,
        "linked/s.png": False,
        "linked/../data/images/a.png": True,
        "/etc/passwd": False,
    }.items():
        assert (Fence([folder]).mark(str(folder / path)) is not None) == inside, path
    secret = folder.parent / "secret"
    assert Fence([folder, secret]).mark(str(folder / "linked" / "s.png")) == f"{secret}/./s.png"
    everything = Fence(["/"]).mark(str(folder / "link.png"))
    assert everything == f"/.{folder}/link.png"
    check_mark(everything)


@pytest.mark.parametrize("path", ["../secret/s.png", "{parent}/secret/s.png", "link.png"])
@pytest.mark.parametrize("source", ["csv", "caption files", "karpathy", "parquet with paths", "saved to disk"])
def test_paths_cannot_leave_the_folder(source, path, folder):
    path = path.format(parent=folder.parent)
    (folder / "link.png").symlink_to(folder.parent / "secret" / "s.png")
    if source == "csv":
        (folder / "data.csv").write_text(f"image,caption\nimages/a.png,good\n{path},bad\n")
        name = folder / "data.csv"
    elif source == "caption files":
        (folder / "train_caps.txt").write_text("good\nbad\n")
        (folder / "train_ids.txt").write_text("1\n2\n")
        (folder / "id_mapping.json").write_text(json.dumps({"1": "images/a.png", "2": path}))
        name = folder
    elif source == "karpathy":
        rows = [{"filename": p, "split": "train", "sentences": [{"raw": p}]} for p in ("images/a.png", path)]
        (folder / "data.json").write_text(json.dumps({"images": rows}))
        name = folder / "data.json"
    elif source == "saved to disk":
        name = folder
        datasets.Dataset.from_dict({"image": ["images/a.png", path], "caption": ["x", "y"]}).save_to_disk(str(name))
    else:
        features = datasets.Features(image=datasets.Image(decode=False), caption=datasets.Value("string"))
        rows = [{"image": {"bytes": None, "path": p}, "caption": p} for p in ("images/a.png", path)]
        name = folder / "data.parquet"
        pq.write_table(datasets.Dataset.from_list(rows, features=features).with_format("arrow")[:], name)
    with pytest.raises(
        ValueError, match=r"1 of 2 image paths lead out of the folder of the data \(row 1: '.*image_dir"
    ):
        load_captioned_images(str(name), split="train")
    trusted = load_captioned_images(str(name), split="train", image_dir="/")
    assert len(trusted) == 2


def test_a_folder_of_images_cannot_be_left(folder):
    lines = [{"file_name": "images/a.png", "text": "good"}, {"file_name": "../secret/s.png", "text": "bad"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="secret/s.png"):
        load_captioned_images(str(folder), split="train")
    (folder / "images" / "link.png").symlink_to(folder.parent / "secret" / "s.png")
    lines[1]["file_name"] = "images/link.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="1 of 3 files of .* are links that lead out of it.*link.png.*image_dir"):
        load_captioned_images(str(folder), split="train")
    opened = load_captioned_images(str(folder), split="train", image_dir=str(folder.parent))
    assert len(check_images(opened)) == 2


def test_a_snapshot_in_the_cache_of_the_hub_may_link_to_its_blobs(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    blobs, snapshot = tmp_path / "datasets--u--d" / "blobs", tmp_path / "datasets--u--d" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(blobs / "0123", "PNG")
    (snapshot / "a.png").symlink_to(blobs / "0123")
    (snapshot / "data.csv").write_text("image,caption\na.png,x\n")
    assert len(check_images(load_captioned_images(str(snapshot / "data.csv"), split="train"))) == 1


def test_a_picture_that_becomes_a_link_is_not_followed(folder):
    (folder / "images" / "inner.png").symlink_to(folder / "images" / "a.png")
    (folder / "data.csv").write_text("image,caption\nimages/a.png,x\nimages/inner.png,y\n")
    rows = load_captioned_images(str(folder / "data.csv"), split="train")
    data = CaptionedImageDataset(check_images(rows))
    assert data[0]["image"].size == data[1]["image"].size == (4, 4)
    (folder / "images" / "a.png").unlink()
    (folder / "images" / "a.png").symlink_to(folder.parent / "secret" / "s.png")
    for row in (0, 1):
        with pytest.raises(ValueError, match="a link that leads out of .*data' since it was loaded"):
            data[row]
    with pytest.raises(BadImageError, match="2 of 2 images cannot be read.*\n.*a link that leads out"):
        check_images(rows)


def test_a_card_cannot_name_files_elsewhere(folder, monkeypatch):
    """Neither a file outside of the folder is read, nor a host asked."""
    (folder / "data.csv").write_text("image,caption\nimages/a.png,good\n")
    (folder.parent / "secret" / "data.csv").write_text("image,caption\na.png,secret\n")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a host was asked"))
    for files in (
        "../secret/data.csv",
        str(folder.parent / "secret" / "*.csv"),
        "http://127.0.0.1:9/data.csv",
        "*.csv::http://127.0.0.1:9/data.csv",
        ["data.csv", "images/../../secret/data.csv"],
        [{"split": "train", "path": ["file:///etc/passwd"]}],
    ):
        for name, text in (("README.md", "---\n%s\n---\n"), (".huggingface.yaml", "%s\n")):
            configs = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
            (folder / name).write_text(text % configs)
            with pytest.raises(ValueError, match="README.md of .* names 1 files that do not lie in its folder"):
                load_captioned_images(str(folder), split="train")
            (folder / name).unlink()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.csv\n---\n")
    assert load_captioned_images(str(folder), split="train")["captions"][:] == [["good"]]


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet", "metadata.jsonl", "metadata.csv"])
def test_files_of_rows_cannot_be_links_out_of_the_folder(name, folder):
    secret = folder.parent / "secret" / name
    row = {"file_name" if "metadata" in name else "image": "a.png", "text": "secret"}
    if "parquet" in name:
        datasets.Dataset.from_list([row]).to_parquet(secret)
    else:
        secret.write_text(json.dumps(row) if "json" in name else f"{','.join(row)}\n{','.join(row.values())}")
    (folder / "images" / name).symlink_to(secret)
    with pytest.raises(ValueError, match="1 of . files of .* lie outside of its folder or are links that lead out"):
        load_captioned_images(str(folder), split="train")
    (folder / "images" / name).unlink()
    shutil.copy(secret, folder / "images" / name)
    rows = load_captioned_images(str(folder), split="train", image_dir=str(folder / "images"))
    assert rows["captions"][:] == [["secret"]]


def test_a_saved_data_set_cannot_name_files_elsewhere(folder):
    for name, caption in (("saved", "good"), ("hidden", "secret")):
        rows = datasets.Dataset.from_dict({"image": ["a.png"], "caption": [caption]})
        datasets.DatasetDict(train=rows).save_to_disk(str(folder.parent / name))
    saved = folder.parent / "saved"
    file = "data-00000-of-00001.arrow"
    for place, content in (
        ("dataset_dict.json", {"splits": ["../hidden/train"]}),
        ("train/state.json", {"_data_files": [{"filename": f"../../hidden/train/{file}"}]}),
        ("train/state.json", {"_data_files": [{"filename": str(folder.parent / "hidden" / "train" / file)}]}),
    ):
        before = (saved / place).read_text()
        (saved / place).write_text(json.dumps({**json.loads(before), **content}))
        with pytest.raises(ValueError, match="files of .*saved' lie outside of its folder"):
            load_captioned_images(str(saved), split="train")
        (saved / place).write_text(before)
    assert load_captioned_images(str(saved), split="train")["captions"][:] == [["good"]]
    (saved / "train" / file).unlink()
    (saved / "train" / file).symlink_to(folder.parent / "hidden" / "train" / file)
    with pytest.raises(ValueError, match="files of .*saved' lie outside of its folder"):
        load_captioned_images(str(saved), split="train")


def test_a_folder_is_not_read_in_place_of_another(tmp_path):
    for name, caption in (("set[1]", "right"), ("set1", "wrong")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.csv").write_text(f"image,caption\na.png,{caption}\n")
        (tmp_path / f"{name}_dev_caps.txt").write_text(f"{caption}\n")
        (tmp_path / f"{name}_dev_ids.txt").write_text("1\n")
    with pytest.raises(ValueError, match=r"set\[1\]' reads as a pattern of names: rename it"):
        load_captioned_images(str(tmp_path / "set[1]"), split="test")
    shutil.rmtree(tmp_path / "set[1]")
    assert load_captioned_images(str(tmp_path / "set[1]"), split="dev")["captions"][:] == [["right"]]
    (tmp_path / "set1.csv").write_text("image,caption\na.png,wrong\n")
    with pytest.raises(FileNotFoundError, match=r"set\[1\].csv"):
        load_captioned_images(str(tmp_path / "set[1].csv"), split="train")
