"""Trainer of PICO: the loop of transformers with retrieval losses, retrieval evaluation and staged prototypes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import BestRun, TrainOutput
from transformers.utils import logging

from ..data import CaptionedImageDataset, PicoDataCollator, UniqueIdBatchSampler, as_captioned
from ..distributed import gather, gather_batch, own_rows, reduce
from ..evaluation.evaluator import RetrievalEvaluator
from ..model.backbones_pico import limit_text_length
from ..model.modeling_pico import PicoOutput
from ..model.processing_pico import PicoProcessor
from .arguments import PicoTrainingArguments
from .callbacks import LogitScaleCallback, PrototypeCallback, SamplerEpochCallback
from .checkpoints import CheckpointTrainer
from .construction import PrototypeConstruction
from .finite import FiniteLossCallback, spread_non_finite
from .gradient_cache import cached_backward, split_inputs
from .publishing import PublishingTrainer
from .retrieval_evaluation import EvaluationTrainer
from .sharding import prepare_fsdp
from .signals import heed_only_parent


logger = logging.get_logger(__name__)


_METRICS_OVER_THE_WHOLE_SET = (
    "PicoTrainer computes retrieval metrics over the whole evaluation set. Use `modeling_pico.RetrievalEvaluator` for "
    "metrics of your own."
)
# Arguments of `Trainer` that could do nothing here, and why.
_WITHOUT_EFFECT = {
    "compute_loss_func": "the loss compares the pairs of all processes. Choose `loss_type` in the model's "
    "configuration, or override `PicoTrainer.compute_loss`.",
    "compute_metrics": _METRICS_OVER_THE_WHOLE_SET,
    "preprocess_logits_for_metrics": _METRICS_OVER_THE_WHOLE_SET,
}


class PicoTrainer(EvaluationTrainer, CheckpointTrainer, PublishingTrainer):
    r"""
    Trains a [`PicoModel`] for image-text retrieval.

    Adds to `Trainer`: batches in which every meaning occurs once; negatives from all processes; a lower learning rate
    for the backbones; retrieval metrics (`eval_rsum`, `eval_image_to_text_recall_at_1`, ...) from an evaluation that
    encodes once; and, for models with style prototypes, their staged construction.

    A run may be resumed with another number of processes. With as large a batch of all processes together it goes on
    with the same batches, and ends with the same weights and prototypes up to rounding; dropout alone draws other
    numbers, since each process has a generator of its own.

    Args:
        model ([`PicoModel`], *optional*): The model, or give `model_init`.
        args ([`PicoTrainingArguments`], *optional*): Training arguments.
        data_collator ([`PicoDataCollator`], *optional*): Made from `processing_class` by default.
        train_dataset ([`CaptionedImageDataset`], *optional*):
            Training pairs; whatever [`~modeling_pico.data.as_captioned`] takes.
        eval_dataset ([`CaptionedImageDataset`] or `dict` of them, *optional*):
            Validation sets, in the same forms. The first one gives the performance feedback.
        processing_class ([`PicoProcessor`], *optional*): Saved beside the model.
        kwargs: Passed to `Trainer` (`callbacks`, `optimizers`, `model_init`, ...).
    """

    # The loss is a mean over the batch, so `Trainer` divides it by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: PicoTrainingArguments | None = None,
        data_collator: PicoDataCollator | None = None,
        train_dataset: Dataset | datasets.Dataset | None = None,
        eval_dataset: Dataset | datasets.Dataset | Mapping[str, Dataset | datasets.Dataset] | None = None,
        processing_class: PicoProcessor | None = None,
        **kwargs: Any,
    ):
        args = PicoTrainingArguments("trainer_output") if args is None else args
        if not isinstance(args, PicoTrainingArguments):
            raise ValueError(f"`args` must be PicoTrainingArguments, but got {type(args).__name__}.")
        for name, reason in _WITHOUT_EFFECT.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is not used: {reason}")
        if data_collator is None:
            if processing_class is None:
                raise ValueError("PicoTrainer needs a `data_collator` or a `processing_class` to make one from.")
            data_collator = PicoDataCollator(processing_class)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: as_captioned(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = as_captioned(eval_dataset)
        self.construction: PrototypeConstruction | None = None
        self.card_info: dict[str, Any] = {}
        self.card_split_names: dict[str, str] = {}
        self._auxiliary_log = {}
        self._card_metrics: dict[str, dict[str, float]] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=None if train_dataset is None else as_captioned(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if processing_class is not None:
            limit_text_length(processing_class.tokenizer, self._pico_model().text_model)
        self.evaluator = RetrievalEvaluator(args.eval_num_folds, loss_batch_size=args.per_device_eval_batch_size)
        self.add_callback(LogitScaleCallback)
        self._finite_loss = FiniteLossCallback(args.non_finite_loss, self.train_dataset, self.log)
        self.add_callback(self._finite_loss)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Batches in which every meaning occurs once, over all processes."""
        if self.train_dataset is None:
            raise ValueError("PicoTrainer: training requires a train_dataset.")
        args, dataset = self.args, self.train_dataset
        sampler = UniqueIdBatchSampler(
            dataset.ids,
            dataset.num_captions,
            self._train_batch_size,
            num_processes=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
            captions=args.caption_sampling,
        )
        self.remove_callback(SamplerEpochCallback)
        self.add_callback(SamplerEpochCallback(sampler))
        loader = DataLoader(dataset, batch_sampler=sampler, **self._loader_kwargs())
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | datasets.Dataset | None = None) -> DataLoader:
        """
        Batches of this process's contiguous block of images, with all their captions.

        Args:
            eval_dataset (`str`, [`CaptionedImageDataset`], *optional*):
                Name of one of the trainer's validation sets, or a data set that [`~modeling_pico.data.as_captioned`]
                takes. Defaults to the trainer's only validation set.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("PicoTrainer: evaluation requires an eval_dataset.")
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        return self._eval_loader(as_captioned(dataset))

    def _eval_loader(self, dataset: Any) -> DataLoader:
        return DataLoader(
            dataset,
            sampler=own_rows(len(dataset)),
            batch_size=self.args.eval_batch_size,
            # Else a loader draws from the global generator, and dropout would depend on when one evaluates.
            generator=torch.Generator(),
            # Every evaluation has a loader of its own, whose workers have nothing to wait for afterwards.
            **{**self._loader_kwargs(), "persistent_workers": False},
        )

    def get_test_dataloader(self, test_dataset: Dataset | datasets.Dataset) -> DataLoader:
        """As [`get_eval_dataloader`]."""
        return self.get_eval_dataloader(test_dataset)

    def _loader_kwargs(self) -> dict[str, Any]:
        args = self.args
        kwargs: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        }
        if args.dataloader_num_workers > 0:
            kwargs["worker_init_fn"] = heed_only_parent
            kwargs["persistent_workers"] = args.dataloader_persistent_workers
            kwargs["prefetch_factor"] = args.dataloader_prefetch_factor
            kwargs["multiprocessing_context"] = args.dataloader_multiprocessing_context
        return kwargs

    # Optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups parameters by learning rate (new layers, backbones) and weight decay."""
        model = self.model if model is None else model
        args = self.args
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer_class, optimizer_kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            args, model
        )
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & optimizer_kwargs.keys():
            if args.backbone_learning_rate not in (None, args.learning_rate):
                raise ValueError(
                    f"optim={str(args.optim)!r} groups parameters itself, so backbones cannot have a learning rate of "
                    f"their own; leave backbone_learning_rate out or set it to learning_rate ({args.learning_rate})."
                )
            return super().create_optimizer(model)
        backbone_rate = args.learning_rate / 10 if args.backbone_learning_rate is None else args.backbone_learning_rate
        # Nor are single numbers and thresholds beside the towers pulled to zero, whatever they are called.
        named = dict(model.named_parameters())
        decayed = {
            name
            for name in self.get_decay_parameter_names(model)
            if name in named and (_is_backbone(name) or _num_dimensions(named[name]) > 1)
        }
        groups = []
        # The rate that is logged is that of the first group: new layers.
        for is_backbone in (False, True):
            for decay in (True, False):
                parameters = [
                    parameter
                    for name, parameter in named.items()
                    if parameter.requires_grad and _is_backbone(name) == is_backbone and (name in decayed) == decay
                ]
                if parameters:
                    group: dict[str, Any] = {"params": parameters, "weight_decay": args.weight_decay if decay else 0.0}
                    groups.append({**group, "lr": backbone_rate} if is_backbone else group)
        self.optimizer = optimizer_class(groups, **optimizer_kwargs)
        return self.optimizer

    # Training

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, after which persistent data workers would stay as long as the trainer."""
        try:
            return super().train(*args, **kwargs)
        finally:
            loader = self.callback_handler.train_dataloader
            inner = getattr(loader, "base_dataloader", loader)
            if isinstance(inner, DataLoader):
                inner._iterator = None

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # The model exists for certain only here: `model_init` and hyper-parameter search make a new one each time.
        self._settle_best_metric()
        self.remove_callback(PrototypeCallback)
        self._auxiliary_log.clear()
        model = self._pico_model()
        # Where no embedding is trained they stay as they are, and so do their prototypes.
        prototypes = model.style_prototypes if model.trains_embeddings else None
        if prototypes is not None:
            self._check_prototype_needs()
        self._check_adapter()
        self._report_shared_captions()
        # Learned for the weights as they were.
        if model.config.uncertainty_config is not None:
            model.config.uncertainty_config.pop("reranking", None)
        self.construction = None if prototypes is None else PrototypeConstruction(prototypes, self.args)
        if self.construction is not None:
            pairs_per_step = self.get_total_train_batch_size(self.args)
            self.add_callback(PrototypeCallback(self.construction, pairs_per_step, self._construct))
        if self.is_deepspeed_enabled and self.args.gradient_cache_chunk_size is not None:
            raise ValueError(
                "gradient_cache_chunk_size takes a batch backwards in several parts, which DeepSpeed would count as "
                "batches of their own. Leave it out, or launch with examples/accelerate/ddp.yaml or fsdp.yaml."
            )
        if self.is_deepspeed_enabled and self.args.non_finite_loss == "skip":
            raise ValueError(
                "non_finite_loss='skip' leaves steps out, but DeepSpeed takes them before they can be judged. Leave "
                "it out, or launch with examples/accelerate/ddp.yaml or fsdp.yaml."
            )
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, self.model, self._pico_model())
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _report_shared_captions(self) -> None:
        dataset = self.train_dataset
        if not isinstance(dataset, CaptionedImageDataset) or not self.is_world_process_zero():
            return
        shared = dataset.count_shared_captions()
        if shared:
            logger.warning(
                f"{shared} of {int(dataset.num_captions.sum())} training captions are also the captions of other "
                "images, of other ids. Where such captions meet in a batch, they are no negatives of each other."
            )

    def _check_prototype_needs(self) -> None:
        if self.args.feedback_needs_validation and self.eval_dataset is None:
            raise ValueError(
                f"feedback={self.args.feedback!r} weighs prototypes by validation retrieval and needs an "
                "`eval_dataset`. Give one, or choose feedback='constant'."
            )

    def _check_adapter(self) -> None:
        """An adapter holds what is learned beside the towers only where it is told to."""
        model = self._pico_model()
        # By `peft.get_peft_model`, or in place by `model.add_adapter`.
        if self._unwrapped_model() is model and not model._hf_peft_config_loaded:
            return
        for name, module in model.beside_towers().items():
            learned = {part.split(".")[0] for part in module.state_dict()} - {"visual_projection", "text_projection"}
            if learned and not hasattr(module, "modules_to_save"):
                raise ValueError(
                    f"The adapter would be saved without {', '.join(sorted(learned))} of `{name}`; configure it with "
                    f'`modules_to_save=["{name}"]`.'
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PicoOutput]:
        """
        Loss of this process's pairs against the pairs of all processes. Its mean over processes is the loss of the
        whole batch, and so is its gradient.
        """
        outputs = model(**inputs, return_logits=False)
        loss = self._batch_loss(outputs, inputs, collect=model.training)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As `Trainer.training_step`; with `gradient_cache_chunk_size` the batch is encoded in chunks."""
        chunk_size = self.args.gradient_cache_chunk_size
        if chunk_size is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._step_in_chunks(model, inputs, chunk_size)
        self._finite_loss.note(loss, inputs)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._finite_loss.grad_norm = whole if self.accelerator.scaler is None else None
        return norm

    def _step_in_chunks(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], chunk_size: int
    ) -> torch.Tensor:
        model.train()
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = cached_backward(
                model,
                self._chunks(inputs, chunk_size),
                loss_function=lambda outputs: self._batch_loss(outputs, inputs, collect=True),
                backward=lambda loss: self.accelerator.backward(loss / self.current_gradient_accumulation_steps),
                no_sync=functools.partial(self.accelerator.no_sync, model=model),
            )
        # `Trainer` adds up what the micro-batches of a step return.
        return loss / self.current_gradient_accumulation_steps

    def _chunks(self, inputs: dict[str, torch.Tensor], chunk_size: int) -> list[dict[str, torch.Tensor]]:
        if not self.is_fsdp_enabled:
            return split_inputs(inputs, chunk_size)
        # Each forward gathers weights from all processes, and short last batches differ by a pair between these.
        size = torch.tensor([len(inputs["image_ids"])], device=self.args.device)
        number = -(-int(gather(size).min()) // chunk_size)
        parts = [value.tensor_split(number) for value in inputs.values()]
        return [dict(zip(inputs, values, strict=True)) for values in zip(*parts, strict=True)]

    def _batch_loss(self, outputs: PicoOutput, inputs: dict[str, torch.Tensor], collect: bool) -> torch.Tensor:
        # Batches of another collator need not know their captions.
        ids, caption_codes = inputs["image_ids"], inputs.get("caption_codes")
        if collect and self.construction is not None:
            self.construction.collect(outputs)
        if collect:
            for name, value in (outputs.get("auxiliary_losses") or {}).items():
                self._auxiliary_log.setdefault(name, []).append(value.detach())
        return spread_non_finite(self._pair_loss(outputs, ids, caption_codes))

    def _pair_loss(self, outputs: PicoOutput, ids: torch.Tensor, caption_codes: torch.Tensor | None) -> torch.Tensor:
        batch = gather_batch(outputs, ids, caption_codes, self.args.gather_negatives)
        loss = self._pico_model().pair_loss(
            batch.image_embeds,
            batch.text_embeds,
            batch.image_mask,
            batch.text_mask,
            image_ids=batch.ids,
            caption_codes=batch.caption_codes,
            own=batch.own,
            # Not the model's own: no process holds the whole of a parameter that DeepSpeed has sharded.
            logit_scale=outputs.logit_scale,
            auxiliary_loss=outputs.get("auxiliary_loss"),
            hardest=(self.state.epoch or 0.0) >= self.args.hinge_warmup_epochs,
        )
        # Auxiliary losses are over this process's pairs, which the share weighs like those of the other processes.
        return loss * batch.loss_share

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; the training loss is accompanied by its auxiliary terms and the learned logit scale."""
        scale = self._pico_model().logit_scale
        # No process holds the whole of a parameter that DeepSpeed has sharded.
        if "loss" in logs and isinstance(scale, nn.Parameter) and not self.is_deepspeed_enabled:
            logs["logit_scale"] = float(scale.detach().exp())
        if "loss" in logs and self._auxiliary_log:
            means = torch.stack([torch.stack(values).mean() for values in self._auxiliary_log.values()])
            means = reduce(means, "mean").tolist()
            logs.update({f"{name}_loss": value for name, value in zip(self._auxiliary_log, means, strict=True)})
            self._auxiliary_log.clear()
        super().log(logs, *args, **kwargs)

    # Hyper-parameter search

    def hyperparameter_search(  # type: ignore[override]
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "maximize",
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        r"""
        As `Trainer.hyperparameter_search`, which would minimise the sum of all metrics; here the summed recall (rsum)
        of the first validation set is maximised, 'maximize' being the default direction.

        Args:
            hp_space (`Callable`, *optional*): Draws the options of a trial; names are those of the training arguments.
            compute_objective (`Callable`, *optional*): Number to optimise, from the metrics of an evaluation.
            n_trials (`int`, *optional*, defaults to 20): Number of trainings.
            direction (`str` or list of `str`, *optional*, defaults to `"maximize"`): 'maximize' or 'minimize'.
            kwargs: Passed to `Trainer.hyperparameter_search` (`backend`, `hp_name`, ...).
        """
        if compute_objective is None:
            compute_objective = operator.itemgetter(f"{self._feedback_prefix()}_rsum")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **kwargs)


def _num_dimensions(parameter: nn.Parameter) -> int:
    # DeepSpeed leaves flat what it has sharded.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _is_backbone(name: str) -> bool:
    return ".vision_model." in f".{name}" or ".text_model." in f".{name}"


__all__ = ["PicoTrainer"]
