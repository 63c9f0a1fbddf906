from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pico.evaluation import (
    RetrievalRanks,
    chance_rsum,
    folded_retrieval_metrics,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)
from modeling_pico.evaluation.retrieval_metrics import fold_members


METRIC_NAMES = [
    "image_to_text_recall_at_1",
    "image_to_text_recall_at_5",
    "image_to_text_recall_at_10",
    "text_to_image_recall_at_1",
    "text_to_image_recall_at_5",
    "text_to_image_recall_at_10",
    "rsum",
    "image_to_text_median_rank",
    "text_to_image_median_rank",
]


def test_ranks_by_hand_with_two_captions_an_image():
    scores = torch.tensor([[0.1, 0.8, 0.5, 0.9], [0.3, 0.4, 0.2, 0.6]])
    image_ranks, text_ranks = retrieval_ranks(scores, [0, 1], [0, 0, 1, 1])
    # Image 0: its best text has 0.8, only 0.9 is above; image 1: its best has 0.6, nothing is above.
    assert image_ranks.tolist() == [1, 0]
    # Down the columns: 0.1 < 0.3; 0.8 > 0.4; 0.2 < 0.5; 0.6 < 0.9.
    assert text_ranks.tolist() == [1, 0, 1, 1]


def test_ties_speak_against_the_right_answer():
    image_ranks, text_ranks = retrieval_ranks(torch.zeros(3, 3), [0, 1, 2], [0, 1, 2])
    assert image_ranks.tolist() == text_ranks.tolist() == [2, 2, 2]


def test_scores_within_the_tolerance_tie():
    scores = torch.tensor([[0.500, 0.499], [0.490, 0.492]])
    for tolerance, of_images, of_texts in ((0.0, [0, 0], [0, 1]), (0.0015, [1, 0], [0, 1]), (0.0025, [1, 1], [0, 1])):
        ranks = retrieval_ranks(scores, [0, 1], [0, 1], tie_tolerance=tolerance)
        assert [side.tolist() for side in ranks] == [of_images, of_texts]


def test_a_tie_between_right_answers_costs_nothing():
    image_ranks, text_ranks = retrieval_ranks(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), [0, 1], [0, 0, 1])
    assert image_ranks.tolist() == [0, 0] and text_ranks.tolist() == [0, 0, 0]


def test_several_images_of_one_meaning_count_with_their_best():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.8, 0.3]])
    image_ranks, text_ranks = retrieval_ranks(scores, [5, 5, 6], [5, 6])
    assert image_ranks.tolist() == [0, 1, 1]
    # Text 0 has 0.9 from image 0, although image 1 of the same meaning scores lowest; text 1 has 0.3 below 0.7.
    assert text_ranks.tolist() == [0, 1]


def test_perfect_and_worst_ranking():
    ids = torch.arange(20)
    perfect = retrieval_metrics(*retrieval_ranks(torch.eye(20), ids, ids))
    worst = retrieval_metrics(*retrieval_ranks(-torch.eye(20), ids, ids))
    assert list(perfect) == METRIC_NAMES and all(type(value) is float for value in perfect.values())
    assert perfect["rsum"] == 600.0 and perfect["image_to_text_median_rank"] == 1.0
    assert worst["rsum"] == 0.0 and worst["text_to_image_median_rank"] == 20.0


def test_metrics_by_hand():
    metrics = retrieval_metrics(torch.tensor([0, 4, 5, 9]), torch.tensor([0, 0, 10]))
    assert [metrics[f"image_to_text_recall_at_{k}"] for k in (1, 5, 10)] == [25.0, 50.0, 100.0]
    assert metrics["text_to_image_recall_at_10"] == pytest.approx(200 / 3)
    assert metrics["rsum"] == pytest.approx(175 + 3 * 200 / 3)
    assert metrics["image_to_text_median_rank"] == 5.5
    assert metrics["text_to_image_median_rank"] == 1.0
    assert recall_at_k(np.array([0, 1, 2, 3]), 3) == 75.0


def _brute_force_ranks(scores, query_ids, gallery_ids):
    ranks = []
    for row, query in zip(scores, query_ids, strict=True):
        best = max(score for score, item in zip(row, gallery_ids, strict=True) if item == query)
        ranks.append(sum(score >= best for score, item in zip(row, gallery_ids, strict=True) if item != query))
    return ranks


@st.composite
def _problems(draw):
    """Scores with many ties, and ids that all occur on both sides."""
    ids = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4, unique=True))
    image_ids = draw(st.permutations(ids + draw(st.lists(st.sampled_from(ids), max_size=4))))
    text_ids = draw(st.permutations(ids + draw(st.lists(st.sampled_from(ids), max_size=8))))
    size = len(image_ids) * len(text_ids)
    values = draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    scores = torch.tensor(values, dtype=torch.float32).view(len(image_ids), len(text_ids)) / 2
    return scores, image_ids, text_ids


