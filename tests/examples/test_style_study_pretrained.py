"""The study with pretrained towers, on a tiny convolutional network and a tiny BERT."""

from __future__ import annotations

import datasets
import numpy as np
import pretrained
import pytest
import study
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModel, BertModel, ResNetConfig, ResNetModel, set_seed

from modeling_pico import CaptionedImageDataset, PicoDataCollator, PicoProcessor, RetrievalEvaluator, align_encoded
from modeling_pico.model.backbones_pico import batch_norm_layers
from modeling_pico.script.from_scratch import small_image_processor, small_text_config, train_tokenizer


OPTIONS = {"args": {"prototype_start": 1, "prototype_update_start": 2}}
SPLITS = ["seen", "validation", "validation@negative", "validation:other", "validation:1"]
COLORS = ["red", "green", "blue", "black", "white", "yellow", "purple", "orange", "cyan", "brown", "pink", "grey"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A dozen pictures for training and half a dozen for validation, and two towers in the layout of the Hub."""
    folder = tmp_path_factory.mktemp("towers")
    rng = np.random.default_rng(0)
    for split, colors in (("train", COLORS), ("validation", COLORS[::2])):
        rows = [
            {
                "image": Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)),
                "captions": [f"a {color} square", color],
                "other": [f"the colour of {color}"],
            }
            for color in colors
        ]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    set_seed(0)
    options = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"}
    image_tower, image_path = ResNetModel(ResNetConfig(**options)), folder / "images"
    for layer in batch_norm_layers(image_tower).values():  # statistics that no batch has
        layer.running_mean.normal_(std=0.2)
        layer.running_var.uniform_(0.5, 2.0)
    image_tower.save_pretrained(image_path)
    small_image_processor(12).save_pretrained(image_path)
    tokenizer, text_path = train_tokenizer([f"the colour of a {color} square" for color in COLORS]), folder / "texts"
    BertModel(small_text_config(12, 1, 2, tokenizer), add_pooling_layer=False).save_pretrained(text_path)
    tokenizer.save_pretrained(text_path)
    return {"dataset_name": str(folder), "vision_model_name_or_path": str(image_path)} | {
        "text_model_name_or_path": str(text_path),
        "image_size": 16,
        "embedding_dim": 8,
        "num_seen": 4,
        "learning_rate": 1e-2,
        "backbone_learning_rate": 1e-2,
        "num_head_epochs": 1,
        "head_learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "warmup_steps": 0.1,
        "num_train_epochs": 2,
        "batch_size": 4,
    }


def by_the_library(setting, weights):
    """Each split by the kept weights, plain and moved, of images and captions that pass the towers as they are."""
    model = pretrained._build_model(setting, OPTIONS).eval()
    model.load_state_dict(load_file(weights), strict=False)
    processor = PicoProcessor.from_backbones(setting["vision_model_name_or_path"], setting["text_model_name_or_path"])
    processor.image_processor.size = {"height": 16, "width": 16}
    evaluator, collator = RetrievalEvaluator(), PicoDataCollator(processor)

    def loader(dataset):
        return DataLoader(dataset, batch_size=5, collate_fn=collator)

    model.fit_alignment(loader(CaptionedImageDataset(pretrained._rows(setting, "train"))))
    for split in SPLITS:
        dataset = pretrained._split(setting, split)
        encoded = evaluator.encode(model, loader(dataset))
        for sets in (encoded, align_encoded(model, encoded, loader(dataset))):
            yield split, sets


@pytest.mark.usefixtures("small_galleries")
@pytest.mark.parametrize("frozen", [True, False])
def test_results_are_those_of_the_kept_weights(setting, tmp_path, monkeypatch, frozen):
    measured, rsums = [], []

    class Evaluator(RetrievalEvaluator):
        def retrieval_metrics(self, model, encoded):
            metrics = super().retrieval_metrics(model, encoded)
            measured.append(encoded)
            rsums.append(metrics["rsum"])
            return metrics

    monkeypatch.setattr(pretrained, "RetrievalEvaluator", Evaluator)
    setting, weights = {**setting, "frozen": frozen}, tmp_path / "kept" / "weights.safetensors"
    first = study.train(setting, OPTIONS, 3, SPLITS, tmp_path / "cache", weights, aligned=True)
    assert first.keys() == {"constructions", "loss", "seconds", "aligned", "rsum"}
    # The first prototypes come after the first epoch; nothing would use an update after the last one.
    assert [entry["prototype_stage"] for entry in first["constructions"]] == [1.0]
    for encoded, (split, expected) in zip(measured, by_the_library(setting, weights), strict=True):
        for side in ("image_tokens", "text_tokens"):
            # Hidden states are kept in half precision.
            torch.testing.assert_close(getattr(encoded, side), getattr(expected, side), rtol=0, atol=5e-3)
        assert encoded.text_ids.tolist() == expected.text_ids.tolist(), split
    for name, of_splits in (("rsum", rsums[::2]), ("aligned", rsums[1::2])):
        assert first[name] == {split: [rsum] for split, rsum in zip(SPLITS, of_splits, strict=True)}
    plain, moved = measured[:2]
    assert (plain.image_tokens - moved.image_tokens).abs().max() > 0.02
    # What is kept is not trained again, and nothing is moved unasked.
    again = study.train(setting, OPTIONS, 3, SPLITS, tmp_path / "cache", weights)
    assert again == {"rsum": first["rsum"]}

    kept = load_file(weights)
    assert any(name.startswith(("vision_model.", "text_model.")) for name in kept) != frozen
    for name, value in AutoModel.from_pretrained(setting["vision_model_name_or_path"]).state_dict().items():
        # Fine-tuned, but for the statistics of pretraining.
        if not frozen and not name.endswith("num_batches_tracked"):
            assert torch.equal(kept[f"vision_model.{name}"], value) == ("running" in name), name


def test_images_are_augmented_as_the_variant_says(setting, tmp_path):
    results, cache = {}, tmp_path / "cache"
    for share in (None, 0.0, 1.0):
        options = {"method": "fine_grained"} | ({} if share is None else {"data": {"style_augmentation": share}})
        study.train(setting, options, 0, [], cache, tmp_path / f"{share}.safetensors")
        results[share] = load_file(tmp_path / f"{share}.safetensors")["alignment_head.visual_projection.weight"]
    assert torch.equal(results[None], results[0.0]) and not torch.equal(results[None], results[1.0])


def test_held_out_images_are_never_trained_on(setting):
    seen, trained = ({texts[1] for texts in pretrained._rows(setting, name)["captions"]} for name in ("seen", "train"))
    assert not seen & trained and seen | trained == set(COLORS) and len(seen) == 4


def test_what_would_not_be_trained_is_refused(setting, tmp_path):
    weights = tmp_path / "weights.safetensors"
    for options, message in (
        ({"base": "pico", "uncertainty_config": {}}, r"with \['base'\] cannot be trained on this setting"),
        ({"num_prototypes": 8}, r"with \['num_prototypes'\]"),
        ({"data": {"random_flip": True}}, r"may have `style_augmentation` alone, but has \['random_flip'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            study.train(setting, options, 0, SPLITS, tmp_path, weights)
    save_file({"alignment_head.visual_projection.weight": torch.zeros(8, 8)}, weights)
    with pytest.raises(ValueError, match=r"holds other weights than this variant has: \['logit_scale', "):
        study.train(setting, OPTIONS, 0, SPLITS, tmp_path, weights)
