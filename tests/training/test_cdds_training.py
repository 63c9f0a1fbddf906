"""CDDS through the trainer, the Hub, the script and ONNX: the same paths as PICO, with nothing that knows its head."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import test_export
import test_hub
import tiny
import torch
from test_hub import hub  # noqa: F401
from transformers import BertConfig, ViTConfig, set_seed

import modeling_pico
import train_pico
from modeling_pico import CddsConfig, CddsModel
from modeling_pico.script.model import plan_model
from modeling_pico.training.gradient_cache import cached_backward, split_inputs


CDDS = {"model_class": CddsModel, "unet_num_layers": 1, "unet_num_heads": 2}
PICO_CDDS = {**CDDS, "semantic_probability": True}


@pytest.mark.parametrize("options", [CDDS, PICO_CDDS], ids=["cdds", "pico_cdds"])
def test_a_resumed_run_is_the_uninterrupted_run(options, tmp_path):
    settings = {"model_options": options, "num_train_epochs": 3, "prototype_update_start": 2, "logging_steps": 3}
    made = tiny.trainer(tmp_path, **settings)
    made.train()
    resumed = tiny.trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    tiny.assert_same_state(resumed.model, made.model)
    assert tiny.whole_log(resumed) == tiny.whole_log(made)
    stages = [entry["prototype_stage"] for entry in tiny.prototype_log(made)]
    assert stages == ([1.0, 2.0] if options is PICO_CDDS else [])
    saved = CddsModel.from_pretrained(tmp_path / "checkpoint-9")
    tiny.assert_same_state(saved, made.model)
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    terms = ("semantic_loss", "modality_loss", "integrity_loss", "sampled_integrity_loss")
    assert len(logs) == 3 and all(entry[term] > 0 for entry in logs for term in terms)


def test_gradient_cache_of_one_chunk_is_the_plain_step(tmp_path):
    net = tiny.model(**CDDS).train()
    made = tiny.trainer(tmp_path, net=net)
    inputs = made.data_collator([made.train_dataset[row] for row in range(6)])
    inputs = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask", "image_ids")}
    inputs = {name: value[:6] for name, value in inputs.items()}
    found = []
    for cached in (False, True):
        set_seed(0)
        net.zero_grad()
        if cached:
            loss = cached_backward(
                net,
                split_inputs(inputs, 6),
                lambda outputs: made._batch_loss(outputs, inputs, collect=False),
                lambda value: value.backward(),
                nullcontext,
            )
        else:
            loss = made.compute_loss(net, inputs)
            loss.backward()
        found.append((loss.item(), {name: parameter.grad.clone() for name, parameter in net.named_parameters()}))
    (plain, wanted), (chunked, gradients) = found
    assert chunked == pytest.approx(plain, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_training_in_chunks_runs(tmp_path):
    made = tiny.trainer(tmp_path, model_options=PICO_CDDS, gradient_cache_chunk_size=2, num_train_epochs=1)
    before = {name: tensor.clone() for name, tensor in made.model.alignment_head.state_dict().items()}
    made.train()
    still = [
        name
        for name, parameter in made.model.alignment_head.named_parameters()
        if "style_prototypes" not in name and torch.equal(parameter, before[name])
    ]
    assert not still


def test_uncertainty_alone_costs_nothing_of_the_decoupling(monkeypatch):
    net = tiny.model(uncertainty_config={"num_prototypes": 2}, **CDDS)
    net.train_uncertainty_only()
    monkeypatch.setattr(type(net.alignment_head), "auxiliary_losses", lambda *sides: pytest.fail("asked for"))
    inputs = {"pixel_values": torch.rand(3, 3, 16, 16), "input_ids": torch.tensor([[2, 5, 3], [2, 6, 3], [2, 7, 3]])}
    assert set(net.train()(**inputs).auxiliary_losses) == {"uncertainty", "uncertainty_diversity"}


def test_nothing_but_command_line_and_card_knows_it():
    """Trainer, data and evaluation serve any head; the command line lists methods, and cards say what each one is."""
    package = Path(modeling_pico.__file__).parent
    files = [file for part in ("training", "data", "evaluation", "script") for file in (package / part).rglob("*.py")]
    knowing = {file.name for file in files if "cdds" in file.read_text(encoding="utf-8").lower()}
    assert len(files) > 30 and knowing == {"arguments.py", "model_card.py"}


def test_uploads_have_all_code_and_a_card_of_its_own(hub, tmp_path):  # noqa: F811
    made = test_hub.publisher(tmp_path / "run", model_options=PICO_CDDS, hub_strategy="end")
    made.train()
    made.push_to_hub()
    [upload] = hub.uploads
    code = {f"{name}_cdds.py" for name in ("configuration", "modeling")}
    assert set(os.listdir(upload.folder)) >= test_hub.NEEDED | code
    card = (upload.folder / "README.md").read_text()
    assert "2603.05566" in card and "CddsModel.from_pretrained" in card and "Feedback weight" in card
    tiny.assert_same_state(CddsModel.from_pretrained(upload.folder), made.model)


# The script


class Script:
    """Runs the command line on a folder of data."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str, **options) -> dict[str, float]:
        options = {"output_dir": self.folder / name, "dataset_name": self.folder / "data", **options}
        options |= {"use_cpu": True, "report_to": "none", "plots": "false", "log_level": "error", "do_eval": True}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return train_pico.main([*words, "--disable_tqdm", "true"])


