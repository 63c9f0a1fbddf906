"""Measures the memory of a retrieval evaluation beyond the embeddings, at the size of MS-COCO 5K.

    python tests/benchmarks/evaluation.py --output DIR [--quick] [--folds 5]

Images, texts and ranks are as many as in MS-COCO 5K (5,000 × 25,000); tokens are few and short, so that a CPU scores
them in minutes. What is held beyond the embeddings does not depend on the tokens, but for one tile of weighted ones,
which is reported apart at full size.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from transformers import BertConfig, ViTConfig

from modeling_pico import PicoConfig, PicoModel
from modeling_pico.evaluation.evaluator import EncodedRetrieval, RetrievalEvaluator


CAPTIONS = 5
GIB = 2**30


def peak() -> int:
    """Peak resident memory of this process in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build_model(dim: int) -> PicoModel:
    """A weighted head after its first construction; the towers are not used."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = PicoConfig(
        vision_config=ViTConfig(**tiny, image_size=16, patch_size=8),
        text_config=BertConfig(**tiny, vocab_size=50),
        embedding_dim=dim,
    )
    model = PicoModel(config).eval()
    for side in model.style_prototypes.values():
        side.stage.fill_(1)
    return model


def random_tokens(samples: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors, all real."""
    values = torch.randn(samples, tokens, dim)
    return values.div_(values.norm(dim=-1, keepdim=True)), torch.ones(samples, tokens, dtype=torch.bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for evaluation.json")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--folds", type=int, default=1, help="1 for MS-COCO 5K, 5 for MS-COCO 1K")
    args = parser.parse_args()
    images, patches, words, dim = (500 if args.quick else 5000), 8, 6, 32
    torch.manual_seed(0)
    model, evaluator = build_model(dim), RetrievalEvaluator(num_folds=args.folds)
    image_tokens, image_mask = random_tokens(images, patches, dim)
    text_tokens, text_mask = random_tokens(images * CAPTIONS, words, dim)
    ids = torch.arange(images)
    encoded = EncodedRetrieval(image_tokens, image_mask, text_tokens, text_mask, ids, ids.repeat_interleave(CAPTIONS))
    before, start = peak(), time.perf_counter()
    metrics = evaluator.metrics(model, encoded)
    seconds = time.perf_counter() - start
    full_tile = (evaluator.image_chunk * 197 + evaluator.text_chunk * 77) * 512 * 4
    results = {
        "images": images,
        "texts": images * CAPTIONS,
        "folds": args.folds,
        "seconds": seconds,
        "peak_beyond_embeddings_gib": (peak() - before) / GIB,
        "score_matrix_gib": images * images * CAPTIONS * 4 / GIB,
        "weighted_tile_at_197x77x512_gib": full_tile / GIB,
        "rsum": metrics["rsum"],
        "chance_rsum": metrics["chance_rsum"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
