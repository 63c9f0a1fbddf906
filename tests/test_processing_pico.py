from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.utils import is_torchvision_available

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


def test_a_backend_that_is_missing_is_named(tiny_processor, tmp_path, caplog, monkeypatch):
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    tiny_processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    assert config["image_backend"] == "pil"
    file.write_text(json.dumps({**config, "image_backend": "torchvision"}))
    monkeypatch.setattr(logging.getLogger("modeling_pico"), "propagate", True)
    with caplog.at_level("WARNING", logger="modeling_pico"):
        again = PicoProcessor.from_pretrained(tmp_path)
    assert "'torchvision', which is not installed; 'pil' rounds pixels differently" in caplog.text
    assert again.image_backend == "torchvision"  # what the weights have seen stays known


def test_each_backend_is_loaded_as_it_was_saved(tiny_processor, tmp_path, images):
    pytest.importorskip("torchvision", reason="needs torchvision", exc_type=(ImportError, RuntimeError))
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    for kind, backend in ((CLIPImageProcessor, "torchvision"), (CLIPImageProcessorPil, "pil")):
        options = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
        made = PicoProcessor(kind(**options), tiny_processor.tokenizer)
        made.save_pretrained(tmp_path / backend)
        for again in (PicoProcessor, AutoProcessor):
            loaded = again.from_pretrained(tmp_path / backend)
            assert type(loaded.image_processor) is kind
            pixels = [part(images=images, return_tensors="pt").pixel_values for part in (made, loaded)]
            assert torch.equal(*pixels)


def test_from_backbones(tiny_processor, tiny_clip, images, tmp_path):
    tiny_processor.tokenizer.save_pretrained(tmp_path)
    arguments = {"images": images, "text": ["a red circle", "blue"], "padding": True, "return_tensors": "pt"}
    # The image processor that transformers takes here: torchvision's where it is installed.
    image_processor = AutoImageProcessor.from_pretrained(tiny_clip.folder)
    expected = PicoProcessor(image_processor, tiny_processor.tokenizer)(**arguments)
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
    scores = tiny_processor.score_retrieval(images, texts, image_mask, text_mask)
    assert torch.equal(scores, pair_scores(images, texts, image_mask, text_mask))
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
    model: PicoModel = use_prototypes(tiny_model())
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    scores = tiny_processor.score_retrieval(image.embeds, text.embeds, image.mask, text.mask)
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


@pytest.fixture
def shelf():
    """Four one-token items; the query (1, 0) scores twice the first feature: 0.4, 1.6, 1.6, -0.8."""
    return torch.tensor([[[0.2, 0.9]], [[0.8, 0.1]], [[0.8, -0.3]], [[-0.4, 0.0]]]), torch.tensor([[[1.0, 0.0]]])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 256])
def test_retrieve_by_hand(tiny_processor, shelf, batch_size):
    gallery, query = shelf
    # Of the equal scores of items 1 and 2 the lower index comes first, whatever batches they are in.
    scores, indices = tiny_processor.retrieve(query, gallery, k=3, batch_size=batch_size)
    torch.testing.assert_close(scores, torch.tensor([[1.6, 1.6, 0.4]]))
    assert indices.tolist() == [[1, 2, 0]] and indices.dtype == torch.int64
    assert tiny_processor.retrieve(query, gallery, k=1, batch_size=batch_size)[1].tolist() == [[1]]
    # A gallery smaller than k is returned whole.
    scores, indices = tiny_processor.retrieve(query, gallery, batch_size=batch_size)
    torch.testing.assert_close(scores, torch.tensor([[1.6, 1.6, 0.4, -0.8]]))
    assert indices.tolist() == [[1, 2, 0, 3]]


def test_retrieve_ranks_an_item_without_tokens_at_zero(tiny_processor, shelf):
    gallery, query = shelf
    mask = torch.tensor([[True], [False], [True], [True]])
    scores, indices = tiny_processor.retrieve(query, gallery, gallery_mask=mask, k=4, batch_size=3)
    assert indices.tolist() == [[2, 0, 1, 3]] and scores[0, 2] == 0
    scores, indices = tiny_processor.retrieve(query, gallery, torch.zeros(1, 1, dtype=torch.bool), k=2, batch_size=3)
    assert indices.tolist() == [[0, 1]] and scores.tolist() == [[0, 0]]


