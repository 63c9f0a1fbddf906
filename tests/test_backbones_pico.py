"""Every backbone family: from a checkpoint of its own class to tokens, masks and scores."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from backbone_families import JOINT, PAIRS, TEXT, VISION, batch, family, save, tokenizer
from PIL import Image

from modeling_pico import PicoConfig, PicoModel, PicoProcessor
from modeling_pico.model.backbones_pico import (
    build_backbone,
    image_token_states,
    limit_text_length,
    load_backbone,
    max_text_length,
    num_prefix_tokens,
    run_text_tower,
    text_token_mask,
)


OPTIONS = {"num_style_prototypes": 3}


def towers_of(name: str, model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    return model.vision_model, model.text_encoder if name == "blip_retrieval" else model.text_model


def assert_holds(tower: torch.nn.Module, source: torch.nn.Module) -> None:
    """Every tensor of the tower is bit for bit the source's."""
    state, source_state = tower.state_dict(), source.state_dict()
    assert len(state) > 8
    assert state.keys() <= source_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, source_state[name]), name
    left_out = source_state.keys() - state.keys()
    assert all("pooler" in name or "crossattention" in name for name in left_out)


# Joint checkpoints


@pytest.mark.parametrize("name", JOINT)
def test_joint_checkpoint(name, tmp_path):
    source = save(name, tmp_path / "source")
    model = PicoModel.from_backbones(str(tmp_path / "source"), **OPTIONS)
    for tower, source_tower in zip((model.vision_model, model.text_model), towers_of(name, source), strict=True):
        assert_holds(tower, source_tower)
    inputs = batch(name)
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.image_mask.shape == (3, family(name).tokens)
    assert outputs.image_mask.all()
    assert outputs.text_mask.sum(dim=1).tolist() == [4, 6, 9]
    assert outputs.logits_per_image.isfinite().all()
    assert outputs.logits_per_image.std() > 1e-4
    model.save_pretrained(tmp_path / "pico")
    again, info = PicoModel.from_pretrained(tmp_path / "pico", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, outputs.logits_per_image)


@pytest.mark.parametrize("name", JOINT)
def test_a_joint_model_in_memory_is_used_and_not_changed(name):
    source = family(name).build()
    before = copy.deepcopy(source.state_dict())
    model = PicoModel.from_backbones(source, **OPTIONS)
    for tower, source_tower in zip((model.vision_model, model.text_model), towers_of(name, source), strict=True):
        assert_holds(tower, source_tower)
    assert source.state_dict().keys() == before.keys()
    assert not any("pooler" in key or "crossattention" in key for key in model.state_dict())
    with torch.no_grad():
        assert model(**batch(name)).logits_per_image.isfinite().all()


# Not `BlipModel`, which pools through layers that no token passes: a text pooler, and the last norm a second time.
@pytest.mark.parametrize("name", [name for name in JOINT if name != "blip"])
def test_the_pooled_baseline_gives_the_scores_of_the_joint_model(name):
    source = family(name).build()
    with torch.no_grad():
        for parameter_name, parameter in source.named_parameters(recurse=False):
            if parameter_name == "temperature":
                parameter.fill_(0.07)  # noise may have made it negative
    model = PicoModel.from_backbones(source, method="clip_style")
    inputs = batch(name)
    width = source.config.text_config.max_position_embeddings
    given = dict(inputs)
    if name == "siglip":
        # As SigLIP is used: texts of full length and no mask.
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, width - 9), value=family(name).pad_id)
        given = {"pixel_values": inputs["pixel_values"], "input_ids": ids}
    with torch.no_grad():
        if name == "blip_retrieval":
            # Cosines; this class has no temperature.
            expected = source(**given, use_itm_head=False).itm_score * torch.tensor(2.6592).exp()
        else:
            expected = source(**given).logits_per_image
        if name == "siglip":
            expected = expected - source.logit_bias
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("name", ["clip", "chinese_clip", "align"])
def test_pooled_features_are_those_of_the_joint_model(name):
    source = family(name).build()
    model = PicoModel.from_backbones(source, method="clip_style")
    inputs = batch(name)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        pairs = (
            (model.get_image_features(pixels), source.get_image_features(pixels)),
            (model.get_text_features(**inputs), source.get_text_features(**inputs)),
        )
    for mine, given in pairs:
        expected = given.pooler_output
        if name == "align" and expected.dim() == 3:
            expected = expected[:, 0]  # its text features are those of every token
        torch.testing.assert_close(
            mine.pooler_output, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["blip_retrieval", "align"])
