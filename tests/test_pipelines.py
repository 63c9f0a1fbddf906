"""Pipelines of transformers with a PICO checkpoint."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_pico import PicoModel, pair_scores


LABELS = ["a red circle", "two blue stars above a small green square", "star"]


@pytest.fixture(scope="module")
def checkpoint(tiny_model, use_prototypes, tiny_processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pico")
    use_prototypes(tiny_model()).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(checkpoint) -> PicoModel:
    return PicoModel.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(2)]


@torch.no_grad()
def features(model, processor, images, texts):
    image = model.get_image_features(**processor.image_processor(images, return_tensors="pt"))
    return image, model.get_text_features(**processor.tokenizer(texts, padding=True, return_tensors="pt"))


def test_zero_shot_classification_is_the_softmax_of_scaled_scores(
    checkpoint, model, tiny_processor, images, monkeypatch
):
    errors = []
    monkeypatch.setattr(logging.getLogger("transformers.pipelines.base"), "error", errors.append)
    classify = pipeline(
        "zero-shot-image-classification", model=checkpoint, image_processor=tiny_processor.image_processor
    )
    assert not errors  # it says so of a class that it does not know
    found = classify(images, candidate_labels=LABELS, hypothesis_template="{}")
    image, text = features(model, tiny_processor, images, LABELS)
    scores = pair_scores(image.embeds, text.embeds, image.mask, text.mask)
    expected = (scores * model.logit_scale.exp()).softmax(dim=1)
    assert expected.std(dim=1).min() > 0.01
    for row, answers in zip(expected, found, strict=True):
        assert [answer["score"] for answer in answers] == sorted((a["score"] for a in answers), reverse=True)
        assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
            dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-6
        )


def test_zero_shot_classification_with_parts_and_batches(model, tiny_processor, images, checkpoint):
    parts = {"image_processor": tiny_processor.image_processor, "tokenizer": tiny_processor.tokenizer}
    classify = pipeline("zero-shot-image-classification", model=model, **parts)
    one_by_one = pipeline("zero-shot-image-classification", model=checkpoint, **parts)(images, candidate_labels=LABELS)
    assert classify(images, candidate_labels=LABELS) == one_by_one


@pytest.mark.parametrize("head", ["pico", "clip_style"])
def test_feature_extraction_gives_score_ready_embeddings(tiny_model, use_prototypes, tiny_processor, images, head):
    model = tiny_model(method=head)
    if head == "pico":
        use_prototypes(model)
    encode_image = pipeline("image-feature-extraction", model=model, image_processor=tiny_processor.image_processor)
    encode_text = pipeline("feature-extraction", model=model, tokenizer=tiny_processor.tokenizer)
    image_embeds = [row[0] for row in encode_image(images, return_tensors=True)]
    text_embeds = [row[0] for row in encode_text(LABELS, return_tensors=True)]
    image, text = features(model, tiny_processor, images, LABELS)
    torch.testing.assert_close(torch.stack(image_embeds), image.embeds)
    for row, embeds, mask in zip(text_embeds, text.embeds, text.mask, strict=True):
        torch.testing.assert_close(row, embeds[mask])
    torch.testing.assert_close(
        tiny_processor.score_retrieval(image_embeds, text_embeds),
        pair_scores(image.embeds, text.embeds, image.mask, text.mask),
    )


def test_pooled_image_features(checkpoint, model, tiny_processor, images):
    encode = pipeline("image-feature-extraction", model=checkpoint, image_processor=tiny_processor.image_processor)
    pooled = torch.tensor(encode(images, pool=True)).squeeze(1)
    torch.testing.assert_close(pooled, features(model, tiny_processor, images, LABELS)[0].pooler_output)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(2))


def test_one_side_alone_is_what_both_sides_give(model, batch):
    with torch.no_grad():
        both = model(**batch, output_hidden_states=True)
        image = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
        text = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        as_tuple = model(pixel_values=batch["pixel_values"], return_dict=False)
        pooled = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    kinds = ("embeds", "mask", "tokens", "semantic_probability")
    assert set(image) == {*(f"image_{kind}" for kind in kinds), "pooler_output", "vision_model_output"}
    assert set(text) == {*(f"text_{kind}" for kind in kinds), "pooler_output", "text_model_output"}
    for side, output in (("image", image), ("text", text)):
        for kind in kinds:
            assert torch.equal(output[f"{side}_{kind}"], both[f"{side}_{kind}"]), (side, kind)
    assert torch.equal(text.pooler_output, pooled)
    assert torch.equal(as_tuple[0], image.image_embeds)
    assert len(image.vision_model_output.hidden_states) == 3
