"""Two and four processes train, evaluate and resume as one process with the whole batch does; a death is no secret."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import run_processes
from tiny import CountedDataset, model, prototype_log, rows, trainer
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.tensor import DTensor
from transformers import ResNetConfig, set_seed

from modeling_pico import CddsModel, PicoModel, RetrievalEvaluator
from modeling_pico.data import CaptionedImageDataset
from modeling_pico.evaluation import RetrievalUncertainty, UncertaintyReranking, folded_retrieval_metrics
from modeling_pico.model.backbones_pico import build_backbone
from modeling_pico.training import NonFiniteLossError, PicoTrainer
from modeling_pico.training.callbacks import BatchNormCallback


pytestmark = pytest.mark.distributed
CONFIGURATION = Path(__file__).resolve().parents[2] / "examples" / "accelerate" / "fsdp.yaml"
# Pairs of a step, of all processes together.
GLOBAL_BATCH = 8
PURITY = {"style_probability": "purity"}
DECOUPLED = {
    "model_class": CddsModel,
    "unet_num_layers": 1,
    "semantic_probability": True,
    "uncertainty_config": {"num_prototypes": 3},
}
# Two steps an epoch.
EPOCHS = {"num_train_epochs": 3, "prototype_update_start": 2}


@pytest.fixture(scope="module")
def results_of(tmp_path_factory) -> Callable[..., list[Any]]:
    """What a training returns in this process alone or in each of several; every one runs once."""

    @functools.cache
    def run(training: Callable[..., Any], processes: int = 1, *args: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp(training.__name__)
        return [training(folder, *args)] if processes == 1 else run_processes(training, processes, folder, *args)

    return run


@pytest.fixture(scope="module")
def one_and_two(results_of) -> Callable[..., list[Any]]:
    """What a training returns in this process alone, and in each of two."""
    return lambda training, alone=None: [*results_of(alone or training), *results_of(training, 2)]


class FirstGradients(PicoTrainer):
    """Keeps the gradients of the first step, and losses, widths of texts and ids of all steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ids, self.widths, self.losses = [], [], []
        self.gradients: dict[str, torch.Tensor] = {}

    def training_step(self, model, inputs, *args, **kwargs):
        # Five meanings for eight pairs: ids repeat within processes and across them.
        inputs["image_ids"] %= 5
        inputs["caption_codes"] %= 7  # and so do captions
        self.ids.append(inputs["image_ids"].tolist())
        self.widths.append(inputs["attention_mask"].shape[1])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        if not self.gradients:
            self.gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else whole(parameter.grad).clone()
                for name, parameter in self._pico_model().named_parameters()
                if parameter.requires_grad
            }
        return loss

    def _batch_loss(self, outputs, *args, **kwargs):
        self.dtypes = {outputs["image_embeds"].dtype, outputs["text_embeds"].dtype, outputs["logit_scale"].dtype}
        return super()._batch_loss(outputs, *args, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(folder: Path, net: PicoModel, checkpoint: Path | None = None, global_batch=GLOBAL_BATCH, **options):
    """Trains with the same batch of all processes together, however many there are."""
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
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return made


def run(folder: Path, net: PicoModel, measure: Callable[..., dict] = lambda made: {}, **options) -> dict[str, Any]:
    """What there is to compare of a training, and what is measured after it."""
    made = train(folder, net, **options)
    return {
        "folder": folder,
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
        **measure(made),
    }


def scores(made: PicoTrainer) -> dict[str, Any]:
    return {"scores": torch.from_numpy(made.predict(made.eval_dataset).predictions)}


def evaluations(made: PicoTrainer) -> dict[str, Any]:
    config = made._pico_model().config
    learned = reranking = None
    if config.uncertainty_config is not None:
        learned = made.learn_uncertainty_reranking()
        reranking = config.uncertainty_config["reranking"]
        reranking.update(image_weight=-20.0, text_weight=20.0)
    evaluation = made.evaluate()
    predicted = scores(made)
    made.eval_dataset.styles = ["ink", "oil", "oil"] * 3
    styles = made.measure_styles(made.eval_dataset, ["ink"]).metrics()
    # The captions in another style all lie with one process.
    told = [["red left", "green left"]] * 3 + [[]] * (len(made.eval_dataset) - 3)
    stress = made.measure_style_stress(made.eval_dataset, ["gray", "negative"], {"told": told}).metrics()
    # Folds, tiles and batches of the loss that end within a process's images; one process has none of the first fold.
    made.evaluator = RetrievalEvaluator(num_folds=3, loss_batch_size=3, image_chunk=2, text_chunk=5)
    encoded = made._encode(made.get_eval_dataloader())
    uncertainty = RetrievalUncertainty.measure(made._pico_model(), encoded)
    return {
        "evaluation": {
            name: evaluation[name] for name in evaluation if not name.endswith(("per_second", "eval_runtime"))
        },
        "folds": made.evaluator.metrics(made._pico_model(), encoded),
        "eval_ids": (encoded.image_ids, encoded.text_ids),
        "uncertainty": uncertainty and (uncertainty.images, uncertainty.texts),
        "reranking": (learned, reranking),
        "styles": styles,
        "stress": stress,
        **predicted,
    }


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


def assert_first_gradients_and_losses(alone: dict, first: dict, second: dict) -> None:
    """Those of two processes are those of the whole batch, or of as many of its epochs as the two have trained."""
    assert max(float(gradient.abs().max()) for gradient in alone["gradients"].values()) > 0.1
    assert_close(first["gradients"], alone["gradients"], 1e-5)
    # As DDP is told: it looks for no parameters without a gradient, and none of these runs has any.
    assert not first["find_unused"]
    assert_close(first["gradients"], second["gradients"], 0.0)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(alone["losses"][: len(means)], rel=1e-4)


def assert_same_log(mine: list[dict], other: list[dict]) -> None:
    assert len(mine) == len(other)
    for entry, expected in zip(mine, other, strict=True):
        assert entry == pytest.approx(expected, abs=1e-4)


# Two processes share a batch


def infonce(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), measure=evaluations, save_strategy="epoch", **EPOCHS)


