"""No NaN and no infinity from degenerate images, captions, columns and validation sets, nor at the ends of a type."""

from __future__ import annotations

import io
import math
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from modeling_pico import CddsConfig, CddsModel, RetrievalEvaluator, image_text_loss, pair_scores
from modeling_pico.data import CaptionedImageDataset
from modeling_pico.model.alignment_heads_pico import HEADS, MIN_NORM
from modeling_pico.training.construction import feedback_weight


HEADS = tuple(HEADS)
FORMS = ("purity", "style_rates")


def gradients_are_finite(model: torch.nn.Module) -> bool:
    return all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def constant_images(count: int, caption: str = "red") -> CaptionedImageDataset:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (7, 7, 7)).save(file, "PNG")
    table = {
        "image": [{"bytes": file.getvalue(), "path": None}] * count,
        "captions": [[caption]] * count,
        "image_id": [str(row) for row in range(count)],
    }
    features = datasets.Features(
        image=datasets.Image(decode=False),
        captions=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("string"),
    )
    return CaptionedImageDataset(datasets.Dataset.from_dict(table, features=features))


@pytest.fixture
def tiny_trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("training")))
    # It stays imported: classes of a second copy could not be pickled for workers of other tests.
    return __import__("tiny").trainer


@pytest.mark.parametrize(
    ("pairs", "options"),
    [
        # More prototypes than columns differ.
        *((2, {"style_probability": form, "num_style_prototypes": 40}) for form in FORMS),
        (1, {"style_probability": "purity", "column_mode": "quantile", "column_length": 5}),
        (1, {"vision_special_tokens": False}),
        (1, {"style_probability": "purity", "loss_type": "hinge"}),
        *((2, {"method": head}) for head in HEADS if head != "pico"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_constant_images_equal_captions_and_tiny_validation_sets_train(tiny_trainer, tmp_path, options, pairs):
    made = tiny_trainer(
        tmp_path,
        data=constant_images(20),
        eval_data=constant_images(pairs),
        model_options=options,
        num_train_epochs=4,
        logging_steps=1,
        save_strategy="no",
    )
    made.train()
    for name, tensor in made.model.state_dict().items():
        assert tensor.isfinite().all(), name
    numbers = [
        (name, value) for entry in made.state.log_history for name, value in entry.items() if isinstance(value, float)
    ]
    assert len(numbers) > 30
    assert [name for name, value in numbers if not math.isfinite(value)] == []
    # One pair is found perfectly; of two that cannot be told apart neither is first.
    assert made.state.log_history[-2]["eval_rsum"] == (600.0 if pairs == 1 else 400.0)
    # Without anything to learn from, nothing should be shaken either.
    assert max(value for name, value in numbers if name == "grad_norm") < 0.01


@pytest.mark.parametrize("styles", [["ink", "oil"], ["ink", "oil", "ink"]])
def test_a_report_by_style_of_images_that_cannot_be_told_apart_is_finite(tiny_trainer, tmp_path, styles):
    made = tiny_trainer(tmp_path, data=constant_images(20), eval_data=constant_images(len(styles)))
    made.eval_dataset.styles = styles
    metrics = made.measure_styles(made.eval_dataset, ["ink"]).metrics()
    assert metrics["style_ink_rsum"] == 600.0 - 200.0 * (styles.count("ink") > 1)  # among images of its style
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["fine_grained", "instance_norm"])
def test_tokens_of_zeros_and_constant_samples_have_finite_gradients(tiny_model, head, dtype):
    head = tiny_model(method=head).alignment_head.to(dtype)
    for states in (torch.zeros(2, 3, 24), torch.full((2, 3, 24), 0.3), torch.randn(2, 1, 24)):
        states = states.to(dtype).requires_grad_()
        tokens, _, _ = head.embed(states, torch.ones(states.shape[:2], dtype=torch.bool), None, "text")
        # A gradient for each token that is no longer than one, and not the same for all.
        weights = torch.arange(1.0, tokens.shape[1] + 1) / tokens.shape[1]
        (tokens * weights[:, None] / tokens.shape[2] ** 0.5).sum().backward()
        assert tokens.isfinite().all() and states.grad.isfinite().all()
        # The eighth of the largest number of float16.
        assert states.grad.abs().max() < 2**13


def test_a_vector_above_the_smallest_length_is_normalised_as_ever(tiny_model):
    head = tiny_model(method="fine_grained").alignment_head
    states = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0))
    length = head.text_projection(states).norm()
    above, below = (
        head.project(states * factor / length, "text").norm().item() for factor in (1.01 * MIN_NORM, 0.5 * MIN_NORM)
    )
    assert above == pytest.approx(1) and below == pytest.approx(0.5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("special", [True, False])
def test_samples_without_a_token_train(tiny_model, use_prototypes, batch, head, special):
    model = tiny_model(method=head, text_special_tokens=special).train()
    if head == "pico":
        use_prototypes(model)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    mask[0] = 0  # no token at all
    ids[1, 2:], mask[1, 2:] = 0, 0
    ids[1, 1] = 3  # only [CLS] and [SEP]
    outputs = model(**{**batch, "input_ids": ids, "attention_mask": mask}, return_loss=True)
    outputs.loss.backward()
    assert outputs.text_mask.any(dim=1).tolist() == [False, special, True]
    assert outputs.loss.isfinite() and gradients_are_finite(model)
    assert outputs.logits_per_image.isfinite().all() and outputs.text_embeds.isfinite().all()
    assert not outputs.logits_per_image[:, 0].any()


@pytest.mark.parametrize("case", ["one word", "columns apart", "zeros", "alike"])
def test_the_losses_of_decoupling_have_finite_gradients(tiny_config, batch, case):
    parts = tiny_config()
    config = CddsConfig(
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        embedding_dim=12,
        unet_num_layers=1,
        text_special_tokens=case != "one word",
    )
    model = CddsModel(config).train()
    head = model.alignment_head
    inputs = {name: value.clone() for name, value in batch.items()}
    if case == "one word":
        inputs["attention_mask"][:, 3:] = 0
        inputs["input_ids"][:, 2] = 3
    elif case == "columns apart":
        # The last layer of the texts moves one column by 30.
        with torch.no_grad():
            head.text_unet.semantic_decoder.projections[-1].bias[0] = 30.0
    elif case == "zeros":
        with torch.no_grad():
            for unet in (head.image_unet, head.text_unet):
                unet.semantic_decoder.projections[-1].weight.zero_()
    else:
        inputs["pixel_values"][:] = 0.3
    outputs = model(**inputs, return_loss=True)
    (65536 * outputs.loss).backward()  # as a gradient scaler starts
    assert outputs.loss.isfinite() and gradients_are_finite(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_trains_with_finite_numbers(tiny_model, use_prototypes, batch, form, dtype, autocast):
    model = use_prototypes(tiny_model(style_probability=form)).train()
    model = model if autocast else model.to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    pixels = batch["pixel_values"] if autocast else batch["pixel_values"].to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        outputs = model(**{**batch, "pixel_values": pixels}, return_loss=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and gradients_are_finite(model)
    assert outputs.image_semantic_probability.isfinite().all()


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.float16, 6e-8), (torch.bfloat16, 1e17)])
@pytest.mark.parametrize("loss_type", ["infonce", "hinge"])
def test_scores_and_losses_at_the_ends_of_half_precision(dtype, value, loss_type):
    generator = torch.Generator().manual_seed(0)
    images, texts = ((torch.randn(4, 3, 8, generator=generator).sign() * value).to(dtype) for _ in range(2))
    images, texts = images.requires_grad_(), texts.requires_grad_()
    scores = pair_scores(images, texts)
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    # 8 equal products, twice over, bound the score.
    assert scores.abs().max() <= 2 * 8 * float(torch.tensor(value, dtype=dtype)) ** 2
    scale = 100.0 if loss_type == "infonce" else None
    loss = image_text_loss(scores, scores.T, loss_type=loss_type, logit_scale=scale)
    # The gradient of a token is up to 100 times the other side's: more than the type holds, if it is not scaled.
    gradients = torch.autograd.grad(loss / (100 * value), (images, texts))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_a_score_that_is_not_finite_never_becomes_a_recall(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        model.alignment_head.text_projection.weight.fill_(math.nan)
    samples = {**batch, "image_ids": torch.arange(3), "text_ids": torch.arange(3)}
    with pytest.raises(ValueError, match="9 values that are NaN or infinite"):
        RetrievalEvaluator()(model, [samples])


def test_gains_from_no_recall_to_all_and_back_leave_weights_between_0_and_1():
    log_sum = -math.inf
    for gain in (0.0, 600.0, -600.0, 0.0, 600.0):
        for kappa in (1.0, 1e-3):
            weight, total = feedback_weight(log_sum, gain, kappa)
            assert 0 <= weight <= 1 and math.isfinite(total)
        log_sum = total
