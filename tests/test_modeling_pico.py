from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BertForMaskedLM,
    BertModel,
    ConvNextConfig,
    Dinov2Model,
    RobertaForMaskedLM,
    SwinForImageClassification,
    ViTForImageClassification,
    ViTModel,
)

import modeling_pico
from modeling_pico import PicoConfig, PicoModel, PicoProcessor, image_text_loss, pair_scores
from modeling_pico.model.backbones_pico import build_backbone, load_backbone, num_prefix_tokens, text_token_mask
from modeling_pico.model.configuration_pico import LOSS_TYPES, STYLE_PROBABILITIES
from modeling_pico.model.prototypes_pico import StylePrototypes


FAMILIES = [("vit", "bert"), ("swin", "roberta"), ("dinov2", "bert")]


@pytest.fixture
def trained(tiny_model, use_prototypes):
    """Builds a tiny PICO model with prototypes in use."""

    def build(**options) -> PicoModel:
        return use_prototypes(tiny_model(**options))

    return build


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype, name
        assert torch.equal(tensor, other_state[name]), name


# Backbones


def test_the_pooled_baseline_on_clip_is_clip(tiny_clip, batch):
    with torch.no_grad():
        expected = tiny_clip.model(**batch)
        for source in (tiny_clip.folder, tiny_clip.model):
            model = PicoModel.from_backbones(source, method="clip_style")
            outputs = model(**batch)
            torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image)
            torch.testing.assert_close(outputs.logits_per_text, expected.logits_per_text)
            pooled = model.get_image_features(batch["pixel_values"]).pooler_output
            torch.testing.assert_close(pooled, expected.image_embeds)
    assert expected.logits_per_image.std() > 0.1


def test_clip_brings_towers_projections_and_temperature_along(tiny_clip, batch):
    model = PicoModel.from_backbones(tiny_clip.folder, num_style_prototypes=3)
    assert not model.training
    assert (model.config.embedding_dim, model.config.pooling) == (10, "class_token")
    assert_same_state(model.vision_model, tiny_clip.model.vision_model)
    assert_same_state(model.text_model, tiny_clip.model.text_model)
    for name in ("visual_projection", "text_projection"):
        own, source = getattr(model.alignment_head, name).weight, getattr(tiny_clip.model, name).weight
        assert torch.equal(own, source)
    assert torch.equal(model.logit_scale, tiny_clip.model.logit_scale.reshape(1))
    # Patches pass the norm that CLIP applies to its class token only, so the class token's embedding is CLIP's.
    with torch.no_grad():
        tokens = model.get_image_features(batch["pixel_values"]).embeds
        expected = tiny_clip.model(**batch).image_embeds
    torch.testing.assert_close(tokens[:, 0], expected)


def test_a_mistyped_option_of_from_backbones_is_refused(tiny_clip):
    with pytest.raises(ValueError, match="PicoConfig has no option 'sharpnes'"):
        PicoModel.from_backbones(tiny_clip.folder, sharpnes=2.0)


def test_own_options_win_over_what_clip_brings(tiny_clip):
    model = PicoModel.from_backbones(tiny_clip.folder, embedding_dim=6, pooling="mean", logit_scale_init_value=1.5)
    assert (model.config.embedding_dim, model.config.pooling) == (6, "mean")
    assert model.alignment_head.visual_projection.weight.shape == (6, 16)
    assert model.logit_scale.item() == 1.5


def test_the_towers_of_clip_can_be_taken_one_by_one(tiny_clip, tiny_text_config):
    torch.manual_seed(0)
    text = BertModel(tiny_text_config("bert"), add_pooling_layer=False)
    model = PicoModel.from_backbones(tiny_clip.folder, text, embedding_dim=6)
    assert_same_state(model.vision_model, tiny_clip.model.vision_model)
    assert_same_state(model.text_model, text)
    assert_same_state(load_backbone(tiny_clip.folder, "text"), tiny_clip.model.text_model)


