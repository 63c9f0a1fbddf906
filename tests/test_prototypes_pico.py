from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pico.alignment_heads_pico import PicoHead
from modeling_pico.configuration_pico import COMPARATORS, PROBABILITY_COMBINATIONS, STYLE_PROBABILITIES
from modeling_pico.prototypes_pico import (
    ColumnComparator,
    StylePrototypes,
    StyleRates,
    column_weights,
    feature_columns,
    squared_distances,
    style_probability,
)
from modeling_pico.pseudo_probability_pico import (
    best_aligned_agreement,
    meaning_share,
    pseudo_semantic_probability,
    sign_agreement,
    sign_shares,
)
from modeling_pico.scoring_pico import pair_scores


def random_tokens(batch: int = 3, tokens: int = 6, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(batch, tokens, dim, generator=generator), dim=-1)


def some_mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture
def make_prototypes(tiny_model, use_prototypes):
    """The prototypes of a tiny model, as after training (`stage` 2) unless `fresh`."""

    def make(fresh: bool = False, **options) -> StylePrototypes:
        model = tiny_model(**options)
        return (model if fresh else use_prototypes(model)).style_prototypes

    return make


# Columns


def test_statistics_by_hand():
    # Dimension 4, so values are doubled; the third token is padding.
    tokens = torch.tensor([[[0.5, 0.5, 0.0, -0.5], [-0.5, 1.0, 0.0, -0.5], [9.0, 9.0, 9.0, 9.0]]])
    columns = feature_columns(tokens, torch.tensor([[True, True, False]]), "statistics")
    expected = [
        [0.0, 1.0, 1.0, -1.0],  # 1, -1
        [1.5, 0.5, 2.0, 1.0],  # 1, 2
        [0.0, 1e-4, 0.0, 0.0],  # constant: only the constant that keeps the root differentiable
        [-1.0, 1e-4, -1.0, -1.0],
    ]
    torch.testing.assert_close(columns, torch.tensor([expected]), rtol=0, atol=1e-6)
    moments = feature_columns(tokens, torch.tensor([[True, True, False]]), "moments")
    assert torch.equal(moments, columns[..., :2])


def test_quantile_by_hand():
    # Values 3, -1, 0 in dimension 1; sorted -1, 0, 3; five points at 0, 1/2, 1, 3/2, 2.
    tokens = torch.tensor([[[3.0], [-1.0], [0.0], [7.0]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    columns = feature_columns(tokens, mask, "quantile", 5)
    assert columns.tolist() == [[[-1.0, -0.5, 0.0, 1.5, 3.0]]]
    # One token: the same value everywhere.
    assert feature_columns(tokens, torch.tensor([[1, 0, 0, 0]]), "quantile", 3).tolist() == [[[3.0, 3.0, 3.0]]]


def test_position_by_hand():
    tokens = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]])
    columns = feature_columns(tokens, torch.tensor([[1, 0]]), "position", 2)
    assert columns.tolist() == [[[2.0, 0.0], [4.0, 0.0], [6.0, 0.0], [8.0, 0.0]]]


@pytest.mark.parametrize("mode", ["statistics", "moments", "quantile"])
def test_columns_ignore_padding_and_the_order_of_tokens(mode):
    tokens, mask = random_tokens(), some_mask()
    columns = feature_columns(tokens, mask, mode, 5)
    assert columns.shape == (3, 12, {"statistics": 4, "moments": 2}.get(mode, 5))
    noisy = torch.where(mask[:, :, None], tokens, 100 * torch.randn_like(tokens))
    torch.testing.assert_close(feature_columns(noisy, mask, mode, 5), columns, rtol=0, atol=0)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(feature_columns(tokens[:, order], mask[:, order], mode, 5), columns)
    # Alone and without padding the row is the same.
    torch.testing.assert_close(feature_columns(tokens[1:2, :3], mask[1:2, :3], mode, 5), columns[1:2])


