"""The equations of CDDS by hand, and why the printed form of some of them does not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_pico.model import modeling_cdds
from modeling_pico.model.modeling_cdds import (
    column_divergence,
    column_moments,
    gaussian_divergence,
    integrity_loss,
    modality_loss,
    related_semantics,
    sample_distribution,
    semantic_loss,
)


def close(found: torch.Tensor, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


@pytest.fixture
def exact(monkeypatch):
    """Variances without the floor, for values by hand."""
    monkeypatch.setattr(modeling_cdds, "VARIANCE_FLOOR", 0.0)


# Eq. 5


def test_moments_of_columns(exact):
    tokens = torch.tensor([[[0.0, 5.0], [2.0, 5.0], [99.0, -99.0]], [[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    mean, variance = column_moments(tokens, mask)
    close(mean, [[1.0, 5.0], [3.0, 1.0]])
    close(variance, [[1.0, 0.0], [14 / 3, 2.0]])


def test_divergence_of_normal_distributions():
    divergence = gaussian_divergence(*map(torch.tensor, ([0.0, 0.0, 1.0], [1.0, 1.0, 4.0], [0.0, 1.0, 3.0], 1.0)))
    # ln(1) + 1/1 - 1;  1 of squared distance;  ln(1/4) + (4 + 4) - 1; all halved
    close(divergence, [0.0, 0.5, (math.log(1 / 4) + 7) / 2])
    swapped = gaussian_divergence(*map(torch.tensor, ([0.0], [1.0], [0.0], [4.0])))
    close(swapped, [(math.log(4) + 1 / 4 - 1) / 2])


def test_similarity_of_columns_of_all_tokens(exact):
    image_tokens = torch.tensor([[-1.0, 2.0], [1.0, 4.0]])  # N(0, 1) and N(3, 1)
    text_tokens = torch.tensor([[0.0, -2.0], [2.0, 2.0]])  # N(1, 1) and N(0, 4)
    narrow = (math.log(4) + 1 / 4 - 1) / 2
    far = (math.log(4) + (1 + 9) / 4 - 1) / 2
    found = column_divergence(image_tokens, text_tokens)
    close((-found).exp(), [[math.exp(-0.5), math.exp(-narrow)], [math.exp(-2.0), math.exp(-far)]])


def test_constant_columns_have_a_finite_divergence():
    tokens = torch.zeros(3, 2, requires_grad=True)
    divergence = column_divergence(tokens, torch.randn(4, 2))
    divergence.sum().backward()
    assert divergence.isfinite().all() and tokens.grad.isfinite().all()


# Eqs. 6 to 9


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_related_semantics_by_hand():
    row = [0.2, 0.4, 0.9]
    probability = [sigmoid(value) for value in row]
    mean = sum(probability) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in probability) / 3)
    assert mean + 0.5 * deviation == pytest.approx(0.6535, abs=1e-4)  # between the second and the third
    assert mean - 0.5 * deviation == pytest.approx(0.5861, abs=1e-4)  # between the first and the second
    similarity = torch.tensor([row, row, row[::-1]])
    found = related_semantics(-similarity.log(), torch.tensor([0.5, -0.5, -0.5]))
    close(found, [[0, 0, 1], [0, 0.4 / 1.3, 0.9 / 1.3], [0.9 / 1.3, 0.4 / 1.3, 0]])


def test_similarities_are_compared_with_the_threshold_as_probabilities():
    row = torch.tensor([0.05, 0.1, 0.3])
    probability = row.sigmoid()
    threshold = probability.mean() + probability.std(correction=0)
    # As printed nothing of this row is left to rescale: a sigmoid of what is positive exceeds 1/2.
    assert not (row > threshold).any() and threshold > 0.5
    close(related_semantics(-row[None].log(), torch.ones(1)), [[0, 0, 1]])


def test_a_row_in_which_nothing_stands_out_keeps_its_largest_entry():
    similarity = torch.tensor([[0.2, 0.5, 0.4], [0.3, 0.3, 0.3]])
    found = related_semantics(-similarity.log(), torch.tensor([50.0, 50.0]))
    close(found, [[0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])


def test_the_threshold_is_learned_although_the_mask_is_hard():
    similarity = torch.tensor([[0.2, 0.4, 0.9, 0.8]])
    target = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    threshold = torch.zeros(1, requires_grad=True)
    probability = similarity.sigmoid()
    hard = (probability > probability.mean() + threshold * probability.std(correction=0)).float()
    assert not hard.requires_grad  # as printed: no gradient at all
    found = related_semantics(-similarity.log(), threshold)
    close(found.detach(), similarity * hard / (similarity * hard).sum())
    (found - target).square().sum().backward()
    # A higher threshold would leave the largest entry alone, which is what this loss asks for.
    assert threshold.grad.item() < 0


def test_columns_that_have_nothing_in_common_keep_the_closest_and_its_gradient():
    # exp(-300) is no number of float32, let alone the square of it by which a rescaled row is differentiated.
    divergence = torch.tensor([[300.0, 301.0, 1e4], [40.0, 60.0, 95.0]], requires_grad=True)
    threshold = torch.zeros(2, requires_grad=True)
    found = related_semantics(divergence, threshold)
    ratio = math.exp(-1)
    close(found[0], [1 / (1 + ratio), ratio / (1 + ratio), 0])  # equal as probabilities: all exceed or none
    close(found[1], [1, 0, 0])
    (65536 * found[:, 0]).sum().backward()
    assert divergence.grad.isfinite().all() and threshold.grad.isfinite().all()
    assert divergence.grad[0, 0] < 0


# Eq. 10


def test_quantile_mapping_keeps_the_order_and_takes_the_values():
    own, other = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[10.0], [30.0], [20.0]])
    close(sample_distribution(own, other, torch.ones(1, 1)), [[30.0], [10.0], [20.0]])


def test_quantile_mapping_between_different_numbers_of_tokens():
    two, four = torch.tensor([[7.0], [5.0]]), torch.tensor([[3.0], [0.0], [2.0], [1.0]])
    # A quarter and three quarters of the four lie half-way between neighbours.
    close(sample_distribution(two, four, torch.ones(1, 1)), [[2.5], [0.5]])
    # And back: beyond the middle of the outermost values there is nothing to interpolate.
    close(sample_distribution(four, two, torch.ones(1, 1)), [[7.0], [5.0], [6.5], [5.5]])


def test_places_among_many_tokens_are_exact_and_equal_values_ranked_by_position():
    own, other = torch.arange(30000.0)[:, None], torch.zeros(70000, 1)
    other[69978:] = 1
    # Of rank 29990 at (29990 + 1/2) * 7 / 3 - 1/2 = 69977 + 1/3.
    close(sample_distribution(own, other, torch.ones(1, 1))[29989:29992], [[0.0], [1 / 3], [1.0]])
    found = sample_distribution(torch.zeros(70, 1), torch.arange(70.0)[:, None], torch.ones(1, 1))
    close(found, torch.arange(70.0)[:, None])


def test_sampled_columns_are_weighted_sums():
    own, other = torch.tensor([[0.0, 9.0], [1.0, 8.0]]), torch.tensor([[1.0, 40.0], [2.0, 20.0]])
    found = sample_distribution(own, other, torch.tensor([[0.25, 0.75], [0.0, 1.0]]))
    # Column 0 ascends: 1/4 (1, 2) + 3/4 (20, 40). Column 1 descends: (40, 20).
    close(found, [[15.25, 40.0], [30.5, 20.0]])


def test_sampling_as_the_equation_reads():
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(7, 3, generator=generator), torch.randn(7, 3, generator=generator)
    weights = torch.rand(3, 3, generator=generator)
    expected = torch.zeros(7, 3)
    for token in range(7):
        for column in range(3):
            above = (own[:, column] > own[token, column]).sum()
            for j in range(3):
                value = next(c for c in other[:, j] if (other[:, j] > c).sum() == above)
                expected[token, column] += weights[column, j] * value
    close(sample_distribution(own, other, weights), expected)


def test_the_gradient_of_sampling_reaches_values_and_weights():
    generator = torch.Generator().manual_seed(0)
    own, other, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (3, 2), (2, 2))
    )
    assert torch.autograd.gradcheck(
        lambda values, shares: sample_distribution(own, values, shares),
        (other.requires_grad_(), weights.requires_grad_()),
    )


# Eqs. 11 to 14


def test_semantic_loss_by_hand():
    semantic = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], [[1.0, 1.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sampled = torch.tensor([[[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    first = -math.log(math.e / (math.e + 1))  # cosines 1 and 0
    second = math.log(2)  # cosines alike
    close(semantic_loss(sampled, semantic, mask), (first + second + 0.0) / 3)  # a token alone has nothing to lose


def test_the_printed_semantic_loss_pushes_tokens_from_their_own_components():
    semantic, mask = torch.eye(3)[None], torch.ones(1, 3, dtype=torch.bool)

    def printed(sampled):
        cosine = torch.nn.functional.normalize(sampled, dim=-1) @ semantic.mT
        return -(torch.diagonal((-cosine).exp(), dim1=1, dim2=2) / (-cosine).exp().sum(dim=-1)).log().mean()

    assert printed(-semantic) < printed(semantic)
    assert semantic_loss(-semantic, semantic, mask) > semantic_loss(semantic, semantic, mask)


def test_modality_loss_by_hand(monkeypatch):
    monkeypatch.setattr(modeling_cdds, "VARIANCE_FLOOR", 1.0)
    # One token each: variance 1. The means differ by 1 in one of two columns, so KL = (1/2 + 0) / 2.
    modality = torch.tensor([[[0.0, 3.0], [7.0, 7.0]], [[1.0, 3.0], [9.0, 9.0]], [[5.0, 5.0], [5.0, 5.0]]])
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    close(modality_loss(modality, mask), (1 - math.exp(-0.25)) / 2)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.size = max(self.size, *(tensor.numel() for tensor in tree_leaves(found) if hasattr(tensor, "numel")), 0)
        return found


def test_modality_loss_is_the_mean_over_columns_without_a_tensor_of_all_pairs_and_columns():
    generator = torch.Generator().manual_seed(0)
    modality = (5 + torch.randn(24, 2, 64, generator=generator)).requires_grad_()
    mask = torch.ones(24, 2, dtype=torch.bool)
    mean, variance = column_moments(modality, mask)
    divergence = gaussian_divergence(mean[:, None], variance[:, None], mean, variance).mean(dim=-1)
    expected = (1 - (-divergence).exp()).mean()
    with Largest() as largest:
        found = modality_loss(modality, mask)
    close(found, expected.detach(), 1e-6)
    gradients = (torch.autograd.grad(loss, modality)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert 24 * 64 <= largest.size <= 24 * 2 * 64


def test_modality_loss_of_like_samples_far_from_others_lies_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    modality = torch.randn(9, 1, 7, generator=generator).repeat(1, 3, 1) * 1e-3
    modality[::2] += 1e4 * torch.randn(7, generator=generator)  # of variance 1e-3, so that rounding is of thousands
    modality.requires_grad_()
    loss = modality_loss(modality, torch.ones(9, 3, dtype=torch.bool))
    loss.backward()
    assert 0 <= loss <= 1 and modality.grad.isfinite().all()


def test_losses_of_no_token_are_zero_and_of_tokens_of_zeros_have_no_steep_gradient():
    tokens = torch.zeros(2, 3, 4, requires_grad=True)
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        for loss in (
            semantic_loss(tokens, torch.ones(2, 3, 4), mask),
            modality_loss(tokens, mask),
            integrity_loss(tokens, tokens + 1, mask),
        ):
            (gradient,) = torch.autograd.grad(loss, tokens)
            assert gradient.abs().max() < 1e4
            assert loss == 0 or mask.any()


def test_the_printed_modality_loss_drives_samples_apart():
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.randn(1, 5, 4, generator=generator).repeat(3, 1, 1), torch.ones(3, 5, dtype=torch.bool)
    apart = tokens + torch.arange(3.0).view(3, 1, 1)

    def printed(modality):
        mean, variance = column_moments(modality, mask)
        divergence = gaussian_divergence(mean[:, None], variance[:, None], mean, variance).mean(dim=-1)
        return (-divergence).exp().sum()

    assert printed(apart) < printed(tokens)
    assert modality_loss(apart, mask) > modality_loss(tokens, mask) == 0


def test_modality_loss_has_a_gradient_with_many_columns():
    generator = torch.Generator().manual_seed(0)
    modality = torch.randn(4, 6, 512, generator=generator, requires_grad=True)
    loss = modality_loss(modality, torch.ones(4, 6, dtype=torch.bool))
    loss.backward()
    # The sum over columns would be some hundreds, and its exponential nothing.
    assert 0.05 < loss < 0.9
    assert modality.grad.abs().max() > 1e-6


def test_integrity_loss_by_hand():
    tokens = torch.tensor([[[1.0, 2.0], [50.0, 50.0]], [[0.0, 0.0], [3.0, 1.0]]])
    rebuilt = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[0.0, 2.0], [3.0, 1.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    close(integrity_loss(tokens, rebuilt, mask), (1 + 0 + 0 + 4 + 0 + 0) / 6)
