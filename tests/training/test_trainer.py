from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    CountedDataset,
    arguments,
    assert_same_state,
    model,
    processor,
    prototype_log,
    rows,
    trainer,
    whole_log,
)
from torch.utils.data import ConcatDataset, Subset
from transformers import ResNetConfig, TrainerCallback

from modeling_pico import PicoConfig, PicoModel, PicoProcessor
from modeling_pico.data import CaptionedImageDataset, caption_code
from modeling_pico.model.backbones_pico import batch_norm_layers
from modeling_pico.training import PicoTrainer
from modeling_pico.training.callbacks import MAX_LOGIT_SCALE


PURITY = {"style_probability": "purity"}


class OnStep(TrainerCallback):
    """Calls a function before each optimizer step."""

    def __init__(self, function):
        self.function = function

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.function(state.global_step, model)


# Construction


def test_construction_events_happen_when_configured_and_are_logged(tmp_path):
    made = trainer(tmp_path, num_train_epochs=6, model_options=PURITY, save_strategy="no")
    made.train()
    log = prototype_log(made)
    assert [(entry["step"], entry["epoch"]) for entry in log] == [(3, 1), (9, 3), (12, 4), (15, 5)]
    assert [entry["prototype_stage"] for entry in log] == [1, 2, 2, 2]
    names = {"prototype_stage", "prototype_feedback_gain", "prototype_feedback_weight"}
    assert all(
        set(entry) == names | {"image_prototype_movement", "text_prototype_movement", "epoch", "step"} for entry in log
    )
    assert log[0]["prototype_feedback_weight"] == 1
    # w_j = exp(g_j / kappa) / sum over the constructions so far, with kappa = 30 here.
    shares = [math.exp(entry["prototype_feedback_gain"] / 30) for entry in log]
    for count in range(1, 5):
        weight = log[count - 1]["prototype_feedback_weight"]
        assert weight == pytest.approx(shares[count - 1] / sum(shares[:count]), rel=1e-5)
    assert made.construction.num_constructions == 4
    assert [int(side.stage) for side in made.model.style_prototypes.values()] == [2, 2]


@pytest.mark.parametrize("strategy", ["epoch", "steps", "no"])
@pytest.mark.parametrize("feedback", ["counterfactual", "constant"])
def test_constructions_fall_on_the_ends_of_epochs(tmp_path, strategy, feedback):
    options = {"num_train_epochs": 4, "prototype_start": 1, "prototype_update_start": 2, "eval_steps": 2}
    made = trainer(tmp_path, save_strategy="no", eval_strategy=strategy, feedback=feedback, **options)
    made.train()
    assert [entry["step"] for entry in prototype_log(made)] == [3, 6, 9]


