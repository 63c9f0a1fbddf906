"""The command line, called as `train_pico.main([...])`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import BertModel, ViTModel

import train_pico
from modeling_pico import PicoConfig, PicoModel, PicoProcessor
from modeling_pico.data import LOOKS, CaptionedImageDataset, PicoDataCollator, decode_image, render
from modeling_pico.evaluation import RetrievalEvaluator, align_encoded, retrieval_metrics, retrieval_ranks
from modeling_pico.model.backbones_pico import build_backbone
from modeling_pico.script.arguments import DataArguments
from modeling_pico.script.data import augmentation, check_processes
from modeling_pico.script.output import OneLineErrors, main_metrics
from modeling_pico.script.record import (
    describe_run,
    fingerprint,
    git_state,
    write_run_record,
)
from modeling_pico.training.secrets import find_secrets, without_secrets


ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "vision_hidden_size": 16,
    "vision_num_layers": 1,
    "text_hidden_size": 16,
    "text_num_layers": 1,
}
TOWERS = {**SIZES, "embedding_dim": 8, "num_style_prototypes": 3}
TRAINING = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 10,
    "num_train_epochs": 3,
    "prototype_start": 1,
    "prototype_update_start": 2,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "log_level": "error",
    "plots": "false",
}


pytestmark = pytest.mark.usefixtures("no_progress_bars", "own_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": tiny.rows(20), "validation": tiny.rows(9, seed=1), "test": tiny.rows(7, seed=2)}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """Warnings of the script and of the data package."""
    seen: list[str] = []
    for name in ("modeling_pico.script.data", "modeling_pico.data.images", "modeling_pico.data.sources"):
        monkeypatch.setattr(sys.modules[name].logger, "warning", seen.append)
    return seen


def flags(**options) -> list[str]:
    words = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return words


def train(folder, data, **options) -> dict[str, float]:
    options = {**TOWERS, **TRAINING, "do_train": True, "output_dir": folder, "dataset_name": data, **options}
    return train_pico.main(flags(**options))


def evaluate(folder, data, **options) -> dict[str, float]:
    defaults = {"use_cpu": True, "report_to": "none", "do_eval": True, "log_level": "error", "disable_tqdm": True}
    defaults["plots"] = "false"
    return train_pico.main(flags(**{**defaults, "output_dir": folder, "dataset_name": data, **options}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> SimpleNamespace:
    """A finished run from scratch."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return SimpleNamespace(folder=folder, results=train(folder, data, do_eval=True, do_predict=True, plots=True))


# Runs


def test_run_from_scratch_leaves_all_files(finished):
    for name in ("model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "modeling_pico.py"):
        assert (finished.folder / name).is_file(), name
    results = json.loads((finished.folder / "all_results.json").read_text())
    assert results == pytest.approx(finished.results)
    assert {"train_loss", "eval_rsum", "test_rsum", "test_image_to_text_recall_at_1"} <= set(results)
    card = (finished.folder / "README.md").read_text()
    assert f"{results['eval_rsum']:.1f}" in card and "## Results" in card
    assert "accelerate launch train_pico.py" in card
    assert "Feedback weight" in card  # the table of constructions
    model = PicoModel.from_pretrained(finished.folder)
    assert model.style_prototypes["image"].stage == 2
    assert PicoProcessor.from_pretrained(finished.folder).tokenizer.model_max_length == 64


def test_run_draws_its_pictures(finished):
    pytest.importorskip("matplotlib")
    names = ["training_curves", "pair_scores", "prototypes", "semantic_probability"]
    expected = {f"{name}.png" for name in (*names, "matches_0", "matches_2", "matches_4", "matches_6")}
    assert {path.name for path in (finished.folder / "plots").iterdir()} == expected


def test_saved_model_gives_the_same_results(finished, data, tmp_path):
    results = evaluate(tmp_path, data, model_name_or_path=finished.folder, do_predict=True)
    for name, value in results.items():
        if "rsum" in name or "recall" in name or "rank" in name:
            assert value == finished.results[name], name
    assert results["eval_loss"] == pytest.approx(finished.results["eval_loss"], rel=1e-6)


def test_another_head_of_a_checkpoint_is_the_ablation_of_it(finished, data, tmp_path):
    """The same projections without weights, which is what the model computes before its first prototypes."""
    plain = PicoModel.from_pretrained(finished.folder)
    for side in plain.style_prototypes.values():
        side.stage.zero_()
    plain.save_pretrained(tmp_path / "plain")
    PicoProcessor.from_pretrained(finished.folder).save_pretrained(tmp_path / "plain")
    expected = evaluate(tmp_path / "a", data, model_name_or_path=tmp_path / "plain")
    ablated = evaluate(tmp_path / "b", data, model_name_or_path=finished.folder, method="fine_grained")
    assert ablated["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert ablated["eval_rsum"] == expected["eval_rsum"]
    assert ablated["eval_loss"] != pytest.approx(finished.results["eval_loss"], rel=1e-4)


def test_resume_continues_and_repeats_the_tokenizer(data, tmp_path):
    whole = train(tmp_path / "whole", data, do_eval=True)
    resumed = train(tmp_path / "whole", data, do_eval=True, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert resumed["eval_rsum"] == whole["eval_rsum"]
    assert resumed["eval_loss"] == whole["eval_loss"]
    # What the first command may have needed to read its backbones.
    again = {"resume_from_checkpoint": "true", "use_safetensors": "false"}
    last = train(tmp_path / "whole", data, do_eval=True, **again)
    assert last["eval_loss"] == whole["eval_loss"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "fine_grained"}, "--method fine_grained .the run has none."),
        ({"method": "cdds"}, "--method cdds .the run has none."),
        ({"margin": 2}, "--margin 2.0 .the run has none."),
        ({"loss_type": "hinge"}, "--loss_type hinge .the run has none."),
        ({"num_style_prototypes": 4}, "--num_style_prototypes 4 .the run has 3."),
        ({"image_size": 24}, "--image_size 24 .the run has 16."),
        ({"text_hidden_size": 8}, "--text_hidden_size 8 .the run has 16."),
        ({"model_name_or_path": "another/clip"}, "--model_name_or_path another/clip .the run has none."),
        ({"freeze_vision": True}, "--freeze_vision true .the run has false."),
    ],
)
def test_another_model_is_refused_on_resume(finished, data, options, said):
    with pytest.raises(ValueError, match=f"A resumed run keeps the model that it was begun with.*{said}"):
        train(finished.folder, data, resume_from_checkpoint="true", **options)


