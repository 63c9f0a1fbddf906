"""Untrusted checkpoints: none of their code runs, and what is wrong with them is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from modeling_pico import CddsConfig, PicoConfig, PicoModel, PicoProcessor
from modeling_pico.data import load_captioned_images
from modeling_pico.model.backbones_pico import load_backbone
from modeling_pico.model.untrusted_pico import check_prototypes, check_tensors
from modeling_pico.training import PicoTrainer, PicoTrainingArguments


STATE = "alignment_head.style_prototypes."


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Marks:
    """Pickles to something that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# Code


def test_no_code_of_a_checkpoint_runs(folder, tmp_path):
    marker = tmp_path / "marker"
    evil = f"open({str(marker)!r}, 'w').close()\n"
    for file in folder.glob("*.py"):
        file.write_text(evil)
    (folder / "evil.py").write_text(evil + "class Evil:\n    pass\n")
    names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
    code = dict.fromkeys(names, "evil.Evil")
    for file in folder.glob("*config.json"):
        edit_json(file, lambda contents: contents.update(auto_map=code))
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(auto_map=code))
    for load in (
        PicoConfig.from_pretrained,
        PicoModel.from_pretrained,
        PicoProcessor.from_pretrained,
        AutoModel.from_pretrained,
        AutoProcessor.from_pretrained,
    ):
        load(folder)
    assert not marker.exists()


def test_a_backbone_of_unknown_code_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question to nobody"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    edit_json(
        folder / "config.json",
        lambda config: config.update(model_type="evil", auto_map={"AutoConfig": "evil.E", "AutoModel": "evil.E"}),
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_backbone(str(folder), "image")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("load", [PicoModel.from_pretrained, AutoModel.from_pretrained, PicoModel.from_backbones])
def test_pickles_are_not_read(load, folder, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if load != PicoModel.from_backbones:
        load(folder)  # safetensors come first
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "marker")))
    if load == PicoModel.from_backbones:
        clip = {"model_type": "clip", "architectures": ["CLIPModel"]}
        (folder / "config.json").write_text(json.dumps(clip))
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load(str(folder))
    if load != PicoModel.from_backbones:
        with pytest.raises(OSError, match="no file named model.safetensors"):
            load(str(folder), use_safetensors=None)  # the default of transformers
    assert not (tmp_path / "marker").exists()


