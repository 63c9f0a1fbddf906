"""Embeddings of an evaluation, kept on disk."""

from __future__ import annotations

import copy
import json
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny import CountedDataset, rows, trainer
from tokenizers import normalizers
from transformers import ViTImageProcessorPil

from modeling_pico import PicoModel, PicoProcessor
from modeling_pico.data import CaptionedImageDataset, PicoDataCollator, load_captioned_images
from modeling_pico.evaluation import RetrievalUncertainty, embedding_cache
from modeling_pico.evaluation.embedding_cache import cache_key, cached_embeddings, load_embeddings, save_embeddings
from modeling_pico.training import PicoTrainer


TEXTS = ["red up here", "a thing that is green", "blue left", "grey in the middle", "red left", "green up here"]


def made(tmp_path: Path, data: datasets.Dataset | None = None, **options: Any) -> PicoTrainer:
    data = CaptionedImageDataset(rows(9, seed=1, repeats=1) if data is None else data)
    return trainer(tmp_path / "run", eval_data=data, eval_cache_dir=str(tmp_path / "cache"), **options)


def results(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "recall" in name or "rsum" in name or "loss" in name}


def encodings(made: PicoTrainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry whenever the evaluator encodes."""
    calls: list[int] = []
    encode = made.evaluator.encode
    monkeypatch.setattr(made.evaluator, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    return calls


def cached_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").iterdir()
    return file


@pytest.fixture
def caplog_of_library(caplog, monkeypatch):
    """What the package logs; its loggers hand nothing on by themselves."""
    monkeypatch.setattr(logging.getLogger("modeling_pico"), "propagate", True)
    return caplog


# What is kept


def test_a_second_evaluation_reads_the_embeddings_and_gives_the_same_numbers(tmp_path, monkeypatch):
    first_trainer = made(tmp_path)
    calls = encodings(first_trainer, monkeypatch)
    first = first_trainer.evaluate()
    assert cached_file(tmp_path).suffix == ".safetensors" and len(calls) == 1
    second = first_trainer.evaluate()
    assert results(first) == results(second) and len(calls) == 1


def test_half_precision_embeddings_score_like_the_full_ones(tmp_path):
    first = made(tmp_path, model_options={"uncertainty_config": {"num_prototypes": 2}})
    loader = first.get_eval_dataloader()
    full = first.evaluator.encode(first.model, loader)
    half = cached_embeddings(tmp_path / "cache", first.model, loader, lambda: full)
    read = cached_embeddings(tmp_path / "cache", first.model, loader, lambda: pytest.fail("encoded again"))
    assert half.image_tokens.dtype == half.text_tokens.dtype == torch.float16
    assert all(torch.equal(value, getattr(half, name)) for name, value in vars(read).items())
    assert torch.equal(half.text_mask, full.text_mask) and torch.equal(half.image_ids, full.image_ids)
    torch.testing.assert_close(
        first.evaluator.score(first.model, half), first.evaluator.score(first.model, full), atol=2e-3, rtol=0
    )
    of_half, of_full = (RetrievalUncertainty.measure(first.model, encoded) for encoded in (half, full))
    torch.testing.assert_close(of_half.images.float(), of_full.images, atol=2e-3, rtol=0)
    torch.testing.assert_close(of_half.texts.float(), of_full.texts, atol=2e-3, rtol=0)


# What the key depends on


def write_images(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(len(TEXTS)):
        # Bitmaps: every picture has the same size as a file.
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.bmp")


def csv_file(folder: Path) -> dict[str, Any]:
    lines = [f"images/{index}.bmp,{text}" for index, text in enumerate(TEXTS)]
    (folder / "data.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    return {"dataset_name": str(folder / "data.csv"), "split": "train"}


def json_lines(folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"image": f"images/{index}.bmp", "caption": text}) for index, text in enumerate(TEXTS)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return {"dataset_name": str(folder / "data.jsonl"), "split": "train"}


def karpathy(folder: Path) -> dict[str, Any]:
    images = [
        {"filename": f"{index}.bmp", "imgid": index, "split": "test", "sentences": [{"raw": text}]}
        for index, text in enumerate(TEXTS)
    ]
    (folder / "dataset_tiny.json").write_text(json.dumps({"dataset": "tiny", "images": images}))
    return {"dataset_name": str(folder / "dataset_tiny.json"), "image_dir": str(folder / "images"), "split": "test"}


def caption_files(folder: Path) -> dict[str, Any]:
    (folder / "test_caps.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "test_ids.txt").write_text("\n".join(map(str, range(len(TEXTS)))) + "\n")
    mapping = {str(index): f"images/{index}.bmp" for index in range(len(TEXTS))}
    (folder / "id_mapping.json").write_text(json.dumps(mapping))
    return {"dataset_name": str(folder), "split": "test"}


@pytest.mark.parametrize("layout", [csv_file, json_lines, karpathy, caption_files])
def test_pictures_replaced_under_their_names_are_encoded_anew(tmp_path, layout, own_cache):
    data = tmp_path / "data"
    data.mkdir()
    write_images(data / "images", 0)
    source = layout(data)

    def evaluated(folder: Path) -> dict[str, float]:
        return results(made(folder, load_captioned_images(**source)).evaluate())

    before = evaluated(tmp_path)
    write_images(data / "images", 1)
    after = evaluated(tmp_path)
    (tmp_path / "fresh").mkdir()
    assert after == evaluated(tmp_path / "fresh") != before


def test_a_file_with_the_size_and_time_of_another_is_told_from_it(tmp_path, own_cache):
    write_images(tmp_path / "images", 0)
    rows_of_files = load_captioned_images(**csv_file(tmp_path))
    first = made(tmp_path, rows_of_files)
    files = [tmp_path / "images" / f"{index}.bmp" for index in range(2)]
    for file in files:
        os.utime(file, ns=(0, 0))
    key = cache_key(first.model, first.get_eval_dataloader())
    spare = tmp_path / "images" / "spare"
    files[0].rename(spare), files[1].rename(files[0]), spare.rename(files[1])
    assert files[0].stat().st_mtime_ns == 0
    assert cache_key(first.model, first.get_eval_dataloader()) != key


def changed_weight(name: str) -> Callable[[PicoTrainer], None]:
    @torch.no_grad()
    def change(made: PicoTrainer) -> None:
        made.model.get_parameter(name).view(-1)[0] += 1e-3

    return change


def changed_option(name: str, value: Any) -> Callable[[PicoTrainer], None]:
    return lambda made: setattr(made.model.config, name, value)


def changed_rows(change: Callable[[dict[str, list]], Any]) -> Callable[[PicoTrainer], None]:
    def apply(made: PicoTrainer) -> None:
        data = made.eval_dataset.dataset
        table = data.to_dict()
        change(table)
        # The fingerprint stays as it was: what the rows hold counts.
        changed = datasets.Dataset(
            datasets.Dataset.from_dict(table, features=data.features).data, fingerprint=data._fingerprint
        )
        made.eval_dataset = CaptionedImageDataset(changed)

    return apply


def swapped(column: str) -> Callable[[PicoTrainer], None]:
    def swap(table: dict[str, list]) -> None:
        # Of the rows with three captions each.
        table[column][2], table[column][5] = table[column][5], table[column][2]

    return changed_rows(swap)


def renamed_id(table: dict[str, list]) -> None:
    table["image_id"][8] = "another"


def another_normalizer(made: PicoTrainer) -> None:
    made.data_collator.processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("red", "blue")


def another_mean(made: PicoTrainer) -> None:
    made.data_collator.processor.image_processor.image_mean = [0.4, 0.5, 0.5]


def another_image_processor(made: PicoTrainer) -> None:
    class Brighter(ViTImageProcessorPil):
        pass

    own = made.data_collator.processor
    own.image_processor = Brighter.from_dict(own.image_processor.to_dict())


def left_padding(made: PicoTrainer) -> None:
    made.data_collator.processor.tokenizer.padding_side = "left"


def shorter_texts(made: PicoTrainer) -> None:
    made.data_collator.processor.tokenizer.model_max_length = 4


def whole_model_in_bfloat16(made: PicoTrainer) -> None:
    made.model.to(torch.bfloat16)


def autocast_to_bfloat16(made: PicoTrainer) -> None:
    made.accelerator.state._mixed_precision = "bf16"


def another_word(table: dict[str, list]) -> None:
    table["captions"][0] = ["blue up here"]


CHANGES = {
    "weights of the vision tower": changed_weight("vision_model.layers.0.attention.q_proj.weight"),
    "weights of the text tower": changed_weight("text_model.encoder.layer.0.attention.self.query.weight"),
    "weights of the head": changed_weight("alignment_head.text_projection.weight"),
    "option of the model": changed_option("pooling", "class_token"),
    "special tokens": changed_option("text_special_tokens", False),
    "type of the weights": whole_model_in_bfloat16,
    "mixed precision": autocast_to_bfloat16,
    "captions": changed_rows(another_word),
    "captions of two rows": swapped("captions"),
    "pictures of two rows": swapped("image"),
    "ids": changed_rows(renamed_id),
    "normalizer": another_normalizer,
    "padding side": left_padding,
    "length of texts": shorter_texts,
    "preprocessing of images": another_mean,
    "class of the image processor": another_image_processor,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_embeddings_is_encoded_anew(tmp_path, monkeypatch, change):
    first = made(tmp_path)
    first.evaluate()
    second = made(tmp_path)
    calls = encodings(second, monkeypatch)
    second.evaluate()
    assert not calls
    change(second)
    second.evaluate()
    assert len(calls) == 1


def test_what_embeddings_do_not_depend_on_leaves_them_as_they_are(tmp_path, monkeypatch):
    options = {"uncertainty_config": {"num_prototypes": 2}}
    first = made(tmp_path, model_options=options)
    first.evaluate()
    first.save_model(tmp_path / "saved")
    # As after an evaluation: the tokenizer remembers how it was called last.
    own = PicoProcessor.from_pretrained(tmp_path / "saved")
    second = made(tmp_path, net=PicoModel.from_pretrained(tmp_path / "saved"))
    second.data_collator = PicoDataCollator(own)
    second.model.style_prototypes["image"].prototypes.add_(1)
    second.model.config.uncertainty_config["reranking"] = {"text_weight": 1.0}
    with torch.no_grad():
        second.model.uncertainty_prototypes.image.add_(1)
    calls = encodings(second, monkeypatch)
    second._encode(second.get_eval_dataloader())
    assert not calls and "reranking" in second.model.config.uncertainty_config


def test_other_code_has_another_key(tmp_path, monkeypatch):
    first = made(tmp_path)
    loader = first.get_eval_dataloader()
    key = cache_key(first.model, loader)
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("pass\n")
    monkeypatch.setattr(embedding_cache, "_PACKAGE", package)
    assert cache_key(first.model, loader) != key


# A cache is never a reason to fail


@pytest.mark.parametrize("damage", ["empty", "truncated", "another file", "other tensors", "a folder"])
def test_what_cannot_be_read_is_encoded_again(tmp_path, monkeypatch, caplog_of_library, damage):
    first = made(tmp_path)
    expected = results(first.evaluate())
    calls = encodings(first, monkeypatch)
    file = cached_file(tmp_path)
    content = file.read_bytes()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "another file":
        file.write_bytes(b"no tensors at all" * 100)
    elif damage == "other tensors":
        safetensors.torch.save_file({"image_tokens": torch.zeros(1)}, file)
    else:
        file.unlink()
        file.mkdir()
    assert results(first.evaluate()) == expected and len(calls) == 1
    assert "cannot be read and are encoded again" in caplog_of_library.text
    if damage != "a folder":
        assert file.read_bytes() == content
        first.evaluate()
        assert len(calls) == 1


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog_of_library):
    (tmp_path / "cache").write_text("a file")
    first = made(tmp_path)
    assert results(first.evaluate()) == results(first.evaluate())
    assert "cannot be written" in caplog_of_library.text
    assert (tmp_path / "cache").read_text() == "a file"


def test_a_full_disk_is_a_warning_and_leaves_nothing_behind(tmp_path, caplog_of_library):
    first = made(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file can grow beyond this, as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        metrics = first.evaluate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert metrics["eval_rsum"] > 0
    assert "cannot be written" in caplog_of_library.text
    assert not list((tmp_path / "cache").iterdir())


def test_two_evaluations_at_once_do_not_write_into_one_file(tmp_path, monkeypatch):
    first = made(tmp_path)
    encoded = first.evaluator.encode(first.model, first.get_eval_dataloader())
    save_file = safetensors.torch.save_file
    written = []

    def interrupted(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        written.append(path)
        if len(written) == 1:
            # The other one comes and goes while this one has not finished.
            save_embeddings(encoded, tmp_path / "cache", "key")

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    save_embeddings(encoded, tmp_path / "cache", "key")
    assert len(set(written)) == 2
    cached_file(tmp_path)
    assert load_embeddings(tmp_path / "cache", "key", torch.device("cpu")) is not None


def test_what_cannot_be_told_apart_is_evaluated_and_not_kept(tmp_path, caplog_of_library):
    first = made(tmp_path)
    first.evaluate(CountedDataset(first.eval_dataset.dataset))
    assert "got CountedDataset and PicoDataCollator" in caplog_of_library.text
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "query"], modules_to_save=["alignment_head"])
    adapted = made(tmp_path, net=peft.get_peft_model(copy.deepcopy(first.model), lora))
    adapted.evaluate()
    assert "adapters" in caplog_of_library.text
    assert not (tmp_path / "cache").exists()