def test_model_that_cannot_be_is_refused_before_any_data_is_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr("train_pico.load_data", lambda *args: pytest.fail("read the data"))
    for options in ({"model_name_or_path": "no/such/model"}, {"margin": -1}, {"max_text_length": 0}):
        with pytest.raises(ValueError):
            train(tmp_path, data, **options)
    with pytest.raises(ValueError, match="Give --model_name_or_path to evaluate a trained model"):
        evaluate(tmp_path, data)


def test_seed_decides_a_run_from_scratch(finished, data, tmp_path):
    again = train(tmp_path, data, do_eval=True)
    assert again["eval_loss"] == finished.results["eval_loss"]
    assert train(tmp_path / "b", data, do_eval=True, seed=1)["eval_loss"] != again["eval_loss"]


def test_training_images_are_drawn_again_in_random_styles(data, tmp_path):
    assert augmentation(DataArguments()) is None
    both = augmentation(DataArguments(min_crop_scale=0.5, style_augmentation=0.25))
    crop, style = both.transforms
    assert (crop.min_scale, crop.flip, style.probability) == (0.5, False, 0.25)
    options = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    plain, drawn, again = (
        train(tmp_path / name, data, style_augmentation=share, **options)["train_loss"]
        for name, share in (("a", 0), ("b", 1), ("c", 1))
    )
    assert drawn == again != plain


def times_aside(results: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in results.items() if not name.endswith(("runtime", "per_second"))}


def test_seed_and_command_decide_all_results(finished, data, tmp_path):
    """
    In another process, with another order of hash tables, with workers that load the images, and with a full disk for
    what it prints.
    """
    options = {**TOWERS, **TRAINING, "do_train": True, "do_eval": True, "do_predict": True, "dataset_name": data}
    command = [sys.executable, str(ROOT / "train_pico.py")]
    command += flags(**options, output_dir=tmp_path / "run", dataloader_num_workers=2)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_of_the_environment"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with open("/dev/full", "w") as full:
        subprocess.run(command, check=True, env=environment, stdout=full, stderr=full, timeout=240)
    first, second = (Path(folder, "all_results.json") for folder in (finished.folder, tmp_path / "run"))
    mine, other = (
        json.dumps(times_aside(json.loads(path.read_text())), indent=4, sort_keys=True) for path in (first, second)
    )
    assert mine == other
    assert "train_loss" in mine and "eval_rsum" in mine and "test_rsum" in mine
    for name, tensor in PicoModel.from_pretrained(finished.folder).state_dict().items():
        assert torch.equal(tensor, PicoModel.from_pretrained(tmp_path / "run").state_dict()[name])
    records = [json.loads(Path(folder, "run.json").read_text()) for folder in (finished.folder, tmp_path / "run")]
    assert records[0]["data"] == records[1]["data"]
    assert "hf_of_the_environment" not in (tmp_path / "run" / "run.json").read_text()


def test_run_records_what_it_was(finished, data):
    record = json.loads((finished.folder / "run.json").read_text())
    assert set(record) == {"command", "versions", "machine", "git", "data", "configuration"}
    assert record["command"].startswith("accelerate launch train_pico.py --image_size 16")
    assert {"python", "torch", "transformers", "datasets"} <= set(record["versions"])
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert set(record["data"]) == {"train", "validation", "test"}
    assert record["data"]["train"]["images"] == 20 and len(record["data"]["train"]["fingerprint"]) == 32
    assert record["configuration"]["model"]["embedding_dim"] == 8
    assert record["configuration"]["data"]["dataset_name"] == data
    assert record["configuration"]["training"]["learning_rate"] == 1e-2
    assert not (finished.folder / "run-2.json").exists()


def test_another_start_in_the_same_folder_leaves_the_first_record(tmp_path):
    for number, seed in enumerate([0, 0, 1, 1, 0]):
        path = write_run_record(tmp_path, {"seed": seed})
        assert path.name == ["run.json", "run.json", "run-2.json", "run-2.json", "run.json"][number]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-2.json", "run.json"]


def test_records_hold_no_secrets():
    options = {
        "hub_token": "-to'k en",
        "seed": 1,
        "odd": Path("a"),
        "more": {"api_key": "kkk"},
        "text_special_tokens": "no",
    }
    secrets = find_secrets(options)
    assert secrets == {"-to'k en", "kkk"}
    signed = "https://me:pass@host/a?key=swordfish&name=x&X-Amz-Signature=1#access_token=q"
    argv = ["--hub_token=-to'k en", "--more", '{"api_key": "kkk"}', "--run_name", "a-to'k enb", signed]
    assert without_secrets([*argv, "hf_" + 34 * "a"], secrets) == [
        *("--hub_token=...", "--more", '{"api_key": "..."}', "--run_name", "a...b"),
        *("https://...@host/a?...&name=x&...#...", "..."),
    ]
    groups = {"training": options, "data": {"dataset_name": signed}}
    record = json.dumps(describe_run("train_pico.py", groups, {}, secrets), default=str)
    assert json.loads(record)["configuration"]["training"] == {
        **{"hub_token": "...", "seed": 1, "odd": "a", "more": {"api_key": "..."}, "text_special_tokens": "no"}
    }
    for secret in ("k en", "kkk", "pass", "swordfish", "=1", "=q"):
        assert secret not in record


