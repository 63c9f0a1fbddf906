"""Processor of PICO: image processor and tokenizer in one, encoding of galleries, and scores of what is encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessorPil, ProcessorMixin
from transformers.utils import logging

from .gallery_alignment_pico import GalleryAlignment, spread_rows

# Not used here: what is imported is saved beside the processor, and so the handler of endpoints too.
from .handler import EndpointHandler as EndpointHandler
from .image_decoding_pico import decode_image
from .scoring_pico import pair_scores
from .untrusted_pico import HUB_OPTIONS


logger = logging.get_logger(__name__)

MAX_IMAGE_SIDE = 2**13
Embeddings = torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray]


class PicoProcessor(ProcessorMixin):
    r"""
    Wraps an image processor and a tokenizer, and prepares images and texts as training does. Images are paths, encoded
    bytes or PIL images and are decoded by [`decode_image`]; arrays and tensors go to the image processor as they are.
    Texts are cut to the tokenizer's `model_max_length` unless `truncation` says otherwise.

    Args:
        image_processor (`BaseImageProcessor`):
            Any image processor of transformers. That of timm's models, which cannot be saved, is replaced by one that
            resizes, crops and normalises as it does.
        tokenizer (`PreTrainedTokenizerBase`):
            Any tokenizer of transformers. It is made to pad on the right and to return attention masks.
        image_backend (`str`, *optional*):
            `"pil"` or `"torchvision"`: what the image processor computes with. It is saved, since the two round pixels
            differently (scores by about 1e-3), and [`from_pretrained`] takes the image processor of that backend.

    Example:

    ```python
    >>> inputs = processor(images=["a.png", "b.png"], text=["a red circle"], return_tensors="pt", padding=True)
    ```
    """

    def __init__(self, image_processor=None, tokenizer=None, image_backend=None, **kwargs):
        if type(image_processor).__name__ == "TimmWrapperImageProcessor":
            image_processor = _without_timm(image_processor.data_config)
        super().__init__(image_processor, tokenizer, **kwargs)
        self.image_backend = _backend(image_processor) if image_backend is None else image_backend
        _check_image_sizes(self.image_processor)
        # SigLIP's tokenizers leave the mask out, but without it padding would count as words.
        if "attention_mask" not in self.tokenizer.model_input_names:
            self.tokenizer.model_input_names = [*self.tokenizer.model_input_names, "attention_mask"]
        # Gemma's pad on the left. Only what is among the initial arguments is saved.
        self.tokenizer.padding_side = self.tokenizer.init_kwargs["padding_side"] = "right"
        # A length that the tokenizer's file happens to be set to, as MiniLM's is. Transformers would cut there, but
        # training cuts at `model_max_length`.
        self.tokenizer.init_kwargs.pop("max_length", None)

    def __call__(self, images=None, text=None, **kwargs):
        if images is not None:
            images = _decoded(images)
        if "truncation" not in kwargs:
            kwargs["text_kwargs"] = {"truncation": True, **kwargs.get("text_kwargs", {})}
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> PicoProcessor:  # type: ignore[override]
        """
        As `ProcessorMixin.from_pretrained`, with the image processor of the backend that was saved. The auto classes
        of transformers would take torchvision's wherever it is installed. Warns where that backend is missing.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        saved = processor.image_backend
        if saved != _backend(processor.image_processor):
            given = {name: value for name, value in kwargs.items() if name in (*HUB_OPTIONS, "trust_remote_code")}
            processor.image_processor = AutoImageProcessor.from_pretrained(
                pretrained_model_name_or_path, backend=saved, **given
            )
        if saved != _backend(processor.image_processor):
            logger.warning(
                f"{pretrained_model_name_or_path} was made with the image processor of {saved!r}, which is not "
                f"installed; {_backend(processor.image_processor)!r} rounds pixels differently, so that scores change "
                "by about 1e-3."
            )
        return processor

    @classmethod
    def from_backbones(cls, vision: str, text: str | None = None, **kwargs) -> PicoProcessor:
        r"""
        Takes the image processor of one checkpoint and the tokenizer of another, or both of a joint one.

        Args:
            vision (`str`): Hub id or folder of the vision or joint checkpoint.
            text (`str`, *optional*): Hub id or folder of the text checkpoint; the same as `vision` by default.
            kwargs: Passed to `from_pretrained` (`revision`, `token`, ...).
        """
        return cls(
            image_processor=AutoImageProcessor.from_pretrained(vision, **kwargs),
            tokenizer=AutoTokenizer.from_pretrained(vision if text is None else text, **kwargs),
        )

    def encode_images(
        self,
        model: Any,
        images: Any,
        *,
        align: bool | GalleryAlignment = False,
        styles: str | Sequence[str] | None = None,
        batch_size: int = 32,
        convert_to_numpy: bool = False,
    ) -> list[torch.Tensor] | list[np.ndarray]:
        r"""
        Encodes images batch by batch, for [`score_retrieval`] and [`retrieve`]: decoded as in training, without
        gradients, in evaluation mode, on the device of the model.

        Args:
            model ([`PicoModel`]): The model, which is left in the mode that it is in.
            images (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, or a sequence of them):
                Paths, encoded images or PIL images. Paths are opened when their batch is encoded.
            align (`bool` or [`GalleryAlignment`], *optional*, defaults to `False`):
                True moves these images, a gallery of one look, to where images of training lie; see
                [`PicoModel.align`]. It is measured first, on up to 1,000 images that are spread evenly over it, which
                are thus encoded twice. What [`PicoModel.align`] gave moves images that are added to a gallery later.
            styles (`Sequence[str]`, *optional*):
                With `align`, the style of each image; each style is measured and moved by itself.
            batch_size (`int`, *optional*, defaults to 32): Images encoded at a time.
            convert_to_numpy (`bool`, *optional*, defaults to `False`): Whether to return arrays in main memory.

        Returns:
            `list[torch.Tensor]` or `list[numpy.ndarray]`: for each image its score-ready token embeddings
            `(tokens, dim)` in float32, without padding.

        Raises:
            ValueError: for an image that cannot be decoded, and with `align` what [`PicoModel.align`] refuses.
        """
        _check_batch_size(batch_size)
        images = _as_sequence(images)
        labels = [None] * len(images) if styles is None else list(_as_sequence(styles))
        if len(labels) != len(images) or (styles is not None and align is False):
            raise ValueError(
                f"`styles` goes with `align` and holds the style of each image, but there are {len(labels)} styles "
                f"for {len(images)} images, and align={align!r}."
            )

        def inputs(batch: Any) -> Any:
            return self(images=list(batch), return_tensors="pt").to(model.device, model.dtype)

        alignment = align if isinstance(align, GalleryAlignment) else None
        if align is True:
            rows = spread_rows(labels)
            parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            sample = (inputs(images[row] for row in part) for part in parts)
            alignment = model.align(sample, None if styles is None else [labels[row] for row in rows])

        def encode(batch: Any):
            of_batch, of_styles = zip(*batch, strict=True)
            if alignment is None:
                return model.get_image_features(**inputs(of_batch))
            own = alignment.for_images(None if styles is None else of_styles)
            return model.get_image_features(**inputs(of_batch), alignment=own)

        return _encode(model, list(zip(images, labels, strict=True)), encode, batch_size, convert_to_numpy)

    def encode_texts(
        self, model: Any, texts: Any, *, batch_size: int = 32, convert_to_numpy: bool = False
    ) -> list[torch.Tensor] | list[np.ndarray]:
        r"""
        Encodes texts as [`encode_images`] encodes images; they are cut to the tokenizer's `model_max_length`.

        Args:
            model ([`PicoModel`]): The model.
            texts (`str` or a sequence of `str`): Texts.
            batch_size (`int`, *optional*, defaults to 32): Texts encoded at a time.
            convert_to_numpy (`bool`, *optional*, defaults to `False`): As for images.
        """

        def encode(batch: Any):
            inputs = self(text=list(batch), padding=True, return_tensors="pt").to(model.device)
            return model.get_text_features(**inputs)

        return _encode(model, _as_sequence(texts), encode, batch_size, convert_to_numpy)

    @torch.no_grad()
    def score_retrieval(
        self,
        image_embeds: Embeddings,
        text_embeds: Embeddings,
        image_mask: torch.Tensor | np.ndarray | None = None,
        text_mask: torch.Tensor | np.ndarray | None = None,
        *,
        output_device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        r"""
        Scores every image against every text from embeddings of [`encode_images`] and [`encode_texts`], of the ONNX
        encoders, of feature extraction pipelines, or of [`PicoModel.get_image_features`] and
        [`PicoModel.get_text_features`]; tensors or arrays, on one device.

        Args:
            image_embeds (`torch.Tensor` of shape `(images, patches, dim)` or list of `(patches_i, dim)`):
                Score-ready image token embeddings.
            text_embeds (`torch.Tensor` of shape `(texts, words, dim)` or list of `(words_i, dim)`):
                Score-ready text token embeddings.
            image_mask (`torch.Tensor` of shape `(images, patches)`, *optional*):
                True at tokens that take part; by default all but those of zeros, which is how models return padding
                and what of it pipelines pass on. Not used with a list.
            text_mask (`torch.Tensor` of shape `(texts, words)`, *optional*): Likewise for texts.
            output_device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Device of the result.

        Returns:
            `torch.Tensor` of shape `(images, texts)` in float32; higher is a better match.
        """
        images, image_mask = _padded(_as_tensors(image_embeds), _as_tensors(image_mask))
        texts, text_mask = _padded(_as_tensors(text_embeds), _as_tensors(text_mask))
        return pair_scores(images, texts, image_mask, text_mask).to(output_device)

    @torch.no_grad()
    def retrieve(
        self,
        query_embeds: Embeddings,
        gallery_embeds: Embeddings,
        query_mask: torch.Tensor | np.ndarray | None = None,
        gallery_mask: torch.Tensor | np.ndarray | None = None,
        *,
        k: int = 10,
        batch_size: int = 256,
        output_device: str | torch.device = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Finds the best matches of each query in a gallery: texts in images or images in texts, since the score is the
        same either way. Embeddings are those of [`score_retrieval`]. Only `batch_size` queries are scored with
        `batch_size` items at a time, on the device of the queries: a gallery may stay in main memory.

        Args:
            query_embeds (`torch.Tensor` of shape `(queries, tokens, dim)` or list of `(tokens_i, dim)`):
                Score-ready token embeddings of what is asked.
            gallery_embeds (`torch.Tensor` of shape `(items, tokens, dim)` or list of `(tokens_i, dim)`):
                Score-ready token embeddings of what is searched.
            query_mask (`torch.Tensor` of shape `(queries, tokens)`, *optional*):
                True at tokens that take part; by default all but those of zeros. Not used with a list.
            gallery_mask (`torch.Tensor` of shape `(items, tokens)`, *optional*): Likewise for the gallery.
            k (`int`, *optional*, defaults to 10): Matches of each query; a smaller gallery is returned whole.
            batch_size (`int`, *optional*, defaults to 256): Queries and items scored at a time.
            output_device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Device of the result.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`, both of shape `(queries, min(k, items))`: scores in float32, best
            first, and indices into the gallery. Of equal scores the lower index comes first; an item without any
            token scores 0.

        Raises:
            `ValueError`: If the gallery is empty, `k` or `batch_size` is below 1, or embeddings do not fit or are NaN.
        """
        if k < 1 or batch_size < 1:
            raise ValueError(f"k and batch_size must be at least 1, got k={k} and batch_size={batch_size}.")
        queries, items, query_masks, item_masks = map(
            _as_tensors, (query_embeds, gallery_embeds, query_mask, gallery_mask)
        )
        if len(items) == 0:
            raise ValueError("The gallery is empty.")
        size = (len(queries), min(k, len(items)))
        scores = torch.empty(size, device=output_device)
        indices = torch.empty(size, dtype=torch.int64, device=output_device)
        for start, query, mask in _batches(queries, query_masks, batch_size):
            gallery = _batches(items, item_masks, batch_size)
            rows = slice(start, start + len(query))
            scores[rows], indices[rows] = _best_of_gallery(query, mask, gallery, k)
        if scores.isnan().any():
            # They would be ranked first.
            raise ValueError("Some scores are not numbers: embeddings of the queries or of the gallery hold NaN.")
        return scores, indices


def _without_timm(data_config: dict[str, Any]) -> CLIPImageProcessorPil:
    """What timm does to images in evaluation, by an image processor of transformers."""
    _, height, width = data_config["input_size"]
    scaled_height, scaled_width = (int(side / data_config["crop_pct"]) for side in (height, width))
    if data_config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm's crop_mode must be 'center' or 'squash', but is {data_config['crop_mode']!r}.")
    squashes = data_config["crop_mode"] == "squash" or height != width
    return CLIPImageProcessorPil(
        size={"height": scaled_height, "width": scaled_width} if squashes else {"shortest_edge": scaled_height},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data_config["interpolation"].upper()],
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
    )


def _backend(image_processor: Any) -> str | None:
    # Image processors with code of their own have one way alone and do not name it.
    return getattr(image_processor, "backend", None)


def _decoded(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        return [_decoded(image) for image in images]
    return images if isinstance(images, (np.ndarray, torch.Tensor)) else decode_image(images)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def _as_sequence(items: Any) -> Any:
    return [items] if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) else items


@torch.no_grad()
def _encode(
    model: Any, items: Sequence, encode: Callable, batch_size: int, convert_to_numpy: bool
) -> list[torch.Tensor] | list[np.ndarray]:
    """Encodes items, with a progress bar if it takes more than five seconds."""
    _check_batch_size(batch_size)
    encoded: list[Any] = []
    training = model.training
    model.eval()
    try:
        for start in logging.tqdm(range(0, len(items), batch_size), desc="Encoding", delay=5):
            features = encode(items[start : start + batch_size])
            embeds, masks = features.embeds, features.mask
            if convert_to_numpy:
                embeds, masks = embeds.cpu().numpy(), masks.cpu().numpy()
            encoded += [tokens[mask] for tokens, mask in zip(embeds, masks, strict=True)]
    finally:
        model.train(training)
    return encoded


def _as_tensors(values: Any) -> Any:
    """Tensors that share the memory of arrays, also in a list; tensors and None as they are."""
    if isinstance(values, Sequence):
        return [torch.as_tensor(value) for value in values]
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def _check_image_sizes(image_processor) -> None:
    """Images are brought to these sizes whatever they are: an untrusted file must not exhaust memory."""
    for name in ("size", "crop_size"):
        size = getattr(image_processor, name, None) or {}
        for side in ("height", "width", "shortest_edge"):
            pixels = size.get(side) if isinstance(size, dict) else getattr(size, side, None)
            if pixels is not None and not 1 <= pixels <= MAX_IMAGE_SIDE:
                raise ValueError(
                    f"The image processor's `{name}[{side!r}]` must be from 1 to {MAX_IMAGE_SIDE} pixels, but is "
                    f"{pixels!r}."
                )


_Batches = Iterator[tuple[int, torch.Tensor, torch.Tensor]]


def _batches(embeds: torch.Tensor | list[torch.Tensor], mask: torch.Tensor | None, size: int) -> _Batches:
    """Gives the index of its first sample, embeddings and mask of each batch; lists are padded batch by batch."""
    for start in range(0, len(embeds), size):
        rows = slice(start, start + size)
        yield start, *_padded(embeds[rows], None if mask is None else mask[rows])


def _best_of_gallery(
    query: torch.Tensor, query_mask: torch.Tensor, gallery: _Batches, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.empty(len(query), 0, device=query.device)
    indices = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start, items, mask in gallery:
        items, mask = items.to(query.device), mask.to(query.device)
        # The score is symmetric; it is computed faster with the longer samples in the place of images.
        if query.shape[1] < items.shape[1]:
            new_scores = pair_scores(items, query, mask, query_mask).T
        else:
            new_scores = pair_scores(query, items, query_mask, mask)
        new_indices = torch.arange(start, start + len(items), device=query.device).expand_as(new_scores)
        # The sort is stable and what was found earlier stands first, so that of equal scores the lower index wins.
        scores, order = torch.cat([scores, new_scores], dim=1).sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :k], order[:, :k]
        indices = torch.cat([indices, new_indices], dim=1).gather(1, order)
    return scores, indices


def _padded(embeds: torch.Tensor | list[torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(embeds, torch.Tensor):
        if len(embeds) == 0:
            raise ValueError("An empty list of embeddings has no dimension; give a tensor of shape (0, tokens, dim).")
        if mask is not None:
            raise ValueError("A list of embeddings carries its own lengths; give no mask with it.")
        embeds = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    # A token has unit length before it is weighted. Zeros are padding, of the list or of the model.
    return embeds, (embeds != 0).any(dim=-1) if mask is None else mask
