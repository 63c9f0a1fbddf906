"""
Compares variants of the method by many small trainings, paired by seed, and keeps every result.

    python examples/style_study/study.py run examples/style_study/emoji_styles.yaml --dataset_name DIR \
        --variants fine_grained pico --seeds 0 1 2 --output results.jsonl --jobs 2
    python examples/style_study/study.py report results.jsonl

Each training is a process of its own with one thread and appends one line to the table: setting, variant, seed, every
option, commit, rSum on each split half-way and at the end. What the table already holds is not trained again, so a
study that was stopped goes on by the same command. Weights are kept: a split that is named later is evaluated without
training. Choose on `validation`; `test` and `far` are opened only when `--splits` names them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from modeling_pico.markdown import escape_markdown, signed_number


HERE = Path(__file__).resolve().parent
CACHE = Path(tempfile.gettempdir()) / "style_study"
# Two-sided 95% quantiles of Student's t distribution, by degrees of freedom from 1.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def train(
    setting: dict[str, Any],
    options: dict[str, Any],
    seed: int,
    splits: list[str],
    cache: Path,
    weights: Path,
    base_weights: Path | None = None,
    aligned: bool = False,
) -> dict:
    """
    Trains one variant with one seed, or only evaluates it where `weights` are there from before.

    Args:
        setting (`dict`): Data, towers and schedule, alike for all variants.
        options (`dict`): The variant: `method`, options of `PicoConfig`, and under `args` of `PicoTrainingArguments`.
        seed (`int`): Initial weights, order of batches and captions.
        splits (`list[str]`): Splits to evaluate on; `"seen"` for held-out training images.
        cache (`Path`): Keeps decoded images, and the outputs of frozen layers, between trainings.
        weights (`Path`): Safetensors file that keeps the trained weights.
        base_weights (`Path`, *optional*): Trained weights of which nothing changes but that uncertainty is added.
        aligned (`bool`, *optional*, defaults to `False`):
            Whether the splits are also evaluated after [`~modeling_pico.align_encoded`] has moved their images, each
            split as one gallery, to where images of training lie.

    Returns:
        `dict` with `rsum` per split (half-way, end; from kept weights the end alone) and, of a training, the log of
        constructions, loss, parameters and seconds; with uncertainty also `reranked`, the rSum per split re-ranked by
        weights learned on `validation`, and `aurc`; with `aligned` the rSum per split under that name.
    """
    # Imported here, since the command that starts the processes and the report need none of it.
    if "vision_model_name_or_path" in setting:
        import pretrained

        shared = training_options(setting, seed)
        return pretrained.train(setting, options, seed, splits, cache, weights, shared, aligned)

    import torch
    from encoded_data import load_splits
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback, set_seed

    from modeling_pico import PicoTrainer, PicoTrainingArguments, RetrievalEvaluator, align_encoded
    from modeling_pico.evaluation import EncodedRetrieval

    torch.set_num_threads(1)
    # Feedback comes from `validation`, whatever is reported.
    data = load_splits(setting, list(dict.fromkeys([*splits, "validation"])), cache)
    set_seed(seed)
    model = build_model(setting, options, data, cache)
    evaluator, history = RetrievalEvaluator(), defaultdict(list)
    encoded: dict[str, EncodedRetrieval] = {}  # of the last evaluation

    def evaluate() -> dict[str, dict[str, float]]:
        metrics = {}
        for name in splits:
            encoded[name] = evaluator.encode(model, data.splits[name].batches(256))
            metrics[name] = evaluator.metrics(model, encoded[name])
            history[name].append(metrics[name]["rsum"])
        model.train()
        return metrics

    class EvaluateHalfWay(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            if round(state.epoch) == args.num_train_epochs // 2:
                evaluate()

    with tempfile.TemporaryDirectory() as folder:
        args = PicoTrainingArguments(folder, **{**training_options(setting, seed), **options.get("args", {})})
        trainer = PicoTrainer(
            model=model,
            args=args,
            train_dataset=data.splits["train"],
            eval_dataset=data.splits["validation"],
            data_collator=lambda batch: batch,
            # Scores do not change while uncertainty alone is trained.
            callbacks=[EvaluateHalfWay()] if base_weights is None else [],
        )
        found: dict[str, Any] = {}
        if weights.exists():
            model.load_state_dict(load_file(weights))
        else:
            if base_weights is not None:
                missing, unexpected = model.load_state_dict(load_file(base_weights), strict=False)
                if unexpected or any(not name.startswith("uncertainty_prototypes.") for name in missing):
                    raise ValueError(f"{base_weights} lacks {missing} and has {unexpected} besides")
                model.train_uncertainty_only()
            start = time.perf_counter()
            trainer.train()
            found["seconds"] = time.perf_counter() - start
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
            log = trainer.state.log_history
            found["constructions"] = [entry for entry in log if "prototype_stage" in entry]
            found["loss"] = next((entry["loss"] for entry in reversed(log) if "loss" in entry), None)
            found["parameters"] = model.num_parameters()
    if model.uncertainty_prototypes is not None:
        found["reranking"] = trainer.learn_uncertainty_reranking()
    metrics = evaluate()
    if model.uncertainty_prototypes is not None:
        found["reranked"] = {name: [metrics[name]["reranked_rsum"]] for name in splits}
        sides = ("image_to_text", "text_to_image")
        # Risk of the queries kept by certainty, and of all: what a random order has.
        found["aurc"] = {
            name: {side: [of[f"{side}_aurc"], 100 - of[f"{side}_recall_at_1"]] for side in sides}
            for name, of in metrics.items()
        }
    if aligned:
        trainer.fit_alignment()
        found["aligned"] = {}
        for name in splits:
            moved = align_encoded(model, encoded[name], trainer.get_eval_dataloader(data.splits[name]))
            found["aligned"][name] = [evaluator.retrieval_metrics(model, moved)["rsum"]]
    return {**found, "rsum": dict(history)}


def training_options(setting: dict[str, Any], seed: int) -> dict[str, Any]:
    """Options of `PicoTrainingArguments` that all variants share."""
    return {
        "learning_rate": setting["learning_rate"],
        "backbone_learning_rate": setting.get("backbone_learning_rate", setting["learning_rate"]),
        "weight_decay": setting["weight_decay"],
        "warmup_steps": setting["warmup_steps"],
        "lr_scheduler_type": "cosine",
        "num_train_epochs": setting["num_train_epochs"],
        "per_device_train_batch_size": setting["batch_size"],
        "per_device_eval_batch_size": 256,
        "dataloader_drop_last": True,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": True,
    }


def build_model(setting: dict[str, Any], options: dict[str, Any], data: Any, cache: Path) -> Any:
    """The model of a variant: towers as the setting says, head as the variant says."""
    import torch
    from encoded_data import FrozenLowerLayers, model_options
    from free_gate import FreeGateHead

    from modeling_pico.script.from_scratch import small_text_config, small_vision_config

    heads = setting["num_heads"]
    vision_config = small_vision_config(
        setting["vision_hidden_size"],
        setting["vision_num_layers"],
        heads,
        setting["image_size"],
        setting["patch_size"],
    )
    text_model = None
    if setting.get("text_model_name_or_path"):
        text_model = FrozenLowerLayers(
            setting["text_model_name_or_path"],
            data.captions,
            num_trained_layers=setting["text_num_trained_layers"],
            num_hidden_layers=setting.get("text_num_hidden_layers", 0),
            max_length=setting["max_text_length"],
            folder=cache,
        )
        width = int(text_model.lengths.max())
        for split in data.splits.values():
            split.input_ids = torch.arange(len(data.captions))[:, None].expand(-1, width)
            split.lengths = text_model.lengths
        text_config = text_model.config
        # The weights are pretrained, but for hidden layers, which are drawn already; none must be drawn anew.
        for module in text_model.modules():
            module._is_hf_initialized = True
    else:
        text_config = small_text_config(setting["text_hidden_size"], setting["text_num_layers"], heads, data.tokenizer)
        # Without dropout and with a cheap activation: alike for all variants.
        text_config.hidden_dropout_prob = text_config.attention_probs_dropout_prob = 0.0
        text_config.hidden_act = "relu"
    vision_config.hidden_act = "relu"
    has_free_gate = options.get("method") == "free_gate"
    model_class, head = model_options({**options, "method": "fine_grained"} if has_free_gate else options, "base")
    config = model_class.config_class(
        vision_config=vision_config, text_config=text_config, embedding_dim=setting["embedding_dim"], **head
    )
    model = model_class(config, text_model=text_model)
    if has_free_gate:
        gate = FreeGateHead(config)
        gate.load_state_dict(model.alignment_head.state_dict(), strict=False)
        model.alignment_head = gate
    return model


def run_study(options: argparse.Namespace) -> None:
    """Starts a process for each training that the table lacks."""
    setting = yaml.safe_load(options.setting.read_text())
    if options.dataset_name:
        setting["dataset_name"] = options.dataset_name
    for pair in options.set:
        name, _, value = pair.partition("=")
        setting[name] = yaml.safe_load(value)
    variants = yaml.safe_load(options.variants_file.read_text())
    unknown = sorted(set(options.variants or ()) - set(variants))
    if unknown:
        raise SystemExit(f"unknown variants {unknown}; {options.variants_file} has {sorted(variants)}")
    if not setting.get("dataset_name"):
        raise SystemExit(f"{options.setting} names no data; give --dataset_name DIR")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, set[str]] = defaultdict(set)
    for record in read_table(options.output) if options.output.exists() else []:
        done[record["key"]] |= set(record.get("aligned", ()) if options.aligned else record["rsum"])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    jobs = []
    for seed in options.seeds:
        for name in options.variants or variants:
            job = _describe_job(options.setting.stem, setting, variants, name, seed)
            splits = [split for split in options.splits if split not in done[job["key"]]]
            if splits:
                job["splits"], job["commit"] = splits, commit.stdout.strip()
                jobs.append({**job, "align": True} if options.aligned else job)
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        # What others start from comes first.
        for stage in ([job for job in jobs if "base_key" not in job], [job for job in jobs if "base_key" in job]):
            results = pool.map(lambda job: _start(job, options.cache, options.output), stage)
            for job, (success, text) in zip(stage, results, strict=True):
                failed += not success
                print(f"{job['variant']}, seed {job['seed']}: {text}", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(jobs)} trainings failed")


def _describe_job(
    setting_name: str, setting: dict[str, Any], variants: dict[str, dict | None], name: str, seed: int
) -> dict[str, Any]:
    options = variants[name] or {}
    base = {}
    if "base" in options:
        if options["base"] not in variants:
            raise SystemExit(f"{name} starts from {options['base']!r}, which the file of variants lacks")
        options = {**(variants[options["base"]] or {}), **options}
        base["base_key"] = _describe_job(setting_name, setting, variants, options["base"], seed)["key"]
    job = {"setting_name": setting_name, "setting": setting, "variant": name, "options": options, "seed": seed}
    identity = {**job, "setting": _without_folders(setting)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return {**job, **base, "key": key}


def _without_folders(setting: dict[str, Any]) -> dict[str, Any]:
    """Where data and towers lie does not make another study."""
    paths = ("dataset_name", "vision_model_name_or_path", "text_model_name_or_path")
    return {name: Path(value).name if name in paths and value else value for name, value in setting.items()}


def _start(job: dict[str, Any], cache: Path, output: Path) -> tuple[bool, str]:
    command = [sys.executable, str(HERE / "study.py"), "train", json.dumps(job), str(cache), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        return False, f"FAILED\n{result.stderr[-3000:]}"
    return True, result.stdout.strip().splitlines()[-1]


def _train_job(options: argparse.Namespace) -> None:
    job = json.loads(options.job)
    folder = options.output.with_suffix("")
    base = folder / f"{job['base_key']}.safetensors" if "base_key" in job else None
    if base is not None and not base.exists():
        raise SystemExit(
            f"{job['variant']} starts from {job['options']['base']}, seed {job['seed']}: train that first"
        )
    weights = folder / f"{job['key']}.safetensors"
    aligned = job.pop("align", False)
    result = train(job["setting"], job["options"], job["seed"], job["splits"], options.cache, weights, base, aligned)
    # One write of one line: processes that append at the same time do not tear each other's.
    with open(options.output, "a") as table:
        table.write(json.dumps({**job, **result}) + "\n")
    rsum = {name: [round(value, 1) for value in values] for name, values in result["rsum"].items()}
    print(f"{rsum}, {result['seconds']:.0f} s" if "seconds" in result else f"{rsum}, from kept weights")


def read_table(path: Path) -> list[dict[str, Any]]:
    """Every result of a table."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def paired_difference(values: list[float]) -> tuple[float, float | None]:
    """Mean of differences and half the width of its 95% interval (None for one difference)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return mean, quantile * statistics.stdev(values) / len(values) ** 0.5


def difference(values: list[float]) -> str:
    """Mean of differences with its 95% interval, as text."""
    mean, half = paired_difference(values)
    return signed_number(mean) + ("" if half is None else f" ± {half:.1f}")


def report(records: list[dict[str, Any]], baseline: str) -> str:
    """
    Markdown tables, one per setting: mean rSum at the end, and in brackets the mean difference to the baseline over
    the seeds that both have, with its 95% interval. Aligned and re-ranked scores have rows of their own; with the
    variant itself as the baseline, or the one that it started from, these show what that does to the very same models.
    The areas under risk-coverage curves follow in a table of their own. Below each table is how well half of the
    training, and a training of fewer epochs in another table, would have ranked the variants.
    """
    of_setting: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        of_setting[_title(record)].append(record)
    tables = {title: _runs(own) for title, own in of_setting.items()}
    if not any(baseline in variants for variants in tables.values()):
        names = sorted({variant for variants in tables.values() for variant in variants})
        raise SystemExit(f"the table holds no training of the baseline {baseline!r}, but of {names}")
    lines = []
    for title, variants in tables.items():
        splits = list(dict.fromkeys(split for runs in variants.values() for rsum in runs.values() for split in rsum))
        lines += [f"\n{escape_markdown(title)}\n", f"| variant | seeds | {' | '.join(map(escape_markdown, splits))} |"]
        lines.append("| --- | ---: |" + " ---: |" * len(splits))
        base = variants.get(baseline, {})
        for variant, runs in variants.items():
            cells = [_cell(variant != baseline, runs, base, split) for split in splits]
            lines.append(f"| {escape_markdown(variant)} | {len(runs)} | {' | '.join(cells)} |")
        half_way = {
            variant: {
                seed: {split: values[:1] for split, values in rsum.items() if len(values) == 2}
                for seed, rsum in runs.items()
            }
            for variant, runs in variants.items()
        }
        lines += _ranks("half-way and end", half_way, variants, splits)
        epochs = of_setting[title][0]["setting"].get("num_train_epochs", 0)
        for other, shorter in tables.items():
            record = of_setting[other][0]
            fewer = record["setting"].get("num_train_epochs", 0)
            if fewer < epochs and _title(record, num_train_epochs=epochs) == title:
                lines += _ranks(f"the ends of {fewer} and {epochs} epochs", shorter, variants, splits)
        lines += _areas(of_setting[title])
    return "\n".join(lines)


def _title(record: dict[str, Any], **changed: Any) -> str:
    """Setting of a training, as the heading of its table; with other values than its own where `changed` says so."""
    setting = {**_without_folders(record["setting"]), **changed}
    name = ", ".join(f"{key}={value}" for key, value in setting.items() if value is not None)
    return f"{record['setting_name']} ({name})"


# Scores by variant, seed and split: half-way and at the end, or the last alone.
Runs = dict[str, dict[int, dict[str, list[float]]]]


def _runs(records: list[dict[str, Any]]) -> Runs:
    """The scores of the trainings of one setting, re-ranked and aligned ones as variants of their own."""
    runs: Runs = defaultdict(dict)
    for record in records:
        # Scores of a model to which uncertainty was added are those of the model it was added to.
        plain = record.get("options", {}).get("base", record["variant"])
        name = record["variant"]
        again = {f"{name}, re-ranked": record.get("reranked"), f"{name}, aligned": record.get("aligned")}
        for row, rsum in {plain: record["rsum"], **again}.items():
            if rsum:
                known = runs[row].setdefault(record["seed"], {})
                for split, values in rsum.items():
                    known.setdefault(split, values)  # what is there has its half-way value
    return runs


def _ranks(what: str, first: Runs, second: Runs, splits: list[str]) -> list[str]:
    """
    Spearman's correlation, by split, of the variants' means in two tables, each over the seeds that both have, where
    three variants or more have any.
    """
    found = []
    for split in splits:
        means = []
        for variant, runs in second.items():
            if ", " in variant:  # the same training, measured in another way
                continue
            others = first.get(variant, {})
            seeds = [seed for seed, rsum in runs.items() if split in rsum and split in others.get(seed, {})]
            if seeds:
                means.append([statistics.fmean(of[seed][split][-1] for seed in seeds) for of in (others, runs)])
        if len(means) > 2:
            ranks = [[sorted(values).index(value) for value in values] for values in zip(*means, strict=True)]
            if all(len(set(values)) > 1 for values in ranks):
                found.append(f"{split} {statistics.correlation(*ranks):.2f} ({len(means)} variants)")
    return [f"\nRank correlation of {what}: {', '.join(found)}"] if found else []


def _areas(records: list[dict[str, Any]]) -> list[str]:
    """A table of the areas under the risk-coverage curves, and in brackets those of a random order."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for record in records:
        for split, areas in record.get("aurc", {}).items():
            groups[record["variant"], split].append(areas)
    if not groups:
        return []
    lines = [
        "\nAURC at 1 (of a random order), lower is better\n",
        "| variant | split | seeds | image → text | text → image |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for names, runs in groups.items():
        cells = [
            "{:.1f} ({:.1f})".format(
                *(statistics.fmean(values) for values in zip(*(run[side] for run in runs), strict=True))
            )
            for side in ("image_to_text", "text_to_image")
        ]
        lines.append(f"| {' | '.join(map(escape_markdown, names))} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def _cell(compares: bool, runs: dict[int, dict], base: dict[int, dict], split: str) -> str:
    ends = {seed: rsum[split][-1] for seed, rsum in runs.items() if split in rsum}
    if not ends:
        return ""
    text = f"{statistics.fmean(ends.values()):.1f}"
    pairs = [end - base[seed][split][-1] for seed, end in ends.items() if split in base.get(seed, {})]
    if compares and pairs:
        text += f" ({difference(pairs)})"
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="train what the table lacks")
    run.add_argument("setting", type=Path, help="YAML file with data, towers and schedule")
    run.add_argument("--variants_file", type=Path, default=HERE / "variants.yaml")
    run.add_argument("--variants", nargs="+", help="names in the file of variants; all by default")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--splits", nargs="+", default=["seen", "validation"])
    run.add_argument(
        "--aligned",
        action="store_true",
        help="also evaluate with each split's images moved to where images of training lie",
    )
    run.add_argument("--dataset_name", help="overrides the setting's")
    run.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="overrides other values of the setting"
    )
    run.add_argument("--output", type=Path, required=True, help="table of results, one JSON object a line")
    run.add_argument("--cache", type=Path, default=CACHE)
    run.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    run.set_defaults(function=run_study)
    one = commands.add_parser("train", help="one training, as `run` starts it")
    one.add_argument("job")
    one.add_argument("cache", type=Path)
    one.add_argument("output", type=Path)
    one.set_defaults(function=_train_job)
    table = commands.add_parser("report", help="compare what a table holds")
    table.add_argument("table", type=Path)
    table.add_argument("--baseline", default="fine_grained")
    table.set_defaults(function=lambda options: print(report(read_table(options.table), options.baseline)))
    options = parser.parse_args(arguments)
    options.function(options)


if __name__ == "__main__":
    main()
