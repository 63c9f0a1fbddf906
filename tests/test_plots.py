"""Pictures: the plain data behind them, what the figures hold, and that nothing is clipped or stops a run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers.integrations import TensorBoardCallback

import modeling_pico
from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.evaluation import retrieval_ranks, risk_coverage
from modeling_pico.plots import canvas, features, gather, history, matches, plot_risk_coverage, save


pytest.importorskip("matplotlib")

LOG = [
    {"loss": 4.0, "learning_rate": 1e-3, "logit_scale": 14.0, "epoch": 0.5, "step": 5},
    {"loss": math.nan, "learning_rate": 2e-3, "epoch": 1.0, "step": 10},
    {"prototype_stage": 1.0, "prototype_feedback_weight": 1.0, "epoch": 1.0, "step": 10},
    {"eval_rsum": 20.0, "eval_chance_rsum": 8.0, "eval_loss": 3.5, "epoch": 1.0, "step": 10},
    {
        "prototype_stage": 2.0,
        "prototype_feedback_weight": 0.25,
        "prototype_feedback_gain": -1.5,
        "epoch": 2.0,
        "step": 20,
    },
    {"eval_rsum": 40.0, "eval_chance_rsum": 8.0, "eval_loss": 3.0, "epoch": 2.0, "step": 20},
    {"train_runtime": 3.0, "train_loss": 3.9, "epoch": 2.0, "step": 20},
    {"eval_rsum": 99.0, "epoch": 2.0, "step": 20},
]


def texts(figure) -> list[str]:
    """Everything that is written in a figure."""
    return [item.get_text() for item in _visible_texts(figure)]


def _visible_texts(figure) -> list:
    """The texts that are drawn: tick labels beyond the limits of their axis exist as well."""
    from matplotlib.text import Text

    seen, draw = [], Text.draw

    def record(self, renderer):
        seen.append(self)
        draw(self, renderer)

    with mock.patch.object(Text, "draw", record):
        figure.canvas.draw()
    return [item for item in seen if item.get_text().strip() and item.get_visible()]


def check_readable(figure) -> None:
    """1000 pixels wide, no text beyond the edge, no panel title on another or on the figure's."""
    found = _visible_texts(figure)
    renderer = figure.canvas.get_renderer()
    edge = figure.bbox.padded(1)
    assert figure.bbox.width == 1000
    for item in found:
        box = item.get_window_extent(renderer)
        inside = edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1
        assert inside, (item.get_text(), box)
    sizes = [item.get_fontsize() for item in found]
    assert min(sizes) >= 6.5
    titles = [item for item in found if item.get_fontsize() >= canvas.LABEL]
    boxes = [item.get_window_extent(renderer).padded(-1) for item in titles]
    for index, box in enumerate(boxes):
        for other, name in zip(boxes[:index], titles, strict=False):
            assert not box.overlaps(other), (titles[index].get_text(), name.get_text())


@pytest.fixture
def dataset() -> CaptionedImageDataset:
    made = CaptionedImageDataset(tiny.rows(7, seed=1, repeats=1))
    made.styles = ["neon", "flat", "flat", None, "neon", "flat", "neon"]
    return made


@pytest.fixture
def collator(tiny_processor) -> PicoDataCollator:
    return PicoDataCollator(tiny_processor)


@pytest.fixture
def trained(tiny_model, use_prototypes):
    return lambda **options: use_prototypes(tiny_model(**options))


# Training


def test_history_of_a_training():
    read = history.read_history(LOG)
    assert read.unit == "epoch" and read.end == 2
    assert read.loss == [(0.5, 4.0)]  # the loss that is no number is left out
    assert read.learning_rate == [(0.5, 1e-3), (1.0, 2e-3)]
    assert read.logit_scale == [(0.5, 14.0)]
    assert read.rsum == {"": [(1.0, 20.0), (2.0, 40.0)]}  # without the evaluation after the training
    assert read.eval_loss == {"": [(1.0, 3.5), (2.0, 3.0)]}
    assert read.chance_rsum == 8
    first, second = read.constructions
    assert (first.x, first.stage, first.weight, first.gain) == (1, 1, 1, None)
    assert (second.x, second.stage, second.weight, second.gain) == (2, 2, 0.25, -1.5)


