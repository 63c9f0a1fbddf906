"""Batches in which every meaning occurs once, as a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from .dataset import SampleKey


# A single sample has no negatives, so no process is ever handed fewer samples than this.
SMALLEST_BATCH = 2


class UniqueIdBatchSampler(Sampler[list[SampleKey]]):
    """
    Yields batches of [`SampleKey`] in which each id occurs at most once, over all processes together.

    Global batches of `batch_size * num_processes` samples are made first; each is then yielded as `num_processes`
    consecutive local batches, because accelerate deals consecutive batches to consecutive ranks. Every process has to
    build the sampler with the same arguments.

    An epoch of `N` samples has as many global batches of `G` as can be filled without repeating an id: `N // G` as
    long as no id has more samples than that; else the surplus of frequent ids is left over. Which samples are left
    over changes from epoch to epoch; the number of batches does not.

    Args:
        ids, num_captions (`Sequence[int]` or `torch.Tensor` of shape `(rows,)`):
            Those of [`CaptionedImageDataset`].
        batch_size (`int`):
            Samples in the batch of one process, at least 2 (a single sample has no negatives).
        num_processes (`int`, *optional*, defaults to 1):
            Number of processes that share a global batch.
        seed (`int`, *optional*, defaults to 0):
            With the epoch, decides everything: order, captions and the seeds of the augmentation.
        drop_last (`bool`, *optional*, defaults to `True`):
            `True`: only full batches, the left-over samples wait for another epoch. `False`: they follow at the end in
            shorter batches, filled up with samples seen before to at least two per process.
        captions (`str`, *optional*, defaults to `"random"`):
            `"random"`: each row is one sample an epoch, with a caption drawn for that epoch. `"all"`: every pair of a
            row and one of its captions is a sample.

    Attributes:
        batch_size (`int` or `None`):
            The size of each batch, or `None` with several processes and `drop_last=False`: accelerate reads this
            attribute and would otherwise discard the shorter batches.

    Raises:
        ValueError: for a batch of one sample, or when there are fewer ids than samples in a global batch.
    """

    def __init__(
        self,
        ids: Sequence[int] | torch.Tensor,
        num_captions: Sequence[int] | torch.Tensor,
        batch_size: int,
        *,
        num_processes: int = 1,
        seed: int = 0,
        drop_last: bool = True,
        captions: str = "random",
    ) -> None:
        # Copies, not views: handing a data set to a worker that is not forked moves its tensors to shared memory and
        # frees the memory that a view would go on reading.
        row_ids, self._num_captions = (np.asarray(values).astype(np.int64) for values in (ids, num_captions))
        if (self._num_captions < 1).any():
            raise ValueError(f"Every row needs a caption; row {int(self._num_captions.argmin())} has none.")
        if batch_size < SMALLEST_BATCH:
            raise ValueError(
                f"`batch_size` must be at least {SMALLEST_BATCH} (one sample has no negatives), got {batch_size}."
            )

        unique, codes = np.unique(row_ids, return_inverse=True)
        self._global_size = batch_size * num_processes
        if len(unique) < self._global_size:
            raise ValueError(
                f"A batch of {batch_size} on {num_processes} process(es) needs {self._global_size} different ids, but "
                f"the data has {len(unique)}: an id may occur only once in it. Lower `batch_size`."
            )
        rows = np.arange(len(row_ids))
        self._rows = rows if captions == "random" else np.repeat(rows, self._num_captions)
        self._codes = codes[self._rows]
        self._counts = np.bincount(self._codes, minlength=len(unique))
        self._full_batches = _max_full_batches(self._counts, self._global_size)

        left_over = len(self._rows) - self._full_batches * self._global_size
        surplus = max(0, int(self._counts.max()) - self._full_batches)
        # One batch can take at most one sample of the most frequent id, and at most a global batch of all of them.
        self._tail_batches = 0 if drop_last else max(surplus, -(-left_over // self._global_size))

        self.num_processes = num_processes
        self.seed = seed
        self.drop_last = drop_last
        self.captions = captions
        self.batch_size = batch_size if drop_last or num_processes == 1 else None
        self.epoch = 0

    @property
    def sampler(self) -> UniqueIdBatchSampler:
        """Itself: accelerate looks for `set_epoch` at this attribute when the sampler is wrapped."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration yields."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Local batches of an epoch, over all processes: a multiple of `num_processes`, equal for all epochs."""
        return (self._full_batches + self._tail_batches) * self.num_processes

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # SeedSequence mixes the two numbers, so that (0, 1) and (1, 0) share nothing.
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed))

        order = torch.randperm(len(self._rows), generator=generator).numpy()
        full, left_over = _select_full(order, self._codes, self._counts, self._full_batches, self._global_size)
        table = full.reshape(self._full_batches, self._global_size)
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        _separate_ids(table, self._codes, rng)
        batches = list(table)
        if self._tail_batches and len(left_over):
            batches += self._tail(left_over, rng)

        if self.captions == "random":
            share = torch.rand(len(self._rows), generator=generator, dtype=torch.float64).numpy()
            caption = (share * self._num_captions).astype(np.int64)
        else:
            starts = np.cumsum(self._num_captions) - self._num_captions
            caption = np.arange(len(self._rows)) - np.repeat(starts, self._num_captions)
        seeds = torch.randint(2**62, (len(self._rows),), generator=generator).numpy()
        for batch in batches:
            for part in np.array_split(batch, self.num_processes):
                columns = (self._rows[part].tolist(), caption[part].tolist(), seeds[part].tolist())
                yield [SampleKey(*values) for values in zip(*columns, strict=True)]

    def _tail(self, left_over: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Deals the left-over samples to the shorter batches at the end; no id twice in one of them."""
        # Dealing in the order of ids puts the samples of one id into consecutive, hence different, batches.
        dealt = left_over[np.argsort(self._codes[left_over], kind="stable")]
        smallest = SMALLEST_BATCH * self.num_processes
        tail = []
        for index in range(self._tail_batches):
            batch = dealt[index :: self._tail_batches]
            if len(batch) < smallest:
                others = rng.permutation(len(self._rows))
                others = others[~np.isin(self._codes[others], self._codes[batch])]
                _, first = np.unique(self._codes[others], return_index=True)
                batch = np.concatenate([batch, others[np.sort(first)[: smallest - len(batch)]]])
            tail.append(batch)
        return tail


