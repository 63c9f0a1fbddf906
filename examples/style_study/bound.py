"""
Bounds what weights of feature columns could add to a trained model in a style it has not seen.

    python examples/style_study/bound.py results.jsonl --dataset_name DIR --seeds 0 1 2

For every seed, the kept weights of a variant of the study encode a split. A gate over feature columns is fitted to
one half of its meanings by the loss of training, which no method could do, since it needs captions of images in the
unseen style. It is measured on that half and on the other one: the same style, other meanings. What it gains on the
other half is what knowing the style for certain would give; what it gains on its own half alone is fitted to single
images.

Gates: `constant`, a positive weight for each feature; `linear`, which also reads the mean, spread, maximum and minimum
of the column, with coefficients for each feature.

Two more are fitted to no caption. `shares` weights each feature of the images by the share of its variance that lies
between meanings and not between the styles of one meaning, measured on training images, which show meanings in several
styles. `moments` moves the images of a half, at the outputs of the tower, to the mean and spread that they have in
training; it needs a gallery in the new style.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import study
import torch
from encoded_data import load_splits
from free_gate import column_statistics
from safetensors.torch import load_file
from torch import nn

from modeling_pico import RetrievalEvaluator, align_encoded
from modeling_pico.evaluation.evaluator import EncodedRetrieval
from modeling_pico.model.prototypes_pico import column_weights, feature_columns


GATES = ("constant", "linear")
WITHOUT_CAPTIONS = ("shares", "moments")
# Logarithms of weights stay within this of one another, so that no fit runs away.
RANGE = 4.0


class Gate(nn.Module):
    """Weights of the feature columns of images and texts; starts at weights of one."""

    def __init__(self, kind: str, dim: int):
        super().__init__()
        self.kind = kind
        self.bias = nn.ParameterDict({side: nn.Parameter(torch.zeros(dim)) for side in ("image", "text")})
        self.slope = nn.ParameterDict({side: nn.Parameter(torch.zeros(dim, 4)) for side in ("image", "text")})

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, modality: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted tokens `(batch, tokens, dim)` and the weights `(batch, dim)`: what an alignment head gives."""
        logit = self.bias[modality].expand(len(tokens), -1)
        if self.kind == "linear":
            columns = column_statistics(tokens, mask)
            logit = logit + (columns * self.slope[modality]).sum(dim=-1)
        weights = column_weights(logit.clamp(-RANGE, RANGE).exp())
        return tokens * weights.unsqueeze(1), weights


