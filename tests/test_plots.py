"""Pictures: what the figures hold, that nothing is clipped, and that none that says nothing is drawn."""

from __future__ import annotations

import copy
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
from modeling_pico import plots
from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.evaluation import RetrievalUncertainty, retrieval_ranks, risk_coverage


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
    titles = [item for item in found if item.get_fontsize() >= plots._LABEL]
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


def test_training_curves_show_every_panel():
    figure = plots.plot_training_curves(LOG)
    check_readable(figure)
    loss, rsum, rate, gain, weight = figure.axes  # the logit scale was logged once and draws no line
    assert [axes.get_title(loc="left").split(" ")[0] for axes in figure.axes] == [
        "Loss", "Validation", "Learning", "Gain", "Feedback"
    ]  # fmt: skip
    curves = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    # Without the loss that is no number.
    assert curves == {"training": [[0.5, 4]], "validation": [[1, 3.5], [2, 3]]}
    # Without the evaluation after the training; from zero on, beside chance.
    assert [list(line.get_ydata()) for line in rsum.lines] == [[20, 40], [8, 8]]
    assert rsum.get_ylim() == pytest.approx((0, 44))
    assert "rSum of a random ranking" in texts(figure)
    assert all(axes.get_xlabel() == "epoch" and axes.get_ylabel() for axes in figure.axes)
    assert [patch.get_x() for patch in rsum.patches] == [0, 1, 2]
    assert {"stage: plain alignment", "stage: first prototypes", "stage: updated prototypes"} <= set(texts(figure))
    assert [patch.get_height() for patch in weight.containers[0]] == [1, 0.25]
    assert [patch.get_height() for patch in gain.containers[0]] == [-1.5]
    assert {"-1.5", "1", "0.25"} <= set(texts(figure))


def test_training_curves_of_named_sets_in_steps_without_prototypes():
    log = [
        {"eval_a_b_rsum": 1.0 + step, "eval_a_b_chance_rsum": 0.5, "eval_c_rsum": 2.0, "step": step} for step in (3, 4)
    ]
    figure = plots.plot_training_curves(log)
    (axes,) = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines if "rSum" not in line.get_label()} == {
        "validation: a_b": [[3, 4], [4, 5]],
        "validation: c": [[3, 2], [4, 2]],
    }
    assert axes.get_xlabel() == "step" and not axes.patches


def test_one_value_is_no_curve():
    for log in ([{"eval_rsum": 3.0, "step": 0}], [{"loss": math.nan, "epoch": 1.0}], [{"train_runtime": 3.0}]):
        with pytest.raises(plots.NothingToDrawError, match="no training was logged"):
            plots.plot_training_curves(log)


@pytest.mark.parametrize("count", [8, 120])
def test_many_constructions_and_sets(count):
    log = []
    for epoch in range(1, count):
        sets = {f"eval_{name}_rsum": float(epoch) for name in ("flickr", "a set of $5 with a long name", "c", "d")}
        log.append({**sets, "epoch": float(epoch), "step": epoch})
        entry = {"prototype_stage": 1.0 + (epoch > 2), "prototype_feedback_weight": 10.0**-epoch}
        log.append({**entry, "prototype_feedback_gain": (-1.0) ** epoch * epoch, "epoch": float(epoch), "step": epoch})
    figure = plots.plot_training_curves(log)
    check_readable(figure)
    assert ("1e-05" in texts(figure)) == (count == 8)  # numbers only where there is room


def test_small_gains_look_small():
    log = [{"eval_rsum": 49.0, "epoch": 1.0}, {"eval_rsum": 52.5, "epoch": 2.0}]
    log.append({"prototype_stage": 1.0, "prototype_feedback_gain": -0.01, "epoch": 2.0})
    gain = plots.plot_training_curves(log).axes[1]
    assert gain.get_ylim() == pytest.approx((-1.4, 1.3))
    assert [text.get_text() for text in gain.texts] == ["+0.0"]


# Scores


