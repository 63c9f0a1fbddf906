"""Trainer of PICO: the loop of transformers with retrieval losses, retrieval evaluation and staged prototypes."""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_utils import BestRun, EvalLoopOutput
from transformers.utils import is_peft_available, logging

from ..data import CaptionedImageDataset, PicoDataCollator, UniqueIdBatchSampler, as_captioned
from ..data.dataset import count_styles
from ..distributed import gather, gather_batch, gather_object, own_rows, reduce
from ..durable import DurableTrainer, end_with_training_only, spread_non_finite
from ..evaluation.embedding_cache import cached_embeddings
from ..evaluation.evaluator import EncodedRetrieval, RetrievalEvaluator
from ..evaluation.style_alignment import align_encoded, encode_images, measure_gallery
from ..evaluation.style_report import StyleReport
from ..evaluation.style_stress import Captions, StyleStress, can_align
from ..evaluation.uncertainty_reranking import RetrievalUncertainty, learn_reranking
from ..model.backbones_pico import limit_text_length
from ..model.gallery_alignment_pico import MIN_IMAGES, check_sizes, spread_rows
from ..model.modeling_pico import PicoModel, PicoOutput
from ..model.processing_pico import PicoProcessor
from .arguments import PicoTrainingArguments
from .callbacks import BatchNormCallback, LogitScaleCallback, PrototypeCallback, TrainLoaderCallback, UploadCallback
from .construction import PrototypeConstruction
from .gradient_cache import cached_backward, split_inputs
from .model_card import create_model_card
from .sharding import prepare_fsdp
from .tower_cache import TowerStates, as_it_is, cached_states


if is_peft_available():
    from peft.utils import ModulesToSaveWrapper

logger = logging.get_logger(__name__)


# Arguments of `Trainer` that could do nothing here.
_UNUSED_ARGUMENTS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
# Training arguments that a model card names: some of transformers, and PICO's own but for logs, DDP, evaluation and
# the cache of towers.
_CARD_ARGUMENTS = (
    "learning_rate",
    "backbone_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    *(
        name
        for name in PicoTrainingArguments.__annotations__
        if not name.startswith(("logging_", "ddp_", "eval_", "align_", "tower_"))
        and not name.endswith("learning_rate")
    ),
)
# Images, spread evenly over the training set, that say where images of training lie.
_REFERENCE_IMAGES = 512


