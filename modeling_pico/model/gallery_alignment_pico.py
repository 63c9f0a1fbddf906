"""
Gallery alignment: images of one look are moved to the mean and spread that images of training have, at the outputs of
the image tower.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn


# With fewer images, what they happen to show would be moved as well as how they look (docs/robustness.md).
MIN_IMAGES = 32
# Of a larger gallery as many images, evenly spread, say where it lies.
MAX_IMAGES = 1000
# A spread below this share of a feature's size is rounding.
_ROUNDING = 1e-6


@dataclass
class FeatureMoments:
    """
    Mean and spread of features over all values that were seen, in float64.

    Attributes:
        count (`int`): Values of each feature.
        mean (`torch.Tensor` of shape `(features,)`): Their mean.
        squares (`torch.Tensor` of shape `(features,)`): Sum of their squared distances from it.
    """

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "FeatureMoments":
        """Those of `(values, features)`."""
        if not len(values):
            nothing = torch.zeros(values.shape[1], dtype=torch.float64)
            return cls(0, nothing, nothing)
        variance, mean = torch.var_mean(values.float(), dim=0, correction=0)
        return cls(len(values), mean.cpu().double(), variance.cpu().double() * len(values))

    def merge(self, other: "FeatureMoments") -> "FeatureMoments":
        """Those of both together, by distances from means: a difference of large squares would lose all digits."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * self.count * share
        return FeatureMoments(count, self.mean + apart * share, squares)

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation `(features,)`, that of the values themselves and not of what they were drawn from."""
        return (self.squares / max(self.count, 1)).sqrt()


@dataclass
class GalleryMoments:
    """
    Moments of the tower's outputs over images.

    Attributes:
        images (`int`): How many they were.
        tokens ([`FeatureMoments`]): Over all tokens of all images.
        class_state ([`FeatureMoments`], *optional*): Over the states of their class tokens.
    """

    images: int
    tokens: FeatureMoments
    class_state: FeatureMoments | None = None

    @classmethod
    def of(cls, states: Any) -> "GalleryMoments":
        """Those of [`TokenStates`]."""
        class_state = None if states.class_state is None else FeatureMoments.of(states.class_state)
        return cls(len(states.states), FeatureMoments.of(states.states[states.mask.bool()]), class_state)

    def merge(self, other: "GalleryMoments") -> "GalleryMoments":
        """Those of both together."""
        both = None
        if self.class_state is not None and other.class_state is not None:
            both = self.class_state.merge(other.class_state)
        return GalleryMoments(self.images + other.images, self.tokens.merge(other.tokens), both)


# By style; of a gallery without styles under None.
Galleries = Mapping[str | None, GalleryMoments]


def measure_galleries(states: Iterable[Any], styles: Sequence[str] | None = None) -> dict[str | None, GalleryMoments]:
    """
    Moments of a gallery, of each of its styles by itself where there are some. Nothing of a batch is kept.

    Args:
        states (iterable of [`TokenStates`]): What the image tower gives, batch by batch.
        styles (`Sequence[str]`, *optional*): The style of each image, in the same order.

    Raises:
        ValueError: if there is not one style for each image.
    """
    found: dict[str | None, GalleryMoments] = {}
    images = 0
    for batch in states:
        start, images = images, images + len(batch.states)
        labels = [None] * len(batch.states) if styles is None else list(styles[start:images])
        if len(labels) < len(batch.states):
            raise ValueError(f"There must be one style for each image, but there are {len(labels) + start} styles.")
        for label in dict.fromkeys(labels):
            rows = torch.tensor([other == label for other in labels], device=batch.states.device)
            class_state = None if batch.class_state is None else batch.class_state[rows]
            own = GalleryMoments.of(
                batch._replace(states=batch.states[rows], mask=batch.mask[rows], class_state=class_state)
            )
            found[label] = own if label not in found else found[label].merge(own)
    if styles is not None and images != len(styles):
        raise ValueError(f"There must be one style for each image, but there are {len(styles)} for {images} images.")
    return found


def spread_rows(styles: Sequence[str | None], most: int = MAX_IMAGES) -> list[int]:
    """Rows of a gallery that say where it lies: up to `most` of each style, evenly spread over it, in their order."""
    of_style: dict[str | None, list[int]] = {}
    for row, style in enumerate(styles):
        of_style.setdefault(style, []).append(row)
    chosen = []
    for rows in of_style.values():
        count = min(len(rows), most)
        chosen += [rows[index * len(rows) // count] for index in range(count)]
    return sorted(chosen)


def check_sizes(sizes: Mapping[str | None, int], what: str = "gallery") -> None:
    """ValueError unless there are enough images of each style (without styles: under None) to have moments."""
    if small := {label: count for label, count in sizes.items() if count < MIN_IMAGES} or ({} if sizes else {None: 0}):
        label, count = min(small.items(), key=lambda item: item[1])
        of_style = "" if label is None else f" of the style {label!r}"
        others = f", and {len(small) - 1} other style(s) too few as well" if len(small) > 1 else ""
        raise ValueError(
            f"The {what} has {count} image(s){of_style}{others}; mean and spread need at least {MIN_IMAGES}, or what "
            "the images show would count as their look. Leave these images where they are, or add more of their look."
        )


@dataclass
class GalleryAlignment:
    """
    Moves the tower's outputs of images to where images of training lie; [`PicoModel.align`] makes it.

    Attributes:
        scale (`torch.Tensor` of shape `(styles, hidden)`): What each feature is multiplied by.
        shift (`torch.Tensor` of shape `(styles, hidden)`): What is added to it then.
        class_scale, class_shift (`torch.Tensor` of shape `(styles, hidden)`, *optional*):
            The same of the class token, whose state is not distributed as those of the patches are.
        styles (`tuple[str, ...]`, *optional*):
            What the rows are for; None if the one row is for all images, or each row for an image of its own.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    class_scale: torch.Tensor | None = None
    class_shift: torch.Tensor | None = None
    styles: tuple[str, ...] | None = None

    def to(self, device: torch.device | str) -> "GalleryAlignment":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return GalleryAlignment(**moved, styles=self.styles)

    def for_images(self, styles: Sequence[str] | None) -> "GalleryAlignment":
        """
        The rows of some images, by the style of each; without styles, what moves all images alike.

        Raises:
            ValueError: if a style is not among those that were measured, or styles are given where none were, or not
                where some were.
        """
        known = self.styles
        if (styles is None) != (known is None):
            raise ValueError(
                f"The gallery was measured {'without styles' if known is None else f'by the styles {list(known)}'}, "
                f"so {'no style may' if known is None else 'the style of each image must'} be given."
            )
        if styles is None or known is None:
            return self
        if unknown := sorted(set(styles) - set(known)):
            raise ValueError(f"The gallery that was measured has no style {unknown}, but {list(known)}.")
        rows = torch.tensor([known.index(style) for style in styles], device=self.scale.device)
        return GalleryAlignment(**{name: value[rows] for name, value in self._tensors().items()})

    def __call__(self, states: Any) -> Any:
        """Moves [`TokenStates`]; in float32, then in the type that they had."""
        if self.styles is not None or len(self.scale) not in (1, len(states.states)):
            raise ValueError("A gallery that was measured by styles is moved by `for_images(styles)`.")
        own = self.to(states.states.device)
        moved = (states.states.float() * own.scale[:, None] + own.shift[:, None]).to(states.states.dtype)
        class_state = states.class_state
        if class_state is not None and own.class_scale is not None and own.class_shift is not None:
            class_state = (class_state.float() * own.class_scale + own.class_shift).to(class_state.dtype)
        return states._replace(states=moved, class_state=class_state)

    def _tensors(self) -> dict[str, Any]:
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "styles"}
        return {name: value for name, value in named.items() if value is not None}


