from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_pico.model.loss_pico import exclusion_mask, hinge_loss, image_text_loss, infonce_loss


SCORES = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.5, 0.2], [0.0, 0.6, 0.7]])


def test_exclusion_mask_by_hand():
    mask = exclusion_mask(torch.tensor([7, 8]), torch.tensor([8, 7, 7, 8]), torch.tensor([2, 3]))
    assert mask.tolist() == [[False, True, False, False], [True, False, False, False]]


def test_infonce_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    # Row 0: 3 / (3 + 1) for the partner, row 1: 1 / 2.
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert infonce_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_infonce_leaves_excluded_columns_out():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    exclude = torch.tensor([[False, True, False]])
    expected = math.log(1 + math.exp(2.0 - 1.0))
    assert infonce_loss(logits, torch.tensor([0]), exclude).item() == pytest.approx(expected, rel=1e-6)


def test_a_mask_over_the_partner_does_not_remove_it():
    exclude = torch.ones(1, 2, dtype=torch.bool)
    assert infonce_loss(torch.tensor([[1.0, 5.0]]), torch.tensor([0]), exclude).item() == 0.0
    assert hinge_loss(torch.tensor([[1.0, 5.0]]), torch.tensor([0]), exclude).item() == 0.0


def test_hinge_by_hand():
    targets = torch.arange(3)
    # Row 0: 0.2 + 0.8 - 0.9 = 0.1 and nothing from 0.1; row 1: 0.0 from 0.3 and nothing; row 2: 0.2 + 0.6 - 0.7 = 0.1.
    assert hinge_loss(SCORES, targets).item() == pytest.approx(0.2 / 3, abs=1e-6)
    # Margin 0.5, all negatives. Row 0: 0.4; row 1: 0.3 + 0.2; row 2: 0.4. Hardest: 0.4 + 0.3 + 0.4.
    assert hinge_loss(SCORES, targets, margin=0.5, hardest=False).item() == pytest.approx(1.3 / 3, abs=1e-6)
    assert hinge_loss(SCORES, targets, margin=0.5).item() == pytest.approx(1.1 / 3, abs=1e-6)


def test_hinge_skips_excluded_negatives():
    exclude = torch.zeros(3, 3, dtype=torch.bool)
    exclude[0, 1] = True
    assert hinge_loss(SCORES, torch.arange(3), exclude).item() == pytest.approx(0.1 / 3, abs=1e-6)


def test_hinge_gradient_by_hand():
    scores = SCORES.clone().requires_grad_()
    hinge_loss(scores, torch.arange(3), margin=0.15).backward()
    # Rows 0 and 2 each violate with their hardest negative only; row 1 keeps the margin.
    third = 1 / 3
    torch.testing.assert_close(scores.grad, torch.tensor([[-third, third, 0], [0, 0, 0], [0, third, -third]]))


def test_directions_are_averaged_for_infonce_and_summed_for_hinge():
    targets = torch.arange(3)
    infonce = image_text_loss(SCORES, SCORES.T, logit_scale=5.0)
    torch.testing.assert_close(infonce, (infonce_loss(SCORES * 5, targets) + infonce_loss(SCORES.T * 5, targets)) / 2)
    hinge = image_text_loss(SCORES, SCORES.T, loss_type="hinge", margin=0.3, logit_scale=5.0)
    torch.testing.assert_close(
        hinge, hinge_loss(SCORES, targets, margin=0.3) + hinge_loss(SCORES.T, targets, margin=0.3)
    )


@pytest.mark.parametrize("loss_type", ["infonce", "hinge"])
def test_repeated_ids_are_never_negatives(loss_type):
    ids = torch.tensor([4, 4, 9])
    scores = SCORES.clone().requires_grad_()
    image_text_loss(scores, scores.T, image_ids=ids, loss_type=loss_type, margin=2.0, hardest=False).backward()
    assert scores.grad[0, 1] == 0 and scores.grad[1, 0] == 0
    assert scores.grad[0, 2] > 0 and scores.grad[2, 1] > 0 and scores.grad[0, 0] < 0


