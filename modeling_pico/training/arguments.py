"""Training arguments of PICO: those of transformers, and the staged construction's."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .run_record import find_secrets, without_secrets


FEEDBACKS = ("counterfactual", "epoch_delta", "ema", "uniform", "latest")
SCHEDULE_UNITS = ("epochs", "share")
CAPTION_SAMPLINGS = ("random", "all")
NON_FINITE_LOSSES = ("stop", "skip")


@dataclass
class PicoTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`PicoTrainer`]: all of `TrainingArguments`, and the following. Three of theirs are not for choosing:
    `remove_unused_columns` and `enable_jit_checkpoint` are False (SIGTERM writes a checkpoint in any case), and
    `logging_nan_inf_filter` follows `non_finite_loss`.

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
        prototype_start (`float`, *optional*, defaults to 2.0):
            When the first prototypes are built (j0), in `prototype_schedule` units.
        prototype_update_start (`float`, *optional*, defaults to 4.0):
            When they are first updated (j1), in `prototype_schedule` units.
        prototype_schedule (`str`, *optional*, defaults to `"epochs"`):
            Unit of the two: `"epochs"` (fractions allowed) or `"share"` of the whole training.
        prototype_interval (`float`, *optional*, defaults to 1.0):
            Epochs between updates. Statistics are collected over this long before each construction.
        reservoir_pairs (`int`, *optional*, defaults to 256):
            Matched pairs whose columns are clustered: the last ones before a construction. Among them meanings must
            repeat for `probability_estimator="meaning_share"`, which wants some thousands.
        feedback (`str`, *optional*, defaults to `"counterfactual"`):
            Gain that weights an update: validation rSum with the new prototypes minus with the old, same network
            (`"counterfactual"`); rSum of this evaluation minus the one before (`"epoch_delta"`). Without validation:
            `"ema"` (constant weight), `"uniform"` (equal weights), `"latest"` (the newest alone).
        feedback_images (`int`, *optional*, defaults to 256):
            Validation images, with all their texts, that the counterfactual feedback scores under both sets of
            prototypes: a fixed draw, spread evenly over the set. Time grows with its square. A smaller gallery is an
            easier one and holds fewer queries, so gains come out smaller and noisier. `None`, or as many as there are
            or more: all, and the score that the evaluation measured is that of the old prototypes.
        feedback_kappa (`float`, *optional*, defaults to 1.0):
            Gain in rSum points that is worth a factor of e.
        feedback_ema_weight (`float`, *optional*, defaults to 0.1):
            Weight of new prototypes under `feedback="ema"`.
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
    prototype_start: float = field(default=2.0, metadata={"help": "When the first prototypes are built (j0)."})
    prototype_update_start: float = field(default=4.0, metadata={"help": "When prototypes are first updated (j1)."})
    prototype_schedule: str = field(
        default="epochs",
        metadata={"help": "Unit of prototype_start and prototype_update_start.", "choices": SCHEDULE_UNITS},
    )
    prototype_interval: float = field(default=1.0, metadata={"help": "Epochs between prototype updates."})
    reservoir_pairs: int = field(default=256, metadata={"help": "Matched pairs whose columns are clustered."})
    feedback: str = field(
        default="counterfactual",
        metadata={"help": "What weights an update of the prototypes.", "choices": FEEDBACKS},
    )
    feedback_images: int | None = field(
        default=256, metadata={"help": "Validation images that the counterfactual feedback scores."}
    )
    feedback_kappa: float = field(default=1.0, metadata={"help": "rSum points that are worth a factor of e."})
    feedback_ema_weight: float = field(default=0.1, metadata={"help": "Weight of an update under feedback=ema."})
    eval_num_folds: int = field(default=1, metadata={"help": "Image blocks over which metrics are averaged."})
    uncertainty_reranking: bool = field(
        default=False, metadata={"help": "After training, learn to re-rank by uncertainty on the validation set."}
    )
    eval_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Keep embeddings of evaluations outside of training in this folder (default: nowhere)"},
    )

    def __post_init__(self):
        if self.eval_strategy == "steps" and self.eval_steps is None and self.logging_steps < 1:
            self.eval_steps = 500  # as transformers' default of `logging_steps` has it: an evaluation takes time
        super().__post_init__()
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
            ("prototype_schedule", SCHEDULE_UNITS),
            ("feedback", FEEDBACKS),
            ("non_finite_loss", NON_FINITE_LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, allowed))}, but got {getattr(self, name)!r}."
                )
        for name in ("prototype_interval", "feedback_kappa", "reservoir_pairs", "eval_num_folds", "prototype_start"):
            if not getattr(self, name) > 0:  # NaN is refused, too
                raise ValueError(f"`{name}` must be greater than 0, but got {getattr(self, name)}.")
        if self.feedback_images is not None and self.feedback_images < 1:
            raise ValueError(f"`feedback_images` must be at least 1, or None for all, but got {self.feedback_images}.")
        if self.prototype_update_start <= self.prototype_start:
            raise ValueError(
                f"`prototype_update_start` (j1 = {self.prototype_update_start}) must come after `prototype_start` "
                f"(j0 = {self.prototype_start})."
            )
        if self.prototype_schedule == "share" and self.prototype_update_start > 1:
            raise ValueError(
                "with `prototype_schedule='share'`, `prototype_start` and `prototype_update_start` must lie between "
                f"0 and 1, but got {self.prototype_start} and {self.prototype_update_start}."
            )
        if self.gradient_cache_chunk_size is not None and self.gradient_cache_chunk_size < 1:
            raise ValueError(
                f"`gradient_cache_chunk_size` must be at least 1, but got {self.gradient_cache_chunk_size}."
            )
        if not 0 < self.feedback_ema_weight <= 1:
            raise ValueError(f"`feedback_ema_weight` must lie in (0, 1], but got {self.feedback_ema_weight}.")

    def __getstate__(self) -> dict[str, Any]:
        # Pickled as `training_args.bin`, which is uploaded with the model.
        secrets = find_secrets(self.__dict__)
        texts = {name: value for name, value in self.__dict__.items() if type(value) in (str, dict)}
        return {**self.__dict__, **without_secrets(texts, secrets), "hub_token": None}

    @property
    def feedback_needs_validation(self) -> bool:
        """Whether the weight of an update comes from validation retrieval."""
        return self.feedback in ("counterfactual", "epoch_delta")


__all__ = ["PicoTrainingArguments"]