@pytest.mark.parametrize(
    ("vision_class", "vision", "text_class", "text"),
    [
        (ViTForImageClassification, "vit", BertForMaskedLM, "bert"),
        (SwinForImageClassification, "swin", RobertaForMaskedLM, "roberta"),
        (Dinov2Model, "dinov2", BertModel, "bert"),
    ],
)
def test_single_tower_checkpoints_keep_every_weight(
    vision_class, vision, text_class, text, tiny_vision_config, tiny_text_config, batch, tmp_path
):
    # The layouts in which these families are published: with a classifier, with a language head, or bare.
    torch.manual_seed(0)
    sources = vision_class(tiny_vision_config(vision)), text_class(tiny_text_config(text))
    folders = str(tmp_path / "vision"), str(tmp_path / "text")
    for source, folder in zip(sources, folders, strict=True):
        source.save_pretrained(folder)
    model = PicoModel.from_backbones(*folders, embedding_dim=12)
    for tower, source in zip((model.vision_model, model.text_model), sources, strict=True):
        base = source.base_model.state_dict()
        state = tower.state_dict()
        assert len(state) > 10
        assert all(torch.equal(tensor, base[name]) for name, tensor in state.items())
        assert not any("pooler" in name for name in state)
    with torch.no_grad():
        own = model.get_text_features(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        expected = (
            sources[1]
            .base_model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .last_hidden_state
        )
    torch.testing.assert_close(own, expected)

    model.save_pretrained(tmp_path / "pico")
    again, info = PicoModel.from_pretrained(tmp_path / "pico", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(model, again)


def test_half_precision_checkpoints_are_loaded_in_float32(tiny_clip, tmp_path):
    tiny_clip.model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    model = PicoModel.from_backbones(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_single_tower_alone_is_refused(tiny_vision_config, tmp_path):
    tower = ViTModel(tiny_vision_config("vit"))
    tower.save_pretrained(tmp_path)
    for source, name in ((str(tmp_path), str(tmp_path)), (tower, "ViTModel")):
        with pytest.raises(ValueError, match="is a single tower .*give a text checkpoint") as error:
            PicoModel.from_backbones(source)
        assert name in str(error.value)


def test_attention_implementation_is_kept_and_can_be_switched(tiny_clip, tiny_config, batch):
    models = PicoModel.from_backbones(tiny_clip.folder), PicoModel(tiny_config()).eval()
    for model in models:
        assert model.config._attn_implementation == "sdpa"
        towers = model.vision_model, model.text_model
        assert [tower.config._attn_implementation for tower in towers] == ["sdpa", "sdpa"]
        with torch.no_grad():
            fast = model(**batch).logits_per_image
            model.set_attn_implementation("eager")
            assert [tower.config._attn_implementation for tower in towers] == ["eager", "eager"]
            outputs = model(**batch, output_attentions=True)
        torch.testing.assert_close(outputs.logits_per_image, fast, rtol=1e-4, atol=1e-4)
        assert len(outputs.vision_model_output.attentions) == 2
        assert len(outputs.text_model_output.attentions) == 2
    eager = PicoModel.from_backbones(tiny_clip.folder, backbone_kwargs={"attn_implementation": "eager"})
    assert eager.text_model.config._attn_implementation == "eager"


def test_convolutional_feature_maps_become_tokens(tiny_text_config, batch):
    vision = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64)
    config = PicoConfig(vision_config=vision, text_config=tiny_text_config("bert"), embedding_dim=8)
    model = PicoModel(config).eval()
    features = model.get_image_features(torch.randn(2, 3, 64, 64))
    assert features.last_hidden_state.shape == (2, 16, 2, 2)
    assert features.embeds.shape == (2, 4, 8)
    # Row by row: the second token is the second place of the first row.
    expected = model.alignment_head.project(features.last_hidden_state[:, :, 0, 1], "image")
    torch.testing.assert_close(features.embeds[:, 1], expected)


def test_unknown_vision_family_is_refused_where_special_tokens_matter(tiny_text_config):
    vision = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
    message = (
        "not known how many special tokens the vision family 'convnext' .* Known: align_vision_model, beit, .* vit"
    )
    with pytest.raises(ValueError, match=message):
        num_prefix_tokens(vision)
    options = {"vision_config": vision, "text_config": tiny_text_config("bert"), "embedding_dim": 8}
    model = PicoModel(PicoConfig(**options, vision_special_tokens=False))
    with pytest.raises(ValueError, match=message):
        model.get_image_features(torch.randn(1, 3, 32, 32))


# Tokens


def test_vision_special_tokens_can_be_left_out(tiny_model, batch):
    for vision, prefix in (("vit", 1), ("dinov2", 1), ("swin", 0)):
        all_tokens = tiny_model(vision=vision).get_image_features(batch["pixel_values"])
        patches = tiny_model(vision=vision, vision_special_tokens=False).get_image_features(batch["pixel_values"])
        assert all_tokens.embeds.shape == (3, 4 + prefix, 12)
        assert torch.equal(patches.embeds, all_tokens.embeds[:, prefix:])
        assert patches.mask.all()
        assert patches.mask.shape == (3, 4)


def test_first_and_last_text_tokens_can_be_left_out(tiny_model, batch):
    texts = batch["input_ids"], batch["attention_mask"]
    all_tokens = tiny_model().get_text_features(*texts)
    words = tiny_model(text_special_tokens=False).get_text_features(*texts)
    assert all_tokens.mask.sum(dim=1).tolist() == [4, 6, 9]
    assert words.mask.sum(dim=1).tolist() == [2, 4, 7]
    assert torch.equal(words.embeds, all_tokens.embeds * words.mask[:, :, None])
    for row, length in enumerate((4, 6, 9)):
        assert not words.mask[row, 0]
        assert not words.mask[row, length - 1 :].any()


def test_text_token_mask_by_hand():
    attention = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(text_token_mask(attention, True), attention.bool())
    expected = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert text_token_mask(attention, False).int().tolist() == expected


@pytest.mark.parametrize(("vision", "text"), FAMILIES)
def test_token_embeddings_are_unit_vectors_and_padding_is_zero(tiny_model, vision, text, batch):
    outputs = tiny_model(vision=vision, text=text)(**batch)
    for tokens, mask in ((outputs.image_tokens, outputs.image_mask), (outputs.text_tokens, outputs.text_mask)):
        torch.testing.assert_close(tokens.norm(dim=-1), mask.float())
    assert outputs.text_mask.sum(dim=1).tolist() == [4, 6, 9]


def test_pooled_heads(tiny_model, batch):
    texts = batch["input_ids"], batch["attention_mask"]
    tokens = tiny_model(method="fine_grained").get_text_features(*texts).embeds
    mean = tiny_model(method="clip_style").get_text_features(*texts)
    expected = torch.nn.functional.normalize(tokens.sum(dim=1), dim=-1)
    torch.testing.assert_close(mean.pooler_output, expected)
    torch.testing.assert_close(mean.embeds[:, 0] * 2**0.5, expected)
    first = tiny_model(method="clip_style", pooling="class_token").get_text_features(*texts)
    torch.testing.assert_close(first.pooler_output, tokens[:, 0])
    # Swin has no class token: the mean again.
    images = batch["pixel_values"]
    with_option = tiny_model(vision="swin", method="clip_style", pooling="class_token")
    without = tiny_model(vision="swin", method="clip_style")
    assert torch.equal(with_option.get_image_features(images).embeds, without.get_image_features(images).embeds)


# Scores


@pytest.mark.parametrize("head", PicoModel.head_classes)
def test_features_agree_with_forward_and_give_its_scores(tiny_model, use_prototypes, head, batch):
    model = tiny_model(method=head)
    if head == "pico":
        use_prototypes(model)
    with torch.no_grad():
        outputs = model(**batch)
        image = model.get_image_features(batch["pixel_values"])
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(image.embeds, outputs.image_embeds)
    assert torch.equal(text.embeds, outputs.text_embeds)
    assert torch.equal(text.mask, outputs.text_mask)
    assert torch.equal(image.last_hidden_state, outputs.vision_model_output.last_hidden_state)
    for features in (image, text):
        torch.testing.assert_close(features.pooler_output.norm(dim=-1), torch.ones(3))
        assert (features.semantic_probability is not None) == (head == "pico")
    scores = pair_scores(image.embeds, text.embeds, image.mask, text.mask)
    torch.testing.assert_close(outputs.logits_per_image, scores * outputs.logit_scale)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)
    assert outputs.logit_scale.item() == pytest.approx(14.285, rel=1e-3)


def test_unweighted_features_can_be_weighted_later(trained, batch):
    model = trained()
    with torch.no_grad():
        weighted = model.get_image_features(batch["pixel_values"])
        plain = model.get_image_features(batch["pixel_values"], weighted=False)
        again, probability = model.alignment_head.weight(plain.embeds, plain.mask, "image")
    assert plain.semantic_probability is None
    torch.testing.assert_close(plain.embeds.norm(dim=-1), torch.ones(3, 5))
    assert torch.equal(again, weighted.embeds)
    assert torch.equal(probability, weighted.semantic_probability)


@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
def test_before_the_first_construction_the_scores_are_those_of_the_baseline(tiny_model, form, batch):
    model = tiny_model(style_probability=form)
    baseline = tiny_model(method="fine_grained")
    loaded = baseline.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.missing_keys
    assert all("style_prototypes" in name for name in loaded.unexpected_keys)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits_per_image, baseline(**batch).logits_per_image)


