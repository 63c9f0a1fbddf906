from __future__ import annotations

import copy
import pickle

import pytest
from tiny import arguments
from transformers import HfArgumentParser

from modeling_pico.training import PicoTrainingArguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feedback": "gain"}, ["feedback", "'gain'", "'counterfactual'", "'constant'"]),
        ({"caption_sampling": "first"}, ["caption_sampling", "'first'", "'random'", "'all'"]),
        ({"prototype_interval": 0}, ["prototype_interval", "a whole number, at least 1", "got 0"]),
        ({"prototype_start": 0.5}, ["prototype_start", "a whole number", "got 0.5"]),
        ({"feedback_kappa": -1.0}, ["feedback_kappa", "greater than 0", "got -1.0"]),
        ({"reservoir_pairs": 0}, ["reservoir_pairs", "at least 1"]),
        ({"eval_num_folds": 0}, ["eval_num_folds", "at least 1"]),
        ({"feedback_images": 0}, ["feedback_images", "at least 1", "got 0"]),
        ({"prototype_start": 0, "prototype_update_start": 1}, ["prototype_start", "at least 1", "got 0"]),
        ({"prototype_start": 3, "prototype_update_start": 3}, ["j1 = 3", "after", "j0 = 3"]),
        ({"feedback_weight": 1.5}, ["feedback_weight", "greater than 0 and at most 1", "1.5"]),
        ({"gradient_cache_chunk_size": 0}, ["gradient_cache_chunk_size", "at least 1"]),
        ({"num_train_epochs": 0}, ["num_train_epochs", "greater than 0", "got 0", "do_train"]),
        ({"num_train_epochs": -1}, ["num_train_epochs", "greater than 0", "got -1"]),
        ({"max_steps": 0}, ["max_steps", "at least 1", "-1", "got 0"]),
        ({"max_steps": -5}, ["max_steps", "at least 1", "got -5"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size", "at least 1", "got 0"]),
        ({"gradient_accumulation_steps": -1}, ["gradient_accumulation_steps", "at least 1", "got -1"]),
        ({"hinge_warmup_epochs": -1.0}, ["hinge_warmup_epochs", "at least 0", "got -1"]),
        # No comparison with NaN holds, so whatever follows from one would be skipped in silence.
        ({"prototype_update_start": float("nan")}, ["prototype_update_start", "must be a number", "nan"]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm", "must be a number", "nan"]),
    ],
)
def test_bad_option_is_refused_with_what_is_allowed(tmp_path, options, words):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **options)
    for word in words:
        assert word in str(error.value)


def test_edges_are_allowed(tmp_path):
    arguments(tmp_path, feedback_weight=1.0, prototype_start=1, prototype_update_start=2)
    arguments(tmp_path, num_train_epochs=0, max_steps=3)


def test_every_option_is_documented_by_its_help():
    documented = PicoTrainingArguments.__doc__.split("Args:\n")[1]
    assert documented.count("*optional*") == len(PicoTrainingArguments.__annotations__)
    assert "        reservoir_pairs (*optional*, defaults to `256`): Matched pairs whose columns are" in documented
    parsed = HfArgumentParser(PicoTrainingArguments).parse_args_into_dataclasses(["--feedback_images", "3"])[0]
    assert parsed.feedback_images == 3


def test_defaults_of_the_trainer_that_cannot_work_here_are_changed(tmp_path):
    args = PicoTrainingArguments(str(tmp_path), use_cpu=True)
    assert args.remove_unused_columns is False  # raw samples have none of the model's arguments
    assert args.ddp_broadcast_buffers is False
    assert PicoTrainingArguments(str(tmp_path), use_cpu=True, ddp_broadcast_buffers=True).ddp_broadcast_buffers


@pytest.mark.parametrize("feedback", ["counterfactual", "epoch_delta", "constant"])
def test_which_feedback_needs_validation(tmp_path, feedback):
    assert arguments(tmp_path, feedback=feedback).feedback_needs_validation is (feedback != "constant")


def test_copies_keep_the_token_and_pickles_do_not(tmp_path):
    args = PicoTrainingArguments(str(tmp_path), hub_token="sesame", run_name="sesame 1", use_cpu=True)
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert (copied.hub_token, copied.run_name, copied.to_dict()) == ("sesame", "sesame 1", args.to_dict())
    assert copy.deepcopy(args).accelerator_config is not args.accelerator_config
    assert b"sesame" not in pickle.dumps(args)
