from __future__ import annotations

import math

import pytest
import torch
from tiny import CountedDataset, model, processor, rows
from torch.utils.data import DataLoader

from modeling_pico import RetrievalEvaluator, image_text_loss, pair_scores
from modeling_pico.data import PicoDataCollator
from modeling_pico.evaluation import (
    EncodedRetrieval,
    RetrievalRanks,
    folded_retrieval_metrics,
    retrieval_metrics,
    retrieval_ranks,
)


def stage_prototypes(net, seed: int = 0) -> None:
    """Puts random prototypes into use."""
    generator = torch.Generator().manual_seed(seed)
    for side in net.style_prototypes.values():
        for buffer in (side.prototypes, side.style_rate):
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
        side.stage.fill_(1)


@pytest.fixture
def net():
    made = model(style_probability="purity").eval()
    stage_prototypes(made)
    return made


@pytest.fixture(scope="module")
def data():
    return CountedDataset(rows(11, seed=5, repeats=2))


def loader(data, batch_size: int) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, collate_fn=PicoDataCollator(processor()))


@torch.no_grad()
def brute_force(net, data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every image with every caption, one pair at a time, by the model's forward."""
    both = processor()
    captions = [(caption, int(data.ids[row])) for row in range(len(data)) for caption in data[row]["captions"]]
    scores = torch.empty(len(data), len(captions))
    for row in range(len(data)):
        for column, (caption, _) in enumerate(captions):
            inputs = both(images=[data[row]["image"]], text=[caption], return_tensors="pt")
            scores[row, column] = net(**inputs).logits_per_image[0, 0] / net.logit_scale.exp()
    return scores, data.ids, torch.tensor([code for _, code in captions])


def test_equals_scoring_all_pairs_one_by_one(net, data):
    scores, image_ids, text_ids = brute_force(net, data)
    assert scores.std() > 1e-2
    expected = retrieval_metrics(*retrieval_ranks(scores, image_ids, text_ids))
    evaluator = RetrievalEvaluator(image_chunk=3)
    encoded = evaluator.encode(net, loader(data, 4))
    torch.testing.assert_close(evaluator.score(net, encoded), scores, rtol=0, atol=1e-5)
    metrics = evaluator(net, loader(data, 4))
    assert {name: metrics[name] for name in expected} == expected
    assert set(metrics) == set(expected) | {"loss", "chance_rsum"}


def test_equal_inputs_tie_however_kernels_round(net, data):
    """What stands twice under different identities is never told apart, in favour of the right answer or otherwise."""
    evaluator = RetrievalEvaluator(image_chunk=3, text_chunk=4)
    once = evaluator.encode(net, loader(data, 4))
    # Two of each image and of each text: at best second place. Rounding is drawn anew in each, as on other hardware.
    rounding = torch.Generator().manual_seed(0)
    twice = {}
    for name in ("image_tokens", "text_tokens"):
        both = torch.cat([getattr(once, name)] * 2)
        twice[name] = both + 3e-7 * torch.randn(both.shape, generator=rounding)
    for name in ("image_mask", "text_mask"):
        twice[name] = torch.cat([getattr(once, name)] * 2)
    for name in ("image_ids", "text_ids"):
        ids = getattr(once, name)
        twice[name] = torch.cat([ids, ids + 100])
    encoded = EncodedRetrieval(**twice)
    metrics = evaluator.metrics(net, encoded)
    assert metrics["image_to_text_recall_at_1"] == metrics["text_to_image_recall_at_1"] == 0


@pytest.mark.parametrize(("batch_size", "image_chunk"), [(1, 256), (11, 2)])
def test_batches_and_chunks_do_not_matter(net, data, batch_size, image_chunk):
    first = RetrievalEvaluator()(net, loader(data, 5))
    assert RetrievalEvaluator(image_chunk=image_chunk)(net, loader(data, batch_size)) == pytest.approx(first, abs=1e-5)


def test_loss_is_that_of_consecutive_images_with_their_first_caption(net, data):
    metrics = RetrievalEvaluator(loss_batch_size=4)(net, loader(data, 5))
    both, total = processor(), 0.0
    for start in range(0, 11, 4):
        samples = [data[row] for row in range(start, min(start + 4, 11))]
        # The first caption of a meaning is that of its first image.
        first = [data[data.ids.tolist().index(sample["image_id"])]["captions"][0] for sample in samples]
        images = [sample["image"] for sample in samples]
        inputs = both(images=images, text=first, return_tensors="pt", padding=True)
        ids = torch.tensor([sample["image_id"] for sample in samples])
        with torch.no_grad():
            total += float(net(**inputs, image_ids=ids, return_loss=True).loss) * len(samples)
    assert metrics["loss"] == pytest.approx(total / 11, rel=1e-5)


def test_hinge_loss_uses_the_models_margin(data):
    net = model(loss_type="hinge", margin=0.7).eval()
    evaluator = RetrievalEvaluator(loss_batch_size=11)
    encoded = evaluator.encode(net, loader(data, 11))
    scores = evaluator.score(net, encoded)
    first = (encoded.image_ids[:, None] == encoded.text_ids).float().argmax(dim=1)
    block = scores[:, first]
    expected = image_text_loss(block, block.T, image_ids=encoded.image_ids, loss_type="hinge", margin=0.7)
    assert evaluator.metrics(net, encoded)["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_encoded_once_and_scored_under_other_prototypes(net, data):
    evaluator = RetrievalEvaluator()
    encoded = evaluator.encode(net, loader(data, 4))
    reads = data.reads
    before = evaluator.score(net, encoded)
    other = model(style_probability="purity").eval()
    stage_prototypes(other, seed=9)
    net.style_prototypes.load_state_dict(other.style_prototypes.state_dict())
    after = evaluator.score(net, encoded)
    assert data.reads == reads
    assert not torch.equal(after, before)
    assert torch.equal(after, evaluator.score(other, evaluator.encode(other, loader(data, 4))))


@pytest.mark.parametrize("head", ["fine_grained", "clip_style"])
def test_other_heads(data, head):
    net = model(method=head).eval()
    scores, *_ = brute_force(net, data)
    evaluator = RetrievalEvaluator()
    torch.testing.assert_close(evaluator.score(net, evaluator.encode(net, loader(data, 4))), scores, rtol=0, atol=1e-5)


def test_encoding_reports_batches_and_repeats_the_last_one_on_request(net, data):
    calls, seen = [], []
    net.register_forward_hook(lambda *_: calls.append(1))
    encoded = RetrievalEvaluator().encode(net, loader(data, 4), num_batches=5, on_batch=lambda: seen.append(1))
    assert (len(calls), len(seen)) == (5, 3)
    assert len(encoded.image_tokens) == 11
    assert not net.training


def test_empty_set_is_refused(net):
    with pytest.raises(ValueError, match="evaluation set is empty"):
        RetrievalEvaluator().encode(net, [])


def test_subset_is_a_part_of_the_set_with_the_texts_of_its_meanings(net, data):
    evaluator = RetrievalEvaluator()
    encoded = evaluator.encode(net, loader(data, 4))
    chosen = torch.tensor([1, 5, 10])
    subset = encoded.subset(chosen)
    # Images 9 and 10 repeat the meanings of 0 and 1; the image i has 1 + i % 3 captions.
    assert subset.image_ids.tolist() == [1, 5, 1]
    assert subset.text_ids.tolist() == [1, 1, 5, 5, 5, 1, 1]
    texts = torch.isin(encoded.text_ids, torch.tensor([1, 5]))
    expected = evaluator.score(net, encoded)[chosen][:, texts]
    torch.testing.assert_close(evaluator.score(net, subset), expected, rtol=0, atol=1e-6)
    own = evaluator(net, loader(torch.utils.data.Subset(data, chosen.tolist()), 4))
    metrics = evaluator.retrieval_metrics(net, subset)
    assert metrics["rsum"] == own["rsum"]


def test_folds_are_consecutive_images(net, data):
    with pytest.raises(ValueError, match="11 images cannot be split into 2 folds"):
        RetrievalEvaluator(num_folds=2)(net, loader(data, 4))


def exact_set(ids: list[int], captions: int, seed: int) -> EncodedRetrieval:
    """
    Tokens of small integers, one, two or four to a sample: scores without any rounding, whatever the tile, and with
    many ties. Texts are shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.tensor(ids)
    text_ids = image_ids.unique().repeat_interleave(captions)
    text_ids = text_ids[torch.randperm(len(text_ids), generator=generator)]
    parts = {}
    for side, length in (("image", len(image_ids)), ("text", len(text_ids))):
        parts[f"{side}_tokens"] = torch.randint(-1, 2, (length, 4, 2), generator=generator).float()
        lengths = torch.tensor([1, 2, 4])[torch.randint(3, (length, 1), generator=generator)]
        parts[f"{side}_mask"] = torch.arange(4) < lengths
    return EncodedRetrieval(**parts, image_ids=image_ids, text_ids=text_ids)


IDS = {
    "ordered": list(range(24)),
    "shuffled": torch.randperm(24, generator=torch.Generator().manual_seed(4)).tolist(),
    # Every meaning in every fold and block of images.
    "repeated": [1000, -7, 3] * 8,
    "one meaning": [5] * 24,
    "some repeated": [*range(20), 0, 7, 19, 7],
}


@pytest.mark.parametrize(("folds", "chunks"), [(1, (5, 7)), (2, (24, 1000)), (3, (5, 7)), (24, (5, 7))], ids=str)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_streamed_metrics_equal_those_of_the_full_matrix(ids, chunks, folds):
    net = model(method="fine_grained").eval()
    evaluator = RetrievalEvaluator(folds, image_chunk=chunks[0], text_chunk=chunks[1])
    encoded = exact_set(ids, captions=3, seed=folds)
    scores = evaluator.score(net, encoded)
    expected = pair_scores(encoded.image_tokens, encoded.text_tokens, encoded.image_mask, encoded.text_mask)
    assert torch.equal(scores, expected)
    assert len(scores.unique()) < 60  # of at least 72 * 3: ties everywhere
    metrics = evaluator.retrieval_metrics(net, encoded)
    assert metrics == folded_retrieval_metrics(scores, encoded.image_ids, encoded.text_ids, num_folds=folds)


@pytest.mark.parametrize("folds", [1, 4])
def test_every_pair_is_scored_once_and_in_tiles(monkeypatch, folds):
    net = model(method="fine_grained").eval()
    encoded = exact_set(list(range(24)), captions=5, seed=0)
    evaluator = RetrievalEvaluator(folds, image_chunk=5, text_chunk=8)
    monkeypatch.setattr(evaluator, "score", lambda *_: pytest.fail("the full matrix"))
    tiles = []

    def watched(images, texts, *args, **kwargs):
        tiles.append((len(images), len(texts)))
        return pair_scores(images, texts, *args, **kwargs)

    monkeypatch.setattr(net, "score", watched)
    evaluator.retrieval_metrics(net, encoded)
    assert all(rows <= 5 and columns <= 8 for rows, columns in tiles)
    # With folds only pairs of one fold are scored.
    assert sum(rows * columns for rows, columns in tiles) == 24 * 120 // folds


def test_only_tiles_along_the_diagonal_are_kept(monkeypatch):
    net = model(method="fine_grained").eval()
    encoded = exact_set(torch.randperm(40).tolist(), captions=5, seed=0)
    evaluator = RetrievalEvaluator(image_chunk=4, text_chunk=20)
    observed = []
    original = RetrievalRanks.observe
    monkeypatch.setattr(RetrievalRanks, "observe", lambda *args: (observed.append(1), original(*args)))
    evaluator.retrieval_metrics(net, encoded)
    assert len(observed) == 10  # of 100


def test_scores_that_are_not_numbers_are_refused(net, data):
    evaluator = RetrievalEvaluator(image_chunk=3)
    encoded = evaluator.encode(net, loader(data, 4))
    encoded.image_tokens[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        evaluator.metrics(net, encoded)
