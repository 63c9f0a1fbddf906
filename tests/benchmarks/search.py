"""Measures the index: share of the exact best ten, latency, memory and disk, beside brute force and pooled vectors.

    python tests/benchmarks/search.py --output DIR [--quick] [--images 10000 100000] [--model FOLDER]

Without `--model` a small model is trained first (five minutes). The gallery is made of its embeddings of 4,000 styled
shapes, 49 tokens of 128 features: an image is one of them with noise of half its length, half of which is common to
all of the image's tokens. Queries are captions and pictures of other scenes, and they are encoded beforehand: what is
timed is `PicoIndex.search` and what it is compared with, query by query. What brute force finds is kept in DIR.
"""

from __future__ import annotations

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from modeling_pico.search import PicoIndex


REPOSITORY = Path(__file__).resolve().parents[2]
NOISE = 0.5
BLOCK = 10_000
K = 10
CANDIDATES = (100, 200, 500, 1000, 2000)
# Queries of a side that brute force is timed with.
TIMED = 5


class SyntheticEncoder:
    """Gives the embeddings that a number in an image's pixels or in a text stands for."""

    def __init__(self, file: Path) -> None:
        self.identity = {"fingerprint": "synthetic", "name": "synthetic", "revision": "", "method": "pico"}
        arrays = np.load(file)
        self.real = arrays["real"]
        self.queries = {name: arrays[name] for name in arrays.files if name != "real"}

    def encode_images(self, images, batch_size=32):
        return [self.image(int.from_bytes(image.tobytes()[:4], "big")) for image in images]

    def encode_texts(self, texts):
        return [self.queries[text] for text in texts]

    def image(self, number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        tokens = self.real[rng.integers(len(self.real))]
        length = np.linalg.norm(tokens, axis=-1, keepdims=True)
        noise = rng.standard_normal(tokens.shape, np.float32) + rng.standard_normal((1, tokens.shape[1]), np.float32)
        moved = tokens + NOISE * length * noise / np.sqrt(2 * tokens.shape[1], dtype=np.float32)
        moved *= length / np.linalg.norm(moved, axis=-1, keepdims=True)
        return moved.astype(np.float16).astype(np.float32)


def numbered(number: int) -> Image.Image:
    return Image.frombytes("RGB", (2, 1), number.to_bytes(4, "big") + b"\0\0")


def make_embeddings(file: Path, folder: Path, model_folder: Path | None, quick: bool) -> None:
    """Trains the model if there is none, and encodes what galleries and queries are made of."""
    from modeling_pico import PicoModel, PicoProcessor, styled_shapes

    if model_folder is None:
        model_folder = folder / "model"
        command = [sys.executable, "train_pico.py", "examples/quickstart.yaml", "--output_dir", str(model_folder)]
        command += [
            "--image_size",
            "56",
            "--embedding_dim",
            "128",
            "--do_predict",
            "false",
            "--style_report",
            "false",
            "--plots",
            "false",
        ]
        command += ["--max_steps", "2", "--do_eval", "false"] if quick else ["--num_train_epochs", "4"]
        if quick:
            command += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    model = PicoModel.from_pretrained(model_folder).eval()
    processor = PicoProcessor.from_pretrained(model_folder)
    scenes, queries = (60, 4) if quick else (2000, 40)
    scenes_drawn = styled_shapes("train", num_scenes=scenes, image_size=56)
    others = styled_shapes("validation_seen", num_scenes=queries, image_size=56)
    texts = [captions[row % 5] for row, captions in enumerate(others["captions"])]
    encode = {"batch_size": 100, "convert_to_numpy": True}
    # The 49 patches, without the class token.
    real = processor.encode_images(model, list(scenes_drawn["image"]), **encode)
    arrays = {"real": np.stack(real)[:, -49:]}
    pictures = list(others["image"])[: queries // 2]
    for row, tokens in enumerate(processor.encode_images(model, pictures, **encode)):
        arrays[f"image {row}"] = tokens[-49:]
    for row, tokens in enumerate(processor.encode_texts(model, texts, convert_to_numpy=True)):
        arrays[f"text {row}"] = tokens
    np.savez(file, **arrays)


def query_child(folder: str, file: str) -> None:
    """In a process of its own: what an index finds, how fast, and with which memory."""
    encoder = SyntheticEncoder(Path(file))
    # Before the index: what imports and queries take.
    encoder.real = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = PicoIndex.open(folder, encoder)
    found: dict[str, dict[str, list]] = {}
    for candidates in CANDIDATES:
        own: dict[str, list] = {"seconds": [], "ids": [], "names": []}
        for name in encoder.queries:
            # An image query is tokens just as a text query is; the name stands for both.
            start = time.perf_counter()
            hits = index.search(name, K, candidates=candidates)
            own["seconds"].append(time.perf_counter() - start)
            own["ids"].append([hit.columns["number"] for hit in hits])
            own["names"].append(name)
        found[str(candidates)] = own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"found": found, "peak_gib": peak / 2**20, "before_gib": before / 2**20}))


