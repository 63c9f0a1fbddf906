"""CDDS as a model: its network by hand, what training minimises, and every way it is saved and loaded."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import test_conformance_pico as conformance
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor

from modeling_pico import CddsConfig, CddsModel, PicoConfig, PicoModel, PicoProcessor
from modeling_pico.model.modeling_cdds import DecoupledSide, DualPathUNet


@pytest.fixture(scope="module")
def cdds(tiny_config):
    """Builds a tiny CDDS model in evaluation mode, always with the same weights."""

    def build(**options) -> CddsModel:
        parts = tiny_config()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            config = CddsConfig(
                vision_config=parts.vision_config,
                text_config=parts.text_config,
                **{"embedding_dim": 12, "num_style_prototypes": 3, "unet_num_heads": 4, **options},
            )
            model = CddsModel(config).eval()
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


# Configuration


def test_configuration_survives_disk(tmp_path):
    options = {
        "unet_num_layers": 3,
        "unet_num_heads": 2,
        "noise_groups": 5,
        "threshold_init": 0.5,
        "semantic_weight": 0.2,
        "modality_weight": 0.3,
        "integrity_weight": 0.3,
        "ranking_weight": 0.4,
        "semantic_probability": True,
    }
    default = CddsConfig()
    CddsConfig(embedding_dim=6, **options).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is CddsConfig and again.model_type == "cdds" and again.embedding_dim == 6
    for name, value in options.items():
        assert getattr(again, name) == value
        assert getattr(default, name) != value, f"{name} is not tested by its default value"
    assert again.uses_prototypes and not default.uses_prototypes


@pytest.mark.parametrize(("dim", "heads"), [(512, 8), (64, 4), (192, 4), (48, 1), (12, 1), (33, 1), (96, 2)])
def test_narrow_embeddings_have_fewer_attention_heads(dim, heads):
    assert CddsConfig(embedding_dim=dim).unet_num_heads == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_groups": 0}, "`noise_groups` must be from 1 to 1000, but got 0"),
        ({"modality_weight": -1}, "`modality_weight` must be from 0 to 1e.30, but got -1"),
        ({"integrity_weight": 1.5}, "`integrity_weight` must be from 0 to 1, but got 1.5"),
        ({"embedding_dim": 12, "unet_num_heads": 8}, "`unet_num_heads` must divide `embedding_dim`, but got 8 and 12"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        CddsConfig(**options)


def test_the_method_of_another_type_is_refused():
    with pytest.raises(ValueError, match="`method` must be one of 'pico', .* for PicoModel, but got 'cdds'"):
        PicoModel(PicoConfig(method="cdds"))
    with pytest.raises(ValueError, match="`method` must be one of 'cdds' for CddsModel, but got 'pico'"):
        CddsModel(CddsConfig(method="pico"))


# Eqs. 1 to 4


class Times(nn.Module):
    """Stands in for a transformer layer."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, states, src_key_padding_mask=None):
        return self.factor * states


@pytest.fixture
def unet() -> DualPathUNet:
    """Layers that multiply, and projections that start as means."""
    made = DualPathUNet(CddsConfig(embedding_dim=2, unet_num_heads=1, noise_groups=3))
    made.encoder = nn.ModuleList([Times(2), Times(3)])
    made.noise_layer = Times(5)
    for decoder, factors in ((made.semantic_decoder, (7, 1)), (made.modality_decoder, (0, 1))):
        decoder.layers = nn.ModuleList(Times(factor) for factor in factors)
        for projection in decoder.projections:
            nn.init.zeros_(projection.bias)
            with torch.no_grad():
                projection.weight.copy_(torch.eye(2).repeat(1, 2) / 2)
    return made


