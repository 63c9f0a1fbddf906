from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_pico.data import PicoDataCollator, caption_code, default_max_length


def training(*captions):
    return [{"image": Image.new("RGB", (8, 8)), "caption": c, "image_id": 10 + i} for i, c in enumerate(captions)]


def test_training_batch(processor):
    batch = PicoDataCollator(processor)(training("a red cat", "dog"))
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["input_ids"].tolist() == [[2, 4, 5, 7, 3], [2, 8, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["image_ids"].tolist() == [10, 11]
    assert batch["image_ids"].dtype == torch.int64
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids", "caption_codes"} | (
        {"token_type_ids"} & set(processor.tokenizer.model_input_names)
    )


def test_equal_captions_have_equal_codes(processor):
    processor.tokenizer.model_max_length = 3
    codes = PicoDataCollator(processor)(training("a red cat", "a red dog", " A red\tCAT"))["caption_codes"]
    assert codes.dtype == torch.int64 and codes[0] == codes[2] != codes[1]  # the cut captions are all equal
    # In every process and on every machine.
    assert codes.tolist() == [caption_code("a red cat"), caption_code("a red dog"), caption_code("a red cat")]
    assert caption_code("a red cat") == -3037774535702438454


def test_token_type_ids_follow_the_tokenizer(processor):
    processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert "token_type_ids" not in PicoDataCollator(processor)(training("a"))
    processor.tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    batch = PicoDataCollator(processor)(training("a", "a red"))
    assert batch["token_type_ids"].shape == batch["attention_mask"].shape == (2, 4)


def test_evaluation_batch(processor):
    image = Image.new("RGB", (5, 7))
    samples = [
        {"image": image, "captions": ["a", "a red cat"], "image_id": 4, "row": 0},
        {"image": image, "captions": ["dog"], "image_id": 9, "row": 1},
    ]
    batch = PicoDataCollator(processor)(samples)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 4, 5, 7, 3], [2, 8, 3, 0, 0]]
    assert batch["image_ids"].tolist() == [4, 9]
    assert batch["text_ids"].tolist() == [4, 4, 9]
    assert batch["num_captions"].tolist() == [2, 1]
    assert batch["caption_codes"].tolist() == [caption_code(text) for text in ("a", "a red cat", "dog")]


def test_texts_are_cut_at_the_length_of_the_tokenizer(processor):
    processor.tokenizer.model_max_length = 4
    batch = PicoDataCollator(processor)(training("a red cat", "a cat", "dog"))
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [2, 4, 7, 3], [2, 8, 3, 0]]


def test_the_length_is_the_tokenizers(processor):
    collator = PicoDataCollator(processor)
    assert default_max_length(processor.tokenizer) is collator.max_length is None
    assert collator(training("a " * 300))["input_ids"].shape == (1, 302)
    processor.tokenizer.model_max_length = 5
    assert collator.max_length == 5
    assert collator(training("a " * 300))["input_ids"].shape == (1, 5)


def test_errors(processor):
    collator = PicoDataCollator(processor)
    with pytest.raises(ValueError, match="at least one sample"):
        collator([])
    mixed = [*training("a"), {"image": Image.new("RGB", (8, 8)), "captions": ["a"], "image_id": 0, "row": 0}]
    with pytest.raises(ValueError, match="mixes training samples"):
        collator(mixed)


def test_images_of_different_sizes_are_refused(processor):
    processor.image_processor.do_resize = False
    samples = training("a", "a")
    samples[1]["image"] = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=r"one shape .*\[\(3, 4, 4\), \(3, 8, 8\)\]. Let it resize"):
        PicoDataCollator(processor)(samples)


WORDS = st.sampled_from(["a", "red", "blue", "cat", "dog"])
CAPTION = st.lists(WORDS, max_size=9).map(" ".join)
COLORS = st.tuples(*[st.integers(0, 255)] * 3)


def words_of(processor, ids, mask) -> str:
    """What the mask shows, without [CLS] and [SEP]."""
    return " ".join(processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())[1:-1])


def assert_pixels(processor, pixels, color) -> None:
    expected = processor.image_processor(images=[Image.new("RGB", (8, 8), color)])["pixel_values"][0]
    assert torch.equal(pixels, torch.as_tensor(expected))


# The fixture is the same object for all examples of a test, and stays as it is.
any_batch = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_batch
@given(pairs=st.lists(st.tuples(COLORS, CAPTION), min_size=1, max_size=6))
def test_any_training_pair_stays_together(processor, pairs):
    samples = [
        {"image": Image.new("RGB", (8, 8), color), "caption": caption, "image_id": 100 - row}
        for row, (color, caption) in enumerate(pairs)
    ]
    batch = PicoDataCollator(processor)(samples)
    for row, (color, caption) in enumerate(pairs):
        assert_pixels(processor, batch["pixel_values"][row], color)
        assert words_of(processor, batch["input_ids"][row], batch["attention_mask"][row]) == caption
        assert batch["image_ids"][row] == 100 - row
        # Padding changes nothing of what the mask shows: alone the sample gives the same.
        alone = PicoDataCollator(processor)([samples[row]])
        shown = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][shown], alone["input_ids"][0])
        assert not batch["input_ids"][row][~shown].any()
    width, longest = batch["input_ids"].shape[1], max(len(caption.split()) + 2 for _, caption in pairs)
    assert width == longest


@any_batch
@given(rows=st.lists(st.tuples(COLORS, st.lists(CAPTION, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_any_evaluation_caption_keeps_the_id_of_its_image(processor, rows):
    samples = [
        {"image": Image.new("RGB", (8, 8), color), "captions": captions, "image_id": 7 + row // 2}
        for row, (color, captions) in enumerate(rows)
    ]
    batch = PicoDataCollator(processor)(samples)
    assert batch["num_captions"].tolist() == [len(captions) for _, captions in rows]
    expected = [(7 + row // 2, caption) for row, (_, captions) in enumerate(rows) for caption in captions]
    texts = zip(batch["text_ids"].tolist(), batch["input_ids"], batch["attention_mask"], strict=True)
    assert [(code, words_of(processor, ids, mask)) for code, ids, mask in texts] == expected
    for row, (color, _) in enumerate(rows):
        assert_pixels(processor, batch["pixel_values"][row], color)