def test_prototypes_in_use_change_the_scores(trained, tiny_model, batch):
    with torch.no_grad():
        plain, weighted = tiny_model()(**batch), trained()(**batch)
    assert torch.equal(plain.image_tokens, weighted.image_tokens)
    assert (plain.logits_per_image - weighted.logits_per_image).abs().max() > 1e-3
    assert weighted.image_semantic_probability.std() > 1e-3


@pytest.mark.parametrize(("vision", "text"), FAMILIES)
@pytest.mark.parametrize("head", PicoModel.head_classes)
def test_a_row_does_not_depend_on_its_batch(tiny_model, use_prototypes, vision, text, head, batch):
    model = tiny_model(vision=vision, text=text, method=head, pooling="class_token")
    if head == "pico":
        use_prototypes(model)
    with torch.no_grad():
        together = model(**batch).logits_per_image
        for row, length in enumerate((4, 6, 9)):
            alone = model(
                input_ids=batch["input_ids"][row : row + 1, :length],
                attention_mask=batch["attention_mask"][row : row + 1, :length],
                pixel_values=batch["pixel_values"],
            )
            torch.testing.assert_close(alone.logits_per_image, together[:, row : row + 1], rtol=1e-5, atol=1e-5)
            alone = model(**{**batch, "pixel_values": batch["pixel_values"][row : row + 1]})
            torch.testing.assert_close(alone.logits_per_image, together[row : row + 1], rtol=1e-5, atol=1e-5)