@pytest.mark.parametrize(
    ("mode", "length"), [("statistics", None), ("moments", None), ("quantile", 5), ("position", 6)]
)
def test_columns_are_finite_with_finite_gradients(mode, length):
    # First row constant, second without any real token, third with one.
    tokens = random_tokens()
    tokens[0] = 0.25
    tokens.requires_grad_()
    mask = torch.tensor([[1] * 6, [0] * 6, [1] + [0] * 5])
    columns = feature_columns(tokens, mask, mode, length)
    assert torch.equal(columns[1], torch.zeros_like(columns[1]))
    assert columns.isfinite().all()
    columns.square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert torch.equal(tokens.grad[1], torch.zeros(6, 12))
    assert tokens.grad[0].abs().sum() > 0


@pytest.mark.parametrize("padded", [True, False])
def test_the_gradient_of_statistics_is_that_of_autograd_and_equal_extremes_share_it(padded):
    tokens = random_tokens(batch=3)
    tokens[0] = 0.25  # every token is the maximum and the minimum
    tokens[1, 2] = tokens[1, 0]
    mask = some_mask() if padded else torch.ones(3, 6, dtype=torch.bool)
    upstream = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(1))
    first, second = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    feature_columns(first, mask, "statistics").backward(upstream)
    values, valid = second * 12**0.5, mask.unsqueeze(-1)
    count = valid.sum(dim=1)
    mean = (values * valid).sum(dim=1) / count
    spread = ((((values - mean.unsqueeze(1)) ** 2) * valid).sum(dim=1) / count + 1e-8).sqrt()
    highest, lowest = values.masked_fill(~valid, -torch.inf).amax(1), values.masked_fill(~valid, torch.inf).amin(1)
    torch.stack([mean, spread, highest, lowest], dim=-1).backward(upstream)
    torch.testing.assert_close(first.grad[1], second.grad[1])
    # The spread of a constant column has a steep slope, in which rounding shows.
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-3)


def test_statistics_are_the_same_with_and_without_gradient():
    tokens = random_tokens()
    with_gradient = feature_columns(tokens.requires_grad_(), some_mask(), "statistics")
    assert with_gradient.requires_grad
    assert torch.equal(feature_columns(tokens.detach(), some_mask(), "statistics"), with_gradient)


def test_columns_are_float32_for_half_precision():
    assert feature_columns(random_tokens().bfloat16(), some_mask()).dtype == torch.float32


def test_wrong_columns_are_refused():
    with pytest.raises(ValueError, match="exactly column_length=4 patches, but got 6"):
        feature_columns(random_tokens(), some_mask(), "position", 4)
    with pytest.raises(ValueError, match="'moments', 'statistics', 'quantile', 'position', but got 'median'"):
        feature_columns(random_tokens(), some_mask(), "median")


def test_squared_distances_by_hand():
    columns = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert squared_distances(columns, prototypes, torch.ones(2)).tolist() == [[0.0, 25.0], [9.0, 16.0]]
    assert squared_distances(columns, prototypes, torch.tensor([3.0, 2.0])).tolist() == [[0.0, 5.0], [1.0, 4.0]]


def test_squared_distances_are_never_negative():
    columns = 100 + 1e-3 * torch.randn(200, 4)
    assert squared_distances(columns, columns[:5], torch.ones(4)).min() >= 0


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


def test_magnitude_shares_by_hand():
    tokens = torch.tensor([[[1.0, -1.0, 0.0], [0.0, -2.0, 0.0], [3.0, 5.0, 0.0], [9.0, torch.nan, 9.0]]])
    shares = sign_shares(tokens, torch.tensor([[1, 1, 1, 0]]), by_magnitude=True)
    torch.testing.assert_close(shares, torch.tensor([[[1.0, 5 / 8, 0.0], [0.0, 3 / 8, 0.0]]]))
    # What is not finite counts for nothing, and a sample without tokens neither.
    assert not sign_shares(torch.full((1, 2, 1), torch.nan), torch.ones(1, 2), by_magnitude=True).any()
    assert not sign_shares(tokens, torch.zeros(1, 4), by_magnitude=True).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_magnitude_shares_give_the_share_of_the_positive_products_by_size(seed):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(3, length, 4, generator=generator) for length in (5, 6))
    ones = torch.ones(3, 6)
    shares = sign_shares(images, ones[:, :5], True), sign_shares(texts, ones, True)
    matched, _, _, _ = sign_agreement(*shares, torch.ones(3, dtype=torch.bool), torch.arange(3))
    products = images[:, :, None] * texts[:, None]  # (batch, patches, words, dim)
    expected = products.clamp(min=0).sum(dim=(1, 2)) / products.abs().sum(dim=(1, 2))
    torch.testing.assert_close(matched, expected.sum(dim=0))


