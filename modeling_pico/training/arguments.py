"""Training arguments of PICO: those of transformers, and the staged construction's."""

import copy
import math
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, get_origin

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..durable import NON_FINITE_LOSSES
from .secrets import find_secrets, without_secrets


FEEDBACKS = ("counterfactual", "epoch_delta", "constant")
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
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint in any case, at the end of a step",
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


@dataclass(frozen=True)
class Range:
    """
    The numbers that an option may have; whole ones alone if `least` is an `int`.

    Attributes:
        least (`float`): The least number.
        most (`float`): The largest number.
        above (`bool`): Whether numbers have to be greater than `least`.
    """

    least: float
    most: float = math.inf
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """ValueError unless `value` is one of them."""
        whole = isinstance(self.least, int)
        enough = value > self.least if self.above else value >= self.least
        if not (enough and value <= self.most) or (whole and not isinstance(value, int)):
            allowed = f"{'greater than' if self.above else 'at least'} {self.least:g}"
            allowed = f"a whole number, {allowed}" if whole else allowed
            allowed += "" if math.isinf(self.most) else f" and at most {self.most:g}"
            raise ValueError(f"`{name}` must be {allowed}, but got {value!r}.")


_Count = Annotated[int, Range(1)]
_CountOrNone = Annotated[int | None, Range(1)]
_Positive = Annotated[float, Range(0.0, above=True)]


