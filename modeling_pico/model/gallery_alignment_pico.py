"""
Gallery alignment: images of one look are moved to the mean and spread that images of training have, at the outputs of
the image tower and, the farther the look lies from training the more, before its layers of batch normalisation.

These layers take the mean and spread of training for granted. Replacing them by those of the new images is known as
AdaBN (arXiv 1603.04779); here the images get those of *training*, of the same tower on other data than it was
pretrained on, so that images of training stay where they are *(ours)*.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backbones_pico import batch_norm_layers


# With fewer images, what they happen to show would be moved as well as how they look (docs/robustness.md).
MIN_IMAGES = 32
# Of a larger gallery as many images, evenly spread, say where it lies.
MAX_IMAGES = 1000
# Images that pass the tower together when a gallery is measured: what a layer is given is moved by those so far, and a
# few of them would mislead the layers after it.
_TOGETHER = 256
# Layers of the tower go up to half of the way, and the next ones on from there: as good for the look, and what the
# images happen to show is moved less. They go the less, the nearer a gallery lies to training: at this distance (see
# `_layer_strength`) half as far.
_LAYER_STRENGTH, _HALF_STRENGTH_AT = 0.5, 0.15
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
        """Those of `(values, features, ...)`: of maps, over all their positions."""
        count = values.numel() // values.shape[1]
        if not count:
            nothing = torch.zeros(values.shape[1], dtype=torch.float64)
            return cls(0, nothing, nothing)
        variance, mean = torch.var_mean(values.float(), dim=[0, *range(2, values.dim())], correction=0)
        return cls(count, mean.cpu().double(), variance.cpu().double() * count)

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
    Moments of images in the tower: at its outputs, and before some of its layers.

    Attributes:
        images (`int`): How many they were.
        tokens ([`FeatureMoments`]): Over all tokens of all images.
        class_state ([`FeatureMoments`], *optional*): Over the states of their class tokens.
        layers (`dict[str, FeatureMoments]`): Over what layers of the tower are given, by name.
    """

    images: int
    tokens: FeatureMoments
    class_state: FeatureMoments | None = None
    layers: dict[str, FeatureMoments] = field(default_factory=dict)

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
        layers = {name: own.merge(other.layers[name]) for name, own in self.layers.items() if name in other.layers}
        return GalleryMoments(self.images + other.images, self.tokens.merge(other.tokens), both, layers)


# By style; of a gallery without styles under None.
Galleries = Mapping[str | None, GalleryMoments]


