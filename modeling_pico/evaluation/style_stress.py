"""
How retrieval holds when images and captions change their style, measured on any data set: its images are drawn again
in fixed looks, and other captions ask in place of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import torch
from accelerate import PartialState
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..data import CaptionedImageDataset, as_captioned
from ..data.dataset import count_styles
from ..data.looks import check_looks
from ..markdown import markdown_table, number_cell, signed_number
from ..model.gallery_alignment_pico import MIN_IMAGES
from ..model.modeling_pico import PicoModel
from ..model.processing_pico import PicoProcessor
from .evaluator import EncodedRetrieval, RetrievalEvaluator
from .retrieval_metrics import chance_rsum
from .style_alignment import align_encoded, encode_images
from .style_report import own_batches, recall_cells


logger = logging.get_logger(__name__)

# By name, one list of captions for each row of a data set; empty where there are none.
Captions = Mapping[str, Sequence[Sequence[str]]]


@dataclass
class StressRetrieval:
    """
    Retrieval of images in one look, or by captions in one style. Recalls and their sums are in percent.

    Attributes:
        images (`int`): Images that are searched, and search.
        texts (`int`): Their captions.
        retrieval (`dict[str, float]`): [`retrieval_metrics`] of these images and these captions.
        chance_rsum (`float`): rSum of a random ranking of them.
        plain_rsum (`float`, *optional*):
            rSum of the same images as they are; for captions in a style by as many plain captions of each image.
        drop (`float`, *optional*): `plain_rsum` minus the rSum.
        aligned_rsum (`float`, *optional*):
            rSum after the gallery has been moved to the moments of training, for a model that knows these.
    """

    images: int
    texts: int
    retrieval: dict[str, float]
    chance_rsum: float
    plain_rsum: float | None = None
    drop: float | None = None
    aligned_rsum: float | None = None

    @property
    def rsum(self) -> float:
        """Sum of all recalls."""
        return self.retrieval["rsum"]


@dataclass
class StyleStress:
    """
    What a change of style costs.

    Attributes:
        plain ([`StressRetrieval`]): The data as they are.
        looks (`dict[str, StressRetrieval]`): By look, the same images drawn again, with the same captions.
        captions (`dict[str, StressRetrieval]`):
            By name, other captions in place of the plain ones. An image counts if it has some of both kinds, and with
            as many of each, the first ones: one caption an image is another task than five.
    """

    plain: StressRetrieval
    looks: dict[str, StressRetrieval]
    captions: dict[str, StressRetrieval]

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: PicoModel,
        dataset: CaptionedImageDataset,
        looks: Sequence[str],
        captions: Captions | None,
        *,
        encode: Callable[[CaptionedImageDataset], EncodedRetrieval],
        encode_images: Callable[[CaptionedImageDataset], tuple[Tensor, Tensor]],
        align: Callable[[CaptionedImageDataset, EncodedRetrieval], EncodedRetrieval] | None = None,
        evaluator: RetrievalEvaluator | None = None,
    ) -> StyleStress:
        r"""
        Encodes all captions once, and the images once and once again for each look; with several processes all of
        them, alike.

        Args:
            model ([`PicoModel`]): The model, unwrapped.
            dataset ([`CaptionedImageDataset`]): The plain data.
            looks (`Sequence[str]`): Looks of [`~modeling_pico.data.render`].
            captions (`dict[str, Sequence[Sequence[str]]]`, *optional*): Other captions of each row, by name.
            encode (`Callable`): Encodes images and captions of a data set.
            encode_images (`Callable`): Encodes its images alone, as [`encode_images`] does.
            align (`Callable`, *optional*):
                Moves a data set's encoded images to the moments of training, for a model that knows these.
            evaluator ([`RetrievalEvaluator`], *optional*): Measures the plain set and the looks.

        Returns:
            [`StyleStress`]
        """
        check_stress(dataset, looks, captions)
        captions, evaluator = captions or {}, evaluator or RetrievalEvaluator()
        both, places = _with_captions(dataset, captions)
        encoded = encode(both)
        plain_texts = encoded if not captions else _of_texts(encoded, places[None])

        def measured(encoded: EncodedRetrieval, evaluator: RetrievalEvaluator, **compared: Any) -> StressRetrieval:
            retrieval = evaluator.retrieval_metrics(model, encoded)
            chance = chance_rsum(encoded.image_ids, encoded.text_ids, evaluator.num_folds)
            return StressRetrieval(len(encoded.image_ids), len(encoded.text_ids), retrieval, chance, **compared)

        def aligned_rsum(data: CaptionedImageDataset, encoded: EncodedRetrieval) -> float | None:
            return None if align is None else evaluator.retrieval_metrics(model, align(data, encoded))["rsum"]

        stress = cls(measured(plain_texts, evaluator), {}, {})
        plain_rsum = stress.plain.rsum
        if looks:
            stress.plain.aligned_rsum = aligned_rsum(dataset, plain_texts)
        hidden = not PartialState().is_main_process
        for look in logging.tqdm(check_looks(looks) if looks else [], desc="Looks", delay=5, disable=hidden):
            drawn = dataset.in_look(look)
            tokens, mask = encode_images(drawn)
            # In the precision of the plain ones, which may come from a cache.
            in_look = replace(plain_texts, image_tokens=tokens.to(encoded.image_tokens.dtype), image_mask=mask)
            result = measured(in_look, evaluator, plain_rsum=plain_rsum, aligned_rsum=aligned_rsum(drawn, in_look))
            result.drop = plain_rsum - result.rsum
            stress.looks[look] = result
        for name, lists in captions.items():
            counts = [min(pair) for pair in zip(dataset.num_captions.tolist(), map(len, lists), strict=True)]
            images = torch.tensor([row for row, count in enumerate(counts) if count])
            whole = encoded
            if len(images) < len(counts):
                # A process that is left without images would wait for the others.
                whole = encoded.gather_images()
                logger.warning(
                    f"{len(counts) - len(images)} of {len(counts)} images have no captions {name!r} and are left out "
                    "where these are compared with plain ones."
                )
            # One gallery: what is left need not divide into folds.
            plain, other = (
                measured(whole.subset(images, _first(places[kind], counts)), RetrievalEvaluator())
                for kind in (None, name)
            )
            other.plain_rsum, other.drop = plain.rsum, plain.rsum - other.rsum
            stress.captions[name] = other
        return stress

    def metrics(self) -> dict[str, float]:
        """The main numbers under flat names: `{look}_rsum`, `{look}_drop`, ..., `captions_{name}_rsum`, ..."""
        metrics = {}
        named = {"plain": self.plain, **self.looks, **{f"captions_{name}": row for name, row in self.captions.items()}}
        for name, result in named.items():
            values = {"rsum": result.rsum, "drop": result.drop, "aligned_rsum": result.aligned_rsum}
            metrics.update({f"{name}_{key}": value for key, value in values.items() if value is not None})
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table of looks and one of captions, with what their columns mean."""
        parts = []
        if self.looks:
            looks = {"plain": self.plain, **self.looks}
            aligned = any(result.aligned_rsum is not None for result in looks.values())
            parts += [
                f"Recall in percent, {self.plain.images:,} images and {self.plain.texts:,} captions; a random ranking "
                f"has an rSum of {self.plain.chance_rsum:.1f}. Looks: the same images drawn again, with the same "
                "captions; the drop is the plain rSum minus that of the look."
                + " Aligned: after the gallery of the look has been moved to the moments of training."
                * aligned,
                markdown_table(
                    "Look",
                    {
                        name: {
                            **recall_cells(result.retrieval),
                            "rSum": number_cell(result.rsum),
                            "Drop": number_cell(result.drop, signed_number),
                            **({"rSum, aligned": number_cell(result.aligned_rsum)} if aligned else {}),
                        }
                        for name, result in looks.items()
                    },
                ),
            ]
        if self.captions:
            parts += [
                "Other captions as queries and as answers. The plain rSum is that of the same images with as many of "
                "their plain captions, the first ones; the drop is the difference. Chance: of a random ranking.",
                markdown_table(
                    "Captions",
                    {
                        name: {
                            "Images": f"{result.images:,}",
                            "Texts": f"{result.texts:,}",
                            **recall_cells(result.retrieval),
                            "rSum": number_cell(result.rsum),
                            "Plain rSum": number_cell(result.plain_rsum),
                            "Drop": number_cell(result.drop, signed_number),
                            "Chance": number_cell(result.chance_rsum),
                        }
                        for name, result in self.captions.items()
                    },
                ),
            ]
        return "\n\n".join(parts) + "\n"


