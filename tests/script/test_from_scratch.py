from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from modeling_pico.script.from_scratch import (
    small_image_processor,
    small_text_config,
    small_vision_config,
    train_tokenizer,
)


CAPTIONS = ["A red circle.", "a large reddish circle, left", "Two blue squares", "circles and squares", "redder"]


def test_tokenizer_is_the_same_each_time_and_survives_saving(tmp_path):
    """The trainer of tokenizers orders letters inside words at random; processes must agree on every id."""
    tokenizers = [train_tokenizer(CAPTIONS, 60) for _ in range(8)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert sorted(vocabularies[0].values()) == list(range(len(vocabularies[0])))
    assert len(vocabularies[0]) <= 60
    tokenizers[0].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = ["a Red squarish circle", "unseen: ψ"]
    assert loaded(text)["input_ids"] == tokenizers[0](text)["input_ids"]


def test_tokenizer_has_the_form_of_bert():
    tokenizer = train_tokenizer(iter(CAPTIONS), max_length=5)
    ids = tokenizer("A RED circle")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "red", "circle", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"
    assert tokenizer("##a")["input_ids"] == tokenizer("# # a")["input_ids"]  # pieces of words are no special tokens
    assert tokenizer.convert_ids_to_tokens(tokenizer("ψ")["input_ids"])[1] == "[UNK]"
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 5
    assert len(tokenizer(CAPTIONS[1], truncation=True)["input_ids"]) == 5
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_configurations_fit_tokenizer_and_image():
    tokenizer = train_tokenizer(CAPTIONS, max_length=12)
    text = small_text_config(16, 1, 2, tokenizer)
    assert (text.vocab_size, text.max_position_embeddings, text.pad_token_id) == (len(tokenizer), 12, 0)
    vision = small_vision_config(24, 3, 4, 32, 8)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (24, 3, 96)
    assert (vision.image_size, vision.patch_size) == (32, 8)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((16, 1, 2, 30, 8), ["image_size", "patch_size", "30", "8"]),
        ((16, 1, 3, 32, 8), ["vision_hidden_size", "heads", "16", "3"]),
        ((16, 1, 0, 32, 8), ["heads", "0"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, words):
    with pytest.raises(ValueError) as error:
        small_vision_config(*sizes)
    assert all(word in str(error.value) for word in words)


def test_text_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="`text_hidden_size` must be a multiple of its attention heads.* 16 and 5"):
        small_text_config(16, 1, 5, train_tokenizer(CAPTIONS))


def test_image_processor_resizes_and_scales():
    image = Image.fromarray(np.full((20, 10, 3), 255, dtype=np.uint8))
    pixels = small_image_processor(16)(images=[image, Image.new("RGB", (5, 5))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pixels[0], torch.ones(3, 16, 16))
    torch.testing.assert_close(pixels[1], -torch.ones(3, 16, 16))