def test_best_aligned_agreement_by_hand():
    # Patches (1, 0), (0, 1) and words (2, -1), (1, 1): the first patch is nearest to the first word, the second to the
    # second; the first word to the first patch, the second to both, of which the first is taken.
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    texts = torch.tensor([[[2.0, -1.0], [1.0, 1.0], [torch.nan, 9.0]]])
    agreement = best_aligned_agreement(images, torch.tensor([[1, 1, 0]]), texts, torch.tensor([[1, 1, 0]]))
    # Products by patches (2, 0), (0, 1), by words (2, 0), (1, 0).
    assert agreement.tolist() == [[(0.5 + 1) / 2, (0.5 + 0) / 2]]
    assert not best_aligned_agreement(images, torch.zeros(1, 3), texts, torch.zeros(1, 3)).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_best_aligned_agreement_equals_the_count_over_the_best_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(3, length, 4, generator=generator) for length in (5, 6))
    image_mask, text_mask = (torch.rand(3, length, generator=generator) > 0.3 for length in (5, 6))
    image_mask[:, 0] = text_mask[:, 0] = True
    agreement = best_aligned_agreement(images, image_mask, texts, text_mask)
    for row in range(3):
        patches, words = images[row][image_mask[row]], texts[row][text_mask[row]]
        by_patch = [(patch * max(words, key=lambda word, patch=patch: float(word @ patch))) > 0 for patch in patches]
        by_word = [(word * max(patches, key=lambda patch, word=word: float(word @ patch))) > 0 for word in words]
        expected = sum(torch.stack(part).float().mean(dim=0) / 2 for part in (by_patch, by_word))
        torch.testing.assert_close(agreement[row], expected)


def brute_force_agreement(images, image_mask, texts, text_mask, valid, ids):
    """Counts `v_id * t_jd > 0` over all patches and words, pair by pair."""
    dim = images.shape[-1]
    matched, mismatched, num_matched, num_mismatched = torch.zeros(dim), torch.zeros(dim), 0, 0
    for row in range(len(images)):
        for column in range(len(texts)):
            if not (valid[row] and valid[column]) or (row != column and ids[row] == ids[column]):
                continue
            patches, words = images[row][image_mask[row]], texts[column][text_mask[column]]
            share = torch.tensor([sum(float(v[d] * t[d] > 0) for v in patches for t in words) for d in range(dim)]) / (
                len(patches) * len(words)
            )
            if row == column:
                matched, num_matched = matched + share, num_matched + 1
            else:
                mismatched, num_mismatched = mismatched + share, num_mismatched + 1
    return matched, mismatched, num_matched, num_mismatched


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_ids=st.integers(1, 4))
def test_sign_agreement_equals_the_count_over_all_patches_words_and_columns(seed, num_ids):
    generator = torch.Generator().manual_seed(seed)
    # Zeros included: a product with a zero is not positive.
    images = torch.randint(-1, 2, (4, 3, 5), generator=generator).float()
    texts = torch.randint(-1, 2, (4, 4, 5), generator=generator).float()
    image_mask = torch.rand(4, 3, generator=generator) > 0.3
    text_mask = torch.rand(4, 4, generator=generator) > 0.3
    ids = torch.randint(0, num_ids, (4,), generator=generator)
    valid = image_mask.any(dim=1) & text_mask.any(dim=1)
    result = sign_agreement(sign_shares(images, image_mask), sign_shares(texts, text_mask), valid, ids)
    expected = brute_force_agreement(images, image_mask, texts, text_mask, valid, ids)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=torch.float32))