def hinge(folder: Path) -> dict[str, Any]:
    """20 images and shorter batches at the end, which the processes share."""
    options = {"num_train_epochs": 3, "prototype_update_start": 2, "hinge_warmup_epochs": 0.5, "feedback": "constant"}
    return run(folder, model(loss_type="hinge"), measure=evaluations, dataloader_drop_last=False, **options)


def subset_feedback(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), feedback_images=4, **EPOCHS)


def chunks(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), num_train_epochs=1, gradient_cache_chunk_size=3)


def pooled(folder: Path) -> dict[str, Any]:
    return run(folder, model(method="clip_style", pooling="class_token"), num_train_epochs=1)


def with_adapter(**config: Any) -> PicoModel:
    net = model(**config)
    set_seed(0)
    targets = ["q_proj", "v_proj", "query", "value"]
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["alignment_head"]))


def adapter(folder: Path) -> dict[str, Any]:
    return run(folder, with_adapter(), measure=scores, **EPOCHS)


def kept_states(folder: Path) -> dict[str, Any]:
    """Heads alone, on hidden states that each process has computed for its own rows."""
    net = model(**PURITY)
    for tower in (net.vision_model, net.text_model):
        tower.requires_grad_(False)
    data = {"data": CaptionedImageDataset(rows(20, repeats=2)), "eval_data": CaptionedImageDataset(rows(9, seed=1))}
    return run(folder, net, measure=scores, tower_cache_dir=str(folder / "states"), **data, **EPOCHS)


