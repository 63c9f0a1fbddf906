"""mteb evaluates a checkpoint; its numbers are those of this package's evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tiny import SIZE
from torch.utils.data import DataLoader

from modeling_pico import (
    CaptionedImageDataset,
    PicoDataCollator,
    PicoModel,
    PicoProcessor,
    RetrievalEvaluator,
    styled_shapes,
)
from modeling_pico.evaluation import retrieval_metrics, retrieval_ranks
from modeling_pico.evaluation.mteb_encoder import MtebEncoder
from modeling_pico.model.backbones_pico import build_backbone
from modeling_pico.script.from_scratch import (
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)


mteb = pytest.importorskip("mteb")

CAPTIONS = 3


@pytest.fixture(scope="module")
def data() -> datasets.Dataset:
    """Scenes of which no two share a caption, three captions each."""
    rows = styled_shapes("test", num_scenes=60, image_size=24)
    return rows.map(lambda row: {"captions": row["captions"][:CAPTIONS]})


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer([caption for captions in data["captions"] for caption in captions], 200, 48)
    processor = PicoProcessor(image_processor=small_image_processor(SIZE), tokenizer=tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        towers = small_vision_config(16, 1, 2, SIZE, 8), small_text_config(16, 1, 2, tokenizer)
        model = PicoModel.from_backbones(*map(build_backbone, towers), embedding_dim=8, num_style_prototypes=3)
        for side in model.style_prototypes.values():
            for buffer in (side.prototypes, side.style_rate):
                buffer.copy_(torch.rand(buffer.shape))
            side.stage.fill_(1)
        # Of towers that have not been trained, all images would look alike.
        for parameter in [*model.vision_model.parameters(), *model.text_model.parameters()]:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tasks(data: datasets.Dataset) -> list:
    """The scenes as two tasks of mteb, images to texts and texts to images."""
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    images = datasets.Dataset.from_dict(
        {"id": [f"image-{row}" for row in range(len(data))], "image": data["image"]},
        features=datasets.Features(id=datasets.Value("string"), image=datasets.Image()),
    )
    captions = [(f"text-{row}-{i}", text) for row, own in enumerate(data["captions"]) for i, text in enumerate(own)]
    texts = datasets.Dataset.from_dict({"id": [name for name, _ in captions], "text": [text for _, text in captions]})
    image_of = {name: f"image-{name.split('-')[1]}" for name, _ in captions}
    texts_of: dict[str, dict[str, int]] = {}
    for name, image in image_of.items():
        texts_of.setdefault(image, {})[name] = 1

    class Scenes(AbsTaskRetrieval):
        def load_data(self, **kwargs):
            queries, corpus = (images, texts) if self.metadata.category == "i2t" else (texts, images)
            relevant = (
                texts_of if self.metadata.category == "i2t" else {name: {image_of[name]: 1} for name in image_of}
            )
            split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    made = []
    for category in ("i2t", "t2i"):
        metadata = TaskMetadata(
            name=f"Scenes{category.upper()}Retrieval",
            description="Generated scenes.",
            dataset={"path": "local/scenes", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )
        made.append(type(metadata.name, (Scenes,), {"metadata": metadata})())
    return made


def evaluate(model: MtebEncoder, data: datasets.Dataset, cache: Path) -> dict[str, float]:
    """Recalls as the evaluator names them, of mteb's results."""
    results = mteb.evaluate(
        model,
        tasks(data),
        cache=mteb.ResultCache(cache),
        show_progress_bar=False,
        encode_kwargs={"batch_size": 7, "show_progress_bar": False},
        co2_tracker=False,
    )
    names = ("image_to_text", "text_to_image")
    return {
        f"{name}_recall_at_{k}": 100 * result.scores["test"][0][f"hit_rate_at_{k}"]
        for name, result in zip(names, results.task_results, strict=True)
        for k in (1, 5, 10)
    }


def assert_recalls(found: dict[str, float], metrics: dict[str, float]) -> None:
    # mteb rounds to five digits of a share.
    assert found == pytest.approx({name: metrics[name] for name in found}, abs=1e-3)
    assert metrics["image_to_text_recall_at_10"] > metrics["image_to_text_recall_at_1"]