def test_pairs_of_one_meaning_are_not_mismatched():
    shares = sign_shares(torch.ones(3, 1, 2), torch.ones(3, 1))
    matched, mismatched, num_matched, num_mismatched = sign_agreement(
        shares, shares, torch.ones(3, dtype=torch.bool), torch.tensor([7, 7, 8])
    )
    assert (matched.tolist(), float(num_matched)) == ([3.0, 3.0], 3.0)
    assert (mismatched.tolist(), float(num_mismatched)) == ([4.0, 4.0], 4.0)


def test_share_of_a_column_that_lies_between_meanings_by_hand():
    # Two values a column. Sums of squares within meanings 0, 8 and 4, with 2 degrees of freedom; in all 16, 8 and 20,
    # with 3.
    columns = torch.tensor(
        [
            [[0.0, 0.0], [0.0, 5.0], [0.0, 1.0]],
            [[0.0, 0.0], [2.0, 7.0], [2.0, 1.0]],
            [[4.0, 0.0], [0.0, 5.0], [4.0, 1.0]],
            [[4.0, 0.0], [2.0, 7.0], [6.0, 1.0]],
        ]
    )
    share = meaning_share(columns, torch.tensor([7, 7, 3, 3]))
    assert torch.allclose(share, torch.tensor([1.0, 0.0, 1 - (4 / 2) / (20 / 3)]))
    # Constant columns say nothing of style.
    assert meaning_share(torch.ones(3, 1, 2), torch.tensor([1, 1, 2])).tolist() == [1.0]
    with pytest.raises(ValueError, match="No two of the 4 samples are of one meaning"):
        meaning_share(columns, torch.arange(4))


def test_share_of_a_column_is_the_part_of_its_variance_that_lies_between_meanings():
    generator = torch.Generator().manual_seed(0)
    # Meanings that repeat twice and once; variances of meaning 1, 4 and 0 beside one of style.
    ids = torch.cat([torch.arange(1000).repeat_interleave(2), torch.arange(1000, 1500)])
    meaning = torch.randn(1500, 3, 2, generator=generator)[ids] * torch.tensor([1.0, 2.0, 0.0])[:, None]
    share = meaning_share(100 + meaning + torch.randn(2500, 3, 2, generator=generator), ids)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.8, 0.0]), atol=0.03, rtol=0)


# Probabilities


def test_pseudo_semantic_probability_by_hand():
    matched, mismatched = torch.tensor([0.5, 0.75, 0.2, 1.0]), torch.tensor([0.5, 0.5, 0.6, 1.0])
    assert torch.equal(pseudo_semantic_probability(matched, mismatched), matched)
    corrected = pseudo_semantic_probability(matched, mismatched, "chance_corrected")
    torch.testing.assert_close(corrected, torch.tensor([0.0, 0.5, 0.0, 0.0]))
    for estimator in ("magnitude", "best_aligned"):
        assert torch.equal(pseudo_semantic_probability(matched, mismatched, estimator), matched)
    for wrong in ("kappa", "meaning_share"):  # the second reads no products
        with pytest.raises(ValueError, match=f"'magnitude', 'best_aligned', but got '{wrong}'"):
            pseudo_semantic_probability(matched, mismatched, wrong)


def test_style_probability_by_hand():
    prototypes, rate = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.2, 0.8])
    scale, temperature = torch.ones(2), torch.tensor(5.0)
    columns = torch.tensor([[0.0, 0.0], [3.0, 0.0]])  # squared distances 0, 25 and 9, 16
    purity = style_probability(columns, prototypes, rate, scale, temperature, "purity")
    near, far = math.exp(-5), math.exp(-16 / 5) / math.exp(-9 / 5)
    expected = torch.tensor([(0.2 + 0.8 * near) / (1 + near), (0.2 + 0.8 * far) / (1 + far)])
    torch.testing.assert_close(purity, expected)
    nearest = style_probability(columns, prototypes, rate, scale, temperature, "nearest")
    torch.testing.assert_close(nearest, torch.tensor([1.0, math.exp(-9 / 5)]))
    cosine = style_probability(
        torch.tensor([[3.0, 0.0], [-3.0, 0.0], [6.0, 8.0]]), prototypes, rate, scale, temperature, "cosine"
    )
    torch.testing.assert_close(cosine, torch.tensor([0.6, 0.0, 1.0]))
    # The unit of a coordinate is divided out first: (6, 0) / (2, 1) is (3, 0), (6, 4) / (2, 1) is (3, 4).
    column, prototype, units = torch.tensor([[6.0, 0.0]]), torch.tensor([[6.0, 4.0]]), torch.tensor([2.0, 1.0])
    scaled = style_probability(column, prototype, rate[:1], units, temperature, "cosine")
    torch.testing.assert_close(scaled, torch.tensor([0.6]))
    with pytest.raises(ValueError, match="'purity', 'nearest', 'cosine', but got 'learned'"):
        style_probability(columns, prototypes, rate, scale, temperature, "learned")


