"""The pair score: hand-computed values, the tiled path against the reference, and its edges."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_pico.model import scoring_pico
from modeling_pico.model.scoring_pico import ScoresBackendError, pair_scores, reference_pair_scores
from modeling_pico.model.scoring_tiled_pico import tiled_pair_scores


PATHS = {"reference": reference_pair_scores, "tiled": tiled_pair_scores}
# One similarity per tile, a few, and everything in one.
TILES = (1, 60, 2**20)


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.fixture
def hand():
    """Two images and two texts in the plane; the padding (9, 9) would win every maximum that it takes part in."""
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [9.0, 9.0]]])
    texts = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[-1.0, 0.0], [-0.5, -0.5]]])
    return images, texts, torch.tensor([[True, True], [True, False]]), torch.tensor([[True, False], [True, True]])


def ragged(images=7, texts=11, patches=9, words=6, dim=16, dtype=torch.float32, seed=0):
    """Random embeddings and masks with holes, one image and one text without a real token."""
    generator = torch.Generator().manual_seed(seed)
    image_embeds = torch.randn(images, patches, dim, generator=generator).to(dtype)
    text_embeds = torch.randn(texts, words, dim, generator=generator).to(dtype)
    image_mask = torch.rand(images, patches, generator=generator) > 0.3
    text_mask = torch.rand(texts, words, generator=generator) > 0.4
    image_mask[images // 2] = False
    text_mask[texts // 2] = False
    return image_embeds, text_embeds, image_mask, text_mask


def gradients(path, image_embeds, text_embeds, *arguments):
    leaves = image_embeds.clone().requires_grad_(), text_embeds.clone().requires_grad_()
    scores = path(*leaves, *arguments)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=scores.dtype)
    return torch.autograd.grad(scores, leaves, upstream)


def test_scores_match_hand_computation(path, hand):
    # Image 0 with text 1: similarities [[-1, -0.5], [0, -0.5]]; patches (-0.5 + 0) / 2, words (0 - 0.5) / 2.
    expected = torch.tensor([[1.5, -0.5], [-2.0, 1.75]])
    torch.testing.assert_close(path(*hand), expected, rtol=0, atol=0)


def test_gradient_of_ties_goes_to_the_first_token(path):
    images, texts = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    image_grad, text_grad = torch.autograd.grad(
        path(images.requires_grad_(), texts.requires_grad_(), torch.ones(1, 1) > 0, torch.ones(1, 2) > 0).sum(),
        (images, texts),
    )
    # Both words have their own maximum (half a mean each); the patch's maximum belongs to the first word alone.
    torch.testing.assert_close(text_grad, torch.tensor([[[1.5, 0.0], [0.5, 0.0]]]), rtol=0, atol=0)
    torch.testing.assert_close(image_grad, torch.tensor([[[2.0, 0.0]]]), rtol=0, atol=0)


def test_many_ties_have_the_same_gradient_on_both_paths():
    generator = torch.Generator().manual_seed(0)
    # Small integers are exact in every order of summation, so ties are ties on both paths.
    images = torch.randint(-1, 2, (6, 9, 4), generator=generator).float()
    texts = torch.randint(-1, 2, (5, 8, 4), generator=generator).float()
    _, _, image_mask, text_mask = ragged(6, 5, 9, 8)
    arguments = images, texts, image_mask, text_mask
    for tile_elements in TILES:
        for ours, reference in zip(
            gradients(tiled_pair_scores, *arguments, tile_elements),
            gradients(reference_pair_scores, *arguments),
            strict=True,
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile_elements", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tiled_scores_equal_reference(dtype, tile_elements):
    arguments = ragged(dtype=dtype)
    expected = reference_pair_scores(*arguments)
    scores = tiled_pair_scores(*arguments, tile_elements)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile_elements", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tiled_gradients_equal_reference(dtype, tile_elements):
    arguments = ragged(dtype=dtype)
    # A gradient in half precision is rounded once, after a sum whose order differs.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, reference in zip(
        gradients(tiled_pair_scores, *arguments, tile_elements),
        gradients(reference_pair_scores, *arguments),
        strict=True,
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_training_scores_equal_inference_scores():
    image_embeds, text_embeds, *masks = ragged()
    trained = tiled_pair_scores(image_embeds.clone().requires_grad_(), text_embeds, *masks)
    assert torch.equal(trained.detach(), tiled_pair_scores(image_embeds, text_embeds, *masks))


def test_gradients_pass_numerical_check():
    image_embeds, text_embeds, *masks = ragged(3, 3, 4, 3, 3, dtype=torch.float64)
    leaves = image_embeds.requires_grad_(), text_embeds.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: tiled_pair_scores(*x, *masks, 16), leaves)


@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(side):
    embeds = list(ragged()[:2])
    masks = ragged()[2:]
    both = gradients(tiled_pair_scores, *embeds, *masks)
    embeds[side] = embeds[side].clone().requires_grad_()
    scores = tiled_pair_scores(*embeds, *masks)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    scores.backward(upstream)
    assert torch.equal(embeds[side].grad, both[side])
    assert embeds[1 - side].grad is None


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 5),
    seed=st.integers(0, 2**16),
    tile_elements=st.integers(1, 200),
    data=st.data(),
)
def test_any_mask_equals_reference(sizes, seed, tile_elements, data):
    images, texts, patches, words, dim = sizes
    image_embeds, text_embeds, _, _ = ragged(images, texts, patches, words, dim, seed=seed)
    lengths = st.lists(st.integers(0, patches), min_size=images, max_size=images)
    image_mask = torch.arange(patches) < torch.tensor(data.draw(lengths))[:, None]
    lengths = st.lists(st.integers(0, words), min_size=texts, max_size=texts)
    text_mask = torch.arange(words) < torch.tensor(data.draw(lengths))[:, None]
    arguments = image_embeds, text_embeds, image_mask, text_mask
    expected = reference_pair_scores(*arguments)
    torch.testing.assert_close(
        tiled_pair_scores(*arguments, tile_elements=tile_elements), expected, rtol=1e-5, atol=1e-5
    )


def test_swapping_the_sides_transposes_the_scores():
    image_embeds, text_embeds, image_mask, text_mask = ragged()
    scores = pair_scores(image_embeds, text_embeds, image_mask, text_mask)
    swapped = pair_scores(text_embeds, image_embeds, text_mask, image_mask)
    torch.testing.assert_close(swapped.T, scores)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
def test_padding_has_no_influence(path, content):
    image_embeds, text_embeds, image_mask, text_mask = ragged()
    expected = path(image_embeds, text_embeds, image_mask, text_mask)
    expected_gradients = gradients(path, image_embeds, text_embeds, image_mask, text_mask)
    image_embeds[~image_mask] = content
    text_embeds[~text_mask] = content
    assert torch.equal(path(image_embeds, text_embeds, image_mask, text_mask), expected)
    for changed, unchanged in zip(
        gradients(path, image_embeds, text_embeds, image_mask, text_mask), expected_gradients, strict=True
    ):
        assert torch.equal(changed, unchanged)


def test_samples_without_tokens_score_zero_and_have_no_gradient(path):
    image_embeds, text_embeds, image_mask, text_mask = ragged()
    scores = path(image_embeds, text_embeds, image_mask, text_mask)
    assert (scores[3] == 0).all() and (scores[:, 5] == 0).all()
    assert (scores != 0).sum() == 6 * 10
    image_grad, text_grad = gradients(path, image_embeds, text_embeds, image_mask, text_mask)
    assert (image_grad[~image_mask] == 0).all() and (text_grad[~text_mask] == 0).all()
    assert (image_grad[image_mask] != 0).any() and torch.isfinite(image_grad).all() and torch.isfinite(text_grad).all()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("image_shape", "text_shape"),
    [
        ((0, 3, 4), (5, 2, 4)),
        ((2, 3, 4), (0, 2, 4)),
        ((0, 3, 4), (0, 2, 4)),
        ((2, 0, 4), (5, 2, 4)),
        ((2, 3, 4), (5, 0, 4)),
    ],
)
def test_empty_galleries_and_samples(monkeypatch, backend, image_shape, text_shape):
    monkeypatch.setenv("PICO_SCORES_BACKEND", backend)
    image_embeds, text_embeds = torch.randn(image_shape).requires_grad_(), torch.randn(text_shape).requires_grad_()
    scores = pair_scores(image_embeds, text_embeds)
    assert scores.shape == (image_shape[0], text_shape[0])
    assert (scores == 0).all()
    scores.sum().backward()
    assert (image_embeds.grad == 0).all() and (text_embeds.grad == 0).all()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_non_contiguous_inputs_and_integer_masks(requires_grad):
    image_embeds, text_embeds, image_mask, text_mask = ragged()
    expected = reference_pair_scores(image_embeds, text_embeds, image_mask, text_mask)
    scattered = [
        x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(requires_grad)
        for x in (image_embeds, text_embeds)
    ]
    assert not scattered[0].is_contiguous()
    scores = pair_scores(*scattered, image_mask.long() * 3, text_mask.to(torch.uint8).T.contiguous().T)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    # Without a mask every token counts, and images need no packing.
    torch.testing.assert_close(
        pair_scores(*scattered),
        reference_pair_scores(image_embeds, text_embeds, torch.ones_like(image_mask), torch.ones_like(text_mask)),
        rtol=1e-5,
        atol=1e-5,
    )
    if requires_grad:
        scores.sum().backward()
        assert scattered[0].grad.abs().sum() > 0


def test_mixed_types_are_promoted():
    image_embeds, text_embeds, *masks = ragged()
    scores = pair_scores(image_embeds.half(), text_embeds, *masks)
    torch.testing.assert_close(scores, reference_pair_scores(image_embeds.half().float(), text_embeds, *masks))
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_autocast_does_not_lower_the_precision(monkeypatch, backend):
    monkeypatch.setenv("PICO_SCORES_BACKEND", backend)
    image_embeds, text_embeds, *masks = ragged()
    image_embeds.requires_grad_()
    expected = pair_scores(image_embeds, text_embeds, *masks)
    (expected_grad,) = torch.autograd.grad(expected.sum(), image_embeds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = pair_scores(image_embeds, text_embeds, *masks)
        if backend == "tiled":
            (image_grad,) = torch.autograd.grad(scores.sum(), image_embeds)
            assert torch.equal(image_grad, expected_grad)
    assert torch.equal(scores, expected)


def test_same_inputs_give_the_same_bits():
    arguments = ragged(16, 16, 20, 12, 32)
    first, second = (gradients(tiled_pair_scores, *arguments, 500) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(tiled_pair_scores(*arguments), tiled_pair_scores(*arguments))


def test_long_samples_keep_their_positions():
    # More than 128 words and patches do not fit the smallest position type.
    arguments = ragged(2, 3, 300, 200, 4)
    for ours, reference in zip(
        gradients(tiled_pair_scores, *arguments), gradients(reference_pair_scores, *arguments), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_intermediate_grows_with_the_number_of_pairs():
    arguments = ragged(60, 70, 20, 10, 2)
    with _LargestTensor() as largest:
        tiled_pair_scores(*arguments, tile_elements=2000)
    # The scores themselves and the input are the only tensors above a tile; all similarities are 840,000.
    assert largest.elements <= 60 * 70
    with _LargestTensor() as largest:
        reference_pair_scores(*arguments)
    assert largest.elements == 60 * 70 * 20 * 10


def test_backward_keeps_positions_instead_of_similarities():
    kept = []
    image_embeds, text_embeds, *_ = ragged(10, 12, 20, 8)
    leaves = image_embeds.requires_grad_(), text_embeds.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pair_scores(*leaves)
    positions = [x for x in kept if x.dtype == torch.int8]
    assert sorted(x.shape for x in positions) == [(12, 10 * 20), (12 * 8, 10)]
    assert {x.dtype for x in kept} == {torch.float32, torch.bool, torch.int8}
    assert sum(x.dtype == torch.float32 for x in kept) == 2


def test_environment_chooses_the_backend(monkeypatch):
    called = []
    for name in PATHS:
        monkeypatch.setattr(
            scoring_pico, f"{name}_pair_scores", lambda *x, name=name: called.append(name) or PATHS[name](*x)
        )
    arguments = ragged()
    for value in ("reference", "tiled", "auto"):
        monkeypatch.setenv("PICO_SCORES_BACKEND", value)
        pair_scores(*arguments)
    monkeypatch.delenv("PICO_SCORES_BACKEND")
    pair_scores(*arguments)
    assert called == ["reference", "tiled", "tiled", "tiled"]
    monkeypatch.setenv("PICO_SCORES_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'; allowed are auto, reference, tiled"):
        pair_scores(*arguments)


def test_compiled_call_equals_eager_call(monkeypatch):
    arguments = ragged()
    image_embeds = arguments[0].requires_grad_()
    compiled = torch.compile(pair_scores, fullgraph=True, backend="eager")
    scores = compiled(*arguments)
    torch.testing.assert_close(scores, pair_scores(*arguments), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(scores.sum(), image_embeds)[0].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_traced_call_records_the_reference_and_says_so(monkeypatch, caplog):
    scoring_pico.logger.warning_once.cache_clear()
    monkeypatch.setattr(scoring_pico.logger, "propagate", True)
    arguments = ragged()
    with caplog.at_level(logging.WARNING), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(pair_scores, arguments)
    assert "records its reference path" in caplog.text
    other = ragged(seed=3)
    torch.testing.assert_close(traced(*other), pair_scores(*other), rtol=1e-5, atol=1e-5)


def test_meta_tensors_give_the_shape():
    image_embeds, text_embeds = torch.empty(3, 4, 8, device="meta"), torch.empty(5, 2, 8, device="meta")
    assert pair_scores(image_embeds, text_embeds).shape == (3, 5)


def test_requested_backend_that_cannot_serve_raises(monkeypatch):
    monkeypatch.setenv("PICO_SCORES_BACKEND", "tiled")
    with pytest.raises(ScoresBackendError, match="PICO_SCORES_BACKEND=tiled cannot serve"):
        pair_scores(torch.empty(3, 4, 8, device="meta"), torch.empty(5, 2, 8, device="meta"))


def maxsim(queries, documents, query_mask, document_mask, backward):
    """What late-interaction-kernels computes: for each token of a query its best one of a document, added up."""
    similarity = torch.einsum("qid,njd->qnij", queries, documents)
    best = similarity.masked_fill(~document_mask[None, :, None], -torch.inf).amax(dim=3)
    return best.masked_fill(~query_mask[:, None] | best.isinf(), 0).sum(dim=2)


def test_late_interaction_adds_up_both_directions(monkeypatch):
    monkeypatch.setitem(sys.modules, "late_interaction_kernels", SimpleNamespace(maxsim=maxsim))
    arguments = ragged()
    arguments[0][~arguments[2]] = torch.nan
    ours, expected = scoring_pico.late_interaction_pair_scores(*arguments), reference_pair_scores(*arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gained = [
        gradients(path, *arguments) for path in (scoring_pico.late_interaction_pair_scores, reference_pair_scores)
    ]
    for value, target in zip(*gained, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-5, atol=1e-5)


def test_late_interaction_is_chosen_only_when_asked_for(monkeypatch):
    class OnCuda(torch.Tensor):
        device = torch.device("cuda:0")

    embeds = torch.zeros(2, 3, 4).as_subclass(OnCuda)
    monkeypatch.setitem(sys.modules, "late_interaction_kernels", SimpleNamespace(__spec__=object()))
    assert scoring_pico._path(embeds) is tiled_pair_scores
    monkeypatch.setenv("PICO_SCORES_BACKEND", "late_interaction")
    assert scoring_pico._path(embeds) is scoring_pico.late_interaction_pair_scores
    with pytest.raises(ScoresBackendError, match="needs tensors on a CUDA device .they are on cpu.*kernels"):
        pair_scores(*ragged())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(7, 11, 9, 6, 16), (5, 150, 197, 32, 512), (3, 70, 70, 77, 48), (2, 3, 20, 100, 10)]
)
def test_late_interaction_equals_reference_on_cuda(sizes, dtype):
    pytest.importorskip("late_interaction_kernels")
    arguments = tuple(values.cuda() for values in ragged(*sizes, dtype=dtype))
    exact = (arguments[0].double(), arguments[1].double(), *arguments[2:])
    path = scoring_pico.late_interaction_pair_scores
    torch.testing.assert_close(path(*arguments), reference_pair_scores(*exact).float(), rtol=1e-2, atol=2e-2)
    upstream = torch.randn(sizes[:2], generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for compute, values in ((path, arguments), (reference_pair_scores, exact)):
        leaves = [x.clone().requires_grad_() for x in values[:2]]
        results.append(torch.autograd.grad(compute(*leaves, *values[2:]), leaves, upstream))
    for ours, target in zip(*results, strict=True):
        # Where two maxima nearly tie, rounding decides which one has the gradient.
        assert (ours.double() - target).norm() <= 5e-2 * target.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_embeds": torch.zeros(2, 4)}, r"image_embeds has shape \(2, 4\); expected \(images, patches, dim\)"),
        ({"text_embeds": torch.zeros(3, 2, 4, 1)}, r"text_embeds has shape .* expected \(texts, words, dim\)"),
        ({"text_embeds": torch.zeros(3, 2, 5)}, "image_embeds has dim 4 and text_embeds has dim 5"),
        ({"image_mask": torch.ones(2, 4) > 0}, r"image_mask has shape \(2, 4\); .* needs \(2, 3\)"),
        ({"text_mask": torch.ones(3) > 0}, r"text_mask has shape \(3,\); .* needs \(3, 2\)"),
        ({"text_mask": torch.ones(3, 2)}, "text_mask has type torch.float32; expected a boolean or integer"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"image_embeds": torch.zeros(2, 3, 4), "text_embeds": torch.zeros(3, 2, 4)} | change
    with pytest.raises(ValueError, match=message):
        pair_scores(**arguments)
