"""The handler of endpoints lies beside a saved model, and answers where the package is not installed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from modeling_pico import PicoModel, PicoProcessor
from modeling_pico.model.handler import EndpointHandler


def encoded(number: int, mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.fromarray(tiny.pixels(number)).convert(mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGES = [encoded(number) for number in range(3)]
TEXTS = ["a red thing", "left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    saved = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(saved)
    tiny.processor().save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def handler(folder) -> EndpointHandler:
    return EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, Any]:
    model, processor = PicoModel.from_pretrained(folder).eval(), PicoProcessor.from_pretrained(folder)
    files = [base64.b64decode(image) for image in IMAGES]
    images, texts = processor.encode_images(model, files), processor.encode_texts(model, TEXTS)
    with torch.no_grad():
        pixels = processor(images=files, return_tensors="pt")
        pooled = model.get_image_features(**pixels).pooler_output
        labels = processor(
            text=["This is a photo of red.", "This is a photo of a ring."], return_tensors="pt", padding=True
        )
        shares = model(**labels, **pixels).logits_per_image.softmax(dim=1)
    return {
        "image_embeds": [embeds.tolist() for embeds in images],
        "text_embeds": [embeds.tolist() for embeds in texts],
        "pooled": pooled.tolist(),
        "scores": processor.score_retrieval(images, texts).tolist(),
        "shares": shares,
    }


def close(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=1e-4)


def test_answers_of_a_saved_folder_without_the_package(folder, expected, tmp_path, run_without_package):
    # As the servers of endpoints load it.
    request = {"inputs": {"images": IMAGES, "texts": TEXTS}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    printed = run_without_package(
        """
        import importlib.util, json, pathlib

        spec = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handler = module.EndpointHandler(sys.argv[1])
        assert type(handler.model).__module__.startswith("transformers_modules")
        print(json.dumps(handler(json.loads(pathlib.Path(sys.argv[2]).read_text()))))
        # What is saved from there has the handler too.
        handler.processor.save_pretrained(sys.argv[3])
        """,
        folder,
        tmp_path / "request.json",
        tmp_path / "again",
    )
    close(json.loads(printed.splitlines()[-1])["scores"], expected["scores"])
    assert (tmp_path / "again" / "handler.py").read_bytes() == (folder / "handler.py").read_bytes()


def test_embeddings_of_one_side(handler, expected):
    found = handler({"inputs": {"images": IMAGES}})
    assert list(found) == ["image_embeds"] and json.dumps(found)
    close(found["image_embeds"], expected["image_embeds"])
    found = handler({"inputs": {"texts": TEXTS}, "parameters": {}})
    assert list(found) == ["text_embeds"]
    close(found["text_embeds"], expected["text_embeds"])
    # A body that is an image.
    image = Image.open(io.BytesIO(base64.b64decode(IMAGES[0])))
    close(handler({"inputs": image})["image_embeds"], expected["image_embeds"][:1])


def test_pooled_vectors(handler, expected):
    found = handler({"inputs": {"images": IMAGES, "texts": TEXTS}, "parameters": {"pooled": True}})
    assert list(found) == ["image_embeds", "text_embeds"] and len(found["text_embeds"]) == 2
    close(found["image_embeds"], expected["pooled"])


def test_labels(handler, expected):
    parameters = {"candidate_labels": ["red", "a ring"]}
    found = handler({"inputs": [f"data:image/png;base64,{image}" for image in IMAGES], "parameters": parameters})
    for answer, shares in zip(found, expected["shares"], strict=True):
        assert answer[0]["score"] >= answer[1]["score"]
        by_label = {entry["label"]: entry["score"] for entry in answer}
        assert [by_label["red"], by_label["a ring"]] == pytest.approx(shares.tolist(), abs=1e-5)
    for alone in (
        handler({"inputs": IMAGES[0], "parameters": parameters}),
        *handler({"inputs": {"images": IMAGES[:1]}, "parameters": parameters}),
    ):
        assert [entry["label"] for entry in alone] == [entry["label"] for entry in found[0]]
        assert alone[0]["score"] == pytest.approx(found[0][0]["score"], abs=1e-5)
    other = handler({"inputs": IMAGES[0], "parameters": {**parameters, "hypothesis_template": "{} up here"}})
    assert other[0]["score"] != pytest.approx(found[0][0]["score"], abs=1e-4)


def test_images_are_prepared_as_in_training(handler):
    clear = encoded(0, "RGBA")  # opaque
    close(*(handler({"inputs": {"images": images}})["image_embeds"] for images in ([clear], IMAGES[:1])))


LABELS = {"candidate_labels": ["red"]}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "`inputs` must be an object with images, texts, got NoneType"),
        ({"inputs": "a red circle"}, "`inputs` must be an object with images, texts, got str"),
        ({"inputs": {}}, "`inputs` must hold images or texts, or both"),
        ({"inputs": {"image": IMAGES}}, "`inputs` holds 'image'; allowed are images, texts"),
        ({"inputs": {"texts": TEXTS}, "parameters": {"k": 1}}, "`parameters` holds 'k'; allowed are candidate_labels"),
        ({"inputs": {"texts": []}}, "`texts` must be a list of one or more, got an empty list"),
        ({"inputs": {"texts": TEXTS}, "parameters": {"pooled": "no"}}, "`pooled` must be true or false, got 'no'"),
        ({"inputs": {"texts": TEXTS}, "parameters": {"hypothesis_template": "{}"}}, "goes with `candidate_labels`"),
        ({"inputs": IMAGES[0], "parameters": {"pooled": True, "candidate_labels": ["red"]}}, "goes with embeddings"),
        ({"inputs": {"texts": "left"}}, "`texts` must be a list of one or more, got str"),
        ({"inputs": {"texts": ["left", " "]}}, "`texts` must be a list of texts that are not empty"),
        ({"inputs": {"images": ["https://example.com/a.png"]}}, "Addresses are not fetched and paths are not opened"),
        ({"inputs": {"images": ["../a.png"]}}, "must be the base64 of its file, or a data URL, got '../a.png'"),
        ({"inputs": {"images": ["data:image/png,abc"]}}, "A data URL of an image must be in base64"),
        ({"inputs": {"images": [{"path": "a.png"}]}}, "must be the base64 of its file, or a data URL, got dict"),
        ({"inputs": {"images": ["bm8gaW1hZ2U="]}}, "8 bytes"),
        ({"inputs": IMAGES[0], "parameters": {"candidate_labels": "red"}}, "`candidate_labels` must be a list"),
        (
            {"inputs": IMAGES[0], "parameters": {**LABELS, "hypothesis_template": "a"}},
            "`hypothesis_template` must hold {}",
        ),
        (
            {"inputs": {"texts": TEXTS}, "parameters": LABELS},
            "must be the base64 of its file, or a data URL, got dict",
        ),
    ],
)
def test_requests_that_cannot_be_answered(handler, asked, message):
    with pytest.raises(ValueError) as error:
        handler(asked)
    assert message in str(error.value)


def test_no_file_is_opened(handler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A name that is valid base64.
    Image.new("RGB", (16, 16)).save("aaaa", "PNG")
    with pytest.raises(ValueError, match="3 bytes"):
        handler({"inputs": {"images": ["aaaa"]}})
