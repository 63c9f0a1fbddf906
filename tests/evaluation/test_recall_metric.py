from __future__ import annotations

import socket
import sys

import evaluate
import numpy as np
import pytest
import torch

import modeling_pico
from modeling_pico.evaluation import recall_metric, retrieval_metrics, retrieval_ranks
from modeling_pico.evaluation.recall_metric import ImageTextRecall


@pytest.fixture
def metric(tmp_path):
    return ImageTextRecall(cache_dir=str(tmp_path))


def test_by_hand(metric):
    result = metric.compute(predictions=[[0.9, 0.8, 0.1], [0.7, 0.2, 0.6]], references=[0, 1], text_ids=[0, 0, 1])
    assert result["image_to_text_recall_at_1"] == 50.0 and result["rsum"] == 550.0
    assert result["image_to_text_median_rank"] == 1.5


@pytest.mark.parametrize(
    "container", [torch.as_tensor, np.asarray, lambda rows: [list(map(float, row)) for row in rows]]
)
def test_batches_equal_one_computation(metric, container):
    image_ids = torch.arange(8)
    text_ids = image_ids.repeat_interleave(3)
    scores = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 1), (1, 5), (5, 8)):
        metric.add_batch(predictions=container(scores[start:end]), references=image_ids[start:end])
    batched = metric.compute(text_ids=text_ids)
    assert batched == metric.compute(predictions=container(scores), references=image_ids, text_ids=text_ids)
    assert batched == retrieval_metrics(*retrieval_ranks(scores, image_ids, text_ids))
    folded = metric.compute(predictions=container(scores), references=image_ids, text_ids=text_ids, num_folds=2)
    assert folded["rsum"] > batched["rsum"]


def test_package_offers_the_class():
    assert modeling_pico.ImageTextRecall is ImageTextRecall


def test_describes_itself(metric):
    assert "rSum" in metric.description
    assert "text_ids" in metric.compute.__doc__


def test_evaluate_loads_the_file_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    loaded = evaluate.load(recall_metric.__file__, cache_dir=str(tmp_path / "cache"))
    assert type(loaded).__name__ == "ImageTextRecall" and type(loaded).__module__.startswith("evaluate_modules.")
    assert loaded.compute(predictions=[[0.1, 0.2], [0.0, 0.3]], references=[0, 1], text_ids=[0, 1])["rsum"] == 550.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_ids": [0, 0, 1]}, r"must be \(images, texts\) = \(2, 3\), got \(2, 2\)"),
        ({"text_ids": [0, 2]}, "1 of 2 images have no right text"),
        ({"text_ids": [0, 1], "num_folds": 3}, "2 images cannot be split into 3 folds"),
    ],
)
def test_bad_input_is_named(metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[[0.9, 0.8], [0.7, 0.2]], references=[0, 1], **options)