@settings(max_examples=60, deadline=None)
@given(problem=_problems(), chunk=st.integers(1, 4))
def test_ranks_equal_brute_force(problem, chunk):
    scores, image_ids, text_ids = problem
    with mock.patch("modeling_pico.evaluation.retrieval_metrics._CHUNK", chunk):
        image_ranks, text_ranks = retrieval_ranks(scores, image_ids, text_ids)
    assert image_ranks.tolist() == _brute_force_ranks(scores.tolist(), image_ids, text_ids)
    assert text_ranks.tolist() == _brute_force_ranks(scores.T.tolist(), text_ids, image_ids)


def _cut(size: int, cuts: int, order: list[int]) -> list[torch.Tensor]:
    """Parts of `order`, cut where `cuts` has a bit."""
    edges = [0] + [place for place in range(1, size) if cuts >> place & 1] + [size]
    return [torch.tensor(order[start:end]) for start, end in zip(edges, edges[1:], strict=False)]


@settings(max_examples=60, deadline=None)
@given(problem=_problems(), cuts=st.tuples(st.integers(0, 2**8 - 1), st.integers(0, 2**12 - 1)), data=st.data())
def test_tiles_in_any_order_equal_the_full_matrix(problem, cuts, data):
    scores, image_ids, text_ids = problem
    rows, columns = (
        _cut(size, cut, data.draw(st.permutations(range(size)))) for size, cut in zip(scores.shape, cuts, strict=True)
    )
    tiles = data.draw(st.permutations(list(itertools.product(rows, columns))))
    # Two processes, each with a part of the tiles; between them go maxima and sums alone.
    shares = [tiles[: len(tiles) // 2], tiles[len(tiles) // 2 :]]
    processes = [RetrievalRanks(image_ids, text_ids) for _ in shares]
    for process, share in zip(processes, shares, strict=True):
        for some, others in share:
            if torch.isin(torch.tensor(image_ids)[some], torch.tensor(text_ids)[others]).any():
                process.observe(some, others, scores[some[:, None], others])
    best = torch.maximum(processes[0].best, processes[1].best)
    for process, share in zip(processes, shares, strict=True):
        process.best.copy_(best)
        for some, others in share:
            process.count(some, others, scores[some[:, None], others])
    processes[0].counts += processes[1].counts
    for streamed, full in zip(processes[0].compute(), retrieval_ranks(scores, image_ids, text_ids), strict=True):
        assert torch.equal(streamed, full)


def test_a_right_pair_that_was_not_observed_is_noticed():
    ranks = RetrievalRanks([0, 1], [0, 1])
    scores = torch.tensor([[0.5, 0.1], [0.5, 0.7]])
    ranks.observe(slice(0, 1), slice(None), scores[:1])
    for start in (0, 1):
        ranks.count(slice(start, start + 1), slice(None), scores[start : start + 1])
    with pytest.raises(ValueError, match="1 right pairs score higher in count"):
        ranks.compute()


def test_fold_members_by_hand():
    # The identity 1 has an image in both folds, so its text is in both.
    (first, its_texts), (second, other_texts) = fold_members([0, 1, 1, 2], [2, 1, 0, 0], 2)
    assert (first, its_texts.tolist()) == (slice(0, 2), [1, 2, 3])
    assert (second, other_texts.tolist()) == (slice(2, 4), [0, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_and_numpy(dtype):
    scores = torch.tensor([[3, 1], [4, 2]], dtype=dtype)
    assert [ranks.tolist() for ranks in retrieval_ranks(scores, [0, 1], [0, 1])] == [[0, 1], [1, 0]]
    as_numpy = scores.double().numpy()
    assert [ranks.tolist() for ranks in retrieval_ranks(as_numpy, np.array([0, 1]), np.array([0, 1]))] == [
        [0, 1],
        [1, 0],
    ]


def test_folds_cover_the_last_image_of_each():
    ids = torch.arange(6)
    scores = torch.eye(6)
    # The last image of either fold of three loses against a text of its own fold.
    scores[2, 0] = scores[5, 3] = 2.0
    # The first image loses against a text of the other fold, which a fold does not see.
    scores[0, 5] = 2.0
    folded = folded_retrieval_metrics(scores, ids, ids, num_folds=2)
    assert folded["image_to_text_recall_at_1"] == pytest.approx(100 * 4 / 6)
    assert folded["text_to_image_recall_at_1"] == pytest.approx(100 * 4 / 6)
    assert list(folded) == METRIC_NAMES


def test_folds_take_exactly_the_texts_of_their_images():
    generator = torch.Generator().manual_seed(0)
    image_ids = torch.arange(12)
    text_ids = image_ids.repeat_interleave(5)[torch.randperm(60, generator=generator)]
    scores = torch.randn(12, 60, generator=generator)
    folds = []
    for start in (0, 4, 8):
        columns = (text_ids >= start) & (text_ids < start + 4)
        block = scores[start : start + 4, columns]
        folds.append(retrieval_metrics(*retrieval_ranks(block, image_ids[start : start + 4], text_ids[columns])))
    folded = folded_retrieval_metrics(scores, image_ids, text_ids, num_folds=3)
    for name in METRIC_NAMES:
        assert folded[name] == pytest.approx(sum(fold[name] for fold in folds) / 3)
    one = folded_retrieval_metrics(scores, image_ids, text_ids, num_folds=1)
    assert one == retrieval_metrics(*retrieval_ranks(scores, image_ids, text_ids))


def test_chance_in_closed_form():
    # One caption an image: k / n each way.
    assert chance_rsum(range(40), range(40)) == pytest.approx(2 * 100 * (1 + 5 + 10) / 40)
    # A gallery smaller than k is found whole.
    assert chance_rsum([0, 1], [0, 1]) == pytest.approx(2 * (50 + 100 + 100))
    # Two captions of each of two images: 1 - (2/4) at 1, certain from 3 on; the other way 1/2 at 1, certain from 2 on.
    assert chance_rsum([0, 1], [0, 0, 1, 1]) == pytest.approx(50 + 200 + 50 + 200)


def test_chance_agrees_with_random_rankings():
    generator = torch.Generator().manual_seed(0)
    image_ids = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 7, 8])
    text_ids = torch.arange(9).repeat_interleave(3)[:-1]
    rsums = [
        retrieval_metrics(*retrieval_ranks(torch.rand(12, 26, generator=generator), image_ids, text_ids))["rsum"]
        for _ in range(600)
    ]
    standard_error = np.std(rsums) / math.sqrt(len(rsums))
    assert abs(np.mean(rsums) - chance_rsum(image_ids, text_ids)) < 4 * standard_error


def _stream(*tiles):
    ranks = RetrievalRanks([0, 1], [0, 1])
    ranks.observe(slice(None), slice(None), torch.eye(2))
    for tile in tiles:
        ranks.count(*tile)
    return ranks.compute()


ALL = slice(None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_ranks(torch.eye(2), [0, 1], [0, 0]), "1 of 2 images have no right text and 0 of 2 texts"),
        (lambda: retrieval_ranks(torch.eye(2), [0, 0], [0, 7]), "0 of 2 images .* 1 of 2 texts have no right image"),
        (lambda: chance_rsum([0, 1, 2], [0]), "2 of 3 images"),
        (lambda: folded_retrieval_metrics(torch.ones(1, 2), [0], [0, 1], 1), "1 of 2 texts"),
        (lambda: retrieval_ranks(torch.tensor([[0.0, math.nan], [math.inf, 0.0]]), [0, 1], [0, 1]), "2 values .* NaN"),
        (lambda: retrieval_ranks(torch.eye(3), [0, 1], [0, 1]), r"= \(2, 2\), got \(3, 3\)"),
        (lambda: retrieval_ranks(torch.eye(2), ["a", "b"], ["a", "b"]), "too many dimensions 'str'"),
        (
            lambda: retrieval_ranks(torch.eye(2), [0.0, 1.0], [0, 1]),
            "image_ids must be .* got torch.float32",
        ),
        (
            lambda: retrieval_ranks(torch.eye(2), [0, 1], []),
            r"text_ids must be .* at least one, got",
        ),
        (lambda: folded_retrieval_metrics(torch.eye(5), range(5), range(5), 2), "5 images .* 2 folds of equal size"),
        (lambda: folded_retrieval_metrics(torch.eye(5), range(4), range(4), 2), r"= \(4, 4\), got \(5, 5\)"),
        (lambda: recall_at_k(torch.tensor([]), 1), "at least one query"),
        (lambda: recall_at_k(torch.tensor([0]), 0), "k must be at least 1, got 0"),
        (lambda: chance_rsum(range(5), range(5), 2), "5 images .* 2 folds of equal size"),
        (lambda: fold_members([0, 1], [0, 1], 0), "2 images .* 0 folds"),
        (lambda: RetrievalRanks([0, 1], [0]), "1 of 2 images have no right text"),
        (lambda: _stream((slice(0, 1), ALL, torch.eye(2)[:1])), "given 2 pairs, but there are 4"),
        (lambda: _stream((ALL, ALL, torch.eye(2)), (ALL, slice(1), torch.eye(2)[:, :1])), "given 6 pairs, .* are 4"),
        (lambda: _stream((slice(1, 3), ALL, torch.eye(2))), r"must be \(1, 2\) as its rows .* got \(2, 2\)"),
        (lambda: _stream((ALL, ALL, torch.eye(2).half())), "is torch.float16, but `dtype` announced torch.float32"),
        (lambda: _stream((ALL, ALL, torch.full((2, 2), math.nan))), "hold 4 values that are NaN"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_chance_over_folds_is_that_of_one_fold_when_all_are_alike():
    image_ids = np.arange(40)
    text_ids = np.repeat(image_ids, 5)
    assert chance_rsum(image_ids, text_ids, num_folds=4) == pytest.approx(chance_rsum(image_ids[:10], text_ids[:50]))
