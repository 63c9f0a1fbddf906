"""Hidden states of frozen towers, kept on disk."""

from __future__ import annotations

import logging
import pickle
import random

import peft
import pytest
import tiny
import torch
from torch.utils.data import Subset

from modeling_pico.data import CaptionedImageDataset, PicoDataCollator
from modeling_pico.data.dataset import SampleKey
from modeling_pico.evaluation import embedding_cache
from modeling_pico.training import tower_cache
from modeling_pico.training.tower_cache import cached_states


KEYS = [SampleKey(4, 1, 0), SampleKey(0, 0, 1), SampleKey(11, 2, 2)]


def frozen(**options):
    net = tiny.model(**options)
    for tower in (net.vision_model, net.text_model):
        tower.requires_grad_(False)
    return net


def collator():
    return PicoDataCollator(tiny.processor())


def dataset(transform=None):
    return CaptionedImageDataset(tiny.rows(20, repeats=2), transform)


def draw(image, rng: random.Random):
    return image.rotate(90 * rng.randrange(4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "class_token", "method": "clip_style"},
        {"text_special_tokens": False, "method": "instance_norm"},
    ],
)
@pytest.mark.parametrize("keys", [KEYS, [3, 7, 19]], ids=["training", "evaluation"])
def test_a_batch_of_kept_states_gives_what_its_images_and_captions_give(tmp_path, options, keys):
    net = frozen(**options).eval()
    data = dataset()
    states = cached_states(tmp_path, net, data, collator(), batch_size=3)
    batch, raw = states.__getitems__(keys), collator()([data[key] for key in keys])
    texts = {name: raw.pop(name) for name in ("text_ids", "num_captions") if name in raw}
    for name, value in texts.items():
        assert batch.pop(name).tolist() == value.tolist()
    for name in ("image_ids", "caption_codes"):
        assert batch[name].tolist() == raw[name].tolist()
    with torch.no_grad():
        found, wanted = net(**batch, return_logits=True), net(**raw, return_logits=True)
    # States are kept in half precision.
    torch.testing.assert_close(found.image_embeds, wanted.image_embeds, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.text_embeds, wanted.text_embeds, rtol=0, atol=2e-3)
    assert torch.equal(found.text_mask, wanted.text_mask)
    torch.testing.assert_close(found.logits_per_image, wanted.logits_per_image, rtol=1e-2, atol=1e-2)


def test_training_from_kept_states_gives_the_weights_of_training_from_images(tmp_path):
    options = {"eval_data": CaptionedImageDataset(tiny.rows(9, seed=1)), "data": dataset(), "num_train_epochs": 4}
    # Dropout of frozen towers is off either way.
    trained = [
        tiny.trainer(tmp_path / str(cache), net=frozen(dropout=0.5), tower_cache_dir=cache, **options)
        for cache in (None, str(tmp_path / "cache"))
    ]
    metrics = [made.train() and made.evaluate() for made in trained]
    plain, cached = (made.model.state_dict() for made in trained)
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=2e-2, msg=name)
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], abs=1e-2)
    assert tiny.prototype_log(trained[1])


def test_the_towers_run_once_for_all_trainings(tmp_path, monkeypatch):
    options = {"eval_data": CaptionedImageDataset(tiny.rows(9, seed=1)), "tower_cache_dir": str(tmp_path / "cache")}
    tiny.trainer(tmp_path / "first", net=frozen(), data=dataset(), **options).train()
    second = tiny.trainer(tmp_path / "second", net=frozen(method="fine_grained"), data=dataset(), **options)
    for tower in (second.model.vision_model, second.model.text_model):
        monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: pytest.fail("a tower was run"))
    second.train()
    assert second.evaluate()["eval_rsum"] > 0


