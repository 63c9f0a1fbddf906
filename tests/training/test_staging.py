from __future__ import annotations

import math

import pytest
import torch

from modeling_pico.model.alignment_heads_pico import PicoHead
from modeling_pico.model.prototypes_pico import sign_agreement
from modeling_pico.training import PicoTrainingArguments, PrototypeConstruction, PrototypeState, staging
from modeling_pico.training.arguments import FEEDBACKS


DIM = 6


@pytest.fixture
def make(tiny_config, tmp_path):
    """Builds a construction with fresh prototypes, for epochs of 10 steps and a training of 100."""

    def build(steps_per_epoch: int = 10, max_steps: int = 100, **options) -> PrototypeConstruction:
        args = PicoTrainingArguments(
            output_dir=str(tmp_path / "output"),
            use_cpu=True,
            report_to=[],
            **{"feedback": "constant", "reservoir_pairs": 8, **options},
        )
        prototypes = PicoHead(tiny_config(embedding_dim=DIM)).style_prototypes
        construction = PrototypeConstruction(prototypes, args)
        construction.start(steps_per_epoch, max_steps)
        return construction

    return build


def collect(construction: PrototypeConstruction, seed: int = 0, pairs: int = 8) -> None:
    """One batch of random columns and signs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, pairs, 5, DIM, generator=generator)
    mask = torch.ones(pairs, 5)
    prototypes = construction.prototypes
    agreement = sign_agreement(tokens[0], mask, tokens[1], mask)
    construction.collect_statistics(agreement, torch.ones(pairs, dtype=torch.bool))
    construction.collect_columns(prototypes.columns(tokens[0], mask), prototypes.columns(tokens[1], mask))


def buffers_of(construction: PrototypeConstruction) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in construction.prototypes.named_buffers()}


def warnings_of(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(staging.logger, "warning", messages.append)
    return messages


# When


def finish(construction: PrototypeConstruction) -> None:
    collect(construction)
    construction.propose()
    construction.apply_pending()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [20, 40, 50, 60]),
        ({"prototype_start": 1, "prototype_update_start": 2}, [10, 20, 30, 40]),
        ({"prototype_interval": 2}, [20, 40, 60, 80]),
    ],
)
def test_schedule(make, options, steps):
    construction = make(**options)
    for step in steps:
        assert construction.next_step() == step
        assert not construction.is_reached(step - 1)
        assert construction.is_reached(step)
        assert construction.is_reached(step + 1)
        finish(construction)


def test_a_pending_proposal_counts_for_the_schedule(make):
    construction = make()
    collect(construction)
    construction.propose()
    assert construction.next_step() == 40
    construction.apply_pending()
    assert construction.next_step() == 40


@pytest.mark.parametrize("max_steps", [20, 19, 21])
def test_nothing_is_built_after_the_last_step(make, max_steps):
    construction = make(max_steps=max_steps)
    assert not construction.is_reached(max_steps)
    assert construction.is_reached(20) == (max_steps == 21)
    assert construction.needs_statistics(18) == (max_steps == 21)


def test_a_training_too_short_for_prototypes_warns(make, monkeypatch):
    messages = warnings_of(monkeypatch)
    make(max_steps=41)
    assert messages == []
    make(max_steps=20)
    make(max_steps=21)
    none, once = messages
    assert "ends at step 20 (epoch 2)" in none and "`prototype_start`, now 2 epochs" in none
    assert "ends at step 21 (epoch 2.1)" in once and "for the first time (step 40)" in once
    assert "`prototype_update_start`, now 4 epochs" in once


def test_no_warning_of_updates_that_have_been(make, monkeypatch):
    construction, messages = make(), warnings_of(monkeypatch)
    construction.prototypes.stage.fill_(2)
    construction.start(10, 20)
    assert messages == []


def test_windows_of_collection(make):
    construction = make(reservoir_pairs=8)
    # Statistics over the epoch before step 20; columns from the last two batches of four pairs.
    assert [step for step in range(25) if construction.needs_statistics(step)] == list(range(10, 25))
    assert [step for step in range(20) if construction.needs_columns(step, 4)] == [18, 19]
    assert [step for step in range(20) if construction.needs_columns(step, 3)] == [17, 18, 19]
    assert [step for step in range(20) if construction.needs_columns(step, 100)] == [19]
    finish(construction)
    assert [step for step in range(20, 40) if construction.needs_statistics(step)] == list(range(30, 40))


def test_the_schedule_does_not_read_the_device_at_every_step(make):
    construction = make()
    finish(construction)
    # A tensor without values stands for one whose reading would wait for the device.
    construction.prototypes.num_constructions = torch.zeros((), dtype=torch.int64, device="meta")
    assert construction.next_step() == 40
    assert construction.needs_columns(39, 4) and not construction.is_reached(39)


def test_the_schedule_follows_a_model_that_has_prototypes_already(make):
    construction = make()
    construction.prototypes.num_constructions.fill_(2)
    construction.start(10, 100)
    assert construction.next_step() == 50


def test_the_reservoir_is_no_longer_than_the_interval(make):
    construction = make(reservoir_pairs=1000)
    assert [step for step in range(20) if construction.needs_columns(step, 4)] == list(range(10, 20))


# What


@pytest.mark.parametrize("sizes", [(3, 3, 3), (10,), (5,), (2, 9), (1, 1, 1, 1, 1, 1, 1), (4, 0, 4, 0)])
def test_the_reservoir_keeps_the_last_pairs(make, sizes):
    construction = make(reservoir_pairs=5)
    images = torch.arange(sum(sizes), dtype=torch.float32)[:, None, None].expand(-1, DIM, 4)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        construction.collect_columns(images[part], -images[part])
        start += size
    kept_images, kept_texts = construction.reservoir()
    assert torch.equal(kept_images, images[-5:])
    assert torch.equal(kept_texts, -images[-5:])


def test_an_empty_reservoir_is_refused(make):
    construction = make()
    with pytest.raises(ValueError, match="train for a step first"):
        construction.reservoir()
    with pytest.raises(ValueError, match="train for a step first"):
        construction.propose()


def test_collected_statistics_are_sums_over_valid_pairs(make):
    construction = make()
    agreement, valid = torch.rand(3, 4, DIM), torch.tensor([True, True, False, True])
    for batch in agreement:
        construction.collect_statistics(batch, valid)
    prototypes = construction.prototypes
    torch.testing.assert_close(prototypes.matched_sum, agreement[:, valid].sum(dim=(0, 1)))
    assert float(prototypes.matched_count) == 9


def test_a_proposal_waits_until_it_is_applied(make):
    construction = make()
    construction.due = True
    collect(construction)
    before = buffers_of(construction)
    report = construction.propose()
    statistics = {"matched_sum", "matched_count"}
    for name, buffer in construction.prototypes.named_buffers():
        if name in statistics:
            assert before[name].any()
            assert not buffer.any()
        else:
            assert torch.equal(buffer, before[name]), name
    assert not construction.due
    with pytest.raises(ValueError, match="No columns were collected"):
        construction.reservoir()
    assert report["prototype_stage"] == 1
    assert report["prototype_feedback_weight"] == 1.0
    assert report["visual_prototype_movement"] > 0
    assert report["textual_prototype_movement"] > 0

    pending = construction.pending
    construction.apply_pending()
    for name, tensor in pending.tensors().items():
        assert torch.equal(getattr(construction.prototypes, name), tensor), name
    assert int(construction.prototypes.stage) == 1
    assert int(construction.prototypes.num_constructions) == 1
    assert construction.pending is None
    after = buffers_of(construction)
    construction.apply_pending()
    assert all(torch.equal(after[name], buffer) for name, buffer in construction.prototypes.named_buffers())

    collect(construction, seed=1)
    assert construction.propose()["prototype_stage"] == 2
    construction.apply_pending()
    assert int(construction.prototypes.stage) == 2
    assert int(construction.prototypes.num_constructions) == 2


def test_a_proposal_is_reproducible_whatever_the_state_of_the_global_generator(make):
    states = []
    for seed in (0, 1):
        construction = make()
        collect(construction)
        torch.manual_seed(seed)
        construction.propose()
        states.append(construction.pending.visual_prototypes)
    assert torch.equal(*states)


def test_using_restores_bit_for_bit_even_after_an_error(make):
    construction = make()
    finish(construction)
    state = PrototypeState.of(construction.prototypes)
    for name, tensor in state.tensors().items():
        setattr(state, name, torch.randn(tensor.shape) / 3)
    fresh = make()
    for target, stage in ((construction, 1), (fresh, 1)):
        before = buffers_of(target)
        with pytest.raises(RuntimeError, match="score"), target.using(state):
            assert torch.equal(target.prototypes.visual_prototypes, state.visual_prototypes)
            assert int(target.prototypes.stage) == stage
            raise RuntimeError("score")
        for name, buffer in target.prototypes.named_buffers():
            assert torch.equal(buffer, before[name]), name


# Feedback


def run(construction: PrototypeConstruction, rounds: list[dict]) -> list[dict[str, float]]:
    reports = []
    for seed, arguments in enumerate(rounds):
        collect(construction, seed=seed)
        reports.append(construction.propose(**arguments))
        construction.apply_pending()
    return reports


def test_counterfactual_feedback_scores_the_new_prototypes_and_weighs_by_the_gain(make):
    construction = make(feedback="counterfactual", feedback_kappa=2.0)
    prototypes = construction.prototypes
    seen = []

    def score() -> float:
        seen.append((int(prototypes.stage), prototypes.visual_prototypes.clone()))
        return 103.0

    collect(construction)
    report = construction.propose(rsum=100.0, score=score)
    assert (report["prototype_feedback_gain"], report["prototype_feedback_weight"]) == (3.0, 1.0)
    # Measured in use, though the buffers are still those of plain alignment.
    assert seen[0][0] == 1
    assert torch.equal(seen[0][1], construction.pending.visual_prototypes)
    assert int(prototypes.stage) == 0
    assert not prototypes.visual_prototypes.any()
    assert float(prototypes.feedback_log_sum) == -math.inf
    construction.apply_pending()
    assert float(prototypes.feedback_log_sum) == 1.5

    old = PrototypeState.of(prototypes)
    collect(construction, seed=1)
    report = construction.propose(rsum=102.0, score=score)
    weight = math.exp(0.5) / (math.exp(1.5) + math.exp(0.5))
    assert report["prototype_feedback_gain"] == 1.0
    assert report["prototype_feedback_weight"] == pytest.approx(weight)
    expected = (1 - weight) * old.visual_prototypes + weight * seen[1][1]
    torch.testing.assert_close(construction.pending.visual_prototypes, expected)
    construction.apply_pending()
    assert float(prototypes.feedback_log_sum) == pytest.approx(math.log(math.exp(1.5) + math.exp(0.5)))


def test_epoch_delta_feedback(make):
    construction = make(feedback="epoch_delta")
    never = {"score": lambda: pytest.fail("the difference of evaluations needs no second score")}
    reports = []
    for value in (100.0, 104.0, 103.0):
        reports += run(construction, [{"rsum": value, **never}])
        construction.observe(value)
    assert [report["prototype_feedback_gain"] for report in reports] == [0.0, 4.0, -1.0]
    total, weights = 0.0, []
    for gain in (0.0, 4.0, -1.0):
        total += math.exp(gain)
        weights.append(math.exp(gain) / total)
    assert [report["prototype_feedback_weight"] for report in reports] == pytest.approx(weights)


def test_images_of_the_counterfactual_feedback(make, monkeypatch):
    options = {"feedback": "counterfactual", "feedback_images": 3}
    construction = make(**options)
    seen = [set(), set(), set()]
    for seed in range(40):
        images = make(**options, seed=seed).feedback_images(7)
        assert torch.equal(images, make(**options, seed=seed).feedback_images(7))
        for block, image in zip(seen, images.tolist(), strict=True):
            block.add(image)
    # Blocks end at 7/3 and 14/3: one image of each, any of them.
    assert seen == [{0, 1}, {2, 3}, {4, 5, 6}]
    before = torch.random.get_rng_state()
    assert torch.equal(construction.feedback_images(7), construction.feedback_images(7))
    assert torch.equal(torch.random.get_rng_state(), before)
    # Two processes hold the images 0 to 3 and 4 to 8; both get as many.
    monkeypatch.setattr(PicoTrainingArguments, "world_size", property(lambda self: 2))
    images = construction.feedback_images(9)
    assert len(images) == 4
    assert (images < 4).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "options",
    [
        {"feedback": "counterfactual", "feedback_images": None},
        {"feedback": "counterfactual", "feedback_images": 9},
        {"feedback": "counterfactual", "feedback_images": 100},
        # A difference between evaluations, which measure all images anyway.
        {"feedback": "epoch_delta", "feedback_images": 3},
    ],
)
def test_all_images_give_the_feedback(make, options):
    assert make(**options).feedback_images(9) is None


def test_feedback_without_validation(make):
    construction = make(feedback="constant", feedback_weight=0.25)
    reports = run(construction, [{}, {}, {}])
    assert [report["prototype_feedback_weight"] for report in reports] == [1.0, 0.25, 0.25]
    assert all("prototype_feedback_gain" not in report for report in reports)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_feedback_that_needs_validation_says_so(make, feedback):
    construction = make(feedback=feedback)
    collect(construction)
    if feedback in ("counterfactual", "epoch_delta"):
        with pytest.raises(ValueError, match=f"feedback='{feedback}' needs a validation score"):
            construction.propose()
        # Nothing is lost: the same proposal can be made with a score.
        assert construction.propose(100.0, lambda: 100.0)["prototype_feedback_weight"] == 1.0
    else:
        assert construction.propose()["prototype_feedback_weight"] == 1.0


# State


def resumed(make, construction: PrototypeConstruction, folder: str, **options) -> PrototypeConstruction:
    """A second construction with the buffers of the first, as a model checkpoint would bring them, and its file."""
    again = make(**options)
    again.prototypes.load_state_dict(construction.prototypes.state_dict())
    again.load(folder)
    return again


@pytest.mark.parametrize("apply_before_saving", [False, True])
def test_a_resumed_construction_continues_as_if_never_stopped(make, tmp_path, apply_before_saving):
    options = {"feedback": "epoch_delta", "reservoir_pairs": 12}
    construction = make(**options)
    run(construction, [{"rsum": 90.0, "score": lambda: 0.0}])
    collect(construction, seed=5)
    construction.propose(95.0, lambda: 0.0)
    construction.observe(95.0)
    if apply_before_saving:
        construction.apply_pending()
    collect(construction, seed=6)
    collect(construction, seed=7)
    construction.save(str(tmp_path))
    again = resumed(make, construction, str(tmp_path), **options)

    assert again.previous_rsum == 95.0
    assert again.next_step() == construction.next_step()
    assert (again.pending is None) == apply_before_saving
    for own, other in zip(again.reservoir(), construction.reservoir(), strict=True):
        assert torch.equal(own, other)
    for target in (construction, again):
        target.apply_pending()
        collect(target, seed=8)
    reports = [target.propose(97.0, lambda: 0.0) for target in (construction, again)]
    assert reports[0] == reports[1]
    for target in (construction, again):
        target.apply_pending()
    for (name, buffer), (_, other) in zip(
        construction.prototypes.named_buffers(), again.prototypes.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name


def test_a_fresh_construction_survives_disk(make, tmp_path):
    construction = make()
    construction.save(str(tmp_path))
    again = resumed(make, construction, str(tmp_path))
    assert math.isnan(again.previous_rsum)
    assert again.pending is None
    with pytest.raises(ValueError, match="No columns"):
        again.reservoir()


def test_a_checkpoint_without_the_file_warns_and_starts_a_fresh_collection(make, tmp_path, monkeypatch):
    construction = make()
    collect(construction)
    construction.propose()
    messages = warnings_of(monkeypatch)
    construction.load(str(tmp_path / "absent"))
    assert construction.pending is None
    assert len(messages) == 1
    assert "absent" in messages[0]
    assert "is missing" in messages[0]