def test_a_projection_with_a_bias_is_saved_and_loaded(name, tmp_path):
    model = PicoModel.from_backbones(family(name).build(), **OPTIONS)
    assert model.config.projection_bias and model.alignment_head.text_projection.bias.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again, info = PicoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.alignment_head.text_projection.bias, model.alignment_head.text_projection.bias)
    # Fresh ones have a bias of zero where it is asked for; other sizes and kinds than the checkpoint's stay fresh.
    assert not PicoModel(PicoConfig(**{**model.config.to_dict()})).alignment_head.text_projection.bias.any()
    for options in ({"embedding_dim": 7}, {"projection_bias": False}):
        fresh = PicoModel.from_backbones(family(name).build(), **options)
        assert not torch.equal(
            fresh.alignment_head.text_projection.weight[0], model.alignment_head.text_projection.weight[0]
        )


def test_projections_of_blip_are_taken_over():
    source = family("blip").build()
    model = PicoModel.from_backbones(source)
    assert model.config.embedding_dim == 10
    assert torch.equal(model.alignment_head.visual_projection.weight, source.visual_projection.weight)
    assert torch.equal(model.logit_scale, source.logit_scale.reshape(1))


def test_blip_without_a_text_encoder_is_refused(tmp_path):
    family_ = family("blip")
    config = tf.BlipConfig(**family_.config)
    config.text_config.encoder_hidden_size = 16
    tf.BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BlipForConditionalGeneration.*has no weights for .* text_model"):
        PicoModel.from_backbones(str(tmp_path))


def test_a_model_without_two_encoders_is_refused():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**family("clip").config["vision_config"]),
        text_config=tf.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
    )
    with pytest.raises(ValueError, match="has no vision tower of its own; models of two encoders"):
        PicoModel.from_backbones(tf.LlavaModel(config))


# Single towers


@pytest.mark.parametrize(("vision", "text"), PAIRS)
def test_single_towers(vision, text, tmp_path):
    folders = str(tmp_path / "vision"), str(tmp_path / "text")
    sources = save(vision, tmp_path / "vision"), save(text, tmp_path / "text")
    model = PicoModel.from_backbones(*folders, embedding_dim=12, **OPTIONS)
    for tower, source in zip((model.vision_model, model.text_model), sources, strict=True):
        assert_holds(tower, source)
    inputs = batch(vision, text)
    with torch.no_grad():
        outputs = model(**inputs)
        expected = sources[1](inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(outputs.text_model_output.last_hidden_state, expected)
    assert outputs.image_embeds.shape == (3, family(vision).tokens, 12)
    assert outputs.text_mask.sum(dim=1).tolist() == [4, 6, 9]
    assert num_prefix_tokens(model.config.vision_config) == family(vision).prefix
    model.save_pretrained(tmp_path / "pico")
    again, info = PicoModel.from_pretrained(tmp_path / "pico", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, outputs.logits_per_image)


@pytest.mark.parametrize(
    ("name", "modality", "tower_class"),
    [
        ("clip", "image", tf.CLIPVisionModel),
        ("clip", "text", tf.CLIPTextModel),
        ("siglip", "image", tf.SiglipVisionModel),
        ("siglip", "text", tf.SiglipTextModel),
        ("blip", "image", tf.BlipVisionModel),
        ("blip", "text", tf.BlipTextModel),
        ("chinese_clip", "text", tf.ChineseCLIPTextModel),
        ("align", "image", tf.AlignVisionModel),
    ],
)
def test_towers_of_joint_families_saved_alone(name, modality, tower_class, tmp_path):
    vision, text = towers_of(name, family(name).build())
    source = vision if modality == "image" else text
    source.save_pretrained(tmp_path)
    tower = load_backbone(str(tmp_path), modality)
    assert isinstance(tower, tower_class)
    assert_holds(tower, source)


def test_a_pooler_of_a_tower_in_memory_is_left_out(tmp_path):
    vision, text = family("vit").build(), family("bert").build()
    assert vision.pooler is not None
    model = PicoModel.from_backbones(vision, text, embedding_dim=8)
    assert vision.pooler is not None
    assert not any("pooler" in name for name in model.state_dict())
    assert_holds(model.vision_model, vision)
    assert_holds(model.text_model, text)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = family("bert").build()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.output" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"has no weights for 4 tensors of BertModel, such as .*layer\.1\.output"):
        load_backbone(str(tmp_path), "text")


def test_siglip_2_of_free_resolution_is_refused_and_told_what_works(tmp_path):
    vision = tf.Siglip2VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = tf.Siglip2TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    message = "NaFlex variant of SigLIP 2 .* fixed resolution.*'siglip'"
    joint = tf.Siglip2Model(tf.Siglip2Config(vision_config=vision, text_config=text))
    joint.save_pretrained(tmp_path)
    for source in (joint, str(tmp_path)):
        with pytest.raises(ValueError, match=message):
            PicoModel.from_backbones(source)
    with pytest.raises(ValueError, match=message):
        PicoModel(PicoConfig(vision_config=vision))
    # Its text tower is as good as any.
    model = PicoModel.from_backbones(family("vit").build(), joint.text_model, embedding_dim=8)
    assert model(**batch("vit", "siglip")).logits_per_image.isfinite().all()


def test_a_tower_that_hides_patches_at_random_is_refused_and_told_what_works(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    masked = tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**sizes, **decoder, image_size=16, patch_size=8)).eval()
    masked.save_pretrained(tmp_path)
    encoder = tf.ViTModel.from_pretrained(tmp_path)
    # Its configuration is still named after the checkpoint, and would be loaded as such.
    for vision in (str(tmp_path), masked.vit, encoder):
        with pytest.raises(ValueError, match="at random.*`ViTModel.from_pretrained`, set `config.model_type = 'vit'`"):
            PicoModel.from_backbones(vision, family("bert").build())
    encoder.config.model_type = "vit"
    model = PicoModel.from_backbones(encoder, family("bert").build())
    model.save_pretrained(tmp_path / "pico")
    pixels = batch("vit", "bert")["pixel_values"]
    masked.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = masked.vit(pixels, noise=torch.arange(4.0).expand(3, 4)).last_hidden_state
        states = PicoModel.from_pretrained(tmp_path / "pico").get_image_states(pixels).states
    torch.testing.assert_close(states, expected)