@pytest.mark.parametrize("form", ["purity", "nearest", "cosine"])
def test_style_probability_lies_between_zero_and_one(form):
    generator = torch.Generator().manual_seed(0)
    columns, prototypes = 10 * torch.randn(500, 4, generator=generator), torch.randn(5, 4, generator=generator)
    columns[0] = 0
    rate = torch.rand(5, generator=generator)
    value = style_probability(columns, prototypes, rate, torch.full((4,), 0.5), torch.tensor(1e-6), form)
    assert value.isfinite().all()
    assert value.min() >= 0
    assert value.max() <= 1


def test_column_weights_by_hand():
    torch.testing.assert_close(column_weights(torch.tensor([0.2, 0.6])), torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(column_weights(torch.tensor([0.2, 0.6]), 2.0), torch.tensor([0.2, 1.8]))
    assert torch.equal(column_weights(torch.zeros(2, 7)), torch.ones(2, 7))


@settings(max_examples=50, deadline=None)
@given(constant=st.floats(0, 1, width=32), dim=st.integers(1, 700), sharpness=st.floats(0.1, 100))
def test_a_constant_probability_weights_nothing(constant, dim, sharpness):
    assert torch.equal(column_weights(torch.full((2, dim), constant), sharpness), torch.ones(2, dim))


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0, 30.0])
def test_column_weights_have_a_mean_of_one_and_finite_gradients(sharpness):
    probability = torch.rand(4, 33, generator=torch.Generator().manual_seed(0))
    probability[0, :5] = 0
    probability[1] *= 1e-3
    probability.requires_grad_()
    weights = column_weights(probability, sharpness)
    torch.testing.assert_close(weights.mean(dim=-1), torch.ones(4))
    assert weights.min() >= 0
    (weights * torch.arange(33)).sum().backward()
    assert probability.grad.isfinite().all()


def test_column_weights_pass_gradcheck():
    probability = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    assert torch.autograd.gradcheck(lambda value: column_weights(value, 1.7), probability.requires_grad_())


# Style prototypes


@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
@pytest.mark.parametrize("mode", ["statistics", "quantile"])
def test_before_the_first_construction_tokens_are_unweighted_bit_for_bit(make_prototypes, form, mode):
    prototypes = make_prototypes(fresh=True, style_probability=form, column_mode=mode, sharpness=1.7)
    for modality in ("image", "text"):
        tokens = random_tokens()
        weighted, probability = prototypes.weight_tokens(tokens, some_mask(), modality)
        assert torch.equal(weighted, tokens)
        assert torch.equal(probability, torch.ones(3, 12))


@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
@pytest.mark.parametrize("mode", ["statistics", "quantile"])
def test_in_use_every_form_gives_probabilities_that_weight(make_prototypes, form, mode):
    prototypes = make_prototypes(style_probability=form, column_mode=mode, comparator_statistics=True)
    tokens, mask = random_tokens(), some_mask()
    for modality in ("image", "text"):
        weighted, probability = prototypes.weight_tokens(tokens, mask, modality)
        assert probability.shape == (3, 12)
        assert probability.min() >= 0
        assert probability.max() <= 1
        torch.testing.assert_close(weighted, tokens * column_weights(probability)[:, None])
        assert not torch.allclose(weighted, tokens)


