"""The part of the trainer that evaluates: whole-set retrieval metrics, styles, and the prototypes' feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data import as_captioned
from ..evaluation.embedding_cache import cached_embeddings
from ..evaluation.evaluator import EncodedRetrieval, RetrievalEvaluator
from ..evaluation.style_report import StyleReport
from ..evaluation.uncertainty_reranking import RetrievalUncertainty, learn_reranking
from .base import TrainerBase


logger = logging.get_logger(__name__)


class EvaluationTrainer(TrainerBase):
    """Encodes every image and caption once and measures retrieval over the whole set."""

    def _settle_best_metric(self) -> None:
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
        Learns by which weights the uncertainty re-ranks scores, see [`~modeling_pico.evaluation.learn_reranking`], and
        puts them into the model's configuration: evaluations then report re-ranked metrics beside the plain ones.

        Args:
            eval_dataset ([`CaptionedImageDataset`], *optional*):
                Validation data, never what is tested on; the first one of the trainer by default.

        Returns:
            `dict[str, float]`: What was learned, as `uncertainty_reranking_image_weight` and so on.

        Raises:
            `ValueError`: For a model without uncertainty.
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
        encoded = self._encode(self.get_eval_dataloader(captioned))
        report = StyleReport.from_encoded(
            self._pico_model(), encoded, captioned.styles, captioned.num_captions, seen_styles
        )
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, report.metrics())
        return report

    def _encode(self, dataloader: DataLoader) -> EncodedRetrieval:
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            # Evaluation without training: precision and sharding still have to be set up.
            # (Whole on every process: what FSDP shards, it shards together with an optimizer.)
            model = self.accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        if isinstance(self.optimizer, AcceleratedOptimizer):
            # Schedule-free optimizers evaluate other weights than they train.
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader
        # In training the weights change from one evaluation to the next.
        folder = None if self.is_in_train else self.args.eval_cache_dir
        if folder is None:
            return self._encode_anew(model, dataloader)
        return cached_embeddings(
            folder,
            self._pico_model(),
            dataloader,
            lambda: self._encode_anew(model, dataloader),
            precision=f"{self.accelerator.mixed_precision}, tf32 {self.args.tf32}",
        )

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

    def _construct(self, encoded: EncodedRetrieval | None = None, rsum: float | None = None) -> None:
        """Builds prototypes. Feedback comes from the first validation set, encoded here unless it has just been."""
        construction: Any = self.construction
        # `Trainer` takes what is logged here for the log of this step, and would leave the loss out.
        should_log = self.control.should_log
        if not self.args.feedback_needs_validation:
            report = construction.propose()
        else:
            name = self._feedback_dataset()
            dataset = self.eval_dataset if name is None else self.eval_dataset[name]
            images = construction.feedback_images(len(dataset if encoded is None else encoded.image_ids))
            if encoded is None:
                # For the construction alone: neither the log nor the choice of the best checkpoint sees it.
                part = dataset if images is None else Subset(dataset, images.tolist())
                encoded = self._encode(self.get_eval_dataloader(part))
            elif images is not None:
                encoded, rsum = encoded.subset(images), None
            # One gallery: folds of a part would be too small to tell prototypes apart.
            evaluator = self.evaluator if images is None else RetrievalEvaluator()

            def score() -> float:
                return evaluator.retrieval_metrics(self._pico_model(), encoded)["rsum"]

            report = construction.propose(score, rsum)
        self.log(report)
        self.control.should_log = should_log


__all__ = ["EvaluationTrainer"]
