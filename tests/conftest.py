"""Tiny towers, checkpoints and processors without any download; built once, in seconds."""

from __future__ import annotations

import os


# Tensors this small gain nothing from threads, and processes side by side would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging
import multiprocessing
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import settings
from own_process import run_script
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.utils import logging as hf_logging

from modeling_pico import PicoConfig, PicoModel, PicoProcessor


# The same examples in every run and on every machine, however slow.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

# Imported once, by the server from which tests fork processes, and not by each process.
multiprocessing.set_forkserver_preload(
    [
        "modeling_pico.training",
        "peft",
        "pytest",
        "sklearn.linear_model",
        "torch.distributed.fsdp",
        "transformers.models.bert.modeling_bert",
        "transformers.models.vit.modeling_vit",
    ]
)


def pytest_collection_finish() -> None:
    """Every training collects garbage: it need not look through all that imports and collection have left."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


CAPTIONS = ["a red circle", "two blue stars above a small green square", "the red star on a blue circle"]


# Turns the package away, also where it is installed.
_BLOCK_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_pico":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def run_without_package(tmp_path) -> Callable[..., str]:
    """Runs a script with arguments in a process that cannot import the package; returns what it prints."""

    def run(script: str, *arguments: Path) -> str:
        script = _BLOCK_PACKAGE + textwrap.dedent(script)
        modules = str(tmp_path / "modules")
        return run_script(script, *arguments, options=["-I"], cwd=tmp_path, HF_MODULES_CACHE=modules)

    return run


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory, tiny_model, use_prototypes, tiny_processor) -> Path:
    """A folder with a tiny model that uses its prototypes, and its processor."""
    folder = tmp_path_factory.mktemp("tiny")
    use_prototypes(tiny_model()).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def no_progress_bars() -> Iterator[None]:
    """Runs of the script print their own bars otherwise."""
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    hf_logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """Data sets are cached apart from those of other tests and of the user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def _logging_at_first() -> tuple[list[logging.Handler], int, bool, int]:
    package = logging.getLogger("modeling_pico")
    return package.handlers[:], package.level, package.propagate, hf_logging.get_verbosity()


@pytest.fixture(autouse=True)
def logging_as_found(_logging_at_first) -> Iterator[None]:
    """The script sets up the logger of its process, which is the process of all tests; so do fixtures of a module."""
    yield
    package = logging.getLogger("modeling_pico")
    package.handlers[:], level, package.propagate, verbosity = _logging_at_first
    package.setLevel(level)
    hf_logging.set_verbosity(verbosity)


def _vision_config(family: str) -> PreTrainedConfig:
    """16 pixels; four patches, whatever the family."""
    transformer = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if family == "vit":
        return ViTConfig(**transformer, intermediate_size=32)
    if family == "dinov2":
        return Dinov2Config(**transformer, mlp_ratio=2)
    if family == "swin":
        return SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    raise ValueError(family)


def _text_config(family: str) -> PreTrainedConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "pad_token_id": 0,
    }
    if family == "bert":
        return BertConfig(**sizes, max_position_embeddings=32)
    if family == "roberta":
        return RobertaConfig(**sizes, max_position_embeddings=34)
    raise ValueError(family)


@torch.no_grad()
def _make_distinct(model: torch.nn.Module) -> None:
    """Fresh towers map all inputs to nearly the same; noise on the weights tells rows and layers apart."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def tiny_vision_config() -> Callable[[str], PreTrainedConfig]:
    """Builds the configuration of a tiny vision tower: `"vit"`, `"dinov2"` or `"swin"`."""
    return _vision_config


@pytest.fixture(scope="session")
def tiny_text_config() -> Callable[[str], PreTrainedConfig]:
    """Builds the configuration of a tiny text tower: `"bert"` or `"roberta"`."""
    return _text_config


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PicoConfig]:
    """Builds a tiny PICO configuration; options are those of `PicoConfig`, and the two families."""

    def build(vision: str = "vit", text: str = "bert", **options) -> PicoConfig:
        options = {"embedding_dim": 12, "num_style_prototypes": 3, **options}
        return PicoConfig(vision_config=_vision_config(vision), text_config=_text_config(text), **options)

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Callable[..., PicoModel]:
    """Builds a tiny PICO model in evaluation mode, always with the same weights."""

    def build(**options) -> PicoModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = PicoModel(tiny_config(**options)).eval()
            _make_distinct(model.vision_model)
            _make_distinct(model.text_model)
        return model

    return build


@pytest.fixture(scope="session")
def use_prototypes() -> Callable[[PicoModel], PicoModel]:
    """Gives a model prototypes and trained style rates, as after its third construction."""

    @torch.no_grad()
    def fill(model: PicoModel) -> PicoModel:
        generator = torch.Generator().manual_seed(1)
        prototypes = model.style_prototypes
        for name, buffer in prototypes.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(noise + 0.5 if name.endswith(("scale", "temperature")) else noise)
        for side in prototypes.values():
            side.stage.fill_(2)
        for name, parameter in prototypes.named_parameters():
            if name.endswith(("rate", "bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    return fill


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Three images and three texts of 4, 6 and 9 tokens, with [CLS] = 2, [SEP] = 3 and padding 0."""
    lengths = (4, 6, 9)
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.zeros(3, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        words = torch.randint(5, 64, (length - 2,), generator=generator)
        input_ids[row, :length] = torch.tensor([2, *words.tolist(), 3])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
    }


def _train_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=64, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_processor() -> PicoProcessor:
    """A CLIP-like image processor of 16 pixels and a tokenizer trained on three captions."""
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return PicoProcessor(image_processor=image_processor, tokenizer=_train_tokenizer())


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory, tiny_processor) -> SimpleNamespace:
    """A tiny `CLIPModel`, and the folder of its checkpoint with image processor and tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPConfig(
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            text_config={
                **sizes,
                "vocab_size": 64,
                "max_position_embeddings": 16,
                "pad_token_id": 0,
                "bos_token_id": 2,
                "eos_token_id": 3,
            },
            projection_dim=10,
        )
        model = CLIPModel(config).eval()
        _make_distinct(model)
    folder: Path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tiny_processor.image_processor.save_pretrained(folder)
    tiny_processor.tokenizer.save_pretrained(folder)
    return SimpleNamespace(model=model, folder=str(folder))
