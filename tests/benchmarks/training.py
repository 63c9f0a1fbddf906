"""Measures what training costs: column weights, the staged construction, GradCache, and the methods side by side.

    python tests/benchmarks/training.py --output DIR [--quick] [--dataset FOLDER_OF_EMOJI_STYLES] [--only methods ...]

Prints tables and writes `training.json` and `training.md` to DIR. Everything that is compared runs in turn in one
process; ratios are medians over rounds, since absolute times depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, TrainerCallback, ViTConfig

from modeling_pico import CddsModel, PicoModel, PicoTrainer
from modeling_pico.model.backbones_pico import build_backbone
from modeling_pico.model.loss_pico import image_text_loss
from modeling_pico.model.scoring_pico import pair_scores
from modeling_pico.script.from_scratch import small_vision_config
from modeling_pico.training import construction
from modeling_pico.training.gradient_cache import cached_backward, split_inputs


REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = (8, 20)

TOWERS = {
    "ViT-B/16 × BERT-base, 224 px": (
        ViTConfig(),
        BertConfig(),
        {"embedding_dim": 512},
    ),
    **{
        name: (
            small_vision_config(width, num_layers=4, num_heads=4, image_size=48, patch_size=8),
            BertConfig(
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=4 * width,
                vocab_size=2000,
            ),
            {"embedding_dim": width},
        )
        for name, width in (
            ("emoji-styles recipe: ViT 128×4 × BERT 128×2, 48 px", 128),
            ("quick start: ViT 64×4 × BERT 64×2, 48 px", 64),
        )
    },
}

METHODS: dict[str, tuple[type[PicoModel], dict[str, Any]]] = {
    "fine_grained": (PicoModel, {"method": "fine_grained"}),
    "pico": (PicoModel, {}),
    "cdds": (CddsModel, {}),
    "pico + cdds": (CddsModel, {"semantic_probability": True}),
    "pico + uncertainty": (PicoModel, {"uncertainty_config": {"num_prototypes": 8}}),
}
SECTIONS = ("weights", "gradient_cache", "construction", "methods")
# Towers, batch, and what the rounds are multiplied by: small towers take little time.
Sizes = Sequence[tuple[str, int, int]]
WEIGHTS_SIZES: Sizes = list(zip(TOWERS, (16, 128, 64), (1, 4, 8), strict=True))
METHODS_SIZES: Sizes = list(zip(TOWERS, (4, 64, 64), (1, 3, 4), strict=True))
QUICK_SIZES: Sizes = [(list(TOWERS)[-1], 4, 1)]


def build_model(towers: str, method: str, dropout: float | None = None) -> PicoModel:
    """A model with fresh towers; one with column weights as it is after the first construction."""
    torch.manual_seed(0)
    vision, text, options = TOWERS[towers]
    if dropout is not None:
        text = BertConfig(
            **{**text.to_dict(), "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        )
    model_class, head = METHODS[method]
    model = model_class.from_backbones(build_backbone(vision), build_backbone(text), **head, **options)
    for prototypes in (model.style_prototypes or {}).values():
        prototypes.stage.fill_(1)
        prototypes.prototypes.normal_()
    return model.train()


def random_batch(model: PicoModel, size: int) -> dict[str, torch.Tensor]:
    """Images and texts of varying length; the content does not matter to the cost."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.vision_config.image_size
    lengths = torch.randint(*WORDS, (size, 1), generator=generator)
    return {
        "pixel_values": torch.randn(size, 3, side, side, generator=generator),
        "input_ids": torch.randint(5, 1000, (size, WORDS[1]), generator=generator),
        "attention_mask": (torch.arange(WORDS[1])[None] < lengths).long(),
        "image_ids": torch.arange(size),
    }


def batch_loss(outputs, ids: torch.Tensor) -> torch.Tensor:
    """In-batch InfoNCE, and what else the head asks for."""
    scores = pair_scores(outputs.image_embeds, outputs.text_embeds, outputs.image_mask, outputs.text_mask)
    loss = image_text_loss(scores, scores.T, image_ids=ids, logit_scale=outputs.logit_scale)
    return loss if outputs.auxiliary_loss is None else loss + outputs.auxiliary_loss


