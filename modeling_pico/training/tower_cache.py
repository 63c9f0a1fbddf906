"""Hidden states of frozen towers, computed once and kept on disk: what is trained is the alignment head alone."""

from __future__ import annotations

import bisect
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from accelerate import PartialState
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data import CaptionedImageDataset, PicoDataCollator
from ..data.dataset import SampleKey, caption_code
from ..distributed import own_rows, raise_together
from ..durable.files import synchronise
from ..evaluation.embedding_cache import describe_images, describe_software, describe_texts
from ..fingerprint import describe_tower, digest, has_adapters
from ..model.modeling_pico import PicoModel, TokenStates


logger = logging.get_logger(__name__)


class TowerStates(Dataset):
    """
    A [`CaptionedImageDataset`] of which the towers' hidden states are on disk. Gives whole batches, as
    [`PicoDataCollator`] does, but with `image_states` and `text_states` in place of images and texts. They were
    made of `dataset`.

    Args:
        dataset ([`CaptionedImageDataset`]): The data set that they were made of.
        images (`list[Path]`): Folders with the states of the images of consecutive blocks of rows.
        texts (`list[Path]`): The same of the captions.
        num_views (`int`, *optional*):
            Drawings of each image that are kept, of which `SampleKey.seed` chooses one; None: the images as they are.
    """

    def __init__(
        self, dataset: CaptionedImageDataset, images: list[Path], texts: list[Path], num_views: int | None = None
    ) -> None:
        self.dataset: CaptionedImageDataset | None = dataset
        self.ids, self.num_captions, self.styles = dataset.ids, dataset.num_captions, dataset.styles
        captions = [text for texts in dataset.dataset["captions"][:] for text in texts]
        self._codes = torch.tensor([caption_code(text) for text in captions], dtype=torch.int64)
        self._first_text = np.concatenate([[0], self.num_captions.numpy().cumsum()])
        self._images, self._texts, self._num_views = _Blocks(images), _Blocks(texts), num_views

    # Workers read states alone.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dataset": None}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, keys: list[int] | list[SampleKey]) -> dict[str, torch.Tensor]:
        drawings: list[int] = []
        texts: list[int] = []
        rows: list[int] = []
        views = self._num_views or 1
        for key in keys:
            if not isinstance(key, SampleKey) and self._num_views is not None:
                raise ValueError(
                    "These are augmented images, which are for training; an evaluation asks for plain ones."
                )
            row, view = (key.row, key.seed % views) if isinstance(key, SampleKey) else (key, 0)
            numbers = range(self._first_text[row], self._first_text[row + 1])
            texts += [numbers[key.caption]] if isinstance(key, SampleKey) else numbers
            drawings.append(row * views + view)
            rows.append(row)
        words = [torch.from_numpy(states).float() for states in self._texts.states(texts)]
        lengths = torch.tensor([len(states) for states in words])
        batch = {
            "image_states": torch.from_numpy(np.stack(self._images.states(drawings))).float(),
            "image_class_state": self._images.class_states(drawings),
            "text_states": torch.nn.utils.rnn.pad_sequence(words, batch_first=True),
            "text_class_state": self._texts.class_states(texts),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "image_ids": self.ids[rows],
            "caption_codes": self._codes[texts],
        }
        if not isinstance(keys[0], SampleKey):
            batch["num_captions"] = self.num_captions[rows]
            batch["text_ids"] = self.ids[rows].repeat_interleave(self.num_captions[rows])
        return {name: values for name, values in batch.items() if values is not None}


