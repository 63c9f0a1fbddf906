"""A loss that is NaN or infinite stops training with the names of its images, or costs one step, and nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import arguments, assert_same_state, model, processor, prototype_log, rows, trainer
from transformers import TrainerCallback

from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.training import NonFiniteLossError, PicoTrainer
from modeling_pico.training.finite import MAX_SKIPPED_IN_A_ROW, FiniteLossCallback, spread_non_finite


PURITY = {"style_probability": "purity"}


class Poisoned(PicoDataCollator):
    """Spoils one pixel of the image with the code 7 in the batches whose number is given; keeps their ids."""

    def __init__(self, batches: set[int], value: float = math.nan):
        super().__init__(processor())
        self.batches, self.value, self.seen = batches, value, []

    def __call__(self, samples):
        batch = super().__call__(samples)
        if "caption" in samples[0]:
            if len(self.seen) in self.batches:
                batch["pixel_values"][batch["image_ids"] == 7, 0, 3, 3] = self.value
                if not (batch["image_ids"] == 7).any():
                    batch["pixel_values"][0, 0, 3, 3] = self.value
            self.seen.append(batch["image_ids"].tolist())
        return batch


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def poisoned(folder, batches, value=math.nan, **options):
    made = trainer(folder, **{"model_options": PURITY, "num_train_epochs": 2, **options})
    made.data_collator = Poisoned(set(batches), value)
    return made


def skipped_log(made) -> list[tuple[int, int]]:
    return [(entry["step"], entry["skipped_steps"]) for entry in made.state.log_history if "skipped_steps" in entry]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"gradient_cache_chunk_size": 4}, {"max_grad_norm": 0.0}])
def test_training_stops_before_the_step_and_names_the_images(tmp_path, value, options):
    made = poisoned(tmp_path, [4], value, save_strategy="steps", save_steps=1, **options)
    with pytest.raises(NonFiniteLossError) as error:
        made.train()
    message = str(error.value)
    assert "loss (nan) of step 5 is not finite" in message
    # The first 18 images have ids of their own, which are their numbers.
    batch = made.data_collator.seen[4]
    assert f"by image_id: {', '.join(repr(str(code)) for code in batch)}." in message
    assert f"Not finite are the pixels of '{7 if 7 in batch else batch[0]}'." in message
    assert "non_finite_loss='skip'" in message
    assert made.state.global_step == 4 and (tmp_path / "checkpoint-4").is_dir()
    clean = trainer(tmp_path / "clean", model_options=PURITY, num_train_epochs=2, callbacks=[StopAt(4)], **options)
    clean.train()
    weights = dict(clean.model.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in made.model.named_parameters())


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path):
    watched: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            moments = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
            named = {name: tensor.clone() for name, tensor in model.named_parameters()}
            watched.append({**named, **{str(i): tensor.clone() for i, tensor in enumerate(moments)}})

    made = poisoned(tmp_path, [1, 4], non_finite_loss="skip", callbacks=[Watch()], save_strategy="no", logging_steps=1)
    made.train()
    assert made.state.global_step == 6
    assert skipped_log(made) == [(1, 1), (4, 2)]
    unchanged = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(watched, watched[1:], strict=False)
    ]
    assert unchanged == [True, False, False, True, False]
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    # The poisoned batches lay in the window of the first construction.
    assert len(prototype_log(made)) == 1
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())


def test_what_a_skipped_step_saw_stays_out_of_the_prototypes(tmp_path):
    made = poisoned(tmp_path, [1], non_finite_loss="skip", callbacks=[StopAt(2)])
    made.train()
    # Of 12 pairs the one with the spoilt pixel is left out; the others of its batch may be counted.
    assert made.construction.num_pairs == 11
    # The reservoir of 10 pairs takes the last two of three batches.
    images, texts = made.construction.columns.values()
    assert len(images) == len(texts) == 5 and images.isfinite().all() and texts.isfinite().all()


def test_accumulated_micro_batches_are_skipped_together(tmp_path):
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    made = poisoned(tmp_path, [4], non_finite_loss="skip", num_train_epochs=1, **options)
    before = None

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            nonlocal before
            current = {name: tensor.clone() for name, tensor in model.named_parameters()}
            if state.global_step == 2:
                assert all(torch.equal(before[name], current[name]) for name in current)
            before = current

    made.add_callback(Watch())
    made.train()
    assert skipped_log(made) == [(1, 1)]

    stopped = poisoned(tmp_path, [4], num_train_epochs=1, **options)
    with pytest.raises(NonFiniteLossError) as error:
        stopped.train()
    # Only the micro-batch whose loss it is.
    names = ", ".join(repr(str(code)) for code in stopped.data_collator.seen[4])
    assert f"by image_id: {names}. " in str(error.value)


def test_the_count_goes_on_after_a_resume(tmp_path):
    options = {"non_finite_loss": "skip", "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 3}
    whole = poisoned(tmp_path, [1, 4], **options)
    whole.train()
    assert skipped_log(whole) == [(1, 1), (4, 2)]
    # Batches are counted from the checkpoint on.
    resumed = poisoned(tmp_path / "resumed", [1], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert skipped_log(resumed) == [(1, 1), (4, 2)]
    assert_same_state(resumed.model, whole.model)


def test_too_many_skipped_steps_in_a_row_stop_training(tmp_path):
    made = poisoned(tmp_path, range(1, 99), non_finite_loss="skip", save_strategy="no", num_train_epochs=6)
    with pytest.raises(NonFiniteLossError, match=f"It is the {MAX_SKIPPED_IN_A_ROW}th step in a row"):
        made.train()
    assert made.state.global_step == MAX_SKIPPED_IN_A_ROW


def test_a_gradient_that_is_not_finite_stops_as_well(tmp_path):
    made = trainer(tmp_path, model_options=PURITY, save_strategy="no")
    made.model.alignment_head.text_projection.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NonFiniteLossError) as error:
        made.train()
    assert "gradient (norm inf) of step 1 is not finite" in str(error.value)
    assert "Their pixels are finite" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_not_finite_leaves_no_gradient_finite(value):
    weights = torch.tensor([0.3, 0.6], requires_grad=True)
    plain = weights.sum() + value  # whatever the value, its gradient is 1
    loss = spread_non_finite(plain)
    assert torch.equal(loss, plain) or (loss.isnan() and value != 0)
    loss.backward()
    assert weights.grad.isnan().all() if value != 0 else weights.grad.tolist() == [1, 1]


def test_an_infinite_loss_with_finite_gradients_stops_training(tmp_path):
    class Infinite(PicoTrainer):
        def _pair_loss(self, *args):
            return super()._pair_loss(*args) + (math.inf if self.state.global_step == 1 else 0.0)

    made = trainer(tmp_path, trainer_class=Infinite, model_options=PURITY, save_strategy="no")
    with pytest.raises(NonFiniteLossError, match=r"of step 2 is not finite"):
        made.train()
    assert made.state.global_step == 1


def test_under_loss_scaling_the_loss_of_another_process_counts(monkeypatch):
    # This process's loss is finite, that of the other one is not.
    module = "modeling_pico.training.finite"
    monkeypatch.setattr(f"{module}.gather", lambda flag: torch.cat([flag, torch.zeros_like(flag)]))
    monkeypatch.setattr(f"{module}.gather_object", lambda found: [*found, math.nan])
    callback = FiniteLossCallback("stop", None, lambda logs: None)
    callback.note(torch.tensor(1.0), {"image_ids": torch.tensor([3]), "pixel_values": torch.zeros(1, 3, 2, 2)})
    with pytest.raises(NonFiniteLossError, match=r"loss \(nan\) of step 1"):
        callback.on_pre_optimizer_step(SimpleNamespace(), SimpleNamespace(global_step=0), None)


def test_loss_scaling_keeps_its_infinite_gradients(tmp_path):
    """As on a GPU under fp16, where the scaler finds the scale by leaving out steps that overflow."""
    made = trainer(tmp_path, model_options=PURITY, save_strategy="no", max_steps=2)
    made.accelerator.scaler = SimpleNamespace(get_scale=lambda: 1.0)
    made._get_grad_norm(made.model, grad_norm=torch.tensor(math.inf))
    callback = made._finite_loss
    callback.note(torch.tensor(1.0), {})
    callback.on_pre_optimizer_step(made.args, made.state, made.control, model=made.model)  # does not raise
    callback.note(torch.tensor(math.nan), {"image_ids": torch.tensor([3]), "pixel_values": torch.zeros(1, 3, 2, 2)})
    with pytest.raises(NonFiniteLossError, match=r"loss \(nan\) of step 1 .* '3'"):
        callback.on_pre_optimizer_step(made.args, made.state, made.control, model=made.model)


def test_a_real_scaler_takes_a_skipped_step_for_what_it_is(tmp_path):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    callback = FiniteLossCallback("skip", None, lambda logs: None)
    state = SimpleNamespace(log_history=[], global_step=0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for gradient in (1.0, math.nan):  # a loss can be infinite where gradients are not
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        callback.note(
            torch.tensor(math.inf), {"image_ids": torch.tensor([3]), "pixel_values": torch.zeros(1, 3, 2, 2)}
        )
        callback.on_pre_optimizer_step(arguments(tmp_path), state, None, model=net)
        scaler.step(optimizer)
        scaler.update()
    assert callback.skipped == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_names_are_those_of_the_data():
    table = rows(4).map(lambda row: {"image_id": f"pictures/{row['image_id']}.png"})
    assert CaptionedImageDataset(table).image_names([2, 0]) == ["pictures/2.png", "pictures/0.png"]
    callback = FiniteLossCallback("stop", None, lambda logs: None)
    callback.note(torch.tensor(math.nan), {"image_ids": torch.tensor([5]), "pixel_values": torch.zeros(1, 3, 2, 2)})
    with pytest.raises(NonFiniteLossError, match="by image_id: 5. "):
        callback.on_pre_optimizer_step(SimpleNamespace(world_size=1), SimpleNamespace(global_step=0), None)
