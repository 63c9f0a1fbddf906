"""Every option of `Trainer` and `TrainingArguments` is used, refused by name, or transformers' own affair."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from tiny import arguments, model, processor, trainer
from transformers import Trainer, TrainingArguments

from modeling_pico.training import PicoTrainer
from modeling_pico.training.trainer import _UNUSED_ARGUMENTS


# A value of each that is not the default.
REFUSED = {
    "label_smoothing_factor": 0.1,
    "label_names": ["label"],
    "average_tokens_across_devices": False,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "enable_jit_checkpoint": True,
    "dataloader_in_order": False,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "eval_accumulation_steps": 1,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "parallelism_config": object(),
    "use_cache": True,
}
# What `PicoTrainer` does in its own way, and heeds there.
OURS = [
    "output_dir",
    "learning_rate",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "auto_find_batch_size",
    "data_seed",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "prediction_loss_only",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "ddp_find_unused_parameters",
    "ddp_broadcast_buffers",
    "save_strategy",
    "save_total_limit",
    "push_to_hub",
    "hub_strategy",
    "hub_always_push",
    "hub_model_id",
    "hub_revision",
    "accelerator_config",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
]
# What `PicoTrainingArguments` sets, for the reasons that its documentation gives.
SET = ["remove_unused_columns", "logging_nan_inf_filter"]
# What the training script does, and no trainer.
SCRIPT = ["do_train", "do_eval", "do_predict", "resume_from_checkpoint"]
# What `Trainer` does around the methods that `PicoTrainer` overrides.
TRANSFORMERS = [
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "warmup_steps",
    "max_grad_norm",
    "bf16",
    "fp16",
    "tf32",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "neftune_noise_alpha",
    "torch_empty_cache_steps",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_on_each_node",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "save_only_model",
    "save_steps",
    "save_on_each_node",
    "hub_token",
    "hub_private_repo",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "full_determinism",
    "seed",
    "use_cpu",
    "ddp_bucket_cap_mb",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "debug",
    "skip_memory_metrics",
    "local_rank",
]


def test_every_training_argument_is_sorted():
    sorted_once = [*REFUSED, *OURS, *SET, *SCRIPT, *TRANSFORMERS]
    assert len(sorted_once) == len(set(sorted_once))
    assert {option.name for option in fields(TrainingArguments)} == set(sorted_once)


@pytest.mark.parametrize("name", REFUSED)
def test_training_arguments_without_effect_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}=.*` would have no effect: .* Leave it out"):
        arguments(tmp_path, **{name: REFUSED[name]})


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_batches_of_the_accelerator_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`accelerator_config` asks for {name}"):
        arguments(tmp_path, accelerator_config={name: True})


def test_every_argument_of_the_trainer_is_sorted():
    ours = set(inspect.signature(PicoTrainer.__init__).parameters) - {"kwargs"}
    transformers = {"model_init", "callbacks", "optimizers", "optimizer_cls_and_kwargs"}
    assert set(inspect.signature(Trainer.__init__).parameters) == ours | transformers | set(_UNUSED_ARGUMENTS)


@pytest.mark.parametrize("name", _UNUSED_ARGUMENTS)
def test_arguments_of_the_trainer_without_effect_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is not used: .*PicoTrainer"):
        PicoTrainer(model(), arguments(tmp_path), processing_class=processor(), **{name: lambda *args: None})


def test_workers_start_as_is_asked(tmp_path):
    made = trainer(tmp_path, dataloader_num_workers=1, dataloader_multiprocessing_context="spawn")
    for loader in (made.get_train_dataloader(), made.get_eval_dataloader()):
        assert loader.multiprocessing_context.get_start_method() == "spawn"
