"""Every route by which a PICO model is loaded gives the same tensors, prototypes above all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbone_families import JOINT, family
from transformers import AutoConfig, AutoModel, AutoProcessor

from modeling_pico import PicoConfig, PicoModel, PicoProcessor


@pytest.fixture(scope="module")
def source(tiny_model, use_prototypes) -> PicoModel:
    return use_prototypes(tiny_model())


@pytest.fixture(scope="module")
def folder(source, tiny_processor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pico")
    source.save_pretrained(path)
    tiny_processor.save_pretrained(path)
    return path


def assert_prototypes_equal(model: PicoModel, source: PicoModel) -> None:
    buffers = dict(source.style_prototypes.named_buffers())
    own = dict(model.style_prototypes.named_buffers())
    assert own.keys() == buffers.keys()
    assert len(buffers) == 10
    for name, buffer in buffers.items():
        assert own[name].dtype == buffer.dtype, name
        assert own[name].device.type == "cpu", name
        assert torch.equal(own[name], buffer), name
    assert torch.equal(model.logit_scale, source.logit_scale)
    assert model.logit_scale.dtype == torch.float32


ROUTES = {
    "class": lambda path: PicoModel.from_pretrained(path),
    "auto class": lambda path: AutoModel.from_pretrained(path),
    "auto class, remote code allowed": lambda path: AutoModel.from_pretrained(path, trust_remote_code=True),
    "given configuration": lambda path: PicoModel.from_pretrained(path, config=PicoConfig.from_pretrained(path)),
    "bfloat16": lambda path: PicoModel.from_pretrained(path, dtype=torch.bfloat16),
    "float16": lambda path: AutoModel.from_pretrained(path, dtype="float16"),
    "device map cpu": lambda path: PicoModel.from_pretrained(path, device_map="cpu"),
    "device map auto": lambda path: PicoModel.from_pretrained(path, device_map="auto", dtype=torch.bfloat16),
    "device map of parts": lambda path: PicoModel.from_pretrained(
        path, device_map={"vision_model": "cpu", "text_model": "cpu", "alignment_head": "cpu", "logit_scale": "cpu"}
    ),
    "state dict": lambda path: PicoModel.from_pretrained(
        None,
        config=PicoConfig.from_pretrained(path),
        state_dict=PicoModel.from_pretrained(path).state_dict(),
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_prototypes_survive_every_route(route, source, folder):
    assert_prototypes_equal(ROUTES[route](folder), source)


def test_shards(source, folder, tmp_path, batch):
    source.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    # Some towers are written under the older names that the Hub's checkpoints have.
    assert len(index["weight_map"]) == len(source.state_dict())
    assert all(name in index["weight_map"] for name in source.state_dict() if "style_prototypes" in name)
    for dtype in (torch.float32, torch.bfloat16):
        again, info = PicoModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_prototypes_equal(again, source)
    with torch.no_grad():
        whole = PicoModel.from_pretrained(folder)(**batch).logits_per_image
        parts = PicoModel.from_pretrained(tmp_path)(**batch).logits_per_image
    assert torch.equal(whole, parts)


def test_a_device_context(source, folder):
    with torch.device("cpu"):
        assert_prototypes_equal(PicoModel.from_pretrained(folder), source)


def test_saved_in_half_precision_and_loaded_again(source, folder, tmp_path):
    half = PicoModel.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    # And not float32, which is the type of the temperature, the first parameter.
    assert half.dtype == torch.bfloat16
    assert PicoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    for dtype in ("auto", torch.float32, torch.float16):
        again = PicoModel.from_pretrained(tmp_path, dtype=dtype)
        assert_prototypes_equal(again, source)
        expected = torch.bfloat16 if dtype == "auto" else dtype
        assert again.vision_model.dtype == expected
        assert again.alignment_head.text_projection.weight.dtype == expected


def test_auto_classes(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), PicoConfig)
    assert isinstance(AutoModel.from_pretrained(folder), PicoModel)
    assert isinstance(AutoProcessor.from_pretrained(folder), PicoProcessor)


@pytest.mark.parametrize("name", JOINT)
def test_a_model_on_the_meta_device_gets_every_buffer(name):
    config = PicoModel.from_backbones(family(name).build(), num_style_prototypes=3).config
    with torch.device("cpu"):
        expected = dict(PicoModel(config).named_buffers())
    with torch.device("meta"):
        model = PicoModel(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    model.init_weights()
    buffers = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    for key, buffer in expected.items():
        assert torch.equal(buffers[key], buffer), key
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"num_style_prototypes": 4},
        {"embedding_dim": 8},
        {"column_mode": "quantile", "column_length": 6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sizes_other_than_the_checkpoint_has_are_refused(options, folder):
    for ignore in (False, True):
        with pytest.raises(ValueError, match="other sizes than .*belong to a trained checkpoint") as error:
            PicoModel.from_pretrained(folder, ignore_mismatched_sizes=ignore, **options)
        assert str(folder) in str(error.value)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        PicoModel.from_pretrained(tmp_path)