def test_evaluations_of_kept_states_are_not_kept_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modeling_pico"), "propagate", True)
    folders = {"tower_cache_dir": str(tmp_path / "towers"), "eval_cache_dir": str(tmp_path / "embeddings")}
    made = tiny.trainer(
        tmp_path / "run",
        net=frozen(),
        data=dataset(),
        eval_data=CaptionedImageDataset(tiny.rows(9, seed=1)),
        **folders,
    )
    first = made.evaluate()
    monkeypatch.setattr(made.model.vision_model, "forward", None)  # what it gives is read
    assert made.evaluate()["eval_rsum"] == first["eval_rsum"]
    assert not (tmp_path / "embeddings").exists() and "not kept" not in caplog.text


def test_moments_of_training_are_those_of_images_as_they_are(tmp_path):
    moments = []
    for transform, cache in ((None, None), (draw, str(tmp_path / "cache"))):
        data = CaptionedImageDataset(tiny.rows(40), transform)
        made = tiny.trainer(tmp_path / "run", net=frozen(), data=data, tower_cache_dir=cache, tower_cache_views=2)
        made.fit_alignment()
        moments.append(made.model.image_moments)
    for name in ("mean", "std"):
        torch.testing.assert_close(getattr(moments[1], name), getattr(moments[0], name), rtol=0, atol=1e-3)


def test_chunks_of_a_batch_may_be_kept_states(tmp_path):
    options = {"data": dataset(), "eval_data": None, "eval_strategy": "no", "tower_cache_dir": str(tmp_path / "cache")}
    weights = []
    for chunk in (None, 2):
        made = tiny.trainer(
            tmp_path / str(chunk),
            net=frozen(method="fine_grained"),
            gradient_cache_chunk_size=chunk,
            max_steps=4,
            **options,
        )
        made.train()
        weights.append(made.model.alignment_head.visual_projection.weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)


def test_what_a_tower_gives_depends_on_its_weights_images_captions_and_drawings(tmp_path, monkeypatch):
    def folders(net=None, data=None, views=None):
        cached_states(tmp_path, net or frozen(), data or dataset(), collator(), num_views=views)
        return len(list(tmp_path.glob("images-*"))), len(list(tmp_path.glob("texts-*")))

    assert folders() == (1, 1)
    assert folders(frozen(method="fine_grained", embedding_dim=4)) == (1, 1)
    assert folders(frozen(seed=1)) == (2, 2)
    assert folders(data=dataset(draw)) == (2, 2)  # not augmented
    assert folders(data=dataset(draw), views=3) == (3, 2)
    assert folders(data=dataset(draw), views=2) == (4, 2)
    others = tiny.rows(20, repeats=2).map(lambda row: {"captions": [text + "!" for text in row["captions"]]})
    assert folders(data=CaptionedImageDataset(others)) == (4, 3)
    monkeypatch.setattr(embedding_cache, "is_timm_available", lambda: True)
    monkeypatch.setattr(embedding_cache.metadata, "version", lambda name: f"another {name}")
    assert folders() == (5, 4)  # the code of towers from timm is there


def test_each_epoch_takes_one_of_the_kept_drawings(tmp_path):
    net, data = frozen().eval(), dataset(draw)
    states = cached_states(tmp_path, net, data, collator(), num_views=3)

    with pytest.raises(ValueError, match="an evaluation asks for plain ones"):
        states.__getitems__([5])

    def of(seed):
        return states.__getitems__([SampleKey(5, 0, seed)])["image_states"]

    drawn = [of(seed) for seed in range(3)]
    assert len({tuple(states.flatten().tolist()) for states in drawn}) > 1
    assert torch.equal(of(4), drawn[1])
    image = data[5]["image"]
    turned = [image.rotate(angle) for angle in (0, 90, 180, 270)]
    with torch.no_grad():
        pixels = torch.stack(
            [torch.as_tensor(collator().processor.image_processor(turn)["pixel_values"][0]) for turn in turned]
        )
        wanted = net.get_image_states(pixels).states
    for found in drawn:
        assert min((found - one).abs().max() for one in wanted) < 2e-3