@pytest.mark.parametrize("loss_type", ["infonce", "hinge"])
@pytest.mark.parametrize("size", [1, 3])
def test_rows_without_negatives_give_zero_and_no_gradient(loss_type, size):
    scores = SCORES[:size, :size].clone().requires_grad_()
    ids = torch.full((size,), 5)
    loss = image_text_loss(scores, scores.T, image_ids=ids, loss_type=loss_type)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def _loss_of_share(images, texts, ids, start, stop, **options):
    return image_text_loss(
        images[start:stop] @ texts.T, texts[start:stop] @ images.T, image_ids=ids, offset=start, **options
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shares=st.sampled_from([2, 4]),
    options=st.sampled_from(
        [{"logit_scale": 10.0}, {"loss_type": "hinge"}, {"loss_type": "hinge", "hardest": False, "margin": 0.5}]
    ),
)
def test_mean_of_share_gradients_is_gradient_of_the_whole_batch(seed, shares, options):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        F.normalize(torch.randn(8, 5, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for _ in range(2)
    )
    ids = torch.randint(0, 6, (8,), generator=generator)
    whole = torch.autograd.grad(_loss_of_share(images, texts, ids, 0, 8, **options), (images, texts))
    rows = 8 // shares
    parts = [
        torch.autograd.grad(_loss_of_share(images, texts, ids, start, start + rows, **options), (images, texts))
        for start in range(0, 8, rows)
    ]
    for side in range(2):
        torch.testing.assert_close(sum(part[side] for part in parts) / shares, whole[side])


@pytest.mark.parametrize("options", [{}, {"loss_type": "hinge"}, {"loss_type": "hinge", "hardest": False}])
def test_equal_captions_are_no_negatives_of_each_other(options):
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    scores[1, 2] = scores[2, 1] = 3.0
    scores[0, 1] = scores[1, 0] = 2.5  # both are the hardest of somebody
    ids, codes = torch.tensor([0, 1, 2, 0]), torch.tensor([-5, 7, 7, 9])
    # Pairs 0 and 3 have one id, pairs 1 and 2 one caption: together as if there were two ids.
    expected = image_text_loss(scores, scores.T, image_ids=torch.tensor([0, 1, 1, 0]), **options)
    loss = image_text_loss(scores, scores.T, image_ids=ids, caption_codes=codes, **options)
    assert torch.equal(loss, expected)
    assert loss < image_text_loss(scores, scores.T, image_ids=ids, **options)
    # The two do not add up to one meaning: pair 3 shares its id with 0 and its caption with 1, which are negatives.
    chain = image_text_loss(
        scores, scores.T, image_ids=torch.tensor([0, 1, 2, 0]), caption_codes=torch.tensor([4, 5, 6, 5]), **options
    )
    assert chain > image_text_loss(scores, scores.T, image_ids=torch.tensor([0, 0, 2, 0]), **options)
    # Shares of two processes.
    halves = [
        image_text_loss(scores[own], scores.T[own], image_ids=ids, caption_codes=codes, offset=own.start, **options)
        for own in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), expected)
    # Different captions change no bit.
    different = image_text_loss(scores, scores.T, image_ids=ids, caption_codes=torch.arange(4), **options)
    assert torch.equal(different, image_text_loss(scores, scores.T, image_ids=ids, **options))


def test_logit_scale_gets_a_gradient_and_half_precision_is_computed_in_float32():
    scale = torch.tensor(2.0, requires_grad=True)
    half = SCORES.to(torch.bfloat16)
    loss = image_text_loss(half, half.T, logit_scale=scale)
    loss.backward()
    assert loss.dtype == torch.float32 and scale.grad.abs() > 0
    torch.testing.assert_close(loss, image_text_loss(half.float(), half.float().T, logit_scale=2.0))
    assert hinge_loss(half, torch.arange(3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_text_loss(SCORES, SCORES, loss_type="nce"), r"'nce'; allowed are 'infonce', 'hinge'"),
        (lambda: image_text_loss(SCORES, SCORES[:2]), r"\(3, 3\) and \(2, 3\)"),
        (lambda: image_text_loss(SCORES[:2], SCORES[:2], offset=2), r"offset 2 with 2 local pairs .* 3 pairs"),
        (
            lambda: image_text_loss(SCORES[:2], SCORES[:2], image_ids=torch.arange(2)),
            r"image_ids must be those of all 3 pairs, of shape \(3,\), got \(2,\)",
        ),
        (lambda: image_text_loss(SCORES, SCORES, caption_codes=torch.arange(2)), r"caption_codes must be .* \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
