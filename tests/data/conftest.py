from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads what another one, or the user, has cached."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the optional data folder {SHARED} is absent")
    return SHARED


@pytest.fixture
def warnings_of(monkeypatch):
    """Collects the warnings of a module's logger (transformers' loggers do not reach pytest's caplog)."""

    def collect(module) -> list[str]:
        messages: list[str] = []
        monkeypatch.setattr(module.logger, "warning", messages.append)
        return messages

    return collect


@pytest.fixture
def processor():
    """A CLIP-like image processor (8 pixels) and a tokenizer: one token a word, [CLS] and [SEP] around."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "cat", "dog"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    size = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return SimpleNamespace(image_processor=images, tokenizer=fast)


@pytest.fixture
def make_images(tmp_path):
    """Writes images of one colour each; returns their paths."""

    def make(*names: str) -> list[Path]:
        paths = []
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 4), (40 * number, 100, 200)).save(path)
            paths.append(path)
        return paths

    return make
