from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path

import bound
import datasets
import pytest
import study
import torch
import yaml
from encoded_data import load_splits
from free_gate import column_statistics
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, BertModel

from modeling_pico import image_text_loss, pair_scores
from modeling_pico.data.dataset import SampleKey
from modeling_pico.evaluation.evaluator import EncodedRetrieval
from modeling_pico.markdown import signed_number
from modeling_pico.script.from_scratch import small_text_config, train_tokenizer


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "style_study"


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Trainings that the study would start as processes of their own, with imports of their own, run here."""

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        if command[0] != sys.executable:
            return start(command, **options)
        printed, failure = io.StringIO(), ""
        with redirect_stdout(printed):
            try:
                study.main(command[2:])
            except (SystemExit, Exception) as error:
                failure = str(error)
        return subprocess.CompletedProcess(command, bool(failure), printed.getvalue(), failure)

    start = subprocess.run
    monkeypatch.setattr(study.subprocess, "run", run)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Parquet-like data small enough for a training in a second: two styles for training, another for validation."""
    folder = tmp_path_factory.mktemp("data")
    colors = ["red", "green", "blue", "black", "white", "yellow", "purple", "orange"]
    for split, sizes in (("train", (10, 14)), ("validation", (12,))):
        rows = [
            {
                "image": Image.new("RGB", (size, size), color),
                "captions": [f"a {color} square", color],
                "style": str(size),
                "concept_id": color,
            }
            for size in sizes
            for color in colors
        ]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    small = {"image_size": 16, "patch_size": 8, "vision_hidden_size": 8, "vision_num_layers": 1, "num_heads": 2}
    small |= {"text_hidden_size": 8, "text_num_layers": 1, "embedding_dim": 8, "num_train_epochs": 2, "batch_size": 4}
    settings = yaml.safe_load((FOLDER / "emoji_styles.yaml").read_text())
    return {**settings, **small, "dataset_name": str(folder), "num_seen": 4}


def test_trains_a_variant_the_same_twice_and_never_the_held_out_images(setting, tmp_path):
    options = {"args": {"prototype_start": 1, "prototype_update_start": 2, "num_train_epochs": 3}}
    splits = ["seen", "validation"]
    first, second = (
        study.train(setting, options, 3, splits, tmp_path, tmp_path / f"{run}.safetensors") for run in range(2)
    )
    assert set(first["rsum"]) == set(splits)
    assert all(len(values) == 2 for values in first["rsum"].values())
    assert [entry["prototype_stage"] for entry in first["constructions"]] == [1.0, 2.0]
    for name in ("rsum", "loss", "parameters"):
        assert first[name] == second[name], name
    data = load_splits(setting, splits, tmp_path)
    assert (len(data.splits["train"]), len(data.splits["seen"]), len(data.splits["validation"])) == (12, 4, 8)
    # What is trained on does not hang on the splits that are asked for.
    other = load_splits(setting, ["validation"], tmp_path).splits["train"]
    assert torch.equal(other.pixels, data.splits["train"].pixels)
    # Colour and style tell images apart.
    name = [
        (tuple(image[:, 0, 0].tolist()), style)
        for split in ("train", "seen")
        for image, style in zip(data.splits[split].pixels, data.splits[split].styles, strict=True)
    ]
    assert len(set(name)) == 16
    assert set(data.splits["validation"].styles) == {"12"}
    # One concept is one identity in every split.
    assert set(data.splits["validation"].ids.tolist()) == set(range(8))


