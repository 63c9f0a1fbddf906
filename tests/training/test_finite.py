"""A loss that is NaN or infinite stops training with the names of its images, or costs one step, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import CountedDataset, assert_same_state, processor, prototype_log, rows, trainer
from transformers import TrainerCallback

from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.training import NonFiniteLossError, PicoTrainer


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


def test_an_infinite_loss_with_finite_gradients_stops_training(tmp_path):
    class Infinite(PicoTrainer):
        def _pair_loss(self, *args):
            return super()._pair_loss(*args) + (math.inf if self.state.global_step == 1 else 0.0)

    made = trainer(tmp_path, trainer_class=Infinite, model_options=PURITY, save_strategy="no")
    with pytest.raises(NonFiniteLossError, match=r"of step 2 is not finite"):
        made.train()
    assert made.state.global_step == 1


def test_names_are_those_of_the_data(tmp_path):
    table = rows(4).map(lambda row: {"image_id": f"pictures/{row['image_id']}.png"})
    assert CaptionedImageDataset(table).image_names([2, 0]) == ["pictures/2.png", "pictures/0.png"]
    batches = [{"image_ids": torch.tensor([2]), "pixel_values": torch.zeros(1, 3, 2, 2)}]
    made = trainer(tmp_path, data=CountedDataset(table))
    assert "by image_id: 'pictures/2.png'. Their pixels are finite" in made.describe_batches(batches)
    made.train_dataset = table  # stands for a data set of one's own, which need not know names
    assert "by image_id: 2. " in made.describe_batches(batches)