def test_the_probability_is_the_written_formula(make_prototypes):
    tokens, mask = random_tokens(), some_mask()
    for form in ("purity", "nearest", "cosine"):
        prototypes = make_prototypes(style_probability=form, column_mode="statistics")
        style = style_probability(
            feature_columns(tokens, mask, "statistics"),
            prototypes.textual_prototypes,
            prototypes.textual_style_rate,
            prototypes.textual_column_scale,
            prototypes.textual_temperature,
            form,
        )
        assert torch.equal(prototypes.semantic_probability(tokens, mask, "text"), 1 - style)
    prototypes = make_prototypes(style_probability="global")
    expected = prototypes.pseudo_semantic_probability.expand(3, -1)
    assert torch.equal(prototypes.semantic_probability(tokens, mask, "image"), expected)


@pytest.mark.parametrize("comparator", COMPARATORS)
def test_every_comparator_starts_neutral_and_gets_gradients(make_prototypes, comparator):
    prototypes = make_prototypes(fresh=True, comparator=comparator)
    trained = make_prototypes(comparator=comparator)
    for name, buffer in prototypes.named_buffers():
        buffer.copy_(trained.get_buffer(name))
    tokens, mask = random_tokens(), some_mask()
    readout = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(4))
    loss = 0.0
    for modality in ("image", "text"):
        weighted, probability = prototypes.weight_tokens(tokens, mask, modality)
        torch.testing.assert_close(weighted, tokens, rtol=0, atol=1e-6)
        torch.testing.assert_close(probability, torch.full((3, 12), 2.0).sigmoid())
        loss = loss + (weighted * readout).sum()
    loss.backward()
    for name, parameter in prototypes.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A constant output weighs no hidden unit yet, and a common bias leaves the mean weight at one.
        acts = comparator == "style_rates" or name.endswith("output_weight")
        assert bool(parameter.grad.abs().max() > 1e-6) == acts, name


@pytest.mark.parametrize("comparator", COMPARATORS)
def test_every_parameter_of_a_trained_comparator_gets_a_gradient(make_prototypes, comparator):
    prototypes = make_prototypes(comparator=comparator, comparator_statistics=True, column_mode="quantile")
    readout = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(4))
    for modality in ("image", "text"):
        weighted, _ = prototypes.weight_tokens(random_tokens(), some_mask(), modality)
        (weighted * readout).sum().backward()
    for name, parameter in prototypes.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
        assert parameter.grad.isfinite().all(), name


def test_style_rates_by_hand(tiny_config):
    rates = StyleRates(tiny_config(num_style_prototypes=2, embedding_dim=2))
    with torch.no_grad():
        rates.rate.copy_(torch.tensor([[0.25, 0.5], [0.0, 1.0]]))
        rates.bias.copy_(torch.tensor([1.0, 2.0]))
    prototypes, scale, temperature = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([2.0, 1.0]), 0.5
    # Both columns, in units of the scale, are (1/2, 3): squared distances 9.25 and 9.25, halves; then (0, 0): 0 and 1.
    columns = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    probability = rates(columns, prototypes, scale, torch.tensor(temperature))
    near = 1 / (1 + math.exp(-1 / temperature))
    expected = [1 / (1 + math.exp(-(1.0 - 4 * 0.375))), 1 / (1 + math.exp(-(2.0 - 4 * (1 - near))))]
    torch.testing.assert_close(probability, torch.tensor([expected]))


def test_style_rates_assign_as_purity_does(make_prototypes):
    prototypes = make_prototypes(comparator="style_rates")
    columns = prototypes.columns(random_tokens(), some_mask(), "image")
    state = [getattr(prototypes, f"visual_{name}") for name in ("prototypes", "column_scale", "temperature")]
    rate = prototypes.visual_style_rate
    with torch.no_grad():
        prototypes.visual_comparator.rate.copy_(rate / StyleRates.gain)
        prototypes.visual_comparator.bias.zero_()
        learned = prototypes.visual_comparator(columns, *state)
    purity = style_probability(columns, state[0], rate, *state[1:], form="purity")
    torch.testing.assert_close(learned, (-purity).sigmoid())


