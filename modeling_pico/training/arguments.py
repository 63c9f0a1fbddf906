"""Training arguments of PICO: those of transformers, and the staged construction's."""

import copy
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .secrets import find_secrets, without_secrets


FEEDBACKS = ("counterfactual", "epoch_delta", "constant")
CAPTION_SAMPLINGS = ("random", "all")
NON_FINITE_LOSSES = ("stop", "skip")

BEST_METRIC = "rsum"
# How the names of metrics end of which less is better.
_LESS_IS_BETTER = ("loss", "_median_rank", "_aurc")
# Options of `TrainingArguments` that could do nothing here, and why.
_METRICS_OVER_THE_WHOLE_SET = "retrieval metrics are computed over the whole set, without `compute_metrics`"
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "pairs have no class labels to smooth",
    "label_names": "batches have no labels",
    "average_tokens_across_devices": "the loss is a mean over pairs, not over tokens",
    "train_sampling_strategy": "batches are drawn at random, so that each holds a meaning once",
    "length_column_name": "batches are drawn at random, so that each holds a meaning once",
    "dataloader_in_order": "only batches in order can be resumed exactly",
    "bf16_full_eval": "evaluations run in the precision of the training, so set `bf16`",
    "fp16_full_eval": "evaluations run in the precision of the training, so set `fp16`",
    "eval_accumulation_steps": "scores are ranked in tiles and never gathered",
    "eval_do_concat_batches": _METRICS_OVER_THE_WHOLE_SET,
    "eval_use_gather_object": _METRICS_OVER_THE_WHOLE_SET,
    "include_for_metrics": _METRICS_OVER_THE_WHOLE_SET,
    "batch_eval_metrics": _METRICS_OVER_THE_WHOLE_SET,
    "use_liger_kernel": "there are no Liger kernels for PICO",
    "liger_kernel_config": "there are no Liger kernels for PICO",
    "parallelism_config": "training is spread by DDP, FSDP 2 or DeepSpeed",
    "use_cache": "towers encode whole sequences at once",
}
# Schedules that follow this metric.
_METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