def option_field(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a dataclass that is an option: its default, its help, and the values that it may have."""
    return field(default=default, metadata={"help": text} | ({} if choices is None else {"choices": choices}))


@dataclass
class PicoTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`PicoTrainer`]: all of `TrainingArguments`, and the following. Two of theirs are not for choosing:
    `remove_unused_columns` is False, and `logging_nan_inf_filter` follows `non_finite_loss`. Options that could do
    nothing here are refused by name.

    Where the best checkpoint is asked for and `metric_for_best_model` is not given, it is that of the highest `rsum`.
    Of several validation sets the first decides, unless the metric is named with another one (`sketches_rsum`).

    Args:
    """

    _argument_group_name = "training"  # of the script's help

    learning_rate: float = option_field(2e-4, "Learning rate of new layers: alignment head, temperature.")
    logging_steps: float = option_field(0.02, "Steps between two logs of the loss; below 1, a share of all steps.")
    backbone_learning_rate: float | None = option_field(
        None,
        "Learning rate of the backbones (default: a tenth of learning_rate). Towers without pretrained weights learn "
        "at one rate with the rest.",
    )
    freeze_batch_norm: bool = option_field(
        True,
        "Batch normalisation in the towers keeps the mean and variance that it has, those of pretraining, and learns "
        "its scale and shift; those of a batch would change what a pretrained tower gives at once.",
    )
    ddp_find_unused_parameters: bool | None = option_field(
        False, "Look for parameters without a gradient, of which tested towers have none, in every step."
    )
    ddp_broadcast_buffers: bool | None = option_field(
        False, "Send buffers to all processes before every step, which compute their prototypes alike."
    )
    caption_sampling: str = option_field(
        "random",
        "random: each image once an epoch, with one of its captions; all: every pair once an epoch.",
        choices=("random", "all"),
    )
    gather_negatives: bool = option_field(True, "Whether samples of all processes serve as negatives.")
    gradient_cache_chunk_size: _CountOrNone = option_field(
        None,
        "Encode each batch in chunks of so many pairs (GradCache): the loss and gradient of a large batch with the "
        "memory of a small one, for one more forward pass (default: the whole batch at once)",
    )
    non_finite_loss: str = option_field(
        "stop",
        "What a loss or gradient that is NaN or infinite does. stop: ends training before the weights change, and "
        "names the images; skip: leaves the optimizer step out and logs skipped_steps; ten in a row end training.",
        choices=NON_FINITE_LOSSES,
    )
    hinge_warmup_epochs: Annotated[float, Range(0.0)] = option_field(
        1.0, "Epochs in which the hinge loss counts all negatives instead of the hardest."
    )
    prototype_start: _Count = option_field(2, "Epochs after which the first prototypes are built (j0).")
    prototype_update_start: _Count = option_field(4, "Epochs after which they are first updated (j1).")
    prototype_interval: _Count = option_field(
        1, "Epochs between updates; statistics are collected over this long before each."
    )
    reservoir_pairs: _Count = option_field(256, "Matched pairs whose columns are clustered: the last ones before.")
    feedback: str = option_field(
        "counterfactual",
        "What weights an update: the gain in validation rSum of the same network by the new prototypes "
        "(counterfactual), or since the evaluation before (epoch_delta); constant: feedback_weight.",
        choices=FEEDBACKS,
    )
    feedback_images: _CountOrNone = option_field(
        256,
        "Validation images, with all their texts, that the counterfactual feedback scores; none: all. Time grows with "
        "the square; gains in a smaller gallery are smaller and noisier.",
    )
    feedback_kappa: _Positive = option_field(1.0, "Gain in rSum points that is worth a factor of e.")
    feedback_weight: Annotated[float, Range(0.0, 1.0, above=True)] = option_field(
        0.1, "Weight of new prototypes under feedback=constant."
    )
    eval_num_folds: _Count = option_field(
        1, "Consecutive image blocks over which metrics are averaged; 5 for MS-COCO 1K."
    )
    uncertainty_reranking: bool = option_field(
        False,
        "For the training script: after training, learn on the validation set how the uncertainty re-ranks scores; "
        "evaluations then report reranked_ metrics beside the plain ones.",
    )
    tower_cache_dir: str | None = option_field(
        None,
        "Folder that keeps the hidden states of frozen towers, in half precision: only the alignment head is run and "
        "trained then, here and in every later run with these towers on these data (default: nowhere)",
    )
    tower_cache_views: _Count = option_field(
        4,
        "Drawings of each training image that tower_cache_dir keeps where images are augmented; every epoch takes one "
        "of them.",
    )
    align_gallery: bool = option_field(
        False,
        "Evaluations outside of training also report aligned_ metrics: after the images, those of each style by "
        "themselves, have been moved to where images of training lie in the image tower.",
    )
    eval_cache_dir: str | None = option_field(
        None,
        "Folder that keeps embeddings of evaluations outside of training, in half precision: evaluating the same "
        "model on the same data again then only scores; beside tower_cache_dir those of aligned galleries alone "
        "(default: nowhere)",
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
        self._check_values()

    def _check_values(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            # No comparison with it holds, so what follows from one would be skipped in silence.
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"`{option.name}` must be a number, but got nan.")
            hint = PicoTrainingArguments.__annotations__.get(option.name)
            if hint is not None and get_origin(hint) is Annotated and value is not None:
                hint.__metadata__[0].check(option.name, value)
            choices = () if hint is None else option.metadata.get("choices", ())
            if choices and value not in choices:
                raise ValueError(f"`{option.name}` must be one of {', '.join(map(repr, choices))}, but got {value!r}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            Range(1).check(name, getattr(self, name))
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"`max_steps` must be at least 1, or -1 to train by epochs, but got {self.max_steps}.")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(
                f"`num_train_epochs` must be greater than 0, but got {self.num_train_epochs}: nothing would be "
                "trained. To evaluate alone, leave it out, and `do_train` too."
            )
        if self.prototype_update_start <= self.prototype_start:
            raise ValueError(
                f"`prototype_update_start` (j1 = {self.prototype_update_start}) must come after `prototype_start` "
                f"(j0 = {self.prototype_start})."
            )

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


# An option's help is its documentation.
for _field in fields(PicoTrainingArguments):
    if _field.name in PicoTrainingArguments.__annotations__:
        _text = f"{_field.name} (*optional*, defaults to `{_field.default!r}`): {_field.metadata['help']}"
        _lines = textwrap.fill(_text, 119, initial_indent=" " * 8, subsequent_indent=" " * 12)
        PicoTrainingArguments.__doc__ = f"{str(PicoTrainingArguments.__doc__).rstrip()}\n{_lines}\n"


__all__ = ["PicoTrainingArguments", "Range", "option_field"]