def test_a_training_too_short_for_prototypes_warns(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("modeling_pico.training.callbacks.logger.warning", warnings.append)
    made = trainer(tmp_path, num_train_epochs=2, prototype_start=2, save_strategy="no")
    made.train()
    assert "ends at step 6" in warnings[0] and "`prototype_start`, now 2" in warnings[0]
    assert prototype_log(made) == [] and made.model.style_prototypes["image"].stage == 0


def test_one_pass_over_the_data_and_no_evaluation_of_its_own(tmp_path, monkeypatch):
    encoded = []
    encode = PicoTrainer._encode
    monkeypatch.setattr(PicoTrainer, "_encode", lambda self, loader: encoded.append(1) or encode(self, loader))
    made = trainer(tmp_path, num_train_epochs=5, model_options=PURITY, save_strategy="no")
    made.train()
    assert len(prototype_log(made)) == 3
    assert made.train_dataset.reads == 5 * 18
    assert made.eval_dataset.reads == 5 * 9
    assert len(encoded) == 5


def test_a_construction_without_an_evaluation_beside_it_costs_one(tmp_path):
    options = {"num_train_epochs": 3, "prototype_start": 1, "prototype_update_start": 2, "save_strategy": "no"}
    made = trainer(tmp_path, eval_strategy="steps", eval_steps=4, **options)
    made.train()
    assert [entry["step"] for entry in prototype_log(made)] == [3, 6]
    assert made.eval_dataset.reads == (2 + 3) * 9
    # It serves the construction alone: neither the log nor the choice of the best checkpoint sees it.
    assert [entry["step"] for entry in made.state.log_history if "eval_rsum" in entry] == [4, 8, 9]


def test_statistics_are_collected_in_their_windows_only(tmp_path):
    counts, columns = {}, {}

    def watch(step, net):
        columns[step] = len(made.construction.columns.get("image", ()))
        counts[step] = float(made.construction.num_pairs)

    made = trainer(
        tmp_path,
        callbacks=[OnStep(watch)],
        num_train_epochs=5,
        prototype_start=2,
        prototype_update_start=4,
        reservoir_pairs=7,
        save_strategy="no",
    )
    made.train()
    # Constructions after the steps 6 and 12; six pairs a step, an interval of an epoch, i.e. three steps.
    windows = [3, 4, 5, 9, 10, 11]
    assert {step: count for step, count in counts.items() if count} == dict(
        zip(windows, [6, 12, 18, 6, 12, 18], strict=True)
    )
    # Seven pairs come from the last two steps of a window.
    assert {step: count for step, count in columns.items() if count} == {4: 6, 5: 7, 10: 6, 11: 7}


def test_accumulation_collects_from_every_micro_batch(tmp_path):
    counts = []
    made = trainer(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        save_strategy="no",
        callbacks=[OnStep(lambda step, net: counts.append(float(made.construction.num_pairs)))],
    )
    made.train()
    assert counts[:3] == [6, 12, 18]


def test_counterfactual_gain_compares_prototypes_on_the_same_network(tmp_path):
    made = trainer(tmp_path, num_train_epochs=3, prototype_start=2, model_options=PURITY)
    made.train()
    (entry,) = prototype_log(made)
    saved = PicoModel.from_pretrained(tmp_path / "checkpoint-6")
    before = trainer(tmp_path / "a", net=saved, num_train_epochs=3).evaluate()["eval_rsum"]
    tensors = load_file(tmp_path / "checkpoint-6" / "prototype_construction.safetensors")
    buffers = dict(saved.style_prototypes.named_buffers())
    for name, tensor in tensors.items():
        if name.startswith("pending."):  # weight 1 for the first construction: pending is what was tried
            buffers[name.removeprefix("pending.")].copy_(tensor)
    after = trainer(tmp_path / "b", net=saved, num_train_epochs=3).evaluate()["eval_rsum"]
    assert entry["prototype_feedback_gain"] == after - before != 0


def test_counterfactual_gain_of_a_part_of_the_images(tmp_path):
    options = {"num_train_epochs": 2, "model_options": PURITY, "feedback_images": 6, "seed": 1, "eval_num_folds": 3}
    data = CountedDataset(rows(9, seed=1))
    made = trainer(tmp_path, eval_data=data, **options)
    made.train()
    (entry,) = prototype_log(made)
    assert data.reads == 2 * 9  # both scores come from what the evaluation encoded
    tensors = load_file(tmp_path / "checkpoint-3" / "prototype_construction.safetensors")
    saved = PicoModel.from_pretrained(tmp_path / "checkpoint-3")
    images = made.construction.feedback_images(9)
    assert len(images) == 6
    part = data.dataset.select(images)
    before = trainer(tmp_path / "a", net=saved).evaluate(part)["eval_rsum"]
    buffers = dict(saved.style_prototypes.named_buffers())
    for name, tensor in tensors.items():
        if name.startswith("pending."):
            buffers[name.removeprefix("pending.")].copy_(tensor)
    after = trainer(tmp_path / "b", net=saved).evaluate(part)["eval_rsum"]
    assert entry["prototype_feedback_gain"] == after - before != 0

    # Without an evaluation at that step, only this part is encoded.
    data = CountedDataset(rows(9, seed=1))
    alone = trainer(tmp_path / "c", eval_data=data, eval_strategy="no", save_strategy="no", **options)
    alone.train()
    assert data.reads == 6
    assert prototype_log(alone)[0]["prototype_feedback_gain"] == entry["prototype_feedback_gain"]


# Feedback and validation sets


def test_feedback_from_validation_needs_a_validation_set(tmp_path):
    made = trainer(tmp_path, eval_data=None, eval_strategy="no", save_strategy="no")
    with pytest.raises(ValueError, match="feedback='counterfactual'.*needs an `eval_dataset`.*'constant'"):
        made.train()


def test_feedback_without_validation(tmp_path):
    made = trainer(
        tmp_path,
        eval_data=None,
        eval_strategy="no",
        save_strategy="no",
        feedback="constant",
        feedback_weight=0.2,
        num_train_epochs=5,
    )
    made.train()
    assert [entry["prototype_feedback_weight"] for entry in prototype_log(made)] == [1, 0.2, 0.2]
    assert not any("prototype_feedback_gain" in entry for entry in prototype_log(made))


def test_the_first_of_several_validation_sets_gives_the_feedback(tmp_path):
    sets = {"own": CountedDataset(rows(9, seed=1)), "other": CountedDataset(rows(7, seed=2))}
    made = trainer(tmp_path, eval_data=sets, num_train_epochs=2, save_strategy="no", model_options=PURITY)
    made.train()
    history = made.state.log_history
    assert sum("eval_own_rsum" in entry for entry in history) == sum("eval_other_rsum" in entry for entry in history)
    assert (sets["own"].reads, sets["other"].reads) == (2 * 9, 2 * 7)
    alone = trainer(tmp_path, eval_data=sets["own"], num_train_epochs=2, save_strategy="no", model_options=PURITY)
    alone.train()
    assert prototype_log(made) == prototype_log(alone)
    assert len(prototype_log(made)) == 1


def test_every_step_logs_its_loss_and_logit_scale(tmp_path):
    made = trainer(tmp_path, num_train_epochs=4, logging_steps=1, save_strategy="no")
    made.train()
    losses = [entry for entry in made.state.log_history if "loss" in entry]
    # The one after which prototypes are built as well.
    assert [entry["step"] for entry in losses] == list(range(1, 13)) and prototype_log(made)
    assert losses[-1]["logit_scale"] == pytest.approx(float(made.model.logit_scale.detach().exp()))
    hinge = trainer(tmp_path, num_train_epochs=1, logging_steps=1, model_options={"loss_type": "hinge"})
    hinge.train()
    assert not any("logit_scale" in entry for entry in hinge.state.log_history)


# Optimizer


def test_learning_rate_and_decay_of_each_group(tmp_path):
    made = trainer(tmp_path, learning_rate=1e-2, backbone_learning_rate=None, weight_decay=0.1)
    optimizer = made.create_optimizer()
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in made.model.named_parameters():
        group = group_of.pop(id(parameter))
        backbone = name.startswith(("vision_model.", "text_model."))
        assert group["lr"] == pytest.approx(1e-3 if backbone else 1e-2), name
        plain = name.endswith("bias") or "norm" in name.lower() or name == "logit_scale"
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert not group_of
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_single_numbers_beside_the_towers_do_not_decay(tmp_path):
    made = trainer(tmp_path, weight_decay=0.1)
    made.model.alignment_head.threshold = torch.nn.Parameter(torch.ones(8))
    made.create_optimizer()
    decayed = {id(p) for group in made.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    named = dict(made.model.named_parameters())
    assert not {id(named[name]) for name in ("logit_scale", "alignment_head.threshold")} & decayed
    assert id(named["alignment_head.visual_projection.weight"]) in decayed


def test_frozen_parameters_are_left_out(tmp_path):
    net = model()
    net.vision_model.requires_grad_(False)
    before = {name: p.clone() for name, p in net.vision_model.named_parameters()}
    made = trainer(tmp_path, net=net, num_train_epochs=1, save_strategy="no")
    made.train()
    assert sum(len(group["params"]) for group in made.optimizer.param_groups) == sum(
        p.requires_grad for p in net.parameters()
    )
    assert all(torch.equal(before[name], p) for name, p in net.vision_model.named_parameters())


def test_logged_rate_is_that_of_new_layers(tmp_path):
    made = trainer(tmp_path, logging_steps=1, num_train_epochs=1, lr_scheduler_type="constant", save_strategy="no")
    made.args.backbone_learning_rate = 1e-5
    made.train()
    assert {entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry} == {1e-2}


def test_logit_scale_stays_below_100(tmp_path):
    net = model(logit_scale_init_value=4.7)
    made = trainer(tmp_path, net=net, num_train_epochs=1, save_strategy="no", learning_rate=1e-6)
    made.train()
    assert net.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_hinge_counts_all_negatives_in_its_first_epochs(tmp_path):
    hardest = {}
    made = trainer(
        tmp_path,
        model_options={"loss_type": "hinge"},
        hinge_warmup_epochs=4 / 3,
        num_train_epochs=2,
        save_strategy="no",
    )
    pair_loss = made.model.pair_loss

    def watched(*args, **kwargs):
        hardest[made.state.global_step] = kwargs["hardest"]
        return pair_loss(*args, **kwargs)

    made.model.pair_loss = watched
    made.train()
    assert hardest == {0: False, 1: False, 2: False, 3: False, 4: True, 5: True}
    assert not made.model.logit_scale.requires_grad


def test_chunks_train_as_whole_batches_do(tmp_path):
    options = {
        "optim": "sgd",
        "model_options": {**PURITY, "dropout": 0.0},
        "num_train_epochs": 2,
        "save_strategy": "no",
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    whole, chunks = trainer(tmp_path, **options), trainer(tmp_path, gradient_cache_chunk_size=2, **options)
    whole.train()
    chunks.train()
    mine, other = chunks.model.state_dict(), whole.model.state_dict()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5)
    losses = [[entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (whole, chunks)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# Checkpoints and results


def test_best_model_is_loaded_and_saved_exactly(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "rsum", "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, num_train_epochs=4, model_options=PURITY, **options)
    made.train()
    logged = {entry["step"]: entry["eval_rsum"] for entry in made.state.log_history if "eval_rsum" in entry}
    best = max(logged, key=logged.get)
    assert best != max(logged)  # the last one would be right by accident
    assert made.state.best_global_step == best
    assert_same_state(made.model, PicoModel.from_pretrained(tmp_path / f"checkpoint-{best}"))
    assert made.evaluate()["eval_rsum"] == logged[best]
    made.save_model(str(tmp_path / "final"))
    assert_same_state(made.model, PicoModel.from_pretrained(tmp_path / "final"))


def test_predict_gives_scores_and_metrics(tmp_path):
    made = trainer(tmp_path)
    data = CountedDataset(rows(7, seed=3))
    output = made.predict(data, metric_key_prefix="styles")
    assert output.predictions.shape == (7, int(data.num_captions.sum()))
    assert {"styles_rsum", "styles_loss", "styles_chance_rsum", "styles_text_to_image_recall_at_1"} <= set(
        output.metrics
    )
    assert data.reads == 7


def test_folds(tmp_path):
    made = trainer(tmp_path, eval_num_folds=3)
    assert made.evaluate()["eval_image_to_text_recall_at_10"] == 100.0  # at most nine captions in a fold
    with pytest.raises(ValueError, match="9 images cannot be split into 2 folds"):
        trainer(tmp_path, eval_num_folds=2).evaluate()


def test_model_init_makes_a_model_for_each_training(tmp_path):
    made = PicoTrainer(
        model_init=lambda: model(**PURITY),
        args=arguments(tmp_path, num_train_epochs=2, save_strategy="no"),
        train_dataset=CountedDataset(rows(20, repeats=2)),
        eval_dataset=CountedDataset(rows(9, seed=1)),
        processing_class=processor(),
    )
    made.train()
    first, log = made.model, prototype_log(made)
    made.train()
    assert made.model is not first
    assert_same_state(made.model, first)
    assert made.construction.prototypes is made.model.style_prototypes
    assert prototype_log(made) == log and len(log) == 1
    assert sum("Prototype" in type(callback).__name__ for callback in made.callback_handler.callbacks) == 1


@pytest.mark.parametrize("head", ["fine_grained", "clip_style"])
def test_heads_without_prototypes_use_the_same_trainer(tmp_path, head):
    made = trainer(tmp_path, model_options={"method": head}, num_train_epochs=2)
    made.train()
    assert made.construction is None and prototype_log(made) == []
    assert not (tmp_path / "checkpoint-6" / "prototype_construction.safetensors").exists()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    resumed = trainer(tmp_path, model_options={"method": head}, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_state(resumed.model, made.model)
    # No validation is needed where nothing is fed back.
    trainer(tmp_path, model_options={"method": head}, eval_data=None, eval_strategy="no", max_steps=1).train()


# Wrong use


def test_texts_are_never_longer_than_the_tower_has_positions(tmp_path):
    unlimited = processor()
    unlimited.tokenizer.model_max_length = 10**30
    made = PicoTrainer(model(), arguments(tmp_path, eval_strategy="no"), processing_class=unlimited)
    assert made.data_collator.max_length == unlimited.tokenizer.model_max_length == 24
    made.save_model(tmp_path / "saved")
    assert PicoProcessor.from_pretrained(tmp_path / "saved").tokenizer.model_max_length == 24


def test_batch_of_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` must be at least 2 .one sample has no negatives., got 1"):
        trainer(tmp_path, per_device_train_batch_size=1).train()


def test_fewer_meanings_than_a_batch_are_refused(tmp_path):
    data = CountedDataset(rows(8, repeats=4))
    with pytest.raises(ValueError, match="needs 6 different ids, but the data has 4"):
        trainer(tmp_path, data=data).train()


def test_wrong_arguments_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="must be PicoTrainingArguments, but got TrainingArguments"):
        PicoTrainer(model=model(), args=TrainingArguments(str(tmp_path)), processing_class=processor())
    with pytest.raises(ValueError, match="`compute_metrics` is not used"):
        PicoTrainer(
            model=model(), args=arguments(tmp_path), processing_class=processor(), compute_metrics=lambda _: {}
        )
    with pytest.raises(ValueError, match="`data_collator` or a `processing_class`"):
        PicoTrainer(model=model(), args=arguments(tmp_path))
    made = trainer(tmp_path, eval_data=None, eval_strategy="no")
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        made.evaluate()
    made.train_dataset = None
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        made.get_train_dataloader()


def test_optimizers_that_group_parameters_themselves_refuse_two_rates(tmp_path):
    made = trainer(tmp_path, backbone_learning_rate=1e-3)
    made.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": list(made.model.parameters()), "lr": 1e-2})
    with pytest.raises(ValueError, match="groups parameters itself.*leave backbone_learning_rate out"):
        made.create_optimizer()


# Captions that several images share


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    for module in ("training.trainer", "evaluation.evaluator"):
        monkeypatch.setattr(f"modeling_pico.{module}.logger.warning", messages.append)
    return messages


def shared_captions(count: int, seed: int = 0):
    """Two of each three images have one and the same caption besides their own."""
    return rows(count, seed).map(
        lambda row, index: {"captions": [f"kind {index % 3 % 2} of {index // 3}"]}, with_indices=True
    )


@pytest.mark.parametrize("loss_type", ["infonce", "hinge"])
def test_equal_captions_of_different_images_are_no_negatives(tmp_path, loss_type):
    options = {"loss_type": loss_type, "uncertainty_config": {"num_prototypes": 3}}
    made = trainer(tmp_path, data=CaptionedImageDataset(shared_captions(6)), model_options=options)
    batch = next(iter(made.get_train_dataloader()))
    # As if the images of one caption were of one id.
    _, same = batch["caption_codes"].unique(return_inverse=True)
    assert len(same.unique()) == 4
    as_ids = {**batch, "image_ids": same, "caption_codes": torch.arange(6)}
    apart = {**batch, "caption_codes": torch.arange(6)}
    net = made.model.eval()
    loss, expected, wrong = (made.compute_loss(net, inputs) for inputs in (batch, as_ids, apart))
    assert torch.equal(loss, expected) and loss < wrong
    whole, expected = (net(**inputs, return_loss=True) for inputs in (batch, as_ids))
    assert torch.equal(whole.loss, expected.loss)
    assert torch.equal(whole.auxiliary_losses["uncertainty"], expected.auxiliary_losses["uncertainty"])


def test_chunks_know_the_captions_of_the_whole_batch(tmp_path):
    weights = []
    for chunk_size in (None, 2):
        options = {"gradient_cache_chunk_size": chunk_size, "max_steps": 1, "optim": "sgd", "eval_strategy": "no"}
        data = CaptionedImageDataset(shared_captions(6))
        made = trainer(tmp_path, data=data, save_strategy="no", **options)
        made.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_shared_captions_are_counted_before_training_and_where_they_are_ranked(tmp_path, warnings):
    data = CaptionedImageDataset(shared_captions(12))
    made = trainer(tmp_path, data=data, eval_data=data, num_train_epochs=2, save_strategy="no")
    metrics = made.train() and made.evaluate()
    assert warnings[0].startswith("8 of 12 training captions are also the captions of other images, of other ids.")
    assert warnings[1].startswith("8 of 12 texts are also the texts of other images") and len(warnings) == 2
    # The loss of the report takes them as training does.
    codes = made._encode(made.get_eval_dataloader()).caption_codes
    assert torch.equal(codes, torch.tensor([caption_code(texts[0]) for texts in data.dataset["captions"]]))
    made.evaluator.loss_batch_size = 12
    batch = next(
        iter(trainer(tmp_path, net=made.model, eval_data=data, per_device_eval_batch_size=12).get_eval_dataloader())
    )
    inputs = {name: batch[name] for name in batch if name not in ("text_ids", "num_captions")}
    expected = made.model.eval()(**inputs, return_loss=True).loss.item()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(metrics["eval_rsum"])


# Data sets of other kinds


def test_parts_and_plain_tables_train_as_the_data_set(tmp_path):
    table = rows(20, repeats=2)
    part = table.select(range(9))
    results = []
    joined = ConcatDataset([part, CaptionedImageDataset(table.select(range(9, 20)))])
    for data in (CaptionedImageDataset(table), table, Subset(CaptionedImageDataset(table), range(20)), joined):
        made = trainer(tmp_path, data=data, eval_data={"own": part}, num_train_epochs=2, save_strategy="no")
        made.train()
        assert made.train_dataset.ids.tolist() == [*range(18), 0, 1]
        # What is given later is taken alike.
        assert made.evaluate(Subset(data, range(9)))["eval_rsum"] == made.evaluate()["eval_own_rsum"]
        assert made.predict(data).predictions.shape[0] == 20
        results.append((made.model.state_dict(), whole_log(made)))
    for state, log in results[1:]:
        assert log == results[0][1]
        assert all(torch.equal(state[name], tensor) for name, tensor in results[0][0].items())


def test_the_card_says_how_large_the_galleries_were(tmp_path):
    made = trainer(tmp_path, eval_data=CaptionedImageDataset(rows(8, seed=1)), eval_num_folds=2)
    made.evaluate()
    made.create_model_card()
    texts = int(made.eval_dataset.num_captions.sum()) // 2
    card = (tmp_path / "README.md").read_text()
    assert f"| eval | 4 | {texts} |" in card and "means over 2 folds" in card


def test_streams_are_refused_by_name(tmp_path):
    stream = rows(8).to_iterable_dataset()
    for options in ({"data": stream}, {"eval_data": stream}, {"eval_data": {"own": rows(4), "other": stream}}):
        with pytest.raises(ValueError, match="IterableDataset is a stream, .* without `streaming=True`"):
            trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="IterableDataset is a stream"):
        trainer(tmp_path).evaluate(stream)


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_normalisation_of_towers_keeps_the_statistics_of_pretraining(tmp_path, freeze):
    vision = ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", hidden_act="relu")
    net = PicoModel(PicoConfig(vision_config=vision, text_config=model().config.text_config, embedding_dim=8))
    layers = batch_norm_layers(net.vision_model)
    before = {name: (layer.running_mean.clone(), layer.weight.detach().clone()) for name, layer in layers.items()}
    made = PicoTrainer(
        model_init=lambda: net,  # as a search for hyperparameters makes its models
        args=arguments(tmp_path, max_steps=2, **({} if freeze else {"freeze_batch_norm": False})),
        train_dataset=CountedDataset(rows(20, repeats=2)),
        eval_dataset=CountedDataset(rows(9, seed=1)),
        processing_class=processor(),
    )
    net.freeze_batch_norm = not freeze
    made.train()
    assert len(before) > 3
    for name, (mean, weight) in before.items():
        assert torch.equal(layers[name].running_mean, mean) == freeze
        assert not torch.equal(layers[name].weight, weight)
