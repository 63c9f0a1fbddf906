"""Images and texts as users give them are prepared and encoded as in training."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from modeling_pico import CaptionedImageDataset, PicoDataCollator, PicoModel, PicoProcessor, decode_image
from modeling_pico.data import BadImageError


TEXTS = ["a red circle", "two blue stars above a small green square", "star"]


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Files whose pixels depend on who decodes them."""
    colours = Image.fromarray(noise(20, 30, 3).astype(np.uint8))
    transparent = Image.fromarray(noise(20, 30, 4).astype(np.uint8))
    grey, palette = transparent.convert("LA"), colours.quantize(8)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "plain": encoded(colours, "PNG"),
        "transparent": encoded(transparent, "PNG"),
        "transparent grey": encoded(grey, "PNG"),
        "transparent colour of a palette": encoded(palette, "PNG", transparency=0),
        "16 bits": encoded(Image.fromarray(noise(20, 30, high=2**16).astype(np.uint16)), "PNG"),
        "turned": encoded(colours, "JPEG", exif=turned),
        "CMYK": encoded(colours.convert("CMYK"), "JPEG"),
        "animation": encoded(colours, "GIF", save_all=True, append_images=[Image.new("RGB", (30, 20))]),
    }


@pytest.fixture(scope="module")
def trained_on(tiny_processor) -> dict[str, torch.Tensor]:
    """The pixels that training sees of each picture."""
    files = pictures()
    table = {
        "image": [{"bytes": content, "path": None} for content in files.values()],
        "captions": [["red"]] * len(files),
        "image_id": list(files),
    }
    features = datasets.Features(
        image=datasets.Image(decode=False),
        captions=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("string"),
    )
    dataset = CaptionedImageDataset(datasets.Dataset.from_dict(table, features=features))
    batch = PicoDataCollator(tiny_processor)([dataset[row] for row in range(len(files))])
    return dict(zip(files, batch["pixel_values"], strict=True))


@pytest.mark.parametrize("name", pictures())
def test_the_processor_gives_the_pixels_of_training(tiny_processor, trained_on, tmp_path, name):
    content = pictures()[name]
    path = tmp_path / "picture"
    path.write_bytes(content)
    for value in (path, str(path), content, Image.open(path), {"bytes": content, "path": None}):
        for images in (value, [value]):
            pixels = tiny_processor(images=images, return_tensors="pt")["pixel_values"]
            assert torch.equal(pixels[0], trained_on[name]), type(value)


def test_arrays_and_tensors_are_taken_as_they_are(tiny_processor, trained_on):
    pixels = np.asarray(decode_image(pictures()["plain"]))
    for image in (pixels, torch.from_numpy(pixels.transpose(2, 0, 1).copy())):
        assert torch.equal(tiny_processor(images=[image], return_tensors="pt")["pixel_values"][0], trained_on["plain"])


def test_what_is_no_image_is_named(tiny_processor, tmp_path):
    for value, message in ((b"no image", "8 bytes is not an image"), (tmp_path / "gone.png", "gone.png.*not exist")):
        with pytest.raises(BadImageError, match=message):
            tiny_processor(images=[value], return_tensors="pt")


# Texts


def test_texts_are_cut_at_the_length_that_is_saved(tiny_processor, tmp_path):
    long = "a red circle " * 20
    tiny_processor.save_pretrained(tmp_path)
    # Tokenizers may come with a length in their file, as MiniLM's does.
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(16)
    backend.save(str(tmp_path / "tokenizer.json"))
    processor = PicoProcessor.from_pretrained(tmp_path)
    processor.tokenizer.model_max_length = 7
    samples = [{"image": Image.new("RGB", (16, 16)), "caption": long, "image_id": 0}]
    trained = PicoDataCollator(processor)(samples)["input_ids"]
    assert trained.shape == (1, 7)
    processor.save_pretrained(tmp_path)
    again = PicoProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(text=[long], return_tensors="pt").input_ids, trained)
    # What the pipelines and the ONNX page load.
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(alone([long], truncation=True, return_tensors="pt").input_ids, trained)
    assert again(text=[long], truncation=False).input_ids[0][:6] == trained[0, :6].tolist()
    assert len(again(text=[long], text_kwargs={"truncation": False}).input_ids[0]) > 60
    assert again(text=[long], text_kwargs={"max_length": 5}, return_tensors="pt").input_ids.shape == (1, 5)


