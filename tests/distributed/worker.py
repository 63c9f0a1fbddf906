"""
What several processes do together, as one script for any number of them.

    python -m torch.distributed.run --standalone --nproc_per_node 2 worker.py FOLDER
    python worker.py FOLDER 4

Every process writes what it holds at the end to FOLDER/rank{N}-of-{M}.pt. The batch of all processes together is the
same for any number of them. The first form also resumes what one process left in FOLDER/single, and ends with a
training in which the last process is killed; the second imports once, forks and does `FEW` alone.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import peft
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny import CountedDataset, model, prototype_log, rows, trainer
from torch.distributed.tensor import DTensor
from transformers import logging, set_seed

from modeling_pico import CddsModel, RetrievalEvaluator
from modeling_pico.data import CaptionedImageDataset
from modeling_pico.evaluation import RetrievalUncertainty
from modeling_pico.training import NonFiniteLossError, PicoTrainer


CONFIGURATION = Path(__file__).resolve().parents[2] / "examples" / "accelerate" / "fsdp.yaml"
GLOBAL_BATCH = 8
PURITY = {"style_probability": "purity"}
DECOUPLED = {
    "model_class": CddsModel,
    "unet_num_layers": 1,
    "semantic_probability": True,
    "num_uncertainty_prototypes": 3,
}
EPOCHS = {"num_train_epochs": 3, "prototype_update_start": 2}
# What four processes do, too.
FEW = ("uneven", "masked")


class FirstGradients(PicoTrainer):
    """Keeps the gradients of the first step, and losses, widths of texts and ids of all steps."""

    def training_step(self, model, inputs, *args, **kwargs):
        # Five meanings for eight pairs: ids repeat within processes and across them.
        inputs["image_ids"] %= 5
        inputs["caption_codes"] %= 7  # and so do captions
        self.__dict__.setdefault("ids", []).append(inputs["image_ids"].tolist())
        self.__dict__.setdefault("losses", [])
        self.__dict__.setdefault("widths", []).append(inputs["input_ids"].shape[1])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        if not hasattr(self, "gradients"):
            self.gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else whole(parameter.grad).clone()
                for name, parameter in self._pico_model().named_parameters()
                if parameter.requires_grad
            }
        return loss

    def _batch_loss(self, outputs, *args, **kwargs):
        self.dtypes = {outputs["image_embeds"].dtype, outputs["text_embeds"].dtype, outputs["logit_scale"].dtype}
        return super()._batch_loss(outputs, *args, **kwargs)


class Masked(FirstGradients):
    """The second half of each batch has no word, so that processes lack a valid pair; the second batch has none."""

    def training_step(self, model, inputs, *args, **kwargs):
        size = len(inputs["input_ids"])
        first = 0 if self.state.global_step == 1 else GLOBAL_BATCH // 2
        inputs["attention_mask"][max(0, first - PartialState().process_index * size) :] = 0
        return super().training_step(model, inputs, *args, **kwargs)


class Poisoned(FirstGradients):
    """An image of the last process is not finite in the second step."""

    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 1 and PartialState().is_last_process:
            inputs["pixel_values"][1, 0, 2, 2] = math.nan
        return super().training_step(model, inputs, *args, **kwargs)


class Infinite(FirstGradients):
    """The loss of the last process is infinite in the second step, and its gradient is not."""

    def _pair_loss(self, *args):
        return super()._pair_loss(*args) + self.surplus()

    def surplus(self) -> float:
        return math.inf if self.state.global_step == 1 and PartialState().is_last_process else 0.0


class Mortal(FirstGradients):
    """The last process is killed in the middle of the third step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 2 and PartialState().is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def fsdp() -> Iterator[None]:
    """
    What `accelerate launch` makes of examples/accelerate/fsdp.yaml. Accelerate takes FSDP for devices only, so it is
    told that these processes have some.
    """
    if PartialState().num_processes == 1:
        yield
        return
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGURATION), "train_pico.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", environment["ACCELERATE_USE_FSDP"])
        for name in environment:
            if name.startswith("FSDP_"):
                patch.setenv(name, environment[name])
        patch.setattr(PartialState, "_prepare_backend", lambda *args: ("gloo", DistributedType.MULTI_GPU))
        patch.setattr(PartialState, "set_device", lambda state: setattr(state, "device", torch.device("cpu")))
        yield


