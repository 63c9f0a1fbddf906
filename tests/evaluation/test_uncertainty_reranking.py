"""Re-ranking by uncertainty and the risk-coverage curve, by hand and on galleries made to need them or not."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from modeling_pico import PicoModel, RetrievalEvaluator
from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.evaluation import (
    RetrievalUncertainty,
    UncertaintyReranking,
    folded_retrieval_metrics,
    learn_reranking,
    retrieval_ranks,
    risk_coverage,
)
from modeling_pico.evaluation.retrieval_metrics import TIE_TOLERANCE
from modeling_pico.evaluation.uncertainty_reranking import _best_weight


# Re-ranking


def test_factors_by_hand():
    # exp(-ln 2 * u): u = 0, 1, 2 give 1, 1/2, 1/4; with twice the weight the images' 0 and 1 give 1 and 1/4.
    reranking = UncertaintyReranking(image_weight=2 * math.log(2), text_weight=math.log(2), floor=-1.0)
    scores = torch.tensor([[3.0, 1.0, 7.0], [1.0, 0.0, -1.0]])
    of_images, of_texts = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    for given, expected in (
        ({}, [[4.0, 2.0, 8.0], [2.0, 1.0, 0.0]]),
        ({"text_uncertainty": of_texts}, [[4.0, 1.0, 2.0], [2.0, 0.5, 0.0]]),
        ({"image_uncertainty": of_images}, [[4.0, 2.0, 8.0], [0.5, 0.25, 0.0]]),
        ({"image_uncertainty": of_images, "text_uncertainty": of_texts}, [[4.0, 1.0, 2.0], [0.5, 0.125, 0.0]]),
    ):
        torch.testing.assert_close(reranking.rerank(scores, **given), torch.tensor(expected))


def test_a_factor_does_not_raise_what_is_below_the_floor():
    """As it stands the formula would multiply -1 by 1/8 and put the more uncertain, lower score first."""
    scores, uncertainty = torch.tensor([[-1.0, -0.5, 0.5]]), torch.tensor([3.0, 0.0, 0.0])
    reranking = UncertaintyReranking(text_weight=math.log(2))
    assert (scores * torch.exp(-math.log(2) * uncertainty)).argsort().tolist() == [[1, 0, 2]]
    assert reranking.rerank(scores, text_uncertainty=uncertainty).argsort().tolist() == [[0, 1, 2]]


def test_the_center_and_the_querys_own_factor_change_no_rank():
    torch.manual_seed(0)
    scores, ids = torch.rand(12, 12), torch.arange(12)
    of_images, of_texts = torch.rand(12), torch.rand(12)
    plain = UncertaintyReranking(image_weight=0.7, text_weight=-0.9)
    centered = UncertaintyReranking(image_weight=0.7, text_weight=-0.9, image_center=0.4, text_center=0.6)
    both = retrieval_ranks(plain.rerank(scores, image_uncertainty=of_images, text_uncertainty=of_texts), ids, ids)
    for reranking in (plain, centered):
        to_text, _ = retrieval_ranks(reranking.rerank(scores, text_uncertainty=of_texts), ids, ids)
        _, to_image = retrieval_ranks(reranking.rerank(scores, image_uncertainty=of_images), ids, ids)
        assert torch.equal(to_text, both[0]) and torch.equal(to_image, both[1])
    assert not torch.equal(both[0], retrieval_ranks(scores, ids, ids)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_are_reranked_by_the_uncertainty_as_it_is(dtype):
    # Between 0.5 and 1 the numbers of bfloat16 are 0.004 apart: these would all be equal.
    scores, uncertainty = torch.ones(1, 3, dtype=dtype), torch.tensor([0.6001, 0.6, 0.5999])
    found = UncertaintyReranking(text_weight=10.0).rerank(scores, text_uncertainty=uncertainty)
    torch.testing.assert_close(found, (-10 * uncertainty).exp()[None])
    # Forty images have one certain text each, and the last has forty uncertain ones.
    generator, ids = torch.Generator().manual_seed(0), torch.arange(41)
    scores = (0.5 + 0.01 * torch.randint(0, 9, (41, 80), generator=generator)).to(dtype)
    text_ids, uncertainty = torch.arange(80).clamp(max=40), 0.6 + 1e-4 * (torch.arange(80) >= 40)
    plain, learned = (
        learn_reranking(of, ids, text_ids, torch.rand(41), uncertainty) for of in (scores.float(), scores)
    )
    assert plain.text_weight == learned.text_weight > 0


def test_an_uncertainty_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"text_uncertainty must be \(3,\) to fit scores .*\(2, 3\), got \(2,\)"):
        UncertaintyReranking().rerank(torch.ones(2, 3), text_uncertainty=torch.ones(2))


# Learning


def gallery(seed: int, size: int = 150, strength: float = 0.6) -> tuple[torch.Tensor, ...]:
    """
    Scores in which some texts and images are close to everything, by as much as their uncertainty says; the negative
    of what is right for the texts if `strength` is negative. Uncertainty far from 0 with a small spread, as in models.
    """
    generator = torch.Generator().manual_seed(seed)
    of_images, of_texts = (torch.rand(size, generator=generator) for _ in range(2))
    scores = 0.3 * torch.rand(size, size, generator=generator) + 0.2 * torch.eye(size)
    scores = scores + abs(strength) * of_images[:, None] + strength * of_texts - 0.5
    ids = torch.arange(size)
    return scores, ids, ids, 0.9 + 0.01 * of_images, 0.9 + 0.01 * of_texts


def rsum(reranking: UncertaintyReranking, made: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    scores, image_ids, text_ids, of_images, of_texts = made
    views = [
        reranking.rerank(scores, text_uncertainty=of_texts),
        reranking.rerank(scores, image_uncertainty=of_images),
    ]
    metrics = [folded_retrieval_metrics(view, image_ids, text_ids, num_folds=1) for view in views]
    directions = ("image_to_text", "text_to_image")
    return tuple(
        sum(of_view[f"{direction}_recall_at_{k}"] for k in (1, 5, 10))
        for direction, of_view in zip(directions, metrics, strict=True)
    )


@pytest.mark.parametrize("strength", [0.6, -0.6])
def test_weights_learned_on_validation_help_on_test_whatever_their_sign(strength):
    learned = learn_reranking(*gallery(0, strength=strength))
    assert learned.image_weight > 0 and learned.text_weight * strength > 0
    assert learned.floor == float(gallery(0, strength=strength)[0].min())
    before, after = (rsum(reranking, gallery(1, strength=strength)) for reranking in (UncertaintyReranking(), learned))
    assert after[0] > before[0] + 10 and after[1] > before[1] + 10


def test_what_gains_nothing_keeps_the_weight_zero():
    """Uncertainty that has nothing to do with the scores: no weight survives the parts held out."""
    learned = []
    for seed in range(10):
        scores, ids, _, _, _ = gallery(seed, size=60, strength=0.0)
        generator = torch.Generator().manual_seed(100 + seed)
        noise = [torch.rand(60, generator=generator) for _ in range(2)]
        made = learn_reranking(scores, ids, ids, *noise)
        learned += [made.image_weight, made.text_weight]
    assert learned.count(0.0) >= 19
    constant = torch.full((60,), 0.7)
    made = learn_reranking(scores, ids, ids, constant, constant)
    assert made.image_weight == made.text_weight == 0.0


def test_captions_of_one_image_are_one_piece_of_evidence():
    """
    Of ten images with four captions each, three gain and one loses: 2 in ten of spread 0.6, hence 2 / (0.6 sqrt 10),
    about 1.05 standard errors. Of forty captions counted alone it would be twice that.
    """
    gains = torch.tensor([1, 1, 1, -1, 0, 0, 0, 0, 0, 0]).repeat_interleave(4)

    def hits(weight: float) -> torch.Tensor:
        return 1 + gains * int(weight > 0) - int(weight < 0)

    uncertainty, images = torch.tensor([0.0, 1.0]), torch.arange(10).repeat_interleave(4)
    assert _best_weight(hits, uncertainty, images) == 0.0
    # The smallest weight of the grid, over the spread of 0.5.
    assert _best_weight(hits, uncertainty, torch.arange(40)) == pytest.approx(0.003 / 0.5)


def test_uncertainty_that_is_not_finite_or_does_not_fit_is_refused():
    scores, ids, _, of_images, of_texts = gallery(0, size=5)
    with pytest.raises(ValueError, match=r"text_uncertainty must be \(5,\) to fit scores .*, got \(4,\)"):
        learn_reranking(scores, ids, ids, of_images, of_texts[:4])
    of_images[2] = math.nan
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        learn_reranking(scores, ids, ids, of_images, of_texts)


# Risk and coverage


def test_risk_coverage_by_hand():
    # By uncertainty: a hit, a miss, a hit, a miss.
    curve = risk_coverage(torch.tensor([3, 0, 1, 0]), torch.tensor([0.2, 0.1, 0.4, 0.3]))
    assert curve.coverage.tolist() == [25, 50, 75, 100]
    torch.testing.assert_close(curve.recall, torch.tensor([100, 50, 200 / 3, 50], dtype=torch.float64))
    torch.testing.assert_close(curve.best_recall, torch.tensor([100, 100, 200 / 3, 50], dtype=torch.float64))
    assert curve.aurc == pytest.approx((0 + 50 + 100 / 3 + 50) / 4)
    assert curve.best_aurc == pytest.approx((0 + 0 + 100 / 3 + 50) / 4)
    assert curve.chance_aurc == 50
    # With the first two results shown, the query of rank 1 hits as well.
    assert risk_coverage(torch.tensor([3, 0, 1, 0]), torch.tensor([0.2, 0.1, 0.4, 0.3]), k=2).chance_aurc == 25


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_equal_uncertainty_means_no_order(order):
    curve = risk_coverage(torch.tensor([0, 0, 5, 5])[order], torch.tensor([0.1, 0.5, 0.5, 0.5])[order])
    # One certain hit, then thirds of a hit.
    expected = [100, 100 * (4 / 3) / 2, 100 * (5 / 3) / 3, 50]
    torch.testing.assert_close(curve.recall, torch.tensor(expected, dtype=torch.float64))


def test_an_area_is_that_of_an_order_by_lot_on_average():
    torch.manual_seed(0)
    ranks = torch.randint(0, 2, (40,))
    areas = [risk_coverage(ranks, torch.rand(40)).aurc for _ in range(400)]
    assert sum(areas) / 400 == pytest.approx(risk_coverage(ranks, torch.zeros(40)).aurc, abs=1)
    assert risk_coverage(ranks, torch.zeros(40)).aurc == pytest.approx(
        risk_coverage(ranks, torch.ones(40)).chance_aurc
    )


@pytest.mark.parametrize(
    ("ranks", "uncertainty", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"got \(2,\) and \(3,\)"),
        (torch.zeros(0), torch.zeros(0), "at least one query"),
        (torch.zeros(2), torch.tensor([0.0, math.inf]), "1 uncertainties are NaN or infinite"),
    ],
)
def test_wrong_curves_are_refused(ranks, uncertainty, message):
    with pytest.raises(ValueError, match=message):
        risk_coverage(ranks, uncertainty)


# In evaluation


@pytest.fixture(scope="module")
def data():
    return CaptionedImageDataset(tiny.rows(12, seed=5, repeats=2))


def loader(data) -> DataLoader:
    return DataLoader(data, batch_size=5, collate_fn=PicoDataCollator(tiny.processor()))


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("head", ["pico", "clip_style"])
def test_streamed_reranking_equals_that_of_the_matrix(data, head, folds):
    net = tiny.model(uncertainty_config={"num_prototypes": 4}, method=head).eval()
    reranking = UncertaintyReranking(image_weight=40.0, text_weight=-30.0, floor=0.2)
    net.config.uncertainty_config["reranking"] = reranking.to_dict()
    evaluator = RetrievalEvaluator(num_folds=folds, image_chunk=5, text_chunk=7)
    encoded = evaluator.encode(net, loader(data))
    scores = evaluator.score(net, encoded)
    measured = RetrievalUncertainty.measure(net, encoded)
    of_images, of_texts = measured.images, measured.texts
    metrics = evaluator.metrics(net, encoded)
    plain = folded_retrieval_metrics(scores, encoded.image_ids, encoded.text_ids, num_folds=folds)
    assert {name: metrics[name] for name in plain} == pytest.approx(plain)
    ids = encoded.image_ids, encoded.text_ids
    both = reranking.rerank(scores, image_uncertainty=of_images, text_uncertainty=of_texts)
    exact = folded_retrieval_metrics(both, *ids, num_folds=folds)
    for direction, searched in (
        ("image_to_text", {"text_uncertainty": of_texts}),
        ("text_to_image", {"image_uncertainty": of_images}),
    ):
        one_side = reranking.rerank(scores, **searched)
        expected = folded_retrieval_metrics(one_side, *ids, num_folds=folds, tie_tolerance=TIE_TOLERANCE)
        without_tolerance = folded_retrieval_metrics(one_side, *ids, num_folds=folds)
        for name in (name for name in expected if name.startswith(direction)):
            assert metrics[f"reranked_{name}"] == pytest.approx(expected[name])
            # A query's own factor changes none of its ranks.
            assert without_tolerance[name] == pytest.approx(exact[name])
    if folds == 1:
        assert metrics["reranked_rsum"] != metrics["rsum"]
        to_text, _ = retrieval_ranks(scores, encoded.image_ids, encoded.text_ids)
        assert metrics["image_to_text_aurc"] == pytest.approx(risk_coverage(to_text, of_images).aurc)


def test_uncertainty_of_a_set_is_that_of_the_outputs(data):
    net = tiny.model(uncertainty_config={"num_prototypes": 4}).eval()
    measured = RetrievalUncertainty.measure(net, RetrievalEvaluator().encode(net, loader(data)))
    inputs = tiny.processor()(
        images=[data[row]["image"] for row in range(12)], text=data[11]["captions"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        outputs = net(**inputs)
    torch.testing.assert_close(measured.images, outputs.image_uncertainty)
    torch.testing.assert_close(measured.texts[-len(outputs.text_uncertainty) :], outputs.text_uncertainty)


def test_without_uncertainty_nothing_is_added(data):
    net = tiny.model().eval()
    evaluator = RetrievalEvaluator()
    encoded = evaluator.encode(net, loader(data))
    assert RetrievalUncertainty.measure(net, encoded) is None
    assert not [name for name in evaluator.metrics(net, encoded) if "reranked" in name or "aurc" in name]


# In training


def test_the_trainer_learns_keeps_and_uses_the_weights(tmp_path):
    made = tiny.trainer(
        tmp_path / "run", model_options={"uncertainty_config": {"num_prototypes": 4}}, num_train_epochs=1
    )
    made.train()
    assert "eval_reranked_rsum" not in made.evaluate()
    learned = made.learn_uncertainty_reranking()
    assert set(learned) == {f"uncertainty_reranking_{name}" for name in UncertaintyReranking().to_dict()}
    made.model.config.uncertainty_config["reranking"]["text_weight"] = 25.0
    made.save_model()
    metrics = made.evaluate()
    assert "eval_rsum" in metrics and "eval_reranked_rsum" in metrics
    loaded = PicoModel.from_pretrained(tmp_path / "run")
    assert loaded.config.uncertainty_config["reranking"]["text_weight"] == 25.0
    made.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "eval, re-ranked by uncertainty" in card and "texts 25 (learned on validation)" in card
    # New training makes new weights, for which nothing is learned yet.
    again = tiny.trainer(tmp_path / "again", net=loaded, num_train_epochs=1)
    again.train()
    assert "reranking" not in loaded.config.uncertainty_config


def test_nothing_to_learn_without_uncertainty(tmp_path):
    with pytest.raises(ValueError, match="no uncertainty to re-rank by.*uncertainty_config"):
        tiny.trainer(tmp_path).learn_uncertainty_reranking()


def test_uncertainty_alone_is_trained_without_dropout():
    net = tiny.model(dropout=0.5, uncertainty_config={"num_prototypes": 4})
    inputs = tiny.processor()(
        images=[torch.zeros(3, 16, 16), torch.ones(3, 16, 16)],
        text=["red up here", "green left"],
        return_tensors="pt",
        padding=True,
        do_rescale=False,
    )
    losses = [net.train()(**inputs).auxiliary_loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    net.train_uncertainty_only()
    assert net.train().training and not net.trains_embeddings
    losses = [net(**inputs).auxiliary_loss for _ in range(2)]
    assert losses[0].item() == losses[1].item() and losses[0].requires_grad
    net.requires_grad_(True)
    assert net.train().text_model.training


def test_uncertainty_alone_leaves_the_trained_model_as_it_is(tmp_path):
    first = tiny.trainer(tmp_path / "first", num_train_epochs=2)
    first.train()
    first.save_model()
    net = PicoModel.from_pretrained(tmp_path / "first", uncertainty_config={"num_prototypes": 4})
    net.train_uncertainty_only()
    start = net.uncertainty_prototypes.text.detach().clone()
    # Evaluated and built on the way: prototypes of style would move if they were.
    alone = tiny.trainer(tmp_path / "alone", net=net, num_train_epochs=2)
    alone.train()
    state = net.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert not torch.equal(net.uncertainty_prototypes.text, start)
    losses = [entry["train_loss"] for entry in alone.state.log_history if "train_loss" in entry]
    assert losses and math.isfinite(losses[0])
    with pytest.raises(ValueError, match="no uncertainty to train"):
        tiny.model().train_uncertainty_only()