def test_components_by_hand(unet):
    tokens = torch.tensor([[[1.0, -1.0]]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    encoded = unet.eval().encode(tokens, mask)
    # H = 6 V. First decoder layer: mean of 7 * 6 and the deeper skip 6; second: mean of 24 and the other skip, 2.
    assert torch.equal(encoded.noisy, 6 * tokens)
    assert torch.equal(unet.decode(unet.semantic_decoder, encoded), 13 * tokens)
    # The other path: mean of 0 and 6, then of 3 and 2.
    assert torch.equal(unet.decode(unet.modality_decoder, encoded), 2.5 * tokens)


def test_noise_groups_by_hand(unet):
    tokens = torch.tensor([[[1.0, -1.0]], [[2.0, 0.0]]])
    torch.manual_seed(3)
    noise = torch.randn(6, 1, 2)
    torch.manual_seed(3)
    encoded = unet.train().encode(tokens, torch.ones(2, 1, dtype=torch.bool))
    assert encoded.groups == 3
    torch.testing.assert_close(encoded.noisy, 6 * tokens.repeat(3, 1, 1) + 5 * noise)
    # Half of seven times the noise reaches the first layer's output, half of that the second's.
    expected = 13 * tokens + 7 / 4 * 5 * noise.view(3, 2, 1, 2).mean(dim=0)
    torch.testing.assert_close(unet.decode(unet.semantic_decoder, encoded), expected)


def test_noise_of_zero_is_alike_at_all_tokens(cdds):
    unet = cdds().alignment_head.text_unet
    tokens, mask = torch.randn(2, 4, 12), torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        encoded = unet.encode(tokens, mask)
        everywhere = unet.noise_layer(torch.zeros(2, 4, 12), src_key_padding_mask=~mask)
    torch.testing.assert_close((encoded.noisy - encoded.skips[-1])[mask], everywhere[mask], rtol=1e-4, atol=1e-5)


def test_evaluation_is_close_to_the_mean_over_many_noise_groups(cdds, batch):
    model = cdds()
    unet = model.alignment_head.image_unet
    tokens = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        still = unet.eval().encode(tokens, mask)
        unet.train().noise_groups = 2000
        noisy = unet.encode(tokens, mask)
        for decoder in (unet.semantic_decoder, unet.modality_decoder):
            one, many = (unet.decode(decoder, encoded).flatten() for encoded in (still, noisy))
            assert nn.functional.cosine_similarity(one, many, dim=0) > 0.9


# Scores


def test_only_evaluation_is_without_noise(cdds, batch):
    model = cdds()
    with torch.no_grad():
        first, second = model(**batch), model(**batch)
        assert torch.equal(first.logits_per_image, second.logits_per_image)
        assert first.auxiliary_loss is None
        model.train()
        assert not torch.equal(model(**batch).image_embeds, model(**batch).image_embeds)


@pytest.mark.parametrize("semantic_probability", [False, True])
def test_a_row_does_not_depend_on_its_batch(cdds, use_prototypes, semantic_probability, batch):
    model = cdds(semantic_probability=semantic_probability)
    if semantic_probability:
        use_prototypes(model)
    with torch.no_grad():
        together = model.get_text_features(batch["input_ids"], batch["attention_mask"])
        alone = model.get_text_features(batch["input_ids"][:1, :4], batch["attention_mask"][:1, :4])
        images = model.get_image_features(batch["pixel_values"])
        image = model.get_image_features(batch["pixel_values"][1:2])
    torch.testing.assert_close(together.embeds[:1, :4], alone.embeds, rtol=1e-4, atol=1e-5)
    assert not together.embeds[0, 4:].any()
    torch.testing.assert_close(images.embeds[1:2], image.embeds, rtol=1e-4, atol=1e-5)


def test_a_text_without_a_word_scores_zero_and_trains(cdds, batch):
    model = cdds(text_special_tokens=False)
    texts = {name: value.clone() for name, value in batch.items()}
    texts["input_ids"][0, 1], texts["attention_mask"][0, 2:] = 3, 0
    with torch.no_grad():
        assert not model(**texts).logits_per_image[:, 0].any()
    model.train()(**texts, return_loss=True).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.alignment_head.parameters())


def test_a_batch_without_a_word_leaves_what_needs_words(cdds, batch):
    model = cdds(text_special_tokens=False).train()
    outputs = model(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}, return_loss=True)
    terms = {name: term.item() for name, term in outputs.auxiliary_losses.items()}
    assert terms["semantic"] == terms["sampled_integrity"] == 0
    assert terms["modality"] > 0 and terms["integrity"] > 0  # of the images
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.alignment_head.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    own = gradients["text_unet.modality_decoder.projections.0.weight"]
    assert not own.any() and gradients["image_unet.modality_decoder.projections.0.weight"].any()


