"""
What transformers asks of every model, in our own words, for every backbone family.

Conventions of transformers 5.23; `tests/upstream` runs its own suite.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator

import pytest
import torch
from backbone_families import JOINT, PAIRS, batch, family
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from modeling_pico import PicoConfig, PicoModel


FAMILIES = [(name, name) for name in JOINT] + PAIRS
# Convolutions attend to nothing.
CONVOLUTIONAL = ("align", "dinov3_convnext")
# Transformers has one implementation of their attention.
EAGER_ONLY = ("align", "blip", "blip_retrieval", "dinov3_convnext")

families = pytest.mark.parametrize(("vision", "text"), FAMILIES, ids=lambda name: name)


@functools.cache
def _model(vision: str, text: str, **options) -> PicoModel:
    options = {"num_style_prototypes": 3, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if vision == text:
            return PicoModel.from_backbones(family(vision).build(), **options)
        towers = family(vision).build(), family(text).build()
        return PicoModel.from_backbones(*towers, **{"embedding_dim": 12, **options})


def build(vision: str, text: str, **options) -> PicoModel:
    return copy.deepcopy(_model(vision, text, **options))


def without_dropout(model: PicoModel) -> PicoModel:
    """In training mode, for checkpointing and gradients, but as exact as in evaluation."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
        for name in ("attention_dropout", "dropout", "dropout_prob", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@contextlib.contextmanager
def constant_noise() -> Iterator[None]:
    """Makes random initialisation depend on its parameters only and not on what was drawn before."""
    names = ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "kaiming_uniform_", "kaiming_normal_")
    originals = {name: getattr(torch.nn.init, name) for name in names}

    def seeded(function):
        def draw(tensor, *args, **kwargs):
            torch.manual_seed(0)
            return function(tensor, *args, **kwargs)

        return draw

    table = initialization.TORCH_INIT_FUNCTIONS
    before = dict(table)
    with torch.random.fork_rng():
        try:
            for name, function in originals.items():
                setattr(torch.nn.init, name, seeded(function))
                table[name] = seeded(before[name])
            yield
        finally:
            table.update(before)
            for name, function in originals.items():
                setattr(torch.nn.init, name, function)


# Saving, loading, initialisation


@families
def test_saved_twice_and_loaded_twice(vision, text, tmp_path):
    model, inputs = build(vision, text), batch(vision, text)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        model, info = PicoModel.from_pretrained(tmp_path / turn, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits_per_image, expected)


@families
def test_an_empty_checkpoint_gives_a_freshly_initialised_model(vision, text):
    config = build(vision, text).config
    with constant_noise():
        fresh = PicoModel(copy.deepcopy(config)).eval()
        model, info = PicoModel.from_pretrained(
            None, config=copy.deepcopy(config), state_dict={}, output_loading_info=True
        )
    # Every tensor is reported missing, and every one is there afterwards as it would have been.
    assert set(info["missing_keys"]) == set(fresh.state_dict())
    for tensors, expected in (
        (dict(model.named_parameters()), dict(fresh.named_parameters())),
        (dict(model.named_buffers()), dict(fresh.named_buffers())),
    ):
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name
    with torch.no_grad():
        assert model(**batch(vision, text)).logits_per_image.isfinite().all()


@families
def test_a_meta_model_gets_its_buffers_from_init_weights(vision, text):
    config = copy.deepcopy(build(vision, text).config)
    expected = dict(PicoModel(copy.deepcopy(config)).named_buffers())
    with torch.device("meta"):
        model = PicoModel(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(3)
    model.init_weights()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


@families
def test_every_tensor_is_a_parameter_or_a_buffer(vision, text):
    for name, module in build(vision, text).named_modules():
        stray = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not stray, (name, stray)


@families
def test_configuration_round_trip(vision, text, tmp_path):
    config = build(vision, text).config
    config.save_pretrained(tmp_path)
    again = PicoConfig.from_pretrained(tmp_path)
    assert type(again.vision_config) is type(config.vision_config)
    assert type(again.text_config) is type(config.text_config)
    assert PicoConfig.from_dict(again.to_dict()).to_dict() == again.to_dict()
    model = PicoModel(again)
    assert model.config is again
    assert model.config.vision_config is model.vision_model.config
    assert model.config.text_config is model.text_model.config


def test_only_prototypes_moments_and_temperature_are_kept_in_float32():
    model = PicoModel.from_backbones(family("clip").build(), uncertainty_config={"num_prototypes": 2})
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    patterns = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict]
    kept = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    # A pattern that matched the integer stage would turn it into a float.
    state = {name for name in names if "_prototypes." in name and not name.endswith(".stage")}
    state |= {name for name in names if "image_moments." in name and not name.endswith(".count")}
    assert kept == {"logit_scale"} | state
    # Layers have moments only where the tower has batch normalisation.
    assert all(any(re.search(pattern, name) for name in names) or ".layer_" in pattern for pattern in patterns)