def test_the_free_gate_starts_neutral_and_learns(setting, tmp_path):
    data = load_splits(setting, ["validation"], tmp_path)
    model = study.build_model(setting, {"method": "free_gate"}, data, tmp_path)
    batch = next(data.splits["validation"].batches(4))
    outputs = model.train()(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
    torch.testing.assert_close(outputs.image_embeds, outputs.image_tokens)
    torch.testing.assert_close(outputs.text_semantic_probability, torch.full((8, 8), 2.0).sigmoid())
    study.train(setting, {"method": "free_gate"}, 3, ["validation"], tmp_path, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    assert all(kept[f"alignment_head.gate.{side}.2.weight"].any() for side in ("image", "text"))


def test_statistics_of_columns_by_hand():
    # Dimension 4, so values are doubled; the third token is padding.
    tokens = torch.tensor([[[0.5, 0.5, 0.0, -0.5], [-0.5, 1.0, 0.0, -0.5], [9.0, 9.0, 9.0, 9.0]]])
    expected = [[0.0, 1.0, 1.0, -1.0], [1.5, 0.5, 2.0, 1.0], [0.0, 1e-4, 0.0, 0.0], [-1.0, 1e-4, -1.0, -1.0]]
    found = column_statistics(tokens, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=1e-6)
    assert not column_statistics(tokens, torch.zeros(1, 3)).any()


def test_every_variant_is_a_model_of_its_method(setting, tmp_path):
    data = load_splits(setting, ["validation"], tmp_path)
    variants = yaml.safe_load((FOLDER / "variants.yaml").read_text())
    for name in variants:
        options = study._describe_job("tiny", setting, variants, name, 0)["options"]
        if "data" in options:  # which are those of pretrained towers
            with pytest.raises(ValueError, match=r"with \['data'\] cannot be trained on this setting"):
                study.build_model(setting, options, data, tmp_path)
            continue
        model = study.build_model(setting, options, data, tmp_path)
        method = options.get("method", "pico")
        head = {"pico_literal": "pico", "free_gate": "fine_grained"}.get(method, method)
        assert model.config.method == head, name
        assert (model.style_prototypes is not None) == (head == "pico" or name.startswith("pico_cdds")), name
        literal = (model.config.column_mode, model.config.style_probability) == ("quantile", "purity")
        assert literal == (method == "pico_literal"), name
    assert {"cdds", "pico_cdds"} <= set(variants)


@pytest.mark.parametrize("num_trained_layers", [0, 1])
def test_pretrained_text_tower_is_frozen_but_for_its_last_layers(setting, tmp_path, num_trained_layers):
    data, folder = load_splits(setting, ["validation"], tmp_path), tmp_path / "pretrained"
    tokenizer = train_tokenizer(data.captions)
    config = small_text_config(12, 2, 2, tokenizer)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own = {"text_model_name_or_path": str(folder), "text_num_trained_layers": num_trained_layers}
    own["text_num_hidden_layers"] = 1
    model = study.build_model({**setting, **own}, {"method": "fine_grained"}, data, tmp_path)
    trained = {name for name, _ in model.text_model.named_parameters()}
    assert {name.split(".")[0] for name in trained} == ({"hidden", "layers"} if num_trained_layers else {"hidden"})
    batch = next(data.splits["validation"].batches(8))
    states = model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    texts = [data.captions[row] for row in batch["input_ids"][:, 0].tolist()]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(tokens["attention_mask"], batch["attention_mask"])
    with torch.no_grad():
        whole = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()(**tokens).last_hidden_state
        expected = model.text_model.hidden(whole)
    real = batch["attention_mask"].bool()
    # The frozen part is kept in half precision.
    torch.testing.assert_close(states[real], expected[real], atol=5e-3, rtol=0)
    for wrong in ({"text_num_trained_layers": 3}, {"text_num_hidden_layers": -1}):
        with pytest.raises(ValueError, match="must be from 0 to 2 and text_num_hidden_layers at least 0, but got"):
            study.build_model({**setting, **own, **wrong}, {"method": "fine_grained"}, data, tmp_path)
    (kept,) = tmp_path.glob("texts-*.pt")
    time_of_first = kept.stat().st_mtime_ns
    result = study.train(
        {**setting, **own, "num_train_epochs": 1},
        {"method": "fine_grained"},
        0,
        ["validation"],
        tmp_path,
        tmp_path / "kept.safetensors",
    )
    assert result["rsum"]["validation"][-1] > 0
    assert kept.stat().st_mtime_ns == time_of_first  # the captions are not encoded twice


def test_uncertainty_makes_a_second_row(setting, tmp_path):
    splits = ["seen", "validation"]
    options = {"method": "fine_grained", "uncertainty_config": {"num_prototypes": 3, "gradient": False}}
    result = study.train(setting, options, 3, splits, tmp_path, tmp_path / "kept.safetensors")
    assert set(result["reranked"]) == set(result["aurc"]) == set(splits)
    assert all(0 <= area <= 100 for areas in result["aurc"]["seen"].values() for area in areas)
    kept = study.train(setting, options, 3, splits, tmp_path, tmp_path / "kept.safetensors")
    assert all(kept[name] == result[name] for name in ("reranking", "reranked", "aurc"))
    result["reranked"] = {name: [values[-1] + 2.0] for name, values in result["rsum"].items()}
    text = study.report([{"setting": setting, "setting_name": "tiny", "variant": "pau", "seed": 3, **result}], "pau")
    assert f"| pau | 1 | {result['rsum']['seen'][-1]:.1f} |" in text
    assert f"| pau, re-ranked | 1 | {result['reranked']['seen'][0]:.1f} (+2.0) |" in text


@pytest.mark.usefixtures("in_this_process")
def test_uncertainty_is_added_to_kept_models_that_stay_as_they_are(setting, tmp_path, capsys):
    file, variants, table = tmp_path / "tiny.yaml", tmp_path / "variants.yaml", tmp_path / "table.jsonl"
    file.write_text(yaml.safe_dump({**setting, "num_train_epochs": 1}))
    variants.write_text(
        "plain: {method: fine_grained}\n"
        "plain_pau: {base: plain, uncertainty_config: {num_prototypes: 3}, args: {num_train_epochs: 2}}\n"
    )
    with pytest.raises(SystemExit, match="lost starts from 'nothing', which the file of variants lacks"):
        study._describe_job("tiny", setting, {"lost": {"base": "nothing"}}, "lost", 0)
    command = ["run", str(file), "--variants_file", str(variants), "--output", str(table), "--cache", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 of 1 trainings failed"):
        study.main([*command, "--variants", "plain_pau", "--seeds", "0"])
    assert "plain_pau starts from plain, seed 0: train that first" in capsys.readouterr().out
    study.main([*command, "--variants", "plain_pau", "plain", "--seeds", "0"])
    first, second = study.read_table(table)
    assert (first["variant"], second["variant"], second["base_key"]) == ("plain", "plain_pau", first["key"])
    assert first["rsum"]["validation"][-1] == second["rsum"]["validation"][-1]
    base, added = (load_file(table.with_suffix("") / f"{record['key']}.safetensors") for record in (first, second))
    assert set(added) - set(base) == {"uncertainty_prototypes.image", "uncertainty_prototypes.text"}
    assert all(torch.equal(added[name], value) for name, value in base.items())
    # What was opened later, with the uncertainty, counts for the model it was added to.
    second["rsum"]["test"], second["reranked"]["test"] = [123.0], [124.5]
    text = study.report([first, second], "plain")
    assert "| plain | 1 | " in text and " 123.0 |" in text and "| plain_pau | 1 |" not in text
    assert "124.5 (+1.5) |" in text


def test_areas_under_risk_coverage_curves_have_a_table(setting):
    def record(seed: int, area: float, **other) -> dict:
        areas = {"seen": {"image_to_text": [area, 50.0], "text_to_image": [30.0, 60.0]}}
        return {
            "setting": {**setting, **other},
            "setting_name": "tiny",
            "variant": "pau",
            "seed": seed,
            "rsum": {"seen": [300.0]},
        } | ({"aurc": areas} if area else {})

    text = study.report([record(0, 40.0), record(1, 44.0), record(2, 0.0)], "pau")
    assert text.endswith("| pau | seen | 2 | 42.0 (50.0) | 30.0 (60.0) |")
    # Other towers have a table of their own.
    text = study.report([record(0, 40.0), record(0, 44.0, patch_size=4)], "pau")
    assert all(f"| pau | seen | 1 | {area} (50.0) | 30.0 (60.0) |" in text for area in ("40.0", "44.0"))
    assert "AURC" not in study.report([record(2, 0.0)], "pau")


def test_a_batch_holds_the_captions_of_its_images(setting, tmp_path):
    data = load_splits(setting, ["validation"], tmp_path)
    split = data.splits["validation"]
    batch = split.__getitems__([SampleKey(2, 1, 0), SampleKey(5, 0, 0)])
    texts = [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert texts == ["blue", "a yellow square"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
    assert torch.equal(batch["image_ids"], split.ids[[2, 5]])
    whole = next(split.batches(3))
    assert whole["input_ids"].shape[0] == 6
    assert torch.equal(whole["text_ids"], split.ids[[0, 0, 1, 1, 2, 2]])
    assert whole["pixel_values"].abs().max() <= 1


def test_every_training_is_a_process_of_its_own(setting, tmp_path, capsys):
    file, table = tmp_path / "tiny.yaml", tmp_path / "table.jsonl"
    file.write_text(yaml.safe_dump({**setting, "num_train_epochs": 1}))
    study.main(
        [
            "run",
            str(file),
            "--output",
            str(table),
            "--cache",
            str(tmp_path),
            "--variants",
            "fine_grained",
            "--seeds",
            "0",
        ]
    )
    assert "fine_grained, seed 0: {'seen': [" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process", "small_galleries")
def test_trains_what_the_table_lacks_and_reports_it(setting, tmp_path, capsys):
    file, variants, table = tmp_path / "tiny.yaml", tmp_path / "variants.yaml", tmp_path / "table.jsonl"
    file.write_text(yaml.safe_dump({**setting, "num_train_epochs": 1}))
    variants.write_text("plain: {method: fine_grained}\nbroken: {method: nonsense}\n")
    command = ["run", str(file), "--variants_file", str(variants), "--output", str(table), "--cache", str(tmp_path)]
    study.main([*command, "--variants", "plain", "--seeds", "0"])
    assert "plain, seed 0: {'seen': [" in capsys.readouterr().out
    study.main([*command, "--variants", "plain", "--seeds", "0"])
    (record,) = study.read_table(table)
    assert (record["variant"], record["seed"], record["setting_name"]) == ("plain", 0, "tiny")
    study.main([*command, "--variants", "plain", "--seeds", "0", "--splits", "validation", "train"])
    assert "from kept weights" in capsys.readouterr().out
    record, later = study.read_table(table)
    # Only what the table lacked, from the weights of the training above.
    assert (later["key"], list(later["rsum"])) == (record["key"], ["train"])
    (weights,) = table.with_suffix("").iterdir()
    again = study.train(record["setting"], record["options"], 0, ["validation"], tmp_path, weights)
    assert again == {"rsum": {"validation": record["rsum"]["validation"][-1:]}}
    with pytest.raises(SystemExit, match="1 of 1 trainings failed"):
        study.main([*command, "--variants", "broken", "--seeds", "0"])
    assert "must be one of 'pico'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"unknown variants \['other'\].*\['broken', 'plain'\]"):
        study.main([*command, "--variants", "other"])
    study.main([*command, "--variants", "plain", "--seeds", "0", "--aligned"])
    study.main([*command, "--variants", "plain", "--seeds", "0", "--aligned"])
    record, later, aligned = study.read_table(table)
    assert set(aligned["aligned"]) == {"seen", "validation"}
    assert {name: ends[-1:] for name, ends in record["rsum"].items()} == aligned["rsum"]
    study.main(["report", str(table), "--baseline", "plain"])
    ends = (record["rsum"]["seen"][-1], record["rsum"]["validation"][-1], later["rsum"]["train"][-1])
    text = capsys.readouterr().out
    assert f"| plain | 1 | {' | '.join(f'{end:.1f}' for end in ends)} |" in text
    (moved,) = aligned["aligned"]["seen"]
    assert f"| plain, aligned | 1 | {moved:.1f} ({signed_number(moved - ends[0])}) | " in text


@pytest.mark.usefixtures("small_galleries")
def test_bound_measures_gates_on_the_meanings_they_were_not_fitted_to(setting, tmp_path, capsys):
    table, setting = tmp_path / "table.jsonl", {**setting, "num_train_epochs": 1}
    for seed in (0, 1):
        record = {"setting": setting, "variant": "fine_grained", "options": {"method": "fine_grained"}, "seed": seed}
        weights = table.with_suffix("") / f"{seed}.safetensors"
        result = study.train(setting, record["options"], seed, ["validation"], tmp_path, weights)
        with table.open("a") as lines:
            lines.write(json.dumps({**record, "key": str(seed), **result}) + "\n")
    capsys.readouterr()
    bound.main([str(table), "--steps", "2", "--cache", str(tmp_path), "--seeds", "0", "1"])
    text = capsys.readouterr().out
    assert "rSum gained on validation, 2 seeds of fine_grained" in text
    assert all(f"| {gate} | " in text for gate in ("constant", "linear", "shares", "moments"))
    with pytest.raises(SystemExit, match="holds no training of pico"):
        bound.main([str(table), "--variant", "pico"])


def test_a_gate_that_is_fitted_learns_and_is_then_used():
    def pair_loss(*sides, image_ids):
        scores = pair_scores(*sides)
        return image_text_loss(scores, scores.T, image_ids=image_ids, logit_scale=10.0)

    generator = torch.Generator().manual_seed(0)
    # Half of the features tell the meanings apart, the others are larger and say nothing.
    meaning = torch.eye(8).repeat_interleave(2, dim=0)[:, None]
    noise = 3 * torch.randn(32, 3, 8, generator=generator)
    tokens = torch.nn.functional.normalize(torch.cat([meaning.repeat(2, 3, 1), noise], dim=-1), dim=-1)
    images, texts = tokens.chunk(2)
    mask, ids = torch.ones(16, 3, dtype=torch.bool), torch.arange(8).repeat_interleave(2)
    encoded = EncodedRetrieval(images, mask, texts, mask, ids, ids)
    first, second = bound.halves(encoded)
    assert not set(first.image_ids.tolist()) & set(second.image_ids.tolist())
    assert len(first.image_ids) == len(second.text_ids) == 8
    for kind in bound.GATES:
        torch.manual_seed(0)
        gate = bound.Gate(kind, 16)
        start, weights = gate(images, mask, "image")
        assert torch.equal(start, images) and torch.equal(weights, torch.ones(16, 16))
        bound.fit(gate, encoded, pair_loss, 60, 16)
        _, weights = gate(images, mask, "image")
        assert weights[:, :8].mean() > weights[:, 8:].mean() + 0.1, kind


def test_differences_are_paired_by_seed():
    def result(variant, seed, rsum):
        setting = {"dataset_name": "/somewhere/data", "epochs": 1}
        return {"setting_name": "s", "setting": setting, "variant": variant, "seed": seed, "rsum": {"v": [0.0, rsum]}}

    rows = [result("base", 0, 10.0), result("base", 1, 20.0), result("new", 0, 12.0), result("new", 1, 26.0)]
    text = study.report([*rows, result("new", 2, 100.0)], "base")
    # Differences 2 and 6: mean 4, standard error 2, and the seed that the baseline lacks counts in the mean alone.
    assert "| base | 2 | 15.0 |" in text
    assert "| new | 3 | 46.0 (+4.0 ± 25.4) |" in text
    assert "Rank correlation" not in text  # of two variants it says nothing
    assert study.paired_difference([5.0]) == (5.0, None)
    with pytest.raises(SystemExit, match=r"no training of the baseline 'other', but of \['base', 'new'\]"):
        study.report(rows, "other")
    assert json.dumps("/somewhere") not in text and "dataset_name=data" in text


def test_report_says_whether_half_of_the_training_ranks_the_variants_alike():
    def result(variant, seed, half_way, end):
        setting = {"dataset_name": "data"}
        rsum = {"v": [half_way, end], "later": [end]}
        return {"setting_name": "s", "setting": setting, "variant": variant, "seed": seed, "rsum": rsum}

    # Means half-way 3, 2, 1, 4 and at the end 5, 6, 7, 8: ranks 2, 1, 0, 3 and 0, 1, 2, 3.
    rows = [result("a", 0, 2.0, 4.0), result("a", 1, 4.0, 6.0), result("b", 0, 2.0, 6.0)]
    rows += [result("c", 0, 1.0, 7.0), result("d", 0, 4.0, 8.0)]
    # sum of squared differences of ranks 4 + 0 + 4 + 0: 1 - 6 * 8 / (4 * 15)
    assert "half-way and end: v 0.20 (4 variants)" in study.report(rows, "a")
    assert "later 0" not in study.report(rows, "a")


def test_report_says_whether_fewer_epochs_rank_the_variants_alike():
    def result(variant, seed, end, epochs, width=8):
        setting = {"dataset_name": "data", "num_train_epochs": epochs, "width": width}
        rsum = {"v": [end]}
        return {"setting_name": "s", "setting": setting, "variant": variant, "seed": seed, "rsum": rsum}

    short = [result("a", 0, 5.0, 2), result("b", 0, 6.0, 2), result("c", 0, 7.0, 2), result("c", 1, 0.0, 2)]
    # Ranks 0, 1, 2 and 1, 0, 2 by the seeds that both have: 1 - 6 * 2 / (3 * 8).
    rows = [*short, result("b", 0, 5.0, 6), result("a", 0, 6.0, 6), result("c", 0, 9.0, 6), result("d", 0, 1.0, 6)]
    text = study.report([*rows, *(result(name, 0, 3.0, 4, width=16) for name in "abc")], "a")
    assert text.count("Rank correlation") == 1
    assert text.index("num_train_epochs=6") < text.index("of the ends of 2 and 6 epochs: v 0.50 (3 variants)")


def test_what_was_dropped_is_told_with_the_figures_of_the_study():
    page = (FOLDER.parents[1] / "model_cards" / "style_study.md").read_text()
    text = (FOLDER.parents[1] / "docs" / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if "| `" in line]
    measured = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| p")
    ]
    for row, _, seeds, *differences in rows:
        found = [line[:2] + [f"{cell.split('(')[-1].rstrip(')')}" for cell in line[2:4]] for line in measured]
        assert [row.strip("`"), seeds, *differences] in found, row
    variants = yaml.safe_load((FOLDER / "variants.yaml").read_text())
    dropped = {row[0].strip("`") for row in rows}
    assert len(rows) == 35 and not dropped & set(variants)
    known = {record["variant"] for path in (FOLDER / "results").glob("*.jsonl") for record in study.read_table(path)}
    assert known <= dropped | set(variants)


def rows_of(page, start, end):
    """Cells of the rows of methods in a part of a page."""
    text = (FOLDER.parents[1] / page).read_text()
    lines = text[text.index(start) : text.index(end)].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]


def test_the_page_of_the_study_shows_the_tables_of_its_results():
    page = (FOLDER.parents[1] / "model_cards" / "style_study.md").read_text()
    for table in ("emoji_styles", "styled_shapes"):
        records = study.read_table(FOLDER / "results" / f"{table}.jsonl")
        assert all("/" not in record["setting"]["dataset_name"] for record in records)
        lines = [line for line in study.report(records, "fine_grained").splitlines() if line.strip()]
        assert [line for line in lines if line not in page.splitlines()] == []
    # The other pages round nothing anew: their cells are those of this page.
    cells = {cell.strip() for line in page.splitlines() for cell in line.split("|")}
    benchmarks = rows_of("docs/benchmarks.md", "## Five seeds on two data sets", "### Reading")
    assert len(benchmarks) == 22
    assert [cell for row in benchmarks for cell in row[1:] if cell not in cells] == []


LOOKS = ("test@sketch", "test@poster", "test@paint", "test@neon")


def runs_of(table: str, splits: tuple[str, ...]) -> dict[tuple[str, str], dict[int, float]]:
    """Mean rSum over some splits by seed, of each variant as it is and with moved galleries."""
    runs: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for record in study.read_table(FOLDER / "results" / f"{table}.jsonl"):
        for name in ("rsum", "aligned"):
            of_splits = record.get(name, {})
            if all(split in of_splits for split in splits):
                mean = statistics.mean(of_splits[split][-1] for split in splits)
                runs[record["variant"], name][record["seed"]] = mean
    return runs


def changes(table: str, splits: tuple[str, ...], *variant: str) -> str:
    """What a page says of a method: rSum of the baseline, of others how they differ."""
    runs, base = runs_of(table, splits), ("fine_grained", "rsum")
    if variant == base:
        return f"{statistics.mean(runs[base].values()):.1f}"
    apart = [rsum - runs[base][seed] for seed, rsum in runs[variant].items()]
    return study.difference(apart) if apart else ""


def mean(table: str, splits: tuple[str, ...], *variant: str) -> str:
    """The mean of the two seeds that were fine-tuned."""
    found = runs_of(table, splits)[variant]
    return f"{statistics.mean(found[seed] for seed in (0, 1)):.1f}" if found else ""


def test_tables_of_photographs_are_those_of_their_results():
    photographs = [("flickr8k", (split,)) for split in ("test", "test@gray", *LOOKS)]
    captions = [("flickr8k", (f"validation:{name}",)) for name in ("1", "romantic", "humorous")]
    emoji = [("emoji_styles_pretrained", (split,)) for split in ("seen", "validation", "test", "far")]
    far = ("flickr8k", LOOKS)
    finetuned = [("flickr8k_finetuned", splits) for _, splits in (*photographs, *captions)]
    page = "docs/benchmarks.md"
    tables = [
        (changes, 5, rows_of("README.md", "## Results", "**Column weights"), [photographs[0], far, *emoji[1:]]),
        (changes, 12, rows_of(page, "## Photographs", "One caption an image"), [*photographs, far]),
        (changes, 4, rows_of(page, "One caption an image", "Both towers fine-tuned"), captions),
        (mean, 6, rows_of(page, "Both towers fine-tuned", "- **Moving"), finetuned),
        (changes, 8, rows_of(page, "Emoji styles with the same", "Moving gains most"), emoji),
    ]
    for value, at_least, rows, columns in tables:
        assert len(rows) >= at_least
        for name, *cells in rows:
            method, *how = name.split(", ")
            variant = method.strip("`") + ("_styles" if "random styles" in how else "")
            columns_of_row = [("flickr8k", splits) for _, splits in columns] if "frozen" in how else columns
            key = "aligned" if "moved" in how else "rsum"
            assert cells == [value(*column, variant, key) for column in columns_of_row], name
