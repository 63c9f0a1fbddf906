from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pico.model.alignment_heads_pico import PicoHead
from modeling_pico.model.prototypes_pico import StylePrototypes
from modeling_pico.training import (
    PrototypeState,
    construct_prototypes,
    feedback_weight,
    prototype_construction,
    weighted_kmeans,
)
from modeling_pico.training.prototype_construction import best_start


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# K-means


def test_weighted_kmeans_by_hand():
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    weights = torch.tensor([3.0, 1.0, 1.0, 1.0])
    centroids, assignment, energies = weighted_kmeans(points, weights, 2, initial=torch.tensor([[0.0], [10.0]]))
    assert centroids.tolist() == [[0.25], [11.0]]
    assert assignment.tolist() == [0, 0, 1, 1]
    # 1 + 4 at the start; 3 * 0.25² + 0.75² + 1 + 1 after the update, which changes nothing any more.
    assert energies == [5.0, 2.75, 2.75]


def test_weights_move_the_centroid():
    points = torch.tensor([[0.0, 2.0], [4.0, 2.0]])
    for weights, expected in (((1.0, 1.0), 2.0), ((3.0, 1.0), 1.0), ((0.0, 1.0), 4.0)):
        centroids, _, _ = weighted_kmeans(points, torch.tensor(weights), 1, generator=seeded())
        assert centroids.tolist() == [[expected, 2.0]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), num_points=st.integers(1, 40), num_clusters=st.integers(1, 8))
