"""A model that `torch.compile` has wrapped, by hand or by the training arguments, trains and is saved as itself."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same_state, model, trainer

from modeling_pico import PicoModel


SHORT = {"num_train_epochs": 2}


@pytest.fixture
def uncompiled():
    """Wrapped as usual, run as it is: what is tested are the wrappers, and compiling takes a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_a_compiled_model_is_trained_saved_resumed_and_reloaded_as_itself(tmp_path, uncompiled):
    options = {**SHORT, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    assert plain.state.best_global_step == 3  # not the last: it has to be loaded
    wrapped = trainer(tmp_path / "wrapped", net=torch.compile(model(), backend="eager"), **options)
    wrapped.train()
    assert isinstance(wrapped.model, torch._dynamo.eval_frame.OptimizedModule)
    assert_same_state(wrapped._pico_model(), plain.model)
    for folder in ("checkpoint-3", "checkpoint-6"):
        mine, other = (PicoModel.from_pretrained(tmp_path / run / folder) for run in ("wrapped", "plain"))
        assert_same_state(mine, other)
    resumed = trainer(tmp_path / "resumed", net=torch.compile(model(), backend="eager"), **SHORT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "wrapped" / "checkpoint-3"))
    assert_same_state(resumed._pico_model(), mine)


def test_a_compiled_adapter_is_saved_and_resumed(tmp_path, uncompiled):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["alignment_head"])
        return torch.compile(peft.get_peft_model(model(), config), backend="eager")

    whole = trainer(tmp_path / "whole", net=adapted(), **SHORT)
    whole.train()
    resumed = trainer(tmp_path / "resumed", net=adapted(), **SHORT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_state(resumed._pico_model(), whole._pico_model())


@pytest.mark.parametrize("by", ["hand", "arguments"])
def test_a_model_that_is_compiled_in_truth_trains_alike(tmp_path, by):
    plain = trainer(tmp_path / "plain", max_steps=1, eval_strategy="no")
    plain.train()
    net = torch.compile(model(), backend="eager") if by == "hand" else model()
    options = {"torch_compile_backend": "eager"} if by == "arguments" else {}
    made = trainer(tmp_path / by, net=net, max_steps=1, eval_strategy="no", **options)
    made.train()
    assert_same_state(made._pico_model(), plain.model)


def test_another_kind_of_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"trains a PicoModel.* `model` is a Linear.*from_backbones"):
        trainer(tmp_path, net=torch.nn.Linear(2, 2)).train()