def test_fingerprint_is_that_of_the_content(data, tmp_path):
    def fingerprint_of(rows):
        return fingerprint(CaptionedImageDataset(rows))

    rows = datasets.load_from_disk(data)["train"]
    name = fingerprint_of(rows)
    assert fingerprint_of(tiny.rows(20)) == name != fingerprint_of(tiny.rows(20, seed=5))
    assert fingerprint_of(rows.select(range(19))) != name
    assert fingerprint_of(rows.map(lambda row: {"image_id": row["image_id"] + "x"})) == name
    assert fingerprint_of(rows.map(lambda row: {"image_id": "x"})) != name
    assert fingerprint_of(rows.map(lambda row: {"captions": row["captions"] + ["more"]})) != name
    # Of files: name and size, wherever they lie.
    names = []
    for folder, content in (("a", b"12"), ("b", b"34"), ("c", b"345")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(content)
        table = {"image": [str(tmp_path / folder / "1.png")], "captions": [["a"]], "image_id": ["1"]}
        names.append(fingerprint_of(datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())))
    assert names[0] == names[1] != names[2]


def test_git_state_names_commit_and_changes(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    write(tmp_path / "a.py", "1")
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = git_state(tmp_path)
    assert len(clean) == 40
    write(tmp_path / "a.py", "2")
    assert git_state(tmp_path) == f"{clean}-dirty"


def test_auto_starts_anew_and_continues(data, tmp_path):
    results = train(tmp_path, data, resume_from_checkpoint="auto")
    again = train(tmp_path, data, resume_from_checkpoint="auto")
    assert times_aside(again) == times_aside(results)
    with pytest.raises(ValueError, match="holds no complete checkpoint. With auto"):
        train(tmp_path / "b", data, resume_from_checkpoint="true")
    (tmp_path / "b" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint-3' is not a complete checkpoint"):
        train(tmp_path / "b", data, resume_from_checkpoint="true")


def test_errors_of_card_and_pictures_cost_neither_model_nor_results(data, tmp_path, monkeypatch):
    errors: list[str] = []
    monkeypatch.setattr("modeling_pico.script.output.logger.exception", errors.append)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("train_pico.save_run_plots", fail)
    monkeypatch.setattr("train_pico.PicoTrainer.create_model_card", fail)
    monkeypatch.setattr("train_pico.has_matplotlib", lambda: True)
    results = train(tmp_path, data, num_train_epochs=1, plots=True)
    assert [error.split(" could")[0] for error in errors] == ["The model card", "The pictures"]
    assert json.loads((tmp_path / "all_results.json").read_text()) == pytest.approx(results)
    PicoModel.from_pretrained(tmp_path)


def test_training_without_a_validation_split(tmp_path):
    datasets.DatasetDict({"train": tiny.rows(20)}).save_to_disk(tmp_path / "data")
    options = {"eval_strategy": "no", "save_strategy": "no", "num_train_epochs": 1}
    with pytest.raises(ValueError, match="has no split 'validation'; it has .'train'"):
        train(tmp_path / "a", tmp_path / "data", **options)
    results = train(tmp_path / "b", tmp_path / "data", feedback="constant", **options)
    assert "train_loss" in results
    results = train(tmp_path / "c", tmp_path / "data", method="fine_grained", **options)
    assert "train_loss" in results


def test_joint_checkpoint_is_fine_tuned_and_reloads(tiny_clip, data, tmp_path):
    options = dict.fromkeys(TOWERS) | {"num_train_epochs": 2, "num_style_prototypes": 3}
    results = train(tmp_path / "run", data, do_eval=True, model_name_or_path=tiny_clip.folder, **options)
    again = evaluate(tmp_path / "again", data, model_name_or_path=tmp_path / "run")
    assert again["eval_rsum"] == results["eval_rsum"]
    config = PicoConfig.from_pretrained(tmp_path / "run")
    assert (config.embedding_dim, config.vision_config.model_type) == (10, "clip_vision_model")
    assert tiny_clip.folder in (tmp_path / "run" / "README.md").read_text()


def test_the_length_of_texts_stays_with_the_model(tiny_clip, data, tmp_path):
    options = {"model_name_or_path": tiny_clip.folder, "max_steps": 2, "do_eval": True, **dict.fromkeys(TOWERS)}
    results = train(tmp_path / "run", data, max_text_length=4, **options)
    processor = PicoProcessor.from_pretrained(tmp_path / "run")
    assert processor(text=["red " * 30], return_tensors="pt").input_ids.shape == (1, 4)
    again = evaluate(tmp_path / "again", data, model_name_or_path=str(tmp_path / "run"))
    assert again["eval_loss"] == pytest.approx(results["eval_loss"])


def test_two_towers_of_their_own_are_fine_tuned_and_one_frozen(data, tmp_path):
    processor = tiny.processor()
    net = tiny.model()
    for tower, name, part in (
        (net.vision_model, "vit", processor.image_processor),
        (net.text_model, "bert", processor.tokenizer),
    ):
        tower.save_pretrained(tmp_path / name)
        part.save_pretrained(tmp_path / name)
    paths = {"vision_model_name_or_path": tmp_path / "vit", "text_model_name_or_path": tmp_path / "bert"}
    paths |= dict.fromkeys(SIZES)
    results = train(tmp_path / "run", data, do_eval=True, num_train_epochs=2, freeze_vision=True, **paths)
    assert evaluate(tmp_path / "again", data, model_name_or_path=tmp_path / "run")["eval_rsum"] == results["eval_rsum"]
    trained = PicoModel.from_pretrained(tmp_path / "run")
    frozen = build_backbone(net.vision_model.config)
    frozen.load_state_dict(trained.vision_model.state_dict())
    tiny.assert_same_state(frozen, ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False))
    start = BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False).state_dict()
    assert not all(torch.equal(start[name], tensor) for name, tensor in trained.text_model.state_dict().items())


def test_push_uploads_model_processor_card_and_code(data, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
            uploads.append((repo_id, set(os.listdir(folder_path)), ignore_patterns))

    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: Hub())
    options = {"num_train_epochs": 1, "save_strategy": "no", "push_to_hub": True, "hub_model_id": "pico-shapes"}
    train(tmp_path / "run", data, **options)
    [(repository, files, _)] = uploads
    assert repository == "someone/pico-shapes"
    needed = {"model.safetensors", "config.json", "README.md", "processor_config.json", "tokenizer.json"}
    code = {f"{name}_pico.py" for name in ("configuration", "modeling", "processing", "prototypes", "uncertainty")}
    assert needed | code <= files


