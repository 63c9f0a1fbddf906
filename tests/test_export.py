"""Encoders without PyTorch: ONNX files, run by onnxruntime, give what the model gives."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BertConfig, ViTConfig

from modeling_pico import PicoConfig, PicoModel, export
from modeling_pico.export import ImageEncoder, TextEncoder, export_onnx


needs_onnx = pytest.mark.skipif(
    any(export.importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason='needs the packages of pip install "modeling-pico[onnx]"',
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def learned(use_prototypes) -> PicoModel:
    vision = ViTConfig(**SIZES, image_size=16, patch_size=8)
    text = BertConfig(**SIZES, vocab_size=64, max_position_embeddings=32)
    config = PicoConfig(vision_config=vision, text_config=text, embedding_dim=12, num_style_prototypes=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = PicoModel(config).eval()
        for parameter in [*model.vision_model.parameters(), *model.text_model.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return use_prototypes(model)


@pytest.fixture(scope="module")
def fixed(tiny_clip, use_prototypes) -> PicoModel:
    options = {"style_probability": "purity", "column_mode": "quantile", "column_length": 5}
    return use_prototypes(PicoModel.from_backbones(tiny_clip.folder, num_style_prototypes=3, **options))


@torch.no_grad()
def assert_same_as(model: PicoModel, folder: Path) -> None:
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    image_encoder, text_encoder = (
        onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        for name in (export.IMAGE_ENCODER, export.TEXT_ENCODER)
    )
    for count, words in ((1, 3), (3, 9), (2, 16)):
        pixels = torch.randn(count, 3, 16, 16, generator=generator)
        ids = torch.randint(4, 64, (count, words), generator=generator)
        ids[:, 0], ids[:, -1] = 2, 3
        if words > 3:  # the first text is shorter than the others
            ids[0, 3], ids[0, 4:] = 3, 0
        mask = (ids != 0).long()
        image, text = model.get_image_features(pixels), model.get_text_features(ids, mask)
        assert image.semantic_probability is None or image.semantic_probability.std() > 0.01
        found = image_encoder.run(None, {"pixel_values": pixels.numpy()})
        found += text_encoder.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        image_embeds, image_mask, text_embeds, text_mask = found
        np.testing.assert_allclose(image_embeds, image.embeds.numpy(), atol=1e-5)
        np.testing.assert_allclose(text_embeds, text.embeds.numpy(), atol=1e-5)
        assert np.array_equal(image_mask, image.mask.numpy()) and np.array_equal(text_mask, text.mask.numpy())
        # As docs/search.md shows it.
        similarity = image_embeds[0][image_mask[0]] @ text_embeds[0][text_mask[0]].T
        score = similarity.max(axis=1).mean() + similarity.max(axis=0).mean()
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        assert score == pytest.approx((logits.logits_per_image / logits.logit_scale)[0, 0].item(), abs=1e-5)


def test_examples_fit_a_tower_for_short_texts(tiny_processor):
    processor = copy.deepcopy(tiny_processor)
    processor.tokenizer.model_max_length = 4
    _, texts = export._examples(processor, torch.device("cpu"))
    assert texts["input_ids"].shape == texts["attention_mask"].shape == (2, 4)


@needs_onnx
def test_learned_weights_of_vit_and_bert_from_the_command_line(
    learned, tiny_processor, tmp_path, capfd, no_progress_bars
):
    folder = tmp_path / "new" / "folder"
    copy.deepcopy(learned).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    capfd.readouterr()
    export.main([str(tmp_path / "model"), str(folder)])
    # One line of what was written, and nothing of the exporter.
    said = capfd.readouterr()
    written = "image_encoder.onnx and text_encoder.onnx are written, with their preprocessing."
    assert said.out == f"{folder}: {written}\n" and said.err == ""
    assert {path.name for path in folder.glob("*.onnx")} == {"image_encoder.onnx", "text_encoder.onnx"}
    assert_same_as(PicoModel.from_pretrained(tmp_path / "model", dtype=torch.float32), folder)
    # The preprocessing lies beside the encoders, and needs nothing of this package.
    assert not list(folder.glob("*.py"))
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert image_processor.to_dict()["size"] == tiny_processor.image_processor.to_dict()["size"]
    tokens = AutoTokenizer.from_pretrained(folder)(["a red circle"], return_tensors="np")
    assert tokens["input_ids"].tolist() == tiny_processor.tokenizer(["a red circle"])["input_ids"]


@needs_onnx
@pytest.mark.slow
def test_fixed_weights_of_clip(fixed, tiny_processor, tmp_path):
    fixed.train()
    paths = export_onnx(fixed, tiny_processor, tmp_path)
    assert fixed.training and fixed.text_model.training
    assert [path.name for path in paths] == ["image_encoder.onnx", "text_encoder.onnx"]
    assert_same_as(fixed.eval(), tmp_path)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"vision": "swin", "text": "roberta", "method": "fine_grained", "text_special_tokens": False},
        {"vision": "dinov2", "method": "clip_style", "pooling": "class_token"},
        {"style_probability": "purity", "vision_special_tokens": False},
        {"column_mode": "quantile", "column_length": 6},
    ],
    ids=lambda options: options.get("style_probability", options.get("method", "style_rates")),
)
def test_other_heads_and_towers(tiny_model, use_prototypes, tiny_processor, tmp_path, options):
    model = tiny_model(**options)
    if model.style_prototypes is not None:
        use_prototypes(model)
    export_onnx(model, tiny_processor, tmp_path)
    assert_same_as(model, tmp_path)


def test_text_encoder_goes_through_torch_export(learned, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    axes = dict.fromkeys(inputs, {0: torch.export.Dim("batch"), 1: torch.export.Dim("words", max=32)})
    with torch.no_grad():
        program = torch.export.export(TextEncoder(learned.eval()), (), inputs, dynamic_shapes=axes)
        for rows, words in ((slice(0, 2), 6), (slice(0, 3), 9)):
            given = {name: value[rows, :words] for name, value in inputs.items()}
            embeds, mask = program.module()(**given)
            expected = learned.get_text_features(**given)
            torch.testing.assert_close(embeds, expected.embeds)
            assert torch.equal(mask, expected.mask)


def test_encoders_give_score_ready_embeddings(learned, batch):
    with torch.no_grad():
        embeds, mask = ImageEncoder(learned.eval())(batch["pixel_values"])
        features = learned.get_image_features(batch["pixel_values"])
    assert torch.equal(embeds, features.embeds) and torch.equal(mask, features.mask)


def test_wrong_input(learned, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs onnx and onnxscript: pip install "modeling-pico\[onnx\]"'):
        export_onnx(learned, tiny_processor, tmp_path)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"in torch.bfloat16; ONNX export takes float32"):
        export_onnx(PicoModel(learned.config).to(torch.bfloat16), tiny_processor, tmp_path)
    assert not list(tmp_path.iterdir())