def test_fresh_components_score_like_the_fine_grained_baseline(tiny_clip, batch):
    options = {"embedding_dim": 10, "unet_num_heads": 2}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = CddsModel.from_backbones(tiny_clip.folder, **options)
        baseline = PicoModel.from_backbones(tiny_clip.folder, method="fine_grained")
        assert torch.equal(model.alignment_head.text_projection.weight, baseline.alignment_head.text_projection.weight)
        own, plain = (net.get_image_features(batch["pixel_values"]).embeds for net in (model, baseline))
    # The transformer layers are fresh as well, and small.
    assert nn.functional.cosine_similarity(own, plain, dim=-1).min() > 0.8


# Losses


def test_the_objective_is_the_weighted_sum_of_the_terms(cdds, batch):
    plain = cdds(semantic_weight=1, modality_weight=1, integrity_weight=0.25)
    weighted = cdds(semantic_weight=3, modality_weight=0.5, integrity_weight=0.8, ranking_weight=0.1)
    with torch.no_grad():
        one, other = (net(**batch, return_loss=True) for net in (plain, weighted))
    factors = {"semantic": 3.0, "modality": 0.5, "integrity": 0.8 / 0.25, "sampled_integrity": 0.2 / 0.75}
    assert one.auxiliary_losses.keys() == factors.keys()
    for name, factor in factors.items():
        assert other.auxiliary_losses[name].item() == pytest.approx(
            factor * one.auxiliary_losses[name].item(), rel=1e-5
        )
    ranking = one.loss - one.auxiliary_loss
    expected = 0.1 * ranking + sum(other.auxiliary_losses.values())
    assert other.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_terms_are_those_of_both_modalities(cdds, batch):
    """Integrity by hand: what the weighted components leave of the tokens, semantic or sampled."""
    model = cdds(integrity_weight=0.5)
    head = model.alignment_head
    captured = {}
    plain = head.auxiliary_losses
    head.auxiliary_losses = lambda image, text: captured.update(image=image, text=text) or plain(image, text)
    with torch.no_grad():
        head.component_weights.copy_(torch.tensor([0.2, 0.3, 0.4]))
        losses = model(**batch, return_loss=True).auxiliary_losses
        expected = {"integrity": 0.0, "sampled_integrity": 0.0}
        sides = captured["image"], captured["text"]
        for side, unet, of_other in zip(sides, (head.image_unet, head.text_unet), head._sample(*sides), strict=True):
            # Unit root mean square, whatever the backbone gives.
            torch.testing.assert_close(side.tokens.square().mean(dim=-1), torch.ones_like(side.tokens[..., 0]))
            rest = side.tokens - 0.2 * unet.decode(unet.modality_decoder, side.encoded)
            expected["integrity"] += 0.5 * (rest - 0.3 * side.semantic)[side.mask].square().mean()
            expected["sampled_integrity"] += 0.5 * (rest - 0.4 * of_other)[side.mask].square().mean()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_the_printed_objective_does_not_know_which_text_belongs_to_which_image(cdds, batch):
    """Hence the loss of the pairs beside it."""
    model = cdds()
    exchanged = {**batch, **{name: batch[name][[2, 0, 1]] for name in ("input_ids", "attention_mask")}}
    with torch.no_grad():
        matched, mixed = (model(**inputs, return_loss=True) for inputs in (batch, exchanged))
    assert mixed.auxiliary_loss.item() == pytest.approx(matched.auxiliary_loss.item(), rel=1e-5)
    assert abs(mixed.loss.item() - matched.loss.item()) > 1e-3


