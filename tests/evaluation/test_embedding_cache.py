"""Embeddings of an evaluation, kept on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from tiny import trainer

from modeling_pico.evaluation.embedding_cache import cache_key, load_embeddings


def test_a_second_evaluation_reads_the_embeddings_and_gives_the_same_numbers(tmp_path, monkeypatch):
    made = trainer(tmp_path / "run", eval_cache_dir=str(tmp_path / "cache"))
    first = made.evaluate()
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and files[0].suffix == ".safetensors"
    monkeypatch.setattr(made.evaluator, "encode", lambda *args, **kwargs: pytest.fail("encoded again"))
    second = made.evaluate()
    metrics = [name for name in first if "recall" in name or "rsum" in name or "loss" in name]
    assert {name: first[name] for name in metrics} == {name: second[name] for name in metrics}


def test_half_precision_embeddings_score_like_the_full_ones(tmp_path):
    options = {"num_uncertainty_prototypes": 2}
    made = trainer(tmp_path / "run", eval_cache_dir=str(tmp_path / "cache"), model_options=options)
    loader = made.get_eval_dataloader()
    full = made.evaluator.encode(made.model, loader)
    made.evaluate()
    half = load_embeddings(tmp_path / "cache", cache_key(made.model, loader), torch.device("cpu"))
    assert half.image_tokens.dtype == half.text_tokens.dtype == torch.float16
    assert torch.equal(half.text_mask, full.text_mask) and torch.equal(half.image_ids, full.image_ids)
    torch.testing.assert_close(
        made.evaluator.score(made.model, half), made.evaluator.score(made.model, full), atol=2e-3, rtol=0
    )
    of_half, of_full = (made.evaluator.uncertainty(made.model, encoded) for encoded in (half, full))
    for first, second in zip(of_half, of_full, strict=True):
        torch.testing.assert_close(first.float(), second, atol=2e-3, rtol=0)


def test_other_weights_have_another_key_and_other_prototypes_do_not(tmp_path):
    made = trainer(tmp_path / "run", model_options={"num_uncertainty_prototypes": 2})
    loader = made.get_eval_dataloader()
    key = cache_key(made.model, loader)
    made.model.style_prototypes.visual_prototypes.add_(1)
    made.model.config.uncertainty_reranking = {"text_weight": 1.0}
    with torch.no_grad():
        made.model.uncertainty_prototypes.image.add_(1)
    assert cache_key(made.model, loader) == key
    assert made.model.config.uncertainty_reranking is not None
    with torch.no_grad():
        made.model.alignment_head.text_projection.weight[0, 0] += 1e-3
    assert cache_key(made.model, loader) != key


def test_unknown_data_are_refused(tmp_path):
    made = trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="CaptionedImageDataset"):
        cache_key(made.model, DataLoader([1, 2]))
