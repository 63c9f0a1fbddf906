"""Low-rank adapters of PEFT under PicoTrainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_same_state, model, processor, prototype_log, rows, trainer

from modeling_pico import CddsModel, PicoModel


peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "query", "value"]  # of ViT and of BERT


def lora(modules_to_save):
    saved = None if modules_to_save is None else list(modules_to_save)
    return peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=saved)


def adapted(modules_to_save=("alignment_head",), **options):
    return peft.get_peft_model(model(**options), lora(modules_to_save))


def adapted_in_place(modules_to_save=("alignment_head",), **options):
    net = model(**options)
    net.add_adapter(lora(modules_to_save))
    return net


def batch() -> dict[str, torch.Tensor]:
    made = processor()
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    texts = [captions[0] for captions in rows(4)["captions"]]
    return dict(made(images=images, text=texts, padding=True, return_tensors="pt", do_rescale=False))


@torch.no_grad()
def scores(net: torch.nn.Module) -> torch.Tensor:
    return net.eval()(**batch()).logits_per_image


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("adapter")
    made = trainer(folder, net=adapted(), num_train_epochs=5)
    made.train()
    return SimpleNamespace(trainer=made, net=made.model, folder=folder, last=folder / "checkpoint-15")


def test_adapter_and_staged_prototypes_train_together(run):
    base, start = run.net.get_base_model(), model().state_dict()
    prototypes = run.trainer._pico_model().style_prototypes
    assert prototypes is base.alignment_head.modules_to_save["default"].style_prototypes
    assert run.trainer.construction.prototypes is prototypes
    assert prototypes["image"].stage == 2 and len(prototype_log(run.trainer)) == 3
    assert base.alignment_head.original_module.style_prototypes["image"].stage == 0
    # Outside of every module, so an adapter neither trains nor holds it.
    assert not base.logit_scale.requires_grad and "logit_scale" in start
    assert not any("logit_scale" in name for name in load_file(run.last / "adapter_model.safetensors"))
    # The base is as it was; what is new has moved.
    state = base.state_dict()
    frozen = [name for name in start if name in state]
    assert any("vision_model" in name for name in frozen)
    assert all(torch.equal(state[name], start[name]) for name in frozen)
    trained = {name: tensor for name, tensor in run.net.named_parameters() if tensor.requires_grad}
    low_rank = {name: tensor for name, tensor in trained.items() if "lora_B" in name}
    assert len(low_rank) == 4 and all(tensor.abs().max() > 0 for tensor in low_rank.values())
    assert not torch.equal(
        state["alignment_head.modules_to_save.default.visual_projection.weight"],
        start["alignment_head.visual_projection.weight"],
    )


def test_checkpoint_holds_the_whole_head_and_nothing_of_the_base(run):
    saved = load_file(run.last / "adapter_model.safetensors")
    prefix = "base_model.model.alignment_head."
    head = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    expected = run.net.get_base_model().alignment_head.modules_to_save["default"].state_dict()
    assert head.keys() == expected.keys()
    assert {
        "style_prototypes.image.prototypes",
        "style_prototypes.text.stage",
        "text_projection.weight",
    } <= head.keys()
    assert all(torch.equal(head[name], tensor) for name, tensor in expected.items())
    assert all("lora" in name for name in saved if not name.startswith(prefix))
    assert not (run.last / "model.safetensors").exists()


def test_adapter_on_a_fresh_base_gives_equal_scores(run):
    loaded = peft.PeftModel.from_pretrained(model(), run.last)
    assert torch.equal(scores(loaded), scores(run.net))
    assert not torch.equal(scores(model()), scores(run.net))
    assert_same_state(loaded.get_base_model().style_prototypes, run.trainer._pico_model().style_prototypes)
    with run.net.disable_adapter():
        assert run.net.get_base_model().style_prototypes["image"].stage == 0
        assert torch.equal(scores(run.net), scores(model()))


def test_merged_adapter_is_a_plain_model(run, tmp_path):
    expected = scores(run.net)
    merged = peft.PeftModel.from_pretrained(model(), run.last).merge_and_unload()
    assert type(merged) is PicoModel
    merged.save_pretrained(tmp_path)
    loaded = PicoModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model().state_dict().keys()
    torch.testing.assert_close(scores(loaded), expected, rtol=1e-5, atol=1e-5)
    assert_same_state(loaded.alignment_head, run.net.get_base_model().alignment_head.modules_to_save["default"])


def test_resume_equals_the_whole_run(run, tmp_path):
    resumed = trainer(tmp_path, net=adapted(), num_train_epochs=5)
    resumed.train(resume_from_checkpoint=str(run.folder / "checkpoint-9"))
    assert_same_state(resumed.model, run.net)


def test_best_adapter_is_loaded(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    made = trainer(tmp_path, net=adapted(), num_train_epochs=3, gradient_checkpointing=True, **options)
    made.train()
    best = made.state.best_global_step
    assert best < 9  # the worst loss comes first; the last weights would be right by accident
    kept = peft.PeftModel.from_pretrained(model(), tmp_path / f"checkpoint-{best}")
    assert_same_state(made.model, kept)


@pytest.mark.parametrize("adapt", [adapted, adapted_in_place])
def test_an_adapter_that_loses_the_prototypes_is_refused(tmp_path, adapt):
    with pytest.raises(ValueError, match=r"without .*style_prototypes of .*modules_to_save=\[\"alignment_head\"\]"):
        trainer(tmp_path, net=adapt(modules_to_save=None)).train()
    # Heads without prototypes need not be trained.
    made = trainer(tmp_path, net=adapt(modules_to_save=None, method="fine_grained"), max_steps=1)
    made.train()
    assert made.construction is None


def test_an_adapter_added_in_place_is_saved_and_resumed(tmp_path):
    whole = trainer(tmp_path / "whole", net=adapted_in_place(), num_train_epochs=5, load_best_model_at_end=True)
    whole.train()
    assert 3 < whole.state.best_global_step < 15  # neither the first nor the last weights
    best, last = (tmp_path / "whole" / f"checkpoint-{step}" for step in (whole.state.best_global_step, 15))
    loaded = model()
    loaded.load_adapter(str(last))
    assert loaded.style_prototypes["image"].stage == 2
    resumed = trainer(tmp_path / "resumed", net=adapted_in_place(), num_train_epochs=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_state(resumed.model, loaded)
    kept = model()
    kept.load_adapter(str(best))
    assert_same_state(whole.model, kept)


def test_an_adapter_that_loses_a_network_of_the_head_is_refused(tmp_path):
    options = {"model_class": CddsModel, "unet_num_layers": 1}
    with pytest.raises(ValueError, match=r"without component_weights.*modules_to_save=\[\"alignment_head\"\]"):
        trainer(tmp_path, net=adapted(modules_to_save=None, **options), max_steps=1).train()
    trainer(tmp_path, net=adapted(**options), max_steps=1).train()


def test_an_adapter_keeps_the_uncertainty(tmp_path):
    options = {"method": "fine_grained", "uncertainty_config": {"num_prototypes": 4}}
    with pytest.raises(ValueError, match=r"without image, text of `uncertainty_prototypes`"):
        trainer(tmp_path, net=adapted(**options), max_steps=1).train()
    net = adapted(("alignment_head", "uncertainty_prototypes"), **options)
    made = trainer(tmp_path, net=net, max_steps=2)
    made.train()
    made.save_model()
    loaded = peft.PeftModel.from_pretrained(model(**options), tmp_path)
    assert_same_state(made.model, loaded)
    before = model(**options).uncertainty_prototypes.image
    after = net.get_base_model().uncertainty_prototypes.modules_to_save["default"].image
    assert not torch.equal(before, after)