def test_batches_differ_in_width_and_repeat_ids_across_processes(one_and_two):
    alone, first, second = one_and_two(infonce)
    assert any(a != b for a, b in zip(first["widths"], second["widths"], strict=True))
    assert any(set(a) & set(b) for a, b in zip(first["ids"], second["ids"], strict=True))
    assert [a + b for a, b in zip(first["ids"], second["ids"], strict=True)] == alone["ids"]


# Chunks leave the gradient as it is.
@pytest.mark.parametrize(
    ("training", "alone"),
    [
        (infonce, infonce),
        (hinge, hinge),
        (chunks, infonce),
        (pooled, pooled),
        (adapter, adapter),
        (kept_states, kept_states),
    ],
)
def test_gradient_and_loss_are_those_of_the_whole_batch(one_and_two, training, alone):
    assert_first_gradients_and_losses(*one_and_two(training, alone))


@pytest.mark.parametrize("training", [infonce, hinge, subset_feedback, adapter, kept_states])
def test_training_ends_alike_on_both_and_as_with_one_process(one_and_two, training):
    alone, first, second = one_and_two(training)
    assert alone["steps"] == first["steps"] == second["steps"]
    assert_close(first["state"], second["state"], 0.0)
    assert_close(first["state"], alone["state"], 1e-4)
    stages = [int(tensor) for name, tensor in first["state"].items() if name.endswith(".stage")]
    assert stages[-2:] == [2, 2] and len(alone["log"]) == 2
    assert_same_log(first["log"], alone["log"])


def test_feedback_of_a_part_of_the_images_is_a_different_one(results_of):
    (part,), (whole_set,) = results_of(subset_feedback), results_of(infonce)
    gains = [[entry["prototype_feedback_gain"] for entry in result["log"]] for result in (part, whole_set)]
    assert gains[0] != gains[1]


@pytest.mark.parametrize("training", [infonce, hinge])
def test_evaluation_of_an_odd_set_is_that_of_one_process(one_and_two, training):
    alone, first, second = one_and_two(training)
    assert first["scores"].shape == alone["scores"].shape == (9, 18)
    assert torch.equal(first["scores"], second["scores"])
    torch.testing.assert_close(first["scores"], alone["scores"], rtol=0, atol=1e-4)
    assert first["evaluation"] == second["evaluation"] == pytest.approx(alone["evaluation"], abs=1e-4)
    for numbers in ("styles", "stress"):
        assert first[numbers] == second[numbers] == pytest.approx(alone[numbers], abs=1e-4)
    # Folds that the processes share are those of the full matrix.
    assert first["folds"] == second["folds"] == pytest.approx(alone["folds"], abs=1e-4)
    expected = folded_retrieval_metrics(alone["scores"], *alone["eval_ids"], num_folds=3)
    assert {name: first["folds"][name] for name in expected} == expected
    assert first["folds"]["rsum"] != first["evaluation"]["eval_rsum"]


def local_negatives(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), num_train_epochs=1, gather_negatives=False)


def test_without_gathered_negatives_processes_see_their_own_pairs(one_and_two):
    alone, first, second = one_and_two(local_negatives, infonce)
    assert_close(first["state"], second["state"], 0.0)
    # Half the negatives make an easier task.
    assert (first["losses"][0] + second["losses"][0]) / 2 < alone["losses"][0] - 0.1
    assert first["losses"][0] != second["losses"][0]


# Batches that do not divide evenly, and processes without a word


class Masked(FirstGradients):
    """The second half of each batch has no word, so that processes lack a valid pair; the second batch has none."""

    def training_step(self, model, inputs, *args, **kwargs):
        size = len(inputs["input_ids"])
        first = 0 if self.state.global_step == 1 else GLOBAL_BATCH // 2
        inputs["attention_mask"][max(0, first - PartialState().process_index * size) :] = 0
        return super().training_step(model, inputs, *args, **kwargs)


def uneven(folder: Path) -> dict[str, Any]:
    """16 of 29 images, then the other 13: of four processes one has four of them, the others three."""
    options = {"data": CountedDataset(rows(29, repeats=2)), "dataloader_drop_last": False, **EPOCHS}
    return run(folder, model(**PURITY), measure=evaluations, global_batch=16, **options)