def train(
    folder: Path,
    model_options: dict,
    checkpoint: str | None = None,
    adapter: bool = False,
    global_batch=GLOBAL_BATCH,
    **options,
):
    net = model(**model_options)
    if adapter:
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["alignment_head"]
        )
        set_seed(0)
        net = peft.get_peft_model(net, config)
    made = trainer(
        folder,
        net=net,
        # Not AdamW: it divides by the size of gradients and so makes rounding of tiny ones visible.
        **{
            "trainer_class": FirstGradients,
            "optim": "sgd",
            "learning_rate": 0.3,
            "backbone_learning_rate": 0.3,
            "save_strategy": "no",
            **options,
        },
        per_device_train_batch_size=global_batch // PartialState().num_processes,
    )
    made.train(resume_from_checkpoint=checkpoint)
    return made


def run(*args, measure: bool = True, **kwargs) -> dict:
    made = train(*args, **kwargs)
    result = {
        "gradients": made.gradients,
        "losses": made.losses,
        "widths": made.widths,
        "ids": made.ids,
        # Under FSDP the first process alone gets it.
        "state": {name: tensor.clone() for name, tensor in made.accelerator.get_state_dict(made.model).items()},
        "log": prototype_log(made),
        "losses_logged": [entry for entry in made.state.log_history if "loss" in entry],
        "skipped": [entry["skipped_steps"] for entry in made.state.log_history if "skipped_steps" in entry],
        "steps": made.state.global_step,
        "dtypes": made.dtypes,
        "find_unused": made.args.ddp_find_unused_parameters,
    }
    return {**result, **measured(made)} if measure else result


def measured(made: PicoTrainer) -> dict:
    config = made._pico_model().config
    if config.num_uncertainty_prototypes:
        learned = made.learn_uncertainty_reranking()
        config.uncertainty_reranking.update(image_weight=-20.0, text_weight=20.0)
    else:
        learned = None
    evaluation = made.evaluate()
    prediction = made.predict(made.eval_dataset)
    made.eval_dataset.styles = ["ink", "oil", "oil"] * 3
    styles = made.measure_styles(made.eval_dataset, ["ink"]).metrics()
    # Folds, tiles and batches of the loss that end within a process's images; one process has none of the first fold.
    made.evaluator = RetrievalEvaluator(num_folds=3, loss_batch_size=3, image_chunk=2, text_chunk=5)
    encoded = made._encode(made.get_eval_dataloader())
    uncertainty = RetrievalUncertainty.measure(made._pico_model(), encoded)
    return {
        "evaluation": {name: evaluation[name] for name in evaluation if "per_second" not in name},
        "folds": made.evaluator.metrics(made._pico_model(), encoded),
        "eval_ids": (encoded.image_ids, encoded.text_ids),
        "uncertainty": uncertainty and (uncertainty.images, uncertainty.texts),
        "reranking": (learned, config.uncertainty_reranking),
        "styles": styles,
        "scores": torch.from_numpy(prediction.predictions),
    }


def few(folder: Path) -> dict:
    return {
        # 16 of 29 images, then the other 13: of four processes one has four of them, the others three.
        "uneven": run(
            folder / "uneven",
            PURITY,
            global_batch=16,
            data=CountedDataset(rows(29, repeats=2)),
            dataloader_drop_last=False,
            **EPOCHS,
        ),
        "masked": run(folder / "masked", PURITY, trainer_class=Masked, **EPOCHS),
        "cached": cached(folder / "cached"),
    }


def cached(folder: Path) -> list[tuple[bool, float]]:
    """Whether each of three evaluations encoded, and its rSum; before the third one process loses its embeddings."""
    data = CaptionedImageDataset(rows(9, seed=1, repeats=1))
    made = trainer(folder, eval_data=data, eval_cache_dir=str(folder / "embeddings"))
    state, encode, calls = PartialState(), made.evaluator.encode, []
    made.evaluator.encode = lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)
    results = []
    for evaluation in range(3):
        state.wait_for_everyone()
        if evaluation == 2 and state.is_last_process:
            for file in (folder / "embeddings").glob(f"*-{state.process_index}-of-{state.num_processes}.safetensors"):
                file.unlink()
        state.wait_for_everyone()
        before = len(calls)
        rsum = made.evaluate()["eval_rsum"]
        results.append((len(calls) > before, rsum))
    return results


