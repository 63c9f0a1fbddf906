from __future__ import annotations

import pytest
from transformers import logging


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """The trainer reports every step of loading and saving; tests look at its log instead."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)
