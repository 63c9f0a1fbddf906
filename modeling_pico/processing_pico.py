"""Processor of PICO: image processor and tokenizer in one, and scores of encoded galleries."""

from __future__ import annotations

import torch
from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

from .scoring_pico import pair_scores


class PicoProcessor(ProcessorMixin):
    r"""
    Wraps an image processor and a tokenizer.

    Args:
        image_processor (`BaseImageProcessor`): Any image processor of transformers.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer of transformers.

    Example:

    ```python
    >>> inputs = processor(images=images, text=["a red circle"], return_tensors="pt", padding=True)
    ```
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

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

    @torch.no_grad()
    def score_retrieval(
        self,
        image_embeds: torch.Tensor | list[torch.Tensor],
        text_embeds: torch.Tensor | list[torch.Tensor],
        image_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        *,
        negative_slope: float = 1.0,
        output_device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        r"""
        Scores every image against every text from embeddings of [`PicoModel.get_image_features`] and
        [`PicoModel.get_text_features`].

        Args:
            image_embeds (`torch.Tensor` of shape `(images, patches, dim)` or list of `(patches_i, dim)`):
                Score-ready image token embeddings.
            text_embeds (`torch.Tensor` of shape `(texts, words, dim)` or list of `(words_i, dim)`):
                Score-ready text token embeddings.
            image_mask (`torch.Tensor` of shape `(images, patches)`, *optional*):
                True at tokens that take part; all by default. Not used with a list.
            text_mask (`torch.Tensor` of shape `(texts, words)`, *optional*): Likewise for texts.
            negative_slope (`float`, *optional*, defaults to 1.0): The model's `config.negative_slope`.
            output_device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Device of the result.

        Returns:
            `torch.Tensor` of shape `(images, texts)` in float32; higher is a better match.
        """
        image_embeds, image_mask = _padded(image_embeds, image_mask)
        text_embeds, text_mask = _padded(text_embeds, text_mask)
        scores = pair_scores(image_embeds, text_embeds, image_mask, text_mask, negative_slope=negative_slope)
        return scores.to(output_device)


def _padded(
    embeds: torch.Tensor | list[torch.Tensor], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(embeds, torch.Tensor):
        return embeds, mask
    if len(embeds) == 0:
        raise ValueError("An empty list of embeddings has no dimension; give a tensor of shape (0, tokens, dim).")
    if mask is not None:
        raise ValueError("A list of embeddings carries its own lengths; give no mask with it.")
    lengths = torch.tensor([len(item) for item in embeds], device=embeds[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


__all__ = ["PicoProcessor"]