def test_pair_scores_figure():
    scores = torch.tensor([[1.0, 0.0, 0.2], [0.1, 0.9, 0.0], [0.0, 0.3, 0.8]])
    figure = plots.plot_pair_scores({"Plain": scores, "Twice": 2 * scores}, torch.eye(3))
    check_readable(figure)
    for axes, factor in zip(figure.axes, (1, 2), strict=True):
        assert "100.0 %" in axes.get_title(loc="left")
        means = sorted(line.get_xdata()[0] for line in axes.lines)
        assert means == pytest.approx([factor * 0.1, factor * 0.9])
    bars = [patch.get_height() for patch in figure.axes[0].patches if hasattr(patch, "get_height")]
    assert sum(bars) == pytest.approx(200)  # each kind of pair sums to 100 %
    assert {"unmatched pairs (6)", "matched pairs (3)"} <= set(texts(figure))


def test_pair_scores_in_extreme_cases():
    scores = torch.zeros(3, 3)
    figure = plots.plot_pair_scores({"Scores": scores}, torch.eye(3))
    check_readable(figure)
    assert "50.0 %" in figure.axes[0].get_title(loc="left")  # a tie counts half
    with pytest.raises(plots.NothingToDrawError, match="matched and unmatched"):
        plots.plot_pair_scores({"Scores": torch.zeros(1, 1)}, torch.ones(1, 1))
    scores[0, 0] = math.nan
    with pytest.raises(ValueError, match="scores: 1 of 9 values are not finite"):
        plots.plot_pair_scores({"Scores": scores}, torch.eye(3))


def given(monkeypatch, name: str) -> list:
    """What the picture of this name is drawn from; nothing is drawn."""
    calls: list = []
    monkeypatch.setattr(plots, name, lambda *args, **options: calls.append((*args, options) if options else args))
    return calls


@torch.no_grad()
def test_scores_are_those_of_the_model(trained, collator, dataset, monkeypatch):
    model, calls = trained(), given(monkeypatch, "plot_pair_scores")
    plots._draw_pair_scores(model, plots._encode(model, collator, dataset, range(7)))
    ((panels, matches),) = calls
    samples = [{**dataset[row], "caption": dataset[row]["captions"][0]} for row in range(7)]
    batch = collator([{key: sample[key] for key in ("image", "image_id", "caption")} for sample in samples])
    ids = batch.pop("image_ids")
    outputs = model(**batch)
    expected = outputs.logits_per_image / outputs.logit_scale
    torch.testing.assert_close(panels["With semantic weights"], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(panels["Without weights"], expected)
    assert torch.equal(matches, ids[:, None] == ids[None])
    assert matches.sum() == 9  # seven, and both ways of the two rows that mean the same


@pytest.mark.parametrize("options", [{}, {"alignment_head": "fine_grained"}, {"alignment_head": "clip_style"}])
def test_scores_without_weights(tiny_model, collator, dataset, options):
    model = tiny_model(**options)
    figure = plots._draw_pair_scores(model, plots._encode(model, collator, dataset, [0, 1]))
    check_readable(figure)
    assert len(figure.axes) == 1


@pytest.mark.parametrize("ranks", [[0, 3, 0, 1, 0, 0], [0, 1]], ids=str)
def test_risk_coverage_is_readable(ranks):
    curve = risk_coverage(torch.tensor(ranks), torch.arange(len(ranks)) / 10)
    figure = plots.plot_risk_coverage({"image_to_text": curve, "text_to_image": curve})
    check_readable(figure)
    written = texts(figure)
    areas = f"AURC {curve.aurc:.1f} (random {curve.chance_aurc:.1f}, best {curve.best_aurc:.1f})"
    assert any(text.endswith(f"({len(ranks)} images and texts)") for text in written)
    assert f"Image to text: {areas}" in written and f"Text to image: {areas}" in written
    for axes in figure.axes:
        np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([curve.coverage, curve.recall], axis=1))


@pytest.mark.parametrize("ranks", [[0] * 6, [1] * 6, [0]], ids=str)
def test_where_every_order_is_alike_there_is_no_risk_coverage(ranks):
    with pytest.raises(plots.NothingToDrawError, match="every order"):
        plots.plot_risk_coverage({"image_to_text": risk_coverage(torch.tensor(ranks), torch.rand(len(ranks)))})


