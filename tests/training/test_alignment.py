"""The trainer measures where images of training lie, and evaluations move galleries there."""

from __future__ import annotations

import copy
import logging

import pytest
import tiny
import torch
from torch.utils.data import DataLoader, Subset

from modeling_pico import CaptionedImageDataset, PicoDataCollator, RetrievalEvaluator, align_encoded
from modeling_pico.evaluation import embedding_cache
from modeling_pico.training import PicoTrainer
from modeling_pico.training import trainer as trainer_module


def data(count: int, seed: int = 0, styles: list[str] | None = None) -> CaptionedImageDataset:
    rows = tiny.rows(count, seed=seed)
    return CaptionedImageDataset(rows if styles is None else rows.add_column("style", styles))


def made(folder, styles: list[str] | None = None, **options) -> PicoTrainer:
    training = options.pop("data", None) or data(50)
    return tiny.trainer(folder, data=training, eval_data=data(75, 4, styles), align_gallery=True, **options)


def moments(made: PicoTrainer) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in made.model.image_moments.named_buffers()}


def measured(made: PicoTrainer, rows: list[int]) -> torch.Tensor:
    """Mean over the patches of some training images, as they are in evaluation."""
    batch = PicoDataCollator(tiny.processor())([made.train_dataset[row] for row in rows])
    with torch.no_grad():
        return made.model.eval().get_image_states(batch["pixel_values"]).states.flatten(0, 1).mean(dim=0)


def test_moments_are_those_of_images_spread_over_the_training_set(tmp_path, monkeypatch):
    def fails(image, rng):
        raise AssertionError("augmented")

    training = tiny.CountedDataset(tiny.rows(100), transform=fails)
    first = made(tmp_path, data=training, model_options={"pooling": "mean"})
    first.model.train()
    first.fit_alignment()
    assert training.reads == 100 and int(first.model.image_moments.count) == 100
    torch.testing.assert_close(first.model.image_moments.mean, measured(first, list(range(100))))
    monkeypatch.setattr(trainer_module, "_REFERENCE_IMAGES", 40)
    first.fit_alignment()
    torch.testing.assert_close(first.model.image_moments.mean, measured(first, [row * 5 // 2 for row in range(40)]))
    # Of another set.
    first.fit_alignment(Subset(data(100), list(range(60, 95))))
    assert int(first.model.image_moments.count) == 35
    torch.testing.assert_close(first.model.image_moments.mean, measured(first, list(range(60, 95))))


def test_training_forgets_them_and_is_the_same_without(tmp_path):
    first, second = (made(tmp_path / name, num_train_epochs=2, save_strategy="no") for name in "ab")
    first.fit_alignment()
    assert first.train().training_loss == second.train().training_loss
    # Neither measured nor fed back in training.
    assert not first.model.image_moments.is_fitted
    assert not any("aligned" in name for entry in first.state.log_history for name in entry)
    state = torch.random.get_rng_state()
    first.fit_alignment()
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = second.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, weights[name]) or name.startswith("image_moments."), name


@pytest.mark.parametrize("styles", [None, ["ink", "oil"] * 37 + ["oil"]])
def test_evaluation_reports_aligned_metrics_beside_the_plain_ones(tmp_path, styles):
    first = made(tmp_path, styles)
    first.fit_alignment()
    metrics = first.evaluate()
    loader = DataLoader(first.eval_dataset, batch_size=16, collate_fn=PicoDataCollator(tiny.processor()))
    evaluator = RetrievalEvaluator()
    encoded = evaluator.encode(first.model, loader)
    aligned = evaluator.retrieval_metrics(first.model, align_encoded(first.model, encoded, loader, styles))
    for name, value in aligned.items():
        assert metrics[f"eval_aligned_{name}"] == pytest.approx(value), name
    plain = evaluator.retrieval_metrics(first.model, encoded)
    assert {name: metrics[f"eval_{name}"] for name in plain} == pytest.approx(plain)
    assert aligned["image_to_text_median_rank"] != plain["image_to_text_median_rank"]
    first.args.align_gallery = False
    assert not any("aligned" in name for name in first.evaluate())


def test_a_model_without_moments_is_refused_before_it_encodes(tmp_path):
    first = made(tmp_path)
    first.evaluator.encode = None
    with pytest.raises(ValueError, match=r"no moments of training .*`model.fit_alignment\(batches\)`"):
        first.evaluate()


def test_too_few_training_images_are_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modeling_pico"), "propagate", True)
    first = made(tmp_path, data=data(20))
    first.fit_alignment()
    assert not first.model.image_moments.is_fitted and "there are 20 of them" in caplog.text


def test_kept_embeddings_are_plain_or_aligned(tmp_path, monkeypatch):
    styles = ["ink", "oil"] * 37 + ["oil"]
    first = made(tmp_path, styles, eval_cache_dir=str(tmp_path / "cache"))
    first.fit_alignment()
    metrics = first.evaluate()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "align_encoded", None)  # read, not encoded
        first.evaluator.encode = None
        again = first.evaluate()
    assert {name: again[name] for name in again if "rsum" in name} == {
        name: metrics[name] for name in metrics if "rsum" in name
    }
    loader = first.get_eval_dataloader()
    key = embedding_cache.cache_key(first.model, loader, aligned=True)
    assert key != embedding_cache.cache_key(first.model, loader)
    # Aligned ones change with the moments of training and with the styles, plain ones do not.
    plain = embedding_cache.cache_key(first.model, loader)
    other = copy.deepcopy(first.model)
    other.image_moments.mean += 1
    assert embedding_cache.cache_key(other, loader, aligned=True) != key
    assert embedding_cache.cache_key(other, loader) == plain
    first.eval_dataset.styles = styles[::-1]
    assert embedding_cache.cache_key(first.model, loader, aligned=True) != key
    assert embedding_cache.cache_key(first.model, loader) == plain


def test_style_report_of_a_trainer_moves_each_style(tmp_path):
    first = made(tmp_path, ["ink", "oil"] * 37 + ["rare"])
    assert first.measure_styles(first.eval_dataset).styles["ink"].aligned_rsum is None
    first.fit_alignment()
    report = first.measure_styles(first.eval_dataset)
    assert report.styles["rare"].aligned_rsum is None
    loader = first.get_eval_dataloader()
    encoded = first.evaluator.encode(first.model, loader)
    aligned = align_encoded(first.model, encoded, loader, first.eval_dataset.styles, leave_small=True)
    ink = torch.tensor([style == "ink" for style in first.eval_dataset.styles]).nonzero().squeeze(1)
    expected = first.evaluator.retrieval_metrics(first.model, aligned.subset(ink))["rsum"]
    assert report.styles["ink"].aligned_rsum == pytest.approx(expected)
