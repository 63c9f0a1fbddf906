"""Which checkpoint is the best: by rsum, unless another metric is named."""

from __future__ import annotations

import logging

import pytest
from tiny import CountedDataset, arguments, model, rows, trainer
from transformers import EarlyStoppingCallback

from modeling_pico.evaluation import RetrievalEvaluator


# The whole course of three epochs: each metric has its best value elsewhere.
COURSE = [
    {"rsum": 100.0, "loss": 3.0, "image_to_text_median_rank": 1.0},
    {"rsum": 300.0, "loss": 2.0, "image_to_text_median_rank": 2.0},
    {"rsum": 200.0, "loss": 1.0, "image_to_text_median_rank": 3.0},
]
SHORT = {"num_train_epochs": 3, "feedback": "constant"}


@pytest.fixture
def course(monkeypatch):
    """Evaluations that report the course above instead of what they measure."""
    values = iter(COURSE * 4)
    monkeypatch.setattr(RetrievalEvaluator, "metrics", lambda *args: dict(next(values)))


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({"load_best_model_at_end": True}, 6),
        ({"save_strategy": "best"}, 6),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss"}, 9),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_rsum"}, 6),
        ({"load_best_model_at_end": True, "metric_for_best_model": "image_to_text_median_rank"}, 3),
    ],
)
def test_best_checkpoint(tmp_path, course, options, best):
    made = trainer(tmp_path, **SHORT, **options)
    made.train()
    assert made.state.best_global_step == best
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


@pytest.mark.parametrize("metric", [None, "rsum", "b_rsum"])
def test_of_several_validation_sets_the_first_counts(tmp_path, monkeypatch, metric):
    values = iter([{"rsum": rsum, "loss": 1.0} for rsum in (1.0, 3.0, 2.0, 2.0, 1.0, 1.0)])  # a, b, a, b, ...
    monkeypatch.setattr(RetrievalEvaluator, "metrics", lambda *args: dict(next(values)))
    data = {name: CountedDataset(rows(9, seed=1)) for name in ("a", "b")}
    options = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    made = trainer(tmp_path, eval_data=data, **SHORT, **options)
    made.train()
    assert made.state.best_global_step == (3 if metric == "b_rsum" else 6)
    assert made.args.metric_for_best_model == (metric if metric == "b_rsum" else "a_rsum")


def test_early_stopping_alone_follows_rsum(tmp_path, course):
    made = trainer(
        tmp_path, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)], **{**SHORT, "num_train_epochs": 6}
    )
    made.train()
    # The third evaluation has a lower rsum and a lower loss than the second.
    assert made.state.global_step == 9 and made.args.metric_for_best_model == "rsum"


def test_a_resumed_run_compares_with_its_own_past(tmp_path, course):
    options = {"load_best_model_at_end": True}
    trainer(tmp_path, **SHORT, **options).train()
    resumed = trainer(tmp_path, **{**SHORT, "num_train_epochs": 4}, **options)
    resumed.train(resume_from_checkpoint=True)  # its evaluation reports an rsum of 100
    assert resumed.state.best_global_step == 6 and resumed.state.best_metric == 300


def test_a_resumed_run_does_not_compare_one_metric_with_another(tmp_path, course, caplog):
    trainer(tmp_path, **SHORT, load_best_model_at_end=True).train()
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    resumed = trainer(tmp_path, **{**SHORT, "num_train_epochs": 4}, **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == 12 and resumed.state.best_metric == 3
    assert "300, is not one of 'loss'" in caplog.text


def test_a_metric_that_training_cannot_change_is_refused(tmp_path):
    net = model(method="fine_grained", uncertainty_config={"num_prototypes": 4})
    net.train_uncertainty_only()
    options = {**SHORT, "num_train_epochs": 1, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="'rsum' cannot tell .* Choose 'image_to_text_aurc'"):
        trainer(tmp_path, net=net, **options).train()
    made = trainer(tmp_path, net=net, **options, metric_for_best_model="text_to_image_aurc")
    made.train()
    assert made.args.greater_is_better is False and made.state.best_global_step == 3


@pytest.mark.parametrize(
    ("metric", "mode"), [(None, "max"), ("loss", "min"), ("rsum", "max"), ("text_to_image_aurc", "min")]
)
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_know_which_way_is_up(tmp_path, schedule, metric, mode):
    args = arguments(tmp_path, lr_scheduler_type=schedule, metric_for_best_model=metric)
    assert args.metric_for_best_model == (metric or "rsum") and args.lr_scheduler_kwargs == {"mode": mode}
    kwargs = {"mode": "min", "patience": 3}
    assert arguments(tmp_path, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs).lr_scheduler_kwargs == kwargs


def test_no_metric_is_chosen_where_none_is_needed(tmp_path):
    assert arguments(tmp_path).metric_for_best_model is None


def test_less_is_better_of_no_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`greater_is_better=False` without `metric_for_best_model`"):
        arguments(tmp_path, load_best_model_at_end=True, greater_is_better=False)