# Secrets and output


def test_nothing_that_is_written_holds_a_token(data, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: FakeHub())
    secrets = ["-sesame", "letmein", "opensaysme"]
    options = {"num_train_epochs": 1, "push_to_hub": True, "hub_strategy": "end"}
    options |= {"run_name": "https://a:letmein@b/c"}
    words = flags(**{**TOWERS, **TRAINING, **options, "do_train": True, "output_dir": tmp_path, "dataset_name": data})
    train_pico.main([*words, "--hub_token=-sesame", "--project", "https://b/c?access_token=opensaysme&a=b"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "run.json", "training_args.bin"} <= {path.name for path in files}
    for path in files:
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path
    assert "--hub_token=..." in (tmp_path / "README.md").read_text()


class FakeHub:
    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **kwargs):
        pass


def test_nobody_reading_the_output_costs_nothing(data, tmp_path):
    options = {**TOWERS, **TRAINING, "do_train": True, "do_eval": True, "dataset_name": data, "output_dir": tmp_path}
    command = shlex.join([sys.executable, str(ROOT / "train_pico.py"), *flags(**options)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    words = ["bash", "-o", "pipefail", "-c", f"({command}) 2>&1 | head -n 1"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"train_loss", "eval_rsum"} <= set(results)
    assert (tmp_path / "README.md").is_file()


def test_mistakes_are_one_line_until_the_first_batch(capsys):
    for error in (ValueError("say this"), FileNotFoundError("say this"), ImportError("say this")):
        with pytest.raises(SystemExit) as stop, OneLineErrors():
            raise error
        assert stop.value.code == 2 and capsys.readouterr().err == "train_pico.py: error: say this\n"
    with pytest.raises(RuntimeError), OneLineErrors():
        raise RuntimeError("not a mistake of the user")
    for event in ("on_step_begin", "on_prediction_step"):
        with pytest.raises(ValueError), OneLineErrors() as errors:
            getattr(errors, event)(None, None, None)
            raise ValueError("unexpected")


def test_metrics_of_all_parts_are_printed(finished, data, tmp_path, capsys):
    results = evaluate(tmp_path, data, model_name_or_path=finished.folder, do_predict=True)
    printed = capsys.readouterr().out
    assert "***** eval metrics *****" in printed and "***** test metrics *****" in printed
    assert re.search(rf"test_rsum += +{round(results['test_rsum'], 4)}\n", printed)


def test_log_of_an_evaluation_is_its_main_numbers():
    logs = {"eval_loss": 2.0, "eval_rsum": 1234.5, "eval_chance_rsum": 8.0, "eval_runtime": 3.0, "epoch": 2.0}
    assert main_metrics(logs) == {"eval_loss": 2.0, "eval_rsum": 1234.5, "epoch": 2.0}
    assert main_metrics({"loss": 0.5, "learning_rate": 1e-4}) == {"loss": 0.5, "learning_rate": 1e-4}


def test_processes_with_other_data_are_refused_before_the_model_is_built(data, tmp_path, monkeypatch):
    def split(rows):
        return {"train": CaptionedImageDataset(rows)}

    rows = datasets.load_from_disk(data)["train"]
    check_processes(split(rows))
    others = {
        "19 images instead of 20": rows.select(range(19)),
        "other captions": rows.map(lambda row: {"captions": [caption + "x" for caption in row["captions"]]}),
    }
    for words, other in others.items():
        there = {"train": (len(other), fingerprint(CaptionedImageDataset(other), images=False))}
        monkeypatch.setattr("modeling_pico.script.data.gather_object", lambda own, there=there: [*own, there])
        with pytest.raises(ValueError, match=f"the split 'train' of process 1 has {words}"):
            check_processes(split(rows))
    monkeypatch.setattr("train_pico.plan_model", lambda *args: SimpleNamespace(config=PicoConfig()))  # builds nothing
    with pytest.raises(ValueError, match="The processes read different data"):
        train(tmp_path, data)


# Uncertainty


def test_uncertainty_is_added_to_a_trained_model_and_re_ranks(finished, data, tmp_path):
    options = {
        "model_name_or_path": finished.folder,
        "uncertainty_config": '{"num_prototypes": 4}',
        "num_train_epochs": 1,
    }
    options |= dict.fromkeys(SIZES)
    flags = {"train_uncertainty_only": True, "uncertainty_reranking": True, "do_eval": True, "do_predict": True}
    results = train(tmp_path / "run", data, **options, **flags)
    assert results["test_rsum"] == finished.results["test_rsum"]
    assert {"eval_reranked_rsum", "test_reranked_rsum", "test_image_to_text_aurc"} <= set(results)
    assert "uncertainty_reranking_text_weight" in results
    config = PicoConfig.from_pretrained(tmp_path / "run")
    assert config.uncertainty_config["reranking"]["text_weight"] == results["uncertainty_reranking_text_weight"]
    assert "re-ranked by uncertainty" in (tmp_path / "run" / "README.md").read_text()
    # The weights come along with the checkpoint.
    again = evaluate(tmp_path / "again", data, model_name_or_path=tmp_path / "run", do_eval=False, do_predict=True)
    assert again["test_reranked_rsum"] == results["test_reranked_rsum"]


def test_re_ranking_without_uncertainty_is_refused(finished, data, tmp_path):
    with pytest.raises(ValueError, match="needs a model with uncertainty, such as --uncertainty_config"):
        evaluate(tmp_path, data, model_name_or_path=finished.folder, uncertainty_reranking=True)


# Style report


@pytest.fixture(scope="module")
def styled(tmp_path_factory) -> str:
    """Two styles to train on, a third one in `test`, a split without styles, and one with a single style."""
    folder = tmp_path_factory.mktemp("styled")
    names = {"train": "ink oil", "validation": "ink", "seen": "ink oil", "test": "neon", "again": "neon"}
    splits = {"plain": tiny.rows(7)}
    for seed, (split, styles) in enumerate(names.items()):
        rows = tiny.rows(8, seed=seed)
        splits[split] = rows.add_column("style", [styles.split()[row % len(styles.split())] for row in range(8)])
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


REPORT = {"do_predict": True, "style_report": True, "test_split": ["seen", "test"]}


@pytest.fixture(scope="module")
def reported(tmp_path_factory, styled) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs") / "reported"
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no", "id_column": "image_id"}
    return SimpleNamespace(folder=folder, results=train(folder, styled, **REPORT, **options))


def test_style_report_of_a_run(reported):
    results = json.loads((reported.folder / "all_results.json").read_text())
    assert results == pytest.approx(reported.results)
    assert {"style_ink_rsum", "style_neon_gap", "style_gap", "style_probe_weighted_accuracy"} <= set(results)
    report = json.loads((reported.folder / "style_report.json").read_text())
    assert {name: style["seen"] for name, style in report["styles"].items()} == {
        "ink": True,
        "oil": True,
        "neon": False,
    }
    # The split `test` holds this style and no other.
    assert report["styles"]["neon"]["retrieval"]["rsum"] == results["test_rsum"] == results["style_neon_rsum"]
    assert (reported.folder / "style_report.md").read_text().count("| neon |") == 2
    assert "By style" in (reported.folder / "README.md").read_text()


def test_style_report_of_a_checkpoint(reported, styled, tmp_path):
    options = {"do_eval": None, "model_name_or_path": reported.folder, **REPORT}
    seen = {"seen_styles": ["ink", "oil"]}
    results = evaluate(tmp_path / "a", styled, **options, **seen, id_column="image_id")
    for name in ("style_neon_gap", "style_ink_rsum"):
        assert results[name] == pytest.approx(reported.results[name])
    evaluate(tmp_path / "b", styled, **options, seen_styles="oil")
    styles = json.loads((tmp_path / "b" / "style_report.json").read_text())["styles"]
    assert [name for name, style in styles.items() if style["seen"]] == ["oil"]


def test_style_report_when_the_seen_styles_are_unknown(reported, styled, tmp_path, messages):
    options = {"do_eval": None, "model_name_or_path": reported.folder, **REPORT}
    results = evaluate(tmp_path, styled, **options)
    assert "style_neon_rsum" in results and not any("gap" in name for name in results)
    assert "Name the seen ones by --seen_styles" in messages[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_split": ["seen", "plain"]}, ["no column 'style'", "['image', 'captions', 'image_id']"]),
        ({"style_column": "look"}, ["no column 'look'", "'style'"]),
        ({"test_split": ["test", "again"]}, ["at least two", "all 16 images", "['neon']"]),
        ({"seen_styles": ["ink", "noen"]}, ["['noen']", "['ink', 'neon', 'oil']"]),
        ({"do_predict": None}, ["--style_report", "--do_predict"]),
        ({"style_report": None, "seen_styles": ["ink"]}, ["--seen_styles", "--style_report"]),
    ],
)
def test_bad_style_report_is_refused_before_training(styled, tmp_path, options, words):
    with pytest.raises(ValueError) as error:
        train(tmp_path, styled, **{**REPORT, **options})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("**/*.safetensors"))