class LeftPaddingTokenizer(PreTrainedTokenizerFast):
    """Pads on the left without saying so in its initial arguments, as Gemma's does."""

    padding_side = "left"


def test_tokenizers_that_pad_on_the_left_are_made_to_pad_on_the_right(tiny_processor, tmp_path):
    tiny_processor.tokenizer.save_pretrained(tmp_path)
    tokenizer = LeftPaddingTokenizer.from_pretrained(tmp_path)
    tokenizer.init_kwargs.pop("padding_side", None)
    tokenizer.padding_side = "left"
    assert tokenizer(TEXTS, padding=True).attention_mask[0][0] == 0
    processor = PicoProcessor(image_processor=tiny_processor.image_processor, tokenizer=tokenizer)
    processor.save_pretrained(tmp_path)
    for made in (processor.tokenizer, LeftPaddingTokenizer.from_pretrained(tmp_path)):
        mask = made(TEXTS, padding=True).attention_mask
        assert all(row == sorted(row, reverse=True) for row in mask) and mask[0][-1] == 0


# Encoding


@pytest.fixture(scope="module", params=["pico", "clip_style"])
def model(request, tiny_model, use_prototypes) -> PicoModel:
    made = tiny_model(method=request.param)
    return use_prototypes(made) if request.param == "pico" else made


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    found = []
    for number, content in enumerate(pictures().values()):
        found.append(tmp_path / str(number))
        found[-1].write_bytes(content)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_encoded_lists_give_the_scores_of_the_model(model, tiny_processor, paths, batch_size):
    images = tiny_processor.encode_images(model, paths, batch_size=batch_size)
    texts = tiny_processor.encode_texts(model, TEXTS, batch_size=batch_size)
    inputs = tiny_processor(images=paths, text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    for row, mask, tokens in zip(outputs.text_embeds, outputs.text_mask, texts, strict=True):
        torch.testing.assert_close(tokens, row[mask])
    assert not any(tokens.requires_grad for tokens in images + texts)
    expected = outputs.logits_per_image / outputs.logit_scale
    torch.testing.assert_close(tiny_processor.score_retrieval(images, texts), expected)
    scores, indices = tiny_processor.retrieve(texts, images, k=2)
    best = expected.T.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores, best.values[:, :2])
    assert torch.equal(indices, best.indices[:, :2])