def masked(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), measure=evaluations, trainer_class=Masked, **EPOCHS)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("training", [uneven, masked])
def test_one_two_and_four_processes_train_and_measure_alike(results_of, training, processes):
    (alone,), ranks = results_of(training), results_of(training, processes)
    sizes = [[len(ids) for ids in batches] for batches in zip(*(rank["ids"] for rank in ranks), strict=True)]
    if training is uneven:
        # 13 images that are no multiple of any number of processes.
        assert sizes == [[16 // processes] * processes, {2: [7, 6], 4: [4, 3, 3, 3]}[processes]] * 3
    else:
        assert any(len({rank["widths"][step] for rank in ranks}) > 1 for step in range(len(sizes)))
    losses = [sum(step) / processes for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(alone["losses"], rel=1e-4)
    assert len(losses) == 6 and len(set(losses)) == 6
    assert len(alone["log"]) == 2
    for rank in ranks:
        assert_close(rank["state"], ranks[0]["state"], 0.0)
        assert_close(rank["state"], alone["state"], 1e-4)
        assert_same_log(rank["log"], alone["log"])
        for numbers in ("evaluation", "folds", "styles", "stress"):
            assert rank[numbers] == pytest.approx(alone[numbers], abs=1e-4)
    assert all(tensor.isfinite().all() for tensor in ranks[0]["state"].values())


# Auxiliary losses and uncertainty


def decoupled(folder: Path) -> dict[str, Any]:
    options = {"num_train_epochs": 2, "prototype_update_start": 2, "logging_steps": 1, "learning_rate": 1e-2}
    return run(folder, model(**DECOUPLED), measure=evaluations, dataloader_drop_last=False, **options)


def test_auxiliary_losses_are_of_either_process_and_logged_as_their_mean(one_and_two):
    alone, first, second = one_and_two(decoupled)
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert_close(first["state"], second["state"], 0.0)
    terms = ("semantic_loss", "modality_loss", "integrity_loss", "sampled_integrity_loss")
    # Of two or three meanings that are no match, the mean closeness differs much between halves of a batch.
    halves = ("uncertainty_loss", "loss")
    assert len(alone["losses_logged"]) == len(first["losses_logged"]) == alone["steps"]
    for term in (*terms, "uncertainty_diversity_loss", *halves):
        assert [entry[term] for entry in first["losses_logged"]] == [entry[term] for entry in second["losses_logged"]]
        # Distributions are over half the batch: alike, not the same.
        if term not in halves:
            assert first["losses_logged"][0][term] == pytest.approx(alone["losses_logged"][0][term], rel=0.5)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx([entry["loss"] for entry in first["losses_logged"]], rel=1e-3)


def test_reranking_is_learned_and_used_alike_on_both(results_of):
    first, second = results_of(decoupled, 2)
    assert first["reranking"] == second["reranking"] and first["evaluation"] == pytest.approx(second["evaluation"])
    of_images, of_texts = first["uncertainty"]
    assert of_images.shape == (9,) and of_texts.shape == (18,)
    assert torch.equal(of_images, second["uncertainty"][0]) and torch.equal(of_texts, second["uncertainty"][1])
    learned, used = first["reranking"]
    assert learned["uncertainty_reranking_floor"] == pytest.approx(float(first["scores"].min()), abs=1e-6)
    scores = UncertaintyReranking(**used).rerank(
        first["scores"], image_uncertainty=of_images, text_uncertainty=of_texts
    )
    expected = folded_retrieval_metrics(scores, *first["eval_ids"], num_folds=1)
    reranked = {name: first["evaluation"][f"eval_reranked_{name}"] for name in expected}
    assert reranked == pytest.approx(expected)
    assert first["evaluation"]["eval_reranked_rsum"] != first["evaluation"]["eval_rsum"]


def masked_decoupled(folder: Path) -> dict[str, Any]:
    return run(folder, model(**DECOUPLED), trainer_class=Masked, num_train_epochs=1)


def test_auxiliary_losses_of_a_process_without_a_word_are_finite(results_of):
    first, second = results_of(masked_decoupled, 2)
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert_close(first["state"], second["state"], 0.0)
    assert len(first["losses"]) == 2 and torch.tensor([first["losses"], second["losses"]]).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in first["gradients"].values())


# Kept embeddings


def cached_evaluations(folder: Path) -> list[tuple[bool, float]]:
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


@pytest.mark.parametrize("processes", [2, 4])
def test_all_processes_read_kept_embeddings_or_all_encode(results_of, processes):
    ((_, expected), *_), *_ = results_of(cached_evaluations)
    for result in results_of(cached_evaluations, processes):
        encoded, rsum = zip(*result, strict=True)
        assert encoded == (True, False, True)
        assert rsum == pytest.approx([expected] * 3)


# Gallery alignment


def aligned_evaluations(folder: Path) -> dict[str, Any]:
    """Moments of training and aligned metrics, of one gallery and by style; blocks of processes differ in size."""
    data = CaptionedImageDataset(rows(71, seed=4))
    made = trainer(folder, data=CaptionedImageDataset(rows(49)), eval_data=data, align_gallery=True)
    made.fit_alignment()
    found = {}
    # One process may have no image of a style.
    for name, styles in {
        "whole": None,
        "mixed": ["ink", "oil"] * 35 + ["oil"],
        "sorted": ["ink"] * 32 + ["oil"] * 39,
    }.items():
        data.styles = styles
        metrics = made.evaluate()
        found[name] = {key: metrics[key] for key in metrics if "aligned" in key or key == "eval_rsum"}
    report = made.measure_styles(data)
    return {
        "moments": {key: buffer.clone() for key, buffer in made.model.image_moments.named_buffers()},
        "report": {key: value for key, value in report.metrics().items() if "aligned" in key},
        **found,
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_galleries_are_those_of_all_processes(results_of, processes):
    (expected,), results = results_of(aligned_evaluations), results_of(aligned_evaluations, processes)
    assert int(expected["moments"]["count"]) == 49
    assert expected["mixed"] != expected["whole"] != expected["sorted"]
    for result in results:
        assert_close(result["moments"], expected["moments"], 1e-5)
        assert_close(result["moments"], results[0]["moments"], 0.0)
        for name in ("whole", "mixed", "sorted", "report"):
            assert result[name] == pytest.approx(expected[name]), name


def convolutional_model() -> PicoModel:
    """With a tower that has batch normalisation."""
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    text_config = model().config.text_config
    set_seed(0)
    text = build_backbone(text_config)
    return PicoModel.from_backbones(build_backbone(vision), text, embedding_dim=8, num_style_prototypes=3)


def aligned_looks(folder: Path, batch_norm: bool) -> dict[str, Any]:
    """A stress test of an odd set, whose drawn images are moved to those of training."""
    net = convolutional_model() if batch_norm else model()  # whose layers are moved too
    data = CaptionedImageDataset(rows(71, seed=4))
    made = trainer(folder, net=net, data=CaptionedImageDataset(rows(49)), eval_data=data)
    made.fit_alignment()
    layers = sum("layer" in name for name, _ in net.image_moments.named_buffers())
    # One process has less of the first style than is moved.
    data.styles = ["ink"] * 33 + ["oil"] * 38
    return {"layers": layers, "stress": made.measure_style_stress(data, ["negative"]).metrics()}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_looks_are_moved_as_in_one_process(results_of, batch_norm):
    (expected,), results = results_of(aligned_looks, 1, batch_norm), results_of(aligned_looks, 2, batch_norm)
    stress = expected["stress"]
    aligned = [name for name in stress if "aligned" in name]
    assert aligned and any(stress[name] != stress[name.replace("aligned_", "")] for name in aligned)
    for result in results:
        assert result["stress"] == pytest.approx(stress)
        assert (result["layers"] > 0) == batch_norm


# Statistics of batches


def batch_statistics(folder: Path, joined: bool = True) -> dict[str, torch.Tensor]:
    """Running statistics of an image tower after two steps."""
    options = {"eval_data": None, "eval_strategy": "no", "save_strategy": "no", "feedback": "constant"}
    made = trainer(folder, net=convolutional_model(), freeze_batch_norm=False, max_steps=2, **options)
    if not joined:
        made.remove_callback(BatchNormCallback)
    made.train()
    return {name: tensor.clone() for name, tensor in made.model.vision_model.named_buffers() if "running" in name}


def test_all_processes_have_one_mean_and_variance_of_batches(results_of):
    first, second = results_of(batch_statistics, 2)
    own, other = results_of(batch_statistics, 2, False)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        assert not torch.equal(own[name], other[name]), name
        torch.testing.assert_close(tensor, (own[name] + other[name]) / 2, msg=name)


# Hidden states that are kept


def states_that_one_process_cannot_keep(folder: Path) -> str:
    """The captions of the last process alone make a word of which half precision cannot hold what the tower gives."""
    net = model()
    for tower in (net.vision_model, net.text_model):
        tower.requires_grad_(False)
    data = CaptionedImageDataset(rows(20))
    encode = net.get_text_states

    def beyond(**inputs):
        found = encode(**inputs)
        return found._replace(states=found.states * 1e9) if PartialState().is_last_process else found

    net.get_text_states = beyond
    made = trainer(folder, net=net, data=data, tower_cache_dir=str(folder / "states"))
    with pytest.raises(ValueError, match="which half precision cannot hold") as caught:
        made.train()
    return str(caught.value)


def test_states_that_one_process_cannot_keep_are_an_error_of_all(results_of):
    first, second = results_of(states_that_one_process_cannot_keep, 2)
    assert first == second


# Losses that are not finite


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


def poisoned_step_is_skipped(folder: Path) -> dict[str, Any]:
    options = {"num_train_epochs": 2, "gather_negatives": False, "non_finite_loss": "skip"}
    return run(folder, model(**PURITY), trainer_class=Poisoned, **options)


def infinite_step_is_skipped(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), trainer_class=Infinite, num_train_epochs=2, non_finite_loss="skip")


@pytest.mark.parametrize("training", [poisoned_step_is_skipped, infinite_step_is_skipped])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_both(results_of, training):
    first, second = results_of(training, 2)
    assert torch.tensor(first["losses"]).isfinite().all()
    assert torch.tensor(second["losses"]).isfinite().tolist() == [True, False, True, True]
    assert first["skipped"] == second["skipped"] == [1]
    assert_close(first["state"], second["state"], 0.0)
    assert all(tensor.isfinite().all() for tensor in first["state"].values())


def message_of_a_poisoned_step(folder: Path) -> str:
    with pytest.raises(NonFiniteLossError) as stopped:
        train(folder, model(**PURITY), trainer_class=Poisoned, num_train_epochs=1)
    return str(stopped.value)


def test_a_loss_that_is_not_finite_stops_both_with_the_ids_of_all(one_and_two):
    alone, first, second = one_and_two(message_of_a_poisoned_step)
    assert first == second
    assert "loss (nan, nan) of step 2 is not finite" in first and "loss (nan) of step 2" in alone
    ids = [message.split("by image_id: ")[1].split(". ")[0] for message in (first, alone)]
    assert ids[0] == ids[1] and len(ids[0].split(", ")) == 8
    assert "Not finite are the pixels of" in first


# Resuming, also with another number of processes


def resumed(folder: Path, checkpoint: Path, global_batch: int = GLOBAL_BATCH) -> dict[str, Any]:
    return run(folder, model(**PURITY), checkpoint=checkpoint, global_batch=global_batch, **EPOCHS)


def test_two_processes_resume_bit_for_bit(results_of):
    uninterrupted = results_of(infonce, 2)
    again = results_of(resumed, 2, uninterrupted[0]["folder"] / "checkpoint-2")
    for result, expected in zip(again, uninterrupted, strict=True):
        assert_close(result["state"], expected["state"], 0.0)
        assert result["log"] == expected["log"]


def test_two_processes_take_over_from_one(results_of):
    (alone,) = results_of(infonce)
    for result in results_of(resumed, 2, alone["folder"] / "checkpoint-2"):
        assert_close(result["state"], alone["state"], 1e-4)
        assert len(result["losses"]) == len(alone["losses"]) - 2
    # The batch of each process stays as it was, so that all together see twice as many pairs a step: 20 images in
    # batches of 16 are one step an epoch, and two of three steps were done.
    first, second = results_of(resumed, 2, alone["folder"] / "checkpoint-2", 2 * GLOBAL_BATCH)
    assert [(result["steps"], len(result["losses"])) for result in (first, second)] == [(3, 1)] * 2
    assert_close(first["state"], second["state"], 0.0)


class Mortal(FirstGradients):
    """The last process is killed in the middle of the third step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 2 and PartialState().is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def killed(folder: Path) -> None:
    train(folder, model(**PURITY), trainer_class=Mortal, save_strategy="epoch", **EPOCHS)


def test_a_killed_process_ends_the_run_with_its_name_and_leaves_a_checkpoint_for_one(results_of, tmp_path):
    # Named by its signal, but for when the launcher hears of the other one's lost connection first.
    with pytest.raises(ChildFailedError, match=r"Signal 9 \(SIGKILL\) received by PID|exitcode +: 1"):
        run_processes(killed, 2, tmp_path)
    ended = time.time()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    # The other one did not wait for a timeout, which is half an hour.
    assert ended - (tmp_path / "checkpoint-2" / "trainer_state.json").stat().st_mtime < 60
    (result,), (alone,) = results_of(resumed, 1, tmp_path / "checkpoint-2"), results_of(infonce)
    assert_close(result["state"], alone["state"], 1e-4)


# Fully sharded (FSDP2)


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


@fsdp()
def sharded(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), measure=scores, **EPOCHS)


@fsdp()
def sharded_chunks(folder: Path) -> dict[str, Any]:
    """The last five pairs are three and two, that is two chunks and one if each process cut them for itself."""
    options = {"num_train_epochs": 1, "dataloader_drop_last": False, "gradient_cache_chunk_size": 2}
    return run(folder, model(**PURITY), data=CountedDataset(rows(29)), **options)


@fsdp()
def sharded_adapter(folder: Path) -> dict[str, Any]:
    return run(folder, with_adapter(), measure=scores, **EPOCHS)


@fsdp()
def sharded_bf16(folder: Path) -> dict[str, Any]:
    return run(folder, model(**PURITY), bf16=True, num_train_epochs=1)


@fsdp()
def sharded_decoupled(folder: Path) -> dict[str, Any]:
    return run(folder, model(**DECOUPLED), measure=evaluations, num_train_epochs=1)


@fsdp()
def sharded_adamw(folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """With SGD there would be no state of the optimizer to save."""
    adamw = {"optim": "adamw_torch", "learning_rate": 1e-2, "backbone_learning_rate": 1e-2, "save_strategy": "epoch"}
    return run(folder, model(), checkpoint=checkpoint, **adamw, **EPOCHS)


def aligned_after_training(made: PicoTrainer) -> dict[str, Any]:
    """The towers are sharded still, and one process has a batch of training images more than the other."""
    made.fit_alignment()
    made.args.align_gallery = True
    moments = {name: whole(buffer).clone() for name, buffer in made._pico_model().image_moments.named_buffers()}
    return {"aligned": made.evaluate(CaptionedImageDataset(rows(41, seed=4))), "moments": moments}


@fsdp()
def sharded_alignment(folder: Path) -> dict[str, Any]:
    data = CountedDataset(rows(49))
    return run(folder, model(), measure=aligned_after_training, data=data, num_train_epochs=1)


def test_sharded_towers_move_galleries_as_whole_ones_do(one_and_two):
    expected, *results = one_and_two(sharded_alignment)
    aligned = {name: value for name, value in expected["aligned"].items() if "aligned" in name}
    assert "eval_aligned_rsum" in aligned
    assert int(expected["moments"]["count"]) == 49
    for result in results:
        assert {name: result["aligned"][name] for name in aligned} == pytest.approx(aligned)
        assert_close(result["moments"], expected["moments"], 1e-4)


@pytest.mark.parametrize(
    ("training", "alone"), [(sharded, infonce), (sharded_chunks, sharded_chunks), (sharded_adapter, adapter)]
)
def test_gradient_and_loss_of_sharded_towers_are_those_of_the_whole_batch(one_and_two, training, alone):
    assert_first_gradients_and_losses(*one_and_two(training, alone))


@pytest.mark.parametrize(("training", "alone"), [(sharded, infonce), (sharded_adapter, adapter)])
def test_sharded_towers_train_as_whole_ones_do(one_and_two, training, alone):
    expected, first, second = one_and_two(training, alone)
    assert_close(first["state"], expected["state"], 1e-4)
    assert not second["state"]  # collected on the first process alone
    assert_same_log(first["log"], expected["log"])
    assert torch.equal(first["scores"], second["scores"])
    torch.testing.assert_close(first["scores"], expected["scores"], rtol=0, atol=1e-4)


def test_sharded_towers_train_beside_a_network_and_uncertainty(results_of):
    first, second = results_of(sharded_decoupled, 2)
    state = first["state"]
    assert {"uncertainty_prototypes.image", "alignment_head.component_weights"} <= state.keys()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert first["gradients"]["uncertainty_prototypes.image"].any()
    assert all(torch.equal(*sides) for sides in zip(first["uncertainty"], second["uncertainty"], strict=True))
    assert first["reranking"] == second["reranking"]


def test_a_sharded_checkpoint_loads_as_any_other(results_of):
    first, _ = results_of(sharded_adamw, 2)
    checkpoint = first["folder"] / "checkpoint-6"
    loaded, info = PicoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    assert_close(dict(loaded.state_dict()), first["state"], 0.0)
    assert all(side.stage == 2 and side.prototypes.any() for side in loaded.style_prototypes.values())
    # FSDP makes a class of its own of the model; what is saved names ours, and its code.
    named = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert named["AutoModel"] == "modeling_pico.PicoModel"
    assert {"modeling_pico.py", "prototypes_pico.py"} <= {file.name for file in checkpoint.glob("*.py")}
    assert not list(checkpoint.glob("_fsdp*"))


def test_a_sharded_training_resumes_bit_for_bit(results_of):
    first, _ = results_of(sharded_adamw, 2)
    again, _ = results_of(sharded_adamw, 2, first["folder"] / "checkpoint-2")
    assert_close(again["state"], first["state"], 0.0)
    assert again["log"] == first["log"]


def test_half_precision_of_sharded_towers_is_that_of_whole_ones(results_of, one_and_two):
    alone, first, second = one_and_two(sharded_bf16)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    exact = results_of(infonce)[0]["losses"][:2]
    assert means != pytest.approx(exact, rel=1e-4)
    assert means == pytest.approx(exact, rel=0.02) and means == pytest.approx(alone["losses"], rel=0.02)
    assert {tensor.dtype for tensor in first["state"].values() if tensor.is_floating_point()} == {torch.float32}
    # Embeddings leave the model as they do under autocast alone; FSDP by itself would round them.
    assert alone["dtypes"] == first["dtypes"] == second["dtypes"] == {torch.float32}