@pytest.mark.parametrize(("k", "batch_size"), [(1, 4), (3, 2), (7, 3), (23, 5), (50, 64)])
def test_retrieve_equals_sorting_all_scores_in_both_directions(tiny_processor, k, batch_size):
    generator = torch.Generator().manual_seed(k)
    # Few small integers and powers of two for lengths: exact scores with many ties.
    images = torch.randint(-1, 2, (23, 4, 3), generator=generator).float()
    texts = torch.randint(-1, 2, (9, 2, 3), generator=generator).float()
    image_mask = torch.arange(4) < torch.tensor([0, 1, 2, 4])[torch.randint(4, (23, 1), generator=generator)]
    text_mask = torch.ones(9, 2, dtype=torch.bool)
    matrix = pair_scores(images, texts, image_mask)
    for query, gallery, masks, expected in (
        (texts, images, {"query_mask": text_mask, "gallery_mask": image_mask}, matrix.T),
        (images, texts, {"query_mask": image_mask, "gallery_mask": text_mask}, matrix),
    ):
        best, order = expected.sort(dim=1, descending=True, stable=True)
        assert any(len(row.unique()) < len(row) for row in best[:, :k]) or k == 1
        scores, indices = tiny_processor.retrieve(query, gallery, **masks, k=k, batch_size=batch_size)
        assert torch.equal(scores, best[:, :k]) and torch.equal(indices, order[:, :k])


def test_retrieve_of_lists_and_of_no_queries(tiny_processor, encoded):
    images, texts, image_mask, text_mask = encoded
    image_list = [row[mask] for row, mask in zip(images, image_mask, strict=True)]
    text_list = [row[mask] for row, mask in zip(texts, text_mask, strict=True)]
    expected = tiny_processor.retrieve(texts, images, text_mask, image_mask, k=2)
    for batch_size in (1, 2, 8):
        scores, indices = tiny_processor.retrieve(text_list, image_list, k=2, batch_size=batch_size)
        torch.testing.assert_close(scores, expected[0])
        assert torch.equal(indices, expected[1])
    assert [part.shape for part in tiny_processor.retrieve(texts[:0], images)] == [(0, 3), (0, 3)]
    assert tiny_processor.retrieve([], image_list, k=1)[1].shape == (0, 1)


def test_retrieve_scores_batches_only(tiny_processor, monkeypatch):
    module = sys.modules[type(tiny_processor).__module__]
    shapes = []
    original = module.pair_scores

    def watched(*args, **kwargs):
        scores = original(*args, **kwargs)
        shapes.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(module, "pair_scores", watched)
    tiny_processor.retrieve(torch.randn(5, 2, 3), torch.randn(7, 4, 3), k=2, batch_size=3)
    # The side with the longer samples is first.
    assert shapes == [(3, 3), (3, 3), (1, 3), (3, 2), (3, 2), (1, 2)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_retrieve_from_a_gallery_in_main_memory(tiny_processor):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(5, 6, 16, generator=generator), torch.randn(40, 12, 16, generator=generator)
    expected = tiny_processor.retrieve(queries, gallery, k=4, batch_size=16)
    scores, indices = tiny_processor.retrieve(queries.cuda(), gallery, k=4, batch_size=16)
    torch.testing.assert_close(scores, expected[0], rtol=1e-2, atol=1e-2)
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 1, 3), torch.ones(0, 1, 3)), {}, "gallery is empty"),
        (([torch.ones(1, 3)], []), {}, "gallery is empty"),
        ((torch.ones(2, 1, 3), torch.ones(2, 1, 3)), {"k": 0}, "k=0 and batch_size=256"),
        ((torch.ones(2, 1, 3), torch.ones(2, 1, 3)), {"batch_size": 0}, "k=10 and batch_size=0"),
        ((torch.ones(2, 1, 3), torch.ones(2, 1, 4)), {}, "has dim 3 and text_embeds has dim 4"),
        ((torch.ones(2, 3), torch.ones(2, 1, 3)), {}, r"embeds has shape \(2, 3\); expected"),
        (
            (torch.ones(2, 1, 3), torch.ones(2, 1, 3), None, torch.ones(3, 1, dtype=torch.bool)),
            {},
            r"mask has shape \(3, 1\); text_embeds of shape \(2, 1, 3\) needs \(2, 1\)",
        ),
        (
            ([torch.ones(1, 3)], torch.ones(2, 1, 3), torch.ones(1, 1, dtype=torch.bool)),
            {},
            "carries its own lengths; give no mask",
        ),
    ],
)
def test_retrieve_names_bad_input(tiny_processor, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor.retrieve(*arguments, **options)