def test_encoding_to_numpy_which_score_and_search_take(model, tiny_processor, paths):
    images = tiny_processor.encode_images(model, paths, convert_to_numpy=True)
    texts = tiny_processor.encode_texts(model, TEXTS, convert_to_numpy=True)
    assert all(type(tokens) is np.ndarray and tokens.dtype == np.float32 for tokens in images + texts)
    tensors = tiny_processor.encode_images(model, paths), tiny_processor.encode_texts(model, TEXTS)
    expected = tiny_processor.score_retrieval(*tensors)
    assert torch.equal(tiny_processor.score_retrieval(images, texts), expected)
    assert torch.equal(tiny_processor.score_retrieval(np.stack(images), texts), expected)
    for queries, gallery in ((texts, images), (tensors[1], np.stack(images)), (texts, tensors[0])):
        scores, indices = tiny_processor.retrieve(queries, gallery, k=3)
        assert torch.equal(indices, tiny_processor.retrieve(tensors[1], tensors[0], k=3)[1])
    # As the ONNX encoders return them.
    inputs = tiny_processor(text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = model.get_text_features(**inputs)
    padded = features.embeds.numpy(), features.mask.numpy()
    scores = tiny_processor.score_retrieval(images, padded[0], text_mask=padded[1])
    torch.testing.assert_close(scores, expected)


def test_encoding_leaves_the_mode_of_the_model_and_uses_no_dropout(tiny_processor, tiny_model, paths):
    model = tiny_model()
    expected = tiny_processor.encode_texts(model, TEXTS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    found = tiny_processor.encode_texts(model, TEXTS)
    assert model.training and model.text_model.training
    assert all(torch.equal(ours, tokens) for ours, tokens in zip(found, expected, strict=True))
    with pytest.raises(BadImageError):
        tiny_processor.encode_images(model, [b""])
    assert model.training


def test_encoding_in_half_precision(tiny_processor, tiny_model, paths):
    model = tiny_model().to(torch.bfloat16)
    images = tiny_processor.encode_images(model, paths, convert_to_numpy=True)
    assert {tokens.dtype for tokens in images} == {np.dtype(np.float32)}
    assert len(tiny_processor.encode_texts(model, TEXTS)) == 3


def test_one_item_is_a_list_of_one_and_none_an_empty_one(tiny_processor, tiny_model, paths):
    model = tiny_model()
    (image,) = tiny_processor.encode_images(model, paths[0])
    for value in (str(paths[0]), paths[0].read_bytes(), Image.open(paths[0])):
        assert torch.equal(tiny_processor.encode_images(model, value)[0], image)
    (text,) = tiny_processor.encode_texts(model, "star")
    torch.testing.assert_close(text, tiny_processor.encode_texts(model, TEXTS)[2])
    assert tiny_processor.encode_images(model, []) == tiny_processor.encode_texts(model, []) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tiny_processor.encode_texts(model, TEXTS, batch_size=0)


# Padding that lost its mask


@pytest.mark.parametrize("text_special_tokens", [True, False])
def test_pipelines_in_batches_score_as_the_model_does(tiny_model, tiny_processor, paths, text_special_tokens):
    model = tiny_model(method="fine_grained", text_special_tokens=text_special_tokens)
    images = [decode_image(path) for path in paths]
    expected = tiny_processor.score_retrieval(
        tiny_processor.encode_images(model, images), tiny_processor.encode_texts(model, TEXTS)
    )
    encode_image = pipeline("image-feature-extraction", model=model, image_processor=tiny_processor.image_processor)
    encode_text = pipeline("feature-extraction", model=model, tokenizer=tiny_processor.tokenizer)
    for batch_size in (1, 3):
        image_lists = [np.array(row[0]) for row in encode_image(images, batch_size=batch_size)]
        text_lists = [
            row[0] for row in encode_text(TEXTS, truncation=True, batch_size=batch_size, return_tensors=True)
        ]
        scores = tiny_processor.score_retrieval([row.astype(np.float32) for row in image_lists], text_lists)
        torch.testing.assert_close(scores, expected)
    padded = [row[0] for row in encode_text(TEXTS, truncation=True, batch_size=3, return_tensors=True)]
    assert len({len(row) for row in padded}) == 1 and not padded[2][-1].any()


def test_tokens_of_zeros_do_not_count_without_a_mask(tiny_processor):
    images = torch.tensor([[[-0.6, 0.0], [0.0, 0.0]]])
    texts = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    # Padding would be the best partner of both, and halve the means.
    for text in (texts, list(texts), list(texts.numpy())):
        torch.testing.assert_close(tiny_processor.score_retrieval(images, text), torch.tensor([[-1.2]]))
        torch.testing.assert_close(tiny_processor.retrieve(text, images)[0], torch.tensor([[-1.2]]))
    everything = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(tiny_processor.score_retrieval(images, texts, *everything), torch.tensor([[0.0]]))


def test_scores_that_are_no_numbers_are_not_ranked(tiny_processor):
    gallery = torch.tensor([[[1.0, 0.0]], [[float("nan"), 0.0]]])
    with pytest.raises(ValueError, match="Some scores are not numbers"):
        tiny_processor.retrieve(torch.ones(1, 1, 2), gallery, k=1)
