from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pico.model.alignment_heads_pico import PicoHead
from modeling_pico.model.modeling_pico import PicoOutput
from modeling_pico.model.prototypes_pico import StylePrototypes
from modeling_pico.training import PicoTrainingArguments, PrototypeConstruction
from modeling_pico.training import construction as construction_module
from modeling_pico.training.construction import (
    best_start,
    build_prototypes,
    feedback_weight,
    sign_agreement,
    sign_shares,
    weighted_kmeans,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Signs


def test_sign_shares_by_hand():
    tokens = torch.tensor([[[1.0, -1.0], [0.0, -2.0], [3.0, 4.0], [9.0, -9.0]]])
    shares = sign_shares(tokens, torch.tensor([[1, 1, 1, 0]]))
    torch.testing.assert_close(shares, torch.tensor([[[2 / 3, 1 / 3], [0.0, 2 / 3]]]))
    assert torch.equal(sign_shares(tokens, torch.zeros(1, 4)), torch.zeros(1, 2, 2))


def test_sign_shares_of_half_precision_are_exact_and_without_gradient():
    # More tokens than bfloat16 can count one by one.
    tokens = torch.ones(1, 1001, 1, dtype=torch.bfloat16)
    tokens[0, :300] = -1
    shares = sign_shares(tokens.requires_grad_(), torch.ones(1, 1001))
    assert torch.equal(shares, torch.tensor([[[701 / 1001], [300 / 1001]]]))
    assert not shares.requires_grad


def test_padding_that_is_not_a_number_does_not_count():
    tokens = torch.tensor([[[1.0], [torch.nan], [-torch.inf]]])
    assert sign_shares(tokens, torch.tensor([[1, 0, 0]])).flatten().tolist() == [1.0, 0.0]


def brute_force_agreement(image, image_mask, text, text_mask):
    """Counts `v_id * t_jd > 0` over all patches and words of one pair."""
    patches, words = image[image_mask], text[text_mask]
    counts = [sum(float(v[d] * t[d] > 0) for v in patches for t in words) for d in range(image.shape[-1])]
    return torch.tensor(counts) / max(len(patches) * len(words), 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_sign_agreement_equals_the_count_over_all_patches_words_and_columns(seed):
    generator = torch.Generator().manual_seed(seed)
    # Zeros included: a product with a zero is not positive.
    images = torch.randint(-1, 2, (4, 3, 5), generator=generator).float()
    texts = torch.randint(-1, 2, (4, 4, 5), generator=generator).float()
    image_mask = torch.rand(4, 3, generator=generator) > 0.3
    text_mask = torch.rand(4, 4, generator=generator) > 0.3
    result = sign_agreement(images, image_mask, texts, text_mask)
    rows = zip(images, image_mask, texts, text_mask, strict=True)
    torch.testing.assert_close(result, torch.stack([brute_force_agreement(*row) for row in rows]))


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
    monkeypatch.setattr(construction_module, "START_POINTS", 2)
    points = torch.randn(50, 4, generator=seeded())
    starts = [best_start(points, torch.ones(50), 2, generator=seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    # Two clusters of two points are these points.
    assert all((points == centroid).all(dim=1).any() for centroid in starts[0])


# Prototypes of one side

# Pseudo-style probabilities of two features.
STYLE = torch.tensor([0.75, 0.0])


@pytest.fixture
def make_prototypes(tiny_config):
    """Fresh prototypes of one side, of columns of four values."""

    def make(**options) -> StylePrototypes:
        return StylePrototypes(tiny_config(**{"column_mode": "quantile", "column_length": 4, **options}))

    return make


def test_construction_by_hand(make_prototypes):
    prototypes = make_prototypes(num_style_prototypes=1)
    # One sample, two features. Coordinates 0 to 2 vary with a standard deviation of 1, 2 and 3, the last not at all.
    columns = torch.tensor([[[0.0, 0.0, 0.0, 5.0], [2.0, 4.0, 6.0, 5.0]]])
    built = build_prototypes(columns, STYLE, prototypes, generator=seeded())
    assert built.keys() == dict(prototypes.named_buffers()).keys()
    # Style weights 3/4 and 0: the centroid is the first column.
    assert built["prototypes"].tolist() == [[0.0, 0.0, 0.0, 5.0]]
    assert built["column_scale"].tolist() == [1.0, 2.0, 3.0, 1.0]
    assert built["style_rate"].tolist() == [0.375]
    # Squared distances 0 and 2² + 2² + 2² in units of the scale.
    assert float(built["temperature"]) == pytest.approx(6.0)
    assert int(built["stage"]) == 1
    assert not prototypes.prototypes.any() and prototypes.stage == 0


def test_style_rates_are_means_over_clusters_with_a_fallback_for_empty_ones(make_prototypes):
    prototypes = make_prototypes(num_style_prototypes=3)
    prototypes.stage.fill_(1)
    prototypes.prototypes.copy_(torch.tensor([0.0, 100.0, 500.0])[:, None].expand(3, 4))
    columns = torch.tensor([[0.0, 1.0, 101.0], [1.0, 102.0, 103.0]])[:, :, None].expand(2, 3, 4)
    built = build_prototypes(columns, torch.tensor([0.9, 0.7, 0.2]), prototypes)
    # Feature 0 twice and feature 1 once in the first cluster, feature 1 once and feature 2 twice in the second.
    overall = (0.9 + 0.7 + 0.2) / 3
    expected = [(0.9 * 2 + 0.7) / 3, (0.7 + 0.2 * 2) / 3, overall]
    torch.testing.assert_close(built["style_rate"], torch.tensor(expected))
    assert built["prototypes"][2].tolist() == [500.0] * 4


def test_the_first_prototypes_take_the_best_start_and_later_ones_do_not(make_prototypes, monkeypatch):
    calls = []
    monkeypatch.setattr(
        construction_module, "best_start", lambda *args, **kwargs: calls.append(1) or best_start(*args, **kwargs)
    )
    prototypes = make_prototypes(num_style_prototypes=2)
    columns = torch.randn(16, 2, 4, generator=seeded())
    build_prototypes(columns, STYLE, prototypes, generator=seeded(1))
    assert len(calls) == 1
    prototypes.stage.fill_(1)
    assert build_prototypes(columns, STYLE, prototypes)["stage"] == 2
    assert len(calls) == 1


def test_later_constructions_keep_the_scale_and_start_from_the_prototypes(make_prototypes):
    prototypes = make_prototypes(num_style_prototypes=2)
    centers = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 8.0, 8.0, 8.0]])
    columns = centers + 0.1 * torch.randn(16, 2, 4, generator=seeded())
    first = build_prototypes(columns, STYLE, prototypes, generator=seeded(1))
    prototypes.load_state_dict(first, strict=False)
    # Identities: whatever order the prototypes are in, they stay in it.
    for order in ([0, 1], [1, 0]):
        prototypes.prototypes.copy_(centers[order] + 1)
        later = build_prototypes(2 * columns, STYLE, prototypes)
        assert torch.equal(later["column_scale"], first["column_scale"])
        assert (later["prototypes"][order[1]].mean() > later["prototypes"][order[0]].mean()).item()
    assert not torch.equal(later["temperature"], first["temperature"])


def test_clustering_uses_the_units_of_the_coordinates(make_prototypes):
    # Coordinate 0 is loud and means nothing; in units of its spread the second one separates the columns.
    prototypes = make_prototypes(num_style_prototypes=2)
    prototypes.stage.fill_(1)
    prototypes.column_scale.copy_(torch.tensor([1000.0, 0.01, 1.0, 1.0]))
    prototypes.prototypes.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    columns = torch.tensor([[[900.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    built = build_prototypes(columns, torch.ones(2), prototypes)
    torch.testing.assert_close(built["prototypes"], columns[0])


def test_construction_is_finite_where_all_columns_are_alike(make_prototypes):
    built = build_prototypes(torch.ones(4, 2, 4), torch.zeros(2), make_prototypes(), generator=seeded())
    assert all(tensor.isfinite().all() for tensor in built.values())
    assert torch.equal(built["prototypes"], torch.ones(3, 4))
    assert float(built["temperature"]) == pytest.approx(1e-6)


# Weights of feedback


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


# Construction

DIM = 6


@pytest.fixture
def make(tiny_config, tmp_path):
    """Builds a construction with fresh prototypes that collects from every batch."""

    def build(prototypes: torch.nn.ModuleDict | None = None, **options) -> PrototypeConstruction:
        args = PicoTrainingArguments(
            output_dir=str(tmp_path / "output"),
            use_cpu=True,
            report_to=[],
            **{"feedback": "constant", "reservoir_pairs": 8, **options},
        )
        head = PicoHead(tiny_config(embedding_dim=DIM))
        construction = PrototypeConstruction(head.style_prototypes if prototypes is None else prototypes, args)
        construction.collects_statistics = construction.collects_columns = True
        return construction

    return build


def batch_of(pairs: int = 8, seed: int = 0) -> PicoOutput:
    """Random tokens without padding."""
    tokens = torch.randn(2, pairs, 5, DIM, generator=seeded(seed))
    mask = torch.ones(pairs, 5, dtype=torch.bool)
    return PicoOutput(image_tokens=tokens[0], image_mask=mask, text_tokens=tokens[1], text_mask=mask)


def buffers_of(construction: PrototypeConstruction) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in construction.prototypes.named_buffers()}


def assert_equal_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_what_is_collected(make):
    construction, batch = make(), batch_of()
    construction.collects_statistics = False
    construction.collect(batch)
    assert construction.num_pairs == 0 and not construction.columns
    construction.collects_statistics, construction.collects_columns = True, False
    construction.collect(batch)
    assert construction.num_pairs == 8 and not construction.columns
    construction.collects_columns = True
    construction.collect(batch)
    assert construction.num_pairs == 16
    image = construction.prototypes["image"].columns(batch.image_tokens, batch.image_mask)
    text = construction.prototypes["text"].columns(batch.text_tokens, batch.text_mask)
    assert_equal_tensors(construction.columns, {"image": image, "text": text})


def test_statistics_are_sums_over_valid_pairs(make):
    construction, batches = make(), [batch_of(seed=seed) for seed in range(3)]
    for batch in batches:
        batch.text_mask = batch.text_mask.clone()
        batch.text_mask[2] = False
        batch.image_tokens[5, 1, 1] = math.nan
        construction.collect(batch)
    kept = [0, 1, 3, 4, 6, 7]
    names = ("image_tokens", "image_mask", "text_tokens", "text_mask")
    agreement = [sign_agreement(*(batch[name][kept] for name in names)) for batch in batches]
    torch.testing.assert_close(construction.agreement_sum, torch.cat(agreement).sum(dim=0))
    assert construction.num_pairs == 18
    assert all(columns.isfinite().all() and len(columns) == 8 for columns in construction.columns.values())


@pytest.mark.parametrize("sizes", [(3, 3, 3), (10,), (5,), (2, 9), (1, 1, 1, 1, 1, 1, 1), (4, 0, 4, 0)])
def test_the_reservoir_keeps_the_last_pairs(make, sizes):
    construction, seen = make(reservoir_pairs=5), []
    for seed, size in enumerate(sizes):
        batch = batch_of(size, seed)
        construction.collect(batch)
        seen.append(construction.prototypes["text"].columns(batch.text_tokens, batch.text_mask))
    assert torch.equal(construction.columns["text"], torch.cat(seen)[-5:])
    assert len(construction.columns["image"]) == 5


def test_nothing_collected_is_refused(make):
    construction = make()
    with pytest.raises(ValueError, match="train for a step first"):
        construction.propose()
    construction.collect(batch_of(0))
    with pytest.raises(ValueError, match="train for a step first"):
        construction.propose()


def test_a_proposal_waits_until_it_is_applied(make):
    construction = make()
    construction.due = True
    construction.collect(batch_of())
    before = buffers_of(construction)
    report = construction.propose()
    assert_equal_tensors(buffers_of(construction), before)
    assert not construction.due
    assert construction.num_pairs == 0 and construction.agreement_sum == 0 and not construction.columns
    assert report["prototype_stage"] == 1
    assert report["prototype_feedback_weight"] == 1.0
    assert report["image_prototype_movement"] > 0
    assert report["text_prototype_movement"] > 0

    pending = construction.pending
    construction.apply_pending()
    assert_equal_tensors(buffers_of(construction), pending)
    assert [int(side.stage) for side in construction.prototypes.values()] == [1, 1]
    assert construction.num_constructions == 1
    assert construction.pending is None
    construction.apply_pending()
    assert_equal_tensors(buffers_of(construction), pending)

    construction.collect(batch_of(seed=1))
    assert construction.propose()["prototype_stage"] == 2
    construction.apply_pending()
    assert [int(side.stage) for side in construction.prototypes.values()] == [2, 2]
    assert construction.num_constructions == 2


def test_a_proposal_is_reproducible_whatever_the_state_of_the_global_generator(make):
    states = []
    for seed in (0, 1):
        construction = make()
        construction.collect(batch_of())
        torch.manual_seed(seed)
        construction.propose()
        states.append(construction.pending)
    assert_equal_tensors(*states)


def run(construction: PrototypeConstruction, scores: list) -> list[dict[str, float]]:
    reports = []
    for seed, arguments in enumerate(scores):
        construction.collect(batch_of(seed=seed))
        reports.append(construction.propose(*arguments))
        construction.apply_pending()
    return reports


def test_counterfactual_feedback_scores_the_new_prototypes_and_weighs_by_the_gain(make):
    construction = make(feedback="counterfactual", feedback_kappa=2.0)
    image = construction.prototypes["image"]
    seen = []

    def score() -> float:
        seen.append((int(image.stage), image.prototypes.clone()))
        return 103.0

    construction.collect(batch_of())
    report = construction.propose(score, 100.0)
    assert (report["prototype_feedback_gain"], report["prototype_feedback_weight"]) == (3.0, 1.0)
    # Measured in use, though the buffers are still those of plain alignment.
    assert len(seen) == 1 and seen[0][0] == 1
    assert torch.equal(seen[0][1], construction.pending["image.prototypes"])
    assert image.stage == 0 and not image.prototypes.any()
    construction.apply_pending()

    old = image.prototypes.clone()
    construction.collect(batch_of(seed=1))
    report = construction.propose(score, 102.0)
    weight = math.exp(0.5) / (math.exp(1.5) + math.exp(0.5))
    assert report["prototype_feedback_gain"] == 1.0
    assert report["prototype_feedback_weight"] == pytest.approx(weight)
    expected = (1 - weight) * old + weight * seen[1][1]
    torch.testing.assert_close(construction.pending["image.prototypes"], expected)


def test_a_score_that_is_not_given_is_measured_under_the_prototypes_in_use(make):
    construction = make(feedback="counterfactual")
    construction.collect(batch_of())
    stages = []
    construction.propose(lambda: stages.append(int(construction.prototypes["text"].stage)) or 1.0)
    assert stages == [0, 1]


def test_the_prototypes_in_use_come_back_bit_for_bit_even_after_an_error(make):
    construction = make(feedback="counterfactual")
    run(construction, [(lambda: 1.0,)])
    construction.collect(batch_of(seed=1))
    before = buffers_of(construction)

    def score() -> float:
        assert not torch.equal(construction.prototypes["image"].prototypes, before["image.prototypes"])
        raise RuntimeError("score")

    with pytest.raises(RuntimeError, match="score"):
        construction.propose(score, 1.0)
    assert_equal_tensors(buffers_of(construction), before)
    # Nothing is lost: the same proposal can be made again.
    assert construction.num_pairs == 8 and construction.num_constructions == 1


def test_epoch_delta_feedback(make):
    construction = make(feedback="epoch_delta")
    reports = []
    for value in (100.0, 104.0, 103.0):
        score = lambda: pytest.fail("the difference of evaluations needs no second score")  # noqa: E731
        reports += run(construction, [(score, value)])
        construction.previous_rsum = value
    assert [report["prototype_feedback_gain"] for report in reports] == [0.0, 4.0, -1.0]
    total, weights = 0.0, []
    for gain in (0.0, 4.0, -1.0):
        total += math.exp(gain)
        weights.append(math.exp(gain) / total)
    assert [report["prototype_feedback_weight"] for report in reports] == pytest.approx(weights)


def test_feedback_without_validation(make):
    construction = make(feedback="constant", feedback_weight=0.25)
    reports = run(construction, [()] * 3)
    assert [report["prototype_feedback_weight"] for report in reports] == [1.0, 0.25, 0.25]
    assert all("prototype_feedback_gain" not in report for report in reports)


def test_prototypes_that_a_model_brings_are_updated_and_count_as_a_gain_of_zero(make):
    first = make()
    run(first, [()])
    for options, scores in (({"feedback": "counterfactual"}, [(lambda: 7.0,)]), ({"feedback_weight": 0.5}, [()])):
        construction = make(first.prototypes, **options)
        assert construction.num_constructions == 1
        (report,) = run(construction, scores)
        assert (report["prototype_stage"], report["prototype_feedback_weight"]) == (2.0, 0.5)


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


# State


@pytest.mark.parametrize("apply_before_saving", [False, True])
def test_a_resumed_construction_continues_as_if_never_stopped(make, tmp_path, apply_before_saving):
    options = {"feedback": "epoch_delta", "reservoir_pairs": 12}
    construction = make(**options)
    run(construction, [(lambda: 0.0, 90.0)])
    construction.collect(batch_of(seed=5))
    construction.propose(lambda: 0.0, 95.0)
    construction.previous_rsum = 95.0
    if apply_before_saving:
        construction.apply_pending()
    for seed in (6, 7):
        construction.collect(batch_of(seed=seed))
    construction.save(str(tmp_path))
    again = make(**options)
    # As a model checkpoint would bring them.
    again.prototypes.load_state_dict(construction.prototypes.state_dict())
    again.load(str(tmp_path))

    assert (again.previous_rsum, again.num_constructions) == (95.0, 2)
    assert (again.pending is None) == apply_before_saving
    assert_equal_tensors(again.columns, construction.columns)
    reports = []
    for target in (construction, again):
        target.apply_pending()
        target.collect(batch_of(seed=8))
        reports.append(target.propose(lambda: 0.0, 97.0))
        target.apply_pending()
    assert reports[0] == reports[1]
    assert_equal_tensors(buffers_of(construction), buffers_of(again))


def test_a_fresh_construction_survives_disk(make, tmp_path):
    make().save(str(tmp_path))
    again = make()
    again.load(str(tmp_path))
    assert math.isnan(again.previous_rsum)
    assert again.pending is None and not again.columns and again.num_constructions == 0