# Gallery alignment


@pytest.fixture(scope="module")
def galleries(tmp_path_factory) -> str:
    """Sets of enough images: a test split in two styles, and one in which a style is rare."""
    folder = tmp_path_factory.mktemp("galleries")
    names = {"train": 50, "validation": 40, "test": 70, "rare": 40}
    splits = {name: tiny.rows(count, seed=seed) for seed, (name, count) in enumerate(names.items())}
    splits["test"] = splits["test"].add_column("style", ["ink", "oil"] * 35)
    splits["rare"] = splits["rare"].add_column("style", ["ink"] * 35 + ["oil"] * 5)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, galleries) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs") / "aligned"
    options = {"do_eval": True, "do_predict": True, "align_gallery": True, "max_steps": 2, "save_strategy": "no"}
    return SimpleNamespace(folder=folder, results=train(folder, galleries, id_column="image_id", **options))


def test_a_run_measures_its_training_images_and_reports_aligned_metrics(aligned, galleries, tmp_path):
    model = PicoModel.from_pretrained(aligned.folder)
    assert int(model.image_moments.count) == 50
    assert {"eval_aligned_rsum", "test_aligned_rsum", "test_aligned_image_to_text_recall_at_1"} <= set(aligned.results)
    # What is saved moves galleries as the run did; the default reports plain metrics alone.
    options = {"do_predict": True, "model_name_or_path": aligned.folder, "id_column": "image_id"}
    again = evaluate(tmp_path / "a", galleries, align_gallery=True, **options)
    plain = evaluate(tmp_path / "b", galleries, **options)
    rsums = {name: value for name, value in aligned.results.items() if name.endswith("rsum")}
    assert {name: again[name] for name in rsums} == pytest.approx(rsums)
    assert {name: value for name, value in rsums.items() if "aligned" not in name} == pytest.approx(
        {name: value for name, value in plain.items() if name.endswith("rsum")}
    )


def test_a_stress_test_moves_every_look_where_the_model_knows_its_images_of_training(aligned, galleries, tmp_path):
    options = {"model_name_or_path": aligned.folder, "id_column": "image_id", "style_stress": ["negative"]}
    results = evaluate(tmp_path, galleries, do_predict=True, **options)
    assert results["test_plain_aligned_rsum"] == pytest.approx(aligned.results["test_aligned_rsum"])
    # The same by hand.
    model, processor = PicoModel.from_pretrained(aligned.folder).eval(), PicoProcessor.from_pretrained(aligned.folder)
    data = CaptionedImageDataset(datasets.load_from_disk(galleries)["test"]).in_look("negative")
    batches = [PicoDataCollator(processor)([data[row] for row in range(70)])]
    encoded = RetrievalEvaluator().encode(model, batches)
    moved = align_encoded(model, encoded, batches, data.styles)
    wanted = RetrievalEvaluator().retrieval_metrics(model, moved)["rsum"]
    assert results["test_negative_aligned_rsum"] == pytest.approx(wanted)
    assert results["test_negative_aligned_rsum"] != pytest.approx(results["test_negative_rsum"])