def test_a_missing_attention_mask_means_no_padding(tiny_model, batch):
    model = tiny_model()
    full = batch["input_ids"][2:]
    with torch.no_grad():
        features = model.get_text_features(full)
        explicit = model.get_text_features(full, torch.ones_like(full))
    assert torch.equal(features.embeds, explicit.embeds)
    assert features.mask.all()


# Loss and outputs


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss(tiny_model, loss_type, batch):
    model = tiny_model(loss_type=loss_type, margin=0.3)
    with torch.no_grad():
        outputs = model(**batch, return_loss=True)
        scores = outputs.logits_per_image / outputs.logit_scale
        for ids in (None, torch.tensor([4, 5, 4])):
            loss = model(**batch, image_ids=ids, return_loss=True, return_logits=False).loss
            expected = image_text_loss(
                scores,
                scores.T,
                image_ids=ids,
                loss_type=loss_type,
                logit_scale=outputs.logit_scale,
                margin=0.3,
            )
            torch.testing.assert_close(loss, expected)
            # Without any negative there is nothing to lose.
        assert model(**batch, image_ids=torch.tensor([4, 4, 4]), return_loss=True).loss.item() == 0.0
    assert outputs.loss.item() > 0.01


def test_outputs_without_loss_or_logits(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        assert model(**batch).loss is None
        outputs = model(**batch, return_logits=False)
        assert outputs.logits_per_image is None
        assert outputs.image_embeds.shape == (3, 5, 12)
        outputs = model(**batch, return_loss=True, return_logits=False)
    assert outputs.logits_per_image is None
    assert outputs.loss.isfinite()


def test_tuple_outputs(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**batch, return_loss=True)
        loss, logits, *rest = model(**batch, return_loss=True, return_dict=False)
        image = model.get_image_features(batch["pixel_values"], return_dict=False)
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"], return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits_per_image)
    assert isinstance(rest[-1], tuple)
    assert isinstance(image, tuple)
    assert any(torch.is_tensor(item) and torch.equal(item, outputs.image_embeds) for item in image)
    assert any(torch.is_tensor(item) and torch.equal(item, outputs.text_embeds) for item in text)


@pytest.mark.parametrize("wanted", [{"return_loss": True}, {"image_ids": torch.arange(3)}])
@pytest.mark.parametrize("missing", ["input_ids", "pixel_values"])
def test_a_missing_input_is_named(tiny_model, batch, missing, wanted):
    inputs = {name: value for name, value in batch.items() if name != missing}
    with pytest.raises(ValueError, match=f"Missing: {missing}.*get_image_features"):
        tiny_model()(**inputs, **wanted)


def test_no_input_at_all(tiny_model):
    with pytest.raises(ValueError, match="Missing: input_ids, pixel_values"):
        tiny_model()()


# Training


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("head", PicoModel.head_classes)
def test_every_trainable_parameter_gets_a_gradient(tiny_model, use_prototypes, head, loss_type, batch, tmp_path):
    model = tiny_model(method=head, loss_type=loss_type, margin=2.0)
    model.save_pretrained(tmp_path)
    models = [model, PicoModel.from_pretrained(tmp_path)]
    if head == "pico":
        models.append(use_prototypes(tiny_model(loss_type=loss_type, margin=2.0)))
    for model in models:
        model.train()
        model(**batch, return_loss=True).loss.backward()
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # The hinge has no temperature to learn, before and after loading.
        assert ("logit_scale" in trainable) == (loss_type == "infonce")
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert model.vision_model.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
        assert model.text_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_a_temperature_learned_by_infonce_passes_into_a_hinge_model(tiny_model, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
    model.save_pretrained(tmp_path)
    hinge, info = PicoModel.from_pretrained(tmp_path, loss_type="hinge", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert hinge.logit_scale.item() == 1.25


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, batch):
    reference, model = tiny_model().train(), tiny_model().train()
    for part in (reference, model):
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        part.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.vision_model.modules())
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.text_model.modules())
    for part in (reference, model):
        part.text_model.config.attention_probs_dropout_prob = 0.0
        part(**batch, return_loss=True).loss.backward()
    name = "embeddings.word_embeddings.weight"
    gradients = [part.text_model.get_parameter(name).grad for part in (reference, model)]
    torch.testing.assert_close(gradients[0], gradients[1])
    model.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model(**batch, return_loss=True).loss.backward()