def test_late_interaction_equals_the_evaluator(data, checkpoint, tmp_path):
    model = MtebEncoder(checkpoint)
    captioned = CaptionedImageDataset(data)
    loader = DataLoader(captioned, batch_size=16, collate_fn=PicoDataCollator(model.processor))
    assert_recalls(evaluate(model, data, tmp_path), RetrievalEvaluator()(model.model, loader))


def test_blocks_of_queries_and_items_do_not_matter(checkpoint, monkeypatch):
    model = MtebEncoder(checkpoint)
    embeds = [torch.randn(count, 5, 8) for count in (6, 9)]
    scores = model.similarity(*embeds)
    torch.testing.assert_close(scores, model.processor.score_retrieval(*embeds))
    torch.testing.assert_close(model.similarity_pairwise(embeds[0], embeds[1][:6]), scores.diagonal())
    monkeypatch.setattr("modeling_pico.evaluation.mteb_encoder._QUERIES", 4)
    monkeypatch.setattr("modeling_pico.evaluation.mteb_encoder._ITEMS", 2)
    torch.testing.assert_close(model.similarity(*(tensor.numpy() for tensor in embeds)), scores)


def test_pooled_vectors_are_ranked_by_their_cosine(data, checkpoint, tmp_path):
    model = MtebEncoder(checkpoint, scores="pooled")
    both, net = model.processor, model.model
    texts = [caption for captions in data["captions"] for caption in captions]
    images = [image["bytes"] for image in data["image"]]
    with torch.no_grad():
        image = net.get_image_features(**both(images=images, return_tensors="pt")).pooler_output
        text = net.get_text_features(**both(text=texts, return_tensors="pt", padding=True)).pooler_output
    ids = np.arange(len(data))
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    expected = retrieval_metrics(*retrieval_ranks(cosines, ids, ids.repeat(CAPTIONS)))
    found = evaluate(model, data, tmp_path)
    assert_recalls(found, expected)
    assert found != evaluate(MtebEncoder(checkpoint), data, tmp_path)


def test_results_of_one_way_or_checkpoint_do_not_pass_for_those_of_another(data, checkpoint, tmp_path):
    other = tmp_path / "other" / "tiny"
    net = PicoModel.from_pretrained(checkpoint)
    net.vision_model.state_dict()[next(iter(net.vision_model.state_dict()))].add_(1.0)
    net.save_pretrained(other)
    PicoProcessor.from_pretrained(checkpoint).save_pretrained(other)
    models = [MtebEncoder(checkpoint), MtebEncoder(checkpoint, scores="pooled"), MtebEncoder(other)]
    for model in models:
        evaluate(model, data, tmp_path / "results")
    found = sorted((tmp_path / "results").rglob("ScenesI2TRetrieval.json"))
    assert len(found) == 3 and all(file.is_relative_to(tmp_path / "results/results/local__tiny") for file in found)
    metas = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").rglob("model_meta.json"))]
    assert {meta["name"] for meta in metas} == {"local/tiny"}
    assert {meta["model_type"][0] for meta in metas} == {"dense", "late-interaction"}
    assert models[0].mteb_model_meta.revision == models[1].mteb_model_meta.revision
    assert models[0].mteb_model_meta.revision == MtebEncoder(checkpoint).mteb_model_meta.revision
    assert models[0].mteb_model_meta.n_parameters == sum(parameter.numel() for parameter in net.parameters())
    # The entry for mteb's own list of models.
    assert "name='someone/pico'" in MtebEncoder(checkpoint, name="someone/pico").mteb_model_meta.to_python()


def test_what_cannot_be_evaluated_is_refused(checkpoint, tiny_clip, monkeypatch):
    with pytest.raises(ValueError, match="scores must be one of late_interaction, pooled, got 'cosine'"):
        MtebEncoder(checkpoint, scores="cosine")
    with pytest.raises(ValueError, match="is a CLIPModel and no checkpoint of PICO or CDDS"):
        MtebEncoder(tiny_clip.folder)
    batch = {"image": [None], "text": ["a red circle"]}
    with pytest.raises(ValueError, match="CirrIT2I asks for one embedding of image and text together"):
        MtebEncoder(checkpoint).encode([batch], task_metadata=SimpleNamespace(name="CirrIT2I"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"modeling-pico\[mteb\]"):
        MtebEncoder(checkpoint)
