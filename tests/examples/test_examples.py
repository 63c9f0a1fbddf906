"""The examples run, on small data, as a reader runs them."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

import train_pico
from modeling_pico import PicoModel, PicoProcessor
from modeling_pico.script.data import load_data


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


pytestmark = pytest.mark.usefixtures("no_progress_bars", "own_cache")


def noise(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


# finetune_clip.py


def test_finetune_clip(tiny_clip, tmp_path, monkeypatch):
    datasets.DatasetDict({"train": tiny.rows(20), "validation": tiny.rows(9, seed=1)}).save_to_disk(tmp_path / "data")
    flags = ["--epochs", "5", "--batch_size", "10", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["finetune_clip.py", tiny_clip.folder, str(tmp_path / "data"), *flags])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    left = runpy.run_path(str(EXAMPLES / "finetune_clip.py"))
    model = PicoModel.from_pretrained(tmp_path / "run")
    history = left["trainer"].state.log_history
    assert [entry["prototype_stage"] for entry in history if "prototype_stage" in entry] == [1, 2]
    start = tiny_clip.model.state_dict()["vision_model.post_layernorm.weight"]
    assert not torch.equal(model.state_dict()["vision_model.post_layernorm.weight"], start)
    best = max(entry["eval_rsum"] for entry in history if "eval_rsum" in entry)
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_rsum"] == best
    assert PicoProcessor.from_pretrained(tmp_path / "run").tokenizer.pad_token == "[PAD]"
    assert "## Results" in (tmp_path / "run" / "README.md").read_text()


# Recipes


@pytest.fixture
def towers(tmp_path) -> list[str]:
    """Flags that replace the towers of a recipe by tiny checkpoints."""
    processor, net = tiny.processor(), tiny.model()
    parts = (
        ("vision", net.vision_model, processor.image_processor),
        ("text", net.text_model, processor.tokenizer),
    )
    flags = []
    for side, tower, part in parts:
        tower.save_pretrained(tmp_path / side)
        part.save_pretrained(tmp_path / side)
        flags += [f"--{side}_model_name_or_path", str(tmp_path / side)]
    return flags


# Eight images to train on, five to validate, five for the test, with five captions each.
SPLITS = ["train"] * 8 + ["val"] * 5 + ["test"] * 5


def five_captions(number: int) -> list[str]:
    return [f"{colour} {number}" for colour in (*tiny.COLORS, "other")]


def write_hub(recipe: str) -> None:
    """A small copy of the data set that a recipe names, under its name and with its splits and columns."""
    five = {f"caption_{column}": datasets.Value("string") for column in range(5)}
    captions = datasets.List(datasets.Value("string"))
    name, validation, columns = {
        "flickr8k": ("jxie/flickr8k", "validation", five),
        "flickr30k": ("umaru97/flickr30k_train_val_test", "val", {"caption": captions, "filename": captions.feature}),
        "mscoco": (
            "patomp/thai-mscoco-2014-captions",
            "validation",
            {"sentences_raw": captions, "split": captions.feature, "th_sentences_raw": captions},
        ),
    }[recipe]
    for split in ("train", "val", "test"):
        rows = []
        for number in (number for number, own in enumerate(SPLITS) if own == split):
            stream = io.BytesIO()
            noise(number).save(stream, "png")
            texts = five_captions(number)
            values = {"caption": texts, "sentences_raw": texts, "th_sentences_raw": ["other"], "split": "restval"}
            values |= {"filename": f"{number}.jpg"} | dict(zip(five, texts, strict=True))
            image = {"bytes": stream.getvalue(), "path": f"{number}.jpg"}
            rows.append({"image": image} | {column: values[column] for column in columns})
        file = Path(name, "data", f"{validation if split == 'val' else split}-00000-of-00001.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        features = datasets.Features(image=datasets.Image(), **columns)
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))


def nearest(image: Image.Image) -> int:
    """The number of the picture that an image is, also one that JPEG has changed."""
    pixels = np.asarray(image, dtype=float)
    return min(range(len(SPLITS)), key=lambda number: np.abs(pixels - np.asarray(noise(number))).sum())


def write_karpathy(folder: Path, file: str, folders: dict[str, str]) -> None:
    """The same images and captions as Karpathy's files have them."""
    entries = []
    for number, split in enumerate(SPLITS):
        split = "restval" if split == "train" and number >= 5 and "restval" in folders else split
        place = folder / folders[split]
        place.mkdir(parents=True, exist_ok=True)
        noise(number).save(place / f"{number}.jpg")
        sentences = [{"raw": text} for text in five_captions(number)]
        entries.append({"filename": f"{number}.jpg", "split": split, "imgid": number, "sentences": sentences})
        if folders[split] != "images":
            entries[-1]["filepath"] = folders[split]
    (folder / file).write_text(json.dumps({"images": entries}))


