"""`python -m modeling_pico.search`, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_pico import PicoModel, PicoProcessor
from modeling_pico.search.__main__ import main


NAMES = ["a.png", "b.jpg", "more/a.png", "more/d"]


def noise(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four pictures, one without a suffix, and two files that are none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        noise(number, (30, 20 + 10 * number)).save(folder / name, {"b.jpg": "JPEG", "more/d": "WEBP"}.get(name, "PNG"))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


@pytest.fixture
def index(tmp_path, pictures, tiny_checkpoint, capsys) -> Path:
    main(["build", str(tmp_path / "index"), str(pictures), "--model", str(tiny_checkpoint), "--device", "cpu"])
    capsys.readouterr()
    return tmp_path / "index"


def expected_order(tiny_checkpoint: Path, pictures: Path, query: str) -> tuple[list[str], list[float]]:
    model, processor = (kind.from_pretrained(tiny_checkpoint) for kind in (PicoModel, PicoProcessor))
    paths = [str(pictures / name) for name in NAMES]
    with torch.no_grad():
        output = model(**processor(images=paths, text=[query], return_tensors="pt"))
    scores = (output.logits_per_text / output.logit_scale)[0]
    order = scores.argsort(descending=True).tolist()
    return [paths[row] for row in order], scores[order].tolist()


def test_build_says_what_it_took_and_what_it_left_out(tmp_path, pictures, tiny_checkpoint, capsys):
    result = main(["build", str(tmp_path / "index"), str(pictures), "--model", str(tiny_checkpoint)])
    assert (result["added"], result["images"], len(result["skipped"])) == (4, 4, 2)
    *left_out, total = capsys.readouterr().out.splitlines()
    assert len(left_out) == 2 and "broken.png" in left_out[0] and "notes.txt" in left_out[1]
    assert total == f"{tmp_path / 'index'}: 4 pictures (4 added)."
    with pytest.raises(ValueError, match="holds an index already"):
        main(["build", str(tmp_path / "index"), str(pictures), "--model", str(tiny_checkpoint)])


def test_query_finds_what_the_model_scores_best(index, pictures, tiny_checkpoint, capsys):
    main(["query", str(index), "the red star", "--json", "--k", "3"])
    printed = json.loads(capsys.readouterr().out)
    paths, scores = expected_order(tiny_checkpoint, pictures, "the red star")
    assert [hit["path"] for hit in printed["hits"]] == paths[:3]
    assert [hit["score"] for hit in printed["hits"]] == pytest.approx(scores[:3], abs=2e-3)
    main(["query", str(index), "the red star"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == paths and lines[0].startswith("  1. ")


def test_a_picture_is_a_query(index, pictures):
    found = main(["query", str(index), "--image", str(pictures / "b.jpg"), "--k", "1"])
    assert [hit["path"] for hit in found["hits"]] == [str(pictures / "b.jpg")]


@pytest.mark.parametrize("name", ["hits.png", "hits.jpg"])
def test_a_sheet_in_the_gallery_is_not_found(index, pictures, capsys, name):
    main(["query", str(index), "the red star", "--sheet", str(pictures / name)])
    assert (pictures / name).is_file()
    changes = main(["add", str(index), str(pictures)])
    assert (changes["added"], changes["unchanged"]) == (0, 4)
    assert "contact sheet" in changes["skipped"][str(pictures / name)]


def test_add_follows_the_gallery(index, pictures):
    noise(9).save(pictures / "new.png")
    noise(10).save(pictures / "a.png")
    (pictures / "b.jpg").unlink()
    changes = main(["add", str(index), str(pictures), "--remove_missing"])
    assert {name: changes[name] for name in ("added", "changed", "removed", "unchanged", "images")} == {
        "added": 1,
        "changed": 1,
        "removed": 1,
        "unchanged": 2,
        "images": 4,
    }


def test_delete_and_info_need_no_model(index, tiny_checkpoint, monkeypatch, capsys):
    (hit,) = main(["query", str(index), "the red star", "--k", "1"])["hits"]
    monkeypatch.setattr("modeling_pico.search.__main__._encoder", None)
    assert main(["delete", str(index), hit["id"]]) == {"deleted": 1, "images": 3}
    capsys.readouterr()
    info = main(["info", str(index), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(info))
    assert info["images"] == 3 and info["model"]["name"] == str(tiny_checkpoint)


def test_a_data_set_brings_columns_and_pictures(tmp_path, tiny_checkpoint, own_cache, monkeypatch, capsys):
    rows = {
        "image": [noise(number) for number in range(6)],
        "captions": [[f"picture {number}", "a red star"] for number in range(6)],
        "style": ["ink", "oil"] * 3,
        "year": [1990 + number for number in range(6)],
        "kind": [0, 1] * 3,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "style": datasets.Value("string"),
            "year": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["plant", "animal"]),
        }
    )
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features)}).save_to_disk(tmp_path / "data")
    index = tmp_path / "index"
    options = ["--split", "test", "--columns", "year", "kind", "--model", str(tiny_checkpoint)]
    assert main(["build", str(index), str(tmp_path / "data"), *options])["added"] == 6
    moved = tmp_path / "moved"
    index.rename(moved)
    shutil.rmtree(tmp_path / "data")
    sheet = tmp_path / "hits.png"
    query = ["query", str(moved), "the red star", "--where", "style = 'ink' and year > 1990", "--sheet", str(sheet)]
    hits = main(query)["hits"]
    assert sorted(hit["columns"]["year"] for hit in hits) == [1992, 1994]
    assert {hit["columns"]["style"] for hit in hits} == {"ink"}
    assert {hit["columns"]["kind"] for hit in hits} == {"plant"}
    assert sorted(hit["columns"]["captions"] for hit in hits) == [[f"picture {n}", "a red star"] for n in (2, 4)]
    # Their pictures went with the index, and leave with what is deleted.
    from modeling_pico.search.contact_sheet import GAP, MARGIN, TILE, TITLE

    with Image.open(sheet) as drawn:
        for column in range(2):
            x = MARGIN + column * (TILE + GAP)
            assert len(drawn.crop((x, MARGIN + TITLE, x + TILE, MARGIN + TITLE + TILE)).getcolors(10**6)) > 500
    main(["delete", str(moved), hits[0]["id"]])
    left = {file.stem for file in (moved / "pictures").iterdir()}
    assert len(left) == 5 and hits[0]["id"] not in left and hits[1]["id"] in left


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["query", "{index}"], "either a text or --image FILE"),
        (["query", "{index}", "a", "--image", "b.png"], "either a text or --image FILE"),
        (["query", "{index}", " "], "The query is empty"),
        (["query", "{index}", "a", "--where", "colour = 'red'"], "There is no column 'colour'"),
        (["query", "{index}", "a", "--sheet", "hits.pdf2"], "must end in one of .jpeg, .jpg, .png"),
        (["query", "{index}", "--image", "{index}/gone.png"], "does not exist"),
        (["query", "{index}", "a", "--k", "0"], "at least 1, got k=0"),
        (["query", "{index}", "a", "--kk", "1"], "unrecognized arguments: --kk 1"),
        (["query", "{index}/none", "a"], "holds no index"),
        (["build", "{index}_2", "{index}/gone", "--model", "{model}"], "is not a folder of pictures. Of a data set"),
        (["build", "{index}_2", "{empty}", "--model", "{model}"], "There is no file in"),
        (["build", "{index}_2", "{empty}"], "--model names the checkpoint"),
        (["build", "{index}_2", "{pictures}", "--model", "{model}", "--batch_size", "0"], "at least 1, got '0'"),
        (["query", "{index}", "a", "--device", "nowhere"], "--device 'nowhere' cannot be used here"),
        (["serve", "{index}", "--port", "70000"], "from 1 to 65535, got '70000'"),
        (["serve", "{index}", "--pictures", "{index}/gone"], "--pictures '.*gone' is not a folder"),
        (["build", "{index}_2", "{empty}", "--model", "{model}", "--columns", "a"], "whose split --split names"),
        (["add", "{index}", "{pictures}", "--model", "{other}"], "was made by another model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(index, tmp_path, tiny_checkpoint, tiny_model, tiny_processor, words, said):
    (tmp_path / "empty").mkdir()
    if "{other}" in words:
        model = tiny_model()
        torch.nn.init.ones_(model.alignment_head.visual_projection.weight)
        model.save_pretrained(tmp_path / "other")
        tiny_processor.save_pretrained(tmp_path / "other")
    names = {name: tmp_path / name for name in ("pictures", "empty", "other")}
    names |= {"index": index, "model": tiny_checkpoint}
    with pytest.raises(ValueError, match=said) as error:
        main([word.format(**names) for word in words])
    assert "\n" not in str(error.value)
    assert not Path(f"{index}_2").exists()  # nothing that a second try would stumble over


def test_a_picture_of_a_moved_gallery_is_asked_for_as_it_was_moved(tmp_path, tiny_model, tiny_processor):
    model = tiny_model()
    colours = [Image.new("RGB", (16, 16), (6 * number, 90, 200)) for number in range(40)]
    model.fit_alignment([tiny_processor(images=colours, return_tensors="pt")])
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number in range(36):
        noise(number).save(tmp_path / "pictures" / f"{number}.png")
    main(["build", str(tmp_path / "index"), str(tmp_path / "pictures"), "--model", str(tmp_path / "model"), "--align"])
    asked = tmp_path / "pictures" / "7.png"
    first, *others = main(["query", str(tmp_path / "index"), "--image", str(asked)])["hits"]
    (tokens,) = tiny_processor.encode_images(model, [asked], convert_to_numpy=True)
    assert first["path"] == str(asked) and first["score"] > others[0]["score"]
    from modeling_pico.search import PicoIndex
    from modeling_pico.search.embeddings import exact_scores

    index = PicoIndex.open(tmp_path / "index")
    moved = index.embeddings(first["id"])
    assert first["score"] == pytest.approx(exact_scores(moved, moved, np.array([len(moved)]))[0], abs=1e-4)
    assert first["score"] != pytest.approx(exact_scores(tokens, moved, np.array([len(moved)]))[0], abs=1e-3)


def test_k_may_exceed_the_gallery(index):
    assert len(main(["query", str(index), "the red star", "--k", "50"])["hits"]) == 4


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "modeling_pico.search", "info", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "holds no index" in result.stderr
