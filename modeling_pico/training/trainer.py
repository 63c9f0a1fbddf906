"""Trainer of PICO: the loop of transformers with retrieval losses, retrieval evaluation and staged prototypes."""

from __future__ import annotations

import functools
import math
import operator
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import BestRun, EvalLoopOutput, HubStrategy
from transformers.utils import logging

from ..data import CaptionedImageDataset, PicoDataCollator, UniqueIdBatchSampler
from ..evaluation.embedding_cache import cache_key, load_embeddings, save_embeddings
from ..evaluation.evaluator import EncodedRetrieval, RetrievalEvaluator, gather_rows, own_rows
from ..evaluation.style_report import StyleReport
from ..loss_pico import image_text_loss
from ..model_card import create_model_card
from ..modeling_pico import PicoModel, PicoOutput
from ..processing_pico import PicoProcessor
from ..prototypes_pico import sign_shares
from ..scoring_pico import pair_scores
from .arguments import PicoTrainingArguments
from .callbacks import LogitScaleCallback, PrototypeCallback, SamplerEpochCallback
from .distributed import gather_batch
from .gradient_cache import cached_backward, split_inputs
from .staging import PrototypeConstruction


logger = logging.get_logger(__name__)

# Training arguments that a model card names.
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
    "caption_sampling",
    "prototype_start",
    "prototype_update_start",
    "prototype_schedule",
    "reservoir_pairs",
    "feedback",
    "feedback_images",
    "feedback_kappa",
)


