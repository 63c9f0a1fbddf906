"""What Inference Endpoints of Hugging Face run: this file lies beside the model in its repository."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


# It is loaded by its path, not as a part of a package, and so imports none of its neighbours.
SIDES = ("images", "texts")
PARAMETERS = ("candidate_labels", "hypothesis_template", "pooled")
TEMPLATE = "This is a photo of {}."  # that of the pipeline of transformers


class EndpointHandler:
    r"""
    Answers requests with embeddings, scores, or labels. An image is the base64 of its file, alone or in a data URL;
    nothing is fetched from the network and no file is opened.

    ```python
    {"inputs": {"images": [...]}}  # or "texts", or both with "pooled"
    {"inputs": {"images": [...], "texts": [...]}}
    {"inputs": image, "parameters": {"candidate_labels": ["a star", "a ring"]}}
    ```

    - Images or texts give `image_embeds` or `text_embeds`, of each its score-ready token embeddings
      `(tokens, dim)`. With the parameter `pooled` it is one unit vector `(dim,)` each, also where both are given.
    - Images and texts together give `scores` `(images, texts)`; higher is a better match.
    - An image, or a list of images, with `candidate_labels` gives, for each, `{"label", "score"}` of all labels, best
      first, as the pipeline "zero-shot-image-classification" does, with its `hypothesis_template`.

    Args:
        path (`str`): Folder of the model's repository.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # The code is in the same repository as this file.
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

    @torch.no_grad()
    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data (`dict`): `inputs`, and `parameters` if need be.

        Returns:
            `dict` or `list` of numbers and strings.

        Raises:
            ValueError: If the request cannot be answered; the message says what it may hold.
        """
        inputs: Any = data.get("inputs")
        parameters: Any = data.get("parameters") or {}
        _check_names("parameters", parameters, PARAMETERS)
        if not isinstance(parameters.get("pooled", False), bool):
            raise ValueError(f"`pooled` must be true or false, got {parameters['pooled']!r}.")
        if "candidate_labels" in parameters:
            return self._classify(inputs, parameters)
        if "hypothesis_template" in parameters:
            raise ValueError("`hypothesis_template` goes with `candidate_labels`, which are missing.")
        if isinstance(inputs, Image.Image):  # of a request whose body is an image
            inputs = {"images": [inputs]}
        _check_names("inputs", inputs, SIDES)
        images = None if "images" not in inputs else [_image(image) for image in _list("images", inputs["images"])]
        texts = None if "texts" not in inputs else _texts("texts", inputs["texts"])
        if images is None and texts is None:
            raise ValueError(f"`inputs` must hold {' or '.join(SIDES)}, or both.")
        if images is not None and texts is not None and not parameters.get("pooled"):
            return {"scores": self._scores(images, texts).tolist()}
        encoded = {}
        for name, samples in (("image", images), ("text", texts)):
            if samples is not None:
                encode = self._pooled if parameters.get("pooled") else self._tokens
                encoded[f"{name}_embeds"] = [embeds.tolist() for embeds in encode(name, samples)]
        return encoded

    def _tokens(self, side: str, samples: Sequence[Any]) -> list[torch.Tensor]:
        encode = self.processor.encode_images if side == "image" else self.processor.encode_texts
        return encode(self.model, samples)

    def _pooled(self, side: str, samples: Sequence[Any]) -> torch.Tensor:
        if side == "image":
            inputs = self.processor(images=samples, return_tensors="pt").to(self.model.device, self.model.dtype)
            return self.model.get_image_features(**inputs).pooler_output.float()
        inputs = self.processor(text=samples, padding=True, return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**inputs).pooler_output.float()

    def _scores(self, images: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        return self.processor.score_retrieval(self._tokens("image", images), self._tokens("text", texts))

    def _classify(self, inputs: Any, parameters: dict[str, Any]) -> list:
        if parameters.get("pooled"):
            raise ValueError("`pooled` goes with embeddings; `candidate_labels` are scored token by token.")
        labels = _texts("candidate_labels", parameters["candidate_labels"])
        template = parameters.get("hypothesis_template", TEMPLATE)
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"`hypothesis_template` must hold {{}} where the label goes, got {template!r}.")
        images = inputs["images"] if isinstance(inputs, dict) and list(inputs) == ["images"] else inputs
        alone = not isinstance(images, list)
        images = [_image(image) for image in ([images] if alone else _list("images", images))]
        scores = self._scores(images, [template.replace("{}", label) for label in labels])
        shares = (scores * self.model.logit_scale.float().exp().cpu()).softmax(dim=1)
        answers = [
            [{"label": labels[label], "score": float(of_image[label])} for label in of_image.argsort(descending=True)]
            for of_image in shares
        ]
        return answers[0] if alone else answers


def _check_names(what: str, given: Any, allowed: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"`{what}` must be an object with {', '.join(allowed)}, got {type(given).__name__}.")
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise ValueError(f"`{what}` holds {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")


def _list(name: str, value: Any) -> list:
    if not isinstance(value, list) or not value:
        given = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"`{name}` must be a list of one or more, got {given}.")
    return value


def _texts(name: str, value: Any) -> list[str]:
    texts = _list(name, value)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"`{name}` must be a list of texts that are not empty.")
    return texts


def _image(value: Any) -> Any:
    """The bytes of an image's file, or the image as it is; what they hold is checked where they are decoded."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, str):
        raise ValueError(f"An image must be the base64 of its file, or a data URL, got {type(value).__name__}.")
    content = value
    if value.startswith("data:"):
        header, _, content = value.partition(",")
        if not header.endswith(";base64"):
            raise ValueError("A data URL of an image must be in base64: data:image/png;base64,...")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        shown = value if len(value) <= 60 else f"{value[:60]}..."
        raise ValueError(
            f"An image must be the base64 of its file, or a data URL, got {shown!r}. Addresses are not fetched and "
            "paths are not opened."
        ) from None


__all__ = ["EndpointHandler"]
