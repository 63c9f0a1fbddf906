"""Tiny models of every backbone family, and their checkpoints in the layout of the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors


WORDS = ["a", "red", "blue", "circle", "star", "two", "small", "green", "square", "above", "on", "the"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 16, "patch_size": 8}
BERT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
CLIP_TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16}
CONVOLUTIONS = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 64}


@dataclass(frozen=True)
class Family:
    """A tiny model: its class and configuration, and what its towers are to give."""

    model_class: type
    config: dict
    tokens: int = 0
    prefix: int = 0
    image_size: int = 16
    special_ids: tuple[int | None, int] = (2, 3)
    pad_id: int = 0
    extra: dict = field(default_factory=dict)

    def build(self) -> tf.PreTrainedModel:
        """The model with weights that tell rows, tokens and layers apart; always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config_class = self.model_class.config_class
            model = self.model_class(config_class(**self.config)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                for module in model.modules():
                    # As in trained models: no gradient ever reaches the row of the padding.
                    if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                        module.weight[module.padding_idx] = 0
        return model


# A joint model's text tower ends every text with id 3, after id 2 at the front; SigLIP knows no id at the front, and
# pads with the id of the end.
JOINT = {
    "clip": Family(
        tf.CLIPModel,
        {
            "vision_config": {**SIZES, **PATCHES},
            "text_config": {**CLIP_TEXT, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
            "projection_dim": 10,
        },
        tokens=5,
        prefix=1,
    ),
    "siglip": Family(
        tf.SiglipModel,
        {
            "vision_config": {**SIZES, **PATCHES},
            "text_config": {**CLIP_TEXT, "pad_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
        },
        tokens=4,
        special_ids=(None, 3),
        pad_id=3,
    ),
    "blip": Family(
        tf.BlipModel,
        {"vision_config": {**SIZES, **PATCHES}, "text_config": {**BERT, "is_decoder": True}, "projection_dim": 10},
        tokens=5,
        prefix=1,
    ),
    "blip_retrieval": Family(
        tf.BlipForImageTextRetrieval,
        {
            "vision_config": {**SIZES, **PATCHES},
            "text_config": {**BERT, "is_decoder": True},
            "image_text_hidden_size": 10,
        },
        tokens=5,
        prefix=1,
    ),
    "align": Family(
        tf.AlignModel,
        {
            "vision_config": {
                "image_size": 32,
                "kernel_sizes": [3, 3],
                "in_channels": [32, 8],
                "out_channels": [8, 16],
                "strides": [2, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 2],
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "hidden_dim": 16,
            },
            "text_config": BERT,
            "projection_dim": 16,
        },
        tokens=16,
        image_size=32,
    ),
    "chinese_clip": Family(
        tf.ChineseCLIPModel,
        {"vision_config": {**SIZES, **PATCHES}, "text_config": BERT, "projection_dim": 10},
        tokens=5,
        prefix=1,
    ),
}
VISION = {
    "vit": Family(tf.ViTModel, {**SIZES, **PATCHES}, tokens=5, prefix=1),
    "deit": Family(tf.DeiTModel, {**SIZES, **PATCHES}, tokens=6, prefix=2),
    "swin": Family(
        tf.SwinModel,
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        tokens=4,
    ),
    "dinov2": Family(tf.Dinov2Model, {**SIZES, **PATCHES, "mlp_ratio": 2}, tokens=5, prefix=1),
    "dinov2_with_registers": Family(
        tf.Dinov2WithRegistersModel,
        {**SIZES, **PATCHES, "mlp_ratio": 2, "num_register_tokens": 3},
        tokens=8,
        prefix=4,
    ),
    "dinov3_vit": Family(
        tf.DINOv3ViTModel,
        {**SIZES, **PATCHES, "num_register_tokens": 3, "pos_embed_rescale": None},
        tokens=8,
        prefix=4,
    ),
    "dinov3_convnext": Family(tf.DINOv3ConvNextModel, CONVOLUTIONS, tokens=5, prefix=1, image_size=64),
}
TEXT = {
    "bert": Family(tf.BertModel, BERT),
    "roberta": Family(tf.RobertaModel, {**BERT, "max_position_embeddings": 34}),
    "modernbert": Family(
        tf.ModernBertModel,
        {
            **BERT,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "reference_compile": False,
        },
    ),
}
# Image processors that need no torchvision, as the Hub's checkpoints name them.
IMAGE_PROCESSORS = {
    "clip": "CLIPImageProcessorPil",
    "siglip": "SiglipImageProcessorPil",
    "blip": "BlipImageProcessorPil",
    "blip_retrieval": "BlipImageProcessorPil",
    "align": "EfficientNetImageProcessorPil",
    "chinese_clip": "ChineseCLIPImageProcessorPil",
    "deit": "DeiTImageProcessorPil",
    "dinov2": "BitImageProcessorPil",
    "dinov2_with_registers": "BitImageProcessorPil",
}
PAIRS = [(vision, "bert") for vision in VISION] + [("vit", text) for text in TEXT if text != "bert"]


def family(name: str) -> Family:
    """The family of a name."""
    return {**JOINT, **VISION, **TEXT}[name]


def image_processor(name: str) -> tf.BaseImageProcessor:
    """The family's image processor, for the tiny model's size."""
    size = {"height": family(name).image_size, "width": family(name).image_size}
    processor = getattr(tf, IMAGE_PROCESSORS.get(name, "ViTImageProcessorPil"))
    return processor(size=size, crop_size=size, do_center_crop=False)


def tokenizer(name: str) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer with the family's special tokens; SigLIP's leaves the attention mask out."""
    first, last = family(name).special_ids
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{word: 5 + i for i, word in enumerate(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "$A [SEP]" if first is None else "[CLS] $A [SEP]"
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("[CLS]", 2), ("[SEP]", last)])
    names = {"cls_token": "[CLS]"} if first is not None else {"model_input_names": ["input_ids"]}
    pad = "[SEP]" if family(name).pad_id == last else "[PAD]"
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token="[UNK]", sep_token="[SEP]", model_max_length=16, **names
    )


def save(name: str, folder: Path) -> tf.PreTrainedModel:
    """Writes a checkpoint of the family's own model class, with what belongs to it; returns the model."""
    model = family(name).build()
    model.save_pretrained(folder)
    if name not in TEXT:
        image_processor(name).save_pretrained(folder)
    if name not in VISION:
        tokenizer(name).save_pretrained(folder)
    return model


def batch(name: str, text: str | None = None, lengths: tuple[int, ...] = (4, 6, 9)) -> dict[str, torch.Tensor]:
    """Three images and three texts of 4, 6 and 9 tokens, padded to the longest."""
    text = name if text is None else text
    first, last = family(text).special_ids
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.full((len(lengths), max(lengths)), family(text).pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        words = torch.randint(5, 64, (length - 1 - (first is not None),), generator=generator).tolist()
        input_ids[row, :length] = torch.tensor([*([] if first is None else [first]), *words, last])
        attention_mask[row, :length] = 1
    size = family(name).image_size
    pixel_values = torch.randn(3, 3, size, size, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