def test_embeddings_can_be_resized(tiny_model):
    model = tiny_model()
    assert model.get_input_embeddings() is model.text_model.embeddings.word_embeddings
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().weight.shape[0] == 70
    assert model.config.text_config.vocab_size == 70


# Saving and loading


@pytest.mark.parametrize(("vision", "text"), FAMILIES)
def test_a_saved_model_comes_back_bit_for_bit(trained, vision, text, batch, tmp_path):
    model = trained(vision=vision, text=text)
    model.save_pretrained(tmp_path)
    again, info = PicoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(model, again)
    assert again.style_prototypes["image"].stage.dtype == torch.int64
    with torch.no_grad():
        assert torch.equal(again(**batch).logits_per_image, model(**batch).logits_per_image)
    by_auto_class = AutoModel.from_pretrained(tmp_path)
    assert isinstance(by_auto_class, PicoModel)
    assert_same_state(model, by_auto_class)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PicoConfig)


def test_loading_in_bfloat16_keeps_the_prototypes_in_float32(trained, batch, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_state(model.style_prototypes, again.style_prototypes)
    assert again.logit_scale.dtype == torch.float32
    assert torch.equal(again.logit_scale, model.logit_scale)
    assert again.alignment_head.visual_projection.weight.dtype == torch.bfloat16
    assert again.text_model.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    with torch.no_grad():
        outputs = again(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
        expected = model(**batch)
    assert outputs.image_embeds.dtype == torch.float32
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image, rtol=0.05, atol=0.7)

    again.save_pretrained(tmp_path / "again")
    twice = PicoModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert_same_state(model.style_prototypes, twice.style_prototypes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", STYLE_PROBABILITIES)
def test_a_model_cast_as_a_whole_still_runs(trained, form, dtype, batch):
    model = trained(style_probability=form)
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        model.to(dtype)
        outputs = model(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)})
    assert outputs.logits_per_image.dtype == torch.float32
    torch.testing.assert_close(outputs.logits_per_image, expected, rtol=0.05, atol=1.0)