def test_projections_of_poolers_are_not_taken_over():
    # They map what poolers make of the first token, which no token passes.
    config = tf.VisionTextDualEncoderConfig(
        vision_config=family("vit").build().config.to_dict(),
        text_config=family("bert").build().config.to_dict(),
        projection_dim=10,
    )
    source = tf.VisionTextDualEncoderModel(config)
    model = PicoModel.from_backbones(source, embedding_dim=10)
    assert not torch.equal(model.alignment_head.text_projection.weight, source.text_projection.weight)
    assert_holds(model.text_model, source.text_model)


@pytest.mark.parametrize("vision", ["swin", "dinov3_convnext", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_takes_images_as_processors_give_them(vision, dtype):
    model = PicoModel.from_backbones(family(vision).build(), family("bert").build(), method="fine_grained")
    inputs = batch(vision, "bert")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        torch.testing.assert_close(model.to(dtype)(**inputs).logits_per_image, expected, rtol=0, atol=0.15)


# Tokens


@pytest.mark.parametrize(("vision", "text"), [(name, name) for name in JOINT] + PAIRS)
def test_a_row_depends_neither_on_its_batch_nor_on_padding(vision, text):
    if vision == text:
        model = PicoModel.from_backbones(family(vision).build(), pooling="class_token", **OPTIONS)
    else:
        towers = family(vision).build(), family(text).build()
        model = PicoModel.from_backbones(*towers, embedding_dim=12, pooling="class_token", **OPTIONS)
    inputs = batch(vision, text)
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"])
        together = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        for row, length in enumerate((4, 6, 9)):
            alone = model.get_text_features(inputs["input_ids"][row : row + 1, :length])
            torch.testing.assert_close(alone.embeds[0], together.embeds[row, :length], rtol=1e-4, atol=1e-5)
            alone = model.get_image_features(inputs["pixel_values"][row : row + 1])
            torch.testing.assert_close(alone.embeds[0], image.embeds[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text_special_tokens", [True, False])
@pytest.mark.parametrize("name", [*JOINT, *TEXT])
def test_a_text_depends_neither_on_its_batch_nor_on_the_side_of_its_padding(name, text_special_tokens):
    options = {**OPTIONS, "pooling": "class_token", "text_special_tokens": text_special_tokens}
    if name in JOINT:
        model = PicoModel.from_backbones(family(name).build(), **options)
    else:
        model = PicoModel.from_backbones(family("vit").build(), family(name).build(), embedding_dim=12, **options)
    texts = ["red", "a red circle", "two small blue circle above the green square"]
    made = tokenizer(name)
    arguments = {"return_tensors": "pt", "return_attention_mask": True}
    with torch.no_grad():
        alone = [model.get_text_features(**made([text], **arguments)) for text in texts]
        for side in ("right", "left"):
            inputs = made(texts, padding=True, padding_side=side, **arguments)
            assert inputs["attention_mask"][0, -1 if side == "right" else 0] == 0
            features = model.get_text_features(**inputs)
            pooled = model(**inputs).pooler_output
            for row, expected in enumerate(alone):
                assert features.mask[row].sum() == expected.mask.sum()
                ours = features.embeds[row][features.mask[row]]
                torch.testing.assert_close(ours, expected.embeds[0][expected.mask[0]], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(pooled[row], expected.pooler_output[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(
                    features.pooler_output[row], expected.pooler_output[0], rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize(
    ("model_class", "options", "length"),
    [
        (tf.BertModel, {}, 20),
        (tf.ElectraModel, {"embedding_size": 16}, 20),
        (tf.DistilBertModel, {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}, 20),
        (tf.CLIPTextModel, {"bos_token_id": 2, "eos_token_id": 3}, 20),
        (tf.RobertaModel, {}, 18),
        (tf.RobertaPreLayerNormModel, {}, 18),
        (tf.XLMRobertaModel, {}, 18),
        (tf.XLMRobertaXLModel, {}, 18),
        (tf.CamembertModel, {}, 18),
        (tf.Data2VecTextModel, {}, 18),
        (tf.MPNetModel, {}, 18),
        (tf.LongformerModel, {"attention_window": 4}, 18),
        (tf.LukeModel, {"entity_vocab_size": 10}, 18),
        (tf.EsmModel, {"pad_token_id": 1, "mask_token_id": 5}, 18),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_texts_have_no_more_tokens_than_the_tower_has_positions(model_class, options, length):
    sizes = {**family("bert").config, "max_position_embeddings": 20, "num_hidden_layers": 1}
    text = model_class(
        model_class.config_class(**{**sizes, **({"pad_token_id": 1} if length == 18 else {}), **options})
    )
    assert max_text_length(text) == length
    model = PicoModel.from_backbones(family("vit").build(), text, embedding_dim=8, method="fine_grained")
    made = tokenizer("bert")
    made.model_max_length = 10**30
    limit_text_length(made, text)
    ids = made("red " * 30, truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, length)
    assert model.get_text_features(ids).embeds.isfinite().all()
    with pytest.raises(
        ValueError, match=f"have {length + 1} tokens, but .* positions for {length}. Let the tokenizer"
    ):
        model.get_text_features(torch.full((1, length + 1), 7))


def test_a_shorter_text_length_is_kept_and_a_longer_one_is_not(tiny_text_config):
    text, made = build_backbone(tiny_text_config("bert")), tokenizer("bert")
    assert made.model_max_length == 16
    for asked, expected in ((None, 16), (7, 7), (None, 7), (100, 32)):
        limit_text_length(made, text, asked)
        assert made.model_max_length == expected
    with pytest.raises(ValueError, match="`max_length` of texts must be a positive number of tokens, got 0"):
        limit_text_length(made, text, 0)


@pytest.mark.parametrize(("name", "expected"), [("siglip", [3, 5, 8]), ("clip", [2, 4, 7])])
def test_text_special_tokens_of_a_family(name, expected):
    model = PicoModel.from_backbones(family(name).build(), text_special_tokens=False)
    inputs = batch(name)
    mask = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).mask
    assert mask.sum(dim=1).tolist() == expected
    special = sum((inputs["input_ids"] == i) for i in family(name).special_ids if i is not None).bool()
    assert not (mask & special).any()


def test_text_token_mask_of_siglip_by_hand():
    attention = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert text_token_mask(attention, False, "siglip_text_model").int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert text_token_mask(attention, False, "bert").int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_siglip_texts_are_read_as_in_its_training():
    # Full length, no mask, summary at the last place.
    tower = family("siglip").build().text_model
    inputs = batch("siglip")
    full = torch.nn.functional.pad(inputs["input_ids"], (0, 16 - 9), value=3)
    with torch.no_grad():
        outputs, states = run_text_tower(tower, inputs["input_ids"], inputs["attention_mask"])
        expected = tower(full)
        # What stands under the mask is of no matter: some tokenizers pad with another id.
        other = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
        _, same = run_text_tower(tower, other, inputs["attention_mask"])
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    assert torch.equal(states, tower.head(expected.last_hidden_state[:, :9]))
    assert torch.equal(same, states)


def test_siglip_2_pads_with_the_id_of_its_vocabulary():
    config = {**family("siglip").config["text_config"], "vocab_size": 256_000, "hidden_size": 4, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = tf.SiglipTextModel(tf.SiglipTextConfig(**config)).eval()
    ids = torch.tensor([[9, 8, 1]])
    with torch.no_grad():
        outputs, _ = run_text_tower(tower, ids, torch.ones_like(ids))
        expected = tower(torch.nn.functional.pad(ids, (0, 13), value=0)).pooler_output
    assert torch.equal(outputs.pooler_output, expected)


@pytest.mark.parametrize("name", ["clip", "chinese_clip", "siglip", "blip", "vit", "dinov2", "dinov3_vit"])
def test_tokens_live_in_the_space_of_the_pooled_token(name):
    tower = family(name).build()
    tower = tower.vision_model if name in JOINT else tower
    pixels = batch(name)["pixel_values"]
    if name == "siglip":
        # An image of a single patch is that patch.
        config = copy.deepcopy(tower.config)
        config.image_size = 8
        torch.manual_seed(0)
        tower, pixels = build_backbone(config).eval(), pixels[:, :, :8, :8]
    with torch.no_grad():
        outputs = tower(pixels)
        states = image_token_states(tower, outputs)
    # BLIP norms its pooled token twice, ViT has a pooler of its own: what the family's heads read is the first.
    expected = outputs.last_hidden_state[:, 0] if name in ("blip", "vit") else outputs.pooler_output
    torch.testing.assert_close(states[:, 0], expected)
    norm = {"vit": "layernorm", "dinov2": "layernorm", "dinov3_vit": "norm"}.get(name, "post_layernorm")
    assert isinstance(getattr(tower, norm), torch.nn.LayerNorm)


@pytest.mark.parametrize("name", ["clip", "siglip", "blip", "vit", "deit", "dinov2"])
def test_images_of_another_size_by_interpolated_position_encodings(name):
    if name in JOINT:
        model = PicoModel.from_backbones(family(name).build(), **OPTIONS)
    else:
        model = PicoModel.from_backbones(family(name).build(), family("bert").build(), embedding_dim=8, **OPTIONS)
    inputs = batch(name, None if name in JOINT else "bert")
    inputs["pixel_values"] = torch.nn.functional.interpolate(inputs["pixel_values"], size=(24, 32))
    # DINOv2 stretches them by itself.
    given = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        outputs = model(**inputs, **given)
        image = model.get_image_features(inputs["pixel_values"], **given)
    assert outputs.image_embeds.shape[1] == 3 * 4 + family(name).prefix
    assert torch.equal(image.embeds, outputs.image_embeds)
    if name != "dinov2":
        with pytest.raises((ValueError, RuntimeError), match="(?i)size|match"):
            model(**inputs)


# Processors


@pytest.mark.parametrize("name", JOINT)
def test_a_processor_of_a_joint_checkpoint_fits_its_model(name, tmp_path):
    source = save(name, tmp_path)
    model, processor = PicoModel.from_backbones(str(tmp_path)), PicoProcessor.from_backbones(str(tmp_path))
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    inputs = processor(images=images, text=["a red circle", "blue"], padding=True, return_tensors="pt")
    first = family(name).special_ids[0]
    lengths = [3 + 1 + (first is not None), 1 + 1 + (first is not None)]
    assert inputs["attention_mask"].sum(dim=1).tolist() == lengths
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.text_mask.sum(dim=1).tolist() == lengths
    assert outputs.image_mask.shape == (2, family(name).tokens)
    processor.save_pretrained(tmp_path / "pico")
    again = PicoProcessor.from_pretrained(tmp_path / "pico")
    assert "attention_mask" in again(text="blue", return_tensors="pt")
    assert source.config.model_type == tf.AutoConfig.from_pretrained(tmp_path).model_type


def test_tokenizers_as_on_the_hub():
    assert tokenizer("siglip")("a red").input_ids == [5, 6, 3]
    assert set(tokenizer("siglip")("a red")) == {"input_ids"}
    assert tokenizer("bert")("a red").input_ids == [2, 5, 6, 3]
    assert set(TEXT) == {"bert", "roberta", "modernbert"}
    assert len(VISION) == 7