def test_risk_coverage_is_that_of_the_model(tiny_model, collator, dataset, monkeypatch):
    model, calls = tiny_model(uncertainty_config={"num_prototypes": 3}), given(monkeypatch, "plot_risk_coverage")
    encoded = plots._encode(model, collator, dataset, range(7))
    plots._draw_risk_coverage(model, encoded)
    ((curves,),) = calls
    ranks = retrieval_ranks(
        modeling_pico.RetrievalEvaluator().score(model, encoded), encoded.image_ids, encoded.text_ids
    )
    measured = RetrievalUncertainty.measure(model, encoded)
    for curve, of_queries, queries in zip(curves.values(), ranks, (measured.images, measured.texts), strict=True):
        assert torch.equal(curve.recall, risk_coverage(of_queries, queries).recall)
    with pytest.raises(plots.NothingToDrawError, match="has no uncertainty"):
        plots._draw_risk_coverage(tiny_model(), encoded)


# Matches


@pytest.mark.parametrize(
    ("words", "grid", "special", "size"),
    [(1, (1, 1), 0, (16, 16)), (6, (24, 24), 3, (384, 384)), (8, (2, 6), 1, (32, 96)), (7, (12, 3), 0, (96, 24))],
)
def test_matches_are_readable(words, grid, special, size):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(special + grid[0] * grid[1], words, generator=generator)
    image, names = torch.rand(3, *size, generator=generator), [f"word{index}" for index in range(words)]
    figure = plots.plot_matches(image, names, similarity, grid, caption="costs $5 and $6 " * 30, score=1.0)
    check_readable(figure)
    assert sum(bool(axes.images) for axes in figure.axes) == words + 1


def test_matches_of_300_words_say_what_is_left_out():
    image, words = torch.rand(3, 8, 8), [str(index) for index in range(300)]
    figure = plots.plot_matches(image, words, torch.rand(4, 300), (2, 2), caption="", score=1.0)
    check_readable(figure)
    assert sum(bool(axes.images) for axes in figure.axes) == 25 + 1
    assert any("the first 25 of 300 tokens" in text for text in texts(figure))
    with pytest.raises(plots.NothingToDrawError, match="no words"):
        plots.plot_matches(image, [], torch.rand(4, 0), (2, 2), caption="", score=1.0)


def test_matches_mark_the_best_patch():
    similarity = torch.zeros(5, 3)
    similarity[4, 0] = similarity[2, 1] = similarity[0, 2] = 1.0
    figure = plots.plot_matches(torch.rand(3, 8, 8), ["a", "b", "c"], similarity, (2, 2), caption="", score=1.0)
    panels = [axes for axes in figure.axes if axes.images]
    words = [axes for axes in panels if axes.get_title()]
    marked = [[patch.get_xy() for patch in axes.patches] for axes in words]
    assert marked == [[(1, 1)], [(1, 0)], []]  # (column, row): the last patch, the second, none
    assert [axes.get_title() for axes in words] == ["1 a\n1.00", "2 b\n1.00", "3 c\n1.00 (no patch)"]
    (overview,) = (axes for axes in panels if axes not in words)
    assert sorted(text.get_text() for text in overview.texts) == ["1", "2"]


@pytest.mark.parametrize(("vision", "special"), [("vit", 1), ("swin", 0)])
def test_a_match_gives_the_score(trained, collator, dataset, vision, special, monkeypatch):
    calls = given(monkeypatch, "plot_matches")
    plots._draw_matches(trained(vision=vision), collator, dataset, 2)
    ((image, words, similarity, grid, options),) = calls
    assert grid == (2, 2) and similarity.shape == (4 + special, len(words))
    expected = similarity.amax(dim=1).mean() + similarity.amax(dim=0).mean()
    assert options["score"] == pytest.approx(float(expected), abs=1e-5)
    assert options["caption"] == dataset[2]["captions"][0]
    assert (words[0], words[-1]) == ("[CLS]", "[SEP]")
    assert "".join(words[1:-1]).replace("##", "").startswith("blue")  # "blue left"
    np.testing.assert_allclose(image.permute(1, 2, 0), np.asarray(dataset[2]["image"]) / 255, atol=1e-3)


def test_match_without_special_tokens(trained, collator, dataset, monkeypatch):
    calls = given(monkeypatch, "plot_matches")
    plots._draw_matches(trained(vision_special_tokens=False, text_special_tokens=False), collator, dataset, 0)
    ((_, words, similarity, grid, _),) = calls
    assert grid == (2, 2) and similarity.shape == (4, len(words)) and not {"[CLS]", "[SEP]"} & set(words)


