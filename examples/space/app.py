"""
The page of an index as a Hugging Face Space. `PICO_INDEX` is the folder of an index beside this file, or the id of a
data set on the Hub that holds one; `PICO_MODEL` is likewise the model that made it.
"""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from modeling_pico import PicoProcessor
from modeling_pico.registration import load_checkpoint
from modeling_pico.search import PicoIndex
from modeling_pico.search.page import serve


HERE = Path(__file__).parent
MODEL, INDEX = os.environ.get("PICO_MODEL", "model"), os.environ.get("PICO_INDEX", "index")


def load() -> PicoIndex:
    """The index with its model."""
    model = HERE / MODEL if (HERE / MODEL).is_dir() else MODEL
    index = HERE / INDEX if (HERE / INDEX).is_dir() else snapshot_download(INDEX, repo_type="dataset")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_checkpoint(model).to(device).eval()
    return PicoIndex.open(index, encoder, PicoProcessor.from_pretrained(model))


if __name__ == "__main__":
    serve(load(), pictures=HERE / "pictures")
