"""Small towers without pretrained weights: configurations, an image processor, and a tokenizer trained on captions."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessorPil


SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def train_tokenizer(captions: Iterable[str], vocab_size: int = 8000, max_length: int = 64) -> PreTrainedTokenizerFast:
    """Trains a lower-casing WordPiece tokenizer of BERT's form; the same captions always give the same tokenizer."""
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    captions = list(captions)
    words = {
        word for caption in captions for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption))
    }
    # The trainer numbers the letters inside words in the random order of a hash table, and the numbers decide ties.
    # Letters that it is given are numbered in order, so that every run and every process gets one vocabulary.
    letters = sorted({f"##{letter}" for word in words for letter in word[1:]})
    learned = Tokenizer(models.WordPiece())
    learned.normalizer, learned.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), *letters],
        show_progress=len(captions) > 100_000,  # some seconds
    )
    learned.train_from_iterator(captions, trainer)
    # A tokenizer of its own for the vocabulary, in which the letters are no special tokens.
    tokenizer = Tokenizer(models.WordPiece(learned.get_vocab(), unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    vocab, cls_token, sep_token = tokenizer.get_vocab(), SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.BertProcessing((sep_token, vocab[sep_token]), (cls_token, vocab[cls_token]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def small_vision_config(
    hidden_size: int, num_layers: int, num_heads: int, image_size: int, patch_size: int
) -> ViTConfig:
    """Configuration of a ViT with an MLP of four times its width; ValueError if sizes do not divide."""
    check_division("image_size", image_size, "`patch_size`", patch_size)
    check_division("vision_hidden_size", hidden_size, "its attention heads", num_heads)
    return ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        image_size=image_size,
        patch_size=patch_size,
        # As it says once the model is saved and loaded, so that a resumed run leaves the same file.
        dtype="float32",
    )


def small_text_config(
    hidden_size: int, num_layers: int, num_heads: int, tokenizer: PreTrainedTokenizerFast
) -> BertConfig:
    """Configuration of a BERT with an MLP of four times its width, for a tokenizer."""
    check_division("text_hidden_size", hidden_size, "its attention heads", num_heads)
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def small_image_processor(image_size: int) -> ViTImageProcessorPil:
    """Image processor that resizes to squares and scales pixel values to [-1, 1]."""
    return ViTImageProcessorPil(size={"height": image_size, "width": image_size}, resample=3)


def check_division(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """ValueError unless a size is a multiple of another."""
    if divisor < 1 or value % divisor:
        raise ValueError(f"`{name}` must be a multiple of {divisor_name}, but got {value} and {divisor}.")


__all__ = ["check_division", "small_image_processor", "small_text_config", "small_vision_config", "train_tokenizer"]
