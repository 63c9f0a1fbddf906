"""A loss that is NaN or infinite stops a plain training before the weights change, or costs one step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from plain import model, rows, trainer
from transformers import Trainer, TrainerCallback

from modeling_pico.durable import DurableTrainer, NonFiniteLossError, spread_non_finite
from modeling_pico.durable.finite import MAX_SKIPPED_IN_A_ROW, FiniteLossCallback


def describe(batches) -> str:
    return f"{len(batches)} batches."


def poisoned(folder, value=math.nan, **options):
    """The loss of every second epoch's one batch with the spoilt image is not finite."""
    data = rows(18)
    data[7]["pixel_values"][0, 3, 3] = value
    return trainer(folder, data=data, eval_strategy="no", **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}])
def test_training_stops_before_the_weights_change(tmp_path, value, options):
    made = poisoned(tmp_path, value, **options)
    before = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    made.add_callback(Watch())
    with pytest.raises(NonFiniteLossError, match=r"loss \(nan\) of step [123] is not finite. A lower `learning_rate`"):
        made.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path):
    watched: list[list[torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            moments = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
            watched.append([tensor.clone() for tensor in [*model.parameters(), *moments]])

    made = poisoned(tmp_path, non_finite_loss="skip", callbacks=[Watch()], num_train_epochs=3, logging_steps=1)
    made.train()
    skipped = [(entry["step"], entry["skipped_steps"]) for entry in made.state.log_history if "skipped_steps" in entry]
    assert [count for _, count in skipped] == [1, 2, 3]
    for step, _ in skipped:
        if step >= 2:  # the moments of the first step have no predecessor
            assert all(map(torch.equal, watched[step - 1], watched[step]))
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 9 and all(map(math.isfinite, losses))


def test_too_many_skipped_steps_in_a_row_stop_training(tmp_path):
    data = rows(18)
    for row in data:
        row["pixel_values"][0, 3, 3] = math.nan
    made = trainer(tmp_path, data=data, non_finite_loss="skip", eval_strategy="no", num_train_epochs=6)
    with pytest.raises(NonFiniteLossError, match=f"It is the {MAX_SKIPPED_IN_A_ROW}th step in a row"):
        made.train()
    assert made.state.global_step == MAX_SKIPPED_IN_A_ROW - 1


def test_a_gradient_that_is_not_finite_stops_as_well(tmp_path):
    made = trainer(tmp_path)
    made.model.classifier.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NonFiniteLossError, match=r"gradient \(norm (inf|nan)\) of step 1 is not finite"):
        made.train()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_not_finite_leaves_no_gradient_finite(value):
    weights = torch.tensor([0.3, 0.6], requires_grad=True)
    plain = weights.sum() + value  # whatever the value, its gradient is 1
    loss = spread_non_finite(plain)
    assert torch.equal(loss, plain) or (loss.isnan() and value != 0)
    loss.backward()
    assert weights.grad.isnan().all() if value != 0 else weights.grad.tolist() == [1, 1]


def test_under_loss_scaling_the_loss_of_another_process_counts(monkeypatch):
    # This process's loss is finite, that of the other one is not.
    module = "modeling_pico.durable.finite"
    monkeypatch.setattr(f"{module}.gather", lambda flag: torch.cat([flag, torch.zeros_like(flag)]))
    monkeypatch.setattr(f"{module}.gather_object", lambda found: [*found, math.nan])
    callback = FiniteLossCallback("stop", describe, lambda logs: None)
    callback.note(torch.tensor(1.0), {})
    with pytest.raises(NonFiniteLossError, match=r"loss \(nan\) of step 1 is not finite. 0 batches."):
        callback.on_pre_optimizer_step(SimpleNamespace(), SimpleNamespace(global_step=0), None)


def test_loss_scaling_keeps_its_infinite_gradients(tmp_path):
    """As on a GPU under fp16, where the scaler finds the scale by leaving out steps that overflow."""
    made = trainer(tmp_path)
    made.accelerator.scaler = SimpleNamespace(get_scale=lambda: 1.0)
    made._get_grad_norm(made.model, grad_norm=torch.tensor(math.inf))
    callback = made._finite_loss
    callback.note(torch.tensor(1.0), {})
    callback.on_pre_optimizer_step(made.args, made.state, made.control, model=made.model)  # does not raise
    callback.note(torch.tensor(math.nan), {})
    with pytest.raises(NonFiniteLossError, match=r"loss \(nan\) of step 1"):
        callback.on_pre_optimizer_step(made.args, made.state, made.control, model=made.model)


def test_a_real_scaler_takes_a_skipped_step_for_what_it_is():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    callback = FiniteLossCallback("skip", describe, lambda logs: None)
    state = SimpleNamespace(log_history=[], global_step=0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for gradient in (1.0, math.nan):  # a loss can be infinite where gradients are not
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        callback.note(torch.tensor(math.inf), {})
        callback.on_pre_optimizer_step(SimpleNamespace(), state, None, model=net)
        scaler.step(optimizer)
        scaler.update()
    assert callback.skipped == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`non_finite_loss` must be one of \('stop', 'skip'\), but got 'ignore'"):
        trainer(tmp_path, non_finite_loss="ignore")


class Poisoning(Trainer):
    """Another trainer, whose loss is not finite."""

    def compute_loss(self, *args, **kwargs):
        loss, outputs = super().compute_loss(*args, **kwargs)
        return loss + math.inf, outputs


def test_it_goes_before_other_trainers(tmp_path):
    class Both(DurableTrainer, Poisoning):
        pass

    with pytest.raises(NonFiniteLossError, match=r"loss \(nan\) of step 1"):
        trainer(tmp_path, trainer_class=Both).train()