def test_either_side_is_sampled_from_the_related_columns_of_the_other(cdds):
    """Image columns around 0, 5 and 9; text columns around 9.1, 0.1 and 5.1, for two images and texts of 3 tokens."""
    head = cdds(embedding_dim=3, unet_num_heads=1).alignment_head
    spread = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1)
    order = torch.tensor([[0, 1, 2], [2, 0, 1]])
    values_v = torch.stack([spread[row] for row in order]) + torch.tensor([0.0, 5.0, 9.0])
    values_t = torch.stack([spread[row] for row in order.flip(0)]) + torch.tensor([9.1, 0.1, 5.1])
    values_t[1, 2] = 99.0  # padding
    mask = torch.ones(2, 3, dtype=torch.bool)
    words = mask.clone()
    words[1, 2] = False
    image = DecoupledSide(values_v, values_v, None, mask)
    text = DecoupledSide(values_t, values_t, None, words)
    with torch.no_grad():
        for threshold in (head.image_threshold, head.text_threshold):
            threshold.fill_(9.0)
        sampled_v, sampled_t = head._sample(image, text)
    # In the words' values of the column around the same place, in the patches' order; padding stays out of it.
    assert sampled_v.argsort(dim=1)[..., 0].equal(values_v.argsort(dim=1)[..., 0])
    for sampled, values, permutation in (
        (sampled_v, values_t[words], [1, 2, 0]),
        (sampled_t, values_v[mask], [2, 0, 1]),
    ):
        real = sampled[mask] if sampled is sampled_v else sampled[words]
        torch.testing.assert_close(real.amin(dim=0), values.amin(dim=0)[permutation])
        torch.testing.assert_close(real.amax(dim=0), values.amax(dim=0)[permutation])
    assert not sampled_t[1, 2].any()


@pytest.mark.parametrize("ranking_weight", [0.0, 1.0])
def test_every_parameter_of_the_head_gets_a_gradient(cdds, batch, ranking_weight):
    model = cdds(ranking_weight=ranking_weight).train()
    model(**batch, return_loss=True).loss.backward()
    for name, parameter in model.alignment_head.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_gradients_of_the_printed_objective_reach_the_towers_and_both_sides_of_sampling(cdds, batch):
    model = cdds(ranking_weight=0.0, modality_weight=0.0, integrity_weight=0.0)
    losses = model(**batch, return_loss=True).auxiliary_losses
    for name in ("semantic", "sampled_integrity"):
        model.zero_grad()
        losses[name].backward(retain_graph=True)
        for part in (model.vision_model, model.text_model, model.alignment_head.text_unet.semantic_decoder):
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters()), name


def test_autocast_keeps_losses_in_float32(cdds, batch):
    model = cdds().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, return_loss=True)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in outputs.auxiliary_losses.values())
    outputs.loss.backward()


# PICO on top


def test_column_weights_apply_to_semantic_components(cdds, use_prototypes, batch):
    plain, weighted = cdds(), cdds(semantic_probability=True)
    assert plain.style_prototypes is None
    weighted.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        neutral = weighted(**batch)
        torch.testing.assert_close(neutral.logits_per_image, plain(**batch).logits_per_image)
        use_prototypes(weighted)
        outputs = weighted(**batch)
        torch.testing.assert_close(outputs.image_tokens, neutral.image_tokens)
        prototypes = weighted.style_prototypes["image"]
        expected, probability = prototypes.weight_tokens(outputs.image_tokens, outputs.image_mask)
    assert torch.equal(outputs.image_embeds, expected) and probability.std() > 0.01
    assert torch.equal(outputs.image_semantic_probability, probability)


# Saving and loading


