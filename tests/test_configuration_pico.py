from __future__ import annotations

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, CLIPTextConfig, CLIPVisionConfig, ViTConfig

from modeling_pico import PICO_LITERAL, PicoConfig, PicoModel
from modeling_pico.model.configuration_pico import (
    CHOICES,
    COLUMN_MODES,
    LOSS_TYPES,
    POOLINGS,
    STYLE_PROBABILITIES,
)


def test_no_argument_gives_vit_and_bert_and_the_documented_defaults():
    config = PicoConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vit", "bert")
    assert (config.embedding_dim, config.num_style_prototypes, config.column_length) == (512, 16, 16)
    assert (config.method, config.pooling, config.column_mode) == ("pico", "mean", "moments")
    assert config.style_probability == "style_rates"
    assert (config.loss_type, config.margin, config.logit_scale_init_value) == ("infonce", 0.2, 2.6592)


@pytest.mark.parametrize("vision", ["clip", "vit", "swin", "dinov2"])
@pytest.mark.parametrize("text", ["clip", "bert", "roberta"])
def test_sub_configs_survive_json_and_disk(vision, text, tiny_vision_config, tiny_text_config, tmp_path):
    vision_config = CLIPVisionConfig(hidden_size=24) if vision == "clip" else tiny_vision_config(vision)
    text_config = CLIPTextConfig(hidden_size=24) if text == "clip" else tiny_text_config(text)
    config = PicoConfig(vision_config=vision_config, text_config=text_config, embedding_dim=7, margin=2)
    config.save_pretrained(tmp_path)
    for again in (
        PicoConfig(**json.loads(config.to_json_string(use_diff=False))),
        PicoConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert isinstance(again, PicoConfig)
        assert type(again.vision_config) is type(vision_config)
        assert type(again.text_config) is type(text_config)
        assert again.vision_config.to_dict() == vision_config.to_dict()
        assert again.text_config.to_dict() == text_config.to_dict()
        assert (again.embedding_dim, again.margin) == (7, 2)


def test_every_option_survives_disk(tmp_path):
    options = {
        "method": "clip_style",
        "pooling": "class_token",
        "vision_special_tokens": False,
        "text_special_tokens": False,
        "num_style_prototypes": 5,
        "column_mode": "quantile",
        "column_length": 9,
        "style_probability": "purity",
        "loss_type": "hinge",
        "margin": 0.3,
        "logit_scale_init_value": 1.25,
        "uncertainty_config": {"num_prototypes": 8},
    }
    PicoConfig(**options).save_pretrained(tmp_path)
    again, default = PicoConfig.from_pretrained(tmp_path), PicoConfig()
    for name, value in options.items():
        assert getattr(again, name) == value
        assert getattr(default, name) != value, f"{name} is not tested by its default value"


def test_configurations_given_as_dictionaries_or_objects_are_equal():
    vision, text = ViTConfig(hidden_size=24), BertConfig(hidden_size=24)
    as_objects = PicoConfig(vision_config=vision, text_config=text)
    as_dictionaries = PicoConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    assert as_objects.to_dict() == as_dictionaries.to_dict()
    assert as_objects.vision_config is vision


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_wrong_choice_is_refused_with_all_allowed_values(name):
    with pytest.raises(StrictDataclassError) as error:
        PicoConfig(**{name: "unknown"})
    assert isinstance(error.value.__cause__, ValueError)
    for allowed in (f"`{name}`", "'unknown'", *map(repr, CHOICES[name])):
        assert allowed in str(error.value)


def test_every_choice_is_accepted():
    for name, allowed in {
        "pooling": POOLINGS,
        "column_mode": COLUMN_MODES,
        "style_probability": STYLE_PROBABILITIES,
        "loss_type": LOSS_TYPES,
    }.items():
        assert CHOICES[name] == allowed
        for value in allowed:
            assert getattr(PicoConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "smallest", "refused"),
    [
        ("embedding_dim", 1, 0),
        ("num_style_prototypes", 1, 0),
        ("column_length", 2, 1),
        ("margin", 0.0, -0.1),
        ("margin", 0.0, math.nan),
    ],
)
def test_bounds(name, smallest, refused):
    assert getattr(PicoConfig(**{name: smallest}), name) == smallest
    with pytest.raises(StrictDataclassError, match=f"`{name}` must be .*{refused!r}"):
        PicoConfig(**{name: refused})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": "12"}, "'embedding_dim' expected int, got str"),
        ({"vision_special_tokens": "no"}, "'vision_special_tokens' expected bool, got str"),
    ],
)
def test_wrong_types_are_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        PicoConfig(**options)


@pytest.mark.parametrize("name", ["vision_config", "text_config"])
def test_sub_configuration_without_model_type_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must contain `model_type` .* but has \['hidden_size'\]"):
        PicoConfig(**{name: {"hidden_size": 16}})


def test_column_size():
    assert PicoConfig().column_size == 2
    assert PicoConfig(column_mode="quantile", column_length=9).column_size == 9


def test_the_literal_reconstruction_is_one_name(tiny_model):
    towers = tiny_model(method="fine_grained")
    model = PicoModel.from_backbones(towers.vision_model, towers.text_model, **PICO_LITERAL)
    for config in (model.config, PicoConfig(**PICO_LITERAL)):
        assert (config.method, config.column_mode, config.style_probability) == ("pico", "quantile", "purity")
    # No part of the weights is learned.
    assert not list(model.style_prototypes.parameters())