def test_workers_map_the_files_and_are_sent_no_copy(tmp_path):
    states = cached_states(tmp_path, frozen(), dataset(), collator())
    sent = pickle.dumps(states)
    assert len(sent) < 6000
    again = pickle.loads(sent).__getitems__(KEYS)
    for name, value in states.__getitems__(KEYS).items():
        assert torch.equal(again[name], value)


def test_what_an_interruption_left_is_not_read(tmp_path, monkeypatch):
    net = frozen()
    calls = []
    encode = net.get_text_states
    monkeypatch.setattr(
        net, "get_text_states", lambda **inputs: calls.append(1) or (encode(**inputs) if len(calls) < 3 else 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        cached_states(tmp_path, net, dataset(), collator(), batch_size=4)
    assert not list(tmp_path.glob("texts-*"))
    assert net.training is False
    monkeypatch.undo()
    assert len(cached_states(tmp_path, net, dataset(), collator(), batch_size=4)) == 20


def test_states_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(tower_cache, "synchronise", lambda folder: written.append((folder, folder.is_dir())))
    cached_states(tmp_path, frozen(), dataset(), collator())
    assert [(folder.name.split("-")[0], there) for folder, there in written] == [("images", True), ("texts", True)]
    assert not any(folder.exists() for folder, _ in written) and len(list(tmp_path.iterdir())) == 2


def test_trained_towers_are_refused(tmp_path):
    made = tiny.trainer(tmp_path / "run", data=dataset(), tower_cache_dir=str(tmp_path / "cache"))
    made.model.text_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"but trained: vision. Freeze it \(--freeze_vision\)"):
        made.train()
    assert not (tmp_path / "cache").exists()


def test_a_data_set_of_ones_own_is_refused(tmp_path):
    made = tiny.trainer(tmp_path / "run", net=frozen(), tower_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="CountedDataset"):
        made.train()


def test_states_beyond_half_precision_are_refused(tmp_path):
    net = frozen()
    with torch.no_grad():
        net.vision_model.layernorm.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"up to 1e\+05, which half precision cannot hold"):
        cached_states(tmp_path, net, dataset(), collator())


def test_states_of_another_model_are_not_used(tmp_path):
    options = {"data": dataset(), "eval_data": CaptionedImageDataset(tiny.rows(9, seed=1))}
    made = tiny.trainer(tmp_path / "run", net=frozen(), tower_cache_dir=str(tmp_path / "cache"), **options)
    made.evaluate()
    other = frozen(seed=1)
    made.model = made.model_wrapped = other
    fresh = tiny.trainer(tmp_path / "fresh", net=other, tower_cache_dir=str(tmp_path / "cache"), **options)
    assert made.evaluate()["eval_loss"] == pytest.approx(fresh.evaluate()["eval_loss"])
    # Nor those of the weights before.
    other.load_state_dict(frozen(seed=2).state_dict())
    again = tiny.trainer(tmp_path / "again", net=other, tower_cache_dir=str(tmp_path / "cache"), **options)
    assert made.evaluate()["eval_loss"] == pytest.approx(again.evaluate()["eval_loss"])


def test_towers_with_adapters_are_refused(tmp_path):
    net = frozen()
    net.vision_model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "query"]))
    net.vision_model.requires_grad_(False)
    with pytest.raises(ValueError, match="what adapters do is not in these alone"):
        cached_states(tmp_path, net, dataset(), collator())


def test_a_model_in_half_precision_takes_kept_states(tmp_path):
    net = frozen(method="fine_grained").to(torch.bfloat16).eval()
    states = cached_states(tmp_path, net, dataset(), collator())
    with torch.no_grad():
        assert net(**states.__getitems__([0, 1, 2])).logits_per_image.isfinite().all()


def test_parts_of_a_data_set_without_augmentation_are_kept_once(tmp_path):
    part = Subset(dataset(), range(18))
    made = tiny.trainer(
        tmp_path / "run",
        net=frozen(),
        data=part,
        eval_data=None,
        eval_strategy="no",
        feedback="constant",
        tower_cache_dir=str(tmp_path / "cache"),
    )
    loader = made.get_train_dataloader()
    assert loader.dataset._num_views is None
