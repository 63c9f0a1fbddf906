from __future__ import annotations

import pytest
import torch

from modeling_pico import RetrievalEvaluator, match_moments, pair_scores
from modeling_pico.evaluation import EncodedRetrieval


def some_images(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Six images of one to four real tokens with eight features."""
    tokens = torch.nn.functional.normalize(torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return tokens, torch.arange(4) < torch.tensor([4, 3, 2, 4, 1, 4])[:, None]


def test_a_shift_and_a_scale_of_features_are_undone():
    tokens, mask = some_images()
    shifted = tokens * torch.linspace(0.5, 3, 8) + torch.linspace(-1, 1, 8)
    # Its own tokens in the direction of the reference's, each as long as it was.
    expected = tokens * shifted.norm(dim=-1, keepdim=True) * mask.unsqueeze(-1)
    torch.testing.assert_close(match_moments(shifted, mask, tokens, mask), expected)
    # Padding has no part in the moments.
    shifted[~mask] = torch.nan
    tokens = tokens.masked_fill(~mask.unsqueeze(-1), -7.0)
    torch.testing.assert_close(match_moments(shifted, mask.int(), tokens, mask), expected)


def test_images_of_the_reference_stay_where_they_are():
    tokens, mask = some_images()
    torch.testing.assert_close(match_moments(tokens, mask, tokens, mask), tokens * mask.unsqueeze(-1))


def test_moments_become_those_of_the_reference():
    (tokens, mask), (reference, _) = some_images(1), some_images(2)
    # Tokens of equal length in either set, so that keeping lengths is no scaling of its own.
    values = (tokens - tokens[mask].mean(dim=0)) / tokens[mask].std(dim=0, correction=0)
    moved = values * reference[mask].std(dim=0, correction=0) + reference[mask].mean(dim=0)
    aligned = match_moments(tokens, mask, reference, mask)
    cosine = torch.nn.functional.cosine_similarity(aligned, moved, dim=-1)[mask]
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(aligned.norm(dim=-1)[mask], torch.ones_like(cosine))


def test_features_that_never_vary_take_the_mean_of_the_reference():
    tokens = torch.tensor([[[0.6, 0.8]], [[-0.6, 0.8]]])
    reference = torch.tensor([[[0.8, 0.6]], [[-0.8, 0.6]]])
    mask = torch.ones(2, 1)
    torch.testing.assert_close(match_moments(tokens, mask, reference, mask), reference)
    # Of half precision the moments are taken in float32.
    assert match_moments(tokens.half(), mask, reference.half(), mask).dtype == torch.float32


def test_aligned_pictures_are_scored_as_the_evaluation_scores_them(tiny_model, use_prototypes, batch):
    model = use_prototypes(tiny_model()).eval()
    pixels, words = batch["pixel_values"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        # As docs/robustness.md shows it.
        gallery, known = model(pixel_values=pixels * 2 + 1), model(pixel_values=pixels)
        tokens = match_moments(gallery.image_tokens, gallery.image_mask, known.image_tokens, known.image_mask)
        embeds, _ = model.alignment_head.weight(tokens, gallery.image_mask, "image")
        texts = model(**words)
        scores = pair_scores(embeds, texts.text_embeds, gallery.image_mask, texts.text_mask)
    ids = torch.arange(len(pixels))
    encoded = EncodedRetrieval(tokens, gallery.image_mask, texts.text_tokens, texts.text_mask, ids, ids)
    torch.testing.assert_close(scores, RetrievalEvaluator().score(model, encoded))
    assert not torch.allclose(embeds, gallery.image_embeds)


def test_what_has_no_moments_is_refused():
    tokens, mask = some_images()
    with pytest.raises(ValueError, match="the same features, but have 8 and 5"):
        match_moments(tokens, mask, tokens[..., :5], mask)
    with pytest.raises(ValueError, match=r"must have the shape \(6, 4\), but has \(6, 3\)"):
        match_moments(tokens, mask, tokens, mask[:, :3])
    for masks in ((mask, torch.zeros_like(mask)), (torch.zeros_like(mask), mask)):
        with pytest.raises(ValueError, match="the gallery or the reference has none"):
            match_moments(tokens, masks[0], tokens, masks[1])
