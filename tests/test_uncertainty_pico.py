"""Uncertainty by prototypes: its equations by hand, and what it does beside every head."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import normalize

from modeling_pico import CddsModel, PicoConfig, PicoModel
from modeling_pico.model.configuration_pico import UncertaintyConfig
from modeling_pico.model.uncertainty_pico import (
    UncertaintyPrototypes,
    diversity_loss,
    prototype_uncertainty,
    uncertainty_loss,
)


# Equations


def test_uncertainty_by_hand():
    # tau = 2: evidence 2, 4 and 6, so alpha = 3 + 5 + 7 = 15 and u = 1 - 3 / 15; then evidence 1 throughout.
    logits = 2 * torch.tensor([[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]]).log()
    torch.testing.assert_close(prototype_uncertainty(logits, 2.0), torch.tensor([0.8, 0.5]))


def test_more_evidence_is_more_uncertain_unlike_the_vacuity():
    logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [5.0, 5.0]])
    vacuity = 2 / (torch.exp(logits / 5) + 1).sum(dim=1)
    torch.testing.assert_close(prototype_uncertainty(logits), 1 - vacuity)
    assert prototype_uncertainty(logits).tolist() == sorted(prototype_uncertainty(logits).tolist())


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4]], requires_grad=True)
    uncertainty = prototype_uncertainty(logits, 0.1)
    assert uncertainty.tolist() == [1.0, 0.0]
    uncertainty.sum().backward()
    assert logits.grad.isfinite().all()


def test_uncertainty_loss_by_hand():
    # Closeness (1 + cos) / 2 to the columns that do not match: (0.5 + 1) / 2 = 0.75 and 0.25. Their mean is rescaled
    # to that of u: 0.4 / 0.5 = 0.8, so the targets are 0.6 and 0.2 against u = 0.5 and 0.3.
    similarity = torch.tensor([[0.9, 0.0, 1.0], [-0.5, 0.9, 0.9]])
    matching = torch.tensor([[True, False, False], [False, True, True]])
    loss = uncertainty_loss(torch.tensor([0.5, 0.3]), similarity, matching)
    assert float(loss) == pytest.approx((0.1**2 + 0.1**2) / 2)


def test_a_row_without_negatives_does_not_count():
    similarity = torch.tensor([[0.9, 0.0, 1.0], [-0.5, 0.9, 0.9], [0.3, 0.4, 0.5]])
    matching = torch.tensor([[True, False, False], [False, True, True], [True, True, True]])
    uncertainty = torch.tensor([0.5, 0.3, 0.9], requires_grad=True)
    loss = uncertainty_loss(uncertainty, similarity, matching)
    assert loss.item() == pytest.approx(0.01)
    loss.backward()
    assert uncertainty.grad[2] == 0
    alone = uncertainty_loss(uncertainty, similarity, torch.ones_like(matching))
    assert alone.item() == 0 and alone.requires_grad


def test_cosines_around_zero_do_not_let_the_target_explode():
    """As printed the mean cosine is rescaled: here it is 0.002 on average, and targets are some hundred times u."""
    cosines = torch.tensor([[0.0, 0.4], [-0.396, 0.0]])
    uncertainty, matching = torch.tensor([0.5, 0.5]), torch.eye(2, dtype=torch.bool)
    density = torch.tensor([0.4, -0.396])
    printed = ((uncertainty - uncertainty.mean() / density.mean() * density) ** 2).mean()
    assert printed > 1e3
    # Targets 0.5 / 0.501 * (0.7, 0.302).
    expected = ((0.5 - 0.5 / 0.501 * 0.7) ** 2 + (0.5 - 0.5 / 0.501 * 0.302) ** 2) / 2
    assert float(uncertainty_loss(uncertainty, cosines, matching)) == pytest.approx(expected, rel=1e-4)


def test_diversity_loss_by_hand():
    # One pair of cosine 0.6 among three prototypes: twice (10 * 0.6)^2 among nine.
    prototypes = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    assert float(diversity_loss(prototypes, 10.0)) == pytest.approx(2 * 36 / 9)
    assert float(diversity_loss(torch.eye(3), 10.0)) == 0


def configuration(**options) -> PicoConfig:
    return PicoConfig(uncertainty_config={"num_prototypes": 2, **options})


@torch.no_grad()
def prototypes_by_hand(**options) -> UncertaintyPrototypes:
    """Image prototypes at 0 and 90 degrees, text prototypes at 0 and 60; not of unit length."""
    made = UncertaintyPrototypes(UncertaintyConfig(num_prototypes=2, temperature=2.0, **options), 2)
    made.image.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    made.text.copy_(torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5]]))
    return made


def test_a_modality_is_compared_with_the_prototypes_of_the_other():
    made, sample, scale = prototypes_by_hand(), torch.tensor([[1.0, 0.0]]), 4.0
    # Cosines 1 and 1/2 with the text prototypes, 1 and 0 with the image prototypes; logits 4 / 2 as large.
    for modality, evidence in (("image", math.exp(2) + math.exp(1)), ("text", math.exp(2) + 1)):
        assert made(sample, scale, modality).item() == pytest.approx(1 - 2 / (2 + evidence))


def test_loss_of_pairs_by_hand():
    made = prototypes_by_hand(weight=10.0, diversity_weight=0.5)
    images, texts, scale = torch.eye(2), normalize(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), torch.tensor(4.0)
    of_images, of_texts = made(images, scale, "image"), made(texts, scale, "text")
    half = 0.5**0.5
    # Off the diagonal: image 1 with text 2, cosine 0; image 2 with text 1, cosine 1 / sqrt 2.
    closeness = torch.tensor([0.5, (1 + half) / 2])
    fit = 0.0
    for uncertainty, target in ((of_images, closeness), (of_texts, closeness.flip(0))):
        fit += ((uncertainty - target * uncertainty.mean() / target.mean()) ** 2).mean()
    diversity = 2 * (4 * 0.5) ** 2 / 4
    losses = made.losses(images, texts, scale)
    torch.testing.assert_close(losses["uncertainty"], 10 * fit / 2)
    torch.testing.assert_close(losses["uncertainty_diversity"], torch.tensor(0.5 * diversity))
    # Of equal identity, pairs have no negatives.
    assert made.losses(images, texts, scale, torch.tensor([7, 7]))["uncertainty"].item() == 0


# Beside a model


def without(model: PicoModel) -> PicoModel:
    """The same model without its uncertainty."""
    plain = copy.deepcopy(model)
    plain.uncertainty_prototypes = None
    return plain


def pau_model(tiny_model, **options) -> PicoModel:
    return tiny_model(uncertainty_config={"num_prototypes": 4}, **options)


@pytest.mark.parametrize("head", PicoModel.head_classes)
def test_features_and_forward_agree_and_scores_do_not_change(tiny_model, batch, head):
    model = pau_model(tiny_model, method=head)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**batch)
        of_images = model.get_image_features(batch["pixel_values"])
        of_texts = model.get_text_features(**texts)
        plain = without(model)(**batch)
        one_side = model(pixel_values=batch["pixel_values"])
    assert output.image_uncertainty.shape == output.text_uncertainty.shape == (3,)
    assert torch.equal(of_images.uncertainty, output.image_uncertainty)
    assert torch.equal(one_side.image_uncertainty, output.image_uncertainty)
    torch.testing.assert_close(of_texts.uncertainty, output.text_uncertainty)
    assert output.image_uncertainty.unique().numel() == 3
    assert plain.image_uncertainty is None and plain.text_uncertainty is None and plain.auxiliary_loss is None
    torch.testing.assert_close(output.logits_per_image, plain.logits_per_image, rtol=0, atol=0)
    # What stands in the output is the equation.
    pooled = model.alignment_head.pool(output.image_tokens, output.image_mask, None, "image")
    cosines = pooled @ normalize(model.uncertainty_prototypes.text, dim=-1).T
    expected = 1 - 4 / ((model.logit_scale.exp() * cosines / 5).exp() + 1).sum(dim=1)
    torch.testing.assert_close(output.image_uncertainty, expected.detach())


def test_without_it_a_model_has_no_parameters_for_it(tiny_model):
    assert tiny_model().uncertainty_prototypes is None
    assert not [name for name in tiny_model().state_dict() if "uncertainty" in name]


@pytest.mark.parametrize("loss_type", ["infonce", "hinge"])
@pytest.mark.parametrize("head", PicoModel.head_classes)
def test_gradients_reach_every_parameter(tiny_model, batch, head, loss_type):
    model = pau_model(tiny_model, method=head, loss_type=loss_type).train()
    output = model(**batch, return_loss=True)
    output.auxiliary_loss.backward(retain_graph=True)
    for name in ("image", "text"):
        assert getattr(model.uncertainty_prototypes, name).grad.abs().sum(dim=1).min() > 0
    assert model.alignment_head.visual_projection.weight.grad.abs().sum() > 0
    assert model.text_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    # The temperature is no means to lower this loss.
    assert model.logit_scale.grad is None
    model.zero_grad()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_gradient_can_be_kept_from_the_embeddings(tiny_model, batch):
    model = tiny_model(uncertainty_config={"num_prototypes": 4, "gradient": False}).train()
    model(**batch).auxiliary_loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"uncertainty_prototypes.image", "uncertainty_prototypes.text"}


def test_the_loss_has_it_added_and_knows_equal_meanings(tiny_model, batch):
    model = pau_model(tiny_model)
    plain = without(model)
    for ids in (None, torch.tensor([0, 1, 0])):
        output = model(**batch, image_ids=ids, return_loss=True)
        alone = plain(**batch, image_ids=ids, return_loss=True).loss
        torch.testing.assert_close(output.loss, alone + output.auxiliary_loss)
    assert not torch.equal(model(**batch, return_loss=True).auxiliary_loss, output.auxiliary_loss)
    assert model(**batch).auxiliary_loss is None  # neither training nor asked for


def test_uncertainty_does_not_depend_on_style_prototypes(tiny_model, use_prototypes, batch):
    model = pau_model(tiny_model)
    with torch.no_grad():
        before = model(**batch)
        after = use_prototypes(model)(**batch)
    assert not torch.equal(before.image_embeds, after.image_embeds)
    assert torch.equal(before.image_uncertainty, after.image_uncertainty)


# Saving and loading


def test_saved_and_loaded(tiny_model, batch, tmp_path):
    model = pau_model(tiny_model)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = PicoModel.from_pretrained(tmp_path, dtype=dtype)
        for name in ("image", "text"):
            saved, other = getattr(model.uncertainty_prototypes, name), getattr(loaded.uncertainty_prototypes, name)
            assert torch.equal(saved, other) and other.dtype == torch.float32
        assert loaded.eval()(**batch).text_uncertainty.dtype == torch.float32
    loaded = PicoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).text_uncertainty, model(**batch).text_uncertainty)


def test_a_trained_model_can_be_given_prototypes(tiny_model, batch, tmp_path):
    plain = tiny_model()
    plain.save_pretrained(tmp_path)
    model, info = PicoModel.from_pretrained(
        tmp_path, uncertainty_config={"num_prototypes": 5}, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"uncertainty_prototypes.image", "uncertainty_prototypes.text"}
    # Xavier: uniform within sqrt(6 / (rows + columns)).
    for side in (model.uncertainty_prototypes.image, model.uncertainty_prototypes.text):
        assert side.shape == (5, 12)
        assert 0.7 * (6 / 17) ** 0.5 < side.abs().max() <= (6 / 17) ** 0.5
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits_per_image, plain(**batch).logits_per_image)


@pytest.mark.parametrize("ignore", [False, True])
def test_another_number_than_the_checkpoint_has_is_refused(tiny_model, tmp_path, ignore):
    pau_model(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"uncertainty_prototypes.image is \(4, 12\) in the file.*belong to a trained checkpoint"
    ):
        PicoModel.from_pretrained(tmp_path, uncertainty_config={"num_prototypes": 3}, ignore_mismatched_sizes=ignore)


def test_autocast_leaves_it_in_float32(tiny_model, batch):
    model = pau_model(tiny_model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model(**batch)
    with torch.no_grad():
        exact = model.uncertainty(features.image_tokens, features.image_mask, "image")
    torch.testing.assert_close(features.image_uncertainty, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prototypes": 0}, "`num_prototypes` must be from 1 to 65536, but got 0"),
        ({"temperature": 0}, "`temperature` must be from 1e-06 to .*, but got 0"),
        ({"weight": -1.0}, "`weight` must be from 0 to .*, but got -1.0"),
        ({"diversity_weight": float("nan")}, "`diversity_weight` must be from 0 to .*, but got nan"),
        ({"gradient": "no"}, "'gradient' expected bool"),
        ({"tau": 5.0}, "unexpected keyword argument 'tau'"),
        ({"reranking": {"floor": "x"}}, "'<=' not supported"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        configuration(**options)


# Training


CDDS = {"model_class": CddsModel, "unet_num_layers": 1, "unet_num_heads": 2}


@pytest.mark.parametrize("method", [{}, CDDS], ids=["pico", "cdds"])
def test_trained_beside_a_head_and_resumed(tmp_path, method):
    options = {"num_train_epochs": 2, "model_options": {**method, "uncertainty_config": {"num_prototypes": 4}}}
    whole = tiny.trainer(tmp_path / "run", **options)
    start = {name: tensor.clone() for name, tensor in whole.model.uncertainty_prototypes.state_dict().items()}
    whole.train()
    for name, tensor in whole.model.uncertainty_prototypes.state_dict().items():
        assert not torch.equal(tensor, start[name])
    assert whole.evaluate()["eval_image_to_text_aurc"] >= 0
    saved = type(whole.model).from_pretrained(tmp_path / "run" / "checkpoint-6")
    tiny.assert_same_state(saved, whole.model)
    resumed = tiny.trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    tiny.assert_same_state(whole.model, resumed.model)


def test_the_trainers_loss_has_it_added(tmp_path, batch):
    made = tiny.trainer(tmp_path, model_options={"uncertainty_config": {"num_prototypes": 4}})
    inputs = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    made.model.train()
    loss, outputs = made.compute_loss(made.model, inputs, return_outputs=True)
    assert outputs.auxiliary_loss > 0
    torch.testing.assert_close(loss, made.model(**inputs, return_loss=True).loss)


def test_trained_with_the_gradient_cache(tmp_path):
    """Chunks of two: negatives are those of the chunk, and the prototypes learn all the same."""
    made = tiny.trainer(
        tmp_path,
        model_options={"uncertainty_config": {"num_prototypes": 4}},
        gradient_cache_chunk_size=2,
        num_train_epochs=1,
        logging_steps=1,
    )
    start = made.model.uncertainty_prototypes.image.detach().clone()
    made.train()
    assert not torch.equal(made.model.uncertainty_prototypes.image, start)
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(entry["uncertainty_loss"] > 0 for entry in logs)
    assert all(entry["uncertainty_diversity_loss"] > 0 for entry in logs)