def _max_full_batches(counts: np.ndarray, size: int) -> int:
    """The largest number of batches of `size` different ids that samples with these counts of ids allow."""
    low, high = 0, int(counts.sum()) // size
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= middle * size:
            low = middle
        else:
            high = middle - 1
    return low


def _select_full(
    order: np.ndarray, codes: np.ndarray, counts: np.ndarray, num_batches: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits a random order of the samples into those for full batches (at most `num_batches` an id) and the rest."""
    by_id = np.argsort(codes[order], kind="stable")
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(order), dtype=np.int64)  # how often the sample's id came before in `order`
    rank[by_id] = np.arange(len(order)) - np.repeat(starts, counts)
    keep = rank < num_batches
    # Fewer than `size` samples are too many now. They come from different ids, none of which has lost a sample
    # already, so that the left-over samples fit into the same number of batches in every epoch.
    excess = int(keep.sum()) - num_batches * size
    removable = np.flatnonzero((rank == 0) & (counts[codes[order]] <= num_batches))
    keep[removable[:excess]] = False
    return order[keep], order[~keep]


def _separate_ids(table: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> None:
    """
    Swaps samples between the batches, in place, until none holds an id twice.

    With at most as many samples of an id as batches, a swap that lowers the number of repeated ids always exists: if
    batch `b` holds `u` twice, some batch lacks `u`; that one holds an id that `b` lacks, or repeats an id itself. Few
    samples have to move: each pair of samples of an id meets with probability 1 / batches.
    """
    ids = codes[table]
    num_batches, size = ids.shape
    by_id = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, by_id, axis=1)
    batch_index, place = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
    positions = by_id[batch_index, place + 1]
    present = np.zeros(int(codes.max()) + 1, dtype=bool)

    for b, position in zip(batch_index.tolist(), positions.tolist(), strict=True):
        while np.count_nonzero(ids[b] == ids[b, position]) > 1:
            other = _batch_without(ids, ids[b, position], rng)
            present[ids[b]] = True
            candidates = np.flatnonzero(~present[ids[other]])
            present[ids[b]] = False
            if not len(candidates):
                repeats = (ids[other][:, None] == ids[other]).sum(axis=1)
                candidates = np.flatnonzero(repeats > 1)
            partner = candidates[rng.integers(len(candidates))]
            for array in (table, ids):
                array[b, position], array[other, partner] = array[other, partner], array[b, position]


def _batch_without(ids: np.ndarray, code: int, rng: np.random.Generator) -> int:
    """A random batch that does not hold the id `code`."""
    for other in rng.integers(len(ids), size=16).tolist():
        if not (ids[other] == code).any():
            return other
    lacking = np.flatnonzero(~(ids == code).any(axis=1))
    return int(lacking[rng.integers(len(lacking))])