def test_a_free_gate_acts_from_the_first_step_and_knows_no_prototypes(make_prototypes):
    gate = make_prototypes(comparator="free_gate")
    expected = gate.semantic_probability(random_tokens(), some_mask(), "image")
    gate.stage.zero_()
    gate.visual_prototypes.zero_()
    assert torch.equal(gate.semantic_probability(random_tokens(), some_mask(), "image"), expected)
    assert expected.std() > 0


def test_comparator_by_hand(tiny_config):
    comparator = ColumnComparator(tiny_config(num_style_prototypes=1, comparator="network", comparator_hidden_size=1))
    with torch.no_grad():
        comparator.hidden_weight.fill_(2.0)
        comparator.hidden_bias.fill_(1.0)
        comparator.output_weight.fill_(-1.0)
        comparator.output_bias.fill_(0.5)
    hidden = 2 * math.log(1 + 3.0) + 1
    gelu = hidden * 0.5 * (1 + math.erf(hidden / math.sqrt(2)))
    value = comparator(torch.tensor([3.0]))
    assert value.shape == ()
    assert value.item() == pytest.approx(1 / (1 + math.exp(gelu - 0.5)), rel=1e-5)


@pytest.mark.parametrize("combination", PROBABILITY_COMBINATIONS)
def test_one_sided_weights_leave_the_other_side_untouched(make_prototypes, combination):
    prototypes = make_prototypes(probability_combination=combination)
    for modality in ("image", "text"):
        tokens = random_tokens()
        weighted, probability = prototypes.weight_tokens(tokens, some_mask(), modality)
        if combination in ("product", modality):
            assert probability is not None
            assert not torch.allclose(weighted, tokens)
        else:
            assert probability is None
            assert weighted is tokens


@pytest.mark.parametrize("form", ["learned", "purity", "nearest", "cosine"])
@pytest.mark.parametrize("switch", [None, True, False])
def test_the_gradient_switch(make_prototypes, form, switch):
    prototypes = make_prototypes(style_probability=form, probability_gradient=switch)
    tokens = random_tokens().requires_grad_()
    probability = prototypes.semantic_probability(tokens, some_mask(), "image")
    into_tokens = form == "learned" if switch is None else switch
    if not into_tokens and form != "learned":
        assert not probability.requires_grad
        return
    (probability * torch.randn(3, 12)).sum().backward()
    assert (tokens.grad is not None) == into_tokens
    if into_tokens:
        assert tokens.grad.isfinite().all()
        assert tokens.grad.abs().sum() > 0
    if form == "learned":
        assert prototypes.visual_comparator.rate.grad.abs().sum() > 0


def test_the_score_of_weighted_tokens_weights_every_product_of_features(make_prototypes):
    prototypes = make_prototypes(sharpness=1.5)
    images, texts = random_tokens(2, 4), random_tokens(3, 6, seed=1)
    image_mask, text_mask = torch.ones(2, 4, dtype=torch.bool), some_mask()
    weighted_images, image_probability = prototypes.weight_tokens(images, image_mask, "image")
    weighted_texts, text_probability = prototypes.weight_tokens(texts, text_mask, "text")
    scores = pair_scores(weighted_images, weighted_texts, image_mask, text_mask)
    image_probability, text_probability = image_probability.detach(), text_probability.detach()
    image_weights, text_weights = column_weights(image_probability, 1.5), column_weights(text_probability, 1.5)
    for row in range(2):
        for column in range(3):
            patches, words = images[row], texts[column][text_mask[column]]
            s = torch.tensor(
                [
                    [
                        sum(image_weights[row, d] * text_weights[column, d] * v[d] * t[d] for d in range(12))
                        for t in words
                    ]
                    for v in patches
                ]
            )
            expected = s.max(dim=1).values.mean() + s.max(dim=0).values.mean()
            torch.testing.assert_close(scores[row, column], expected, rtol=1e-5, atol=1e-6)