def test_the_energy_never_rises(seed, num_points, num_clusters):
    generator = seeded(seed)
    points = torch.randn(num_points, 3, generator=generator)
    weights = torch.rand(num_points, generator=generator) * (torch.rand(num_points, generator=generator) > 0.2)
    centroids, assignment, energies = weighted_kmeans(points, weights, num_clusters, generator=generator, tolerance=0)
    for before, after in itertools.pairwise(energies):
        assert after <= before * (1 + 1e-5) + 1e-4
    assert centroids.shape == (num_clusters, 3)
    assert centroids.isfinite().all()
    # What is returned belongs together: nearest centroids, and their energy.
    distances = (points[:, None] - centroids).square().sum(dim=2)
    torch.testing.assert_close(distances.gather(1, assignment[:, None])[:, 0], distances.amin(dim=1))
    if weights.any():
        assert energies[-1] == pytest.approx(float((weights * distances.amin(dim=1)).sum()), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_at_the_end_every_centroid_is_the_weighted_mean_of_its_points(seed):
    generator = seeded(seed)
    points, weights = torch.randn(30, 2, generator=generator), torch.rand(30, generator=generator)
    centroids, assignment, _ = weighted_kmeans(points, weights, 4, generator=generator, tolerance=0)
    for cluster in assignment.unique():
        own = assignment == cluster
        mean = (weights[own, None] * points[own]).sum(dim=0) / weights[own].sum()
        torch.testing.assert_close(centroids[cluster], mean, rtol=1e-4, atol=1e-4)


def test_the_scale_of_the_weights_does_not_matter():
    points, weights = torch.randn(30, 2, generator=seeded()), torch.rand(30, generator=seeded(1))
    reference, assignment, _ = weighted_kmeans(points, weights, 3, generator=seeded(2))
    for factor in (1e-20, 1e20):
        centroids, again, _ = weighted_kmeans(points, weights * factor, 3, generator=seeded(2))
        torch.testing.assert_close(centroids, reference)
        assert torch.equal(again, assignment)


def test_a_cluster_without_weight_keeps_its_centroid():
    points = torch.tensor([[0.0], [2.0], [50.0]])
    initial = torch.tensor([[1000.0], [1.0], [40.0]])
    # The first cluster has no point, the third only one of no weight.
    centroids, _, _ = weighted_kmeans(points, torch.tensor([1.0, 3.0, 0.0]), 3, initial=initial)
    assert centroids.tolist() == [[1000.0], [1.5], [40.0]]


def test_more_clusters_than_distinct_points():
    points = torch.tensor([[0.0, 1.0], [5.0, 5.0]]).repeat(3, 1)
    centroids, assignment, energies = weighted_kmeans(points, torch.ones(6), 4, generator=seeded())
    assert energies[-1] == 0.0
    assert torch.equal(centroids[assignment], points)
    assert {tuple(row) for row in centroids.tolist()} == {(0.0, 1.0), (5.0, 5.0)}


def test_one_point_for_many_clusters():
    centroids, _, energies = weighted_kmeans(torch.tensor([[3.0, 4.0]]), torch.ones(1), 5, generator=seeded())
    assert torch.equal(centroids, torch.tensor([[3.0, 4.0]]).expand(5, 2))
    assert energies[-1] == 0.0


def test_weights_of_zero_count_as_equal_ones():
    points = torch.randn(20, 3, generator=seeded())
    zero = weighted_kmeans(points, torch.zeros(20), 3, generator=seeded(1))
    ones = weighted_kmeans(points, torch.ones(20), 3, generator=seeded(1))
    assert torch.equal(zero[0], ones[0])
    assert zero[2] == ones[2]


def test_the_start_never_draws_a_point_without_weight():
    points = torch.arange(10.0)[:, None]
    weights = torch.tensor([0.0] * 8 + [1.0, 2.0])
    for seed in range(20):
        centroids, _, _ = weighted_kmeans(points, weights, 2, generator=seeded(seed))
        assert sorted(centroids.flatten().tolist()) == [8.0, 9.0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_initial_centroids_keep_their_identity(order):
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centers[:, None] + 0.1 * torch.randn(3, 20, 2, generator=seeded())).flatten(0, 1)
    initial = centers[list(order)] + 1.0
    before = initial.clone()
    centroids, _, _ = weighted_kmeans(points, torch.ones(60), 3, initial=initial)
    torch.testing.assert_close(centroids, centers[list(order)], rtol=0, atol=0.2)
    assert torch.equal(initial, before)


def test_the_generator_alone_decides():
    points, weights = torch.randn(50, 3, generator=seeded()), torch.rand(50, generator=seeded(1))
    torch.manual_seed(0)
    first = weighted_kmeans(points, weights, 5, generator=seeded(3))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    second = weighted_kmeans(points, weights, 5, generator=seeded(3))
    assert torch.equal(first[0], second[0])
    assert first[2] == second[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    starts = {weighted_kmeans(points, weights, 5, generator=seeded(s), max_iterations=0)[2][0] for s in range(5)}
    assert len(starts) > 1


def test_every_iteration_is_one_of_plain_kmeans():
    generator = seeded()
    points = torch.randn(300, 4, generator=generator, dtype=torch.float64) + 3
    weights = torch.rand(300, generator=generator, dtype=torch.float64)
    expected = points[:6].clone()
    for iterations in range(8):
        centroids, assignment, energies = weighted_kmeans(
            points, weights, 6, initial=points[:6], max_iterations=iterations, tolerance=0
        )
        distances = (points[:, None] - expected).square().sum(dim=2)
        assert torch.equal(assignment, distances.argmin(dim=1))
        assert energies[-1] == pytest.approx(float((weights * distances.amin(dim=1)).sum()), rel=1e-5)
        torch.testing.assert_close(centroids.double(), expected, rtol=0, atol=1e-5)
        expected = torch.stack(
            [
                (weights[assignment == cluster, None] * points[assignment == cluster]).sum(dim=0)
                / weights[assignment == cluster].sum()
                for cluster in range(6)
            ]
        )


def test_it_stops_where_an_iteration_gains_too_little():
    points = torch.randn(400, 3, generator=seeded())
    _, _, energies = weighted_kmeans(points, torch.ones(400), 8, generator=seeded(1), tolerance=0.02)
    falls = [(before - after) / before for before, after in itertools.pairwise(energies)]
    assert len(falls) > 2
    assert falls[-1] <= 0.02 < min(falls[:-1])


def test_points_that_carry_a_gradient_are_clustered_without_it():
    points = torch.randn(20, 3, generator=seeded(), requires_grad=True)
    centroids, _, _ = weighted_kmeans(points, torch.ones(20), 2, generator=seeded(1))
    assert not centroids.requires_grad


def test_iterations_are_bounded():
    points = torch.randn(200, 2, generator=seeded())
    _, _, energies = weighted_kmeans(points, torch.ones(200), 8, generator=seeded(), max_iterations=2, tolerance=0)
    assert len(energies) == 3


def test_the_best_of_several_starts_is_less_a_matter_of_chance():
    points = torch.randn(2000, 4, generator=seeded())
    weights = torch.rand(2000, generator=seeded(1))

    def energies(start) -> torch.Tensor:
        runs = [weighted_kmeans(points, weights, 16, initial=start(seeded(seed))) for seed in range(6)]
        return torch.tensor([energy[-1] for _, _, energy in runs])

    single = energies(lambda generator: weighted_kmeans(points, weights, 16, generator=generator)[0])
    several = energies(lambda generator: best_start(points, weights, 16, generator=generator))
    assert several.max() < single.mean() and several.std() < single.std()


def test_a_start_is_sought_on_some_of_the_points_and_the_same_ones_whenever_asked(monkeypatch):
    monkeypatch.setattr(prototype_construction, "START_POINTS", 2)
    points = torch.randn(50, 4, generator=seeded())
    starts = [best_start(points, torch.ones(50), 2, generator=seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    # Two clusters of two points are these points.
    assert all((points == centroid).all(dim=1).any() for centroid in starts[0])


def test_the_first_construction_starts_from_the_best_start_and_later_ones_do_not(make_prototypes, monkeypatch):
    calls = []
    start = prototype_construction.best_start
    monkeypatch.setattr(
        prototype_construction, "best_start", lambda *args, **kwargs: calls.append(1) or start(*args, **kwargs)
    )
    prototypes = make_prototypes(num_style_prototypes=2)
    columns = torch.randn(16, 2, 4, generator=seeded())
    construct_prototypes(prototypes, columns, columns, generator=seeded(1))
    assert len(calls) == 2
    prototypes.num_constructions.fill_(1)
    construct_prototypes(prototypes, columns, columns)
    assert len(calls) == 2


def test_wrong_kmeans_input_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        weighted_kmeans(torch.zeros(0, 3), torch.zeros(0), 2)
    with pytest.raises(ValueError, match="finite and not negative, but the smallest is -0.5 and the largest"):
        weighted_kmeans(torch.zeros(2, 3), torch.tensor([1.0, -0.5]), 2)


# Construction


@pytest.fixture
def make_prototypes(tiny_config):
    """Fresh prototypes; matched rates of 1/4 and 1 for two features unless said otherwise."""

    def make(rates: tuple[float, ...] = (0.25, 1.0), **options) -> StylePrototypes:
        config = tiny_config(**{"embedding_dim": len(rates), "column_mode": "quantile", "column_length": 4, **options})
        prototypes = PicoHead(config).style_prototypes
        prototypes.matched_sum += torch.tensor(rates) * 8
        prototypes.matched_count += 8
        return prototypes

    return make


def test_construction_by_hand(make_prototypes):
    prototypes = make_prototypes(num_style_prototypes=1)
    buffers = {name: buffer.clone() for name, buffer in prototypes.named_buffers()}
    # One pair, two features. Coordinates 0 to 2 vary with a standard deviation of 1, 2 and 3, the last not at all.
    visual = torch.tensor([[[0.0, 0.0, 0.0, 5.0], [2.0, 4.0, 6.0, 5.0]]])
    textual = visual + 1
    state = construct_prototypes(prototypes, visual, textual, generator=seeded())
    assert state.pseudo_semantic_probability.tolist() == [0.25, 1.0]
    # Style weights 3/4 and 0: the centroid is the first column.
    assert state.visual_prototypes.tolist() == [[0.0, 0.0, 0.0, 5.0]]
    assert state.textual_prototypes.tolist() == [[1.0, 1.0, 1.0, 6.0]]
    assert state.visual_column_scale.tolist() == [1.0, 2.0, 3.0, 1.0]
    assert state.visual_style_rate.tolist() == [0.375]
    # Squared distances 0 and 2² + 2² + 2² in units of the scale.
    assert float(state.visual_temperature) == pytest.approx(6.0)
    for name, buffer in prototypes.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_style_rates_are_means_over_clusters_with_a_fallback_for_empty_ones(make_prototypes):
    prototypes = make_prototypes((0.1, 0.3, 0.8), num_style_prototypes=3)
    prototypes.num_constructions.fill_(1)
    prototypes.visual_prototypes.copy_(torch.tensor([0.0, 100.0, 500.0])[:, None].expand(3, 4))
    prototypes.textual_prototypes.copy_(prototypes.visual_prototypes)
    columns = torch.tensor([[0.0, 1.0, 101.0], [1.0, 102.0, 103.0]])[:, :, None].expand(2, 3, 4)
    state = construct_prototypes(prototypes, columns, columns)
    # Feature 0 twice and feature 1 once in the first cluster, feature 1 once and feature 2 twice in the second.
    overall = (0.9 + 0.7 + 0.2) / 3
    expected = [(0.9 * 2 + 0.7) / 3, (0.7 + 0.2 * 2) / 3, overall]
    torch.testing.assert_close(state.visual_style_rate, torch.tensor(expected))
    assert state.visual_prototypes[2].tolist() == [500.0] * 4


def test_later_constructions_keep_the_scale_and_start_from_the_prototypes(make_prototypes):
    prototypes = make_prototypes(num_style_prototypes=2)
    centers = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 8.0, 8.0, 8.0]])
    columns = centers + 0.1 * torch.randn(16, 2, 4, generator=seeded())
    first = construct_prototypes(prototypes, columns, columns, generator=seeded(1))
    first.copy_to(prototypes)
    prototypes.num_constructions.fill_(1)
    # Identities: whatever order the prototypes are in, they stay in it.
    for order in ([0, 1], [1, 0]):
        prototypes.visual_prototypes.copy_(centers[order] + 1)
        later = construct_prototypes(prototypes, 2 * columns, 2 * columns)
        assert torch.equal(later.visual_column_scale, first.visual_column_scale)
        assert (later.visual_prototypes[order[1]].mean() > later.visual_prototypes[order[0]].mean()).item()
    assert not torch.equal(later.visual_temperature, first.visual_temperature)


def test_clustering_uses_the_units_of_the_coordinates(make_prototypes):
    # Coordinate 0 is loud and means nothing; in units of its spread the second one separates the columns.
    prototypes = make_prototypes((0.0, 0.0), num_style_prototypes=2)
    prototypes.num_constructions.fill_(1)
    prototypes.visual_column_scale.copy_(torch.tensor([1000.0, 0.01, 1.0, 1.0]))
    prototypes.visual_prototypes.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    columns = torch.tensor([[[900.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    state = construct_prototypes(prototypes, columns, columns)
    torch.testing.assert_close(state.visual_prototypes, columns[0])


def test_construction_is_finite_where_all_columns_are_alike(make_prototypes):
    prototypes = make_prototypes((1.0, 1.0))
    state = construct_prototypes(prototypes, torch.ones(4, 2, 4), torch.zeros(4, 2, 4), generator=seeded())
    for name, tensor in state.tensors().items():
        assert tensor.isfinite().all(), name
    assert torch.equal(state.visual_prototypes, torch.ones(3, 4))
    assert float(state.visual_temperature) == pytest.approx(1e-6)


def test_construction_needs_columns(make_prototypes):
    with pytest.raises(ValueError, match="train for a step first"):
        construct_prototypes(make_prototypes(), torch.zeros(0, 2, 4), torch.zeros(0, 2, 4))


# State


def test_state_round_trip_and_interpolation(make_prototypes):
    prototypes = make_prototypes()
    names = PrototypeState.of(prototypes).tensors().keys()
    old = PrototypeState(**{n: torch.randn(getattr(prototypes, n).shape, generator=seeded(1)) for n in names})
    new = PrototypeState(**{n: torch.randn(getattr(prototypes, n).shape, generator=seeded(2)) for n in names})
    old.copy_to(prototypes)
    kept = PrototypeState.of(prototypes)
    new.copy_to(prototypes)
    for name in names:
        assert torch.equal(getattr(kept, name), getattr(old, name)), name
        assert torch.equal(getattr(prototypes, name), getattr(new, name)), name
        assert torch.equal(getattr(old.interpolate(new, 1.0), name), getattr(new, name)), name
        assert torch.equal(getattr(old.interpolate(new, 0.0), name), getattr(old, name)), name
        quarter = 0.75 * getattr(old, name) + 0.25 * getattr(new, name)
        torch.testing.assert_close(getattr(old.interpolate(new, 0.25), name), quarter)


# Feedback


def final_shares(gains: list[float], kappa: float) -> list[float]:
    """Share of every construction in the final prototypes, by running the update on unit vectors."""
    mixture, log_sum = [], -math.inf
    for gain in gains:
        weight, log_sum = feedback_weight(log_sum, gain, kappa)
        mixture = [(1 - weight) * share for share in mixture] + [weight]
    return mixture


def test_feedback_weight_by_hand():
    assert feedback_weight(-math.inf, -3.0) == (1.0, -3.0)
    weight, log_sum = feedback_weight(0.0, math.log(3))
    assert weight == pytest.approx(3 / 4)
    assert log_sum == pytest.approx(math.log(4))
    weight, _ = feedback_weight(0.0, 2 * math.log(3), kappa=2.0)
    assert weight == pytest.approx(3 / 4)


@settings(max_examples=100, deadline=None)
@given(gains=st.lists(st.floats(-20, 20), min_size=1, max_size=8), kappa=st.floats(0.5, 5))
def test_closed_form_of_the_feedback(gains, kappa):
    exponentials = [math.exp(gain / kappa) for gain in gains]
    expected = [value / sum(exponentials) for value in exponentials]
    assert final_shares(gains, kappa) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_the_order_of_gains_does_not_matter():
    gains = [0.5, -2.0, 3.0, 0.0]
    reference = dict(zip(gains, final_shares(gains, 1.0), strict=True))
    for order in itertools.permutations(gains):
        assert dict(zip(order, final_shares(list(order), 1.0), strict=True)) == pytest.approx(reference)


def test_a_larger_gain_gives_a_larger_weight():
    weights = [feedback_weight(1.0, gain)[0] for gain in (-4.0, -1.0, 0.0, 0.5, 2.0, 9.0)]
    assert weights == sorted(weights)
    assert len(set(weights)) == len(weights)


@pytest.mark.parametrize("gains", [[1e4], [1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4, 1e4, 1e4]])
def test_extreme_gains_stay_finite(gains):
    shares = final_shares(gains, 1.0)
    best = max(gains)
    assert shares == pytest.approx([(gain == best) / gains.count(best) for gain in gains])


@pytest.mark.parametrize(
    ("gain", "kappa", "message"),
    [
        (1.0, 0.0, "`kappa` must be greater than 0, but got 0.0"),
        (1.0, -1.0, "greater than 0"),
        (math.nan, 1.0, "must be finite, but got nan"),
        (math.inf, 1.0, "must be finite, but got inf"),
    ],
)
def test_wrong_feedback_is_refused(gain, kappa, message):
    with pytest.raises(ValueError, match=message):
        feedback_weight(0.0, gain, kappa)