class _Blocks:
    """Hidden states in files: `states.npy` `(tokens, hidden)`, of which item `i` has those from `starts[i]` on."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        files = [{file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")} for folder in folders]
        self.files = files
        self.first_item = np.concatenate([[0], np.cumsum([len(block["starts"]) - 1 for block in files])])

    # Workers map the files themselves: a mapped array would be sent to them as a copy.
    def __reduce__(self) -> tuple[Any, ...]:
        return _Blocks, (self.folders,)

    def _find(self, item: int) -> tuple[dict[str, np.ndarray], int]:
        block = bisect.bisect_right(self.first_item, item) - 1
        return self.files[block], item - int(self.first_item[block])

    def states(self, items: list[int]) -> list[np.ndarray]:
        found = []
        for block, item in map(self._find, items):
            start, stop = block["starts"][item : item + 2]
            found.append(np.array(block["states"][start:stop]))
        return found

    def class_states(self, items: list[int]) -> torch.Tensor | None:
        if "class_states" not in self.files[0]:
            return None
        return torch.from_numpy(
            np.stack([block["class_states"][item] for block, item in map(self._find, items)])
        ).float()


def as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Collates what [`TowerStates`] gives."""
    return batch


def cached_states(
    folder: str | Path,
    model: PicoModel,
    dataset: Any,
    collator: Any,
    *,
    batch_size: int = 64,
    num_views: int | None = None,
    precision: str = "no",
) -> TowerStates:
    r"""
    The hidden states of both towers for all images and captions of a data set, in half precision: read from `folder`
    or computed and kept there. Each process computes those of its own block of rows and reads all.

    Args:
        folder (`str` or `Path`): Folder of the cache, which all processes must see.
        model ([`PicoModel`]): The model, on its device.
        dataset ([`CaptionedImageDataset`]): Images and captions.
        collator ([`PicoDataCollator`]): Preprocesses images and captions.
        batch_size (`int`, *optional*, defaults to 64): Images, or captions, encoded at a time.
        num_views (`int`, *optional*):
            Drawings of each image by the data set's `transform` that are kept, for training; by default the images as
            they are.
        precision (`str`, *optional*, defaults to `"no"`): Names the mixed precision that the towers run in.

    Returns:
        [`TowerStates`]

    Raises:
        ValueError: for data sets and collators of one's own, and states that half precision cannot hold.
        OSError: if the folder cannot be written, or is not the same for all processes.
    """
    found = type(dataset), type(collator)
    if found != (CaptionedImageDataset, PicoDataCollator):
        raise ValueError(
            "tower_cache_dir needs a CaptionedImageDataset and a PicoDataCollator, whose images and captions can be "
            f"told apart from others, but got {found[0].__name__} and {found[1].__name__}."
        )
    if has_adapters(model.vision_model) or has_adapters(model.text_model):
        raise ValueError(
            "tower_cache_dir knows towers by their weights, and what adapters do is not in these alone. Merge them "
            "into the model, or leave tower_cache_dir out."
        )
    rows, views = own_rows(len(dataset)), num_views or 1

    def images() -> Iterator[tuple[TokenStates, torch.Tensor]]:
        drawings = [(row, view) for row in rows for view in range(views)]
        for start in logging.tqdm(range(0, len(drawings), batch_size), desc="Encoding images", delay=5):
            chosen = drawings[start : start + batch_size]
            samples = [
                dataset[row if num_views is None else SampleKey(row, 0, _seed(row, view))] for row, view in chosen
            ]
            pixels = collator(samples)["pixel_values"].to(model.device, model.dtype)
            states = model.get_image_states(pixels)
            yield states, states.mask

    def texts() -> Iterator[tuple[TokenStates, torch.Tensor]]:
        captions = [text for texts in dataset.dataset[rows.start : rows.stop]["captions"] for text in texts]
        for start in logging.tqdm(range(0, len(captions), batch_size), desc="Encoding captions", delay=5):
            inputs = collator.encode_texts(captions[start : start + batch_size])
            inputs = {name: values.to(model.device) for name, values in inputs.items() if name != "caption_codes"}
            states = model.get_text_states(**inputs)
            # Special tokens are kept: which of them take part is an option of the model.
            lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
            yield states, torch.arange(states.states.shape[1], device=model.device) < lengths

    config = model.config
    software = list(describe_software(precision, model.device))
    of_images = [describe_tower(config.vision_config), config.pooling, config.vision_special_tokens, num_views]
    of_images += [num_views and Hasher.hash(dataset.transform), *describe_images(dataset, collator)]
    of_texts = [describe_tower(config.text_config), config.pooling, *describe_texts(dataset, collator)]
    image_key = digest([*software, *of_images], model.vision_model.state_dict())
    text_key = digest([*software, *of_texts], model.text_model.state_dict())
    kept_images = _kept(Path(folder), f"images-{image_key}", model, images)
    return TowerStates(dataset, kept_images, _kept(Path(folder), f"texts-{text_key}", model, texts), num_views)