def moved_layers(tower: nn.Module) -> dict[str, _BatchNorm]:
    """
    The layers of a tower whose inputs are moved too, by name: its batch normalisation, of which many towers have none,
    but for the first third. These see edges and tones, and moving them costs some looks more than it gains others.
    """
    layers = list(batch_norm_layers(tower).items())
    return dict(layers[len(layers) // 3 :])


def measure_galleries(
    states: Iterable[Any],
    styles: Sequence[str] | None = None,
    tower: nn.Module | None = None,
    target: "ImageMoments | None" = None,
) -> dict[str | None, GalleryMoments]:
    """
    Moments of a gallery, of each of its styles by itself where there are some. Nothing of a batch is kept.

    Args:
        states (iterable of [`TokenStates`]): What the image tower gives, batch by batch.
        styles (`Sequence[str]`, *optional*): The style of each image, in the same order.
        tower (`nn.Module`, *optional*):
            The one that runs when the next batch of `states` is asked for; its [`moved_layers`] are measured too. It
            runs without `torch.compile`, which would pass over them.
        target ([`ImageMoments`], *optional*):
            Where the gallery is to be moved: what a layer is given is moved at once, by the images so far, because it
            decides what later layers are given.

    Raises:
        ValueError: if there is not one style for each image.
    """
    found: dict[str | None, GalleryMoments] = {}
    of_layers: dict[str | None, dict[str, FeatureMoments]] = {}
    passing: dict[str | None, dict[str, FeatureMoments]] = {}  # with the batch that is in the tower
    images = 0  # measured so far
    running = 0  # in the tower
    layers = {} if tower is None else moved_layers(tower)
    targets = {}
    if target is not None:
        targets = {name: target.of_layer(name) for name in layers if target.has_layer(name)}

    def rows_of(first: int, count: int) -> dict[str | None, list[int]]:
        rows: dict[str | None, list[int]] = {}
        for row in range(count):
            # A process that runs its last batch again, for the others, has no styles left.
            label = None if styles is None else styles[min(first + row, len(styles) - 1)]
            rows.setdefault(label, []).append(row)
        return rows

    def start(module: nn.Module, inputs: Any, kwargs: Mapping[str, Any]) -> None:
        nonlocal running
        running = len(kwargs["pixel_values"])

    def measure(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        given, *others = inputs
        # Some towers (LeViT) fold the tokens of an image into the batch.
        values = moved = given.unflatten(0, (running, -1))
        for label, rows in rows_of(images, running).items():
            of_label = values[rows].flatten(0, 1)
            own = FeatureMoments.of(of_label)
            # Of a layer that runs several times in an image, all.
            known = {**of_layers.get(label, {}), **passing.get(label, {})}.get(name)
            passing.setdefault(label, {})[name] = own = own if known is None else known.merge(own)
            if name in targets:
                maps = _map(own, *targets[name], strength=_layer_strength(passing[label], targets))
                part = _moved(of_label, *(values_of[None].to(values.device) for values_of in maps))
                part = part.unflatten(0, (len(rows), -1))
                index = torch.tensor(rows, device=values.device)
                moved = part if len(rows) == running else moved.index_copy(0, index, part)
        return (moved.flatten(0, 1), *others)

    hooks = [layer.register_forward_pre_hook(partial(measure, name)) for name, layer in layers.items()]
    if tower is not None:
        hooks.append(tower.register_forward_pre_hook(start, with_kwargs=True))
    try:
        with torch.compiler.set_stance("force_eager") if layers else nullcontext():
            for batch in states:
                first, images = images, images + len(batch.states)
                if styles is not None and images > len(styles):
                    raise ValueError(f"There must be one style for each image, but there are {len(styles)} styles.")
                for label, rows in rows_of(first, len(batch.states)).items():
                    class_state = None if batch.class_state is None else batch.class_state[rows]
                    own = GalleryMoments.of(
                        batch._replace(states=batch.states[rows], mask=batch.mask[rows], class_state=class_state)
                    )
                    found[label] = own if label not in found else found[label].merge(own)
                for label, moments in passing.items():
                    of_layers.setdefault(label, {}).update(moments)
                passing.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if styles is not None and images != len(styles):
        raise ValueError(f"There must be one style for each image, but there are {len(styles)} for {images} images.")
    for label, layer_moments in of_layers.items():
        found[label].layers = layer_moments
    return found


def _moved(values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """
    `(values, features, ...)` times `scale` plus `shift`, both `(1 or batch, features)`; in float32 in between. Each
    image of the batch may have several values, one after the other.
    """
    if len(scale) > 1:
        scale, shift = (part.repeat_interleave(len(values) // len(scale), dim=0) for part in (scale, shift))
    shape = (*scale.shape, *[1] * (values.dim() - 2))
    return (values.float() * scale.view(shape) + shift.view(shape)).to(values.dtype)


def together(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches of pixels joined, so that some hundred images pass the tower at once; all others as they are."""
    pending: list[torch.Tensor] = []
    number = 0
    for batch in batches:
        if "pixel_values" not in batch:
            yield dict(batch)
            continue
        number = number or num_together(len(batch["pixel_values"]))
        pending.append(torch.as_tensor(batch["pixel_values"]))
        if len(pending) == number:
            yield {"pixel_values": torch.cat(pending)}
            pending = []
    if pending:
        yield {"pixel_values": torch.cat(pending)}


def num_together(batch_size: int) -> int:
    """How many batches are joined."""
    return max(1, _TOGETHER // max(1, batch_size))


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
    Moves images to where images of training lie in the tower; [`PicoModel.align`] makes it.

    Attributes:
        scale (`torch.Tensor` of shape `(styles, hidden)`): What each feature is multiplied by.
        shift (`torch.Tensor` of shape `(styles, hidden)`): What is added to it then.
        class_scale, class_shift (`torch.Tensor` of shape `(styles, hidden)`, *optional*):
            The same of the class token, whose state is not distributed as those of the patches are.
        styles (`tuple[str, ...]`, *optional*):
            What the rows are for; None if the one row is for all images, or each row for an image of its own.
        layers (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            Scale and shift of what layers of the tower are given, by name, each of shape `(styles, features)`.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    class_scale: torch.Tensor | None = None
    class_shift: torch.Tensor | None = None
    styles: tuple[str, ...] | None = None
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "GalleryAlignment":
        """The same on another device."""
        return self._each(lambda value: value.to(device), self.styles)

    def check(self, images: int) -> None:
        """ValueError unless there is one row for all images, or one for each."""
        if self.styles is not None or len(self.scale) not in (1, images):
            raise ValueError("A gallery that was measured by styles is moved by `for_images(styles)`.")

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
        return self._each(lambda value: value[rows], None)

    def __call__(self, states: Any) -> Any:
        """Moves [`TokenStates`]; in float32, then in the type that they had."""
        self.check(len(states.states))
        own = self.to(states.states.device)
        moved = (states.states.float() * own.scale[:, None] + own.shift[:, None]).to(states.states.dtype)
        class_state = states.class_state
        if class_state is not None and own.class_scale is not None and own.class_shift is not None:
            class_state = (class_state.float() * own.class_scale + own.class_shift).to(class_state.dtype)
        return states._replace(states=moved, class_state=class_state)

    @contextmanager
    def in_layers(self, tower: nn.Module) -> Iterator[None]:
        """Moves what the layers of a tower are given, as long as the context lasts."""
        layers = moved_layers(tower)
        ran: set[str] = set()

        def move(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            ran.add(name)
            values, *others = inputs
            return (_moved(values, *(part.to(values.device) for part in self.layers[name])), *others)

        hooks = [layers[name].register_forward_pre_hook(partial(move, name)) for name in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if len(ran) < len(self.layers):
            raise ValueError(
                "The gallery was measured with layers of the tower that do not run here, or run compiled, where they "
                "cannot be moved. Encode it with the tower that measured it, without torch.compile."
            )

    def _each(
        self, change: Callable[[torch.Tensor], torch.Tensor], styles: tuple[str, ...] | None
    ) -> "GalleryAlignment":
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {name: change(value) for name, value in named.items() if isinstance(value, torch.Tensor)}
        layers = {name: (change(scale), change(shift)) for name, (scale, shift) in self.layers.items()}
        return GalleryAlignment(**tensors, styles=styles, layers=layers)


class ImageMoments(nn.Module):
    """
    Where images of training lie at the outputs of the image tower, and before its layers of batch normalisation: mean
    and standard deviation of each feature.

    Args:
        features (`int`): Width of the tower's outputs.
        with_class_state (`bool`): Whether the class token has moments of its own.
        layers (`dict[str, int]`, *optional*): Names and widths of the layers.
    """

    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    class_mean: torch.Tensor
    class_std: torch.Tensor | None
    layer_mean: torch.Tensor
    layer_std: torch.Tensor | None

    def __init__(self, features: int, with_class_state: bool, layers: Mapping[str, int] | None = None):
        super().__init__()
        self.layers = dict(layers or {})
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for name in ("mean", "std", "class_mean", "class_std"):
            exists = with_class_state or not name.startswith("class_")
            self.register_buffer(name, torch.zeros(features) if exists else None)
        for name in ("layer_mean", "layer_std"):
            self.register_buffer(name, torch.zeros(sum(self.layers.values())) if self.layers else None)

    def of_layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation `(features,)` of what a layer is given."""
        assert self.layer_std is not None
        of_all = (values.split(list(self.layers.values())) for values in (self.layer_mean, self.layer_std))
        mean, std = (parts[list(self.layers).index(name)] for parts in of_all)
        return mean, std

    def has_layer(self, name: str) -> bool:
        """Whether there are any of a layer: it does not run where kept states were measured, and some never do."""
        return self.layer_std is not None and bool(self.of_layer(name)[1].any())

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
        if self.layer_std is not None and moments.layers:
            for name, own in moments.layers.items():
                for buffer, values in zip(self.of_layer(name), (own.mean, own.std), strict=True):
                    buffer.copy_(values)

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
        rows: list[dict[str, torch.Tensor]] = []
        maps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        for label, moments in galleries.items():
            _check_finite(moments, label)
            stays = moments.images < MIN_IMAGES
            row = dict(zip(("scale", "shift"), _map(moments.tokens, self.mean, self.std, stays), strict=True))
            if moments.class_state is not None and self.class_std is not None:
                of_class = _map(moments.class_state, self.class_mean, self.class_std, stays)
                row |= dict(zip(("class_scale", "class_shift"), of_class, strict=True))
            rows.append(row)
            targets = {layer: self.of_layer(layer) for layer in moments.layers if self.has_layer(layer)}
            strength = _layer_strength(moments.layers, targets)
            maps.append(
                {layer: _map(moments.layers[layer], *target, stays, strength) for layer, target in targets.items()}
            )
        device = self.mean.device
        layers: dict[str, Any] = {
            name: tuple(torch.stack(parts).to(device) for parts in zip(*(own[name] for own in maps), strict=True))
            for name in maps[0]
        }
        tensors: dict[str, Any] = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        styles = None if None in galleries else tuple(str(label) for label in galleries)
        return GalleryAlignment(**tensors, styles=styles, layers=layers)


def _layer_strength(
    layers: Mapping[str, FeatureMoments], targets: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """
    How far layers are moved, by where the first one that runs finds the gallery before anything has been moved: the
    Fréchet distance of normal distributions with independent features, over the variance of training.
    """
    first = next((name for name in layers if name in targets), None)
    if first is None:
        return 0.0
    mean, std = (values.cpu().double() for values in targets[first])
    own = layers[first]
    squares = (own.mean - mean).square().sum() + (own.std - std).square().sum()
    distance = float(squares / std.square().sum())
    return _LAYER_STRENGTH * distance / (distance + _HALF_STRENGTH_AT)


def _map(
    gallery: FeatureMoments, mean: torch.Tensor, std: torch.Tensor, stays: bool = False, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factor and summand `(features,)` in float32 by which a gallery gets this mean and spread. With a `strength` below 1
    the spread comes that far on a logarithmic scale, and what lies that far from the new mean to the old one is put at
    the new one.
    """
    if stays:
        return torch.ones_like(gallery.mean).float(), torch.zeros_like(gallery.mean).float()
    mean, std = mean.cpu().double(), std.cpu().double()
    # A feature that never varies has only a mean.
    varies = gallery.std > _ROUNDING * torch.maximum(gallery.mean.abs(), std)
    scale = torch.where(varies, std / gallery.std.where(varies, 1.0), 1.0) ** strength
    return scale.float(), (mean - torch.lerp(mean, gallery.mean, strength) * scale).float()


def _check_finite(moments: GalleryMoments, label: str | None) -> None:
    parts = [moments.tokens, *([moments.class_state] if moments.class_state else []), *moments.layers.values()]
    if not all(bool((part.mean + part.squares).isfinite().all()) for part in parts):
        of_style = "" if label is None else f" of the style {label!r}"
        raise ValueError(f"The image tower gives values that are NaN or infinite for images{of_style}.")