def test_a_model_made_of_backbones_is_measured_on_the_training_split(tiny_clip, galleries, tmp_path):
    options = {"model_name_or_path": tiny_clip.folder, "method": "clip_style", "id_column": "image_id"}
    results = evaluate(tmp_path, galleries, align_gallery=True, **options)
    assert results["eval_aligned_rsum"] > 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"]["train"]["images"] == 50


def test_galleries_that_cannot_be_moved_are_refused_before_anything_slow(aligned, galleries, data, tmp_path):
    options = {"align_gallery": True, "id_column": "image_id"}
    with pytest.raises(ValueError, match=r"split 'rare' has 5 image\(s\) of the style 'oil'"):
        train(tmp_path / "a", galleries, do_predict=True, test_split="rare", **options)
    with pytest.raises(ValueError, match=r"split 'validation' has 9 image\(s\)"):
        train(tmp_path / "b", data, do_eval=True, **options)
    with pytest.raises(ValueError, match=r"split 'train' has 20 image\(s\)"):
        train(tmp_path / "c", data, eval_strategy="no", feedback="constant", **options)
    model = PicoModel.from_pretrained(aligned.folder)
    model.image_moments.reset()
    model.save_pretrained(tmp_path / "model")
    PicoProcessor.from_pretrained(aligned.folder).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no moments of training"):
        evaluate(tmp_path / "d", galleries, model_name_or_path=tmp_path / "model", **options)


# Style stress test


@pytest.fixture(scope="module")
def stressed(tmp_path_factory) -> str:
    """Data with captions in two more styles; `romantic` has gaps, lists and single captions, and none in `bare`."""
    folder = tmp_path_factory.mktemp("stressed")
    rows = tiny.rows(8, seed=4)
    rows = rows.add_column("humorous", [f"{row} tries to be left" for row in range(8)])
    told = [
        None,
        ["red and far", "blue and near"],
        ["green heart"],
        [],
        *[[f"{row} in the middle"] for row in range(4)],
    ]
    feature = datasets.List(datasets.Value("string"))
    splits = {"test": rows.add_column("romantic", told, feature=feature)}
    splits["bare"] = tiny.rows(7, seed=5).add_column("romantic", [None] * 7, feature=feature)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def test_style_stress_of_a_clip_before_any_training(tiny_clip, stressed, tmp_path, messages):
    options = {"model_name_or_path": tiny_clip.folder, "method": "clip_style", "do_eval": None, "do_predict": True}
    asked = {"style_stress": ["gray", "negative"], "caption_style_columns": ["romantic", "humorous"], "plots": True}
    results = evaluate(tmp_path, stressed, **options, **asked)
    assert results == pytest.approx(json.loads((tmp_path / "all_results.json").read_text()))
    assert results["test_plain_rsum"] == pytest.approx(results["test_rsum"], abs=1e-4)
    for look in ("gray", "negative"):
        drop = results["test_plain_rsum"] - results[f"test_{look}_rsum"]
        assert results[f"test_{look}_drop"] == pytest.approx(drop)
    report = json.loads((tmp_path / "style_stress.json").read_text())["test"]
    assert list(report["looks"]) == ["gray", "negative"]
    romantic, humorous = report["captions"]["romantic"], report["captions"]["humorous"]
    # Images 0 and 3 are left out; image 1 has two captions of each kind.
    assert (romantic["images"], romantic["texts"], humorous["images"], humorous["texts"]) == (6, 7, 8, 8)
    assert romantic["drop"] == results["test_captions_romantic_drop"]
    table = (tmp_path / "style_stress.md").read_text()
    assert (
        table.startswith("# Style stress test\n\n## test\n\n") and "| negative |" in table and "| humorous |" in table
    )
    assert (tmp_path / "plots" / "style_stress.png").is_file()
    # The model is CLIP: its own cosines, of the images as they are drawn.
    encoded = style_stress_by_hand(tiny_clip, stressed, "negative")
    assert results["test_negative_rsum"] == pytest.approx(encoded, abs=1e-4)


def style_stress_by_hand(tiny_clip, data: str, look: str) -> float:
    rows = datasets.load_from_disk(data)["test"]
    processor = PicoProcessor.from_backbones(tiny_clip.folder)
    pictures = [render(decode_image(image), look) for image in rows["image"]]
    texts = [text for texts in rows["captions"] for text in texts]
    ids = [row for row, texts in enumerate(rows["captions"]) for _ in texts]
    inputs = processor(images=pictures, text=texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        scores = tiny_clip.model(**inputs).logits_per_image
    return retrieval_metrics(*retrieval_ranks(scores, torch.arange(8), torch.tensor(ids)))["rsum"]


def test_style_stress_after_a_training_and_of_all_looks(stressed, data, tmp_path):
    splits = {**datasets.load_from_disk(data), "test": datasets.load_from_disk(stressed)["test"]}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    options = {"max_steps": 2, "save_strategy": "no", "do_predict": True}
    results = train(tmp_path / "run", tmp_path / "data", style_stress="all", **options)
    assert {f"test_{look}_drop" for look in LOOKS} <= set(results)
    assert not (tmp_path / "run" / "plots").exists()
    # Of the saved model the same.
    again = evaluate(
        tmp_path / "again",
        str(tmp_path / "data"),
        model_name_or_path=tmp_path / "run",
        do_eval=None,
        do_predict=True,
        style_stress=["sketch"],
    )
    assert again["test_sketch_rsum"] == pytest.approx(results["test_sketch_rsum"])
    assert "test_gray_rsum" not in again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style_stress": "grey"}, ["grey", "gray", "sketch", "all"]),
        ({"style_stress": "gray", "do_predict": None, "do_eval": True}, ["--style_stress", "--do_predict"]),
        (
            {"caption_style_columns": "romantic", "do_predict": None, "do_eval": True},
            ["--caption_style_columns", "--do_predict"],
        ),
        ({"caption_style_columns": "romantik"}, ["no column 'romantik'", "'romantic'"]),
        ({"caption_style_columns": "romantic", "test_split": "bare"}, ["None of the 7 images", "'romantic'"]),
        ({"style_stress": "gray", "test_split": "style_stress"}, ["--test_split style_stress", "results of its own"]),
    ],
)
def test_bad_style_stress_is_refused_before_anything_is_encoded(
    stressed, tiny_clip, tmp_path, options, words, monkeypatch
):
    monkeypatch.setattr(PicoModel, "forward", lambda *args, **kwargs: pytest.fail("encoded"))
    defaults = {"model_name_or_path": tiny_clip.folder, "do_eval": None, "do_predict": True}
    with pytest.raises(ValueError) as error:
        evaluate(tmp_path, stressed, **{**defaults, **options})
    assert all(word in str(error.value) for word in words), str(error.value)