def plain_step(model: PicoModel, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward of one batch."""
    model.zero_grad()
    batch_loss(model(**batch, return_logits=False), batch["image_ids"]).backward()


def cached_step(model: PicoModel, batch: dict[str, torch.Tensor], chunk_size: int) -> None:
    """The same in chunks."""
    model.zero_grad()
    chunks = split_inputs(batch, chunk_size)
    loss = functools.partial(batch_loss, ids=batch["image_ids"])
    cached_backward(model, chunks, loss, lambda value: value.backward(), nullcontext)


def compare(first: Callable[[], None], second: Callable[[], None], rounds: int) -> dict[str, float]:
    """Runs two steps in turn; medians in seconds and the median of the ratios first / second, round by round."""
    times: list[tuple[float, float]] = []
    for index in range(rounds + 1):
        row = []
        # The order alternates, so that a drift of the machine's speed favours neither.
        for step in (first, second) if index % 2 == 0 else (second, first):
            start = time.perf_counter()
            step()
            row.append(time.perf_counter() - start)
        times.append(tuple(row) if index % 2 == 0 else (row[1], row[0]))
    times = times[1:]  # the first round warms up
    return {
        "first_s": statistics.median(time_first for time_first, _ in times),
        "second_s": statistics.median(time_second for _, time_second in times),
        "ratio": statistics.median(time_first / time_second for time_first, time_second in times),
        "rounds": rounds,
    }


def weights_cost(sizes: Sizes, rounds: int) -> list[dict]:
    """A training step with weights on against the same step with weights off."""
    rows = []
    for towers, size, factor in sizes:
        on, off = build_model(towers, "pico"), build_model(towers, "fine_grained")
        batch = random_batch(on, size)
        steps = [functools.partial(plain_step, model, batch) for model in (on, off)]
        rows.append({"towers": towers, "batch": size, **compare(*steps, rounds * factor)})
    return rows


def kept_bytes(model: PicoModel, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, the parameters themselves left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_loss(model(**batch, return_logits=False), batch["image_ids"])
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def methods_cost(sizes: Sizes, rounds: int) -> list[dict]:
    """A training step of every method against the same step of the fine-grained baseline."""
    rows = []
    for towers, size, factor in sizes:
        baseline = build_model(towers, "fine_grained")
        batch = random_batch(baseline, size)
        kept = kept_bytes(baseline, batch)
        for method in METHODS:
            model = build_model(towers, method)
            steps = [functools.partial(plain_step, net, batch) for net in (model, baseline)]
            row: dict[str, Any] = {"towers": towers, "batch": size, "method": method}
            row["parameters"] = model.num_parameters()
            row["kept_bytes"] = kept_bytes(model, batch)
            row["kept_ratio"] = row["kept_bytes"] / kept
            rows.append({**row, **compare(*steps, rounds * factor)})
    return rows


def gradient_cache_cost(rounds: int, size: int, chunk_size: int) -> dict:
    """GradCache against the plain batch: largest difference of a gradient, and time."""
    towers = list(TOWERS)[1]
    model = build_model(towers, "pico", dropout=0.0)
    batch = random_batch(model, size)
    plain_step(model, batch)
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    cached_step(model, batch, chunk_size)
    difference = max(
        float((parameter.grad - wanted[name]).abs().max()) for name, parameter in model.named_parameters()
    )
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    steps = (functools.partial(cached_step, model, batch, chunk_size), functools.partial(plain_step, model, batch))
    return {
        "towers": towers,
        "batch": size,
        "chunk": chunk_size,
        "largest_gradient_difference": difference,
        "largest_gradient": largest,
        **compare(*steps, rounds),
    }


class _Stopwatch:
    """Sums the time spent in functions, while the run goes on as ever."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, method)


class _EpochClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds = 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._start


def construction_cost(recipe: str, flags: list[str]) -> dict:
    """Share of the training passes that statistics, K-means and feedback take, over a whole run of a recipe."""
    sys.path.insert(0, str(REPOSITORY))
    import train_pico

    watch, clock = _Stopwatch(), _EpochClock()
    undo = [
        watch.wrap(construction.PrototypeConstruction, "collect", "statistics and columns"),
        watch.wrap(construction, "build_prototypes", "K-means"),
        watch.wrap(PicoTrainer, "_construct", "K-means and feedback"),
        watch.wrap(PicoTrainer, "evaluation_loop", "evaluation, feedback included"),
    ]
    build = PicoTrainer.__init__

    @functools.wraps(build)
    def build_with_clock(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.add_callback(clock)

    PicoTrainer.__init__ = build_with_clock
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Test splits and their report are no part of a training pass.
            parts = ["--do_predict", "false", "--style_report", "false", "--plots", "false"]
            train_pico.main([str(REPOSITORY / recipe), "--output_dir", folder, *parts, *flags])
    finally:
        PicoTrainer.__init__ = build
        for restore in undo:
            restore()
    spent = watch.seconds["statistics and columns"] + watch.seconds["K-means and feedback"]
    watch.seconds["feedback"] = watch.seconds.pop("K-means and feedback") - watch.seconds["K-means"]
    # Evaluations lie between the end of one epoch and the next, so the clock does not count them.
    return {"recipe": recipe, "training_passes_s": clock.seconds, **watch.seconds, "share": spent / clock.seconds}


def construction_costs(dataset: str | None, quick: bool) -> list[dict]:
    """[`construction_cost`] of the quick start and, where its data is given, of the emoji-styles recipe."""
    few = shlex.split("--max_train_samples 256 --max_eval_samples 40 --num_train_epochs 4") if quick else []
    rows = [construction_cost("examples/quickstart.yaml", few)]
    if dataset:
        flags = ["--dataset_name", dataset, "--method", "pico", "--num_train_epochs", "6", *few]
        rows.append(construction_cost("examples/emoji_styles/train.yaml", flags))
    return rows


def to_markdown(results: dict) -> str:
    """The tables of a report."""
    tables = {
        "weights": weights_table,
        "gradient_cache": gradient_cache_table,
        "construction": construction_table,
        "methods": methods_table,
    }
    lines = ["# Cost of training", "", results["environment"]]
    for name, table in tables.items():
        if name in results:
            lines += ["", *table(results[name])]
    return "\n".join(lines) + "\n"


def weights_table(rows: list[dict]) -> list[str]:
    """Markdown of [`weights_cost`]."""
    lines = ["## A step with weights on against weights off", ""]
    lines += ["| towers | batch | on, s | off, s | ratio |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['towers']} | {row['batch']} | {row['first_s']:.3f} | {row['second_s']:.3f} | {row['ratio']:.3f} |"
        )
    return lines


def gradient_cache_table(row: dict) -> list[str]:
    """Markdown of [`gradient_cache_cost`]."""
    return [
        "## GradCache against the plain batch",
        "",
        "| towers | batch | chunk | largest gradient difference | ratio of time |",
        "| --- | --- | --- | --- | --- |",
        f"| {row['towers']} | {row['batch']} | {row['chunk']} | {row['largest_gradient_difference']:.1e} "
        f"(largest gradient {row['largest_gradient']:.1e}) | {row['ratio']:.2f} |",
    ]


def construction_table(rows: list[dict]) -> list[str]:
    """Markdown of [`construction_cost`] of some recipes."""
    lines = ["## Staged construction, share of the training passes", ""]
    lines += ["| recipe | training passes, s | statistics, s | K-means, s | feedback, s | share |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['recipe']} | {row['training_passes_s']:.1f} | {row['statistics and columns']:.2f} | "
            f"{row['K-means']:.2f} | {row['feedback']:.2f} | {100 * row['share']:.1f}% |"
        )
    return lines


def methods_table(rows: list[dict]) -> list[str]:
    """Markdown of [`methods_cost`]."""
    lines = ["## Methods: a training step against that of the fine-grained baseline", ""]
    lines += [
        "Kept is what the forward pass holds for the backward pass, without weights, gradients and optimizer.",
        "",
    ]
    lines += ["| towers | batch | method | parameters, M | step, s | ratio | kept, MB | ratio |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['towers']} | {row['batch']} | {row['method']} | {row['parameters'] / 1e6:.2f} | "
            f"{row['first_s']:.3f} | {row['ratio']:.2f} | {row['kept_bytes'] / 1e6:.0f} | {row['kept_ratio']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for training.json and training.md")
    parser.add_argument("--dataset", help="folder of emoji-styles, for the share of construction on it")
    parser.add_argument("--rounds", type=int, default=11, help="rounds on the largest towers (default: 11)")
    parser.add_argument("--quick", action="store_true", help="small sizes: checks the script, measures little")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="measure these alone")
    args = parser.parse_args()
    rounds, cached = (1, (1, 8, 4)) if args.quick else (args.rounds, (max(3, args.rounds // 2), 512, 32))
    measure: dict[str, Callable[[], Any]] = {
        "weights": lambda: weights_cost(QUICK_SIZES if args.quick else WEIGHTS_SIZES, rounds),
        "gradient_cache": lambda: gradient_cache_cost(*cached),
        "construction": lambda: construction_costs(args.dataset, args.quick),
        "methods": lambda: methods_cost(QUICK_SIZES if args.quick else METHODS_SIZES, rounds),
    }
    results = {
        "environment": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"`python tests/benchmarks/training.py {' '.join(sys.argv[1:])}`",
        **{name: measure[name]() for name in SECTIONS if name in args.only},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "training.json").write_text(json.dumps(results, indent=2) + "\n")
    report = to_markdown(results)
    (args.output / "training.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