def measure_style_stress(
    model: PicoModel,
    processor: PicoProcessor,
    dataset: Dataset | datasets.Dataset,
    looks: Sequence[str] = (),
    captions: Captions | None = None,
    *,
    batch_size: int = 64,
) -> StyleStress:
    r"""
    Measures what a change of style costs a model on a data set whose images and captions have one.

    Args:
        model ([`PicoModel`]): The model.
        processor ([`PicoProcessor`]): Its processor.
        dataset ([`CaptionedImageDataset`]):
            Images with their captions; whatever [`~modeling_pico.data.as_captioned`] makes one of.
        looks (`Sequence[str]`, *optional*):
            Looks in which the images are drawn again, of those of [`~modeling_pico.data.render`].
        captions (`dict[str, Sequence[Sequence[str]]]`, *optional*):
            Captions in other styles, by name: a list for each row, empty where there are none.
        batch_size (`int`, *optional*, defaults to 64): Images encoded at a time.

    Returns:
        [`StyleStress`]

    Raises:
        `ValueError`: if there is no such look, captions are not one list for each row or all empty, or nothing is
        asked for.

    Example:

    ```python
    >>> rows = load_captioned_images("user/my_captions", split="test")
    >>> stress = measure_style_stress(model, processor, CaptionedImageDataset(rows), looks=["gray", "sketch"])
    >>> stress.looks["sketch"].drop
    ```
    """
    captioned: Any = as_captioned(dataset)

    def batches(data: CaptionedImageDataset) -> DataLoader:
        return own_batches(data, processor, batch_size)

    def align(data: CaptionedImageDataset, encoded: EncodedRetrieval) -> EncodedRetrieval:
        return align_encoded(model, encoded, batches(data), data.styles, leave_small=True)

    return StyleStress.measure(
        model,
        captioned,
        looks,
        captions,
        encode=lambda data: RetrievalEvaluator().encode(model, batches(data)),
        encode_images=lambda data: encode_images(model, batches(data)),
        align=align if can_align(model, captioned) else None,
    )


