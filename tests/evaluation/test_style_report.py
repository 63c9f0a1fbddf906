from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

import modeling_pico
from modeling_pico import RetrievalEvaluator, StyleReport, align_encoded, measure_styles, pair_scores
from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.evaluation import EncodedRetrieval, style_report
from modeling_pico.evaluation.style_probe import probe_accuracy


class Head:
    """Leaves tokens as they are, or keeps only some features of the images."""

    def __init__(self, kept: torch.Tensor | None = None):
        self.kept = kept

    def weight(self, tokens, mask, modality):
        if self.kept is None or modality == "text":
            return tokens, None
        return tokens * self.kept, self.kept.expand(len(tokens), -1)


def model_of(kept=None) -> SimpleNamespace:
    return SimpleNamespace(alignment_head=Head(kept), score=pair_scores)


def encode(scores, image_ids, text_ids) -> EncodedRetrieval:
    """One token a sample, such that the pair scores are the given ones."""
    scores = torch.tensor(scores)
    images, texts = scores.shape
    return EncodedRetrieval(
        image_tokens=scores[:, None],
        image_mask=torch.ones(images, 1, dtype=torch.bool),
        # The score of two single tokens is twice their inner product.
        text_tokens=torch.eye(texts)[:, None] / 2,
        text_mask=torch.ones(texts, 1, dtype=torch.bool),
        image_ids=torch.tensor(image_ids),
        text_ids=torch.tensor(text_ids),
    )


SCORES = [
    # ink: 0, 1; oil: 0, 1
    [0.9, 0.2, 0.8, 0.9],  # ink, 0
    [0.5, 0.1, 0.6, 0.3],  # ink, 1
    [0.7, 0.4, 0.3, 0.6],  # oil, 0
    [0.1, 0.5, 0.4, 0.2],  # oil, 1
]
STYLES = ["ink", "ink", "oil", "oil"]


def small_report(seen=None, scores=SCORES, kept=None) -> StyleReport:
    encoded = encode(scores, [0, 1, 0, 1], [0, 1, 0, 1])
    return StyleReport.from_encoded(model_of(kept), encoded, STYLES, torch.ones(4, dtype=torch.int64), seen)


def test_by_hand():
    report = small_report(["ink"])
    ink, oil = report.styles["ink"], report.styles["oil"]
    assert list(report.styles) == ["ink", "oil"]
    assert (ink.seen, oil.seen, ink.images, oil.texts) == (True, False, 2, 2)
    # Of ink, image 0 and caption 0 come first; of oil, nothing does.
    assert ink.retrieval["image_to_text_recall_at_1"] == ink.retrieval["text_to_image_recall_at_1"] == 50
    assert (ink.retrieval["rsum"], oil.retrieval["rsum"]) == (500, 400)
    assert ink.chance_rsum == oil.chance_rsum == 500
    assert (ink.equal_rsum, oil.equal_rsum) == pytest.approx((500, 400))
    assert ink.gap is None and oil.gap == pytest.approx(100)
    # Best images of the captions: ink 0, oil 1, ink 0, ink 0.
    assert (ink.top_shares["1"], oil.top_shares["1"]) == pytest.approx((75, 25))
    assert (ink.top_shares["10"], oil.top_shares["10"], ink.gallery_share) == pytest.approx((50, 50, 50))
    assert report.metrics()["style_oil_gap"] == report.metrics()["style_gap"] == pytest.approx(100)


