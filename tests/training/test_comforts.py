"""What users of `Trainer` expect to work: compilation, search, early stopping, precision, accumulation, logging."""

from __future__ import annotations

import json
import sys
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import CountedDataset, arguments, assert_same_state, model, processor, prototype_log, rows, trainer
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import integration_utils

from modeling_pico.training import PicoTrainer


def first_batch(made: PicoTrainer) -> dict[str, torch.Tensor]:
    return next(iter(made.get_train_dataloader()))


# Compilation


@pytest.fixture(scope="module")
def constructed(tmp_path_factory) -> PicoTrainer:
    """A trainer whose model has prototypes in use."""
    made = trainer(tmp_path_factory.mktemp("constructed"), num_train_epochs=2, save_strategy="no")
    made.train()
    assert made.model.style_prototypes["image"].stage > 0
    return made


def test_the_model_compiles_without_a_graph_break(constructed):
    torch.compiler.reset()
    net, batch = constructed.model.eval(), first_batch(constructed)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits_per_image, net(**batch).logits_per_image)


def test_a_compiled_training_step_gives_the_same_gradients(constructed):
    torch.compiler.reset()
    net, batch = constructed.model.train(), first_batch(constructed)
    results = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        loss = run(**batch, return_loss=True).loss
        loss.backward()
        gradients = {name: tensor.grad for name, tensor in net.named_parameters() if tensor.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    assert len(gradients) > 20
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_a_compiled_training_equals_a_plain_one(tmp_path):
    torch.compiler.reset()
    options = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no", "optim": "sgd"}
    plain, compiled = trainer(tmp_path, **options), trainer(tmp_path, torch_compile_backend="eager", **options)
    plain.train()
    compiled.train()
    assert compiled.args.torch_compile and len(prototype_log(compiled)) == 1
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-6)


# Hyper-parameter search


def test_search_maximises_rsum_with_fresh_prototypes_in_each_trial(tmp_path):
    pytest.importorskip("optuna")
    stages = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            stages.append(int(model.style_prototypes["text"].stage))

        def on_train_end(self, args, state, control, model=None, **kwargs):
            stages.append(int(model.style_prototypes["text"].stage))

    made = PicoTrainer(
        model_init=lambda trial: model(),
        args=arguments(tmp_path, num_train_epochs=2, save_strategy="no"),
        train_dataset=CountedDataset(rows(20, repeats=2)),
        eval_dataset=CountedDataset(rows(9, seed=1)),
        processing_class=processor(),
        callbacks=[Watch()],
    )
    results, rates = {}, (1e-2, 1e-4)

    def objective(metrics):
        results[made._trial.number] = metrics["eval_rsum"]
        return metrics["eval_rsum"]

    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", rates)}

    import optuna

    sampler = optuna.samplers.GridSampler({"learning_rate": rates}, seed=0)
    best = made.hyperparameter_search(space, objective, n_trials=2, sampler=sampler)
    assert stages == [0, 1, 0, 1]
    assert results[0] != results[1]
    assert best.objective == max(results.values()) and results[int(best.run_id)] == best.objective


def test_search_takes_rsum_of_the_first_validation_set_by_default(tmp_path, monkeypatch):
    given = {}

    def search(self, hp_space, compute_objective, n_trials, direction, **kwargs):
        given.update(value=compute_objective({"eval_a_rsum": 3.0, "eval_b_rsum": 5.0}), direction=direction, **kwargs)

    monkeypatch.setattr("transformers.Trainer.hyperparameter_search", search)
    data = {name: CountedDataset(rows(9, seed=1)) for name in ("a", "b")}
    trainer(tmp_path, eval_data=data).hyperparameter_search(backend="optuna")
    assert given == {"value": 3.0, "direction": "maximize", "backend": "optuna"}


# Other comforts