# Options


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_file_and_flags_that_override_it(tmp_path, suffix):
    options = {"output_dir": "out", "learning_rate": 0.003, "num_train_epochs": 7, "method": "clip_style"}
    options |= {"test_split": ["a", "b"], "random_flip": True, "prototype_start": 3}
    text = json.dumps(options) if suffix == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in options.items())
    file = write(tmp_path / f"run.{suffix}", text)
    model_args, data_args, training_args = train_pico.parse_arguments([file, "--num_train_epochs", "2"])
    assert (training_args.num_train_epochs, training_args.learning_rate) == (2, 0.003)
    assert (training_args.prototype_start, training_args.output_dir) == (3, "out")
    assert (data_args.test_split, data_args.random_flip, model_args.method) == (["a", "b"], True, "clip_style")
    assert model_args.config_options(PicoModel) == {"method": "clip_style"}


def test_values_of_a_file_that_are_no_strings_of_the_command_line(tmp_path):
    text = "resume_from_checkpoint: true\ntest_split: neon\nplots: true\nlearning_rate: 1e-3\n"
    file = write(tmp_path / "run.yaml", text)
    _, data_args, training_args = train_pico.parse_arguments([file, "--output_dir", str(tmp_path)])
    assert (training_args.resume_from_checkpoint, data_args.test_split) == ("true", ["neon"])
    assert data_args.plots is True
    assert training_args.learning_rate == 1e-3
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*holds no complete checkpoint"):
        train_pico.find_checkpoint(training_args)


def test_the_quickstart_recipe_is_valid(tmp_path):
    model_args, data_args, training_args = train_pico.parse_arguments([str(ROOT / "examples" / "quickstart.yaml")])
    assert (data_args.dataset_name, training_args.do_train) == ("styled_shapes", True)
    PicoConfig(**model_args.config_options(PicoModel))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", ["run.yaml", "no option --learning_rat", "Did you mean learning_rate"]),
        ("zzz: 1", ["no option --zzz."]),
        ("- a\n- b", ["run.yaml", "expected options"]),
    ],
)
def test_wrong_file_is_refused(tmp_path, text, words):
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError) as error:
        train_pico.parse_arguments([file])
    assert all(word in str(error.value) for word in words)
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        train_pico.parse_arguments(["nowhere.yaml"])


def test_none_on_the_command_line_is_what_null_is_in_a_file(tmp_path):
    wanted = {"feedback_images": None, "backbone_learning_rate": None, "max_eval_samples": None}
    path = write(tmp_path / "run.yaml", "".join(f"{name}: null\n" for name in wanted))
    given = [str(part) for name in wanted for part in (f"--{name}", "none")]
    for argv in ([path], given, [path, *given]):
        _, data_args, training_args = train_pico.parse_arguments([str(arg) for arg in argv])
        assert {name: getattr(training_args, name, getattr(data_args, name, 0)) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "pica"}, ["pica", "pico", "fine_grained", "clip_style"]),
        ({"on_bad_image": "ignore"}, ["ignore", "error", "skip"]),
        ({"on_empty_captions": "ignore"}, ["ignore", "error", "skip"]),
        ({"plots": "maybe"}, ["maybe", "true", "false"]),
        ({"feedback": "best"}, ["best", "counterfactual", "constant"]),
        ({"caption_sampling": "one"}, ["one", "random", "all"]),
        ({"num_train_epochs": "many"}, ["num_train_epochs", "many"]),
        ({"num_train_epochs": "none"}, ["num_train_epochs", "invalid float", "none"]),
        ({"feedback_images": "some"}, ["feedback_images", "invalid int", "some"]),
        ({"no_such_flag": 1}, ["no_such_flag"]),
    ],
)
def test_bad_flag_names_what_is_allowed(tmp_path, capsys, options, words):
    with pytest.raises((SystemExit, ValueError)) as error:
        train_pico.parse_arguments(flags(output_dir=tmp_path, **options))
    said = capsys.readouterr().err + str(error.value)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"column_mode": "histogram"}, ["column_mode", "'histogram'", "'moments'", "'quantile'"]),
        ({"loss_type": "triplet"}, ["loss_type", "'triplet'", "'infonce'", "'hinge'"]),
        ({"pooling": "max"}, ["pooling", "'max'", "'mean'", "'class_token'"]),
        ({"margin": -1}, ["margin", "from 0"]),
        ({"patch_size": 7}, ["image_size", "patch_size", "16", "7"]),
        ({"min_crop_scale": -1}, ["min_scale", "-1"]),
        ({"max_text_length": 0}, ["max_text_length", "at least 1", "0"]),
        ({"style_augmentation": 1.5}, ["style_augmentation", "at least 0 and at most 1", "1.5"]),
        ({"style_augmentation": -0.5}, ["style_augmentation", "at least 0 and at most 1", "-0.5"]),
        ({"style_augmentation": "nan"}, ["style_augmentation", "at least 0 and at most 1", "nan"]),
        ({"per_device_train_batch_size": 50}, ["50", "20"]),
        ({"train_split": "trian"}, ["trian", "train", "validation"]),
        ({"eval_split": "held_out"}, ["held_out", "test", "validation"]),
        ({"caption_column": "texts"}, ["texts", "caption_column", "captions", "image_id"]),
        ({"id_column": "imgid"}, ["imgid", "id_column", "image_id"]),
        ({"model_name_or_path": "a", "text_model_name_or_path": "b"}, ["either", "not both"]),
        ({"resume_from_checkpoint": "nowhere"}, ["resume_from_checkpoint", "nowhere", "not a complete checkpoint"]),
        ({"resume_from_checkpoint": "true"}, ["resume_from_checkpoint", "holds no complete checkpoint", "auto"]),
    ],
)
def test_bad_value_stops_before_training(data, tmp_path, options, words):
    # The latter is what `strict` configurations make of a ValueError.
    with pytest.raises((ValueError, StrictDataclassClassValidationError)) as error:
        train(tmp_path, data, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_no_row_is_training_and_test_data(finished, data, tmp_path):
    rows = datasets.load_from_disk(data)["train"]
    path = str(tmp_path / "rows.parquet")
    rows.to_parquet(path)
    for options in ({"do_eval": True}, {"do_eval": None, "do_predict": True}):
        with pytest.raises(ValueError, match=r"rows.parquet' has no split '(validation|test)'; it has \['train'\]"):
            train(tmp_path / "run", path, **options)
    folder = tmp_path / "twice"
    datasets.DatasetDict({**datasets.load_from_disk(data), "test": rows}).save_to_disk(folder)
    # Not the same number of rows: every one of them is nevertheless one of training.
    options = {"do_predict": True, "max_eval_samples": 5}
    with pytest.raises(ValueError, match="The splits 'train' and 'test' hold the same data"):
        train(tmp_path / "run", folder, **options)
    with pytest.raises(ValueError, match="--train_split and --eval_split are both 'train'"):
        train(tmp_path / "run", folder, eval_split="train")
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    # Looking at the rows of training on purpose is something else.
    options = {"model_name_or_path": finished.folder, "do_eval": None, "do_predict": True, "test_split": "train"}
    assert "train_rsum" in evaluate(tmp_path / "seen", path, **options)


def test_a_column_of_a_file_says_which_rows_are_a_split(finished, data, tmp_path):
    parts, words = datasets.load_from_disk(data), {"train": "train", "validation": "val", "test": "test"}
    named = [parts[name].add_column("split", [word] * len(parts[name])) for name, word in words.items()]
    datasets.concatenate_datasets(named).to_parquet(str(tmp_path / "rows.parquet"))
    options = {"model_name_or_path": finished.folder, "do_predict": True}
    evaluate(tmp_path / "out", str(tmp_path / "rows.parquet"), **options)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {name: split["images"] for name, split in record["data"].items()} == {"validation": 9, "test": 7}


def test_splits_do_not_take_the_names_of_the_run_s_own_results(data, tmp_path):
    """Evaluating a split named `train` replaced `train_loss`."""
    for split in ("train", "all"):
        asked = {"do_train": True, "do_predict": True, "test_split": ["test", split]}
        with pytest.raises(ValueError, match=f"--test_split {split}: this run writes results of its own under that"):
            train_pico.main(flags(output_dir=tmp_path, dataset_name=data, use_cpu=True, **asked))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".json"]