def test_alignment_is_reported_for_every_style_of_enough_images():
    generator = torch.Generator().manual_seed(0)
    meaning = torch.nn.functional.normalize(torch.randn(40, 1, 6, generator=generator), dim=-1)
    # Images of the style not seen are those of another meaning, and moved they are those of their own.
    drawn = {"ink": meaning[:32], "neon": meaning[:32].flip(0), "rare": meaning[:8].flip(0)}
    meant = torch.cat([meaning[: len(images)] for images in drawn.values()])
    mask, ids = torch.ones(72, 1, dtype=torch.bool), torch.cat([torch.arange(count) for count in (32, 32, 8)])
    encoded = EncodedRetrieval(torch.cat([*drawn.values()]), mask, meant, mask, ids, ids)
    aligned = replace(encoded, image_tokens=torch.cat([meaning[:32].flip(0), meaning[:32], meaning[:8]]))
    styles = ["ink"] * 32 + ["neon"] * 32 + ["rare"] * 8
    captions = torch.ones(72, dtype=torch.int64)
    report = StyleReport.from_encoded(model_of(), encoded, styles, captions, ["ink"], aligned=aligned)
    ink, neon, rare = report.styles.values()
    # What it gains in a style not seen, and what it costs in a seen one.
    assert neon.retrieval["rsum"] < 300 and neon.aligned_rsum == 600
    assert ink.retrieval["rsum"] == 600 and ink.aligned_rsum == neon.retrieval["rsum"]
    assert report.metrics()["style_ink_aligned_rsum"] == ink.aligned_rsum
    assert rare.aligned_rsum is None and "style_rare_aligned_rsum" not in report.metrics()
    rows = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert rows[3].endswith("| 600.0 |") and rows[4].endswith("| – |")
    # It takes no style for a seen one.
    unknown = StyleReport.from_encoded(model_of(), encoded, styles, captions, aligned=aligned)
    assert unknown.styles["neon"].aligned_rsum == 600
    report = StyleReport.from_encoded(model_of(), encoded, styles, captions, ["ink"])
    assert report.styles["neon"].aligned_rsum is None and "aligned" not in " ".join(report.metrics())


def test_captions_of_an_image_count_as_one_query():
    # The first image has three captions that find the other style, the second has one that finds its own.
    encoded = encode([[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5]], [0, 1], [0, 0, 0, 1])
    report = StyleReport.from_encoded(model_of(), encoded, ["oil", "ink"], torch.tensor([3, 1]))
    assert report.styles["ink"].top_shares["1"] == pytest.approx(100)
    scores = [[0.1, 0.1, 0.1, 0.9], [0.5, 0.5, 0.5, 0.1]]
    report = StyleReport.from_encoded(
        model_of(), encode(scores, [0, 1], [0, 0, 0, 1]), ["oil", "ink"], torch.tensor([3, 1])
    )
    assert report.styles["ink"].top_shares["1"] == pytest.approx(50)


def test_equal_scores_share_places_and_count_against_the_query():
    report = small_report(scores=[[0.5] * 4] * 4)
    for result in report.styles.values():
        assert result.retrieval["image_to_text_recall_at_1"] == result.retrieval["text_to_image_recall_at_1"] == 0
        assert result.top_shares["1"] == pytest.approx(50)
    places = style_report._places(torch.tensor([[3.0, 2.0, 2.0 + 1e-6, 1.0], [5.0, 5.0, 5.0, 5.0]]), 2)
    assert places.tolist() == [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]


# Equal galleries


def test_thinned_recall_by_hand():
    one, two, three = (torch.tensor([number]) for number in (1, 2, 3))
    # One of two wrong answers stays, and one of them is better than the right one.
    assert style_report.thinned_recall(one, two, 1, 1) == pytest.approx(50)
    # Two of three stay; the right answer is second unless both are the better ones: one way of three.
    assert style_report.thinned_recall(two, three, 2, 2) == pytest.approx(200 / 3)
    assert style_report.thinned_recall(two, three, 0, 1) == pytest.approx(100)
    assert style_report.thinned_recall(two, three, 3, 2) == pytest.approx(0)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("left", [0, 2, 5, 7])
def test_thinned_recall_equals_counting_all_choices(left, k):
    wrong = 7
    for rank in range(wrong + 1):
        choices = list(combinations(range(wrong), left))
        hits = sum(sum(answer < rank for answer in choice) < k for choice in choices)
        assert style_report.thinned_recall(torch.tensor([rank]), torch.tensor([wrong]), left, k) == pytest.approx(
            100 * hits / len(choices)
        )


def test_thinned_recall_of_all_ranks_is_the_chance_of_the_smaller_gallery():
    # A random ranking makes every rank from 0 to 299 as likely; with 59 wrong answers left it finds 5 of 60.
    recall = style_report.thinned_recall(torch.arange(300), torch.full((300,), 299), 59, 5)
    assert recall == pytest.approx(100 * 5 / 60)


