"""Two and four processes train, evaluate and resume as one process with the whole batch does; a death is no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_pico import PicoModel
from modeling_pico.evaluation import UncertaintyReranking, folded_retrieval_metrics


WORKER = Path(__file__).with_name("worker.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Results of one process, of both of two and of all of four, and how the death of a process ended the two."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    from worker import main

    options = {"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    four = subprocess.Popen([sys.executable, str(WORKER), str(folder), "4"], **options)
    single = main(folder / "single")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run([*launch, str(WORKER), str(folder)], timeout=240, check=False, **options)
    ended = time.time()
    printed, _ = four.communicate(timeout=240)
    assert four.returncode == 0, printed[-3000:]
    results = {}
    for processes in (2, 4):
        for rank in range(processes):
            file = folder / f"rank{rank}-of-{processes}.pt"
            assert file.is_file(), two.stdout[-3000:]
            results[rank, processes] = torch.load(file, weights_only=False)
    return SimpleNamespace(folder=folder, single=single, results=results, two=two, ended=ended)


@pytest.fixture(scope="module")
def results(launched):
    """Results of one process, and of both of two."""
    return launched.single, launched.results[0, 2], launched.results[1, 2]


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


RUNS = ["infonce", "hinge", "chunks", "pooled", "adapter", "sharded", "sharded_chunks", "sharded_adapter"]


@pytest.mark.parametrize("run", RUNS)
def test_gradient_and_loss_are_those_of_the_whole_batch(results, run):
    single, first, second = (result[run] for result in results)
    assert max(float(gradient.abs().max()) for gradient in single["gradients"].values()) > 0.1
    assert_close(first["gradients"], single["gradients"], 1e-5)
    # As DDP is told: it looks for no parameters without a gradient, and none of these runs has any.
    assert not first["find_unused"]
    assert_close(first["gradients"], second["gradients"], 0.0)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(single["losses"], rel=1e-4)


def test_chunks_leave_the_gradient_as_it_is(results):
    for result in results:
        assert_close(result["chunks"]["gradients"], result["infonce"]["gradients"], 1e-5)


@pytest.mark.parametrize("run", ["infonce", "hinge", "subset", "adapter"])
def test_training_ends_alike_on_both_and_as_with_one_process(results, run):
    single, first, second = (result[run] for result in results)
    assert single["steps"] == first["steps"] == second["steps"]
    assert_close(first["state"], second["state"], 0.0)
    assert_close(first["state"], single["state"], 1e-4)
    assert len(first["log"]) == len(single["log"]) == 2
    assert [int(tensor) for name, tensor in first["state"].items() if name.endswith(".stage")][-2:] == [2, 2]
    for mine, other in zip(first["log"], single["log"], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_auxiliary_losses_are_of_either_process_and_logged_as_their_mean(results):
    single, first, second = (result["decoupled"] for result in results)
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert_close(first["state"], second["state"], 0.0)
    terms = ("semantic_loss", "modality_loss", "integrity_loss", "sampled_integrity_loss")
    # Of two or three meanings that are no match, the mean closeness differs much between halves of a batch.
    halves = ("uncertainty_loss", "loss")
    assert len(single["losses_logged"]) == len(first["losses_logged"]) == single["steps"]
    for term in (*terms, "uncertainty_diversity_loss", *halves):
        assert [entry[term] for entry in first["losses_logged"]] == [entry[term] for entry in second["losses_logged"]]
        # Distributions are over half the batch: alike, not the same.
        if term not in halves:
            assert first["losses_logged"][0][term] == pytest.approx(single["losses_logged"][0][term], rel=0.5)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx([entry["loss"] for entry in first["losses_logged"]], rel=1e-3)


def test_auxiliary_losses_of_a_process_without_a_word_are_finite(results):
    _, first, second = (result["masked_decoupled"] for result in results)
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert_close(first["state"], second["state"], 0.0)
    assert len(first["losses"]) == 2 and torch.tensor([first["losses"], second["losses"]]).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in first["gradients"].values())


@pytest.mark.parametrize("processes", [2, 4])
def test_all_processes_read_kept_embeddings_or_all_encode(launched, processes):
    for rank in range(processes):
        encoded, rsum = zip(*launched.results[rank, processes]["cached"], strict=True)
        assert encoded == (True, False, True)
        assert rsum == pytest.approx([launched.single["cached"][0][1]] * 3)


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


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("run", ["uneven", "masked"])
def test_one_two_and_four_processes_train_and_measure_alike(launched, run, processes):
    single = launched.single[run]
    ranks = [launched.results[rank, processes][run] for rank in range(processes)]
    sizes = [[len(ids) for ids in batches] for batches in zip(*(rank["ids"] for rank in ranks), strict=True)]
    if run == "uneven":
        # 13 images that are no multiple of any number of processes.
        assert sizes == [[16 // processes] * processes, {2: [7, 6], 4: [4, 3, 3, 3]}[processes]] * 3
    else:
        assert any(len({rank["widths"][step] for rank in ranks}) > 1 for step in range(len(sizes)))
    losses = [sum(step) / processes for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(single["losses"], rel=1e-4)
    assert len(losses) == 6 and len(set(losses)) == 6
    for rank in ranks:
        assert_close(rank["state"], ranks[0]["state"], 0.0)
        assert_close(rank["state"], single["state"], 1e-4)
        assert len(rank["log"]) == len(single["log"]) == 2
        for mine, other in zip(rank["log"], single["log"], strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
        for numbers in ("evaluation", "folds", "styles"):
            mine, other = ({**result[numbers], "eval_runtime": 0} for result in (rank, single))
            assert mine == pytest.approx(other, abs=1e-4)
    assert all(tensor.isfinite().all() for tensor in ranks[0]["state"].values())


@pytest.mark.parametrize("run", ["infonce", "hinge"])
def test_folds_that_processes_share_are_those_of_the_full_matrix(results, run):
    single, first, second = (result[run] for result in results)
    assert first["folds"] == second["folds"]
    assert first["folds"] == pytest.approx(single["folds"], abs=1e-4)
    expected = folded_retrieval_metrics(single["scores"], *single["eval_ids"], num_folds=3)
    assert {name: first["folds"][name] for name in expected} == expected
    assert first["folds"]["rsum"] != first["evaluation"]["eval_rsum"]


def test_reranking_is_learned_and_used_alike_on_both(results):
    _, first, second = (result["decoupled"] for result in results)
    assert first["reranking"] == second["reranking"] and first["evaluation"] == pytest.approx(
        second["evaluation"] | {"eval_runtime": first["evaluation"]["eval_runtime"]}
    )
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


def test_feedback_of_a_part_of_the_images_is_a_different_one(results):
    gains = [[entry["prototype_feedback_gain"] for entry in result["subset"]["log"]] for result in results]
    assert gains[0] != [entry["prototype_feedback_gain"] for entry in results[0]["infonce"]["log"]]


def test_two_processes_resume_bit_for_bit(results):
    for result in results:
        assert_close(result["resumed"]["state"], result["infonce"]["state"], 0.0)
        assert result["resumed"]["log"] == result["infonce"]["log"]


def test_two_processes_take_over_from_one(results):
    single, first, second = results
    for result in (first["taken over"], second["taken over"]):
        assert_close(result["state"], single["infonce"]["state"], 1e-4)
        assert len(result["losses"]) == len(single["infonce"]["losses"]) - 2
    # 20 images in batches of 16: one step an epoch, and two of three steps were done.
    for result in (first["widened"], second["widened"]):
        assert result["steps"] == 3 and len(result["losses"]) == 1
        assert_close(result["state"], first["widened"]["state"], 0.0)


@pytest.mark.parametrize("run", ["skip", "infinite"])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_both(results, run):
    _, first, second = (result[run] for result in results)
    assert torch.tensor(first["losses"]).isfinite().all()
    assert torch.tensor(second["losses"]).isfinite().tolist() == [True, False, True, True]
    assert first["skipped"] == second["skipped"] == [1]
    assert_close(first["state"], second["state"], 0.0)
    assert all(tensor.isfinite().all() for tensor in first["state"].values())


def test_a_loss_that_is_not_finite_stops_both_with_the_ids_of_all(results):
    single, first, second = (result["stop"] for result in results)
    assert first == second
    assert "loss (nan, nan) of step 2 is not finite" in first and "loss (nan) of step 2" in single
    ids = [[message.split("by image_id: ")[1].split(". ")[0]] for message in (first, single)]
    assert ids[0] == ids[1] and len(ids[0][0].split(", ")) == 8
    assert "Not finite are the pixels of" in first


def test_without_gathered_negatives_processes_see_their_own_pairs(results):
    single, first, second = (result["local"] for result in results)
    assert_close(first["state"], second["state"], 0.0)
    # Half the negatives make an easier task.
    assert (first["losses"][0] + second["losses"][0]) / 2 < single["losses"][0] - 0.1
    assert first["losses"][0] != second["losses"][0]


def test_a_killed_process_ends_the_run_with_its_name_and_leaves_a_checkpoint_for_one(launched, tmp_path):
    assert launched.two.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in launched.two.stdout
    checkpoints = sorted(path.name for path in (launched.folder / "mortal").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2"]
    # The other one did not wait for a timeout, which is half an hour.
    written = (launched.folder / "mortal" / "checkpoint-2" / "trainer_state.json").stat().st_mtime
    assert launched.ended - written < 60
    from worker import EPOCHS, PURITY, train

    checkpoint = str(launched.folder / "mortal" / "checkpoint-2")
    resumed = train(tmp_path, PURITY, checkpoint=checkpoint, **EPOCHS)
    assert_close(resumed.model.state_dict(), launched.single["infonce"]["state"], 1e-4)


# Fully sharded (FSDP2)


@pytest.mark.parametrize("run", ["sharded", "sharded_adapter"])
def test_sharded_towers_train_as_whole_ones_do(results, run):
    single, first, second = (result[run] for result in results)
    assert_close(first["state"], single["state"], 1e-4)
    assert not second["state"]  # collected on the first process alone
    for mine, other in zip(first["log"], single["log"], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    assert torch.equal(first["scores"], second["scores"])
    torch.testing.assert_close(first["scores"], single["scores"], rtol=0, atol=1e-4)


def test_sharded_towers_train_beside_a_network_and_uncertainty(results):
    _, first, second = (result["sharded_decoupled"] for result in results)
    state = first["state"]
    assert {"uncertainty_prototypes.image", "alignment_head.component_weights"} <= state.keys()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert first["gradients"]["uncertainty_prototypes.image"].any()
    assert all(torch.equal(*sides) for sides in zip(first["uncertainty"], second["uncertainty"], strict=True))
    assert first["reranking"] == second["reranking"]


def test_a_sharded_checkpoint_loads_as_any_other(launched, results):
    checkpoint = launched.folder / "adamw" / "checkpoint-6"
    loaded, info = PicoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    assert_close(dict(loaded.state_dict()), results[1]["adamw"]["state"], 0.0)
    assert all(side.stage == 2 and side.prototypes.any() for side in loaded.style_prototypes.values())
    # FSDP makes a class of its own of the model; what is saved names ours, and its code.
    named = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert named["AutoModel"] == "modeling_pico.PicoModel"
    assert {"modeling_pico.py", "prototypes_pico.py"} <= {file.name for file in checkpoint.glob("*.py")}
    assert not list(checkpoint.glob("_fsdp*"))


def test_half_precision_of_sharded_towers_is_that_of_whole_ones(results):
    single, first, second = (result["sharded_bf16"] for result in results)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    exact = results[0]["sharded"]["losses"][:2]
    assert means != pytest.approx(exact, rel=1e-4)
    assert means == pytest.approx(exact, rel=0.02) and means == pytest.approx(single["losses"], rel=0.02)
    assert {tensor.dtype for tensor in first["state"].values() if tensor.is_floating_point()} == {torch.float32}
    # Embeddings leave the model as they do under autocast alone; FSDP by itself would round them.
    assert single["dtypes"] == first["dtypes"] == second["dtypes"] == {torch.float32}


def test_a_sharded_training_resumes_bit_for_bit(results):
    first = results[1]
    assert_close(first["adamw_resumed"]["state"], first["adamw"]["state"], 0.0)
    assert first["adamw_resumed"]["log"] == first["adamw"]["log"]