SIZES = {"hidden_size": 16, "num_layers": 1}
TOWERS = {"image_size": 16, "patch_size": 8, "embedding_dim": 8}
TOWERS |= {f"{tower}_{name}": value for tower in ("vision", "text") for name, value in SIZES.items()}


@pytest.fixture
def script(tmp_path, no_progress_bars, own_cache) -> Script:
    import datasets

    splits = {"train": tiny.rows(20), "validation": tiny.rows(9, seed=1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    return Script(tmp_path)


def test_the_script_trains_and_evaluates_it(script, tmp_path):
    options = {**TOWERS, "num_train_epochs": 2, "per_device_train_batch_size": 10, "save_strategy": "no"}
    options |= {"do_train": True, "method": "cdds", "noise_groups": 1, "semantic_probability": True}
    results = script("run", **options, prototype_start=1, prototype_update_start=5, eval_strategy="epoch")
    again = script("again", model_name_or_path=tmp_path / "run")
    assert again["eval_rsum"] == results["eval_rsum"]
    model = CddsModel.from_pretrained(tmp_path / "run")
    assert (model.config.noise_groups, int(model.style_prototypes["image"].stage)) == (1, 1)
    # Another method on the same checkpoint: projections and towers stay.
    script("ablated", model_name_or_path=tmp_path / "run", method="fine_grained")


def test_options_of_another_method_are_refused():
    arguments = train_pico.parse_arguments(["--output_dir", "x", "--noise_groups", "3", "--method", "clip_style"])[0]
    with pytest.raises(ValueError, match=r"PicoModel has no option 'noise_groups'; .*--method cdds\."):
        plan_model(arguments, None, training=True)
    arguments.method = "cdds"
    plan = plan_model(arguments, None, training=True)
    assert plan.model_class is CddsModel and plan.config.noise_groups == 3
    assert arguments.config_options(CddsModel) == {"method": "cdds", "noise_groups": 3}


# ONNX


@pytest.fixture(scope="module")
def learned(use_prototypes) -> CddsModel:
    vision = ViTConfig(**test_export.SIZES, image_size=16, patch_size=8)
    text = BertConfig(**test_export.SIZES, vocab_size=64, max_position_embeddings=32)
    options = {"embedding_dim": 12, "num_style_prototypes": 3, "semantic_probability": True, "unet_num_layers": 1}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = CddsModel(CddsConfig(vision_config=vision, text_config=text, **options)).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return use_prototypes(model)


def test_text_encoder_goes_through_torch_export(learned, batch):
    test_export.test_text_encoder_goes_through_torch_export(learned, batch)


@test_export.needs_onnx
@pytest.mark.slow
def test_exported_towers_give_the_same_scores(learned, tiny_processor, tmp_path):
    learned.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    test_export.export.main([str(tmp_path / "model"), str(tmp_path / "onnx")])
    test_export.assert_same_as(learned, tmp_path / "onnx")