def test_history_of_named_sets_in_steps():
    log = [{"eval_a_b_rsum": 1.0, "eval_a_b_chance_rsum": 0.5, "step": 3}, {"eval_c_rsum": 2.0, "step": 4}]
    read = history.read_history(log)
    assert (read.unit, read.rsum, read.chance_rsum) == ("step", {"a_b": [(3, 1)], "c": [(4, 2)]}, 0.5)


def test_training_curves_show_every_panel():
    figure = history.plot_training_curves(history.read_history(LOG))
    check_readable(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split(" ")[0] for title in titles] == ["Loss", "Validation", "Learning", "Logit"]
    loss = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert loss == {"training": [4.0], "validation": [3.5, 3.0]}
    assert "rSum of a random ranking" in texts(figure)
    assert all(axes.get_xlabel() == "epoch" and axes.get_ylabel() for axes in figure.axes)


def test_stage_timeline_shades_stages_and_numbers_constructions():
    figure = history.plot_stage_timeline(history.read_history(LOG))
    check_readable(figure)
    rsum, gain, weight = figure.axes
    assert rsum.lines[-1].get_ydata().tolist() == [20, 40]
    spans = [patch.get_x() for patch in rsum.patches]
    assert spans == [0, 1, 2]
    assert [patch.get_height() for patch in weight.containers[0]] == [1, 0.25]
    assert [patch.get_height() for patch in gain.containers[0]] == [-1.5]
    shown = texts(figure)
    assert {"-1.5", "1", "0.25", "stage: plain alignment", "stage: updated prototypes"} <= set(shown)


def test_stage_timeline_before_and_without_constructions():
    log = [row for row in LOG if "prototype_stage" not in row]
    figure = history.plot_stage_timeline(history.read_history(log))
    check_readable(figure)
    assert len(figure.axes) == 1 and any("none were built" in text for text in texts(figure))
    evaluated = [{"eval_rsum": 3.0, "step": 0}]
    for plot in (history.plot_stage_timeline, history.plot_training_curves):
        with pytest.raises(canvas.NothingToDrawError, match="was logged"):
            plot(history.read_history(evaluated))


@pytest.mark.parametrize("count", [22, 120])
def test_many_constructions_and_sets(count):
    log = []
    for epoch in range(1, count):
        sets = {f"eval_{name}_rsum": float(epoch) for name in ("flickr", "a set with quite a long name", "c", "d")}
        log.append({**sets, "epoch": float(epoch), "step": epoch})
        entry = {"prototype_stage": 1.0 + (epoch > 2), "prototype_feedback_weight": 10.0**-epoch}
        log.append({**entry, "prototype_feedback_gain": (-1.0) ** epoch * epoch, "epoch": float(epoch), "step": epoch})
    figure = history.plot_stage_timeline(history.read_history(log))
    check_readable(figure)
    assert ("1e-05" in texts(figure)) == (count == 22)  # numbers only where there is room


# Scores


def test_separation_counts_ties_as_half():
    scores, matched = np.array([[3.0, 1.0], [2.0, 2.0]]), np.eye(2, dtype=bool)
    # Matched 3 and 2 against unmatched 1 and 2: three wins and one tie of four.
    assert features.separation(scores, matched) == 3.5 / 4


def test_pair_scores_figure():
    scores = np.array([[1.0, 0.0, 0.2], [0.1, 0.9, 0.0], [0.0, 0.3, 0.8]])
    pairs = features.PairScores(scores, np.eye(3, dtype=bool), 2 * scores)
    figure = features.plot_pair_scores(pairs)
    check_readable(figure)
    assert len(figure.axes) == 2
    for axes, factor in zip(figure.axes, (1, 2), strict=True):
        assert "100.0 %" in axes.get_title(loc="left")
        means = sorted(line.get_xdata()[0] for line in axes.lines)
        assert means == pytest.approx([factor * 0.1, factor * 0.9])
    bars = [patch.get_height() for patch in figure.axes[0].patches if hasattr(patch, "get_height")]
    assert sum(bars) == pytest.approx(200)  # each kind of pair sums to 100 %
    assert {"unmatched pairs (6)", "matched pairs (3)"} <= set(texts(figure))