def test_instance_norm_takes_the_mean_of_each_column_away(tiny_model):
    head = tiny_model(method="instance_norm").alignment_head
    states, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    tokens, _, _ = head.embed(states, mask, None, "image")
    projected = head.visual_projection(states)[1, :2]
    expected = torch.nn.functional.normalize(projected - projected.mean(dim=0), dim=-1)
    torch.testing.assert_close(tokens[1, :2], expected)
    assert torch.equal(tokens[1, 2:], torch.zeros(3, 12))
    # What shifts all tokens alike is gone.
    shifted, _, _ = head.embed(states + torch.randn(16), mask, None, "image")
    torch.testing.assert_close(shifted, tokens, rtol=0, atol=1e-5)


def test_autocast_gives_scores_in_float32(trained, batch):
    model = trained()
    with torch.no_grad():
        expected = model(**batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(**batch)
    assert outputs.logits_per_image.dtype == torch.float32
    assert outputs.image_semantic_probability.dtype == torch.float32
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image, rtol=0.05, atol=0.7)


def assert_fresh(prototypes: StylePrototypes) -> None:
    """The buffers are those of the constructor."""
    for name, buffer in StylePrototypes(prototypes.config).named_buffers():
        assert torch.equal(prototypes.get_buffer(name), buffer), name


def test_everything_the_checkpoint_lacks_is_initialised(tiny_config, batch):
    # From an empty state dict the model is built on the meta device and all is filled in afterwards.
    config = tiny_config(logit_scale_init_value=1.5)
    model = PicoModel.from_pretrained(None, config=config, state_dict={})
    for side in model.style_prototypes.values():
        assert_fresh(side)
        assert torch.equal(side.rates.rate, torch.zeros(12, 3))
        assert torch.equal(side.rates.bias, torch.full((12,), 2.0))
    assert model.logit_scale.item() == 1.5
    assert 0.5 < model.alignment_head.visual_projection.weight.std() * 16**0.5 < 2
    with torch.no_grad():
        assert model.eval()(**batch).logits_per_image.isfinite().all()


