"""What holds for any input: the score, recall, K-means and the feedback."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pico import pair_scores
from modeling_pico.evaluation import retrieval_metrics, retrieval_ranks
from modeling_pico.model.scoring_pico import reference_pair_scores
from modeling_pico.model.scoring_tiled_pico import tiled_pair_scores
from modeling_pico.training.construction import feedback_weight, weighted_kmeans


RECALLS = [(direction, k) for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def numbers(draw, size: int, values: st.SearchStrategy) -> torch.Tensor:
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)))


@st.composite
def sides(draw):
    """Images and texts of any shape and mask. Few different coordinates make ties the rule."""
    images, texts, patches, words, dim = draw(st.tuples(*[st.integers(1, 4)] * 5))
    coordinate = st.sampled_from([-1.0, 0.0, 0.5, 1.0]) if draw(st.booleans()) else st.floats(-2, 2, width=16)
    return (
        numbers(draw, images * patches * dim, coordinate).view(images, patches, dim),
        numbers(draw, texts * words * dim, coordinate).view(texts, words, dim),
        numbers(draw, images * patches, st.booleans()).view(images, patches),
        numbers(draw, texts * words, st.booleans()).view(texts, words),
    )


def score_and_gradients(path, images, texts, *rest) -> tuple[torch.Tensor, ...]:
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scores = path(images, texts, *rest)
    # Every score has a weight of its own, so that no gradient hides behind another.
    (scores * torch.arange(1.0, scores.numel() + 1).view_as(scores)).sum().backward()
    return scores.detach(), images.grad, texts.grad


@settings(max_examples=60)
@given(sides=sides(), tile_elements=st.integers(1, 40))
def test_tiles_give_the_score_and_gradients_of_the_definition(sides, tile_elements):
    expected = score_and_gradients(reference_pair_scores, *sides)
    for mine, other in zip(score_and_gradients(tiled_pair_scores, *sides, tile_elements), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(sides=sides(), data=st.data())
def test_the_order_of_tokens_does_not_matter_and_sides_may_be_swapped(sides, data):
    images, texts, image_mask, text_mask = sides
    scores = pair_scores(*sides)
    patches = data.draw(st.permutations(range(images.shape[1])))
    words = data.draw(st.permutations(range(texts.shape[1])))
    shuffled = images[:, patches], texts[:, words], image_mask[:, patches], text_mask[:, words]
    torch.testing.assert_close(pair_scores(*shuffled), scores, rtol=1e-5, atol=1e-5)
    swapped = pair_scores(texts, images, text_mask, image_mask)
    torch.testing.assert_close(swapped.T, scores, rtol=1e-5, atol=1e-5)


@st.composite
def galleries(draw):
    """Scores with ties, and ids of which some have several images, several texts or both."""
    ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    image_ids = draw(st.permutations(ids + draw(st.lists(st.sampled_from(ids), max_size=5))))
    text_ids = draw(st.permutations(ids + draw(st.lists(st.sampled_from(ids), max_size=12))))
    scores = numbers(draw, len(image_ids) * len(text_ids), st.sampled_from([-1.0, 0.0, 0.25, 1.0]))
    return scores.view(len(image_ids), len(text_ids)), image_ids, text_ids


def recall_by_definition(scores: list[list[float]], queries: list[int], gallery: list[int], k: int) -> float:
    """Sorted by score, wrong items first among equals: is a right one among the first `k`?"""
    found = 0
    for row, query in zip(scores, queries, strict=True):
        order = sorted(range(len(gallery)), key=lambda item: (-row[item], gallery[item] == query))
        found += any(gallery[item] == query for item in order[:k])
    return 100 * found / len(queries)


@settings(max_examples=60)
@given(problem=galleries())
def test_recall_is_what_sorting_gives(problem):
    scores, image_ids, text_ids = problem
    metrics = retrieval_metrics(*retrieval_ranks(scores, image_ids, text_ids))
    for direction, k in RECALLS:
        matrix, queries, gallery = scores, image_ids, text_ids
        if direction == "text_to_image":
            matrix, queries, gallery = scores.T, text_ids, image_ids
        expected = recall_by_definition(matrix.tolist(), queries, gallery, k)
        assert metrics[f"{direction}_recall_at_{k}"] == expected
    assert math.isclose(metrics["rsum"], sum(metrics[f"{direction}_recall_at_{k}"] for direction, k in RECALLS))


@settings(max_examples=40)
@given(problem=galleries(), data=st.data())
def test_the_order_of_the_gallery_does_not_matter_to_recall(problem, data):
    scores, image_ids, text_ids = problem
    rows = data.draw(st.permutations(range(len(image_ids))))
    columns = data.draw(st.permutations(range(len(text_ids))))
    shuffled = scores[rows][:, columns], [image_ids[row] for row in rows], [text_ids[column] for column in columns]
    assert retrieval_metrics(*retrieval_ranks(*shuffled)) == retrieval_metrics(
        *retrieval_ranks(scores, image_ids, text_ids)
    )


@st.composite
def clusterings(draw):
    """Points of which many are equal, weights of which some are zero, and up to twice as many clusters as points."""
    count = draw(st.integers(1, 12))
    coordinate = st.sampled_from([-2.0, 0.0, 3.0]) if draw(st.booleans()) else st.floats(-100, 100, width=32)
    points = numbers(draw, count * 2, coordinate).view(count, 2)
    weights = numbers(draw, count, st.sampled_from([0.0, 0.25, 1.0]))
    return points, weights, draw(st.integers(1, 2 * count))


@settings(max_examples=60)
@given(problem=clusterings(), seed=st.integers(0, 99))
def test_kmeans_never_gains_energy_stays_among_the_points_and_repeats(problem, seed):
    points, weights, clusters = problem

    def cluster():
        return weighted_kmeans(points, weights, clusters, generator=torch.Generator().manual_seed(seed), tolerance=0.0)

    centroids, assignment, energies = cluster()
    scale = float(points.abs().max().clamp(min=1)) ** 2 * len(points)
    assert all(after <= before + 1e-6 * scale for before, after in zip(energies, energies[1:], strict=False))
    # A mean of points lies in their hull, and so in every interval of it: here those of the axes and the diagonals.
    for direction in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -1.0)):
        projected, inside = points @ torch.tensor(direction), centroids @ torch.tensor(direction)
        slack = 1e-5 * scale**0.5
        assert inside.min() >= projected.min() - slack and inside.max() <= projected.max() + slack
    assert centroids.shape == (clusters, 2) and centroids.isfinite().all()
    # More clusters than distinct points leave some empty, and none of the points far from its own.
    if weights.all() and clusters >= len(points.unique(dim=0)):
        assert energies[-1] <= 1e-5 * scale
    assert len(assignment.unique()) <= len(points.unique(dim=0))
    again = cluster()
    assert torch.equal(again[0], centroids) and torch.equal(again[1], assignment) and again[2] == energies


def weights_of(gains: list[float], kappa: float) -> list[float]:
    """The weight with which each construction entered."""
    log_sum, weights = -math.inf, []
    for gain in gains:
        weight, log_sum = feedback_weight(log_sum, gain, kappa)
        weights.append(weight)
    return weights


gains_of_runs = st.lists(st.floats(-600, 600), min_size=1, max_size=8)


@settings(max_examples=60)
@given(gains=gains_of_runs, kappa=st.floats(1e-3, 100), values=st.lists(st.floats(-5, 5, width=16), min_size=8))
def test_prototypes_stay_between_the_constructions_they_are_made_of(gains, kappa, values):
    weights = weights_of(gains, kappa)
    assert weights[0] == 1.0 and all(0.0 <= weight <= 1.0 for weight in weights)
    mixed = values[0]
    for value, weight in zip(values, weights, strict=False):
        mixed = mixed * (1 - weight) + value * weight
    used = values[: len(gains)]
    assert min(used) - 1e-5 <= mixed <= max(used) + 1e-5


@settings(max_examples=60)
@given(gains=gains_of_runs, more=st.floats(0, 600), kappa=st.floats(1e-2, 100))
def test_a_larger_gain_never_weighs_less_and_those_before_may_come_in_any_order(gains, more, kappa):
    *before, last = gains
    weight = weights_of(gains, kappa)[-1]
    assert weights_of([*before, last + more], kappa)[-1] >= weight - 1e-12
    assert math.isclose(weights_of([*reversed(before), last], kappa)[-1], weight, rel_tol=1e-6, abs_tol=1e-12)