def test_pair_scores_in_extreme_cases():
    single = features.PairScores(np.zeros((3, 3)), np.eye(3, dtype=bool))
    figure = features.plot_pair_scores(single)
    check_readable(figure)
    assert "50.0 %" in figure.axes[0].get_title(loc="left")
    with pytest.raises(canvas.NothingToDrawError, match="matched and unmatched"):
        features.plot_pair_scores(features.PairScores(np.zeros((1, 1)), np.ones((1, 1), dtype=bool)))
    with pytest.raises(ValueError, match="scores: 1 of 9 values are not finite"):
        single.unweighted[0, 0] = math.nan
        features.plot_pair_scores(single)


def test_gathered_scores_are_those_of_the_model(trained, collator, dataset):
    model = trained()
    pairs = gather.encode_pairs(model, collator, dataset, range(7))
    scores = gather.gather_pair_scores(model, pairs)
    samples = [dataset[row] for row in range(7)]
    keys = ("image", "image_id")
    batch = collator([{**{key: item[key] for key in keys}, "caption": item["captions"][0]} for item in samples])
    ids = batch.pop("image_ids")
    with torch.no_grad():
        outputs = model(**batch)
    expected = (outputs.logits_per_image / outputs.logit_scale).numpy()
    np.testing.assert_allclose(scores.weighted, expected, atol=1e-5)
    assert not np.allclose(scores.weighted, scores.unweighted)
    assert scores.matches.tolist() == (ids[:, None] == ids[None]).tolist()
    assert scores.matches.sum() == 9  # seven, and both ways of the two rows that mean the same


def test_scores_without_weights(tiny_model, collator, dataset):
    for options in ({}, {"alignment_head": "fine_grained"}, {"alignment_head": "clip_style"}):
        model = tiny_model(**options)
        scores = gather.gather_pair_scores(model, gather.encode_pairs(model, collator, dataset, [0, 1]))
        assert scores.weighted is None and scores.unweighted.shape == (2, 2)
        check_readable(features.plot_pair_scores(scores))


# Matches


def _match(words: int, grid=(14, 14), special=0, size=(224, 224)) -> matches.PatchWordMatch:
    rng = np.random.default_rng(0)
    names = ["CLS", "register 1", "register 2"][:special]
    similarity = rng.normal(size=(special + grid[0] * grid[1], words))
    image, caption = rng.random((*size, 3)), "costs $5 and $6 " * 30
    words_ = [f"word{index}" for index in range(words)]
    return matches.PatchWordMatch(image, caption, words_, similarity, grid, 1.0, names, [True] + [False] * (words - 1))


@pytest.mark.parametrize(
    ("words", "grid", "special", "size"),
    [(1, (1, 1), 0, (16, 16)), (6, (24, 24), 3, (384, 384)), (8, (2, 6), 1, (32, 96)), (7, (12, 3), 0, (96, 24))],
)
def test_matches_are_readable(words, grid, special, size):
    figure = matches.plot_matches(_match(words, grid, special, size))
    check_readable(figure)
    assert len(figure.axes) == words + 2


def test_matches_of_300_words_say_what_is_left_out():
    figure = matches.plot_matches(_match(300))
    check_readable(figure)
    assert len(figure.axes) == 25 + 2
    assert any("the first 25 of 300 tokens" in text for text in texts(figure))


def test_matches_mark_the_best_patch():
    match = _match(3, (2, 2), 1, (8, 8))
    match.similarity = np.zeros((5, 3))
    match.similarity[4, 0] = match.similarity[2, 1] = match.similarity[0, 2] = 1.0
    figure = matches.plot_matches(match)
    words, overview = figure.axes[:3], figure.axes[3]
    marked = [[patch.get_xy() for patch in axes.patches] for axes in words]
    assert marked == [[(1, 1)], [(1, 0)], []]  # (column, row): the last patch, the second, none
    titles = [axes.get_title() for axes in words]
    assert titles == ["1 word0\n1.00", "2 word1\n1.00", "3 word2\n1.00 → CLS"]
    assert words[0].title.get_style() == "italic" and words[1].title.get_style() == "normal"
    assert sorted(text.get_text() for text in overview.texts) == ["1", "2"]