def test_position_columns_leave_the_class_token_out_and_refuse_other_grids(make_prototypes):
    tokens = random_tokens(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with_class = make_prototypes(column_mode="position", column_length=4)
    columns = with_class.columns(tokens, mask, "image")
    assert torch.equal(columns, tokens[:, 1:].transpose(1, 2) * 12**0.5)
    assert with_class.columns(tokens, mask, "text").shape == (2, 12, 4)
    without_class = make_prototypes(column_mode="position", column_length=4, vision_special_tokens=False)
    assert torch.equal(without_class.columns(tokens[:, 1:], mask[:, 1:], "image"), columns)
    # A larger image must not be cut to the size of the grid in silence.
    with pytest.raises(ValueError, match="exactly column_length=4 patches, but got 9"):
        with_class.columns(random_tokens(2, 10), torch.ones(2, 10), "image")


def test_running_statistics(make_prototypes):
    prototypes = make_prototypes(fresh=True, embedding_dim=2, probability_estimator="chance_corrected")
    assert torch.equal(prototypes.pseudo_probability(), torch.zeros(2))
    # Shares of positive and negative values of the image, then of its text; the second feature is the first one with
    # its sign turned around on both sides.
    positive, negative = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    quarter, half = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    first = torch.stack(
        [torch.stack([positive, negative, 1 - quarter, quarter]), torch.stack([negative, positive, half, half])]
    )
    second = torch.stack([torch.stack([positive, negative, positive, negative]), torch.ones(4, 2)])
    prototypes.add_pair_shares(first, torch.tensor([True, True]), torch.tensor([0, 1]))
    prototypes.add_pair_shares(second, torch.tensor([True, False]), torch.tensor([0, 1]))
    # Matched products are positive by 0.75, 0.5 and 1, mismatched ones by 0.5 and 0.25.
    assert prototypes.matched_sum.tolist() == [2.25, 2.25] and float(prototypes.matched_count) == 3
    assert prototypes.mismatched_sum.tolist() == [0.75, 0.75] and float(prototypes.mismatched_count) == 2
    torch.testing.assert_close(prototypes.pseudo_probability(), torch.full((2,), 0.375 / 0.625))
    prototypes.reset_statistics()
    for name in ("matched_sum", "mismatched_sum", "matched_count", "mismatched_count"):
        assert not getattr(prototypes, name).any()


def test_running_statistics_of_the_best_aligned_pairs(make_prototypes):
    prototypes = make_prototypes(fresh=True, embedding_dim=2, probability_estimator="best_aligned")
    images, texts = random_tokens(3, 4, 2, seed=1), random_tokens(3, 5, 2, seed=2)
    masks = torch.ones(3, 4), torch.ones(3, 5)
    shares = prototypes.pair_shares(images, masks[0], texts, masks[1])
    agreement = best_aligned_agreement(images, masks[0], texts, masks[1])
    assert torch.equal(shares, agreement.unsqueeze(1))
    prototypes.add_pair_shares(shares, torch.tensor([True, False, True]), torch.arange(3))
    prototypes.add_pair_shares(shares, torch.tensor([False, True, False]), torch.arange(3))
    torch.testing.assert_close(prototypes.pseudo_probability(), agreement.mean(dim=0))


def test_the_estimator_decides_what_is_counted(make_prototypes):
    images, texts = random_tokens(2, 4, 2, seed=1), random_tokens(2, 5, 2, seed=2)
    masks = torch.ones(2, 4), torch.ones(2, 5)
    for estimator in ("matched", "chance_corrected", "magnitude"):
        prototypes = make_prototypes(fresh=True, embedding_dim=2, probability_estimator=estimator)
        by_magnitude = estimator == "magnitude"
        sides = [sign_shares(side, mask, by_magnitude) for side, mask in zip((images, texts), masks, strict=True)]
        shares = prototypes.pair_shares(images, masks[0], texts, masks[1])
        assert torch.equal(shares, torch.cat(sides, dim=1)), estimator


def test_initial_buffers_are_those_of_the_constructor(tiny_config):
    prototypes = PicoHead(tiny_config()).style_prototypes
    values = prototypes.initial_buffers()
    buffers = dict(prototypes.named_buffers())
    assert values.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, torch.full_like(buffer, values[name])), name
