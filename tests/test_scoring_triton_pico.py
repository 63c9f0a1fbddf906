"""The Triton kernels of the pair score against the reference, on the CPU by Triton's interpreter, and their dispatch.

Triton decides at its import whether to interpret, so the tests named `test_interpreted_*` run in a process of their
own, which `test_kernels_in_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from test_scoring_pico import gradients, ragged

from modeling_pico.model import scoring_pico, scoring_triton_pico
from modeling_pico.model.scoring_pico import ScoresBackendError, pair_scores, reference_pair_scores
from modeling_pico.model.scoring_triton_pico import refusal, triton_pair_scores


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")


@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-k", "test_interpreted", "-p", "no:cacheprovider", "-m", ""]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout, result.stdout


def assert_equals_reference(arguments, tolerance=1e-5, grad_tolerance=1e-5):
    """Compares the scores of the kernels, with and without positions, and the gradients."""
    expected = reference_pair_scores(*arguments)
    scores = triton_pair_scores(*arguments)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)
    ours, reference = gradients(triton_pair_scores, *arguments), gradients(reference_pair_scores, *arguments)
    for value, target in zip(ours, reference, strict=True):
        assert value.dtype == target.dtype
        torch.testing.assert_close(value, target, rtol=grad_tolerance, atol=grad_tolerance)


@interpreted
def test_interpreted_scores_match_hand_computation():
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [9.0, 9.0]]])
    texts = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[-1.0, 0.0], [-0.5, -0.5]]])
    masks = torch.tensor([[True, True], [True, False]]), torch.tensor([[True, False], [True, True]])
    # Image 0 with text 1: similarities [[-1, -0.5], [0, -0.5]]; patches (-0.5 + 0) / 2, words (0 - 0.5) / 2.
    expected = torch.tensor([[1.5, -0.5], [-2.0, 1.75]])
    torch.testing.assert_close(triton_pair_scores(images, texts, *masks), expected, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [
        (7, 11, 9, 6, 16),
        (3, 5, 9, 6, 48),
        (3, 5, 9, 6, 10),  # not a multiple of what a matrix product takes
        (2, 3, 5, 4, 512),
        (2, 70, 5, 3, 16),  # two groups of captions
        (1, 2, 4, 100, 16),  # positions from 64 on
        (2, 3, 1, 1, 1),
    ],
)
def test_interpreted_equals_reference(sizes):
    assert_equals_reference(ragged(*sizes))


@interpreted
@pytest.mark.parametrize(("dtype", "grad_tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_interpreted_half_precision_accumulates_in_float32(dtype, grad_tolerance):
    assert_equals_reference(ragged(3, 5, 9, 6, 16, dtype=dtype), grad_tolerance=grad_tolerance)


@interpreted
def test_interpreted_small_gradients_do_not_vanish_in_float16():
    image_embeds, text_embeds, *masks = ragged(3, 5, 9, 6, 16, dtype=torch.float16)
    image_embeds.requires_grad_()
    scores = triton_pair_scores(image_embeds, text_embeds * 100, *masks)
    # Each weight of 1e-6 / 9 is hardly above the smallest number of float16; the sum of products is well above.
    (ours,) = torch.autograd.grad(scores, image_embeds, torch.full_like(scores, 1e-6))
    scores = reference_pair_scores(image_embeds, text_embeds * 100, *masks)
    (reference,) = torch.autograd.grad(scores, image_embeds, torch.full_like(scores, 1e-6))
    assert (reference != 0).any()
    torch.testing.assert_close(ours, reference, rtol=2e-3, atol=2e-7)


@interpreted
def test_interpreted_gradient_of_ties_goes_to_the_first_token():
    generator = torch.Generator().manual_seed(0)
    # Small integers are exact in every order of summation, so ties are ties on both paths.
    images = torch.randint(-1, 2, (6, 135, 4), generator=generator).float()
    texts = torch.randint(-1, 2, (5, 8, 4), generator=generator).float()
    # In blocks of 64 and at the end 16: 16, 64, 64 + 16, 2 * 64, 2 * 64, and 2 * 64 + 16.
    image_mask = torch.arange(135) < torch.tensor([5, 64, 70, 90, 128, 135])[:, None]
    assert_equals_reference((images, texts, image_mask, ragged(texts=5, words=8)[3]), grad_tolerance=1e-6)


@interpreted
def test_interpreted_padding_and_empty_samples_have_no_influence():
    image_embeds, text_embeds, image_mask, text_mask = ragged(3, 5, 9, 6, 16)
    arguments = image_embeds.clone(), text_embeds.clone(), image_mask, text_mask
    arguments[0][~image_mask] = float("nan")
    arguments[1][~text_mask] = float("inf")
    scores = triton_pair_scores(*arguments)
    assert torch.equal(scores, triton_pair_scores(image_embeds, text_embeds, image_mask, text_mask))
    assert (scores[1] == 0).all() and (scores[:, 2] == 0).all() and (scores != 0).sum() == 2 * 4
    # An upstream gradient of NaN at an empty pair ends there.
    leaves = [values.requires_grad_() for values in arguments[:2]]
    upstream = torch.ones_like(scores)
    upstream[1], upstream[:, 2] = float("nan"), float("nan")
    for grad, mask in zip(
        torch.autograd.grad(triton_pair_scores(*arguments), leaves, upstream), arguments[2:], strict=True
    ):
        assert torch.isfinite(grad).all() and (grad[~mask] == 0).all() and (grad[mask] != 0).any()


@interpreted
@pytest.mark.parametrize("side", [0, 1])
def test_interpreted_nan_in_a_real_token_reaches_the_score(side):
    arguments = ragged(3, 5, 9, 6, 16)
    sample, token = arguments[2 + side].nonzero()[0].tolist()
    arguments[side][sample, token, 0] = float("nan")
    nan = triton_pair_scores(*arguments).isnan()
    assert torch.equal(nan, reference_pair_scores(*arguments).isnan()) and nan.any()


@interpreted
@pytest.mark.parametrize("shapes", [((0, 3, 4), (5, 2, 4)), ((2, 0, 4), (5, 2, 4)), ((2, 3, 4), (5, 0, 4))])
def test_interpreted_empty_galleries(monkeypatch, shapes):
    monkeypatch.setenv("PICO_SCORES_BACKEND", "triton")
    image_embeds, text_embeds = (torch.randn(shape).requires_grad_() for shape in shapes)
    scores = pair_scores(image_embeds, text_embeds)
    assert scores.shape == (shapes[0][0], shapes[1][0]) and (scores == 0).all()
    scores.sum().backward()
    assert (image_embeds.grad == 0).all() and (text_embeds.grad == 0).all()


@interpreted
@pytest.mark.parametrize("side", [0, 1])
def test_interpreted_gradient_of_one_side_alone(monkeypatch, side):
    monkeypatch.setenv("PICO_SCORES_BACKEND", "triton")
    arguments = list(ragged(3, 5, 9, 6, 16))
    both = gradients(triton_pair_scores, *arguments)
    # Not contiguous, and masks of integers.
    arguments[:2] = [values.transpose(0, 2).contiguous().transpose(0, 2) for values in arguments[:2]]
    arguments[side].requires_grad_()
    scores = pair_scores(*arguments[:2], *(mask.long() * 3 for mask in arguments[2:]))
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    scores.backward(upstream)
    assert torch.equal(arguments[side].grad, both[side]) and arguments[1 - side].grad is None


@interpreted
def test_interpreted_mixed_types_are_promoted():
    image_embeds, text_embeds, *masks = ragged(3, 5, 9, 6, 16)
    arguments = image_embeds.half(), text_embeds.bfloat16(), *masks
    assert_equals_reference(arguments, grad_tolerance=2e-2)


@interpreted
def test_interpreted_calls_that_the_kernels_do_not_serve(monkeypatch):
    embeds = torch.zeros(2, 3, 4), torch.zeros(2, 129, 4)
    assert refusal(*embeds) == "texts have 129 words, padding included; the kernels hold at most 128"
    assert refusal(embeds[0].double(), embeds[0]).startswith("the type is torch.float64")
    assert refusal(embeds[0], embeds[0]) is None
    monkeypatch.setenv("PICO_SCORES_BACKEND", "triton")
    with pytest.raises(ScoresBackendError, match="cannot serve this call: texts have 129 words"):
        pair_scores(*embeds)


def test_triton_on_cpu_is_refused_with_a_reason(monkeypatch):
    if INTERPRETED:
        pytest.skip("the interpreter serves the CPU")
    monkeypatch.setenv("PICO_SCORES_BACKEND", "triton")
    reason = "the device is cpu .*TRITON_INTERPRET=1" if HAS_TRITON else "triton is not installed"
    with pytest.raises(ScoresBackendError, match=f"PICO_SCORES_BACKEND=triton cannot serve this call: .*{reason}"):
        pair_scores(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4))


def test_triton_cannot_be_recorded(monkeypatch):
    monkeypatch.setenv("PICO_SCORES_BACKEND", "triton")
    with pytest.raises(ScoresBackendError, match="PICO_SCORES_BACKEND=triton cannot serve a compiled or traced call"):
        pair_scores(torch.empty(3, 4, 8, device="meta"), torch.empty(5, 2, 8, device="meta"))


def test_auto_never_asks_for_triton_on_cpu(monkeypatch):
    monkeypatch.setattr(scoring_triton_pico, "refusal", lambda *_: pytest.fail("asked"))
    assert scoring_pico._backend(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4)) == "tiled"


class OnCuda(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    device = torch.device("cuda:0")


@pytest.mark.parametrize(("reason", "backend"), [(None, "triton"), ("too old", "tiled")])
def test_auto_on_cuda_prefers_triton_and_warns_otherwise(monkeypatch, caplog, reason, backend):
    scoring_pico.logger.warning_once.cache_clear()
    monkeypatch.setattr(scoring_pico.logger, "propagate", True)
    monkeypatch.setattr(scoring_triton_pico, "refusal", lambda *_: reason)
    embeds = torch.zeros(2, 3, 4).as_subclass(OnCuda)
    with caplog.at_level(logging.WARNING):
        assert [scoring_pico._backend(embeds, embeds) for _ in range(2)] == [backend] * 2
    assert [record.getMessage() for record in caplog.records] == (
        []
        if reason is None
        else ["pair_scores takes its tiled path on a CUDA device instead of the faster Triton kernels: too old"]
    )


def test_errors_of_the_kernels_are_not_swallowed(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(scoring_triton_pico, "refusal", lambda *_: None)
    monkeypatch.setattr(scoring_triton_pico, "triton_pair_scores", broken)
    monkeypatch.setenv("PICO_SCORES_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="out of resource"):
        pair_scores(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4))


def test_package_neither_needs_nor_loads_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from modeling_pico import scoring_pico\n"
        "assert 'modeling_pico.model.scoring_triton_pico' not in sys.modules\n"
        "from modeling_pico.model.scoring_triton_pico import refusal\n"
        "assert refusal(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)) == 'the package triton is not installed'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hub_upload_takes_the_kernels_along_without_requiring_triton():
    dynamic_module_utils = pytest.importorskip("transformers.dynamic_module_utils")
    assert scoring_triton_pico.__file__ in dynamic_module_utils.get_relative_import_files(scoring_pico.__file__)
    assert "triton" not in dynamic_module_utils.get_imports(scoring_triton_pico.__file__)


POINTERS = {"counts": "*i32", "rows": "*i64", "patch_at": "*i8", "word_at": "*i16", "scores": "*fp32", "grad": "*fp32"}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs triton and no interpreter")
@pytest.mark.parametrize(
    ("capability", "dtype", "one"), [(90, "bf16", False), (90, "bf16", True), (80, "fp32", False)]
)
@pytest.mark.parametrize("name", ["score", "image_grad", "text_grad"])
def test_kernels_compile_without_a_device(monkeypatch, tmp_path, name, dtype, capability, one):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(scoring_triton_pico, f"_{name}_kernel")
    constants = {"DIM": 512, "WORDS": 32, "ROWS": 64, "BLOCK_P": 64, "TAIL": 16, "BLOCK_D": 64, "TRAIN": True}
    constants |= {"PRECISION": "ieee" if name == "score" or dtype == "fp32" else "tf32", "UPCAST": False}
    if one:  # what a launch does with integers that are 1
        constants |= {"images": 1, "texts": 1, "patches": 1, "words": 1}
    signature = {}
    for argument in kernel.arg_names:
        ends = [kind for end, kind in POINTERS.items() if argument.endswith(end)]
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("embeds") or argument in ("image_grad", "text_grad"):
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = ends[0] if ends else "i32"
    constants = {(kernel.arg_names.index(key),): value for key, value in constants.items() if key in kernel.arg_names}
    compiled = compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32))
    assert "cubin" in compiled.asm
    assert compiled.metadata.shared <= 99 * 1024  # what every device since capability 8.0 can give


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(7, 11, 9, 6, 16), (5, 150, 197, 32, 512), (3, 70, 70, 77, 48), (2, 3, 20, 100, 10)]
)
def test_kernels_equal_reference_on_cuda(sizes, dtype):
    arguments = tuple(values.cuda() for values in ragged(*sizes, dtype=dtype))
    assert scoring_pico._backend(*arguments[:2]) == "triton"
    # The reference in float64 decides: its own maxima cannot tip by rounding, but ours can where two nearly tie.
    exact = (arguments[0].double(), arguments[1].double(), *arguments[2:])
    torch.testing.assert_close(
        triton_pair_scores(*arguments), reference_pair_scores(*exact).float(), rtol=1e-4, atol=1e-3
    )
    upstream = torch.randn(sizes[:2], generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for path, values in (
        (triton_pair_scores, arguments),
        (triton_pair_scores, arguments),
        (reference_pair_scores, exact),
    ):
        leaves = [x.clone().requires_grad_() for x in values[:2]]
        results.append(torch.autograd.grad(path(*leaves, *values[2:]), leaves, upstream))
    for ours, again, target in zip(*results, strict=True):
        assert torch.equal(ours, again)
        assert (ours.double() - target).norm() <= 1e-2 * target.norm()