def test_matches_refuse_what_does_not_fit():
    match = _match(3, (2, 2))
    match.words = match.words[:2]
    with pytest.raises(ValueError, match=r"shape \(4, 3\).* a grid of 2 x 2 patches and 2 words need \(4, 2\)"):
        matches.plot_matches(match)
    match.words = []
    with pytest.raises(canvas.NothingToDrawError, match="no words"):
        matches.plot_matches(match)


@pytest.mark.parametrize(("vision", "special"), [("vit", ["CLS"]), ("swin", [])])
def test_gathered_match_gives_the_score(trained, collator, dataset, vision, special):
    match = gather.gather_match(trained(vision=vision), collator, dataset, 2)
    assert match.weighted and match.special_tokens == special and match.grid == (2, 2)
    expected = match.similarity.max(axis=1).mean() + match.similarity.max(axis=0).mean()
    assert match.score == pytest.approx(expected, abs=1e-5)
    assert match.caption == dataset[2]["captions"][0]
    assert (match.words[0], match.words[-1]) == ("[start]", "[end]")
    assert match.special_words[0] and match.special_words[-1] and not match.special_words[1]
    assert "".join(match.words[1:-1]).replace("##", "").startswith("blue")  # "blue left"
    image = np.asarray(dataset[2]["image"]) / 255
    np.testing.assert_allclose(match.image, image, atol=1e-3)
    check_readable(matches.plot_matches(match))


def test_match_without_special_tokens(trained, collator, dataset):
    model = trained(vision_special_tokens=False, text_special_tokens=False)
    match = gather.gather_match(model, collator, dataset, 0)
    assert match.special_tokens == [] and match.similarity.shape == (4, len(match.words))
    assert not {"[start]", "[end]"} & set(match.words)


def test_pooled_vectors_and_odd_grids_have_no_matches(tiny_model, collator, dataset):
    with pytest.raises(canvas.NothingToDrawError, match="pooled vectors"):
        gather.gather_match(tiny_model(alignment_head="clip_style"), collator, dataset, 0)
    assert gather._grid(12, (32, 96)) == (2, 6)
    with pytest.raises(canvas.NothingToDrawError, match="17 image tokens are no grid of an image of 64 x 64"):
        gather._grid(17, (64, 64))


def test_words_are_named_by_their_role():
    decoded = {7: " cat", 8: ""}
    tokenizer = SimpleNamespace(
        unk_token_id=3,
        eos_token_id=3,
        bos_token_id=2,
        decode=lambda ids: decoded[ids[0]],
        convert_ids_to_tokens=lambda token: "▁",
    )
    # The end of text of CLIP is its unknown word too.
    assert [gather.word_of(tokenizer, token) for token in (2, 3, 7, 8)] == ["[start]", "[end]", "cat", "▁"]


# Semantic probability


def test_semantic_probability_sorts_columns_and_compares_styles():
    probability = np.array([[0.2, 0.9, 0.5], [0.4, 0.7, 0.5]])
    data = features.SemanticProbability({"image": probability}, ["a", "b"])
    figure = features.plot_semantic_probability(data)
    check_readable(figure)
    curve, heat = figure.axes[:2]
    assert curve.lines[0].get_ydata() == pytest.approx([0.8, 0.5, 0.3])
    np.testing.assert_allclose(heat.images[0].get_array(), [[0.1, 0, -0.1], [-0.1, 0, 0.1]], atol=1e-12)
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a", "b"]