SMALL = shlex.split(
    "--use_cpu true --bf16 false --dataloader_num_workers 0 --num_train_epochs 3 --prototype_start 1 "
    "--prototype_update_start 2 --per_device_train_batch_size 4 --embedding_dim 8 --num_style_prototypes 3 "
    "--log_level error --disable_tqdm true --report_to none"
)


def test_flickr30k_recipe(towers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub("flickr30k")
    results = train_pico.main([str(EXAMPLES / "flickr30k.yaml"), *towers, *SMALL])
    assert {"eval_rsum", "test_rsum"} <= results.keys()
    config = PicoModel.from_pretrained("outputs/flickr30k").config
    assert (config.loss_type, config.margin, config.method) == ("hinge", 0.2, "pico")
    # Every caption once an epoch: 40 pairs, four a step, in three epochs.
    state = json.loads(Path("outputs/flickr30k/trainer_state.json").read_text())
    assert state["max_steps"] == 30
    assert [entry["prototype_stage"] for entry in state["log_history"] if "prototype_stage" in entry] == [1, 2]


def test_mscoco_recipe_and_its_folds(towers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub("mscoco")
    recipe = EXAMPLES / "mscoco.yaml"
    results = train_pico.main([str(recipe), *towers, *SMALL])
    cached = sorted(Path("outputs/mscoco_embeddings").iterdir())
    # The second command of its header.
    header = recipe.read_text().replace(" \\\n# ", "")
    (command,) = [line for line in header.splitlines() if "train_pico.py --model_name_or_path" in line]
    words = shlex.split(command.lstrip("# "))
    folded = train_pico.main([*words[3:], *shlex.split("--use_cpu true --bf16 false --log_level error")])
    assert sorted(Path("outputs/mscoco_embeddings").iterdir()) == cached
    # Each fold holds one image: its captions are all right, so recall is full.
    assert folded["test_rsum"] == 600 > results["test_rsum"]


def test_flickr8k_recipe(towers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub("flickr8k")
    results = train_pico.main([str(EXAMPLES / "flickr8k.yaml"), *towers, *SMALL])
    assert {"eval_rsum", "test_rsum"} <= results.keys()
    # All five columns, every caption once an epoch: 40 pairs, four a step, in three epochs.
    assert json.loads(Path("outputs/flickr8k/trainer_state.json").read_text())["max_steps"] == 30


def test_flickr8k_head_first_and_then_both_towers(towers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub("flickr8k")
    small = shlex.split(
        "--use_cpu true --num_train_epochs 2 --per_device_train_batch_size 4 --log_level error --disable_tqdm true "
        "--report_to none"
    )
    folder = EXAMPLES / "flickr8k"
    train_pico.main([str(folder / "frozen.yaml"), *towers, *small, "--embedding_dim", "8"])
    results = train_pico.main([str(folder / "finetuned.yaml"), *small])
    assert {"eval_rsum", "test_rsum"} <= results.keys()
    first, second = (PicoModel.from_pretrained(f"outputs/flickr8k_{name}") for name in ("frozen", "finetuned"))
    changed = {
        name.split(".")[0] for name, value in second.named_parameters() if not value.equal(first.get_parameter(name))
    }
    assert changed >= {"vision_model", "text_model", "alignment_head"}


@pytest.mark.parametrize(
    ("recipe", "images"),
    [
        ("flickr8k", dict.fromkeys(("train", "val", "test"), "Flicker8k_Dataset")),
        ("flickr30k", dict.fromkeys(("train", "val", "test"), "flickr30k-images")),
        ("mscoco", {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}),
    ],
)
def test_recipes_read_their_data_from_the_hub_or_from_local_files(recipe, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub(recipe)
    text = (EXAMPLES / f"{recipe}.yaml").read_text()
    (local,) = re.findall(r"are used instead by\n#  (.*)", text.replace(" \\\n# ", ""))
    words = shlex.split(local)[3:]
    file = Path(words[words.index("--dataset_name") + 1])
    write_karpathy(file.parent, file.name, images)
    for arguments in ([str(EXAMPLES / f"{recipe}.yaml")], [str(EXAMPLES / Path(words[0]).name), *words[1:]]):
        _, data_args, training_args = train_pico.parse_arguments([*arguments, "--use_cpu", "true", "--bf16", "false"])
        data = load_data(data_args, training_args, uses_prototypes=True)
        for split, rows in (("train", data.train), ("val", data.evaluation), ("test", data.tests["test"])):
            numbers = [number for number, own in enumerate(SPLITS) if own == split]
            assert rows.dataset["captions"][:] == [five_captions(number) for number in numbers], (arguments, split)
            if split != "train":  # whose pictures are cropped
                assert [nearest(rows[row]["image"]) for row in range(len(rows))] == numbers


def test_recipes_share_all_that_is_not_the_data():
    recipes = [yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()) for name in ("flickr30k", "mscoco")]
    different = {name for name in {*recipes[0], *recipes[1]} if recipes[0].get(name) != recipes[1].get(name)}
    assert different == {
        "output_dir",
        "dataset_name",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "eval_cache_dir",
    }
