"""What a training sees depends on seed and epoch: not on data workers, their kind, or evaluations in between."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from tiny import rows, trainer

from modeling_pico.data import CaptionedImageDataset, RandomCropFlip, UniqueIdBatchSampler
from modeling_pico.training import PicoTrainer


@pytest.fixture
def start_method():
    """Sets how processes are started, as a user does; macOS, Windows and Python 3.14 do not fork by default."""
    found = multiprocessing.get_start_method()
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(found, force=True)


def batches_of(folder, **options) -> list[dict[str, torch.Tensor]]:
    """All that two epochs of training and an evaluation give to the model."""
    made = trainer(folder, data=CaptionedImageDataset(rows(20, repeats=2), RandomCropFlip()), **options)
    loader = made.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += list(loader)
    return batches + list(made.get_eval_dataloader())


# What a worker needs is pickled for a fork server as it is for spawned processes, which would import everything anew.
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_samples_do_not_depend_on_how_workers_are_started(tmp_path, start_method, method):
    alone = batches_of(tmp_path)
    start_method(method)
    shared = batches_of(tmp_path, dataloader_num_workers=2, dataloader_persistent_workers=True)
    assert len(shared) == len(alone) == 2 * 3 + 3
    for batch, other in zip(shared, alone, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


class Seen(PicoTrainer):
    """Keeps the ids of all batches."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["image_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def test_every_epoch_has_batches_of_its_own_also_after_a_resume(tmp_path):
    options = {
        "trainer_class": Seen,
        "num_train_epochs": 3,
        "eval_data": None,
        "eval_strategy": "no",
        "feedback": "constant",
    }
    made = trainer(tmp_path, save_strategy="steps", save_steps=4, **options)
    made.train()
    data = made.train_dataset
    sampler = UniqueIdBatchSampler(data.ids, data.num_captions, 6, seed=made.args.seed)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append([[int(data.ids[key.row]) for key in batch] for batch in sampler])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    batches = [batch for epoch in epochs for batch in epoch]
    assert made.seen == batches
    # In the middle of the second epoch.
    resumed = trainer(tmp_path / "resumed", save_strategy="no", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.seen == batches[4:]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_draws_nothing_from_the_global_generator(tmp_path, workers):
    made = trainer(tmp_path, dataloader_num_workers=workers)
    before = torch.get_rng_state()
    made.evaluate()
    made.predict(made.eval_dataset)
    assert torch.equal(torch.get_rng_state(), before)