def test_small_differences_look_small():
    probability = 0.9 + np.array([[0.0003, -0.0001], [-0.0003, 0.0001]])
    curve, heat = features.plot_semantic_probability(
        features.SemanticProbability({"image": probability}, ["a", "b"])
    ).axes[:2]
    assert curve.get_ylim() == (0, 1) and heat.images[0].get_clim() == (-0.1, 0.1)
    assert curve.get_title(loc="left").endswith("means from 0.90 to 0.90")
    assert heat.get_title(loc="left").endswith("at most 0.0003")
    log = [
        {"eval_rsum": 49.0, "epoch": 1.0, "step": 1},
        {"prototype_stage": 1.0, "prototype_feedback_gain": -0.01, "epoch": 1.0, "step": 1},
        {"eval_rsum": 52.5, "epoch": 2.0, "step": 2},
    ]
    read = history.read_history(log)
    rsum, gain, _ = history.plot_stage_timeline(read).axes
    assert rsum.get_ylim() == pytest.approx((0, 57.75)) and gain.get_ylim() == (-1, 1)
    assert [text.get_text() for text in gain.texts] == ["+0.0"]
    assert history.plot_training_curves(read).axes[0].get_ylim() == pytest.approx((0, 57.75))


@pytest.mark.parametrize("dim", [1, 512])
def test_semantic_probability_in_extreme_cases(dim):
    probability = np.random.default_rng(0).random((40, dim))
    names = [f"style {index % 20} of a set with a very long name" for index in range(40)]
    sides = {"image": probability, "text": probability}
    check_readable(features.plot_semantic_probability(features.SemanticProbability(sides, names)))
    check_readable(features.plot_semantic_probability(features.SemanticProbability(sides)))
    same = features.SemanticProbability({"image": np.full((40, dim), 0.5)}, names)
    figure = features.plot_semantic_probability(same)
    assert len(figure.axes) == 1  # styles that make no difference get no map
    check_readable(figure)


def test_gathered_probability_by_style(trained, collator, dataset):
    model = trained()
    data = gather.gather_semantic_probability(model, collator, {"validation": dataset})
    assert data.groups == ["neon"] * 3 + ["flat"] * 3  # the row without a style is left out
    pairs = gather.encode_pairs(model, collator, dataset, [0, 4, 6, 1, 2, 5])
    for side in ("image", "text"):
        tokens, mask = getattr(pairs, f"{side}_tokens"), getattr(pairs, f"{side}_mask")
        _, expected = model.alignment_head.weight(tokens, mask, side)
        np.testing.assert_allclose(data.probability[side], expected.detach(), atol=1e-5)
    two = gather.gather_semantic_probability(model, collator, {"validation": dataset, "test": dataset}, 4)
    assert two.groups == [
        f"{style} ({split})" for split in ("validation", "test") for style in ("neon", "flat") for _ in range(3)
    ]
    dataset.styles = None
    plain = gather.gather_semantic_probability(trained(), collator, {"a": dataset}, 5)
    assert plain.groups is None and set(plain.probability) == {"image", "text"} and len(plain.probability["text"]) == 5


# Prototypes


@pytest.mark.parametrize("mode", ["moments", "quantile"])
@pytest.mark.parametrize("count", [1, 64])
def test_prototypes_are_readable(mode, count):
    rng = np.random.default_rng(0)
    length = 2 if mode == "moments" else 49
    item = features.PrototypeSet(rng.normal(size=(count, length)), rng.random(count), mode, rng.integers(0, 9, count))
    figure = features.plot_prototypes({"image": item, "text": item})
    check_readable(figure)
    rates = [patch.get_height() for patch in figure.axes[2].patches]
    assert rates == pytest.approx(sorted(100 * item.style_rate, reverse=True))


def test_prototypes_of_one_point_and_without_counts():
    item = features.PrototypeSet(np.array([[0.5], [-0.5]]), np.array([0.2, 0.2]), "quantile")
    figure = features.plot_prototypes({"image": item})
    check_readable(figure)
    assert len(figure.axes) == 2
    with pytest.raises(canvas.NothingToDrawError):
        features.plot_prototypes({})


@pytest.mark.parametrize("options", [{}, {"column_mode": "quantile", "column_length": 4}])
def test_gathered_prototypes_count_the_nearest_columns(trained, collator, dataset, options):
    model = trained(**options)
    pairs = gather.encode_pairs(model, collator, dataset, range(5))
    sides = gather.gather_prototypes(model, pairs)
    assert sides["text"].mode == ("quantile" if options else "moments")
    image, held = model.style_prototypes["image"], model.style_prototypes["text"]
    columns = held.columns(pairs.text_tokens, pairs.text_mask) / held.column_scale
    distances = (columns[:, :, None] - held.prototypes / held.column_scale).square().sum(dim=-1)
    expected = torch.bincount(distances.argmin(dim=-1).flatten(), minlength=3)
    assert sides["text"].assigned.tolist() == expected.tolist()
    assert sides["image"].assigned.sum() == 5 * 12
    np.testing.assert_array_equal(sides["image"].prototypes, image.prototypes)
    np.testing.assert_array_equal(sides["image"].style_rate, image.style_rate)
    check_readable(features.plot_prototypes(sides))