def test_training_stops_when_rsum_stops_rising(tmp_path):
    made = trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        learning_rate=0.0,
        backbone_learning_rate=0.0,
        prototype_start=4,
        prototype_update_start=5,
        load_best_model_at_end=True,
        metric_for_best_model="rsum",
    )
    made.train()
    # The second evaluation is no better than the first; six epochs were asked for.
    assert made.state.epoch == 2 and made.state.best_global_step == 3


def test_accumulated_gradients_are_the_mean_of_the_micro_batches(tmp_path):
    gradients, batches = {}, []

    class Recording(PicoTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            batches.append(inputs)
            return super().compute_loss(model, inputs, **kwargs)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    options = {"max_steps": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "logging_steps": 1}
    made = trainer(
        tmp_path, trainer_class=Recording, callbacks=[Keep()], eval_strategy="no", save_strategy="no", **options
    )
    made.train()
    assert len(batches) == 3
    net = model().train()
    losses = torch.stack([net(**batch, return_loss=True).loss for batch in batches])
    losses.mean().backward()
    assert gradients
    for name, parameter in net.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx([losses.mean().item()], abs=1e-4)


def test_bfloat16_trains_float32_weights_and_prototypes(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "no", "logging_steps": 1}
    exact, mixed = trainer(tmp_path, **options), trainer(tmp_path, bf16=True, **options)
    exact.train()
    mixed.train()
    losses = [[entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (exact, mixed)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.1)
    assert mixed.model.style_prototypes["image"].stage > 0
    floating = {tensor.dtype for tensor in mixed.model.state_dict().values() if tensor.is_floating_point()}
    assert floating == {torch.float32}


def test_gradient_checkpointing_trains_as_without(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "no"}
    plain, checkpointed = trainer(tmp_path, **options), trainer(tmp_path, gradient_checkpointing=True, **options)
    plain.train()
    checkpointed.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.model.modules())
    assert_same_state(checkpointed.model, plain.model)


def test_tensorboard_shows_losses_recalls_and_constructions(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    made = trainer(tmp_path, report_to="tensorboard", num_train_epochs=2, save_strategy="no", logging_steps=1)
    made.train()
    events = accumulator.EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/logit_scale", "train/prototype_stage", "eval/rsum"} <= names
    logged = [entry["eval_rsum"] for entry in made.state.log_history if "eval_rsum" in entry]
    assert [event.value for event in events.Scalars("eval/rsum")] == pytest.approx(logged)


def test_trackio_is_told_losses_recalls_and_constructions(tmp_path, monkeypatch):
    """Through the callback of transformers, with a stand-in: trackio pins an older Pillow than is tested here."""
    told, stages = [], []

    class Config(dict):
        def update(self, given, allow_val_change):
            stages.append("config")
            super().update(json.loads(json.dumps(given, default=str)))

    fake = ModuleType("trackio")
    fake.__version__, fake.config = "0.43.0", Config()
    fake.context_vars = SimpleNamespace(current_space_id=ContextVar("space", default=None))
    fake.init = lambda **options: stages.append(options["project"])
    fake.log = told.append
    fake.finish = lambda: stages.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    made = trainer(
        tmp_path, report_to="trackio", project="shapes", num_train_epochs=2, save_strategy="no", logging_steps=1
    )
    made.train()
    assert stages == ["shapes", "config", "finish"]
    assert fake.config["num_style_prototypes"] == 3 and fake.config["feedback"] == "counterfactual"
    assert fake.config["model/num_parameters"] == made.model.num_parameters()
    names = {name for entry in told for name in entry}
    assert {"train/loss", "train/logit_scale", "train/prototype_stage", "eval/rsum", "train/global_step"} <= names
    assert all(isinstance(value, (int, float)) for entry in told for value in entry.values())
    logged = [entry["eval_rsum"] for entry in made.state.log_history if "eval_rsum" in entry]
    assert [entry["eval/rsum"] for entry in told if "eval/rsum" in entry] == logged