def test_pickles_of_the_hub_are_refused_with_the_way_out(folder, tmp_path, monkeypatch):
    """As they lie in the cache, without a network that could bring safetensors."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--user--clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    torch.save({}, snapshot / "pytorch_model.bin")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(OSError, match="user/clip"):
        PicoModel.from_backbones("user/clip", backbone_kwargs={"cache_dir": str(tmp_path)})
    (snapshot / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(OSError, match="user/clip"):
        PicoModel.from_pretrained("user/clip", cache_dir=str(tmp_path))


def test_a_checkpoint_in_a_subfolder(folder, tmp_path, tiny_model):
    torch.save({}, tmp_path / "optimizer.pt")
    shutil.copytree(folder, tmp_path / "model")
    assert PicoModel.from_pretrained(tmp_path, subfolder="model").style_prototypes is not None
    tiny_model().vision_model.save_pretrained(tmp_path / "tower")
    load_backbone(str(tmp_path), "image", subfolder="tower")


def test_pickles_are_read_where_that_is_asked_for(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = PicoModel.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(model.style_prototypes["image"].prototypes, tensors[STATE + "image.prototypes"])


def test_kernels_of_the_hub_are_not_fetched(folder):
    for part in (None, "vision_config", "text_config"):

        def change(config, part=part):
            (config[part] if part else config)["_attn_implementation"] = "someone/kernel"

        edit_json(folder / "config.json", change)
        with pytest.raises(ValueError, match="names code of the Hub as its `_attn_implementation`: 'someone/kernel'"):
            PicoModel.from_pretrained(folder)
        with pytest.raises(ValueError, match="names code of the Hub"):
            load_backbone(str(folder), "image")
        edit_json(folder / "config.json", lambda c, p=part: (c[p] if p else c).pop("_attn_implementation"))
    PicoModel.from_pretrained(folder)
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights="adapter_model.bin"))
    with pytest.raises(ValueError, match="names 'adapter_model.bin' as its weights; only safetensors are read"):
        PicoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_training_resumes_without_running_code(name, folder, tmp_path, tiny_model):
    """These files are pickles; torch reads numbers out of them and nothing else."""
    arguments = PicoTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    trainer = PicoTrainer(model=tiny_model(), args=arguments, data_collator=list)
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    trainer._load_optimizer_and_scheduler(str(folder))
    torch.save(Marks(tmp_path / "marker"), folder / name)
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "marker").exists()  # it does run where it is not prevented
    (tmp_path / "marker").unlink()
    with pytest.raises(pickle.UnpicklingError, match="system"):
        trainer._load_optimizer_and_scheduler(str(folder))
        trainer._load_rng_state(str(folder))
    assert not (tmp_path / "marker").exists()


def test_a_data_set_with_a_script_runs_nothing(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    with pytest.raises((ValueError, OSError), match="data"):
        load_captioned_images(str(data), split="train")
    assert not (tmp_path / "marker").exists()


# Configurations


@pytest.mark.parametrize(
    ("part", "option", "value", "message"),
    [
        (
            None,
            "num_style_prototypes",
            10**12,
            "`num_style_prototypes` must be from . to 65536, but got 1000000000000",
        ),
        (None, "embedding_dim", 10**9, "`embedding_dim` must be from . to 65536"),
        (None, "column_length", 10**9, "`column_length` must be from . to 65536"),
        (None, "embedding_dim", 60000, r"\.rates\.\w+ is \(\d+.*\) in the file, the configuration asks for \(60000,"),
        (None, "num_style_prototypes", -1, "`num_style_prototypes` must be from 1 to 65536, but got -1"),
        (None, "num_style_prototypes", "many", "'num_style_prototypes' expected int, got str"),
        (None, "margin", float("nan"), "`margin` must be .*, but got nan"),
        (None, "logit_scale_init_value", float("nan"), "`logit_scale_init_value` must be .*, but got nan"),
        (None, "uncertainty_config", {"reranking": {"floor": float("nan")}}, "floor` must be .*, but got nan"),
        ("vision_config", "hidden_size", 10**9, "numbers that .* does not hold, above all for vision_model"),
        (
            "vision_config",
            "intermediate_size",
            10**9,
            "numbers that .* does not hold, above all for vision_model",
        ),
        ("vision_config", "image_size", 10**9, r"position_embeddings is \(1, 5, 16\) in the file"),
        ("vision_config", "num_hidden_layers", 3, "lacks 16 tensors that its configuration asks for: vision_model"),
        ("vision_config", "num_hidden_layers", 1000, "`vision_config.num_hidden_layers` .* at most 256, but got 1000"),
        ("text_config", "encoder_layers", [4, 300], r"`text_config.encoder_layers` .* 256, but got \[4, 300\]"),
        ("vision_config", "layer_norm_eps", float("nan"), "`vision_config.layer_norm_eps` .* finite, but got nan"),
        ("vision_config", "layer_norm_eps", -1.0, "`vision_config.layer_norm_eps` .* greater than 0, but got -1"),
        ("text_config", "layer_norm_eps", 0.0, "`text_config.layer_norm_eps` .* greater than 0, but got 0"),
        ("text_config", "rope", {"factors": [1.0, float("inf")]}, r"`text_config.rope.factors` .* finite"),
        ("text_config", "vocab_size", 10**12, r"word_embeddings.weight is \(64, 24\) in the file"),
        ("text_config", "model_type", "unheard-of", "Unrecognized model identifier: unheard-of"),
    ],
)
def test_configurations_are_refused_by_name(part, option, value, message, folder):
    edit_json(folder / "config.json", lambda config: (config[part] if part else config).update({option: value}))
    for load in (PicoModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            load(folder)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("unet_num_layers", 10**9, "`unet_num_layers` must be from 1 to 256, but got 1000000000"),
        ("noise_groups", 10**9, "`noise_groups` must be from 1 to 1000, but got 1000000000"),
        ("semantic_weight", float("inf"), "`semantic_weight` must be from 0 to 1e.30, but got inf"),
        ("ranking_weight", float("nan"), "`ranking_weight` must be from 0 to 1e.30, but got nan"),
        ("integrity_weight", float("nan"), "`integrity_weight` must be from 0 to 1, but got nan"),
        ("threshold_init", float("-inf"), "`threshold_init` must be from -1e.30 to 1e.30, but got -inf"),
    ],
)
def test_configurations_of_cdds_are_refused_by_name(option, value, message, tmp_path):
    CddsConfig().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update({option: value}))
    with pytest.raises(StrictDataclassError, match=message):
        CddsConfig.from_pretrained(tmp_path)


def test_image_sizes_that_would_exhaust_memory(folder):
    def change(contents):
        contents["image_processor"]["size"] = {"height": 10**9, "width": 10**9}

    edit_json(folder / "processor_config.json", change)
    with pytest.raises(ValueError, match=r"`size\['height'\]` must be from 1 to 8192 pixels, but is 1000000000"):
        PicoProcessor.from_pretrained(folder)


# Tensors


def fill(name: str, value: float) -> Callable[[dict], None]:
    return lambda tensors: tensors[STATE + name].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fill("image.prototypes", float("nan")), "'image.prototypes' .* holds values from nan to nan"),
        (fill("text.prototypes", float("inf")), "'text.prototypes' .* holds values from inf to inf"),
        (fill("image.temperature", -1), "'image.temperature' .* holds values from -1 to -1; allowed .* from 1.17"),
        (fill("text.column_scale", 0), "'text.column_scale' .* holds values from 0 to 0"),
        (fill("image.style_rate", 1.5), "'image.style_rate' .* 1.5; allowed are values from -0.001 to 1.001"),
        (fill("text.stage", 3), "'text.stage' .* holds values from 3 to 3; allowed are values from 0 to 2"),
        (lambda t: t.pop(STATE + "image.prototypes"), "lacks 1 tensors .*: .*image.prototypes"),
        (lambda t: t.pop("logit_scale"), "lacks 1 tensors .*: logit_scale"),
        (lambda t: t.pop("text_model.embeddings.LayerNorm.bias"), "lacks 1 tensors .*: text_model.embeddings"),
        (
            lambda t: t.update({STATE + "image.style_rate": torch.zeros(9)}),
            r"image.style_rate is \(9,\) in the file",
        ),
    ],
)
def test_tensors_are_refused_by_name(change, message, folder):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        PicoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["num_style_prototypes", "embedding_dim"])
def test_sizes_are_refused_before_memory_is_taken(name, folder, monkeypatch):
    edit_json(folder / "config.json", lambda config: config.update({name: 2**16}))
    edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "alignment_head" in key])
    edit_json(folder / "config.json", lambda config: config.update(num_style_prototypes=2**16, embedding_dim=2**16))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: pytest.fail("memory was asked for"))
    with pytest.raises(ValueError, match="numbers that .* does not hold, above all for alignment_head"):
        PicoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:50],
        lambda content: content[:-500],
        lambda content: (2**60).to_bytes(8, "little") + content[8:],
        lambda content: content.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        lambda content: content.replace(b'"F32"', b'"F99"', 1),
        lambda content: content[:8] + content[8:].replace(b"image.style_rate", b"image.prototypes", 1),
    ],
    ids=["empty", "no header", "cut", "endless header", "wrong offsets", "wrong type", "a name twice"],
)
def test_damaged_files_are_named(damage, folder):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        (OSError, ValueError), match=r"model.safetensors' (is not a whole safetensors file: |have other sizes)"
    ):
        PicoModel.from_pretrained(folder)


def test_what_may_be_fresh(folder, tiny_model, tmp_path):
    """A checkpoint without prototypes is given some when they are asked for, and never else."""
    tiny_model(method="fine_grained").save_pretrained(tmp_path / "plain")
    model = PicoModel.from_pretrained(tmp_path / "plain", method="pico")
    assert model.style_prototypes["image"].stage == 0
    edit_json(tmp_path / "plain" / "config.json", lambda config: config.update(method="pico"))
    with pytest.raises(ValueError, match="lacks .* tensors that its configuration asks for: .*style_prototypes"):
        PicoModel.from_pretrained(tmp_path / "plain")
    other = PicoModel.from_pretrained(folder, style_probability="purity")
    assert other.style_prototypes["text"].stage == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", torch.nan), ("std", -0.5), ("std", torch.inf), ("class_mean", torch.inf), ("count", -1)],
)
def test_moments_that_no_measurement_leaves_behind(name, value, tiny_model, tmp_path):
    tiny_model(pooling="class_token").save_pretrained(tmp_path)
    PicoModel.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[f"image_moments.{name}"].fill_(value))
    with pytest.raises(ValueError, match=f"'image_moments.{name}' .* finite numbers"):
        PicoModel.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"image_moments.{name}"))
    with pytest.raises(ValueError, match=f"lacks 1 tensors .*: image_moments.{name}"):
        PicoModel.from_pretrained(tmp_path)


def test_the_checks_themselves(tmp_path):
    check_prototypes({"image.prototypes": torch.empty(0), "image.stage": torch.tensor(1, device="meta")})
    check_tensors(torch.nn.Linear(2, 2), [str(tmp_path / "a.bin")])
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "a.safetensors")
    layer = torch.nn.Linear(2, 3, bias=False)
    check_tensors(layer, [str(tmp_path / "a.safetensors")])
    with pytest.raises(ValueError, match=r"weight is \(3, 2\) in the file, the configuration asks for \(2, 3\)"):
        check_tensors(torch.nn.Linear(3, 2), [str(tmp_path / "a.safetensors")])
    with pytest.raises(ValueError, match="weight is"):
        check_tensors(torch.nn.Linear(3, 2), [str(tmp_path / "a.safetensors")], ignore_mismatched_sizes=True)
    save_file({"text_model.weight": torch.zeros(3, 2)}, tmp_path / "b.safetensors")
    tower = torch.nn.ModuleDict({"text_model": torch.nn.Linear(3, 2, bias=False)})
    check_tensors(tower, [str(tmp_path / "b.safetensors")], ignore_mismatched_sizes=True)
