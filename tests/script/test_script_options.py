"""Options of the command line and of files: one declaration, one check, one line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, TrainingArguments

from modeling_pico import PICO_LITERAL, CddsConfig, PicoModel
from modeling_pico.script.arguments import DataArguments, ModelArguments, option_parser, parse_arguments
from modeling_pico.script.model import plan_model
from modeling_pico.training import PicoTrainingArguments


ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Files


FLAGS_AND_VALUES = [
    ("method", "clip", "invalid choice: 'clip'"),
    ("method", "pcio", "invalid choice: 'pcio'"),
    ("pooling", "max", "invalid choice: 'max'"),
    ("on_bad_image", "ignore", "invalid choice: 'ignore'"),
    ("feedback", "best", "invalid choice: 'best'"),
    ("caption_sampling", "[random, all]", "There is no option all"),
    ("eval_strategy", "{steps: 3}", "invalid choice: "),
    ("lr_scheduler_type", "linaer", "invalid choice: 'linaer'"),
    ("num_train_epochs", "many", "invalid float value: 'many'"),
    ("seed", "1.5", "invalid int value: '1.5'"),
    ("seed", "true", "invalid int value: 'true'"),
    ("num_train_epochs", "null", "invalid float value: 'none'"),
    ("do_train", "perhaps", "Truthy value expected"),
    ("test_split", "[]", "expected at least one argument"),
]


@pytest.mark.parametrize(("name", "value", "said"), FLAGS_AND_VALUES)
def test_value_of_a_file_is_checked_as_that_of_a_flag(tmp_path, name, value, said):
    file = write(tmp_path / "run.yaml", f"{name}: {value}\n")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_arguments([file])
    assert "\n" not in str(error.value)
    if not value.startswith(("[", "{", "null")):
        with pytest.raises(ValueError, match=re.escape(said)):
            parse_arguments([f"--{name}", value])


def test_value_of_a_file_means_what_it_means_as_a_flag(tmp_path):
    values = {"eval_strategy": "no", "learning_rate": "1e-3", "do_train": "yes", "dataset_name": "0012"}
    values |= {"weight_decay": "5E-2", "seed": "7", "cache_dir": "2024-01-01", "margin": "2", "output_dir": "-out"}
    file = write(tmp_path / "run.yaml", "".join(f"{name}: {value}\n" for name, value in values.items()))
    of_file, of_flags = (
        parse_arguments([file]),
        parse_arguments([f"--{name}={value}" for name, value in values.items()]),
    )
    assert of_file[:2] == of_flags[:2]
    for name in values.keys() & {item.name for item in fields(PicoTrainingArguments)}:
        assert getattr(of_file[2], name) == getattr(of_flags[2], name)
    assert (of_file[0].margin, of_file[1].dataset_name, of_file[1].cache_dir) == (2.0, "0012", "2024-01-01")
    assert (of_file[2].learning_rate, of_file[2].weight_decay, of_file[2].eval_strategy) == (1e-3, 5e-2, "no")


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_nested_mappings_keep_their_types(tmp_path, suffix):
    wanted = {"num_cycles": 2, "min_lr": 1e-5, "name": "a", "on": True, "deep": {"ratio": 0.5}}
    text = "lr_scheduler_kwargs: {num_cycles: 2, min_lr: 1e-5, name: a, 'on': true, deep: {ratio: .5}}"
    file = write(tmp_path / f"run.{suffix}", json.dumps({"lr_scheduler_kwargs": wanted}) if suffix == "json" else text)
    assert parse_arguments([file])[2].lr_scheduler_kwargs == wanted
    flag = ["--lr_scheduler_kwargs", json.dumps(wanted)]
    assert parse_arguments(flag)[2].lr_scheduler_kwargs == wanted
    with pytest.raises(ValueError, match="Expecting property name"):
        parse_arguments(["--lr_scheduler_kwargs", "{num_cycles: 2}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nlearning_rate: 2\nseed: 3", "options are stated twice: seed"),
        ("seed: [1", r"run.yaml: .*line"),
        ("seed: !!python/name:os.system x", r"run.yaml"),
        ("seed: *none", r"undefined alias"),
        (
            "a: &a [x]\nb: &b [*a, *a]\nlr_scheduler_kwargs: {c: *b}",
            "an alias stands for the list or mapping of line 1",
        ),
        ("seed: &a [*a]", "an alias stands for the list"),
        ("lr_scheduler_kwargs: &a {x: 1}\nfsdp_config: {<<: *a}", "an alias stands for the list or mapping of line 1"),
        ("seed: " + 5000 * "[", "recursion"),
        ("just words", "expected options as `name: value`"),
    ],
)
def test_file_that_is_no_list_of_options_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_arguments([write(tmp_path / "run.yaml", text)])
    assert "run.yaml" in str(error.value) and len(str(error.value)) < 300


def test_alias_of_one_value_is_that_value(tmp_path):
    file = write(tmp_path / "run.yaml", "learning_rate: &rate 1e-3\nbackbone_learning_rate: *rate\n")
    training_args = parse_arguments([file])[2]
    assert training_args.learning_rate == training_args.backbone_learning_rate == 1e-3
    assert parse_arguments([write(tmp_path / "none.yaml", "# nothing\n")])[:2] == parse_arguments([])[:2]


# Flags


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rte", "3"], "There is no option --learning_rte. Did you mean learning_rate"),
        (["--learning_rat=3"], "There is no option --learning_rat. Did you mean learning_rate"),
        (["--hub-tokn", "x"], "Did you mean hub_token"),
        (["--zzz"], "There is no option --zzz. See --help"),
        (["--seed", "1", "run.yaml"], "There is no option run.yaml. A file with options comes first."),
    ],
)
def test_unknown_flag_gets_a_suggestion(argv, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_arguments(argv)


@pytest.mark.parametrize("argv", [["--hub_tok", "sesame"], ["--hub_tok=sesame"], ["--hub_token", "-sesame"]])
def test_no_abbreviation_is_accepted_and_no_value_is_repeated(argv):
    with pytest.raises(ValueError, match="--hub_tok") as error:
        parse_arguments(argv)
    assert "sesame" not in str(error.value)
    assert parse_arguments(["--hub_token=-sesame"])[2].hub_token == "-sesame"


# Declarations


def test_options_of_the_model_are_the_fields_of_its_configuration():
    own = {item.name for item in fields(CddsConfig)} - {item.name for item in fields(PreTrainedConfig)}
    learned = {"vision_config", "text_config", "projection_bias"}
    assert own - {item.name for item in fields(ModelArguments)} == learned
    assert ModelArguments().config_options(PicoModel) == {}


def test_the_literal_method_is_its_options():
    given = ModelArguments(method="pico_literal", column_length=8).config_options(PicoModel)
    assert given == {**PICO_LITERAL, "column_length": 8}
    assert plan_model(ModelArguments(method="pico_literal"), None, training=True).config.style_probability == "purity"
    with pytest.raises(ValueError, match="'column_mode': 'moments'} was given.*--method pico"):
        ModelArguments(method="pico_literal", column_mode="moments").config_options(PicoModel)


def test_help_is_short_and_says_something(capsys):
    short, long = option_parser().format_help(), option_parser(show_all=True).format_help()
    assert short.count("\n") < 300 and "YAML" in short
    titles = ["model", "data", "training"]
    assert [title for title in titles if f"\n{title}:\n" in short] == titles
    assert "None" not in short and "*(" not in short
    own = {item.name for kind in (ModelArguments, DataArguments, PicoTrainingArguments) for item in fields(kind)}
    own -= {item.name for item in fields(TrainingArguments)}
    listed = set(re.findall(r"^  --(\w+)", short, flags=re.MULTILINE))
    assert own <= listed
    folded = {item.name for item in fields(TrainingArguments) if item.init} - listed
    assert {"adam_beta1", "fsdp_config"} <= folded
    assert folded <= set(re.findall(r"^  --(\w+)", long, flags=re.MULTILINE))
    for argv, text in ((["--help"], short), (["--help-all"], long)):
        with pytest.raises(SystemExit):
            parse_arguments(argv)
        assert capsys.readouterr().out == text


def test_curves_of_short_runs_have_points():
    assert parse_arguments([])[2].logging_steps == 0.02
    # Evaluations are not as cheap as a log.
    assert parse_arguments(["--eval_strategy", "steps"])[2].eval_steps == 500
    assert parse_arguments(["--eval_strategy", "steps", "--logging_steps", "70"])[2].eval_steps == 70


# What the model will be, before any data is read


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_name_or_path": "nowhere/at/all"}, "--model_name_or_path: 'nowhere/at/all' is no checkpoint"),
        ({"vision_model_name_or_path": "nowhere/at/all"}, "--vision_model_name_or_path: 'nowhere/at/all' is no"),
        ({"text_model_name_or_path": "no-such-model"}, "--text_model_name_or_path: 'no-such-model' is no checkpoint"),
        ({"model_revision": "v2"}, "--model_revision is that of a checkpoint, but none is named"),
        ({"attn_implementation": "nonsense"}, "--attn_implementation must be one of eager, .*but got 'nonsense'"),
        ({"margin": -1.0}, "`margin` must be from 0"),
        ({"text_hidden_size": 30}, "`text_hidden_size` must be a multiple of its attention heads, but got 30 and 4"),
        ({"image_size": 50}, "`image_size` must be a multiple of `patch_size`"),
    ],
)
def test_model_that_cannot_be_is_refused(options, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=said) as error:
        plan_model(ModelArguments(**options), None, training=True)
    assert "\n" not in str(error.value)


def test_options_of_towers_from_scratch_are_refused_where_there_are_none(tiny_clip):
    with pytest.raises(ValueError, match="--image_size: only for a tower from scratch"):
        plan_model(ModelArguments(model_name_or_path=tiny_clip.folder, image_size=16), None, training=True)


def test_embedding_size_of_a_joint_model_is_not_guessed(tiny_clip):
    args = ModelArguments(model_name_or_path=tiny_clip.folder, method="cdds", unet_num_heads=5)  # divides its 10
    assert plan_model(args, None, training=True).options["unet_num_heads"] == 5
    args.embedding_dim = 8
    with pytest.raises(ValueError, match="`unet_num_heads` must divide `embedding_dim`"):
        plan_model(args, None, training=True)


def test_attention_of_towers_from_scratch_is_the_one_asked_for():
    for name in ("eager", "sdpa"):
        plan = plan_model(ModelArguments(attn_implementation=name, embedding_dim=8), None, training=True)
        model, _ = plan.build(["a red circle"], DataArguments())
        assert model.vision_model.config._attn_implementation == name
        assert model.text_model.config._attn_implementation == name


def test_other_models_are_sent_to_from_backbones(tiny_clip):
    with pytest.raises(ValueError, match=r"is a model of type 'clip'.*PicoModel\.from_backbones") as error:
        PicoModel.from_pretrained(tiny_clip.folder)
    assert "prototype" not in str(error.value)


# On the terminal


def test_mistake_is_one_line_with_exit_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "train_pico.py"), "--do_train", "--model_name_or_path", "no/such/model"]
    command += ["--dataset_name", "https://user:sesame@host/data", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("train_pico.py: error: --model_name_or_path: 'no/such/model' is no checkpoint")