def test_gaps_compare_galleries_of_equal_size():
    """Both images of `few` and the four of `many` rank their captions by the same rule: one wrong one is better."""
    scores = torch.zeros(6, 6)
    for start, end in ((0, 2), (2, 6)):
        for row in range(start, end):
            scores[row, row] = 0.5
            scores[row, start + (row + 1 - start) % (end - start)] = 0.9
    encoded = encode(scores.tolist(), range(6), range(6))
    styles = ["few"] * 2 + ["many"] * 4
    report = StyleReport.from_encoded(model_of(), encoded, styles, torch.ones(6, dtype=torch.int64), ["few"])
    many, few = report.styles["many"], report.styles["few"]
    assert (report.equal_wrong_images, report.equal_wrong_texts) == (1, 1)
    assert few.retrieval["rsum"] == many.retrieval["rsum"] == 400
    # Of the three wrong answers of `many` one is better; it is the one that stays in a third of the cases.
    assert (few.equal_rsum, many.equal_rsum) == pytest.approx((400, 400 + 2 * 200 / 3))
    assert many.gap == pytest.approx(-400 / 3)
    report = StyleReport.from_encoded(model_of(), encoded, styles, torch.ones(6, dtype=torch.int64), ["many"])
    assert report.styles["few"].gap == pytest.approx(400 / 3)


# With a model


@pytest.fixture(scope="module")
def data() -> CaptionedImageDataset:
    rows = tiny.rows(24, repeats=8)
    return CaptionedImageDataset(rows.add_column("style", ["ink", "oil", "oil"] * 8))


def test_each_style_is_evaluated_as_a_set_of_its_own(data, monkeypatch):
    monkeypatch.setattr(style_report, "_TEXT_CHUNK", 20)
    net, both = tiny.model(), tiny.processor()
    for side in net.style_prototypes.values():
        side.stage.fill_(1)
    report = measure_styles(net, both, data, batch_size=10)
    for style, result in report.styles.items():
        rows = [row for row, name in enumerate(data.styles) if name == style]
        alone = CaptionedImageDataset(data.dataset.select(rows))
        loader = DataLoader(alone, batch_size=6, collate_fn=PicoDataCollator(both))
        expected = RetrievalEvaluator()(net, loader)
        assert {name: expected[name] for name in result.retrieval} == result.retrieval
        assert expected["chance_rsum"] == pytest.approx(result.chance_rsum)
        assert (result.seen, result.gap, result.images) == (None, None, len(rows))
    results = report.styles.values()
    for shares in ([of.gallery_share for of in results], [of.top_shares["1"] for of in results]):
        assert sum(shares) == pytest.approx(100, abs=1e-3)
    assert measure_styles(net, both, data, batch_size=10) == report


def test_each_style_is_moved_by_itself():
    net, both = tiny.model(), tiny.processor()
    data = CaptionedImageDataset(tiny.rows(75, seed=4).add_column("style", ["ink", "oil"] * 37 + ["rare"]))
    assert measure_styles(net, both, data).styles["ink"].aligned_rsum is None  # a model without moments
    net.fit_alignment([{"pixel_values": torch.randn(40, 3, tiny.SIZE, tiny.SIZE)}])
    report = measure_styles(net, both, data, batch_size=10)
    assert report.styles["rare"].aligned_rsum is None
    for style in ("ink", "oil"):
        alone = CaptionedImageDataset(data.dataset.select([row for row in range(75) if data.styles[row] == style]))
        loader = DataLoader(alone, batch_size=6, collate_fn=PicoDataCollator(both))
        aligned = align_encoded(net, RetrievalEvaluator().encode(net, loader), loader)
        assert report.styles[style].aligned_rsum == RetrievalEvaluator().retrieval_metrics(net, aligned)["rsum"]
        assert report.styles[style].aligned_rsum != report.styles[style].retrieval["rsum"]


def test_report_as_json_and_markdown(data):
    report = measure_styles(tiny.model(), tiny.processor(), data, seen_styles=["oil"])
    again = json.loads(json.dumps(report.to_dict()))
    assert again["styles"]["ink"]["gap"] == report.styles["ink"].gap
    assert list(report.styles) == ["oil", "ink"]
    lines = report.to_markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 * 4
    assert {line.count("|") for line in rows[:4]} == {15} and {line.count("|") for line in rows[4:]} == {5}
    assert rows[2].startswith("| oil | yes | 16 |") and rows[2].endswith("| – |")
    assert f"| {report.styles['ink'].gap:+.1f} |" in rows[3]


