from __future__ import annotations

import pytest
import torch

from modeling_pico.model import gallery_alignment_pico
from modeling_pico.training import trainer as trainer_module


@pytest.fixture(scope="module", autouse=True)
def threads_as_found():
    """A training of the study takes one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_galleries(monkeypatch) -> None:
    """Galleries as small as those of these tests may be moved."""
    for module in (gallery_alignment_pico, trainer_module):
        monkeypatch.setattr(module, "MIN_IMAGES", 2)
