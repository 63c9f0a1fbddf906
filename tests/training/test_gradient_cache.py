"""GradCache: the gradient of a large batch, computed in chunks."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import tiny
import torch

from modeling_pico.model.loss_pico import image_text_loss
from modeling_pico.model.scoring_pico import pair_scores
from modeling_pico.training.gradient_cache import cached_backward, split_inputs


PAIRS = 7


def loss_of(outputs):
    scores = pair_scores(outputs.image_embeds, outputs.text_embeds, outputs.image_mask, outputs.text_mask)
    return image_text_loss(scores, scores.T, image_ids=torch.arange(PAIRS), logit_scale=outputs.logit_scale)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (PAIRS, 1), generator=generator)
    return {
        "pixel_values": torch.randn(PAIRS, 3, tiny.SIZE, tiny.SIZE, generator=generator),
        "input_ids": torch.randint(5, 40, (PAIRS, 8), generator=generator),
        "attention_mask": (torch.arange(8)[None] < lengths).long(),
        "image_ids": torch.arange(PAIRS),
    }


def in_use(model):
    for side in model.style_prototypes.values():
        side.stage.fill_(1)
    torch.nn.init.normal_(model.style_prototypes["image"].prototypes)
    with torch.no_grad():
        model.style_prototypes["image"].rates.rate.normal_()
    return model.train()


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk_size", [1, 3, PAIRS, 100])
def test_chunks_give_the_loss_and_gradient_of_the_whole_batch(batch, chunk_size):
    model = in_use(tiny.model())
    loss = loss_of(model(**batch, return_logits=False))
    loss.backward()
    wanted = gradients(model)
    chunks = split_inputs(batch, chunk_size)
    cached = cached_backward(model, chunks, loss_of, lambda value: value.backward(), nullcontext)
    torch.testing.assert_close(cached, loss.detach(), rtol=0, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5, msg=name)


def test_dropout_is_replayed_and_the_generator_moves_on_once(batch):
    model = in_use(tiny.model(dropout=0.3))
    torch.manual_seed(3)
    loss_of(model(**batch, return_logits=False)).backward()
    wanted, state = gradients(model), torch.get_rng_state()
    torch.manual_seed(3)
    cached_backward(model, split_inputs(batch, PAIRS), loss_of, lambda value: value.backward(), nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-6, msg=name)


def test_only_the_last_chunk_exchanges_gradients(batch):
    entered = []

    @contextmanager
    def no_sync():
        entered.append(True)
        yield

    model = in_use(tiny.model())
    cached_backward(model, split_inputs(batch, 3), loss_of, lambda value: value.backward(), no_sync)
    assert len(entered) == 2


def test_the_largest_graph_holds_one_chunk(batch):
    seen = []
    model = in_use(tiny.model())
    forward = model.forward

    def recorded(**inputs):
        seen.append((len(inputs["image_ids"]), torch.is_grad_enabled()))
        return forward(**inputs)

    model.forward = recorded
    cached_backward(model, split_inputs(batch, 3), loss_of, lambda value: value.backward(), nullcontext)
    assert seen == [(3, False), (3, False), (1, False), (3, True), (3, True), (1, True)]


def test_deepspeed_is_refused(tmp_path):
    made = tiny.trainer(tmp_path, gradient_cache_chunk_size=3)
    made.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="gradient_cache_chunk_size.*DeepSpeed.*ddp.yaml"):
        made.train()
    made = tiny.trainer(tmp_path, non_finite_loss="skip")
    made.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="non_finite_loss='skip'.*DeepSpeed.*DDP or FSDP"):
        made.train()
