"""
What several processes do together, as one script for any number of them.

    python -m torch.distributed.run --standalone --nproc_per_node 2 worker.py FOLDER

Every process writes what it holds at the end to FOLDER/rank{N}-of-{M}.pt. The batch of all processes together is the
same for any number of them.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from accelerate import PartialState
from tiny import prototype_log, trainer
from transformers import logging

from modeling_pico import CddsModel, RetrievalEvaluator
from modeling_pico.training import PicoTrainer


GLOBAL_BATCH = 8
PURITY = {"style_probability": "purity", "sharpness": 4.0, "column_mode": "statistics"}


class FirstGradients(PicoTrainer):
    """Keeps the gradients of the first step, and losses, widths of texts and ids of all steps."""

    def training_step(self, model, inputs, *args, **kwargs):
        # Five meanings for eight pairs: ids repeat within processes and across them.
        inputs["image_ids"] %= 5
        self.__dict__.setdefault("ids", []).append(inputs["image_ids"].tolist())
        self.__dict__.setdefault("losses", [])
        self.__dict__.setdefault("widths", []).append(inputs["input_ids"].shape[1])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        if not hasattr(self, "gradients"):
            self.gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for name, parameter in self._pico_model().named_parameters()
                if parameter.requires_grad
            }
        return loss


def run(folder: Path, model_options: dict, checkpoint: str | None = None, **options) -> dict:
    made = trainer(
        folder,
        trainer_class=FirstGradients,
        model_options=model_options,
        # Not AdamW: it divides by the size of gradients and so makes rounding of tiny ones visible.
        **{"optim": "sgd", "learning_rate": 0.3, "backbone_learning_rate": 0.3, "save_strategy": "no", **options},
        per_device_train_batch_size=GLOBAL_BATCH // PartialState().num_processes,
    )
    made.train(resume_from_checkpoint=checkpoint)
    evaluation = made.evaluate()
    prediction = made.predict(made.eval_dataset)
    made.eval_dataset.styles = ["ink", "oil", "oil"] * 3
    styles = made.measure_styles(made.eval_dataset, ["ink"]).metrics()
    # Folds, tiles and batches of the loss that end within a process's images; one process has none of the first fold.
    made.evaluator = RetrievalEvaluator(num_folds=3, loss_batch_size=3, image_chunk=2, text_chunk=5)
    encoded = made._encode(made.get_eval_dataloader())
    return {
        "gradients": made.gradients,
        "losses": made.losses,
        "widths": made.widths,
        "ids": made.ids,
        "state": {name: tensor.clone() for name, tensor in made._pico_model().state_dict().items()},
        "log": prototype_log(made),
        "losses_logged": [entry for entry in made.state.log_history if "loss" in entry],
        "evaluation": {name: evaluation[name] for name in evaluation if "per_second" not in name},
        "folds": made.evaluator.metrics(made._pico_model(), encoded),
        "eval_ids": (encoded.image_ids, encoded.text_ids),
        "styles": styles,
        "scores": torch.from_numpy(prediction.predictions),
        "steps": made.state.global_step,
    }


def main(folder: Path) -> dict:
    logging.set_verbosity_error()
    state = PartialState(cpu=True)
    epochs = {"num_train_epochs": 3, "prototype_update_start": 2}
    results = {
        "infonce": run(folder / "infonce", PURITY, save_strategy="epoch", **epochs),
        "resumed": run(folder / "resumed", PURITY, checkpoint=str(folder / "infonce" / "checkpoint-2"), **epochs),
        "subset": run(folder / "subset", PURITY, feedback_images=4, **epochs),
        # 20 images and shorter batches at the end, which the processes share.
        "hinge": run(
            folder / "hinge",
            {"loss_type": "hinge", "negative_slope": 0.1},
            hinge_warmup_epochs=0.5,
            num_train_epochs=2,
            dataloader_drop_last=False,
            feedback="uniform",
            prototype_update_start=1.5,
        ),
        "chunks": run(folder / "chunks", PURITY, num_train_epochs=1, gradient_cache_chunk_size=3),
        "decoupled": run(
            folder / "decoupled",
            {"model_class": CddsModel, "unet_num_layers": 1, "semantic_probability": True},
            num_train_epochs=2,
            prototype_update_start=2,
            logging_steps=1,
            learning_rate=1e-2,
            dataloader_drop_last=False,
        ),
        "local": run(folder / "local", PURITY, num_train_epochs=1, gather_negatives=False),
    }
    torch.save(results, folder / f"rank{state.process_index}-of-{state.num_processes}.pt")
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]))