class PicoTrainer(DurableTrainer):
    r"""
    Trains a [`PicoModel`] for image-text retrieval.

    Adds to `Trainer`: batches in which every meaning occurs once; negatives from all processes; a lower learning rate
    for the backbones; retrieval metrics (`eval_rsum`, `eval_image_to_text_recall_at_1`, ...) from an evaluation that
    encodes once; and, for models with style prototypes, their staged construction.

    A run may be resumed with another number of processes: with as large a batch of all together it ends with the same
    weights and prototypes up to rounding; dropout alone draws other numbers.

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
    # What `Trainer` declares more widely.
    args: PicoTrainingArguments
    train_dataset: Any
    eval_dataset: Any

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
        for name in _UNUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` is not used: PicoTrainer compares the pairs of all processes in its loss (override "
                    "`compute_loss` for another) and ranks the whole evaluation set (for metrics of your own take "
                    "`modeling_pico.RetrievalEvaluator`)."
                )
        if data_collator is None:
            if processing_class is None:
                raise ValueError("PicoTrainer needs a `data_collator` or a `processing_class` to make one from.")
            data_collator = PicoDataCollator(processing_class)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: as_captioned(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = as_captioned(eval_dataset)
        # Of the training in progress, for models with style prototypes.
        self.construction: PrototypeConstruction | None = None
        # What the model card says beyond what the trainer knows; keyword arguments of `create_model_card`.
        self.card_info: dict[str, Any] = {}
        # What the card calls the metrics that evaluations report under these prefixes.
        self.card_split_names: dict[str, str] = {}
        self._card_metrics: dict[str, dict[str, float]] = {}
        # What the frozen towers make of data sets, by their identity, plain and augmented.
        self._tower_states: dict[tuple[int, bool], TowerStates] = {}
        self._tower_states_of: tuple[PicoModel, int] | None = None
        # Auxiliary losses since the last log, by name.
        self._auxiliary_log: dict[str, list[torch.Tensor]] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=None if train_dataset is None else as_captioned(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            non_finite_loss=args.non_finite_loss,
            **kwargs,
        )
        if processing_class is not None:
            limit_text_length(processing_class.tokenizer, self._pico_model().text_model)
        self.evaluator = RetrievalEvaluator(args.eval_num_folds, loss_batch_size=args.per_device_eval_batch_size)
        self.add_callback(LogitScaleCallback)
        self.add_callback(BatchNormCallback)
        self.add_callback(UploadCallback(self.create_model_card))

    def _pico_model(self) -> PicoModel:
        model: Any = self.unwrapped_model()
        if not isinstance(model, PicoModel):
            try:
                # An adapter (PEFT) holds the model one level down.
                model = model.get_base_model()
            except AttributeError:
                raise ValueError(
                    "PicoTrainer trains a PicoModel or a PEFT adapter around one, but `model` is a "
                    f"{type(model).__name__}. Make one with PicoModel.from_backbones or PicoModel.from_pretrained."
                ) from None
        return model

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
        self.remove_callback(TrainLoaderCallback)
        self.add_callback(TrainLoaderCallback(sampler))
        dataset, collate = self._by_towers(dataset, augmented=_is_augmented(dataset))
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **self._loader_kwargs())
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | datasets.Dataset | None = None) -> DataLoader:
        """
        Batches of this process's contiguous block of images, with all their captions, of the trainer's only validation
        set, of one of them by name, or of a data set that [`~modeling_pico.data.as_captioned`] takes.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("PicoTrainer: evaluation requires an eval_dataset.")
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        return self._eval_loader(as_captioned(dataset))

    def _eval_loader(self, dataset: Any, images: torch.Tensor | None = None, run_towers: bool = False) -> DataLoader:
        """Batches of a data set, or of some of its images; with `run_towers` none of kept hidden states."""
        dataset, collate = (dataset, self.data_collator) if run_towers else self._by_towers(dataset)
        if images is not None:
            dataset = Subset(dataset, images.tolist())
        return DataLoader(
            dataset,
            sampler=own_rows(len(dataset)),
            batch_size=self.args.eval_batch_size,
            collate_fn=collate,
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
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        }
        if args.dataloader_num_workers > 0:
            kwargs["worker_init_fn"] = end_with_training_only
            kwargs["persistent_workers"] = args.dataloader_persistent_workers
            kwargs["prefetch_factor"] = args.dataloader_prefetch_factor
            kwargs["multiprocessing_context"] = args.dataloader_multiprocessing_context
        return kwargs

    def _by_towers(self, dataset: Any, augmented: bool = False) -> tuple[Any, Callable]:
        """A data set and what makes a batch of its samples; with `tower_cache_dir` what frozen towers make of it."""
        if self.args.tower_cache_dir is None:
            return dataset, self.data_collator
        model = self._pico_model()
        trained = [
            name
            for name, tower in (("vision", model.vision_model), ("text", model.text_model))
            if any(parameter.requires_grad for parameter in tower.parameters())
        ]
        if trained:
            raise ValueError(
                f"tower_cache_dir keeps what frozen towers give, but trained: {', '.join(trained)}. Freeze it "
                f"({', '.join(f'--freeze_{name}' for name in trained)}), or leave tower_cache_dir out."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "tower_cache_dir runs whole towers, which FSDP and DeepSpeed shard. What is left to train is small: "
                "launch with examples/accelerate/ddp.yaml, or leave tower_cache_dir out."
            )
        # Another model, or other weights in it.
        towers = (model.vision_model, model.text_model)
        tensors = [tensor for tower in towers for tensor in (*tower.parameters(), *tower.buffers())]
        state = model, sum(tensor._version for tensor in tensors)
        if self._tower_states_of != state:
            self._tower_states, self._tower_states_of = {}, state
        key = id(dataset), augmented  # no other object's: the states hold the data set
        if key not in self._tower_states:
            with self.accelerator.autocast():
                self._tower_states[key] = cached_states(
                    self.args.tower_cache_dir,
                    model,
                    dataset,
                    self.data_collator,
                    batch_size=self.args.eval_batch_size,
                    num_views=self.args.tower_cache_views if augmented else None,
                    precision=f"{self.accelerator.mixed_precision}, tf32 {self.args.tf32}",
                )
        return self._tower_states[key], as_it_is

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in `Trainer`; nor are single numbers and thresholds beside the towers pulled to zero."""
        named = dict(model.named_parameters())
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if name in named and (_is_backbone(name) or _num_dimensions(named[name]) > 1)
        ]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with a learning rate of their own for the backbones."""
        model = self.model if model is None else model
        args = self.args
        if self.optimizer is not None:
            return super().create_optimizer(model)
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
            if args.backbone_learning_rate not in (None, args.learning_rate):
                raise ValueError(
                    f"optim={str(args.optim)!r} groups parameters itself, so backbones cannot have a learning rate of "
                    f"their own; leave backbone_learning_rate out or set it to learning_rate ({args.learning_rate})."
                )
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        backbone_rate = args.learning_rate / 10 if args.backbone_learning_rate is None else args.backbone_learning_rate
        backbone = {parameter for name, parameter in model.named_parameters() if _is_backbone(name)}
        groups, optimizer.param_groups = optimizer.param_groups, []
        # The rate that is logged is that of the first group: new layers.
        for is_backbone in (False, True):
            for group in groups:
                own = [parameter for parameter in group["params"] if (parameter in backbone) == is_backbone]
                if own:
                    rate = backbone_rate if is_backbone else group["lr"]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    # Training

    # Needs the model, which `model_init` makes anew each time, and the state of a checkpoint, before the model is
    # wrapped; no callback lies there.
    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._choose_best_metric()
        self._auxiliary_log.clear()
        model = self._pico_model()
        model.freeze_batch_norm = self.args.freeze_batch_norm
        # Where no embedding is trained they stay as they are, and so do their prototypes.
        prototypes = model.style_prototypes if model.trains_embeddings else None
        if prototypes is not None and self.args.feedback_needs_validation and self.eval_dataset is None:
            raise ValueError(
                f"feedback={self.args.feedback!r} weighs prototypes by validation retrieval and needs an "
                "`eval_dataset`. Give one, or choose feedback='constant'."
            )
        self._check_adapter(model)
        self._report_shared_captions()
        # Measured and learned for the weights as they were.
        model.image_moments.reset()
        if model.config.uncertainty_config is not None:
            model.config.uncertainty_config.pop("reranking", None)
        self.remove_callback(PrototypeCallback)
        self.construction = None if prototypes is None else PrototypeConstruction(prototypes, self.args)
        if self.construction is not None:
            pairs_per_step = self.get_total_train_batch_size(self.args)
            self.add_callback(PrototypeCallback(self.construction, pairs_per_step, self._construct))
        if self.is_deepspeed_enabled and self.args.gradient_cache_chunk_size is not None:
            raise ValueError(
                "gradient_cache_chunk_size takes a batch backwards in several parts, which DeepSpeed would count as "
                "batches of their own. Leave it out, or launch with examples/accelerate/ddp.yaml or fsdp.yaml."
            )
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, self.model, model)
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

    def _check_adapter(self, model: PicoModel) -> None:
        """An adapter holds what is learned beside the towers only where it is told to."""
        # By `peft.get_peft_model`, or in place by `model.add_adapter`.
        if self.unwrapped_model() is model and not model._hf_peft_config_loaded:
            return
        for name, module in model.beside_towers().items():
            if module is model.image_moments:  # which are measured again, not learned
                continue
            learned = {part.split(".")[0] for part in module.state_dict()} - {"visual_projection", "text_projection"}
            if learned and not isinstance(module, ModulesToSaveWrapper):
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
            return super().training_step(model, inputs, num_items_in_batch)
        loss = self._step_in_chunks(model, inputs, chunk_size)
        self._finite_loss.note(loss, inputs)
        return loss

    def describe_batches(self, batches: list[dict[str, Any]]) -> str:
        """Names the images of batches whose loss is not finite, and those whose pixels are not."""
        pixels: list[int] = []
        for inputs in batches:
            images = inputs["pixel_values"] if "pixel_values" in inputs else inputs["image_states"]
            finite = images.flatten(1).isfinite().all(dim=1)
            pixels += inputs["image_ids"][~finite].tolist()
        ids = gather_object([code for inputs in batches for code in inputs["image_ids"].tolist()])
        pixels = gather_object(pixels)
        if pixels:
            reason = f"Not finite are the pixels of {self._image_names(pixels)}."
        else:
            reason = f"Their pixels are finite: {super().describe_batches(batches)}"
        return f"Images of its batch, by image_id: {self._image_names(ids)}. {reason}"

    def _image_names(self, codes: list[int]) -> str:
        dataset = self.train_dataset
        names = dataset.image_names(codes) if isinstance(dataset, CaptionedImageDataset) else codes
        return ", ".join(map(repr, names))

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

    # State

    def checkpoint_state(self, folder: str) -> dict[str, Any]:
        """The auxiliary losses since the last log, and, in a file of its own, the state of the construction."""
        if self.construction is not None and self.args.should_save:
            self.construction.save(folder)
        return {name: [float(value) for value in values] for name, values in self._auxiliary_log.items()}

    def load_checkpoint_state(self, folder: str, states: list[dict[str, Any]]) -> None:
        """Takes up what [`checkpoint_state`] left."""
        if self.construction is not None:
            self.construction.load(folder)
        for state in states:
            for name, values in state.items():
                self._auxiliary_log.setdefault(name, []).extend(torch.tensor(values, device=self.args.device))

    # Evaluation

    def _choose_best_metric(self) -> None:
        """Completes the name of the metric that tells the best checkpoint; refuses one that training cannot change."""
        args, state = self.args, self.state
        stops_early = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        if args.metric_for_best_model is None and stops_early:
            args.choose_best_metric()
        if args.metric_for_best_model is None:
            return
        metric = args.metric_for_best_model.removeprefix("eval_")
        if isinstance(self.eval_dataset, dict) and not metric.startswith(
            tuple(f"{name}_" for name in self.eval_dataset)
        ):
            metric = f"{self._feedback_dataset()}_{metric}"
        args.metric_for_best_model = metric
        if not self._pico_model().trains_embeddings and not metric.endswith("_aurc"):
            raise ValueError(
                f"metric_for_best_model={metric!r} cannot tell which checkpoint is the best: it stays as it is where "
                "no embedding is trained. Choose 'image_to_text_aurc' or 'text_to_image_aurc'."
            )
        found = [entry[f"eval_{metric}"] for entry in state.log_history if f"eval_{metric}" in entry]
        if state.best_metric is not None and state.best_metric not in found:
            logger.warning(
                f"The best value so far, {state.best_metric:g}, is not one of {metric!r}: the run was started with "
                "another metric_for_best_model. Which checkpoint is the best is judged anew from here on."
            )
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _feedback_dataset(self) -> str | None:
        return next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None

    def _feedback_prefix(self) -> str:
        name = self._feedback_dataset()
        return "eval" if name is None else f"eval_{name}"

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Encodes every image and caption once and measures retrieval over the whole set. Predictions, from
        `Trainer.predict`, are the score matrix `(images, texts)`.
        """
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        model = self._pico_model()
        aligns = self.args.align_gallery and not self.is_in_train
        if aligns:
            model.image_moments.check_fitted()
        encoded = self._encode(dataloader)
        scores = None if prediction_loss_only else self.evaluator.score(model, encoded)
        metrics = self.evaluator.metrics(model, encoded)
        if aligns:
            aligned = self.evaluator.retrieval_metrics(model, self._align(dataloader, encoded))
            metrics.update({f"aligned_{name}": value for name, value in aligned.items()})
        folds = self.evaluator.num_folds
        gallery = {"images": len(encoded.image_ids) // folds, "texts": len(encoded.text_ids) // folds}
        self._card_metrics[metric_key_prefix] = {**metrics, **gallery}
        construction = self.construction
        if construction is not None and self.is_in_train and metric_key_prefix == self._feedback_prefix():
            if construction.due:
                self._construct(encoded, metrics["rsum"])
            construction.previous_rsum = metrics["rsum"]
        predictions: Any = None if scores is None else scores.cpu().numpy()
        return EvalLoopOutput(
            predictions=predictions,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(encoded.image_ids),
        )

    def learn_uncertainty_reranking(self, eval_dataset: Dataset | datasets.Dataset | None = None) -> dict[str, float]:
        """
        Learns by which weights the uncertainty re-ranks scores, see [`~modeling_pico.evaluation.learn_reranking`], on
        validation data (the first set of the trainer), and puts them into the model's configuration: evaluations then
        report re-ranked metrics beside the plain ones. Returns them; ValueError for a model without uncertainty.
        """
        model = self._pico_model()
        dataset: Any = self._feedback_dataset() if eval_dataset is None else eval_dataset
        encoded = self._encode(self.get_eval_dataloader(dataset))
        uncertainty = RetrievalUncertainty.measure(model, encoded)
        if uncertainty is None:
            raise ValueError("The model has no uncertainty to re-rank by; train one with an `uncertainty_config`.")
        scores = self.evaluator.score(model, encoded)
        of_sides = uncertainty.images, uncertainty.texts
        learned = learn_reranking(scores, encoded.image_ids, encoded.text_ids, *of_sides).to_dict()
        model.config.uncertainty_config = {**(model.config.uncertainty_config or {}), "reranking": learned}
        return {f"uncertainty_reranking_{name}": value for name, value in learned.items()}

    def measure_styles(
        self, dataset: Dataset | datasets.Dataset, seen_styles: Sequence[str] | None = None
    ) -> StyleReport:
        """As [`~modeling_pico.measure_styles`], in the precision and on the processes of this trainer."""
        captioned: Any = as_captioned(dataset)
        model, loader = self._pico_model(), self.get_eval_dataloader(captioned)
        encoded = self._encode(loader)
        aligned = self._align(loader, encoded, leave_small=True) if model.image_moments.is_fitted else None
        report = StyleReport.from_encoded(
            model, encoded, captioned.styles, captioned.num_captions, seen_styles, aligned=aligned
        )
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, report.metrics())
        return report

    def fit_alignment(self, reference: Dataset | datasets.Dataset | None = None) -> None:
        """
        Measures where images of training lie in the trained image tower, as [`PicoModel.fit_alignment`] does,
        in the precision and on the processes of this trainer: on up to 512 images without augmentation, spread evenly
        over the training set or over `reference`. The model holds them until it is trained again. A set of fewer than
        32 images has no moments, which is a warning.
        """
        dataset: Any = as_captioned(self.train_dataset if reference is None else reference)
        images = min(len(dataset), _REFERENCE_IMAGES)
        if images < MIN_IMAGES:
            logger.warning(
                f"No gallery can be moved to where images of training lie: there are {images} of them, and their mean "
                f"and spread need at least {MIN_IMAGES}."
            )
            return
        if self.unwrapped_model() is not self._pico_model():
            logger.warning(
                "Where images of training lie is not saved with an adapter: call `fit_alignment` after loading it, or "
                "merge it into the model."
            )
        # Not of kept hidden states: layers of the tower are measured too.
        rows = torch.tensor(spread_rows([None] * len(dataset), images))
        loader = self._eval_loader(dataset, rows, run_towers=True)
        model, num_batches = self._evaluated_model(loader)
        self._pico_model().image_moments.fit(measure_gallery(model, loader, num_batches=num_batches))

    def _align(self, dataloader: DataLoader, encoded: EncodedRetrieval, leave_small: bool = False) -> EncodedRetrieval:
        """The same set with the images of each of its styles moved to those of training."""
        dataset: Any = dataloader.dataset
        if isinstance(dataset, TowerStates):
            dataset = dataset.dataset
            dataloader = self._eval_loader(dataset, run_towers=True)
        model, num_batches = self._evaluated_model(dataloader)
        styles = dataset.styles if isinstance(dataset, CaptionedImageDataset) else None
        if not leave_small:
            check_sizes(count_styles(dataset))

        def align() -> EncodedRetrieval:
            return align_encoded(
                model,
                encoded,
                dataloader,
                styles,
                leave_small=leave_small,
                num_batches=num_batches,
            )

        return self._cached(dataloader, align, aligned=True)

    def measure_style_stress(
        self, dataset: Dataset | datasets.Dataset, looks: Sequence[str] = (), captions: Captions | None = None
    ) -> StyleStress:
        """As [`~modeling_pico.measure_style_stress`], in the precision and on the processes of this trainer."""

        def images(data: CaptionedImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
            loader = self._eval_loader(data)
            model, num_batches = self._evaluated_model(loader)
            return encode_images(model, loader, num_batches)

        def align(data: CaptionedImageDataset, encoded: EncodedRetrieval) -> EncodedRetrieval:
            return self._align(self._eval_loader(data), encoded, leave_small=True)

        captioned: Any = as_captioned(dataset)
        stress = StyleStress.measure(
            self._pico_model(),
            captioned,
            looks,
            captions,
            encode=lambda data: self._encode(self._eval_loader(data)),
            encode_images=images,
            align=align if can_align(self._pico_model(), captioned) else None,
            evaluator=self.evaluator,
        )
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, stress.metrics())
        return stress

    def _encode(self, dataloader: DataLoader) -> EncodedRetrieval:
        model, num_batches = self._evaluated_model(dataloader)
        self.callback_handler.eval_dataloader = dataloader

        def encode() -> EncodedRetrieval:
            return self.evaluator.encode(
                model,
                dataloader,
                num_batches=num_batches,
                on_batch=lambda: self.callback_handler.on_prediction_step(self.args, self.state, self.control),
            )

        return self._cached(dataloader, encode)

    def _evaluated_model(self, dataloader: DataLoader) -> tuple[nn.Module, int]:
        """The model in evaluation mode as it runs on these processes, and the batches of the longest block."""
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            # Evaluation without training: precision and sharding still have to be set up.
            # (Whole on every process: what FSDP shards, it shards together with an optimizer.)
            model = self.accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        if isinstance(self.optimizer, AcceleratedOptimizer):
            # Schedule-free optimizers evaluate other weights than they train.
            self.optimizer.eval()
        longest = -(-len(dataloader.dataset) // self.args.world_size)  # type: ignore[arg-type]
        return model.eval(), math.ceil(longest / self.args.eval_batch_size)

    def _cached(
        self, dataloader: DataLoader, encode: Callable[[], EncodedRetrieval], aligned: bool = False
    ) -> EncodedRetrieval:
        # In training the weights change from one evaluation to the next. What frozen towers give is kept already.
        if self.is_in_train or self.args.eval_cache_dir is None or isinstance(dataloader.dataset, TowerStates):
            return encode()
        precision = f"{self.accelerator.mixed_precision}, tf32 {self.args.tf32}"
        return cached_embeddings(
            self.args.eval_cache_dir, self._pico_model(), dataloader, encode, precision=precision, aligned=aligned
        )

    # Construction of the prototypes

    def _construct(self, encoded: EncodedRetrieval | None = None, rsum: float | None = None) -> None:
        """Builds prototypes. Feedback comes from the first validation set, encoded here unless it has just been."""
        construction: Any = self.construction
        if not self.args.feedback_needs_validation:
            self.log(construction.propose())
            return
        name = self._feedback_dataset()
        dataset = self.eval_dataset if name is None else self.eval_dataset[name]
        images = construction.feedback_images(len(dataset if encoded is None else encoded.image_ids))
        if encoded is None:
            # For the construction alone: neither the log nor the choice of the best checkpoint sees it.
            encoded = self._encode(self._eval_loader(dataset, images))
        elif images is not None:
            encoded, rsum = encoded.subset(images), None
        # One gallery: folds of a part would be too small to tell prototypes apart.
        evaluator = self.evaluator if images is None else RetrievalEvaluator()

        def score() -> float:
            return evaluator.retrieval_metrics(self._pico_model(), encoded)["rsum"]

        self.log(construction.propose(score, rsum))

    # Publishing

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, **kwargs: Any
    ) -> None:
        """
        Writes the model card (`README.md`) into the output folder. `language` is that of the captions; further
        `kwargs` of `Trainer.create_model_card` are not used: the card takes the rest from the run itself.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        training = {name: getattr(args, name) for name in _CARD_ARGUMENTS}
        training["lr_scheduler_type"] = transformers.SchedulerType(args.lr_scheduler_type).value
        card = create_model_card(
            model_id=self.hub_model_id or args.hub_model_id or str(args.output_dir),
            config=self._pico_model().config,
            training={**training, "processes": args.world_size},
            stage_log=[entry for entry in self.state.log_history if "prototype_stage" in entry],
            metrics={self.card_split_names.get(name, name): values for name, values in self._card_metrics.items()},
            num_folds=self.evaluator.num_folds,
            framework_versions={module.__name__: module.__version__ for module in (transformers, torch, datasets)},
            language=language,
            license=license,
            **self.card_info,
        )
        card.save(os.path.join(str(args.output_dir), "README.md"))

    # Hyper-parameter search

    def hyperparameter_search(  # type: ignore[override]
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "maximize",
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """
        As `Trainer.hyperparameter_search`, which would minimise the sum of all metrics; here the summed recall (rsum)
        of the first validation set is maximised, 'maximize' being the default direction.
        """
        if compute_objective is None:
            compute_objective = operator.itemgetter(f"{self._feedback_prefix()}_rsum")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **kwargs)


def _is_augmented(dataset: Any) -> bool:
    if not isinstance(dataset, CaptionedImageDataset):
        return False
    transform = dataset.transform
    return any(transform) if isinstance(transform, list) else transform is not None


def _num_dimensions(parameter: nn.Parameter) -> int:
    # DeepSpeed leaves flat what it has sharded.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _is_backbone(name: str) -> bool:
    return ".vision_model." in f".{name}" or ".text_model." in f".{name}"


__all__ = ["PicoTrainer"]