class ImageMoments(nn.Module):
    """
    Where images of training lie at the outputs of the image tower: mean and standard deviation of each feature.

    Args:
        features (`int`): Width of the tower's outputs.
        with_class_state (`bool`): Whether the class token has moments of its own.
    """

    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    class_mean: torch.Tensor
    class_std: torch.Tensor | None

    def __init__(self, features: int, with_class_state: bool):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for name in ("mean", "std", "class_mean", "class_std"):
            exists = with_class_state or not name.startswith("class_")
            self.register_buffer(name, torch.zeros(features) if exists else None)

    @property
    def is_fitted(self) -> bool:
        """Whether there are any."""
        return bool(self.count > 0)

    def check_fitted(self) -> None:
        """ValueError, with what to do, unless there are any."""
        missing = not self.is_fitted
        if missing or (self.class_std is not None and not bool(self.class_std.any())):
            of_what = "moments of training" if missing else "moments of the class token in training"
            raise ValueError(
                f"The model has no {of_what} to move a gallery to. `model.fit_alignment(batches)` takes them from "
                f"images as training has shown them, a few hundred best, and `model.save_pretrained` keeps them; "
                "train_pico.py does both at the end of a training."
            )

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets them: other weights of the tower put the same images elsewhere."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def fit(self, reference: Galleries) -> None:
        """Takes those of images of training, measured without styles; ValueError if too few or not finite."""
        check_sizes({label: moments.images for label, moments in reference.items()}, "reference")
        moments = reference[None]
        _check_finite(moments, None)
        self.reset()
        self.count.fill_(moments.images)
        self.mean.copy_(moments.tokens.mean)
        self.std.copy_(moments.tokens.std)
        if self.class_std is not None and moments.class_state is not None:
            self.class_mean.copy_(moments.class_state.mean)
            self.class_std.copy_(moments.class_state.std)

    def align(self, galleries: Galleries, leave_small: bool = False) -> GalleryAlignment:
        """
        What moves galleries to these moments.

        Args:
            galleries (`dict` of style to [`GalleryMoments`]): As [`measure_galleries`] gives them.
            leave_small (`bool`, *optional*, defaults to `False`):
                Whether galleries that are too small stay where they are; else they are refused.

        Raises:
            ValueError: if these moments were never fitted, or a gallery is too small or not finite.
        """
        self.check_fitted()
        if not leave_small:
            check_sizes({label: moments.images for label, moments in galleries.items()})
        rows = []
        for label, moments in galleries.items():
            _check_finite(moments, label)
            stays = moments.images < MIN_IMAGES
            row = dict(zip(("scale", "shift"), _map(moments.tokens, self.mean, self.std, stays), strict=True))
            if moments.class_state is not None and self.class_std is not None:
                of_class = _map(moments.class_state, self.class_mean, self.class_std, stays)
                row |= dict(zip(("class_scale", "class_shift"), of_class, strict=True))
            rows.append(row)
        tensors = {name: torch.stack([row[name] for row in rows]).to(self.mean.device) for name in rows[0]}
        styles = None if None in galleries else tuple(str(label) for label in galleries)
        return GalleryAlignment(**tensors, styles=styles)


def _map(
    gallery: FeatureMoments, mean: torch.Tensor, std: torch.Tensor, stays: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand `(features,)` in float32 by which a gallery gets this mean and spread."""
    if stays:
        return torch.ones_like(gallery.mean).float(), torch.zeros_like(gallery.mean).float()
    mean, std = mean.cpu().double(), std.cpu().double()
    # A feature that never varies has only a mean.
    varies = gallery.std > _ROUNDING * torch.maximum(gallery.mean.abs(), std)
    scale = torch.where(varies, std / gallery.std.where(varies, 1.0), 1.0)
    return scale.float(), (mean - gallery.mean * scale).float()


def _check_finite(moments: GalleryMoments, label: str | None) -> None:
    parts = [moments.tokens] if moments.class_state is None else [moments.tokens, moments.class_state]
    if not all(bool((part.mean + part.squares).isfinite().all()) for part in parts):
        of_style = "" if label is None else f" of the style {label!r}"
        raise ValueError(f"The image tower gives values that are NaN or infinite for images{of_style}.")