class PicoTrainer(Trainer):
    r"""
    Trains a [`PicoModel`] for image-text retrieval.

    Adds to `Trainer`: batches in which every meaning occurs once; negatives from all processes; a lower learning rate
    for the backbones; retrieval metrics (`eval_rsum`, `eval_image_to_text_recall_at_1`, ...) from an evaluation that
    encodes once; and, for models with style prototypes, their staged construction.

    Args:
        model ([`PicoModel`], *optional*): The model, or give `model_init`.
        args ([`PicoTrainingArguments`], *optional*): Training arguments.
        data_collator ([`PicoDataCollator`], *optional*): Made from `processing_class` by default.
        train_dataset ([`CaptionedImageDataset`], *optional*): Training pairs.
        eval_dataset ([`CaptionedImageDataset`] or `dict` of them, *optional*):
            Validation sets. The first one gives the performance feedback.
        processing_class ([`PicoProcessor`], *optional*): Saved beside the model.
        kwargs: Passed to `Trainer` (`callbacks`, `optimizers`, `model_init`, ...).
    """

    # What `Trainer` declares more widely.
    args: PicoTrainingArguments
    model: nn.Module
    train_dataset: Any
    eval_dataset: Any
    # The loss is a mean over the batch, so `Trainer` divides it by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: PicoTrainingArguments | None = None,
        data_collator: PicoDataCollator | None = None,
        train_dataset: CaptionedImageDataset | None = None,
        eval_dataset: CaptionedImageDataset | dict[str, CaptionedImageDataset] | None = None,
        processing_class: PicoProcessor | None = None,
        **kwargs: Any,
    ):
        args = PicoTrainingArguments("trainer_output") if args is None else args
        if not isinstance(args, PicoTrainingArguments):
            raise ValueError(f"`args` must be PicoTrainingArguments, but got {type(args).__name__}.")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "`compute_metrics` is not used: PicoTrainer computes retrieval metrics over the whole evaluation set. "
                "Use `modeling_pico.RetrievalEvaluator` for metrics of your own."
            )
        if data_collator is None:
            if processing_class is None:
                raise ValueError("PicoTrainer needs a `data_collator` or a `processing_class` to make one from.")
            data_collator = PicoDataCollator(processing_class)
        self.construction: PrototypeConstruction | None = None
        # What the model card says beyond what the trainer knows; keyword arguments of `create_model_card`.
        self.card_info: dict[str, Any] = {}
        # What the card calls the metrics that evaluations report under these prefixes.
        self.card_split_names: dict[str, str] = {}
        self._card_metrics: dict[str, dict[str, float]] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.evaluator = RetrievalEvaluator(args.eval_num_folds, loss_batch_size=args.per_device_eval_batch_size)
        self.add_callback(LogitScaleCallback)

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

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Batches of this process's contiguous block of images, with all their captions."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("PicoTrainer: evaluation requires an eval_dataset.")
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        return DataLoader(
            dataset,
            sampler=own_rows(len(dataset)),
            batch_size=self.args.eval_batch_size,
            # Else a loader draws from the global generator, and dropout would depend on when one evaluates.
            generator=torch.Generator(),
            **self._loader_kwargs(),
        )

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
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
            kwargs["persistent_workers"] = args.dataloader_persistent_workers
            kwargs["prefetch_factor"] = args.dataloader_prefetch_factor
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
        decayed = set(self.get_decay_parameter_names(model))
        groups = []
        # The rate that is logged is that of the first group: new layers.
        for is_backbone in (False, True):
            for decay in (True, False):
                parameters = [
                    parameter
                    for name, parameter in model.named_parameters()
                    if parameter.requires_grad
                    and _is_backbone(name) == is_backbone
                    and (name in decayed and parameter.dim() > 0) == decay
                ]
                if parameters:
                    group: dict[str, Any] = {"params": parameters, "weight_decay": args.weight_decay if decay else 0.0}
                    groups.append({**group, "lr": backbone_rate} if is_backbone else group)
        self.optimizer = optimizer_class(groups, **optimizer_kwargs)
        return self.optimizer

    # Training

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # The model exists for certain only here: `model_init` and hyper-parameter search make a new one each time.
        self.remove_callback(PrototypeCallback)
        prototypes = self._pico_model().style_prototypes
        if prototypes is not None:
            self._check_prototype_needs()
        self.construction = None if prototypes is None else PrototypeConstruction(prototypes, self.args)
        if self.construction is not None:
            self.add_callback(PrototypeCallback(self.construction))
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _check_prototype_needs(self) -> None:
        if self.args.feedback_needs_validation and self.eval_dataset is None:
            raise ValueError(
                f"feedback={self.args.feedback!r} weighs prototypes by validation retrieval and needs an "
                "`eval_dataset`. Give one, or choose `feedback` from 'ema', 'uniform', 'latest'."
            )
        model = self._pico_model()
        if self.accelerator.unwrap_model(self.model) is not model and not hasattr(
            model.alignment_head, "modules_to_save"
        ):
            raise ValueError(
                "The adapter would be saved without the style prototypes, which lie in `alignment_head`; configure it "
                'with `modules_to_save=["alignment_head"]`.'
            )

    def _pico_model(self) -> PicoModel:
        model = self.accelerator.unwrap_model(self.model)
        # An adapter (PEFT) holds the model one level down.
        return model if isinstance(model, PicoModel) else model.get_base_model()

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
        loss = self._batch_loss(outputs, inputs["image_ids"], collect=model.training)
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
        model.train()
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = cached_backward(
                model,
                split_inputs(inputs, chunk_size),
                loss_function=lambda outputs: self._batch_loss(outputs, inputs["image_ids"], collect=True),
                backward=lambda loss: self.accelerator.backward(loss / self.current_gradient_accumulation_steps),
                no_sync=functools.partial(self.accelerator.no_sync, model=model),
            )
        # `Trainer` adds up what the micro-batches of a step return.
        return loss / self.current_gradient_accumulation_steps

    def _batch_loss(self, outputs: PicoOutput, ids: torch.Tensor, collect: bool) -> torch.Tensor:
        if collect and self.construction is not None:
            self._collect(self.construction, outputs, ids)
        gathers = self.args.gather_negatives and self.args.world_size > 1
        return self._gathered_loss(outputs, ids) if gathers else self._local_loss(outputs, ids)

    def _loss_kwargs(self, outputs: PicoOutput) -> dict[str, Any]:
        config = self._pico_model().config
        epoch = self.state.epoch or 0.0
        return {
            "loss_type": config.loss_type,
            "logit_scale": outputs.logit_scale,
            "margin": config.margin,
            "hardest": epoch >= self.args.hinge_warmup_epochs,
        }

    def _local_loss(self, outputs: PicoOutput, ids: torch.Tensor) -> torch.Tensor:
        slope = self._pico_model().config.negative_slope
        scores = pair_scores(
            outputs["image_embeds"],
            outputs["text_embeds"],
            outputs["image_mask"],
            outputs["text_mask"],
            negative_slope=slope,
        )
        return image_text_loss(scores, scores.T, image_ids=ids, **self._loss_kwargs(outputs))

    def _gathered_loss(self, outputs: PicoOutput, ids: torch.Tensor) -> torch.Tensor:
        slope = self._pico_model().config.negative_slope
        batch = gather_batch(outputs, ids)
        own = batch.own
        # Own rows and own columns only: scoring all pairs on every process would repeat the work.
        per_image = pair_scores(
            batch.image_embeds[own], batch.text_embeds, batch.image_mask[own], batch.text_mask, negative_slope=slope
        )
        per_text = pair_scores(
            batch.image_embeds, batch.text_embeds[own], batch.image_mask, batch.text_mask[own], negative_slope=slope
        ).T
        loss = image_text_loss(
            per_image, per_text, image_ids=ids, all_ids=batch.ids, offset=own.start, **self._loss_kwargs(outputs)
        )
        return loss * batch.loss_share

    @torch.no_grad()
    def _collect(self, construction: PrototypeConstruction, outputs: PicoOutput, ids: torch.Tensor) -> None:
        """Hands the construction what it needs of this batch: nothing, sign shares, or sign shares and columns."""
        step = self.state.global_step
        if not construction.needs_statistics(step):
            return
        image_tokens, image_mask = outputs["image_tokens"].detach(), outputs["image_mask"]
        text_tokens, text_mask = outputs["text_tokens"].detach(), outputs["text_mask"]
        valid = image_mask.any(dim=1) & text_mask.any(dim=1)
        # Two collectives in place of four.
        shares = torch.cat([sign_shares(image_tokens, image_mask), sign_shares(text_tokens, text_mask)], dim=1)
        image_shares, text_shares = gather_rows(shares).chunk(2, dim=1)
        all_valid, all_ids = gather_rows(torch.stack([valid.to(ids), ids], dim=1)).unbind(dim=1)
        construction.collect_statistics(image_shares, text_shares, all_valid.bool(), all_ids)
        # Not `len(ids)`: shorter last batches may differ between processes, which must decide alike.
        pairs_per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        if construction.needs_columns(step, pairs_per_step):
            prototypes = construction.prototypes
            construction.collect_columns(
                gather_rows(prototypes.columns(image_tokens, image_mask, "image")[valid]),
                gather_rows(prototypes.columns(text_tokens, text_mask, "text")[valid]),
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; the training loss is accompanied by the logit scale, where it is learned."""
        scale = self._pico_model().logit_scale
        # No process holds the whole of a sharded parameter.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if "loss" in logs and isinstance(scale, nn.Parameter) and not sharded:
            logs["logit_scale"] = float(scale.detach().exp())
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        construction = self.construction
        # `Trainer` takes what the construction logs for the log of this step, and would leave the loss out.
        should_log = self.control.should_log
        if construction is not None and construction.due:
            if not self.args.feedback_needs_validation:
                self.log(construction.propose())
            elif not self.control.should_evaluate:
                # No evaluation of the trainer's falls here; this one feeds the construction alone and leaves the
                # choice of the best checkpoint untouched.
                name = self._feedback_dataset()
                dataset = self.eval_dataset if name is None else self.eval_dataset[name]
                images = construction.feedback_images(len(dataset))
                dataset = dataset if images is None else Subset(dataset, images.tolist())
                encoded = self._encode(self.get_eval_dataloader(dataset))
                self._propose(construction, encoded, self.evaluator if images is None else RetrievalEvaluator())
        self.control.should_log = should_log
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # Evaluation

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
        Encodes every image and caption once and measures retrieval over the whole set.

        Returns metrics under `{metric_key_prefix}_rsum`, `..._image_to_text_recall_at_1` and so on, and, from
        `Trainer.predict`, the score matrix `(images, texts)` as predictions.
        """
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        encoded = self._encode(dataloader)
        model = self._pico_model()
        scores = None if prediction_loss_only else self.evaluator.score(model, encoded)
        metrics = self.evaluator.metrics(model, encoded, scores)
        self._card_metrics[metric_key_prefix] = metrics
        construction = self.construction
        if construction is not None and self.is_in_train and metric_key_prefix == self._feedback_prefix():
            if construction.due:
                images = construction.feedback_images(len(encoded.image_ids))
                if images is None:
                    self._propose(construction, encoded, self.evaluator, metrics["rsum"])
                else:
                    # One gallery: folds of it would be too small to tell prototypes apart.
                    self._propose(construction, encoded.subset(images), RetrievalEvaluator())
            construction.observe(metrics["rsum"])
        predictions: Any = None if scores is None else scores.cpu().numpy()
        return EvalLoopOutput(
            predictions=predictions,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(encoded.image_ids),
        )

    def measure_styles(self, dataset: CaptionedImageDataset, seen_styles: Sequence[str] | None = None) -> StyleReport:
        """As [`~modeling_pico.measure_styles`], in the precision and on the processes of this trainer."""
        encoded = self._encode(self.get_eval_dataloader(dataset))
        report = StyleReport.from_encoded(
            self._pico_model(), encoded, dataset.styles, dataset.num_captions, seen_styles
        )
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, report.metrics())
        return report

    def _encode(self, dataloader: DataLoader) -> EncodedRetrieval:
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            # Evaluation without training: precision and sharding still have to be set up.
            model = (
                self.accelerator.prepare(model)
                if self.is_fsdp_enabled
                else self.accelerator.prepare_model(model, evaluation_mode=True)
            )
        if isinstance(self.optimizer, AcceleratedOptimizer):
            # Schedule-free optimizers evaluate other weights than they train.
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader
        # In training the weights change from one evaluation to the next.
        folder = None if self.is_in_train else self.args.eval_cache_dir
        if folder is None:
            return self._encode_anew(model, dataloader)
        key = cache_key(self._pico_model(), dataloader)
        encoded = load_embeddings(folder, key, self.args.device)
        if encoded is None:
            save_embeddings(self._encode_anew(model, dataloader), folder, key)
            # Read back, so that this evaluation and the next give the same numbers.
            encoded = load_embeddings(folder, key, self.args.device)
            assert encoded is not None
        return encoded

    def _encode_anew(self, model: nn.Module, dataloader: DataLoader) -> EncodedRetrieval:
        dataset: Any = dataloader.dataset
        longest = -(-len(dataset) // self.args.world_size)
        return self.evaluator.encode(
            model,
            dataloader,
            num_batches=math.ceil(longest / self.args.eval_batch_size),
            on_batch=self._on_prediction_step,
        )

    def _on_prediction_step(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _propose(
        self,
        construction: PrototypeConstruction,
        encoded: EncodedRetrieval,
        evaluator: RetrievalEvaluator,
        rsum: float | None = None,
    ) -> None:
        model = self._pico_model()

        def score() -> float:
            return evaluator.retrieval_metrics(model, encoded)["rsum"]

        # The gain compares two scores of the same images.
        self.log(construction.propose(score() if rsum is None else rsum, score))

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._load_weights(best):
            super()._load_best_model()

    def _load_weights(self, folder: str) -> bool:
        # Files name the weights of some backbones (ViT) as older releases of transformers did. `from_pretrained`
        # translates; the plain `load_state_dict` of `Trainer` would leave those weights out with a mere warning.
        if not isinstance(self.model, PicoModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        logger.info(f"Loading model from {folder}.")
        self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
        return True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.construction is not None and self.args.should_save:
            self.construction.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.construction is not None and checkpoint is not None:
            self.construction.load(checkpoint)

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

    # Card and Hub

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As `Trainer._push_from_checkpoint`, which leaves out the code the weights load with, and the card."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            job = self.push_in_progress
            # Files that a running upload reads stay as they are; `Trainer` leaves this upload out then.
            if self.args.hub_always_push or job is None or job.is_done():
                for file in Path(checkpoint_folder).glob("*.py"):
                    shutil.copy(file, str(self.args.output_dir))
                self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, **kwargs: Any
    ) -> None:
        r"""
        Writes the model card (`README.md`) into the output folder.

        Args:
            language (`str`, *optional*): Language of the captions.
            license (`str`, *optional*): Licence of the model.
            kwargs: Accepted for compatibility with `Trainer`; the card takes the rest from the run itself.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        training = {name: getattr(args, name) for name in _CARD_ARGUMENTS}
        training["lr_scheduler_type"] = transformers.SchedulerType(args.lr_scheduler_type).value
        card = create_model_card(
            model_id=args.hub_model_id or str(args.output_dir),
            config=self._pico_model().config,
            training={**training, "processes": args.world_size},
            stage_log=[entry for entry in self.state.log_history if "prototype_stage" in entry],
            metrics={self.card_split_names.get(name, name): values for name, values in self._card_metrics.items()},
            framework_versions={module.__name__: module.__version__ for module in (transformers, torch, datasets)},
            language=language,
            license=license,
            **self.card_info,
        )
        card.save(os.path.join(str(args.output_dir), "README.md"))


def _is_backbone(name: str) -> bool:
    return ".vision_model." in f".{name}" or ".text_model." in f".{name}"


__all__ = ["PicoTrainer"]
