from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pico.model.configuration_pico import COLUMN_MODES, STYLE_PROBABILITIES
from modeling_pico.model.prototypes_pico import (
    StylePrototypes,
    StyleRates,
    column_weights,
    feature_columns,
    squared_distances,
    style_probability,
)
from modeling_pico.model.scoring_pico import pair_scores


def random_tokens(batch: int = 3, tokens: int = 6, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(batch, tokens, dim, generator=generator), dim=-1)


def some_mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture
def make_prototypes(tiny_model, use_prototypes):
    """The prototypes of a tiny model's texts, as after training (`stage` 2) unless `fresh`."""

    def make(fresh: bool = False, **options) -> StylePrototypes:
        model = tiny_model(**options)
        return (model if fresh else use_prototypes(model)).style_prototypes["text"]

    return make


# Columns


def test_moments_by_hand():
    # Dimension 4, so values are doubled; the third token is padding.
    tokens = torch.tensor([[[0.5, 0.5, 0.0, -0.5], [-0.5, 1.0, 0.0, -0.5], [9.0, 9.0, 9.0, 9.0]]])
    columns = feature_columns(tokens, torch.tensor([[True, True, False]]), "moments")
    expected = [
        [0.0, 1.0],  # 1, -1
        [1.5, 0.5],  # 1, 2
        [0.0, 1e-4],  # constant: only the constant that keeps the root differentiable
        [-1.0, 1e-4],
    ]
    torch.testing.assert_close(columns, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_quantile_by_hand():
    # Values 3, -1, 0 in dimension 1; sorted -1, 0, 3; five points at 0, 1/2, 1, 3/2, 2.
    tokens = torch.tensor([[[3.0], [-1.0], [0.0], [7.0]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    columns = feature_columns(tokens, mask, "quantile", 5)
    assert columns.tolist() == [[[-1.0, -0.5, 0.0, 1.5, 3.0]]]
    # One token: the same value everywhere.
    assert feature_columns(tokens, torch.tensor([[1, 0, 0, 0]]), "quantile", 3).tolist() == [[[3.0, 3.0, 3.0]]]


@pytest.mark.parametrize("mode", COLUMN_MODES)
def test_columns_ignore_padding_and_the_order_of_tokens(mode):
    tokens, mask = random_tokens(), some_mask()
    columns = feature_columns(tokens, mask, mode, 5)
    assert columns.shape == (3, 12, 2 if mode == "moments" else 5)
    noisy = torch.where(mask[:, :, None], tokens, 100 * torch.randn_like(tokens))
    torch.testing.assert_close(feature_columns(noisy, mask, mode, 5), columns, rtol=0, atol=0)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(feature_columns(tokens[:, order], mask[:, order], mode, 5), columns)
    # Alone and without padding the row is the same.
    torch.testing.assert_close(feature_columns(tokens[1:2, :3], mask[1:2, :3], mode, 5), columns[1:2])


@pytest.mark.parametrize(("mode", "length"), [("moments", None), ("quantile", 5)])
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
def test_the_gradient_of_moments_is_that_of_autograd(padded):
    tokens = random_tokens(batch=3)
    tokens[0] = 0.25
    mask = some_mask() if padded else torch.ones(3, 6, dtype=torch.bool)
    upstream = torch.randn(3, 12, 2, generator=torch.Generator().manual_seed(1))
    first, second = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    feature_columns(first, mask).backward(upstream)
    values, valid = second * 12**0.5, mask.unsqueeze(-1)
    count = valid.sum(dim=1)
    mean = (values * valid).sum(dim=1) / count
    spread = ((((values - mean.unsqueeze(1)) ** 2) * valid).sum(dim=1) / count + 1e-8).sqrt()
    torch.stack([mean, spread], dim=-1).backward(upstream)
    torch.testing.assert_close(first.grad[1], second.grad[1])
    # The spread of a constant column has a steep slope, in which rounding shows.
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-3)


def test_moments_are_the_same_with_and_without_gradient():
    tokens = random_tokens()
    with_gradient = feature_columns(tokens.requires_grad_(), some_mask())
    assert with_gradient.requires_grad
    assert torch.equal(feature_columns(tokens.detach(), some_mask()), with_gradient)


def test_columns_are_float32_for_half_precision():
    assert feature_columns(random_tokens().bfloat16(), some_mask()).dtype == torch.float32


def test_squared_distances_by_hand():
    columns = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert squared_distances(columns, prototypes, torch.ones(2)).tolist() == [[0.0, 25.0], [9.0, 16.0]]
    assert squared_distances(columns, prototypes, torch.tensor([3.0, 2.0])).tolist() == [[0.0, 5.0], [1.0, 4.0]]


def test_squared_distances_are_never_negative():
    columns = 100 + 1e-3 * torch.randn(200, 4)
    assert squared_distances(columns, columns[:5], torch.ones(4)).min() >= 0


# Probabilities


def test_style_probability_by_hand():
    prototypes, rate = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.2, 0.8])
    scale, temperature = torch.ones(2), torch.tensor(5.0)
    columns = torch.tensor([[0.0, 0.0], [3.0, 0.0]])  # squared distances 0, 25 and 9, 16
    purity = style_probability(columns, prototypes, rate, scale, temperature)
    near, far = math.exp(-5), math.exp(-16 / 5) / math.exp(-9 / 5)
    expected = torch.tensor([(0.2 + 0.8 * near) / (1 + near), (0.2 + 0.8 * far) / (1 + far)])
    torch.testing.assert_close(purity, expected)
    # The unit of a coordinate is divided out first: (6, 0) / (2, 1) is (3, 0), (6, 4) / (2, 1) is (3, 4).
    units = torch.tensor([2.0, 1.0])
    scaled = style_probability(columns * units, prototypes * units, rate, units, temperature)
    torch.testing.assert_close(scaled, expected)


def test_style_probability_lies_between_zero_and_one():
    generator = torch.Generator().manual_seed(0)
    columns, prototypes = 10 * torch.randn(500, 4, generator=generator), torch.randn(5, 4, generator=generator)
    columns[0] = 0
    rate = torch.rand(5, generator=generator)
    value = style_probability(columns, prototypes, rate, torch.full((4,), 0.5), torch.tensor(1e-6))
    assert value.isfinite().all()
    assert value.min() >= 0
    assert value.max() <= 1


def test_column_weights_by_hand():
    torch.testing.assert_close(column_weights(torch.tensor([0.2, 0.6])), torch.tensor([0.5, 1.5]))
    assert torch.equal(column_weights(torch.zeros(2, 7)), torch.ones(2, 7))


@settings(max_examples=50, deadline=None)
@given(constant=st.floats(0, 1, width=32), dim=st.integers(1, 700))
def test_a_constant_probability_weights_nothing(constant, dim):
    assert torch.equal(column_weights(torch.full((2, dim), constant)), torch.ones(2, dim))


def test_column_weights_have_a_mean_of_one_and_finite_gradients():
    probability = torch.rand(4, 33, generator=torch.Generator().manual_seed(0))
    probability[0, :5] = 0
    probability[1] *= 1e-3
    probability.requires_grad_()
    weights = column_weights(probability)
    torch.testing.assert_close(weights.mean(dim=-1), torch.ones(4))
    assert weights.min() >= 0
    (weights * torch.arange(33)).sum().backward()
    assert probability.grad.isfinite().all()


def test_column_weights_pass_gradcheck():
    probability = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    assert torch.autograd.gradcheck(column_weights, probability.requires_grad_())


# Style prototypes


@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
@pytest.mark.parametrize("mode", COLUMN_MODES)
def test_before_the_first_construction_tokens_are_unweighted_bit_for_bit(make_prototypes, form, mode):
    prototypes = make_prototypes(fresh=True, style_probability=form, column_mode=mode)
    tokens = random_tokens()
    weighted, probability = prototypes.weight_tokens(tokens, some_mask())
    assert torch.equal(weighted, tokens)
    assert torch.equal(probability, torch.ones(3, 12))


@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
@pytest.mark.parametrize("mode", COLUMN_MODES)
def test_in_use_every_form_gives_probabilities_that_weight(make_prototypes, form, mode):
    prototypes = make_prototypes(style_probability=form, column_mode=mode)
    tokens, mask = random_tokens(), some_mask()
    weighted, probability = prototypes.weight_tokens(tokens, mask)
    assert probability.shape == (3, 12)
    assert probability.min() >= 0
    assert probability.max() <= 1
    torch.testing.assert_close(weighted, tokens * column_weights(probability)[:, None])
    assert not torch.allclose(weighted, tokens)


def test_the_probability_is_the_written_formula(make_prototypes):
    tokens, mask = random_tokens(), some_mask()
    prototypes = make_prototypes(style_probability="purity", column_mode="quantile", column_length=5)
    style = style_probability(
        feature_columns(tokens, mask, "quantile", 5),
        prototypes.prototypes,
        prototypes.style_rate,
        prototypes.column_scale,
        prototypes.temperature,
    )
    assert torch.equal(prototypes.semantic_probability(tokens, mask), 1 - style)


def test_style_rates_start_neutral_and_get_gradients(make_prototypes):
    prototypes, trained = make_prototypes(fresh=True), make_prototypes()
    for name, buffer in prototypes.named_buffers():
        buffer.copy_(trained.get_buffer(name))
    tokens, mask = random_tokens(), some_mask()
    readout = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(4))
    weighted, probability = prototypes.weight_tokens(tokens, mask)
    torch.testing.assert_close(weighted, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(probability, torch.full((3, 12), 2.0).sigmoid())
    (weighted * readout).sum().backward()
    for name, parameter in prototypes.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name


def test_every_parameter_of_trained_style_rates_gets_a_gradient(make_prototypes):
    prototypes = make_prototypes(column_mode="quantile")
    readout = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(4))
    weighted, _ = prototypes.weight_tokens(random_tokens(), some_mask())
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
    prototypes = make_prototypes()
    columns = prototypes.columns(random_tokens(), some_mask())
    state = [prototypes.prototypes, prototypes.column_scale, prototypes.temperature]
    rate = prototypes.style_rate
    with torch.no_grad():
        prototypes.rates.rate.copy_(rate / StyleRates.gain)
        prototypes.rates.bias.zero_()
        learned = prototypes.rates(columns, *state)
    purity = style_probability(columns, state[0], rate, *state[1:])
    torch.testing.assert_close(learned, (-purity).sigmoid())


@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
def test_the_gradient_flows_through_learned_rates_alone(make_prototypes, form):
    prototypes = make_prototypes(style_probability=form)
    tokens = random_tokens().requires_grad_()
    probability = prototypes.semantic_probability(tokens, some_mask())
    assert probability.requires_grad == (form == "style_rates")
    if form == "style_rates":
        (probability * torch.randn(3, 12)).sum().backward()
        assert tokens.grad.isfinite().all()
        assert tokens.grad.abs().sum() > 0
        assert prototypes.rates.rate.grad.abs().sum() > 0


def test_the_score_of_weighted_tokens_weights_every_product_of_features(make_prototypes):
    prototypes = make_prototypes()
    images, texts = random_tokens(2, 4), random_tokens(3, 6, seed=1)
    image_mask, text_mask = torch.ones(2, 4, dtype=torch.bool), some_mask()
    weighted_images, image_probability = prototypes.weight_tokens(images, image_mask)
    weighted_texts, text_probability = prototypes.weight_tokens(texts, text_mask)
    scores = pair_scores(weighted_images, weighted_texts, image_mask, text_mask)
    image_probability, text_probability = image_probability.detach(), text_probability.detach()
    image_weights, text_weights = column_weights(image_probability), column_weights(text_probability)
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
