"""Towers of timm, through transformers' wrapper; needs timm and torchvision."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_pico import PicoModel, PicoProcessor


timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
pytest.importorskip("torchvision", reason="timm prepares images with torchvision", exc_type=ImportError)


# Maps with their features first and last, and tokens with and without special ones.
@pytest.fixture(scope="module", params=["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def folder(request, tmp_path_factory):
    """A checkpoint as timm pushes it."""
    from timm.models import save_for_hf

    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    save_for_hf(timm.create_model(request.param), str(path), safe_serialization=True)
    config = json.loads((path / "config.json").read_text())
    config.pop("model_args", None)  # of newer versions of timm, which transformers would pass twice
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def model(folder, family_folder):
    return PicoModel.from_backbones(str(folder), family_folder, embedding_dim=16)


@pytest.fixture(scope="module")
def family_folder(tiny_processor, tmp_path_factory):
    from backbone_families import family

    path = tmp_path_factory.mktemp("text")
    family("bert").build().save_pretrained(path)
    tiny_processor.tokenizer.save_pretrained(path)
    return str(path)


def test_positions_and_special_tokens_are_tokens(model):
    timm_model = model.vision_model.timm_model
    features = timm_model.eval().forward_features(torch.ones(1, 3, 160, 160))
    outputs = model(pixel_values=torch.ones(1, 3, 160, 160))
    expected = features if features.dim() == 3 else features.flatten(2).transpose(1, 2)
    assert outputs.image_tokens.shape == (1, expected.shape[1], 16)
    tokens = model.alignment_head.project(expected, "image")
    torch.testing.assert_close(outputs.image_tokens, tokens)


def test_every_parameter_that_is_trained_gets_a_gradient(model):
    model.train()
    inputs = {"pixel_values": torch.rand(2, 3, 160, 160), "input_ids": torch.tensor([[1, 4, 2], [1, 5, 2]])}
    model(**inputs, return_loss=True).loss.backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert missing == []


def test_galleries_are_moved_in_the_layers_of_towers_with_batch_normalisation(model):
    generator = torch.Generator().manual_seed(0)
    known, gallery = (torch.randn(40, 3, 64, 64, generator=generator) * scale + scale for scale in (1, 2))
    if model.vision_model.config.architecture == "test_vit":
        known, gallery = (torch.nn.functional.interpolate(images, 160) for images in (known, gallery))
    model.fit_alignment([{"pixel_values": known}])
    alignment = model.align([{"pixel_values": gallery}])
    has_batch_norm = model.vision_model.config.architecture in ("test_resnet", "test_efficientnet")
    assert bool(alignment.layers) == has_batch_norm
    with torch.no_grad():
        moved = model.get_image_states(gallery, alignment=alignment).states.flatten(0, 1)
        training = model.get_image_states(known).states.flatten(0, 1)
    torch.testing.assert_close(moved.mean(dim=0), training.mean(dim=0), rtol=1e-3, atol=1e-3)


def test_saved_with_its_preprocessing_it_loads_and_scores_alike(folder, family_folder, model, tmp_path):
    processor = PicoProcessor.from_backbones(str(folder), family_folder)
    images = [Image.linear_gradient("L").resize((200, 170)).convert("RGB"), Image.new("RGB", (160, 160), (9, 99, 200))]
    inputs = processor(images=images, text=["a red circle"] * 2, padding=True, return_tensors="pt")
    theirs = AutoImageProcessor.from_pretrained(str(folder))(images)["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], theirs, rtol=0, atol=0.02)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = PicoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    again = PicoProcessor.from_pretrained(tmp_path)
    inputs = again(images=images, text=["a red circle"] * 2, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


@pytest.mark.parametrize(
    "options", [{"model_args": {"checkpoint_path": "/tmp/other.pth"}}, {"architecture": "hf-hub:user/name"}]
)
def test_a_configuration_that_has_timm_read_other_files_is_refused(folder, family_folder, options, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **options}))
    with pytest.raises(ValueError, match="has timm read other files"):
        PicoModel.from_backbones(str(tmp_path), family_folder)