# Forward


def assert_same_values(values, expected) -> None:
    assert type(values) is type(expected)
    if isinstance(values, torch.Tensor):
        assert torch.equal(values, expected)
    elif isinstance(values, tuple):
        assert len(values) == len(expected)
        for value, other in zip(values, expected, strict=True):
            assert_same_values(value, other)
    elif isinstance(values, dict):
        assert_same_values(tuple(values.items()), tuple(expected.items()))
    else:
        assert values is None or values == expected


@families
def test_outputs(vision, text):
    model, inputs = build(vision, text), batch(vision, text)
    with torch.no_grad():
        first = model(**inputs, return_loss=True)
        second = model(**inputs, return_loss=True)
        values = model(**inputs, return_loss=True, return_dict=False)
        assert torch.equal(first.logits_per_image, second.logits_per_image)
        assert_same_values(values, first.to_tuple())
        for output in (
            model.get_image_features(inputs["pixel_values"]),
            model.get_text_features(inputs["input_ids"], inputs["attention_mask"]),
        ):
            assert isinstance(output, ModelOutput)
            assert isinstance(output, BaseModelOutputWithPooling)
            assert output.last_hidden_state.shape[0] == 3
            assert output.pooler_output.shape == (3, model.config.embedding_dim)


@families
def test_hidden_states_and_attentions(vision, text):
    model, inputs = build(vision, text), batch(vision, text)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        image = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    for output in (outputs.text_model_output, texts):
        assert len(output.hidden_states) == 3
    assert len(image.hidden_states) == len(outputs.vision_model_output.hidden_states) >= 3
    assert len(outputs.text_model_output.attentions) == 2
    if vision not in CONVOLUTIONAL:
        assert len(outputs.vision_model_output.attentions) == 2


@pytest.mark.parametrize(("vision", "text"), [pair for pair in FAMILIES if pair[0] not in EAGER_ONLY])
def test_attention_implementations_agree_and_can_be_switched(vision, text):
    model, inputs = build(vision, text), batch(vision, text)
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.vision_model.config._attn_implementation == implementation
        assert model.text_model.config._attn_implementation == implementation
        with torch.no_grad():
            logits.append(model(**inputs).logits_per_image)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


# Training


@families
@pytest.mark.parametrize("options", [{}, {"method": "clip_style", "pooling": "class_token"}], ids=["pico", "clip"])
def test_every_trainable_parameter_gets_a_gradient(vision, text, options):
    model = without_dropout(build(vision, text, **options))
    model(**batch(vision, text), return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert name.endswith(("mask_token", "head.probe")), name


@pytest.mark.parametrize(
    ("vision", "text", "use_reentrant"), [(*pair, False) for pair in FAMILIES] + [(*FAMILIES[0], True)]
)
def test_gradient_checkpointing_gives_the_same_gradients(vision, text, use_reentrant):
    reference, model = without_dropout(build(vision, text)), without_dropout(build(vision, text))
    if vision == "align":
        # Its drop paths are random in training.
        for part in (reference, model):
            part.vision_model.eval()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for part in (reference, model):
        part(**batch(vision, text), return_loss=True).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_parts_stay_frozen_after_loading(tmp_path):
    for vision, name in (("dinov2", "embeddings.mask_token"), ("siglip", "head.probe")):
        model = build(vision, vision if vision in JOINT else "bert")
        model.save_pretrained(tmp_path / vision)
        again = PicoModel.from_pretrained(tmp_path / vision)
        frozen = [key for key, parameter in again.vision_model.named_parameters() if not parameter.requires_grad]
        assert frozen == [name]


@families
def test_embeddings(vision, text):
    model = build(vision, text)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().weight.shape[0] == 70
    assert model.config.text_config.vocab_size == 70
    with torch.no_grad():
        assert model(**batch(vision, text)).logits_per_image.isfinite().all()


@families
def test_tiny(vision, text):
    assert build(vision, text).num_parameters() < 100_000