@pytest.fixture(scope="module")
def folder(cdds, use_prototypes, tiny_processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("cdds")
    use_prototypes(cdds(semantic_probability=True)).save_pretrained(path)
    tiny_processor.save_pretrained(path)
    return path


def test_auto_classes_load_it_whole(folder, cdds, use_prototypes, batch):
    source = use_prototypes(cdds(semantic_probability=True))
    model = AutoModel.from_pretrained(folder)
    assert type(model) is CddsModel and isinstance(AutoProcessor.from_pretrained(folder), PicoProcessor)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.alignment_head.image_unet.noise_layer.linear1.weight.dtype == torch.bfloat16
    assert half.style_prototypes["text"].prototypes.dtype == torch.float32
    with torch.no_grad():
        # Weights of a file lie elsewhere in memory, and products of matrices then round otherwise.
        torch.testing.assert_close(model(**batch).logits_per_image, source(**batch).logits_per_image)
        assert half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits_per_image.isfinite().all()


def test_a_pico_checkpoint_is_a_start(tiny_model, tmp_path):
    source = tiny_model(method="fine_grained")
    source.save_pretrained(tmp_path)
    model, info = CddsModel.from_pretrained(tmp_path, noise_groups=3, output_loading_info=True)
    assert (model.config.noise_groups, model.config.unet_num_heads, model.config.method) == (3, 1, "cdds")
    assert all(name.startswith("alignment_head.") for name in info["missing_keys"]) and not info["unexpected_keys"]
    own = model.alignment_head
    assert torch.equal(own.visual_projection.weight, source.alignment_head.visual_projection.weight)
    assert torch.equal(own.component_weights, torch.full((3,), 0.5))
    assert torch.equal(own.image_unet.semantic_decoder.projections[1].weight, torch.eye(12).repeat(1, 2) / 2)
    assert own.text_unet.encoder[0].self_attn.in_proj_weight.std() > 0.01


def test_a_checkpoint_is_a_start_of_pico_with_nothing_of_its_own(cdds, tmp_path):
    cdds(ranking_weight=0.0, semantic_probability=True, margin=2.0).save_pretrained(tmp_path)
    model = PicoModel.from_pretrained(tmp_path, method="fine_grained")
    found = model.config.to_dict()
    assert (model.config.ranking_weight, found["margin"], found["embedding_dim"]) == (1.0, 2.0, 12)
    own = {"ranking_weight", "semantic_probability", "auto_map", "threshold_init", "unet_num_layers"}
    assert not own & found.keys()
    with pytest.raises(ValueError, match="`ranking_weight` is no option of PicoConfig"):
        PicoConfig(ranking_weight=-3)


def test_it_runs_without_the_package(folder, batch, tmp_path, run_without_package):
    model = CddsModel.from_pretrained(folder)
    with torch.no_grad():
        torch.save({"batch": batch, "logits": model(**batch).logits_per_image}, tmp_path / "expected.pt")
    output = run_without_package(
        """
        import torch
        from PIL import Image
        from transformers import AutoModel, AutoProcessor, pipeline

        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert type(model).__name__ == "CddsModel" and type(model).__module__.startswith("transformers_modules")
        expected = torch.load(sys.argv[2])
        with torch.no_grad():
            assert torch.equal(model(**expected["batch"]).logits_per_image, expected["logits"])
        assert type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__ == "PicoProcessor"
        classify = pipeline("zero-shot-image-classification", model=sys.argv[1], trust_remote_code=True)
        assert len(classify(Image.new("RGB", (16, 16)), candidate_labels=["red", "blue"])) == 2
        print("equal")
        """,
        folder,
        tmp_path / "expected.pt",
    )
    assert output.strip().endswith("equal")


# What transformers asks of every model


CHECKS = [
    conformance.test_saved_twice_and_loaded_twice,
    conformance.test_an_empty_checkpoint_gives_a_freshly_initialised_model,
    conformance.test_a_meta_model_gets_its_buffers_from_init_weights,
    conformance.test_every_tensor_is_a_parameter_or_a_buffer,
    conformance.test_configuration_round_trip,
    conformance.test_outputs,
    conformance.test_hidden_states_and_attentions,
    conformance.test_attention_implementations_agree_and_can_be_switched,
    functools.partial(conformance.test_every_trainable_parameter_gets_a_gradient, options={}),
    functools.partial(conformance.test_gradient_checkpointing_gives_the_same_gradients, use_reentrant=False),
    conformance.test_embeddings,
]


@pytest.mark.parametrize("towers", [("clip", "clip"), ("vit", "bert")], ids="-".join)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: getattr(check, "func", check).__name__)
def test_conformance(check, towers, monkeypatch, tmp_path):
    build = conformance.build
    monkeypatch.setattr(
        conformance, "build", lambda *names: build(*names, unet_num_heads=2, semantic_probability=True)
    )
    monkeypatch.setattr(conformance, "PicoModel", CddsModel)
    monkeypatch.setattr(conformance, "PicoConfig", CddsConfig)
    # Two models are compared, and noise would tell them apart.
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    conformance._model.cache_clear()
    wanted = inspect.signature(check).parameters
    check(*towers, **({"tmp_path": tmp_path} if "tmp_path" in wanted else {}))
    conformance._model.cache_clear()


def test_a_copy_is_independent(cdds, batch):
    model = cdds()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.alignment_head.image_unet.encoder[0].linear1.weight.zero_()
        assert not torch.equal(model(**batch).logits_per_image, other(**batch).logits_per_image)