def measure(encoder: SyntheticEncoder, file: Path, folder: Path, count: int, precision: str) -> dict:
    """Builds an index of `count` images, adds a tenth, and queries it."""
    index = PicoIndex.create(folder, encoder, precision=precision)
    results: dict = {}
    for name, numbers in (("build", range(count * 9 // 10)), ("add", range(count * 9 // 10, count))):
        start = time.perf_counter()
        index.add(list(map(numbered, numbers)), columns={"number": list(numbers)}, progress=False)
        results[f"{name}_seconds"] = time.perf_counter() - start
    results["disk_gib"] = index.info()["bytes"] / 2**30
    command = [sys.executable, __file__, "--child", str(folder), str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {**results, **json.loads(output.splitlines()[-1])}


def compare(encoder: SyntheticEncoder, count: int) -> dict:
    """The exact best, by brute force in blocks, with what pooled vectors and the one-way comparison find."""
    import faiss
    import torch

    from modeling_pico import PicoProcessor

    retrieve = PicoProcessor.retrieve.__get__(object())
    names = list(encoder.queries)
    queries = [torch.from_numpy(encoder.queries[name]) for name in names]
    best: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0, np.int64)) for _ in names]
    one_way: list[np.ndarray] = [np.empty(0, np.float32) for _ in names]
    seconds = np.zeros(len(names))
    pooled = faiss.IndexFlatIP(encoder.real.shape[2])
    timed = [place for place, name in enumerate(names) if int(name.split()[1]) < TIMED]
    for start in range(0, count, BLOCK):
        block = np.stack([encoder.image(number) for number in range(start, min(start + BLOCK, count))])
        tensor = torch.from_numpy(block)
        mean = block.mean(axis=1)
        pooled.add(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        for place in timed:
            begin = time.perf_counter()
            retrieve([queries[place]], tensor, k=K)
            seconds[place] += time.perf_counter() - begin
        all_scores, all_indices = retrieve(queries, tensor, k=K)
        for place, query in enumerate(queries):
            known, ids = best[place]
            scores = np.concatenate([known, all_scores[place].numpy()])
            ids = np.concatenate([ids, all_indices[place].numpy() + start])
            order = np.argsort(-scores, kind="stable")[:K]
            best[place] = scores[order], ids[order]
            similarity = (block.reshape(-1, block.shape[2]) @ query.numpy().T).reshape(len(block), block.shape[1], -1)
            one_way[place] = np.concatenate([one_way[place], similarity.max(axis=1).mean(axis=1)])
    results: dict = {"exact": {name: ids.tolist() for name, (_, ids) in zip(names, best, strict=True)}}
    results["brute_force_seconds"] = {names[place]: float(seconds[place]) for place in timed}
    results["pooled"], results["one_way"], results["pooled_seconds"] = {}, {}, {}
    for place, name in enumerate(names):
        mean = encoder.queries[name].mean(axis=0)[None]
        begin = time.perf_counter()
        found = pooled.search(mean / np.linalg.norm(mean), min(1000, count))[1][0]
        results["pooled_seconds"][name] = time.perf_counter() - begin
        results["pooled"][name] = found.tolist()
        results["one_way"][name] = np.argsort(-one_way[place])[:1000].tolist()
    return results


def table(count: int, index: dict, compared: dict) -> tuple[list[str], dict]:
    """Rows of the report and their numbers."""
    rows, numbers = [], {}
    exact = compared["exact"]

    def row(what: str, found: dict[str, list[int]], seconds: dict[str, float] | None) -> None:
        cells = []
        for side in ("text", "image"):
            own = [name for name in exact if name.startswith(side)]
            share = statistics.mean(len(set(exact[name]) & set(found[name])) / K for name in own)
            median = None if seconds is None else statistics.median(seconds[name] for name in own if name in seconds)
            numbers.setdefault(what, {})[side] = {"share": share, "median_seconds": median}
            cells += [f"{share:.3f}", "" if median is None else f"{1000 * median:.0f} ms"]
        rows.append(f"| {count:,} | {what} | {' | '.join(cells)} |")

    row("brute force, `processor.retrieve`", exact, compared["brute_force_seconds"])
    for candidates, own in index["found"].items():
        found = dict(zip(own["names"], own["ids"], strict=True))
        row(f"index, {candidates} candidates", found, dict(zip(own["names"], own["seconds"], strict=True)))
    firsts = {name: ids[:K] for name, ids in compared["pooled"].items()}
    row("pooled vectors, FAISS", firsts, compared["pooled_seconds"])
    row("pooled vectors, best 100 scored exactly", {n: ids[:100] for n, ids in compared["pooled"].items()}, None)
    row("pooled vectors, best 1,000 scored exactly", compared["pooled"], None)
    row(
        "words against patches alone, best 100 scored exactly",
        {n: i[:100] for n, i in compared["one_way"].items()},
        None,
    )
    row("words against patches alone, best 1,000 scored exactly", compared["one_way"], None)
    return rows, numbers


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        query_child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for search.md and search.json")
    parser.add_argument("--quick", action="store_true", help="an untrained model and 1,500 images: does it run?")
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000], help="sizes of the gallery")
    parser.add_argument("--model", type=Path, help="checkpoint with 49 patches, instead of the one that is trained")
    parser.add_argument("--precision", default="float16", help="float16 or int8")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "embeddings.npz"
    if not file.exists():
        make_embeddings(file, args.output, args.model, args.quick)
    encoder = SyntheticEncoder(file)
    lines = ["| images | what | texts: share | latency | images: share | latency |", "| ---: | --- | " + "---: | " * 4]
    results: dict = {"precision": args.precision, "threads": os.environ["OMP_NUM_THREADS"], "sizes": {}}
    costs = ["| images | build | add the last tenth | on disk | memory, querying |", "| ---: " * 5 + "|"]
    for count in [1500] if args.quick else args.images:
        kept_file = args.output / f"exact-{count}.json"
        compared = json.loads(kept_file.read_text()) if kept_file.exists() else compare(encoder, count)
        kept_file.write_text(json.dumps(compared))
        index = measure(encoder, file, args.output / f"index-{count}-{args.precision}", count, args.precision)
        rows, numbers = table(count, index, compared)
        lines += rows
        costs.append(
            f"| {count:,} | {index['build_seconds']:.0f} s | {index['add_seconds']:.0f} s "
            f"| {index['disk_gib']:.2f} GiB | {index['peak_gib']:.2f} GiB |"
        )
        kept = ("build_seconds", "add_seconds", "disk_gib", "peak_gib", "before_gib")
        results["sizes"][count] = {"methods": numbers, **{name: index[name] for name in kept}}
        report = "\n".join([*lines, "", *costs, ""])
        (args.output / "search.md").write_text(report)
        (args.output / "search.json").write_text(json.dumps(results, indent=2) + "\n")
        print(report, flush=True)


if __name__ == "__main__":
    main()