def can_align(model: PicoModel, dataset: Any) -> bool:
    """Whether the model knows where images of training lie, and a style is large enough to be moved there."""
    if not isinstance(dataset, CaptionedImageDataset):
        return False
    largest = max(count_styles(dataset).values(), default=0)
    return model.image_moments.is_fitted and largest >= MIN_IMAGES


def check_stress(dataset: Any, looks: Sequence[str], captions: Captions | None) -> None:
    """Refuses what cannot be measured, before anything is encoded."""
    if not isinstance(dataset, CaptionedImageDataset):
        raise ValueError(
            f"A stress test draws the images of a CaptionedImageDataset again, but got a {type(dataset).__name__}."
        )
    if dataset.look is not None:
        raise ValueError(f"The images are drawn in the look {dataset.look!r} already; give the plain data set.")
    if not looks and not captions:
        raise ValueError("A stress test needs looks, or captions in another style; none are given.")
    if looks:
        check_looks(looks)
    for name, lists in (captions or {}).items():
        if len(lists) != len(dataset):
            raise ValueError(
                f"The captions {name!r} must be one list for each of the {len(dataset)} rows, but there are "
                f"{len(lists)}."
            )
        if not any(map(len, lists)):
            raise ValueError(f"None of the {len(dataset)} images has captions {name!r}; they are all empty.")


def draw_looks(
    dataset: CaptionedImageDataset, looks: Sequence[str], *, num_images: int = 6, side: int = 160
) -> Image.Image:
    """
    A contact sheet: some images of a data set, evenly spread over it, as they are and in each look.

    Args:
        dataset ([`CaptionedImageDataset`]): The plain data.
        looks (`Sequence[str]`): Looks of [`~modeling_pico.data.render`].
        num_images (`int`, *optional*, defaults to 6): Images, one in each row.
        side (`int`, *optional*, defaults to 160): Largest width and height of a picture in pixels.

    Returns:
        `PIL.Image.Image`
    """
    columns = {"plain": dataset, **{look: dataset.in_look(look) for look in check_looks(looks)}}
    num_images = min(num_images, len(dataset))
    gap, title = 6, 20
    step = side + gap
    sheet = Image.new("RGB", (gap + step * len(columns), title + step * num_images), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, data) in enumerate(columns.items()):
        pen.text((gap + step * column, 4), name, fill="black")
        for line in range(num_images):
            picture: Image.Image = data[line * len(data) // num_images]["image"]
            picture = picture.resize(_fitted(picture, side), Image.Resampling.LANCZOS)
            corner = gap + step * column + (side - picture.width) // 2, title + step * line
            sheet.paste(picture, (corner[0], corner[1] + (side - picture.height) // 2))
    return sheet


def _fitted(picture: Image.Image, side: int) -> tuple[int, int]:
    factor = side / max(picture.size)
    return max(1, round(picture.width * factor)), max(1, round(picture.height * factor))


def _with_captions(
    dataset: CaptionedImageDataset, captions: Captions
) -> tuple[CaptionedImageDataset, dict[str | None, list[list[int]]]]:
    """
    The data set with further captions behind those of each row, and by their name where they stand among all captions,
    a list for each row; its own under None.
    """
    own: list[list[str]] = dataset.dataset["captions"][:]
    all_lists: dict[str | None, Sequence[Sequence[str]]] = {None: own}
    all_lists.update(captions)
    places: dict[str | None, list[list[int]]] = {name: [] for name in all_lists}
    number = 0
    for row in range(len(dataset)):
        for name, lists in all_lists.items():
            places[name].append(list(range(number, number + len(lists[row]))))
            number += len(lists[row])
    if not captions:
        return dataset, places
    joined = [[text for lists in all_lists.values() for text in lists[row]] for row in range(len(dataset))]
    feature = dataset.dataset.features["captions"]
    table = dataset.dataset.remove_columns("captions").add_column("captions", joined, feature=feature)
    return CaptionedImageDataset(table), places


def _of_texts(encoded: EncodedRetrieval, places: list[list[int]]) -> EncodedRetrieval:
    texts = torch.tensor([place for row in places for place in row], device=encoded.text_ids.device)
    names = ("text_tokens", "text_mask", "text_ids", "caption_codes")
    chosen = {name: value[texts] for name in names if (value := getattr(encoded, name)) is not None}
    return replace(encoded, **chosen)


def _first(places: list[list[int]], counts: list[int]) -> Tensor:
    """Of each row the first places, as many as are counted."""
    return torch.tensor([place for row, count in zip(places, counts, strict=True) for place in row[:count]])


__all__ = [
    "StressRetrieval",
    "StyleStress",
    "check_stress",
    "draw_looks",
    "encode_images",
    "measure_style_stress",
]
