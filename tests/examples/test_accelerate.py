"""The Accelerate configurations: read as `accelerate launch` reads them, down to what the trainer is handed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from backbone_families import JOINT, PAIRS, family
from torch.distributed.fsdp import StateDictType

from modeling_pico import PicoModel
from modeling_pico.training.sharding import prepare_fsdp


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "accelerate"


def launch(name: str, *flags: str) -> SimpleNamespace:
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), *flags, "train_pico.py"])
    return _validate_launch_command(args)[0]


@pytest.fixture
def fsdp_plugin(monkeypatch):
    """Makes the plugin that a process started with fsdp.yaml makes."""

    def make(**changes: str) -> FullyShardedDataParallelPlugin:
        for name, value in {**prepare_multi_gpu_env(launch("fsdp.yaml")), **changes}.items():
            if name.startswith("FSDP_"):
                monkeypatch.setenv(name, value)
        return FullyShardedDataParallelPlugin()

    return make


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp.yaml", DistributedType.MULTI_GPU),
        ("fsdp.yaml", DistributedType.FSDP),
        ("deepspeed_zero2.yaml", DistributedType.DEEPSPEED),
    ],
)
def test_every_configuration_is_understood(name, kind):
    config = load_config_from_file(str(FOLDER / name))
    assert config.distributed_type == kind
    args = launch(name)
    # `--bf16` of the script says what precision there is, so that a configuration never contradicts it.
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (2, 1, "no")
    assert launch(name, "--num_processes", "8").num_processes == 8
    chosen = [args.multi_gpu, args.use_fsdp, args.use_deepspeed]
    order = [DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED]
    assert chosen == [kind == other for other in order]


def test_there_is_no_other_configuration():
    assert sorted(path.name for path in FOLDER.glob("*")) == ["ddp.yaml", "deepspeed_zero2.yaml", "fsdp.yaml"]


def test_deepspeed_leaves_to_the_trainer_what_the_trainer_says():
    args = launch("deepspeed_zero2.yaml")
    args.deepspeed_fields_from_accelerate_config = ",".join(load_config_from_file(args.config_file).deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(args)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    given = {name.removeprefix("ACCELERATE_DEEPSPEED_"): value for name, value in environment.items()}
    assert given["ZERO_STAGE"] == "2"
    assert given["OFFLOAD_OPTIMIZER_DEVICE"] == given["OFFLOAD_PARAM_DEVICE"] == "none"
    # Evaluation weighs embeddings outside of the forward pass, where ZeRO-3 has handed parameters back.
    assert given["ZERO3_INIT"] == "false"
    fixed = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & environment.keys()
    assert all(environment[name] in ("auto", "None", "none") for name in fixed), {n: environment[n] for n in fixed}


def test_fsdp_saves_what_from_pretrained_reads(fsdp_plugin):
    plugin = fsdp_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.transformer_cls_names_to_wrap is None


@pytest.mark.parametrize(("vision", "text"), [*((name, None) for name in JOINT), *PAIRS])
def test_fsdp_shards_the_layers_of_every_family_and_not_the_head(fsdp_plugin, vision, text):
    towers = [family(name).build() for name in (vision, text) if name is not None]
    model = PicoModel.from_backbones(*towers, num_style_prototypes=3)
    plugin = fsdp_plugin()
    prepare_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu")), model, model)
    for tower in (model.vision_model, model.text_model):
        inside = [m for m in tower.modules() if type(m).__name__ in plugin.transformer_cls_names_to_wrap]
        sharded = sum(parameter.numel() for module in inside for parameter in module.parameters())
        assert sharded > 0.3 * sum(parameter.numel() for parameter in tower.parameters())
        assert all(model.get_input_embeddings() not in module.modules() for module in inside)
    plugin.set_auto_wrap_policy(model)
    whole = {id(parameter) for module in plugin.ignored_modules for parameter in module.parameters()}
    outside = {name for name, parameter in model.named_parameters() if id(parameter) in whole}
    assert outside == {name for name, _ in model.named_parameters() if "_model." not in name}


def test_the_first_version_of_fsdp_is_refused(fsdp_plugin, tiny_model):
    plugin = fsdp_plugin()
    plugin.fsdp_version = 1
    model = tiny_model()
    with pytest.raises(ValueError, match="FSDP version 1 is not supported.*fsdp_version: 2"):
        prepare_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model, model)


def test_the_page_on_training_launches_with_these_files():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--config_file (\S+)", text))
    assert named and all((ROOT / name).is_file() for name in named)
    assert "examples/accelerate/fsdp.yaml" in text and "examples/accelerate/deepspeed_zero2.yaml" in text
    for line in re.findall(r"^accelerate launch --config_file .*$", text, flags=re.MULTILINE):
        assert launch_command_parser().parse_args(shlex.split(line)[2:]).training_script == "train_pico.py"