def test_no_prototypes_nothing_to_draw(tiny_model, collator, dataset):
    for model in (tiny_model(), tiny_model(alignment_head="fine_grained")):
        with pytest.raises(canvas.NothingToDrawError, match="none has been built yet"):
            gather.gather_prototypes(model)
        with pytest.raises(canvas.NothingToDrawError, match="none has been built yet"):
            gather.gather_semantic_probability(model, collator, {"validation": dataset})


# Risk and coverage


@pytest.mark.parametrize("ranks", [[0, 3, 0, 1, 0, 0], [0] * 6, [1] * 6, [0], [2]], ids=str)
def test_risk_coverage_is_readable(ranks):
    curve = risk_coverage(torch.tensor(ranks), torch.arange(len(ranks)) / 10)
    figure = plot_risk_coverage({"Image to text": curve, "Text to image": curve})
    check_readable(figure)
    written = texts(figure)
    areas = f"AURC {curve.aurc:.1f} (by lot {curve.chance_aurc:.1f}, best {curve.best_aurc:.1f})"
    assert any(text.startswith(f"Among {len(ranks)} pairs, are the queries") for text in written)
    assert f"Image to text: {areas}" in written and f"Text to image: {areas}" in written
    for axes in figure.axes:
        np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([curve.coverage, curve.recall], axis=1))
    with pytest.raises(canvas.NothingToDrawError):
        plot_risk_coverage({})


def test_gathered_risk_coverage_is_that_of_the_model(tiny_model, collator, dataset):
    model = tiny_model(num_uncertainty_prototypes=3)
    pairs = gather.encode_pairs(model, collator, dataset, range(7))
    scores = torch.from_numpy(gather.gather_pair_scores(model, pairs).unweighted)
    ranks = retrieval_ranks(scores, pairs.ids, pairs.ids)
    with torch.no_grad():
        uncertainty = (
            model.uncertainty(pairs.image_tokens, pairs.image_mask, "image"),
            model.uncertainty(pairs.text_tokens, pairs.text_mask, "text"),
        )
    curves = gather.gather_risk_coverage(model, pairs)
    for curve, of_queries, queries in zip(curves.values(), ranks, uncertainty, strict=True):
        assert torch.equal(curve.recall, risk_coverage(of_queries, queries).recall)
    with pytest.raises(canvas.NothingToDrawError, match="has no uncertainty"):
        gather.gather_risk_coverage(tiny_model(), pairs)


# Saving

TRAINING = {"training_curves", "stage_timeline"}
MODEL = {"pair_scores", "prototypes", "semantic_probability"}


def names(paths: list[str]) -> set[str]:
    return {Path(path).stem for path in paths}


@pytest.fixture
def messages(monkeypatch) -> dict[str, list[str]]:
    seen = {"info": [], "warning": []}
    for level, found in seen.items():
        monkeypatch.setattr(save.logger, level, found.append)
    return seen


