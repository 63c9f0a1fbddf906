"""Captioned images held in memory as pixels and token ids: what makes many small trainings cheap."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from modeling_pico import PICO_LITERAL, CddsModel, PicoModel, load_captioned_images
from modeling_pico.data import decode_image
from modeling_pico.data.dataset import SampleKey
from modeling_pico.script.from_scratch import train_tokenizer


class EncodedSplit:
    """
    One split, in the form that [`PicoTrainer`] and its sampler ask for. Gives whole batches at once.

    Args:
        pixels (`torch.Tensor` of shape `(images, 3, height, width)`, uint8): Images.
        input_ids (`torch.Tensor` of shape `(texts, words)`): Token ids of all captions, padded.
        lengths (`torch.Tensor` of shape `(texts,)`): Real tokens of each caption.
        captions (`torch.Tensor` of shape `(images, captions)`): Which texts belong to an image.
        ids (`torch.Tensor` of shape `(images,)`): Identity of the meaning.
        styles (`list[str]`): Style of each image.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        captions: torch.Tensor,
        ids: torch.Tensor,
        styles: list[str],
    ):
        self.pixels, self.input_ids, self.lengths, self.captions = pixels, input_ids, lengths, captions
        self.ids, self.styles = ids, styles
        self.num_captions = torch.full((len(ids),), captions.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, rows: torch.Tensor) -> EncodedSplit:
        """The given rows."""
        styles = [self.styles[row] for row in rows.tolist()]
        return EncodedSplit(
            self.pixels[rows], self.input_ids, self.lengths, self.captions[rows], self.ids[rows], styles
        )

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows in order, as [`RetrievalEvaluator`] takes them."""
        for start in range(0, len(self), size):
            yield self.__getitems__(list(range(start, min(start + size, len(self)))))

    def __getitems__(self, keys: list[int | SampleKey]) -> dict[str, torch.Tensor]:
        training = isinstance(keys[0], SampleKey)
        rows = torch.tensor([key.row if training else key for key in keys])
        texts = self.captions[rows]
        if training:
            texts = texts[torch.arange(len(rows)), torch.tensor([key.caption for key in keys])]
        num_captions = 1 if training else texts.shape[1]
        texts = texts.reshape(-1)
        lengths = self.lengths[texts]
        width = int(lengths.max())
        ids = self.ids[rows]
        batch = {
            "pixel_values": self.pixels[rows].float() / 127.5 - 1,
            "input_ids": self.input_ids[texts, :width],
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "image_ids": ids,
        }
        if not training:
            batch["text_ids"] = ids.repeat_interleave(num_captions)
            batch["num_captions"] = torch.full((len(rows),), num_captions)
        return batch


class FrozenLowerLayers(nn.Module):
    """
    A pretrained BERT-class tower whose lower layers are frozen, so that their outputs are computed once a caption.

    Stands in for a text tower of which only the last `num_trained_layers` (none of them, if 0) are trained, with
    `num_hidden_layers` new ones on top of each word; takes the number of a caption for each of its words instead of
    token ids.
    """

    def __init__(
        self,
        name_or_path: str,
        captions: list[str],
        *,
        num_trained_layers: int,
        num_hidden_layers: int,
        max_length: int,
        folder: Path,
    ):
        super().__init__()
        model = AutoModel.from_pretrained(name_or_path, add_pooling_layer=False, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        self.config = model.config
        num_frozen = len(model.encoder.layer) - num_trained_layers
        if num_trained_layers < 0 or num_frozen < 0 or num_hidden_layers < 0:
            raise ValueError(
                f"text_num_trained_layers must be from 0 to {len(model.encoder.layer)} and text_num_hidden_layers at "
                f"least 0, but got {num_trained_layers} and {num_hidden_layers}."
            )
        self.layers = model.encoder.layer[num_frozen:]
        width = model.config.hidden_size
        self.hidden = nn.Sequential()
        for _ in range(num_hidden_layers):
            self.hidden.extend([nn.Linear(width, width), nn.ReLU()])
        model.encoder.layer = model.encoder.layer[:num_frozen]
        encoded = tokenizer(captions, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        self.lengths = encoded["attention_mask"].sum(dim=1)
        # What the states follow from, wherever the model lies.
        sums = [float(parameter.detach().double().sum()) for parameter in model.parameters()]
        identity = hashlib.sha256(json.dumps([sums, encoded["input_ids"].tolist()]).encode())
        cached = folder / f"texts-{identity.hexdigest()[:16]}.pt"
        if not cached.exists():
            states = []
            with torch.no_grad():
                for start in range(0, len(captions), 256):
                    part = {name: values[start : start + 256] for name, values in encoded.items()}
                    states.append(model(**part).last_hidden_state.half())
            _save_atomically(torch.cat(states), cached)
        # A tuple keeps the table out of the state and of every checkpoint.
        self.table = (torch.load(cached, weights_only=True),)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        states = self.table[0][input_ids[:, 0], : input_ids.shape[1]].float()
        bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for layer in self.layers:
            output = layer(states, bias)
            states = output[0] if isinstance(output, tuple) else output
        return BaseModelOutput(last_hidden_state=self.hidden(states))


class StudyData(NamedTuple):
    """Splits by name, all captions in the order of their numbers, and the tokenizer that encoded them."""

    splits: dict[str, EncodedSplit]
    captions: list[str]
    tokenizer: PreTrainedTokenizerFast


def load_splits(setting: dict[str, Any], names: list[str], folder: Path) -> StudyData:
    """
    Loads and encodes the training split and the named ones. `"seen"`, which is there in any case, are `num_seen`
    images held out of the training split at random: new images in the styles of training.

    Args:
        setting (`dict`): What the YAML file of a setting holds.
        names (`list[str]`): Splits to evaluate on.
        folder (`Path`): Keeps decoded images between trainings.
    """
    size, max_length = setting["image_size"], setting["max_text_length"]
    rows = {name: _rows(setting, name, size, folder) for name in ["train", *names] if name != "seen"}
    captions = sorted({caption for split in rows.values() for texts in split["captions"] for caption in texts})
    number = {caption: index for index, caption in enumerate(captions)}
    tokenizer = train_tokenizer(
        [caption for texts in rows["train"]["captions"] for caption in texts], setting["vocab_size"], max_length
    )
    encoded = tokenizer(captions, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    codes: dict[str, int] = {}
    splits = {}
    for name, split in rows.items():
        shortest = min(len(texts) for texts in split["captions"])
        splits[name] = EncodedSplit(
            split["pixels"],
            encoded["input_ids"],
            encoded["attention_mask"].sum(dim=1),
            torch.tensor([[number[caption] for caption in texts[:shortest]] for texts in split["captions"]]),
            torch.tensor([codes.setdefault(value, len(codes)) for value in split["ids"]]),
            split["styles"],
        )
    whole = splits["train"]
    seen, others = hold_out(len(whole), setting["num_seen"])
    splits["seen"], splits["train"] = whole.subset(seen), whole.subset(others)
    return StudyData(splits, captions, tokenizer)


def model_options(options: dict[str, Any], other: str) -> tuple[type[PicoModel], dict[str, Any]]:
    """
    The class of a variant's model and the options of its configuration; ValueError for what is neither these nor
    `args` nor `other`: a configuration takes any name, and the variant would be trained without what it is about.
    """
    method = options.get("method", "pico")
    head = {name: value for name, value in options.items() if name not in ("method", "args", other)}
    head = PICO_LITERAL | head if method == "pico_literal" else {"method": method, **head}
    model_class = CddsModel if method in CddsModel.head_classes else PicoModel
    unknown = sorted(head.keys() - {field.name for field in fields(model_class.config_class)})
    if unknown:
        raise ValueError(
            f"a variant of {method!r} with {unknown} cannot be trained on this setting; `data` is for pretrained "
            "towers, `base` for towers from scratch"
        )
    return model_class, head


def hold_out(count: int, num_seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are held out, at random, and the others; the same for every seed and whatever splits are named."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:num_seen], order[num_seen:].sort().values


def loading_options(setting: dict[str, Any], split: str) -> dict[str, Any]:
    """How a split of a setting is loaded by [`load_captioned_images`]."""
    options = {"id_column": setting.get("id_column"), "split": split}
    if setting["dataset_name"] != "styled_shapes":
        options["data_files"] = {split: str(Path(setting["dataset_name"]) / f"{split}.parquet")}
    return options


def _rows(setting: dict[str, Any], split: str, size: int, folder: Path) -> dict[str, Any]:
    options = loading_options(setting, split)
    key = hashlib.sha256(json.dumps([setting["dataset_name"], options, size]).encode()).hexdigest()[:16]
    cached = folder / f"{split}-{key}.pt"
    if cached.exists():
        return torch.load(cached, weights_only=True)
    data = load_captioned_images(setting["dataset_name"], **options).cast_column("image", datasets.Image(decode=False))
    images = [decode_image(item).resize((size, size), Image.Resampling.BICUBIC) for item in data["image"]]
    rows = {
        "pixels": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).contiguous(),
        "captions": [list(texts) for texts in data["captions"]],
        "ids": [str(value) for value in data["image_id"]],
        "styles": list(data["style"]) if "style" in data.column_names else ["-"] * len(data),
    }
    _save_atomically(rows, cached)
    return rows


def _save_atomically(content: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: other trainings that run at the same time may look for it.
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(content, partial)
    partial.replace(path)
