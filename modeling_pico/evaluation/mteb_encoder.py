"""A checkpoint as an encoder of `mteb`, whose tasks then evaluate it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..fingerprint import model_fingerprint
from ..model.processing_pico import PicoProcessor
from ..registration import load_checkpoint


if TYPE_CHECKING:
    from mteb.models import ModelMeta


SCORES = ("late_interaction", "pooled")
# Queries and items scored at a time, as many as an evaluation takes.
_QUERIES, _ITEMS = 256, 2048


class MtebEncoder:
    r"""
    Lets `mteb` evaluate a checkpoint of this package on its image-text tasks (`pip install "modeling-pico[mteb]"`).

    `mteb` ranks by what [`similarity`] gives, that is by exact scores of all pairs. Its `hit_rate_at_k` is the recall
    at `k` of image-text retrieval; its `recall_at_k` is the share of an image's captions that are found.

    Args:
        model_name (`str` or `os.PathLike`): Hub id or folder of the checkpoint.
        revision (`str`, *optional*): Revision on the Hub.
        device (`str`, *optional*): Device to compute on; a GPU where there is one.
        scores (`str`, *optional*, defaults to `"late_interaction"`):
            `"late_interaction"`, the model's own score of an image and a text, or `"pooled"`, the cosine of one vector
            for each, which tasks beyond retrieval and zero-shot classification need.
        name (`str`, *optional*):
            `"organization/name"` under which results are kept; the Hub id, or `local/` and the name of the folder.
        kwargs: Passed to [`PicoModel.from_pretrained`] (`dtype`, `attn_implementation`, ...).

    Raises:
        ImportError: If `mteb` is missing.
        ValueError: If `scores` is neither of the two.

    Example:

    ```python
    >>> model = MtebEncoder("outputs/quickstart")
    >>> results = mteb.evaluate(model, mteb.get_tasks(["Flickr30kT2IRetrieval", "Flickr30kI2TRetrieval"]))
    ```
    """

    def __init__(
        self,
        model_name: str | os.PathLike,
        revision: str | None = None,
        *,
        device: str | None = None,
        scores: str = "late_interaction",
        name: str | None = None,
        **kwargs: Any,
    ):
        if importlib.util.find_spec("mteb") is None:
            raise ImportError('MtebEncoder needs mteb: pip install "modeling-pico[mteb]"')
        if scores not in SCORES:
            raise ValueError(f"scores must be one of {', '.join(SCORES)}, got {scores!r}.")
        self.scores = scores
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_checkpoint(model_name, revision=revision, **kwargs).eval()
        self.model.to(self.device)  # type: ignore[arg-type]
        self.processor = PicoProcessor.from_pretrained(model_name, revision=revision)
        self.mteb_model_meta = self._model_meta(model_name, revision, name)

    @torch.no_grad()
    def encode(self, inputs: Iterable[dict[str, Any]], *, task_metadata: Any, **kwargs: Any) -> torch.Tensor:
        """
        Encodes the batches of a task, with preprocessing as in training.

        Args:
            inputs (iterable of `dict`): Batches with lists of images under `"image"` or of texts under `"text"`.
            task_metadata (`mteb.TaskMetadata`): The task, for messages.
            kwargs: What else `mteb` passes; not used.

        Returns:
            `torch.Tensor` in float32 on the CPU: `(samples, dim)` of pooled vectors, or score-ready token embeddings
            `(samples, tokens, dim)`, padded with zeros.

        Raises:
            ValueError: If a sample is an image and a text together, or neither.
        """
        encoded: list[torch.Tensor] = []
        for batch in inputs:
            features = self._features(batch, task_metadata.name)
            if self.scores == "pooled":
                encoded.extend(features.pooler_output.float().cpu())
            else:
                pairs = zip(features.embeds.float(), features.mask, strict=True)
                encoded.extend(embeds[mask].cpu() for embeds, mask in pairs)
        return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)

    def _features(self, batch: dict[str, Any], task: str) -> Any:
        sides = [side for side in ("image", "text") if side in batch]
        if len(sides) != 1:
            raise ValueError(
                f"{task} asks for one embedding of {' and '.join(sides) or sorted(batch)} together; PICO encodes "
                "images or texts. Choose tasks of the categories t2i, i2t, i2i and t2t."
            )
        if sides == ["image"]:
            inputs = self.processor(images=batch["image"], return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self.device, self.model.dtype))
        inputs = self.processor(text=batch["text"], padding=True, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(self.device))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """
        Scores every embedding of [`encode`] with every other.

        Args:
            embeddings1 (`torch.Tensor` or `numpy.ndarray` of shape `(first, dim)` or `(first, tokens, dim)`): Queries.
            embeddings2 (`torch.Tensor` or `numpy.ndarray` of shape `(second, dim)` or `(second, tokens, dim)`): Items.

        Returns:
            `torch.Tensor` of shape `(first, second)` in float32.
        """
        first, second = torch.as_tensor(embeddings1), torch.as_tensor(embeddings2)
        scores = torch.empty(len(first), len(second))
        for columns in _slices(len(second), _ITEMS):
            items = second[columns].to(self.device)
            for rows in _slices(len(first), _QUERIES):
                scores[rows, columns] = self._scores(first[rows].to(self.device), items).cpu()
        return scores

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Scores each embedding with its partner, see [`similarity`]; returns `(pairs,)`."""
        pairs = zip(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2), strict=True)
        scores = [self._scores(a[None].to(self.device), b[None].to(self.device)).cpu() for a, b in pairs]
        return torch.cat(scores).squeeze(1)

    def _scores(self, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        if self.scores == "pooled":
            return queries @ items.T  # vectors of unit length
        # The score is the same whichever side stands first.
        return self.processor.score_retrieval(queries, items)

    def _model_meta(self, model_name: str | os.PathLike, revision: str | None, name: str | None) -> ModelMeta:
        """What `mteb` writes beside results; also says in which folder they lie."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        config, is_local = self.model.config, os.path.isdir(model_name)
        pooled = self.scores == "pooled"
        if is_local:
            # Results are kept by name and revision: those of another checkpoint in the same folder are not these.
            revision = model_fingerprint(self.model, self.processor)
        parameters = list(self.model.parameters())
        return ModelMeta.create_empty(
            {
                "loader": type(self),
                "loader_kwargs": {"scores": self.scores},
                "name": name or (f"local/{Path(model_name).resolve().name}" if is_local else str(model_name)),
                "revision": revision or getattr(config, "_commit_hash", None),
                "n_parameters": sum(parameter.numel() for parameter in parameters),
                "memory_usage_mb": sum(parameter.nbytes for parameter in parameters) / 1024**2,
                "max_tokens": self.processor.tokenizer.model_max_length,
                "embed_dim": config.embedding_dim,
                "open_weights": True,
                "framework": ["PyTorch", "Transformers", "safetensors"],
                "similarity_fn_name": ScoringFunction.COSINE if pooled else ScoringFunction.CUSTOM,
                "use_instructions": False,
                "modalities": ["image", "text"],
                "model_type": ["dense" if pooled else "late-interaction"],
                # Names a folder of results of its own: those of one way do not pass for those of the other.
                "experiment_kwargs": {"scores": self.scores} if pooled else None,
            }
        )


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
