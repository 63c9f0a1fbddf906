"""Images of one look, moved at the tower's outputs to where images of training lie; against plain numpy in float64."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, LevitConfig, ResNetConfig

from modeling_pico import GalleryAlignment, PicoConfig, PicoModel
from modeling_pico.evaluation import measure_gallery
from modeling_pico.model.gallery_alignment_pico import (
    MIN_IMAGES,
    FeatureMoments,
    ImageMoments,
    check_sizes,
    measure_galleries,
    moved_layers,
    spread_rows,
)
from modeling_pico.model.modeling_pico import TokenStates


HIDDEN = 6


def some_states(images: int, seed: int, class_state: bool = False) -> TokenStates:
    """Images of one to four tokens whose features differ in mean and spread; padding is absurd."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(images, 4, HIDDEN, generator=generator) * torch.linspace(0.5, 3, HIDDEN) + 10 * seed
    mask = torch.arange(4) < torch.randint(1, 5, (images, 1), generator=generator)
    states[~mask] = torch.nan
    own = torch.randn(images, HIDDEN, generator=generator) * 2 - seed if class_state else None
    return TokenStates(states, mask, own)


def moved_by_numpy(values: np.ndarray, gallery: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    values, gallery, reference = (array.astype(np.float64) for array in (values, gallery, reference))
    return (values - gallery.mean(0)) / gallery.std(0) * reference.std(0) + reference.mean(0)


def fitted(states: TokenStates, class_state: bool = False) -> ImageMoments:
    moments = ImageMoments(HIDDEN, class_state)
    moments.fit(measure_galleries([states]))
    return moments


# Moments


def test_moments_do_not_depend_on_batches():
    states = some_states(60, 1)
    values = states.states[states.mask].double().numpy()
    batches = [TokenStates(states.states[part], states.mask[part]) for part in torch.arange(60).split(7)]
    for given in ([states], batches, batches[::-1]):
        moments = measure_galleries(given)[None]
        assert (moments.images, moments.tokens.count, moments.class_state) == (60, len(values), None)
        np.testing.assert_allclose(moments.tokens.mean, values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(moments.tokens.std, values.std(0), rtol=1e-6)


def test_a_small_spread_around_a_large_mean_keeps_its_digits():
    values = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) / 8 + 3000
    merged = FeatureMoments.of(values[:17])
    for part in values[17:].split(499):
        merged = merged.merge(FeatureMoments.of(part))
    np.testing.assert_allclose(merged.std, values.double().numpy().std(0), rtol=1e-5)


def test_nothing_has_no_part_in_moments():
    values = FeatureMoments.of(torch.tensor([[1.0], [3.0]]))
    nothing = FeatureMoments.of(torch.zeros(0, 1))
    for merged in (values.merge(nothing), nothing.merge(values)):
        assert (merged.count, float(merged.mean), float(merged.std)) == (2, 2.0, 1.0)


def test_half_precision_is_measured_in_float32():
    states = (torch.full((40, 300, 1), 300.0) + torch.arange(300)[:, None] % 2).half()
    moments = measure_galleries([TokenStates(states, torch.ones(40, 300))])[None].tokens
    assert (float(moments.mean), float(moments.std)) == (300.5, 0.5)


# Moving


@pytest.mark.parametrize("class_state", [False, True])
def test_moving_is_that_of_the_definition(class_state):
    reference, gallery = some_states(50, 1, class_state), some_states(40, 2, class_state)
    alignment = fitted(reference, class_state).align(measure_galleries([gallery]))
    moved = alignment(gallery)
    values = gallery.states[gallery.mask].numpy()
    expected = moved_by_numpy(values, values, reference.states[reference.mask].numpy())
    np.testing.assert_allclose(moved.states[gallery.mask].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert moved.mask is gallery.mask
    if class_state:
        # By moments of its own: it is not distributed as the patches are.
        own = gallery.class_state.numpy()
        expected = moved_by_numpy(own, own, reference.class_state.numpy())
        np.testing.assert_allclose(moved.class_state.numpy(), expected, rtol=1e-4, atol=1e-4)
    # An image that is added later moves as the gallery did.
    later = some_states(1, 3, class_state)
    expected = moved_by_numpy(later.states[later.mask].numpy(), values, reference.states[reference.mask].numpy())
    np.testing.assert_allclose(alignment(later).states[later.mask].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_reference_stays_where_it_is():
    reference = some_states(50, 1, True)
    moved = fitted(reference, True).align(measure_galleries([reference]))(reference)
    torch.testing.assert_close(moved.states, reference.states, equal_nan=True)
    torch.testing.assert_close(moved.class_state, reference.class_state)


def test_a_feature_that_never_varies_has_only_a_mean():
    reference, gallery = some_states(50, 1), some_states(40, 2)
    # Float32 holds 0.1 with an error, which is no spread.
    gallery.states[..., 0], gallery.states[..., 1], reference.states[..., 2] = 0.0, 1000.1, -3.0
    moments = fitted(reference)
    moved = moments.align(measure_galleries([gallery]))(gallery).states[gallery.mask]
    torch.testing.assert_close(moved[:, 0], moments.mean[0].expand(len(moved)))
    torch.testing.assert_close(moved[:, 1], moments.mean[1].expand(len(moved)))
    torch.testing.assert_close(moved[:, 2], torch.full((len(moved),), -3.0))
    # Later images may differ from it, by no more than they do.
    later = gallery.states[gallery.mask][:1].clone()
    later[:, 0] = 5.0
    mask = torch.ones(1, 1, dtype=torch.bool)
    again = moments.align(measure_galleries([gallery]))(TokenStates(later[None], mask)).states
    torch.testing.assert_close(again[0, 0, 0], moments.mean[0] + 5)


def test_each_style_is_moved_by_itself():
    reference, ink, oil = some_states(50, 1), some_states(40, 2), some_states(33, 3)
    # In turns, over batches that hold both and one that holds one.
    styles = ["ink", "oil"] * 33 + ["ink"] * 7
    order = torch.tensor([index // 2 + 40 * (index % 2) if index < 66 else index - 33 for index in range(73)])
    mixed = TokenStates(torch.cat([ink.states, oil.states])[order], torch.cat([ink.mask, oil.mask])[order])
    batches = [TokenStates(mixed.states[part], mixed.mask[part]) for part in torch.arange(73).split(10)]
    moments = fitted(reference)
    alignment = moments.align(measure_galleries(batches, styles))
    assert alignment.styles == ("ink", "oil")
    moved = alignment.for_images(styles)(mixed)
    for style, states in (("ink", ink), ("oil", oil)):
        rows = torch.tensor([label == style for label in styles])
        expected = moments.align(measure_galleries([states]))(states).states
        torch.testing.assert_close(moved.states[rows], expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"for_images\(styles\)"):
        alignment(mixed)
    with pytest.raises(ValueError, match=r"no style \['pencil'\], but \['ink', 'oil'\]"):
        alignment.for_images(["ink", "pencil"])
    with pytest.raises(ValueError, match="the style of each image must be given"):
        alignment.for_images(None)
    with pytest.raises(ValueError, match="was measured without styles, so no style may"):
        moments.align(measure_galleries([ink])).for_images(["ink"])


def test_half_precision_stays_half_precision():
    reference, gallery = some_states(50, 1), some_states(40, 2)
    alignment = fitted(reference).align(measure_galleries([gallery]))
    half = alignment(TokenStates(gallery.states.half(), gallery.mask)).states
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), alignment(gallery).states, rtol=5e-3, atol=0.1, equal_nan=True)


# What is refused


def test_galleries_that_are_too_small_are_refused_by_name():
    moments, small = fitted(some_states(50, 1)), some_states(MIN_IMAGES - 1, 2)
    with pytest.raises(ValueError, match=rf"gallery has {MIN_IMAGES - 1} image\(s\); mean and spread need at least"):
        moments.align(measure_galleries([small]))
    with pytest.raises(ValueError, match="gallery has 0"):
        moments.align({})
    moments.align(measure_galleries([some_states(MIN_IMAGES, 2)]))
    sizes = {"ink": 40, "oil": 5, "neon": 7}
    with pytest.raises(ValueError, match=r"has 5 image\(s\) of the style 'oil', and 1 other style"):
        check_sizes(sizes)
    # Or they stay where they are.
    alignment = moments.align(measure_galleries([small], ["oil"] * len(small.states)), leave_small=True)
    moved = alignment.for_images(["oil"] * len(small.states))(small)
    torch.testing.assert_close(moved.states, small.states, equal_nan=True, rtol=0, atol=0)


def test_a_model_without_moments_says_what_to_do():
    moments = ImageMoments(HIDDEN, False)
    assert not moments.is_fitted
    with pytest.raises(ValueError, match=r"no moments of training .* `model.fit_alignment\(batches\)`"):
        moments.align(measure_galleries([some_states(40, 1)]))
    with pytest.raises(ValueError, match=r"reference has 31 image\(s\)"):
        moments.fit(measure_galleries([some_states(31, 1)]))
    moments.fit(measure_galleries([some_states(40, 1)]))
    assert moments.is_fitted and int(moments.count) == 40
    moments.reset()
    assert not moments.is_fitted and not moments.std.any()


def test_states_that_are_not_finite_are_refused():
    reference, broken = some_states(50, 1), some_states(40, 2)
    broken.states[3, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite for images of the style 'ink'"):
        fitted(reference).align(measure_galleries([broken], ["ink"] * 40))
    with pytest.raises(ValueError, match="NaN or infinite for images"):
        fitted(broken)


def test_every_image_has_one_style():
    batches = [some_states(20, 1), some_states(20, 2)]
    for count in (10, 30, 41):
        with pytest.raises(ValueError, match="one style for each image"):
            measure_galleries(batches, ["ink"] * count)


def test_rows_that_say_where_a_gallery_lies():
    assert spread_rows([None] * 3) == [0, 1, 2]
    assert spread_rows([None] * 10, 4) == [0, 2, 5, 7]
    # Of each style as many, however rare it is.
    assert spread_rows(["ink"] * 8 + ["oil"] * 3, 2) == [0, 4, 8, 9]


# In the model


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * seed + seed - 1


@pytest.fixture(params=["mean", "class_token"])
def model(request, tiny_model) -> PicoModel:
    return tiny_model(pooling=request.param)


def test_model_moves_what_its_tower_gives(model):
    known, gallery = pictures(50, 1), pictures(40, 2)
    model.train()
    model.fit_alignment([{"pixel_values": known[:20]}, {"pixel_values": known[20:], "image_ids": torch.arange(30)}])
    alignment = model.align({"pixel_values": part} for part in gallery.split(9))
    assert isinstance(alignment, GalleryAlignment) and model.training
    model.eval()
    with torch.no_grad():
        of_known, of_gallery = model.get_image_states(known), model.get_image_states(gallery)
        moved = alignment(of_gallery)
        outputs = model(pixel_values=gallery, image_alignment=alignment, return_states=True)
        features = model.get_image_features(gallery, alignment=alignment)
        given = model(image_states=moved.states, image_class_state=moved.class_state)
        cached = {"image_states": of_gallery.states}
        if of_gallery.class_state is not None:
            cached["image_class_state"] = of_gallery.class_state
        from_states = model(**cached, image_alignment=model.align([cached]))
        plain = model(pixel_values=gallery)
    expected = moved_by_numpy(*(s.states.flatten(0, 1).numpy() for s in (of_gallery, of_gallery, of_known)))
    np.testing.assert_allclose(outputs.image_states.states.flatten(0, 1).numpy(), expected, atol=1e-5)
    if model.config.pooling == "class_token":
        own = [s.class_state.numpy() for s in (of_gallery, of_gallery, of_known)]
        np.testing.assert_allclose(outputs.image_states.class_state.numpy(), moved_by_numpy(*own), atol=1e-5)
    for tokens in (outputs.image_embeds, features.embeds, from_states.image_embeds):
        torch.testing.assert_close(tokens, given.image_embeds)
    assert not torch.allclose(plain.image_embeds, given.image_embeds, atol=0.01)
    assert plain.image_states is None


def test_class_token_alone_is_moved_for_a_pooled_score(tiny_model):
    model = tiny_model(method="clip_style", pooling="class_token")
    known, gallery = pictures(50, 1), pictures(40, 2)
    model.fit_alignment([{"pixel_values": known}])
    with torch.no_grad():
        moved = model.get_image_features(gallery, alignment=model.align([{"pixel_values": gallery}])).pooler_output
        state = model.get_image_states(gallery).class_state.numpy()
        expected = moved_by_numpy(state, state, model.get_image_states(known).class_state.numpy())
        expected = model.alignment_head.project(torch.from_numpy(expected).float(), "image")
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_kept_states_without_that_of_the_class_token_are_refused_where_it_is_scored(tiny_model):
    model = tiny_model(method="clip_style", pooling="class_token")
    inputs = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    with torch.no_grad():
        image, text = model.get_image_states(pictures(40, 1)), model.get_text_states(**inputs)
        whole = model(pixel_values=pictures(40, 1), **inputs).logits_per_image
        states = {"image_states": image.states, "text_states": text.states}
        class_states = {"image_class_state": image.class_state, "text_class_state": text.class_state}
        torch.testing.assert_close(model(**states, **class_states).logits_per_image, whole)
        for modality in ("image", "text"):
            with pytest.raises(ValueError, match=f"give `{modality}_class_state` beside `{modality}_states`"):
                model(**states, **{**class_states, f"{modality}_class_state": None})
        with pytest.raises(ValueError, match="give `image_class_state`"):
            model.fit_alignment([{"image_states": image.states}])


def test_moments_are_saved_with_the_model(model, tmp_path):
    model.fit_alignment([{"pixel_values": pictures(50, 1)}])
    model.save_pretrained(tmp_path)
    loaded, info = PicoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for name, buffer in model.image_moments.named_buffers():
        assert torch.equal(dict(loaded.image_moments.named_buffers())[name], buffer)
    half = PicoModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert torch.equal(half.image_moments.mean, model.image_moments.mean)
    assert half.image_moments.count.dtype == torch.int64
    # They are no weights.
    assert not any("image_moments" in name for name, _ in model.named_parameters())


def test_another_pooling_needs_moments_of_its_own(tiny_model, tmp_path):
    model = tiny_model()
    model.fit_alignment([{"pixel_values": pictures(50, 1)}])
    model.save_pretrained(tmp_path)
    loaded = PicoModel.from_pretrained(tmp_path, pooling="class_token")
    with pytest.raises(ValueError, match="no moments of the class token"):
        loaded.align([{"pixel_values": pictures(40, 2)}])


def test_what_is_no_batch_is_refused(tiny_model):
    model = tiny_model()
    for wrong in ({"pixel_values": pictures(40, 1)}, pictures(40, 1)):
        with pytest.raises(ValueError, match="given as batches"):
            model.fit_alignment(wrong)
    with pytest.raises(ValueError, match="no moments of training"):
        model.align([])


# Before batch normalisation


@pytest.fixture
def with_batch_norm() -> PicoModel:
    """A convolutional tower whose statistics of pretraining are those of other images."""
    torch.manual_seed(0)
    vision = ResNetConfig(
        num_channels=3, embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", hidden_act="relu"
    )
    text = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = PicoModel(PicoConfig(vision_config=vision, text_config=text, embedding_dim=4)).eval()
    for layer in moved_layers(model.vision_model).values():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model


Moments = dict[str, FeatureMoments]


def given_to_layers(model: PicoModel, images: torch.Tensor, **options) -> tuple[Moments, Moments]:
    """Moments of what layers of batch normalisation are given, before it is moved and after; of the outputs, after."""
    before: Moments = {}
    after: Moments = {}

    def measure(name, layer, inputs, output=None) -> None:
        (before if output is None else after)[name] = FeatureMoments.of(*inputs)

    hooks = []
    for name, layer in moved_layers(model.vision_model).items():
        hooks.append(layer.register_forward_pre_hook(partial(measure, name)))
        hooks.append(layer.register_forward_hook(partial(measure, name)))
    with torch.no_grad():
        states = model(pixel_values=images, return_states=True, **options).image_states.states
    for hook in hooks:
        hook.remove()
    return before, {**after, "outputs": FeatureMoments.of(states.flatten(0, 1))}


def test_every_layer_of_batch_normalisation_is_moved_as_far_as_the_first_one_finds_the_gallery(with_batch_norm):
    known, gallery = pictures(50, 1), pictures(40, 2)
    with_batch_norm.fit_alignment([{"pixel_values": known}])
    _, training = given_to_layers(with_batch_norm, known)
    _, plain = given_to_layers(with_batch_norm, gallery)
    alignment = with_batch_norm.align([{"pixel_values": gallery}])
    assert alignment.layers.keys() == training.keys() - {"outputs"} and len(alignment.layers) > 3
    before, after = given_to_layers(with_batch_norm, gallery, image_alignment=alignment)
    close = {"rtol": 1e-4, "atol": 1e-4}
    # Fréchet distance of two normal distributions, over the variance of training, before anything is moved.
    first = next(iter(alignment.layers))
    parts = ("mean", "std")
    squares = [(getattr(plain[first], part) - getattr(training[first], part)).square().sum() for part in parts]
    distance = (sum(squares) / training[first].std.square().sum()).item()
    strength = 0.5 * distance / (distance + 0.15)
    assert 0.05 < strength < 0.49
    for name, found in before.items():
        wanted = training[name]
        assert (found.mean - wanted.mean).abs().max() > 0.01
        scale = (wanted.std / found.std) ** strength
        torch.testing.assert_close(after[name].std, found.std * scale, **close)
        mean = wanted.mean + (found.mean - wanted.mean) * (1 - strength) * scale
        torch.testing.assert_close(after[name].mean, mean, **close)
    # The outputs go all of it.
    for part in ("mean", "std"):
        torch.testing.assert_close(*(getattr(of["outputs"], part) for of in (after, training)), **close)
    # Afterwards the tower is as before.
    for name, moments in given_to_layers(with_batch_norm, gallery)[1].items():
        torch.testing.assert_close(moments.mean, plain[name].mean)
    # Images of training stay where they are.
    same = with_batch_norm.align([{"pixel_values": known}])
    with torch.no_grad():
        moved = with_batch_norm.get_image_features(known, alignment=same).embeds
        torch.testing.assert_close(moved, with_batch_norm.get_image_features(known).embeds, rtol=0, atol=1e-4)


def test_the_first_third_of_the_layers_is_left_alone(with_batch_norm):
    tower = with_batch_norm.vision_model
    layers = [name for name, layer in tower.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(layers) == 6 and list(moved_layers(tower)) == layers[2:]


def test_each_style_is_moved_by_itself_in_layers_too(with_batch_norm):
    known, ink, oil = pictures(50, 1), pictures(40, 2), pictures(40, 3)
    with_batch_norm.fit_alignment([{"pixel_values": known}])
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    mixed, styles = torch.cat([ink, oil])[order], [["ink", "oil"][row // 40] for row in order.tolist()]
    alignment = with_batch_norm.align([{"pixel_values": mixed}], styles)
    with torch.no_grad():
        found = with_batch_norm.get_image_features(mixed, alignment=alignment.for_images(styles)).embeds
        for style in ("ink", "oil"):
            rows = torch.tensor([other == style for other in styles])
            alone = with_batch_norm.align([{"pixel_values": mixed[rows]}])
            wanted = with_batch_norm.get_image_features(mixed[rows], alignment=alone).embeds
            torch.testing.assert_close(found[rows], wanted, rtol=0, atol=1e-4)


def test_small_batches_pass_the_tower_together(with_batch_norm):
    known, gallery = pictures(50, 1), pictures(90, 2)
    with_batch_norm.fit_alignment([{"pixel_values": part} for part in known.split(9)])
    whole = with_batch_norm.align([{"pixel_values": gallery}])
    parts = with_batch_norm.align([{"pixel_values": part} for part in gallery.split(8)])
    for name, maps in whole.layers.items():
        for found, wanted in zip(parts.layers[name], maps, strict=True):
            assert torch.equal(found, wanted)


def test_a_gallery_larger_than_what_passes_together_is_moved_nearly_alike(with_batch_norm):
    gallery = pictures(600, 2)
    with_batch_norm.fit_alignment([{"pixel_values": pictures(50, 1)}])
    whole = with_batch_norm.align([{"pixel_values": gallery}])
    parts = with_batch_norm.align([{"pixel_values": part} for part in gallery.split(100)])
    with torch.no_grad():
        states = [with_batch_norm.get_image_states(gallery[:50], alignment=way).states for way in (whole, parts)]
    assert (states[1] - states[0]).norm() < 0.05 * states[0].norm()


def test_a_layer_that_never_runs_is_left_alone(with_batch_norm):
    model = with_batch_norm
    # Known to the moments, as a head of a tower that is not used is.
    layers = {**model.image_moments.layers, "pooler_norm": 3}
    model.image_moments = ImageMoments(8, False, layers)
    model.fit_alignment([{"pixel_values": pictures(50, 1)}])
    assert not model.image_moments.has_layer("pooler_norm")
    assert model.align([{"pixel_values": pictures(40, 2)}]).layers.keys() == layers.keys() - {"pooler_norm"}


def test_styles_of_each_image_must_be_given_before_layers_are_moved(with_batch_norm):
    with_batch_norm.fit_alignment([{"pixel_values": pictures(50, 1)}])
    alignment = with_batch_norm.align([{"pixel_values": pictures(80, 2)}], ["ink", "oil"] * 40)
    with pytest.raises(ValueError, match="is moved by `for_images"):
        with_batch_norm.get_image_features(pictures(8, 2), alignment=alignment)


def test_moments_of_layers_are_saved_and_kept_states_do_without(with_batch_norm, tmp_path):
    known, gallery = pictures(50, 1), pictures(40, 2)
    with_batch_norm.fit_alignment([{"pixel_values": known}])
    with_batch_norm.save_pretrained(tmp_path)
    loaded = PicoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.image_moments.layer_std, with_batch_norm.image_moments.layer_std)
    assert all(map(loaded.image_moments.has_layer, loaded.image_moments.layers))
    with torch.no_grad():
        kept = {"image_states": loaded.get_image_states(gallery).states}
        alignment = loaded.align([kept])
        assert not alignment.layers and loaded(**kept, image_alignment=alignment).image_embeds is not None
        with pytest.raises(ValueError, match="do not run where `image_states` are given"):
            loaded(**kept, image_alignment=loaded.align([{"pixel_values": gallery}]))
    # Moments that were taken of kept states know nothing of layers.
    loaded.fit_alignment([{"image_states": with_batch_norm.get_image_states(known).states.detach()}])
    assert not any(map(loaded.image_moments.has_layer, loaded.image_moments.layers))
    assert not loaded.align([{"pixel_values": gallery}]).layers


def test_a_layer_that_runs_several_times_is_measured_by_all_that_it_is_given():
    tower = torch.nn.Sequential(torch.nn.BatchNorm2d(HIDDEN)).eval()
    maps = torch.randn(2, 3, 20, HIDDEN, 2, 2, generator=torch.Generator().manual_seed(0))

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = tower

        def forward(self, pixel_values):
            return self.layers(2 * self.layers(pixel_values))

    twice = Twice()

    def states():
        for part in maps[0]:
            twice(pixel_values=part)
            yield some_states(20, 1)

    found = measure_galleries(states(), tower=twice)[None].layers["layers.0"]
    with torch.no_grad():
        expected = FeatureMoments.of(torch.cat([*maps[0], *(2 * tower(part) for part in maps[0])]))
    assert found.count == expected.count == 2 * 60 * 4
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.std, expected.std)


def test_layers_of_tokens_are_moved_by_the_style_of_their_image():
    torch.manual_seed(0)
    vision = LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    text = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = PicoModel(PicoConfig(vision_config=vision, text_config=text, embedding_dim=4)).eval()
    known, ink, oil = (pictures(40, seed).repeat(1, 1, 4, 4) for seed in (1, 2, 3))
    model.fit_alignment([{"pixel_values": known}])
    styles = ["ink", "oil"] * 40
    mixed = torch.stack([ink, oil], dim=1).flatten(0, 1)
    alignment = model.align([{"pixel_values": mixed}], styles)
    alone = model.align([{"pixel_values": ink}])
    for name, maps in alone.layers.items():
        for found, wanted in zip(alignment.layers[name], maps, strict=True):
            torch.testing.assert_close(found[:1], wanted, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        found = model.get_image_states(mixed, alignment=alignment.for_images(styles)).states[::2]
        torch.testing.assert_close(found, model.get_image_states(ink, alignment=alone).states, rtol=1e-3, atol=1e-3)


def test_a_compiled_tower_is_measured_as_any_other(with_batch_norm):
    known, gallery = pictures(50, 1), pictures(40, 2)
    with_batch_norm.fit_alignment([{"pixel_values": known}])
    expected, moments = (
        with_batch_norm.align([{"pixel_values": gallery}]),
        copy.deepcopy(with_batch_norm.image_moments),
    )
    with_batch_norm.vision_model.compile(backend="eager")
    with torch.no_grad():
        with_batch_norm.get_image_features(known)
    with_batch_norm.fit_alignment([{"pixel_values": known}])
    torch.testing.assert_close(with_batch_norm.image_moments.layer_std, moments.layer_std)
    found = with_batch_norm.align([{"pixel_values": gallery}])
    assert found.layers.keys() == expected.layers.keys() and found.layers
    for name, maps in expected.layers.items():
        torch.testing.assert_close(found.layers[name], maps)


def test_layers_that_do_not_run_are_not_passed_over(with_batch_norm):
    with_batch_norm.fit_alignment([{"pixel_values": pictures(50, 1)}])
    alignment = with_batch_norm.align([{"pixel_values": pictures(40, 2)}])
    with_batch_norm.vision_model.add_module("unused", torch.nn.BatchNorm2d(3))
    alignment.layers["unused"] = torch.ones(1, 3), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="layers of the tower that do not run here"):
        with_batch_norm.get_image_features(pictures(4, 2), alignment=alignment)


def test_the_nearer_a_gallery_lies_the_less_layers_are_moved(with_batch_norm):
    known, others = pictures(800, 1).split(400)
    with_batch_norm.fit_alignment([{"pixel_values": known}])
    spread = {}
    for brightness in (0.0, 0.1, 1.0):
        gallery = others + brightness
        alignment = with_batch_norm.align([{"pixel_values": gallery}])
        name, (scale, shift) = next(iter(alignment.layers.items()))
        spread[brightness] = (scale.log().abs() + shift.abs()).sum().item()
    assert spread[0.0] < 0.1 * spread[0.1] < 0.1 * spread[1.0]


def test_a_list_of_batches_runs_the_tower_as_often_as_on_the_other_processes(with_batch_norm):
    """Which have three batches; how many of them they would join, this process cannot know."""
    images = torch.randn(100, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with_batch_norm.fit_alignment([{"pixel_values": images}])
    runs = []
    with_batch_norm.vision_model.register_forward_pre_hook(lambda *given: runs.append(1))
    measure_gallery(with_batch_norm, [{"pixel_values": images}], target=with_batch_norm.image_moments, num_batches=3)
    assert len(runs) == 3
