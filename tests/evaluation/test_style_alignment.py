"""Retrieval sets whose images are moved to where images of training lie."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader

import modeling_pico
from modeling_pico import CaptionedImageDataset, PicoDataCollator, PicoModel, RetrievalEvaluator, align_encoded
from modeling_pico.evaluation import EncodedRetrieval, measure_gallery


STYLES = ["ink", "oil"] * 37 + ["oil"]


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    """75 images; those of the one style are brighter, and of less contrast, than those of the other."""
    data = CaptionedImageDataset(tiny.rows(75, seed=4))
    batches = list(DataLoader(data, batch_size=14, collate_fn=PicoDataCollator(tiny.processor())))
    bright = iter(torch.tensor([style == "ink" for style in STYLES]).split(14))
    for batch in batches:
        rows = next(bright)
        batch["pixel_values"][rows] = batch["pixel_values"][rows] / 2 + 1
    return batches


@pytest.fixture(scope="module")
def model() -> PicoModel:
    """A model that knows where other images lie."""
    net = tiny.model()
    pixels = torch.randn(40, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(5))
    net.fit_alignment([{"pixel_values": pixels}])
    return net


@pytest.fixture(scope="module")
def encoded(model, batches) -> EncodedRetrieval:
    return RetrievalEvaluator().encode(model, batches)


@torch.no_grad()
def moved_by_numpy(model: PicoModel, batches: list[dict], styles: list[str | None]) -> torch.Tensor:
    """Token embeddings of the images by the definition, in float64."""
    states = torch.cat([model.get_image_states(batch["pixel_values"]).states for batch in batches]).double().numpy()
    moved = np.empty_like(states)
    for style in set(styles):
        rows = np.array([other == style for other in styles])
        values = states[rows].reshape(-1, states.shape[-1])
        mean, std = (getattr(model.image_moments, name).double().numpy() for name in ("mean", "std"))
        moved[rows] = (states[rows] - values.mean(0)) / values.std(0) * std + mean
    moved = torch.from_numpy(moved).float()
    return model.alignment_head.embed(moved, torch.ones(moved.shape[:2], dtype=torch.bool), None, "image")[0]


@pytest.mark.parametrize("styles", [None, STYLES])
def test_images_are_moved_and_texts_are_not(model, batches, encoded, styles):
    aligned = align_encoded(model, encoded, batches, styles)
    expected = moved_by_numpy(model, batches, STYLES if styles else [None] * 75)
    torch.testing.assert_close(aligned.image_tokens, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, encoded.image_tokens, atol=0.05)
    for name in ("image_mask", "text_tokens", "text_mask", "image_ids", "text_ids", "caption_codes"):
        assert torch.equal(getattr(aligned, name), getattr(encoded, name)), name


def test_batches_may_hold_hidden_states(model, batches, encoded):
    with torch.no_grad():
        cached = [{"image_states": model.get_image_states(batch["pixel_values"]).states} for batch in batches]
    for styles in (None, STYLES):
        aligned = align_encoded(model, encoded, cached, styles)
        expected = align_encoded(model, encoded, batches, styles)
        torch.testing.assert_close(aligned.image_tokens, expected.image_tokens)


def test_the_evaluation_moves_as_the_processor_does(model):
    """Of files, by `encode_images`, and of a data set, by `align_encoded`."""
    both = tiny.processor()
    data = CaptionedImageDataset(tiny.rows(75, seed=4))
    loader = DataLoader(data, batch_size=14, collate_fn=PicoDataCollator(both))
    evaluator = RetrievalEvaluator()
    aligned = align_encoded(model, evaluator.encode(model, loader), loader, STYLES)
    texts = [text for captions in data.dataset["captions"] for text in captions]
    images = [row["bytes"] for row in data.dataset["image"]]
    embeds = both.encode_images(model, images, align=True, styles=STYLES, batch_size=10)
    scores = both.score_retrieval(embeds, both.encode_texts(model, texts))
    torch.testing.assert_close(scores, evaluator.score(model, aligned), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half_precision(model, batches, encoded):
    halved = EncodedRetrieval(**{**vars(encoded), "image_tokens": encoded.image_tokens.half()})
    aligned = align_encoded(model, halved, batches)
    assert aligned.image_tokens.dtype == torch.float16
    expected = align_encoded(model, encoded, batches).image_tokens
    torch.testing.assert_close(aligned.image_tokens.float(), expected, rtol=0, atol=1e-3)


def test_styles_of_too_few_images_are_refused_or_left(model, batches, encoded):
    styles = ["rare"] * 5 + ["ink"] * 70
    with pytest.raises(ValueError, match=r"5 image\(s\) of the style 'rare'"):
        align_encoded(model, encoded, batches, styles)
    aligned = align_encoded(model, encoded, batches, styles, leave_small=True)
    torch.testing.assert_close(aligned.image_tokens[:5], encoded.image_tokens[:5])
    rest = moved_by_numpy(model, batches, styles)[5:]
    torch.testing.assert_close(aligned.image_tokens[5:], rest, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(model, batches, encoded):
    with pytest.raises(ValueError, match="gone through twice"):
        align_encoded(model, encoded, iter(batches))
    with pytest.raises(ValueError, match="3 styles for 75 images"):
        align_encoded(model, encoded, batches, STYLES[:3])
    with pytest.raises(ValueError, match="have 70 images, but the encoded set has 75"):
        align_encoded(model, encoded, batches[:-1])
    with pytest.raises(ValueError, match="gallery is empty"):
        align_encoded(model, encoded, [])
    with pytest.raises(ValueError, match="no moments of training"):
        align_encoded(tiny.model(), encoded, batches)


def test_moments_of_a_gallery(model, batches):
    found = measure_gallery(model, batches, STYLES)
    assert {style: moments.images for style, moments in found.items()} == {"ink": 37, "oil": 38}
    whole = measure_gallery(model, batches)[None]
    merged = found["ink"].merge(found["oil"])
    torch.testing.assert_close(merged.tokens.mean, whole.tokens.mean)
    torch.testing.assert_close(merged.tokens.std, whole.tokens.std)


def test_a_gallery_is_measured_without_dropout(model, batches):
    expected = measure_gallery(model, batches)[None].tokens
    in_training = tiny.model(dropout=0.5).train()
    in_training.load_state_dict(model.state_dict())
    torch.testing.assert_close(measure_gallery(in_training, batches)[None].tokens.std, expected.std)


def test_public_names():
    assert modeling_pico.align_encoded is align_encoded
    assert {"GalleryAlignment", "align_encoded"} <= set(dir(modeling_pico))