@dataclass
class PicoTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`PicoTrainer`]: all of `TrainingArguments`, and the following. Three of theirs are not for choosing:
    `remove_unused_columns` and `enable_jit_checkpoint` are False (SIGTERM writes a checkpoint in any case), and
    `logging_nan_inf_filter` follows `non_finite_loss`. Options that could do nothing here are refused by name.

    Where the best checkpoint is asked for and `metric_for_best_model` is not given, it is that of the highest `rsum`.
    Of several validation sets the first decides, unless the metric is named with another one (`sketches_rsum`).

    Args:
        learning_rate (`float`, *optional*, defaults to 2e-4):
            Learning rate of new layers (alignment head, temperature).
        logging_steps (`float`, *optional*, defaults to 0.02):
            Steps between two logs of the training loss; below 1, a share of all steps. The default draws curves of
            fifty points, of short runs too.
        backbone_learning_rate (`float`, *optional*):
            Learning rate of the backbones; a tenth of `learning_rate` by default. Set both alike for towers without
            pretrained weights.
        caption_sampling (`str`, *optional*, defaults to `"random"`):
            `"random"`: each image once an epoch with one of its captions; `"all"`: every pair once an epoch.
        gather_negatives (`bool`, *optional*, defaults to `True`):
            Whether samples of all processes serve as negatives.
        gradient_cache_chunk_size (`int`, *optional*):
            Encodes each batch in chunks of so many pairs (GradCache): the loss and gradient of a large batch with the
            memory of a small one, for one more forward pass.
        non_finite_loss (`str`, *optional*, defaults to `"stop"`):
            What a loss or gradient that is NaN or infinite does, on whichever process: `"stop"` ends training with an
            error that names the batch's images, before the weights change; `"skip"` leaves the optimizer step out,
            with all its micro-batches, warns, and logs `skipped_steps`; ten in a row end training all the same.
        hinge_warmup_epochs (`float`, *optional*, defaults to 1.0):
            Epochs in which the hinge loss counts all negatives instead of the hardest.
        prototype_start (`int`, *optional*, defaults to 2):
            Epochs after which the first prototypes are built (j0).
        prototype_update_start (`int`, *optional*, defaults to 4):
            Epochs after which they are first updated (j1).
        prototype_interval (`int`, *optional*, defaults to 1):
            Epochs between updates. Statistics are collected over this long before each construction.
        reservoir_pairs (`int`, *optional*, defaults to 256):
            Matched pairs whose columns are clustered: the last ones before a construction.
        feedback (`str`, *optional*, defaults to `"counterfactual"`):
            Gain that weights an update: validation rSum with the new prototypes minus with the old, same network
            (`"counterfactual"`); rSum of this evaluation minus the one before (`"epoch_delta"`). `"constant"` needs no
            validation: every update has the weight `feedback_weight`.
        feedback_images (`int`, *optional*, defaults to 256):
            Validation images, with all their texts, that the counterfactual feedback scores under both sets of
            prototypes: a fixed draw, spread evenly over the set. Time grows with its square. A smaller gallery is an
            easier one and holds fewer queries, so gains come out smaller and noisier. `None`, or as many as there are
            or more: all, and the score that the evaluation measured is that of the old prototypes.
        feedback_kappa (`float`, *optional*, defaults to 1.0):
            Gain in rSum points that is worth a factor of e.
        feedback_weight (`float`, *optional*, defaults to 0.1):
            Weight of new prototypes under `feedback="constant"`.
        eval_num_folds (`int`, *optional*, defaults to 1):
            Consecutive image blocks over which retrieval metrics are averaged; 5 for MS-COCO 1K.
        uncertainty_reranking (`bool`, *optional*, defaults to `False`):
            For the training script: whether to learn, after training and on the validation set, by which weights the
            uncertainty re-ranks scores. They are saved in the model's configuration, and evaluations report
            `reranked_` metrics beside the plain ones.
        eval_cache_dir (`str`, *optional*):
            Folder that keeps embeddings of evaluations outside of training, in half precision: evaluating the same
            model on the same data again then only scores.
    """

    _argument_group_name = "training"  # of the script's help

    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of new layers."})
    logging_steps: float = field(
        default=0.02, metadata={"help": "Steps between two logs of the loss; below 1, a share of all steps."}
    )
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbones; a tenth of learning_rate by default."}
    )
    caption_sampling: str = field(
        default="random",
        metadata={"help": "random: one caption an image and epoch; all: every pair.", "choices": CAPTION_SAMPLINGS},
    )
    gather_negatives: bool = field(default=True, metadata={"help": "Use samples of all processes as negatives."})
    gradient_cache_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Encode each batch in chunks of so many pairs (GradCache) (default: the whole batch at once)"
        },
    )
    non_finite_loss: str = field(
        default="stop",
        metadata={"help": "What a loss that is NaN or infinite does.", "choices": NON_FINITE_LOSSES},
    )
    hinge_warmup_epochs: float = field(
        default=1.0, metadata={"help": "Epochs in which the hinge loss counts all negatives."}
    )
    prototype_start: int = field(default=2, metadata={"help": "Epochs until the first prototypes are built (j0)."})
    prototype_update_start: int = field(default=4, metadata={"help": "Epochs until they are first updated (j1)."})
    prototype_interval: int = field(default=1, metadata={"help": "Epochs between prototype updates."})
    reservoir_pairs: int = field(default=256, metadata={"help": "Matched pairs whose columns are clustered."})
    feedback: str = field(
        default="counterfactual",
        metadata={"help": "What weights an update of the prototypes.", "choices": FEEDBACKS},
    )
    feedback_images: int | None = field(
        default=256, metadata={"help": "Validation images that the counterfactual feedback scores."}
    )
    feedback_kappa: float = field(default=1.0, metadata={"help": "rSum points that are worth a factor of e."})
    feedback_weight: float = field(default=0.1, metadata={"help": "Weight of an update under feedback=constant."})
    eval_num_folds: int = field(default=1, metadata={"help": "Image blocks over which metrics are averaged."})
    uncertainty_reranking: bool = field(
        default=False, metadata={"help": "After training, learn to re-rank by uncertainty on the validation set."}
    )
    eval_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Keep embeddings of evaluations outside of training in this folder (default: nowhere)"},
    )

    def __post_init__(self):
        self._refuse_what_has_no_effect()
        needs_metric = (
            self.load_best_model_at_end
            or self.save_strategy == SaveStrategy.BEST
            or self.lr_scheduler_type in _METRIC_SCHEDULERS
        )
        if self.metric_for_best_model is None and needs_metric:
            self.choose_best_metric()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(_LESS_IS_BETTER)
        if self.eval_strategy == "steps" and self.eval_steps is None and self.logging_steps < 1:
            self.eval_steps = 500  # as transformers' default of `logging_steps` has it: an evaluation takes time
        super().__post_init__()
        if self.lr_scheduler_type in _METRIC_SCHEDULERS:
            # They take less for better unless they are told otherwise.
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **(self.lr_scheduler_kwargs or {})}
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"`accelerator_config` asks for {name}, but every process reads batches of its own, of "
                    "per_device_train_batch_size pairs. Leave it out."
                )
        # Samples are pixels and token ids only after collation, so no column can be judged unused before it.
        self.remove_unused_columns = False
        # [`PicoTrainer`] writes a checkpoint on SIGTERM in any case, at the end of a step with all that belongs to it;
        # the callback of transformers would write it in the middle, from where no run continues exactly.
        self.enable_jit_checkpoint = False
        if self.ddp_find_unused_parameters is None:
            # Every trainable parameter gets a gradient in every step; looking for others takes time.
            self.ddp_find_unused_parameters = False
        if self.ddp_broadcast_buffers is None:
            # Prototypes are computed alike on all processes; a broadcast before every forward would be wasted.
            self.ddp_broadcast_buffers = False
        # A loss that stops training needs no filter, which would wait for the device at every micro-batch.
        self.logging_nan_inf_filter = self.non_finite_loss == "skip"
        for name, allowed in (
            ("caption_sampling", CAPTION_SAMPLINGS),
            ("feedback", FEEDBACKS),
            ("non_finite_loss", NON_FINITE_LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, allowed))}, but got {getattr(self, name)!r}."
                )
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"`{option.name}` must be a number, but got nan.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"`max_steps` must be at least 1, or -1 to train by epochs, but got {self.max_steps}.")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(
                f"`num_train_epochs` must be greater than 0, but got {self.num_train_epochs}: nothing would be "
                "trained. To evaluate alone, leave it out, and `do_train` too."
            )
        if self.hinge_warmup_epochs < 0:
            raise ValueError(f"`hinge_warmup_epochs` must be at least 0, but got {self.hinge_warmup_epochs}.")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "feedback_kappa",
            "reservoir_pairs",
            "eval_num_folds",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, but got {getattr(self, name)}.")
        if self.feedback_images is not None and self.feedback_images < 1:
            raise ValueError(f"`feedback_images` must be at least 1, or None for all, but got {self.feedback_images}.")
        for name in ("prototype_start", "prototype_update_start", "prototype_interval"):
            epochs = getattr(self, name)
            if not isinstance(epochs, int) or epochs < 1:
                raise ValueError(f"`{name}` must be a whole number of epochs, at least 1, but got {epochs!r}.")
        if self.prototype_update_start <= self.prototype_start:
            raise ValueError(
                f"`prototype_update_start` (j1 = {self.prototype_update_start}) must come after `prototype_start` "
                f"(j0 = {self.prototype_start})."
            )
        if self.gradient_cache_chunk_size is not None and self.gradient_cache_chunk_size < 1:
            raise ValueError(
                f"`gradient_cache_chunk_size` must be at least 1, but got {self.gradient_cache_chunk_size}."
            )
        if not 0 < self.feedback_weight <= 1:
            raise ValueError(f"`feedback_weight` must lie in (0, 1], but got {self.feedback_weight}.")

    def __getstate__(self) -> dict[str, Any]:
        # Pickled as `training_args.bin`, which is uploaded with the model.
        secrets = find_secrets(self.__dict__)
        texts = {name: value for name, value in self.__dict__.items() if type(value) in (str, dict)}
        return {**self.__dict__, **without_secrets(texts, secrets), "hub_token": None}

    # Copies in this process keep what a pickle leaves out.
    def __copy__(self) -> "PicoTrainingArguments":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "PicoTrainingArguments":
        copied = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def _refuse_what_has_no_effect(self) -> None:
        for option in fields(TrainingArguments):
            if option.name not in _WITHOUT_EFFECT:
                continue
            value = getattr(self, option.name)
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if value != default:
                raise ValueError(
                    f"`{option.name}={value!r}` would have no effect: {_WITHOUT_EFFECT[option.name]}. Leave it out."
                )

    def choose_best_metric(self) -> None:
        """Makes `rsum` the metric by which checkpoints are compared; a higher one is better."""
        if self.greater_is_better is False:
            raise ValueError(
                "`greater_is_better=False` without `metric_for_best_model`: the default is 'rsum', of which more is "
                "better. Name the metric that is meant, such as 'loss', or leave `greater_is_better` out."
            )
        self.metric_for_best_model, self.greater_is_better = BEST_METRIC, True

    @property
    def feedback_needs_validation(self) -> bool:
        """Whether the weight of an update comes from validation retrieval."""
        return self.feedback in ("counterfactual", "epoch_delta")


__all__ = ["PicoTrainingArguments"]
