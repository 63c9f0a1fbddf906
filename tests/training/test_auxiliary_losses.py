"""A head's auxiliary losses reach the loss, the gradient and the log, whatever the head is."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny
import torch

from modeling_pico.training.gradient_cache import cached_backward, split_inputs


@pytest.fixture
def net():
    """A model whose head has two auxiliary losses: mean squares of the projected tokens, tripled for the texts."""
    model = tiny.model(method="fine_grained").train()
    head = model.alignment_head
    embed = head.embed

    def with_state(token_states, mask, class_state, modality):
        tokens, mask, _ = embed(token_states, mask, class_state, modality)
        projection = head.visual_projection if modality == "image" else head.text_projection
        return tokens, mask, (projection(token_states).square().mean(dim=-1) * mask).mean(dim=1)

    head.embed = with_state
    head.auxiliary_losses = lambda image, text: {"picture": image.mean(), "word": 3 * text.mean()}
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(5, 3, tiny.SIZE, tiny.SIZE, generator=generator),
        "input_ids": torch.randint(5, 40, (5, 6), generator=generator),
        "attention_mask": torch.ones(5, 6, dtype=torch.int64),
        "image_ids": torch.arange(5),
    }


def test_forward_returns_them_in_training_and_with_the_loss(net, inputs):
    outputs = net(**inputs, return_loss=True)
    terms = outputs.auxiliary_losses
    assert outputs.auxiliary_loss.item() == pytest.approx(terms["picture"].item() + terms["word"].item(), rel=1e-6)
    net.alignment_head.auxiliary_losses = lambda image, text: {}
    plain = net(**inputs, return_loss=True)
    assert plain.auxiliary_loss is None and plain.auxiliary_losses is None
    assert outputs.loss.item() == pytest.approx(plain.loss.item() + outputs.auxiliary_loss.item(), rel=1e-6)


def test_scoring_does_not_compute_them(net, inputs):
    net.alignment_head.auxiliary_losses = lambda image, text: pytest.fail("asked for")
    net.eval()(**inputs)
    net.train().get_image_features(inputs["pixel_values"])


def test_the_trainer_adds_and_logs_them(net, inputs, tmp_path):
    made = tiny.trainer(tmp_path, net=net, eval_strategy="no", save_strategy="no", logging_steps=2, max_steps=4)
    whole, outputs = made.compute_loss(net, inputs, return_outputs=True)
    net.config.ranking_weight = 0.25
    reduced = made.compute_loss(net, inputs)
    auxiliary = outputs.auxiliary_loss
    assert (reduced - auxiliary).item() == pytest.approx(0.25 * (whole - auxiliary).item(), rel=1e-4)
    made._auxiliary_log.clear()
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["picture_loss"] > 0 and entry["word_loss"] > 0 for entry in logs)
    assert not made._auxiliary_log


def test_chunks_of_one_pair_are_refused(net, tmp_path):
    made = tiny.trainer(tmp_path, net=net, gradient_cache_chunk_size=1, max_steps=1)
    with pytest.raises(ValueError, match="picture, word compare .* chunks of one pair .*gradient_cache_chunk_size"):
        made.train()


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_chunks_weigh_them_by_their_pairs(net, inputs, chunk_size, tmp_path):
    made = tiny.trainer(tmp_path, net=net)
    net.config.ranking_weight = 0.5
    loss = made.compute_loss(net, inputs)
    loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    cached = cached_backward(
        net,
        split_inputs(inputs, chunk_size),
        lambda outputs: made._batch_loss(outputs, inputs, collect=False),
        lambda value: value.backward(),
        nullcontext,
    )
    # These losses are means over pairs, so that of the batch is that of the chunks (2, 2 and 1 pairs).
    assert cached.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