def test_pooled_vectors_and_odd_grids_have_no_matches(tiny_model, collator, dataset):
    with pytest.raises(plots.NothingToDrawError, match="pooled vectors"):
        plots._draw_matches(tiny_model(method="clip_style"), collator, dataset, 0)
    assert plots.patch_grid(tiny_model(), 13, (32, 96)) == (2, 6)
    with pytest.raises(plots.NothingToDrawError, match="17 image tokens are no grid of an image of 64 x 64"):
        plots.patch_grid(tiny_model(), 18, (64, 64))


# Semantic probability


def test_semantic_probability_sorts_columns_and_compares_styles():
    probability = torch.tensor([[0.2, 0.9, 0.5], [0.4, 0.7, 0.5]])
    figure = plots.plot_semantic_probability({"image": probability}, ["a", "b"])
    check_readable(figure)
    curve, heat = figure.axes[:2]
    assert curve.lines[0].get_ydata() == pytest.approx([0.8, 0.5, 0.3])
    np.testing.assert_allclose(heat.images[0].get_array(), [[0.1, 0, -0.1], [-0.1, 0, 0.1]], atol=1e-6)
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a", "b"]


def test_small_differences_look_small():
    probability = 0.9 + torch.tensor([[0.0003, -0.0001], [-0.0003, 0.0001]])
    curve, heat = plots.plot_semantic_probability({"image": probability}, ["a", "b"]).axes[:2]
    assert curve.get_ylim() == (0, 1) and heat.images[0].get_clim() == (-0.1, 0.1)
    assert curve.get_title(loc="left").endswith("means from 0.90 to 0.90")
    assert heat.get_title(loc="left").endswith("at most 0.0003")


@pytest.mark.parametrize("dim", [1, 512])
def test_semantic_probability_in_extreme_cases(dim):
    probability = torch.rand(40, dim, generator=torch.Generator().manual_seed(0))
    names = [f"style {index % 20} of a set with a $very$ long name" for index in range(40)]
    sides = {"image": probability, "text": probability}
    check_readable(plots.plot_semantic_probability(sides, names))
    check_readable(plots.plot_semantic_probability(sides))
    figure = plots.plot_semantic_probability({"image": torch.full((40, dim), 0.5)}, names)
    assert len(figure.axes) == 1  # styles that make no difference get no map
    check_readable(figure)


def test_probability_by_style(trained, collator, dataset, monkeypatch):
    model, calls = trained(), given(monkeypatch, "plot_semantic_probability")
    plots._draw_semantic_probability(model, collator, {"validation": dataset, "test": copy.copy(dataset)}, 200)
    ((probability, styles),) = calls
    # The row without a style is left out, and each style comes from the first split that shows it.
    assert styles == ["neon"] * 3 + ["flat"] * 3
    encoded = plots._encode(model, collator, dataset, [0, 4, 6, 1, 2, 5])
    for side in ("image", "text"):
        tokens, mask = getattr(encoded, f"{side}_tokens"), getattr(encoded, f"{side}_mask")
        torch.testing.assert_close(probability[side], model.alignment_head.weight(tokens, mask, side)[1].detach())
    dataset.styles = None
    plots._draw_semantic_probability(model, collator, {"a": dataset}, 5)
    assert calls[1][1] is None and len(calls[1][0]["text"]) == 5


# Prototypes


@pytest.mark.parametrize("count", [1, 64])
def test_prototypes_are_readable(count):
    generator = torch.Generator().manual_seed(0)
    side = {
        name: torch.rand(count, generator=generator) for name in ("center", "low", "high", "style_rate", "columns")
    }
    figure = plots.plot_prototypes({"image": side, "text": side})
    check_readable(figure)
    rates = [patch.get_height() for patch in figure.axes[2].patches]
    assert rates == pytest.approx(sorted((100 * side["style_rate"]).tolist(), reverse=True))


@pytest.mark.parametrize("options", [{}, {"column_mode": "quantile", "column_length": 4}])
def test_prototypes_count_the_nearest_columns(trained, collator, dataset, options, monkeypatch):
    model, calls = trained(**options), given(monkeypatch, "plot_prototypes")
    encoded = plots._encode(model, collator, dataset, range(5))
    plots._draw_prototypes(model, encoded)
    ((sides,),) = calls
    image, text = model.style_prototypes["image"], model.style_prototypes["text"]
    columns = text.columns(encoded.text_tokens, encoded.text_mask) / text.column_scale
    distances = (columns[:, :, None] - text.prototypes / text.column_scale).square().sum(dim=-1)
    expected = torch.bincount(distances.argmin(dim=-1).flatten(), minlength=3)
    assert sides["text"]["columns"].tolist() == expected.tolist()
    assert sides["image"]["columns"].sum() == 5 * 12
    if not options:
        mean, spread = image.prototypes.T
        torch.testing.assert_close(sides["image"]["center"], mean)
        torch.testing.assert_close(sides["image"]["high"], mean + spread)
    assert (sides["image"]["low"] <= sides["image"]["high"]).all()
    assert torch.equal(sides["image"]["style_rate"], image.style_rate)


