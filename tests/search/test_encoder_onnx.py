"""The encoders of an ONNX export search and fill the index of the model, in a process without PyTorch as well."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from own_process import run_script
from PIL import Image

from modeling_pico import PicoModel, PicoProcessor, export
from modeling_pico.fingerprint import model_identity
from modeling_pico.search import Encoder, ModelEncoder, OnnxEncoder, PicoIndex


for package in ("onnx", "onnxscript", "onnxruntime", "lancedb"):
    pytest.importorskip(package)

QUERIES = ["a red thing far down there", "left", "a blue thing that is in the middle " * 6]

# PyTorch is not installed, as far as this process can tell; what came with it counts as gone too.
_WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = name.partition(".")[0] in ("torch", "torchvision", "accelerate", "sklearn")
        return None if gone else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without_torch(script: str, *arguments: object) -> str:
    """Runs a script with arguments in a process that finds no PyTorch; returns what it prints."""
    return run_script(_WITHOUT_TORCH + textwrap.dedent(script), *arguments, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def world(tmp_path_factory, no_progress_bars) -> Path:
    """A folder with a checkpoint, its export and pictures."""
    folder = tmp_path_factory.mktemp("world")
    net = tiny.model(style_probability="purity").eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in [*net.vision_model.parameters(), *net.text_model.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
        for side in net.style_prototypes.values():
            for buffer in (side.prototypes, side.style_rate):
                buffer.copy_(torch.rand(buffer.shape))
            side.stage.fill_(1)
    # Saved in half precision and exported in float32: one model.
    net.to(torch.bfloat16).save_pretrained(folder / "model")
    tiny.processor().save_pretrained(folder / "model")
    export.main([str(folder / "model"), str(folder / "onnx")])
    (folder / "pictures").mkdir()
    for number in range(12):
        Image.fromarray(tiny.pixels(number)).save(folder / "pictures" / f"{number}.png")
    # Of which an image processor alone would make something else.
    Image.fromarray(np.dstack([tiny.pixels(99), tiny.pixels(98)[..., :1]]), "RGBA").save(folder / "pictures/clear.png")
    Image.fromarray(tiny.pixels(97)[..., 0].astype(np.uint16) * 257).save(folder / "pictures/deep.png")
    return folder


def load(folder: Path) -> tuple[PicoModel, PicoProcessor]:
    model = PicoModel.from_pretrained(folder / "model", dtype=torch.float32).eval()
    return model, PicoProcessor.from_pretrained(folder / "model")


def found(hits: list) -> list[tuple[str, float]]:
    return [(Path(hit.path).name, round(hit.score, 3)) for hit in hits]


def test_encodes_as_the_model_does(world):
    model, onnx = ModelEncoder(*load(world)), OnnxEncoder(world / "onnx")
    assert isinstance(onnx, Encoder) and onnx.identity == model.identity
    pictures = sorted((world / "pictures").iterdir())
    values = [pictures[0], str(pictures[1]), pictures[2].read_bytes(), Image.open(pictures[3]), *pictures[4:]]
    images = onnx.encode_images(values, batch_size=5), model.encode_images(values)
    texts = onnx.encode_texts(QUERIES), model.encode_texts(QUERIES)
    for ours, theirs in (images, texts):
        assert [tokens.shape for tokens in ours] == [tokens.shape for tokens in theirs]
        assert {tokens.dtype for tokens in ours} == {np.dtype(np.float32)}
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), atol=1e-5)
    # Lengths differ and padding is gone.
    assert len({len(tokens) for tokens in texts[0]}) == 3


def test_many_texts_are_encoded_batch_by_batch(world, monkeypatch):
    onnx = OnnxEncoder(world / "onnx")
    once = onnx.encode_texts(QUERIES)
    monkeypatch.setattr("modeling_pico.search.encoder_onnx._TEXTS", 2)
    for ours, theirs in zip(onnx.encode_texts(QUERIES), once, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_one_builds_and_the_other_searches(world, tmp_path):
    PicoIndex.create(tmp_path / "by_model", *load(world)).add(world / "pictures", progress=False)
    PicoIndex.create(tmp_path / "by_onnx", world / "onnx").add(world / "pictures", progress=False)
    picture = world / "pictures" / "3.png"
    answers = []
    for name in ("by_model", "by_onnx"):
        for searcher in (load(world), (world / "onnx",), (OnnxEncoder(world / "onnx"),)):
            index = PicoIndex.open(tmp_path / name, *searcher)
            answers.append([found(index.search(query, k=14)) for query in (*QUERIES, picture)])
    assert len(answers[0][0]) == 14 and answers[0][3][0][0] == "3.png"
    for other in answers[1:]:
        for ours, theirs in zip(other, answers[0], strict=True):
            assert [name for name, _ in ours] == [name for name, _ in theirs]
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=2e-3)


def test_a_process_without_pytorch_finds_the_same(world, tmp_path):
    index = PicoIndex.create(tmp_path / "index", *load(world))
    index.add(world / "pictures", progress=False)
    picture = world / "pictures" / "5.png"
    printed = run_without_torch(
        """
        import json
        from pathlib import Path
        from modeling_pico.search import OnnxEncoder, PicoIndex

        index = PicoIndex.open(sys.argv[1], OnnxEncoder(sys.argv[2]))
        hits = [index.search(query, k=5) for query in (*sys.argv[4:], Path(sys.argv[3]))]
        assert "torch" not in sys.modules and "modeling_pico.registration" not in sys.modules
        ours = sorted(name for name in sys.modules if name.startswith("modeling_pico.model."))
        assert ours == ["modeling_pico.model.image_decoding_pico"], ours
        print(json.dumps([[(Path(hit.path).name, hit.score) for hit in of_query] for of_query in hits]))
        """,
        tmp_path / "index",
        world / "onnx",
        picture,
        *QUERIES,
    )
    expected = [index.search(query, k=5) for query in (*QUERIES, picture)]
    for ours, theirs in zip(json.loads(printed.splitlines()[-1]), expected, strict=True):
        assert [name for name, _ in ours] == [Path(hit.path).name for hit in theirs]
        assert [score for _, score in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-4)


def test_without_pytorch_names_that_need_it_say_so():
    run_without_torch(
        """
        import modeling_pico
        assert modeling_pico.decode_image and "PicoModel" in dir(modeling_pico)
        try:
            modeling_pico.PicoModel
        except ImportError as error:
            assert "torch" in str(error), error
        else:
            raise AssertionError("there is PyTorch")
        """
    )


def test_an_export_of_another_model_is_refused(world, tmp_path):
    PicoIndex.create(tmp_path / "index", *load(world)).add(world / "pictures", progress=False)
    other = tmp_path / "other"
    other.mkdir()
    for file in (world / "onnx").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    about = json.loads((other / "encoders.json").read_text())
    net = tiny.model(seed=5)
    about["identity"] = model_identity(net, tiny.processor())
    (other / "encoders.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="was made by another model"):
        PicoIndex.open(tmp_path / "index", other)


def test_what_is_no_export_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"encoders.json and image_encoder.onnx and text_encoder.onnx are missing"):
        OnnxEncoder(world / "model")
    for file in (world / "onnx").iterdir():
        if file.name != "encoders.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    # An export that was interrupted, or is of an older version.
    with pytest.raises(ValueError, match="holds no ONNX export: encoders.json is missing. Export a checkpoint by"):
        OnnxEncoder(tmp_path)
    with pytest.raises(ValueError, match="Give a sequence of images or texts, not the string 'a red circle' alone"):
        OnnxEncoder(world / "onnx").encode_texts("a red circle")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        OnnxEncoder(world / "onnx").encode_images([], batch_size=0)