def many(folder: Path) -> dict:
    return {
        "infonce": run(folder / "infonce", PURITY, save_strategy="epoch", **EPOCHS),
        "resumed": run(
            folder / "resumed", PURITY, checkpoint=str(folder / "infonce" / "checkpoint-2"), **EPOCHS, measure=False
        ),
        "subset": run(folder / "subset", PURITY, feedback_images=4, **EPOCHS, measure=False),
        # 20 images and shorter batches at the end, which the processes share.
        "hinge": run(
            folder / "hinge",
            {"loss_type": "hinge"},
            hinge_warmup_epochs=0.5,
            num_train_epochs=3,
            dataloader_drop_last=False,
            feedback="constant",
            prototype_update_start=2,
        ),
        "chunks": run(folder / "chunks", PURITY, num_train_epochs=1, gradient_cache_chunk_size=3, measure=False),
        "decoupled": run(
            folder / "decoupled",
            DECOUPLED,
            num_train_epochs=2,
            prototype_update_start=2,
            logging_steps=1,
            learning_rate=1e-2,
            dataloader_drop_last=False,
        ),
        "masked_decoupled": run(
            folder / "masked_decoupled", DECOUPLED, trainer_class=Masked, num_train_epochs=1, measure=False
        ),
        "local": run(folder / "local", PURITY, num_train_epochs=1, gather_negatives=False, measure=False),
        "skip": run(
            folder / "skip",
            PURITY,
            trainer_class=Poisoned,
            num_train_epochs=2,
            gather_negatives=False,
            non_finite_loss="skip",
            measure=False,
        ),
        "infinite": run(
            folder / "infinite",
            PURITY,
            trainer_class=Infinite,
            num_train_epochs=2,
            non_finite_loss="skip",
            measure=False,
        ),
        "stop": stopped(folder),
        "pooled": run(
            folder / "pooled",
            {"alignment_head": "clip_style", "pooling": "class_token"},
            num_train_epochs=1,
            measure=False,
        ),
        "adapter": run(folder / "adapter", {}, adapter=True, **EPOCHS),
    }


def sharded(folder: Path) -> dict:
    results = {}
    with fsdp():
        results["sharded"] = run(folder / "sharded", PURITY, **EPOCHS)
        # The last five pairs are three and two, that is two chunks and one if each process cut them for itself.
        results["sharded_chunks"] = run(
            folder / "sharded_chunks",
            PURITY,
            data=CountedDataset(rows(29)),
            dataloader_drop_last=False,
            num_train_epochs=1,
            gradient_cache_chunk_size=2,
            measure=False,
        )
        results["sharded_adapter"] = run(folder / "sharded_adapter", {}, adapter=True, **EPOCHS)
        results["sharded_bf16"] = run(folder / "sharded_bf16", PURITY, bf16=True, num_train_epochs=1, measure=False)
        results["sharded_decoupled"] = run(folder / "sharded_decoupled", DECOUPLED, num_train_epochs=1)
        # With SGD there would be no state of the optimizer to save.
        adamw = {"optim": "adamw_torch", "learning_rate": 1e-2, "backbone_learning_rate": 1e-2, **EPOCHS}
        checkpoint = str(folder / "adamw" / "checkpoint-2")
        results["adamw"] = run(folder / "adamw", {}, save_strategy="epoch", **adamw, measure=False)
        results["adamw_resumed"] = run(folder / "adamw_resumed", {}, checkpoint=checkpoint, **adamw, measure=False)
    return results


def stopped(folder: Path) -> str:
    try:
        train(folder / "stop", PURITY, trainer_class=Poisoned, num_train_epochs=1)
    except NonFiniteLossError as error:
        return str(error)
    return "was not stopped"


def resume_what_one_process_left(folder: Path) -> dict:
    checkpoint = str(folder / "single" / "infonce" / "checkpoint-2")
    return {
        "taken over": run(folder / "over", PURITY, checkpoint=checkpoint, **EPOCHS),
        # The batch of each process stays as it was, so that all together see twice as many pairs a step.
        "widened": run(folder / "wide", PURITY, checkpoint=checkpoint, global_batch=2 * GLOBAL_BATCH, **EPOCHS),
    }


def main(folder: Path, part=lambda folder: {**many(folder), **sharded(folder), **few(folder)}) -> dict:
    logging.set_verbosity_error()
    state = PartialState(cpu=True)
    results = part(folder)
    torch.save(results, folder / f"rank{state.process_index}-of-{state.num_processes}.pt")
    return results


def forked(folder: Path, rank: int, processes: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    main(folder, few)
    torch.distributed.destroy_process_group()


def fork(folder: Path, processes: int) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=forked, args=(folder, rank, processes, port)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(abs(child.exitcode or 0) for child in children))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        fork(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(
            Path(sys.argv[1]),
            lambda folder: {**many(folder), **sharded(folder), **few(folder), **resume_what_one_process_left(folder)},
        )
        train(Path(sys.argv[1]) / "mortal", PURITY, trainer_class=Mortal, save_strategy="epoch", **EPOCHS)