def test_small_galleries_are_pointed_out(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(style_report.logger, "warning", messages.append)
    small_report()
    assert not messages
    small_report(["ink"])
    assert "'ink' has 2 image(s)" in messages[0]


def test_wrong_inputs(data):
    net, both = tiny.model(), tiny.processor()
    with pytest.raises(ValueError, match="no column `style`.*`style_column`"):
        measure_styles(net, both, CaptionedImageDataset(tiny.rows(4)))
    alike = CaptionedImageDataset(tiny.rows(4).add_column("style", ["ink"] * 4))
    with pytest.raises(ValueError, match=r"at least two, but all 4 images have .* \['ink'\]"):
        measure_styles(net, both, alike)
    with pytest.raises(ValueError, match=r"\['neon'\], which no image has; the styles are \['ink', 'oil'\]"):
        measure_styles(net, both, data, ["ink", "neon"])
    encoded, ones = encode(SCORES, [0, 1, 0, 1], [0, 1, 0, 1]), torch.ones(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="4 images, but 3 styles and 4 numbers"):
        StyleReport.from_encoded(model_of(), encoded, STYLES[1:], ones)
    with pytest.raises(ValueError, match="adds up to 8, not to 4 texts"):
        StyleReport.from_encoded(model_of(), encoded, STYLES, 2 * ones)
    encoded.image_tokens[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        StyleReport.from_encoded(model_of(), encoded, STYLES, ones)


def test_public_names():
    assert modeling_pico.measure_styles is measure_styles
    assert {"StyleReport", "measure_styles"} <= set(dir(modeling_pico))


# Probe


def test_probe_reads_a_style_that_is_there():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8, generator=generator)
    features[:, :3] += 9 * torch.nn.functional.one_hot(labels, 3)
    assert probe_accuracy(features, labels, torch.arange(60)) == 100
    assert probe_accuracy(features, labels[torch.randperm(60, generator=generator)], torch.arange(60)) < 60


def test_probe_never_learns_from_the_meaning_it_is_asked_about():
    # Features tell the meaning, and each meaning has one style only, which two rows show.
    meanings = torch.arange(20).repeat_interleave(2)
    features, labels = torch.eye(20)[meanings], (meanings % 7) % 2
    assert probe_accuracy(features, labels, torch.arange(40), num_folds=5) > 80
    assert probe_accuracy(features, labels, meanings, num_folds=5) <= 55


def test_probe_weighs_styles_alike():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert probe_accuracy(torch.ones(100, 4), labels, torch.arange(100)) == pytest.approx(50)
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    assert 35 < probe_accuracy(noise, labels, torch.arange(100)) < 65
    # A rare style with a weak trace would never be named if the frequent one weighed more.
    labels = torch.tensor([0] * 300 + [1] * 20)
    features = torch.randn(320, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] += 2 * labels
    assert probe_accuracy(features, labels, torch.arange(320)) > 75


def test_probe_reads_what_a_linear_classifier_can():
    # Three styles in a line: a regression on indicators never names the one in the middle.
    labels = torch.arange(90) % 3
    features = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)) / 10
    features[:, 0] += labels - 1
    # The unit of the features does not matter.
    accuracies = {probe_accuracy(unit * features, labels, torch.arange(90)) for unit in (1, 0.001)}
    assert len(accuracies) == 1 and min(accuracies) > 95


def test_probe_that_is_taught_one_style_names_it():
    assert probe_accuracy(torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), num_folds=2) == 0


def test_probe_with_and_without_weights():
    generator = torch.Generator().manual_seed(0)
    count = 40
    tokens = torch.randn(count, 2, 6, generator=generator)
    tokens[:, :, 0] = (torch.arange(count) % 2 * 2.0 - 1)[:, None] * 3
    mask = torch.ones(count, 2, dtype=torch.bool)
    mask[::3, 1] = False
    tokens[::3, 1] = 1000.0  # padding must not matter
    ids = torch.arange(count) // 2
    encoded = EncodedRetrieval(tokens, mask, torch.randn(count, 1, 6), torch.ones(count, 1) > 0, ids, ids)
    styles, captions = ["ink", "oil"] * 20, torch.ones(count, dtype=torch.int64)
    kept = torch.tensor([0.0, 1, 1, 1, 1, 1])
    probe = StyleReport.from_encoded(model_of(kept), encoded, styles, captions).probe
    assert (probe.accuracy, probe.chance, probe.num_folds) == (100, 50, 5)
    assert probe.weighted_accuracy < 75
    assert "100.0% of cases" in probe.sentence() and f"{probe.weighted_accuracy:.1f}%" in probe.sentence()
    plain = StyleReport.from_encoded(model_of(), encoded, styles, captions)
    assert plain.probe.weighted_accuracy is None and "weighted ones" not in plain.to_markdown()