def test_no_prototypes_nothing_to_draw(tiny_model, collator, dataset):
    for model in (tiny_model(), tiny_model(method="fine_grained")):
        encoded = plots._encode(model, collator, dataset, [0])
        with pytest.raises(plots.NothingToDrawError, match="none has been built yet"):
            plots._draw_prototypes(model, encoded)
        with pytest.raises(plots.NothingToDrawError, match="no semantic probability"):
            plots._draw_semantic_probability(model, collator, {"validation": dataset}, 10)


# Saving

TRAINING = {"training_curves"}
MODEL = {"pair_scores", "prototypes", "semantic_probability"}


def names(paths: list[str]) -> set[str]:
    return {Path(path).stem for path in paths}


@pytest.fixture
def messages(monkeypatch) -> dict[str, list[str]]:
    seen = {"info": [], "warning": []}
    for level, found in seen.items():
        monkeypatch.setattr(plots.logger, level, found.append)
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
    fine = plots.save_plots(tmp_path, model=tiny_model(method="fine_grained"), **subjects)
    assert names(fine) == {"training_curves", "pair_scores", "matches_0"}
    clip_model = tiny_model(method="clip_style", uncertainty_config={"num_prototypes": 3})
    clip = plots.save_plots(tmp_path, model=clip_model, **subjects)
    assert names(clip) == {"training_curves", "pair_scores", "risk_coverage"}
    assert not messages["warning"] and any("matches_0 is left out" in message for message in messages["info"])


def test_a_failing_picture_warns_and_the_others_are_drawn(trained, collator, dataset, tmp_path, messages):
    model = trained()
    model.style_prototypes["image"].prototypes.fill_(math.nan)
    paths = plots.save_plots(tmp_path, model=model, collator=collator, splits={"a": dataset}, num_matches=0)
    assert "prototypes" not in names(paths)
    (message,) = [message for message in messages["warning"] if "prototypes" in message.split(":")[0]]
    assert "ValueError: prototypes, center: 3 of 3 values are not finite" in message
    with pytest.raises(ValueError, match="need `collator` and at least one data set"):
        plots.save_plots(tmp_path, model=model)


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install modeling-pico\[plots\]"):
        plots.save_plots(tmp_path, log_history=LOG)
    with pytest.raises(ImportError, match=r"pip install modeling-pico\[plots\]"):
        plots.plot_pair_scores({"Scores": torch.zeros(2, 2)}, torch.eye(2))


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

    def stand_in(*args) -> object:
        drawn.append(args[2:])
        return plots._new_figure(1, "stands for a slower one")

    for name in ("_draw_matches", "_draw_prototypes", "_draw_semantic_probability", "_draw_pair_scores"):
        monkeypatch.setattr(plots, name, stand_in)
    paths = plots.save_run_plots(made, splits, main="validation")
    assert drawn[-4:] == [(data, row) for row in (0, 2, 4, 6)]
    assert names(paths) == TRAINING | MODEL | {f"matches_{row}" for row in (0, 2, 4, 6)}
    assert {str(Path(path).parent) for path in paths} == {str(tmp_path / "plots")}
    assert set(recorder.pictures) == {f"plots/{name}" for name in names(paths)}
    pixels, step, layout = recorder.pictures["plots/training_curves"]
    assert pixels.shape[1:] == (1000, 3) and step == 6 and layout == "HWC"


def test_only_the_main_process_draws(tmp_path, monkeypatch):
    made = tiny.trainer(tmp_path)
    monkeypatch.setattr(made, "is_world_process_zero", lambda: False)
    assert plots.save_run_plots(made, {}) == [] and not (tmp_path / "plots").exists()


def test_spread_rows():
    assert plots._spread(10, 4) == [0, 2, 5, 7]
    assert plots._spread(3, 10) == [0, 1, 2] and plots._spread(0, 3) == []
