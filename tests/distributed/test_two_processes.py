"""Two processes train, evaluate and resume as one process with the whole batch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_pico.evaluation import folded_retrieval_metrics


WORKER = Path(__file__).with_name("worker.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of one process, and of both of two."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from worker import main

    single = main(folder / "single")
    return single, *(torch.load(folder / f"rank{rank}-of-2.pt", weights_only=False) for rank in (0, 1))


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


def test_batches_differ_in_width_and_repeat_ids_across_processes(results):
    single, first, second = (result["infonce"] for result in results)
    assert any(a != b for a, b in zip(first["widths"], second["widths"], strict=True))
    assert any(set(a) & set(b) for a, b in zip(first["ids"], second["ids"], strict=True))
    assert [a + b for a, b in zip(first["ids"], second["ids"], strict=True)] == single["ids"]


@pytest.mark.parametrize("run", ["infonce", "hinge", "chunks"])
def test_gradient_and_loss_are_those_of_the_whole_batch(results, run):
    single, first, second = (result[run] for result in results)
    assert max(float(gradient.abs().max()) for gradient in single["gradients"].values()) > 0.1
    assert_close(first["gradients"], single["gradients"], 1e-5)
    assert_close(first["gradients"], second["gradients"], 0.0)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(single["losses"], rel=1e-4)


def test_chunks_leave_the_gradient_as_it_is(results):
    for result in results:
        assert_close(result["chunks"]["gradients"], result["infonce"]["gradients"], 1e-5)


@pytest.mark.parametrize("run", ["infonce", "hinge", "subset"])
def test_training_ends_alike_on_both_and_as_with_one_process(results, run):
    single, first, second = (result[run] for result in results)
    assert single["steps"] == first["steps"] == second["steps"]
    assert_close(first["state"], second["state"], 0.0)
    assert_close(first["state"], single["state"], 1e-4)
    assert int(first["state"]["alignment_head.style_prototypes.num_constructions"]) == len(single["log"]) == 2
    for mine, other in zip(first["log"], single["log"], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_auxiliary_losses_are_of_either_process_and_logged_as_their_mean(results):
    single, first, second = (result["decoupled"] for result in results)
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert_close(first["state"], second["state"], 0.0)
    terms = ("semantic_loss", "modality_loss", "integrity_loss", "sampled_integrity_loss", "loss")
    assert len(single["losses_logged"]) == len(first["losses_logged"]) == single["steps"]
    for term in terms:
        assert [entry[term] for entry in first["losses_logged"]] == [entry[term] for entry in second["losses_logged"]]
        # Distributions are over half the batch: alike, not the same.
        assert first["losses_logged"][0][term] == pytest.approx(single["losses_logged"][0][term], rel=0.5)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx([entry["loss"] for entry in first["losses_logged"]], rel=1e-3)


@pytest.mark.parametrize("run", ["infonce", "hinge"])
def test_evaluation_of_an_odd_set_is_that_of_one_process(results, run):
    single, first, second = (result[run] for result in results)
    assert first["scores"].shape == single["scores"].shape == (9, 18)
    assert torch.equal(first["scores"], second["scores"])
    torch.testing.assert_close(first["scores"], single["scores"], rtol=0, atol=1e-4)
    for name in single["evaluation"]:
        if name != "eval_runtime":
            assert first["evaluation"][name] == second["evaluation"][name]
            assert first["evaluation"][name] == pytest.approx(single["evaluation"][name], abs=1e-4)
    assert first["styles"] == second["styles"] == pytest.approx(single["styles"], abs=1e-4)


@pytest.mark.parametrize("run", ["infonce", "hinge"])
def test_folds_that_processes_share_are_those_of_the_full_matrix(results, run):
    single, first, second = (result[run] for result in results)
    assert first["folds"] == second["folds"]
    assert first["folds"] == pytest.approx(single["folds"], abs=1e-4)
    expected = folded_retrieval_metrics(single["scores"], *single["eval_ids"], num_folds=3)
    assert {name: first["folds"][name] for name in expected} == expected
    assert first["folds"]["rsum"] != first["evaluation"]["eval_rsum"]


def test_feedback_of_a_part_of_the_images_is_a_different_one(results):
    gains = [[entry["prototype_feedback_gain"] for entry in result["subset"]["log"]] for result in results]
    assert gains[0] != [entry["prototype_feedback_gain"] for entry in results[0]["infonce"]["log"]]


def test_two_processes_resume_bit_for_bit(results):
    for result in results:
        assert_close(result["resumed"]["state"], result["infonce"]["state"], 0.0)
        assert result["resumed"]["log"] == result["infonce"]["log"]


def test_without_gathered_negatives_processes_see_their_own_pairs(results):
    single, first, second = (result["local"] for result in results)
    assert_close(first["state"], second["state"], 0.0)
    # Half the negatives make an easier task.
    assert (first["losses"][0] + second["losses"][0]) / 2 < single["losses"][0] - 0.1
    assert first["losses"][0] != second["losses"][0]
