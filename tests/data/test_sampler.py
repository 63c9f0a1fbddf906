from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_pico.data import SampleKey, UniqueIdBatchSampler


def global_batches(sampler):
    local, n = list(sampler), sampler.num_processes
    assert len(local) == len(sampler)
    assert len(local) % n == 0
    return [sum(local[i : i + n], []) for i in range(0, len(local), n)]


def assert_unique(batches, ids):
    for batch in batches:
        batch_ids = [int(ids[key.row]) for key in batch]
        assert len(set(batch_ids)) == len(batch_ids)


def test_hand_computed_counts():
    # Four ids with two rows each, batches of three: 8 // 3 = 2 full batches, two samples left over.
    ids, captions = [0, 0, 1, 1, 2, 2, 3, 3], [1] * 8
    sampler = UniqueIdBatchSampler(ids, captions, 3)
    assert len(sampler) == 2
    assert [len(batch) for batch in sampler] == [3, 3]
    sampler = UniqueIdBatchSampler(ids, captions, 3, drop_last=False)
    assert [len(batch) for batch in sampler] == [3, 3, 2]
    assert sorted(key.row for batch in sampler for key in batch) == list(range(8))


def test_a_frequent_id_limits_the_full_batches():
    # Id 0 has 10 rows, ids 1, 2, 3 one each. Two full pairs need min(10, 2) + 3 >= 4: yes; three need 3 + 3 >= 6: yes;
    # four need 4 + 3 >= 8: no.
    ids, captions = [0] * 10 + [1, 2, 3], [1] * 13
    sampler = UniqueIdBatchSampler(ids, captions, 2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3
    assert_unique(batches, ids)
    # The other seven rows of id 0 follow one by one, each with a partner seen before.
    sampler = UniqueIdBatchSampler(ids, captions, 2, drop_last=False)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [2] * 10
    assert_unique(batches, ids)
    assert {key.row for batch in batches for key in batch} == set(range(13))


@pytest.mark.parametrize("captions", ["random", "all"])
def test_the_memory_of_what_was_given_is_not_read_again(captions):
    ids, num_captions = torch.arange(40), 1 + torch.arange(40) % 3
    sampler = UniqueIdBatchSampler(ids, num_captions, 8, captions=captions)
    batches = list(sampler)
    ids.zero_()
    num_captions.fill_(9)
    assert list(sampler) == batches


def test_random_captions_and_all_captions():
    ids, captions = list(range(40)), [1 + row % 3 for row in range(40)]
    sampler = UniqueIdBatchSampler(ids, captions, 8)
    drawn = Counter()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        assert sorted(key.row for key in keys) == list(range(40))
        drawn.update((key.row, key.caption) for key in keys)
    assert set(drawn) == {(row, c) for row in range(40) for c in range(captions[row])}
    sampler = UniqueIdBatchSampler(ids, captions, 8, captions="all", drop_last=False)
    pairs = Counter((key.row, key.caption) for batch in sampler for key in batch)
    assert set(pairs) == set(drawn)
    assert_unique(sampler, ids)


def test_epochs_are_functions_of_seed_and_epoch():
    def epoch(seed, number):
        sampler = UniqueIdBatchSampler(torch.arange(50) // 2, torch.full((50,), 5), 6, seed=seed)
        sampler.set_epoch(number)
        torch.rand(3)  # the global generator plays no part
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 1)
    keys = [key for batch in epoch(0, 0) for key in batch]
    assert isinstance(keys[0], SampleKey)
    assert all(type(value) is int for value in keys[0])
    assert len({key.seed for key in keys}) == len(keys)


@given(
    counts=st.lists(st.integers(1, 12), min_size=6, max_size=14),
    batch_size=st.integers(2, 3),
    num_processes=st.integers(1, 2),
    seed=st.integers(0, 5),
    drop_last=st.booleans(),
    captions=st.sampled_from(["random", "all"]),
)
@settings(max_examples=60, deadline=None)
def test_properties(counts, batch_size, num_processes, seed, drop_last, captions):
    ids = [i for i, count in enumerate(counts) for _ in range(count)]
    num_captions = [1 + row % 2 for row in range(len(ids))]
    options = {"num_processes": num_processes, "seed": seed, "drop_last": drop_last, "captions": captions}
    sampler = UniqueIdBatchSampler(ids, num_captions, batch_size, **options)
    size = batch_size * num_processes
    samples = num_captions if captions == "all" else [1] * len(ids)
    per_id = Counter()
    for row, n in enumerate(samples):
        per_id[ids[row]] += n
    full = max(b for b in range(sum(samples) // size + 1) if sum(min(n, b) for n in per_id.values()) >= b * size)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = global_batches(sampler)
        assert_unique(batches, ids)
        assert all(len(batch) == size for batch in batches[:full])
        assert all(2 * num_processes <= len(batch) <= size for batch in batches)
        seen = Counter((key.row, key.caption if captions == "all" else 0) for batch in batches for key in batch)
        if drop_last:
            assert len(batches) == full
            assert max(seen.values()) == 1
        else:
            assert len(seen) == sum(samples)


def test_emoji_like_data_loses_almost_nothing():
    generator = torch.Generator().manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(1900), torch.randint(1, 7, (1900,), generator=generator))
    sampler = UniqueIdBatchSampler(ids, torch.full((len(ids),), 5), 128)
    batches = list(sampler)
    assert len(batches) == len(ids) // 128
    rows = [key.row for batch in batches for key in batch]
    assert len(set(rows)) == len(rows) > len(ids) - 128
    assert_unique(batches, ids)


def test_left_over_rows_change_from_epoch_to_epoch():
    sampler = UniqueIdBatchSampler(range(10), [1] * 10, 4)
    left_over = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        left_over |= set(range(10)) - {key.row for batch in sampler for key in batch}
    assert left_over == set(range(10))


@pytest.mark.parametrize("drop_last", [True, False])
def test_accelerate_deals_one_global_batch_to_the_ranks(drop_last):
    ids = torch.arange(46) // 2
    sampler = UniqueIdBatchSampler(ids, torch.ones(46), 5, num_processes=3, drop_last=drop_last)
    expected = global_batches(sampler)
    assert len(expected) == (3 if drop_last else 4)
    shards = [BatchSamplerShard(sampler, num_processes=3, process_index=rank) for rank in range(3)]
    ranks = [list(shard) for shard in shards]
    assert [len(rank) for rank in ranks] == [len(shard) for shard in shards] == [len(expected)] * 3
    dealt = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert dealt == expected
    assert_unique(dealt, ids)
    seen = {key.row for batch in dealt for key in batch}
    assert len(seen) == (45 if drop_last else 46)


def test_set_epoch_reaches_the_sampler_through_accelerate():
    class Keys:
        def __getitem__(self, key):
            return key

        def __len__(self):
            return 20

    def collate(keys):
        return torch.tensor([key.row for key in keys])

    sampler = UniqueIdBatchSampler(range(20), [1] * 20, 4)
    for processes in (1, 2):
        loader = prepare_data_loader(
            DataLoader(Keys(), batch_sampler=sampler, collate_fn=collate), num_processes=processes, process_index=0
        )
        loader.set_epoch(3)
        assert sampler.epoch == 3
        first = [batch.tolist() for batch in loader]
        loader.set_epoch(3)
        assert [batch.tolist() for batch in loader] == first
        loader.set_epoch(4)
        assert [batch.tolist() for batch in loader] != first
    loader = prepare_data_loader(DataLoader(Keys(), batch_sampler=sampler, collate_fn=collate), num_processes=1)
    loader.set_epoch(3)
    everything = [batch.tolist() for batch in loader]
    rest = skip_first_batches(loader, 2)
    rest.set_epoch(3)
    assert [batch.tolist() for batch in rest] == everything[2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1, 1], 3), "needs 3 different ids, but the data has 2"),
        (([0, 1, 2], [1, 1, 1], 2, 2), r"2 on 2 process\(es\) needs 4 different ids, but the data has 3"),
        (([0, 1], [1, 1], 1), "at least 2 .*no negatives.*got 1"),
        (([0, 1], [1, 0], 2), "row 1 has none"),
        (([], [], 2), "needs 2 different ids, but the data has 0"),
    ],
)
def test_errors(arguments, message):
    ids, num_captions, batch_size, *rest = arguments
    with pytest.raises(ValueError, match=message):
        UniqueIdBatchSampler(ids, num_captions, batch_size, **dict(zip(["num_processes"], rest, strict=False)))
