from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_pico import PicoModel, PicoProcessor, pair_scores


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.new("RGB", (20, 14), color) for color in ("red", "blue")]


def test_call_gives_the_inputs_of_the_model(tiny_processor, tiny_model, images):
    inputs = tiny_processor(images=images, text=["a red circle", "blue"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert inputs["attention_mask"].sum(dim=1).tolist()[0] > inputs["attention_mask"].sum(dim=1).tolist()[1]
    assert inputs["input_ids"][:, 0].tolist() == [2, 2]
    with torch.no_grad():
        assert tiny_model()(**inputs).logits_per_image.shape == (2, 2)


def test_call_takes_one_side_alone(tiny_processor, images):
    assert set(tiny_processor(images=images, return_tensors="pt")) == {"pixel_values"}
    assert set(tiny_processor(text="blue", return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_parts_answer_as_themselves(tiny_processor, images):
    text = ["a red circle", "two blue stars"]
    inputs = tiny_processor(images=images, text=text, padding=True, return_tensors="pt")
    assert torch.equal(
        inputs["input_ids"], tiny_processor.tokenizer(text, padding=True, return_tensors="pt").input_ids
    )
    pixels = tiny_processor.image_processor(images, return_tensors="pt").pixel_values
    assert torch.equal(inputs["pixel_values"], pixels)
    assert tiny_processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)[0].split()[0] == "a"


def test_save_and_load(tiny_processor, images, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    arguments = {"images": images, "text": ["a red circle", "blue"], "padding": True, "return_tensors": "pt"}
    expected = tiny_processor(**arguments)
    for again in (PicoProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(again, PicoProcessor)
        assert type(again.image_processor) is type(tiny_processor.image_processor)
        inputs = again(**arguments)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert again.tokenizer.model_max_length == 16


def test_from_backbones(tiny_processor, tiny_clip, images, tmp_path):
    tiny_processor.tokenizer.save_pretrained(tmp_path)
    arguments = {"images": images, "text": ["a red circle", "blue"], "padding": True, "return_tensors": "pt"}
    expected = tiny_processor(**arguments)
    for processor in (
        PicoProcessor.from_backbones(tiny_clip.folder),
        PicoProcessor.from_backbones(tiny_clip.folder, str(tmp_path)),
    ):
        inputs = processor(**arguments)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.fixture
def encoded():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(3, 4, 6, generator=generator), torch.randn(2, 5, 6, generator=generator)
    text_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    image_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    return images, texts, image_mask, text_mask


def test_score_retrieval_of_tensors_with_and_without_masks(tiny_processor, encoded):
    images, texts, image_mask, text_mask = encoded
    assert torch.equal(tiny_processor.score_retrieval(images, texts), pair_scores(images, texts))
    scores = tiny_processor.score_retrieval(images, texts, image_mask, text_mask, negative_slope=0.1)
    assert torch.equal(scores, pair_scores(images, texts, image_mask, text_mask, negative_slope=0.1))
    assert scores.dtype == torch.float32
    assert scores.shape == (3, 2)


def test_score_retrieval_of_lists_by_hand(tiny_processor):
    images = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8]])]
    texts = [torch.tensor([[1.0, 0.0]])]
    # Mean over patches of the best word, plus mean over words of the best patch.
    torch.testing.assert_close(tiny_processor.score_retrieval(images, texts), torch.tensor([[0.5 + 1.0], [0.6 + 0.6]]))


def test_score_retrieval_of_lists_equals_masked_tensors(tiny_processor, encoded):
    images, texts, image_mask, text_mask = encoded
    image_list = [row[mask] for row, mask in zip(images, image_mask, strict=True)]
    text_list = [row[mask] for row, mask in zip(texts, text_mask, strict=True)]
    expected = pair_scores(images, texts, image_mask, text_mask)
    torch.testing.assert_close(tiny_processor.score_retrieval(image_list, text_list), expected)
    torch.testing.assert_close(tiny_processor.score_retrieval(image_list, texts, text_mask=text_mask), expected)


def test_score_retrieval_equals_the_logits_of_the_model(tiny_processor, tiny_model, use_prototypes, batch):
    model: PicoModel = use_prototypes(tiny_model(negative_slope=0.5))
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    scores = tiny_processor.score_retrieval(
        image.embeds, text.embeds, image.mask, text.mask, negative_slope=model.config.negative_slope
    )
    assert not scores.requires_grad
    outputs = model(**batch)
    torch.testing.assert_close(scores * outputs.logit_scale.detach(), outputs.logits_per_image.detach())


def test_wrong_embeddings_are_refused(tiny_processor, encoded):
    images, texts, image_mask, _ = encoded
    with pytest.raises(ValueError, match="empty list of embeddings"):
        tiny_processor.score_retrieval([], texts)
    with pytest.raises(ValueError, match="carries its own lengths; give no mask"):
        tiny_processor.score_retrieval(list(images), texts, image_mask)
    with pytest.raises(ValueError, match="dim"):
        tiny_processor.score_retrieval(images, texts[:, :, :3])