def fit(gate: Gate, encoded: EncodedRetrieval, pair_loss: Callable, steps: int, batch_size: int) -> None:
    """Fits a gate to all pairs of a retrieval set by the loss of the model, with Adam from 1e-2 to 0."""
    texts_of = [(encoded.text_ids == image_id).nonzero().squeeze(1) for image_id in encoded.image_ids]
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randperm(len(texts_of), generator=generator)[:batch_size]
        chosen = [texts_of[row][torch.randint(len(texts_of[row]), (), generator=generator)] for row in images.tolist()]
        texts = torch.stack(chosen)
        image_mask, text_mask = encoded.image_mask[images], encoded.text_mask[texts]
        image_embeds, _ = gate(encoded.image_tokens[images], image_mask, "image")
        text_embeds, _ = gate(encoded.text_tokens[texts], text_mask, "text")
        ids = encoded.image_ids[images]
        loss = pair_loss(image_embeds, text_embeds, image_mask, text_mask, image_ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def halves(encoded: EncodedRetrieval) -> list[EncodedRetrieval]:
    """Two retrieval sets of half the meanings each."""
    meanings = encoded.image_ids.unique()
    chosen = meanings[torch.randperm(len(meanings), generator=torch.Generator().manual_seed(0))[: len(meanings) // 2]]
    own = torch.isin(encoded.image_ids, chosen)
    return [encoded.subset(rows.nonzero().squeeze(1)) for rows in (own, ~own)]


def meaning_share(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """
    Share of the variance of each feature over samples `(samples, dim)` that lies between meanings and not within them
    (the intraclass correlation), in [0, 1].
    """
    _, row, count = ids.unique(return_inverse=True, return_counts=True)
    of_meaning = torch.zeros_like(values[: len(count)]).index_add_(0, row, values) / count[:, None]
    within = (values - of_meaning[row]).square().sum(dim=0) / (len(ids) - len(count))
    return (1 - within / values.var(dim=0).clamp(min=1e-12)).clamp(0, 1)


def bounds(
    record: dict[str, Any], weights: Path, split: str, steps: int, cache: Path
) -> dict[str, tuple[float, float]]:
    """
    Gains of every gate over no weights, for one trained model.

    Args:
        record (`dict`): The training's line of the table.
        weights (`Path`): Its kept weights.
        split (`str`): Split that is cut in two.
        steps (`int`): Steps of each fit.
        cache (`Path`): Keeps decoded images.

    Returns:
        `dict` of gate to rSum gained on the fitted half and on the other one, means of both ways round; of `shares`
        and `moments` the gain on a half, the mean of both.
    """
    setting = record["setting"]
    data = load_splits(setting, [split], cache)
    model = study.build_model(setting, record["options"], data, cache)
    model.load_state_dict(load_file(weights))
    evaluator = RetrievalEvaluator()
    batches = list(data.splits[split].batches(256))
    encoded = evaluator.encode(model.eval(), batches)
    parts = halves(encoded)
    plain = [evaluator.retrieval_metrics(model, part)["rsum"] for part in parts]
    found = {}
    for kind in GATES:
        gains = []
        for own in (0, 1):
            torch.manual_seed(0)
            gate = Gate(kind, model.config.embedding_dim)
            fit(gate, parts[own], model.pair_loss, steps, setting["batch_size"])
            model.alignment_head.weight = gate.forward
            measured = [evaluator.retrieval_metrics(model, part)["rsum"] for part in parts]
            del model.alignment_head.weight
            gains.append((measured[own] - plain[own], measured[1 - own] - plain[1 - own]))
        found[kind] = tuple(sum(values) / 2 for values in zip(*gains, strict=True))
    trained = evaluator.encode(model, data.splits["train"].batches(256))
    means = feature_columns(trained.image_tokens, trained.image_mask)[..., 0]
    # Each half as a gallery of its own.
    model.fit_alignment(data.splits["train"].batches(256))
    of_first = torch.isin(encoded.image_ids, parts[0].image_ids).tolist()
    moved = halves(align_encoded(model, encoded, batches, [("second", "first")[first] for first in of_first]))
    shares = column_weights(meaning_share(means, trained.image_ids).clamp(min=0.01))
    for kind in WITHOUT_CAPTIONS:
        gain = 0.0
        for part, of_moments, before in zip(parts, moved, plain, strict=True):
            weighted = replace(part, image_tokens=part.image_tokens * shares)
            metrics = evaluator.retrieval_metrics(model, weighted if kind == "shares" else of_moments)
            gain += (metrics["rsum"] - before) / len(parts)
        found[kind] = (gain,)
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="table of the study, with the kept weights beside it")
    parser.add_argument("--dataset_name", help="overrides the folder of the data in the table")
    parser.add_argument("--variant", default="fine_grained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="validation")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cache", type=Path, default=study.CACHE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for record in study.read_table(options.table):
        if record["variant"] != options.variant or record["seed"] not in options.seeds or "seconds" not in record:
            continue
        if options.dataset_name:
            record["setting"]["dataset_name"] = options.dataset_name
        weights = options.table.with_suffix("") / f"{record['key']}.safetensors"
        found.append(bounds(record, weights, options.split, options.steps, options.cache))
    if not found:
        raise SystemExit(f"{options.table} holds no training of {options.variant} with seeds {options.seeds}")
    print(f"rSum gained on {options.split}, {len(found)} seeds of {options.variant}\n")
    print("| gate | half it was fitted to | other half |\n| --- | ---: | ---: |")
    for kind in (*GATES, *WITHOUT_CAPTIONS):
        cells = [study.difference(list(gains)) for gains in zip(*(gains[kind] for gains in found), strict=True)]
        print(f"| {kind} | {' | '.join(['–', *cells][-2:])} |")


if __name__ == "__main__":
    main()