def test_a_fresh_model_equals_one_built_on_the_meta_device_and_initialised(tiny_config):
    with torch.device("meta"):
        model = PicoModel(tiny_config())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    for side in model.style_prototypes.values():
        assert_fresh(side)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(model.style_prototypes["image"].rates.bias, torch.full((12,), 2.0))


def test_another_number_of_prototypes_than_the_checkpoint_has_is_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for ignore in (False, True):
        with pytest.raises(ValueError, match=r"the configuration asks for \(5, 2\).*belong to a trained checkpoint"):
            PicoModel.from_pretrained(tmp_path, num_style_prototypes=5, ignore_mismatched_sizes=ignore)


def test_a_baseline_checkpoint_starts_a_pico_model_with_neutral_weights(tiny_model, batch, tmp_path):
    baseline = tiny_model(method="fine_grained")
    baseline.save_pretrained(tmp_path)
    model, info = PicoModel.from_pretrained(tmp_path, method="pico", output_loading_info=True)
    assert info["missing_keys"]
    assert all("style_prototypes" in name for name in info["missing_keys"])
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits_per_image, baseline(**batch).logits_per_image)


def test_a_configuration_is_shared_with_the_towers(tiny_model):
    model = tiny_model()
    assert model.config.vision_config is model.vision_model.config
    assert model.config.text_config is model.text_model.config
    assert "pooler" not in dict(build_backbone(model.config.vision_config).named_modules())


# Sharing code with a checkpoint


def shipped_files() -> list[Path]:
    return sorted(
        path for path in Path(modeling_pico.__file__).parent.glob("*_*.py") if path.stem.endswith(("_pico", "_cdds"))
    )


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.stem)
def test_shipped_files_import_only_the_libraries_and_each_other(path):
    siblings = {file.stem for file in shipped_files()}
    # What transformers itself needs, and the standard library.
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", *sys.stdlib_module_names}
    if path.stem == "image_decoding_pico":
        allowed.add("PIL")  # which image processors need, and models do not
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # What a `try` imports is optional: transformers does not ask for it when it loads the file from the Hub.
    optional = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in set(ast.walk(tree)) - optional:
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in siblings
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed


def test_a_checkpoint_runs_without_the_package(trained, tiny_processor, batch, tmp_path, run_without_package):
    model, folder = trained(uncertainty_config={"num_prototypes": 2}), tmp_path / "checkpoint"
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    with torch.no_grad():
        output = model(**batch)
    expected = {"logits_per_image": output.logits_per_image, "text_uncertainty": output.text_uncertainty}
    torch.save({"batch": batch, "output": expected, "state": model.state_dict()}, tmp_path / "expected.pt")
    output = run_without_package(
        """
        import torch
        from PIL import Image
        from transformers import AutoModel, AutoProcessor, pipeline

        checkpoint, expected = sys.argv[1], torch.load(sys.argv[2])
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
        assert "modeling_pico" not in sys.modules
        assert type(model).__name__ == "PicoModel" and type(model).__module__.startswith("transformers_modules")
        state = model.state_dict()
        assert state.keys() == expected["state"].keys()
        for name, tensor in expected["state"].items():
            assert torch.equal(state[name], tensor), name
        with torch.no_grad():
            output = model(**expected["batch"])
        for name, tensor in expected["output"].items():
            assert torch.equal(output[name], tensor), name
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
        assert type(processor).__name__ == "PicoProcessor"
        assert processor(text=["a red circle"])["input_ids"][0][0] == 2
        classify = pipeline("zero-shot-image-classification", model=checkpoint, trust_remote_code=True)
        assert type(classify.model).__module__.startswith("transformers_modules")
        assert len(classify(Image.new("RGB", (16, 16)), candidate_labels=["red", "blue"])) == 2
        print("equal")
        """,
        folder,
        tmp_path / "expected.pt",
    )
    assert output.strip().endswith("equal")


def test_auto_classes_know_pico(trained, tiny_processor, tmp_path):
    trained().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)), PicoModel)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), PicoProcessor)