def test_all_pictures_of_a_model(trained, collator, dataset, tmp_path, messages, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    paths = modeling_pico.save_plots(
        tmp_path / "new",
        model=trained(),
        collator=collator,
        splits={"validation": dataset},
        num_matches=1,
    )
    assert names(paths) == MODEL | {"matches_0"} and not messages["warning"]
    assert "Pictures: 100%" in capfd.readouterr().err
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 1000 and image.format == "PNG"
    assert "matplotlib.pyplot" not in sys.modules


def test_baselines_get_what_makes_sense(tiny_model, collator, dataset, tmp_path, messages):
    subjects = {"collator": collator, "splits": {"a": dataset}, "log_history": LOG, "num_matches": 1}
    fine = save.save_plots(tmp_path, model=tiny_model(alignment_head="fine_grained"), **subjects)
    assert names(fine) == {"training_curves", "pair_scores", "matches_0"}
    clip_model = tiny_model(alignment_head="clip_style", num_uncertainty_prototypes=3)
    clip = save.save_plots(tmp_path, model=clip_model, **subjects)
    assert names(clip) == {"training_curves", "pair_scores", "risk_coverage"}
    assert not messages["warning"] and any("matches_0 is left out" in message for message in messages["info"])


def test_a_failing_picture_warns_and_the_others_are_drawn(trained, collator, dataset, tmp_path, messages):
    model = trained()
    model.style_prototypes["image"].prototypes.fill_(math.nan)
    paths = save.save_plots(tmp_path, model=model, collator=collator, splits={"a": dataset}, num_matches=0)
    assert "prototypes" not in names(paths)
    (message,) = [message for message in messages["warning"] if "prototypes" in message.split(":")[0]]
    assert "ValueError: prototypes: 6 of 6 values are not finite" in message
    with pytest.raises(ValueError, match="need `collator` and at least one data set"):
        save.save_plots(tmp_path, model=model)


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(canvas.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install modeling-pico\[plots\]"):
        save.save_plots(tmp_path, log_history=LOG)
    with pytest.raises(ImportError, match=r"pip install modeling-pico\[plots\]"):
        features.plot_pair_scores(features.PairScores(np.zeros((2, 2)), np.eye(2, dtype=bool)))


class Recorder(TensorBoardCallback):
    """A callback whose writer keeps the pictures; as in a run, it is opened when something is logged."""

    def __init__(self):
        self.tb_writer, self.pictures = None, {}

    def _init_summary_writer(self, args):
        self.tb_writer = SimpleNamespace(
            add_image=lambda tag, pixels, step, dataformats: self.pictures.update({tag: (pixels, step, dataformats)}),
            add_scalar=lambda *args: None,
            add_text=lambda *args: None,
            flush=lambda: None,
            close=lambda: None,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self._init_summary_writer(args)


def test_pictures_of_a_run_are_saved_and_reported(tmp_path, monkeypatch):
    recorder = Recorder()
    data = CaptionedImageDataset(tiny.rows(9, seed=1))
    made = tiny.trainer(tmp_path, eval_data=data, callbacks=[recorder], num_train_epochs=2, logging_steps=3)
    made.train()
    assert recorder.tb_writer is None  # closed at the end of the training
    splits = {"train": made.train_dataset, "validation": data}
    drawn = []
    monkeypatch.setattr(save, "gather_match", lambda model, collator, dataset, row: drawn.append((dataset, row)))
    for name in ("plot_matches", "plot_prototypes", "plot_semantic_probability", "plot_pair_scores"):
        monkeypatch.setattr(save, name, lambda data: canvas.new_figure(1, "stands for a slower one"))
    paths = save.save_run_plots(made, splits, main="validation")
    assert drawn == [(data, row) for row in (0, 2, 4, 6)]
    assert names(paths) == TRAINING | MODEL | {f"matches_{row}" for row in (0, 2, 4, 6)}
    assert {str(Path(path).parent) for path in paths} == {str(tmp_path / "plots")}
    assert set(recorder.pictures) == {f"plots/{name}" for name in names(paths)}
    pixels, step, layout = recorder.pictures["plots/training_curves"]
    assert pixels.shape[1:] == (1000, 3) and step == 6 and layout == "HWC"


def test_nothing_stops_a_run(tmp_path, monkeypatch, messages):
    made = tiny.trainer(tmp_path)
    monkeypatch.setattr(save, "save_plots", lambda *args, **kwargs: 1 / 0)
    assert save.save_run_plots(made, {}) == []
    assert messages["warning"] == ["No pictures: ZeroDivisionError: division by zero"]
    monkeypatch.setattr(made, "is_world_process_zero", lambda: False)
    assert save.save_run_plots(made, {}) == [] and len(messages["warning"]) == 1


def test_spread_rows():
    assert gather.spread_rows(10, 4) == [0, 2, 5, 7]
    assert gather.spread_rows(3, 10) == [0, 1, 2] and gather.spread_rows(0, 3) == []