def test_nothing_to_do_and_nothing_to_evaluate(data, tmp_path):
    with pytest.raises(ValueError, match="Nothing to do: give --do_train, --do_eval or --do_predict"):
        train_pico.main(flags(output_dir=tmp_path, dataset_name=data, use_cpu=True))
    with pytest.raises(ValueError, match="Give --model_name_or_path to evaluate a trained model"):
        evaluate(tmp_path, data)


def test_folder_with_a_run_is_refused_and_left_untouched(finished, data):
    def state():
        return {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}

    before = state()
    with pytest.raises(ValueError, match="already holds a run.*nothing was changed"):
        train(finished.folder, data)
    assert state() == before


def test_a_finished_run_without_checkpoints_is_refused(data, tmp_path):
    write(tmp_path / "all_results.json", "{}")
    with pytest.raises(ValueError, match="already holds a run"):
        train(tmp_path, data)


# Data


def spoil(data: str, folder: Path, column: str, rows: dict[int, object]) -> str:
    """A copy of the data whose training rows differ at one column."""
    splits = datasets.load_from_disk(data)
    values = splits["train"][column][:]
    for row, value in rows.items():
        values[row] = value
    feature = splits["train"].features[column]
    order = splits["train"].column_names
    changed = splits["train"].remove_columns(column).add_column(column, values, feature=feature)
    datasets.DatasetDict({**splits, "train": changed.select_columns(order)}).save_to_disk(folder)
    return str(folder)


def test_bad_images(data, tmp_path, messages):
    bad = {3: {"bytes": b"no image", "path": None}, 5: {"bytes": b"", "path": "gone.png"}}
    spoilt = spoil(data, tmp_path / "data", "image", bad)
    with pytest.raises(ValueError, match="(?s)2 of 20 images cannot be read.*row 3.*row 5.*gone.png.*'skip'"):
        train(tmp_path / "a", spoilt)
    results = train(tmp_path / "b", spoilt, on_bad_image="skip", num_train_epochs=1, max_steps=1)
    assert "train_loss" in results
    assert any("2 of 20 images" in message and "gone.png" in message for message in messages)


def test_empty_captions(data, tmp_path, messages):
    spoilt = spoil(data, tmp_path / "data", "captions", {0: ["", " "], 2: ["", "fine"]})
    with pytest.raises(ValueError, match="1 of 20 images have no caption, .*rows .0.*on_empty_captions='skip'"):
        train(tmp_path / "a", spoilt)
    train(tmp_path / "b", spoilt, on_empty_captions="skip", max_steps=1)
    assert any("3 of 39 captions are empty" in message for message in messages)


def test_long_captions_are_reported_and_cut(data, tmp_path, messages):
    results = train(tmp_path, data, max_text_length=5, max_steps=1, do_predict=True)
    assert "test_rsum" in results
    cut = [message for message in messages if "longer than 5 tokens" in message]
    assert [message.split(":")[0] for message in cut] == ["train", "validation", "test"]


RECIPES = [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "examples" / "emoji_styles").glob("*.yaml")]


@pytest.mark.parametrize("recipe", sorted(RECIPES), ids=lambda path: path.stem)
def test_recipes_are_understood(recipe):
    model_args, data_args, training_args = train_pico.parse_arguments([str(recipe), "--use_cpu", "true"])
    assert training_args.do_train