def _kept(
    folder: Path, name: str, model: PicoModel, encode: Callable[[], Iterator[tuple[TokenStates, torch.Tensor]]]
) -> list[Path]:
    """Folders with the states of all processes; this one makes its own where they are missing, whole or not at all."""
    state = PartialState()
    of_all = [folder / f"{name}-{process}-of-{state.num_processes}" for process in range(state.num_processes)]
    own, error = of_all[state.process_index], None
    if not own.is_dir():
        try:
            _make(own, model, encode)
        except Exception as found:
            error = found
    raise_together(error)
    missing = [path for path in of_all if not path.is_dir()]
    if missing:
        raise OSError(f"tower_cache_dir must be a folder that all processes see, but {str(missing[0])!r} is missing.")
    return of_all


def _make(folder: Path, model: PicoModel, encode: Callable[[], Iterator[tuple[TokenStates, torch.Tensor]]]) -> None:
    # A name of its own: another training may be writing the same states.
    unfinished = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}.part")
    unfinished.mkdir(parents=True)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            _write(unfinished, encode())
        synchronise(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another training was first
                raise
    finally:
        model.train(training)
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, encoded: Iterator[tuple[TokenStates, torch.Tensor]]) -> None:
    """Writes the states of real tokens, one item after another."""
    with _GrowingArray(folder / "states.npy") as states, _GrowingArray(folder / "class_states.npy") as class_states:
        starts = [np.zeros(1, np.int64)]
        for batch, real in encoded:
            states.append(_halved(batch.states[real]))
            if batch.class_state is not None:
                class_states.append(_halved(batch.class_state))
            starts.append(starts[-1][-1] + real.sum(dim=1).cumsum(0).cpu().numpy())
    np.save(folder / "starts.npy", np.concatenate(starts))


def _halved(values: torch.Tensor) -> np.ndarray:
    halved = values.half()
    if not halved.isfinite().all():
        raise ValueError(
            f"The towers give hidden states up to {float(values.abs().max()):.3g}, which half precision cannot hold. "
            "Leave tower_cache_dir out."
        )
    return halved.cpu().numpy()


class _GrowingArray:
    """A file in NumPy's format to which rows are added; without any there is no file."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self.file: BinaryIO | None = None

    def __enter__(self) -> _GrowingArray:
        return self

    def append(self, values: np.ndarray) -> None:
        self.rows += len(values)
        self.header = {"descr": values.dtype.str, "fortran_order": False, "shape": (self.rows, *values.shape[1:])}
        if self.file is None:
            self.file = open(self.path, "wb")  # noqa: SIM115
            np.lib.format.write_array_header_1_0(self.file, self.header)
        self.file.write(np.ascontiguousarray(values).data)

    def __exit__(self, *error: Any) -> None:
        if self.file is not None:
            # NumPy leaves room in a header for the first dimension to grow.
            self.file.seek(0)
            np.lib.format.write_array_header_1_0(self.file, self.header)
            self.file.close()


def _seed(row: int, view: int) -> int:
    """Of a drawing, the same in every training."""
    return int.from_bytes(hashlib.blake2b(f"{row} {view}".encode(), digest_size=7).digest(), "little")


__all__ = ["TowerStates", "as_it_is", "cached_states"]
