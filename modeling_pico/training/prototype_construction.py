"""
Construction of style prototypes: pure functions of tensors. When they run is decided elsewhere.

Method: PICO (arXiv 2510.11175). Prototypes come from K-means over feature columns, each weighted by its pseudo-style
probability; later ones enter by a weight that grows with the gain in validation retrieval. The instances, the
geometry of columns and the exact feedback weight are our reconstruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from ..model.prototypes_pico import StylePrototypes, squared_distances


# K-means ends in an optimum that depends on its start: from one start the energy is up to 4% above that from another.
# So many starts are tried on so many of the points, which bounds the cost by about a second a side.
NUM_STARTS = 10
START_POINTS = 2**13


@dataclass
class PrototypeState:
    """
    One set of prototypes with everything that is estimated with them. Field names are those of the buffers of
    [`StylePrototypes`], where shapes are documented.
    """

    visual_prototypes: torch.Tensor
    textual_prototypes: torch.Tensor
    visual_style_rate: torch.Tensor
    textual_style_rate: torch.Tensor
    visual_column_scale: torch.Tensor
    textual_column_scale: torch.Tensor
    visual_temperature: torch.Tensor
    textual_temperature: torch.Tensor
    pseudo_semantic_probability: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, prototypes: StylePrototypes) -> PrototypeState:
        """A copy of the buffers in use."""
        return cls(**{field.name: getattr(prototypes, field.name).detach().clone() for field in fields(cls)})

    @torch.no_grad()
    def copy_to(self, prototypes: StylePrototypes) -> None:
        """Writes the tensors into the buffers."""
        for name, tensor in self.tensors().items():
            getattr(prototypes, name).copy_(tensor)

    def interpolate(self, target: PrototypeState, weight: float) -> PrototypeState:
        """`(1 - weight) * self + weight * target`, exactly `target` at weight 1."""
        own, other = self.tensors(), target.tensors()
        return PrototypeState(**{name: own[name] * (1 - weight) + other[name] * weight for name in own})


@torch.no_grad()
def weighted_kmeans(
    points: torch.Tensor,
    weights: torch.Tensor,
    num_clusters: int,
    *,
    generator: torch.Generator | None = None,
    initial: torch.Tensor | None = None,
    max_iterations: int = 50,
    tolerance: float = 1e-3,
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    r"""
    K-means with a weight per point; the energy is `sum_n w_n * min_k |x_n - c_k|²` (PICO).

    The centroid of a cluster is the weighted mean of its points, so the energy never rises. A cluster without weight
    keeps its centroid.

    Args:
        points (`torch.Tensor` of shape `(points, length)`): The points, on any device.
        weights (`torch.Tensor` of shape `(points,)`): Weights, not negative. All-zero weights count as equal ones.
        num_clusters (`int`): Number of clusters; may exceed the number of distinct points.
        generator (`torch.Generator`, *optional*): CPU generator of the k-means++ start.
        initial (`torch.Tensor` of shape `(clusters, length)`, *optional*):
            Centroids to start from instead of k-means++, so that clusters keep their identity.
        max_iterations (`int`, *optional*, defaults to 50): Upper bound of iterations.
        tolerance (`float`, *optional*, defaults to 1e-3):
            Stops when an iteration lowers the energy by no more than this share. On feature columns about 1% is
            then left to gain, which is no more than two starts differ by.

    Returns:
        Centroids `(clusters, length)`, the cluster of each point `(points,)`, and the energy before each centroid
        update and at the end.
    """
    if len(points) == 0:
        raise ValueError("K-means needs at least one point, but got none.")
    if not points.isfinite().all():
        raise ValueError("K-means points must be finite, but some are NaN or infinite.")
    if not weights.isfinite().all() or weights.min() < 0:
        raise ValueError(
            f"K-means weights must be finite and not negative, but the smallest is {weights.min().item()} and the "
            f"largest {weights.max().item()}."
        )
    points = points.float()
    weights = weights.float() if weights.sum() > 0 else torch.ones_like(weights, dtype=torch.float32)
    centroids = _plus_plus_start(points, weights, num_clusters, generator) if initial is None else initial.float()

    # Points lie along the last dimension: reductions over clusters and sums of points are several times faster there.
    coordinates = points.T.contiguous()
    squares = points.square().sum(dim=1)
    # The row of ones gives the mass of a cluster together with the sum of its points.
    weighted = torch.cat([coordinates, torch.ones_like(coordinates[:1])]) * weights
    distances = coordinates.new_empty(num_clusters, len(points))
    energies: list[float] = []
    for iteration in range(max_iterations + 1):
        # Without the square of the point itself, which does not change what is nearest.
        torch.addmm(centroids.square().sum(dim=1, keepdim=True), centroids, coordinates, alpha=-2, out=distances)
        nearest, assignment = distances.min(dim=0)
        energies.append(float(((nearest + squares).clamp_(min=0) * weights).sum(dtype=torch.float64)))
        converged = len(energies) > 1 and energies[-2] - energies[-1] <= tolerance * energies[-2]
        if converged or iteration == max_iterations:
            break
        sums = weighted.new_zeros(len(weighted), num_clusters)
        sums.scatter_add_(1, assignment.expand_as(weighted), weighted)
        total, mass = sums[:-1].T, sums[-1, :, None]
        centroids = torch.where(mass > 0, total / mass, centroids)
    return centroids, assignment, energies


def best_start(
    points: torch.Tensor, weights: torch.Tensor, num_clusters: int, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    r"""
    The centroids of lowest energy that [`weighted_kmeans`] finds on some of the points from several k-means++ starts,
    for K-means over all points to start from.

    Args:
        points (`torch.Tensor` of shape `(points, length)`): The points, on any device.
        weights (`torch.Tensor` of shape `(points,)`): Weights, not negative.
        num_clusters (`int`): Number of clusters.
        generator (`torch.Generator`, *optional*): CPU generator of the choice of points and of all starts.

    Returns:
        `torch.Tensor` of shape `(clusters, length)`: centroids.
    """
    some = torch.randperm(len(points), generator=generator)[:START_POINTS].to(points.device)
    points, weights = points[some], weights[some]
    runs = [weighted_kmeans(points, weights, num_clusters, generator=generator) for _ in range(NUM_STARTS)]
    return min(runs, key=lambda run: run[2][-1])[0]


def _plus_plus_start(
    points: torch.Tensor, weights: torch.Tensor, num_clusters: int, generator: torch.Generator | None
) -> torch.Tensor:
    # Drawn on the CPU in float64, so that every device and process starts from the same points.
    def draw(probability: torch.Tensor) -> int:
        cumulative = probability.double().cpu().cumsum(0)
        place = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        return min(int(torch.searchsorted(cumulative, place, right=True)), len(cumulative) - 1)

    def distances(index: int) -> torch.Tensor:
        return (points - points[index]).square().sum(dim=1)

    chosen = [draw(weights)]
    nearest = distances(chosen[-1])
    for _ in range(num_clusters - 1):
        potential = nearest * weights
        # Fewer distinct points than clusters: the rest start anywhere and stay empty.
        chosen.append(draw(potential if potential.sum() > 0 else weights))
        nearest = torch.minimum(nearest, distances(chosen[-1]))
    return points[torch.tensor(chosen, device=points.device)].clone()


@torch.no_grad()
def construct_prototypes(
    prototypes: StylePrototypes,
    visual_columns: torch.Tensor,
    textual_columns: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
) -> PrototypeState:
    r"""
    Builds pseudo-style prototypes from a reservoir of columns and the statistics of pairs held in `prototypes`.

    The first construction takes the best of several k-means++ starts; later ones start from the prototypes in use, so
    that identities persist. The unit of each coordinate is its standard deviation over the first reservoir and stays
    *(ours)*.

    Args:
        prototypes ([`StylePrototypes`]): Prototypes in use and statistics. Not changed.
        visual_columns (`torch.Tensor` of shape `(pairs, dim, length)`): Image columns of matched pairs.
        textual_columns (`torch.Tensor` of shape `(pairs, dim, length)`): Text columns of the same pairs.
        generator (`torch.Generator`, *optional*): Generator of the first starts.

    Returns:
        [`PrototypeState`]

    Raises:
        ValueError: There are no columns.
    """
    if len(visual_columns) == 0:
        raise ValueError("No columns were collected before the construction of prototypes; train for a step first.")
    sides = {"visual": visual_columns, "textual": textual_columns}
    first = bool(prototypes.num_constructions == 0)
    semantic = prototypes.pseudo_probability()
    state = {"pseudo_semantic_probability": semantic}
    for side, columns in sides.items():
        points = columns.reshape(-1, columns.shape[-1]).float()
        style = (1 - semantic).expand(len(columns), -1).reshape(-1)
        if first:
            spread = points.std(dim=0, unbiased=False)
            # A coordinate that never varies says nothing; a unit of one keeps it harmless.
            scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
        else:
            scale = getattr(prototypes, f"{side}_column_scale")
        num_clusters = prototypes.config.num_style_prototypes
        if first:
            initial = best_start(points / scale, style, num_clusters, generator=generator)
        else:
            initial = getattr(prototypes, f"{side}_prototypes") / scale
        centroids, assignment, _ = weighted_kmeans(points / scale, style, num_clusters, initial=initial)
        centroids = centroids * scale
        state[f"{side}_prototypes"] = centroids
        state[f"{side}_column_scale"] = scale
        state[f"{side}_style_rate"] = _cluster_means(style, assignment, len(centroids), fallback=style.mean())
        nearest = squared_distances(points, centroids, scale).amin(dim=1).mean()
        state[f"{side}_temperature"] = nearest.clamp(min=1e-6)
    return PrototypeState(**state)


def _cluster_means(
    values: torch.Tensor, assignment: torch.Tensor, num_clusters: int, fallback: torch.Tensor
) -> torch.Tensor:
    count = torch.bincount(assignment, minlength=num_clusters)
    total = torch.zeros(num_clusters, device=values.device).index_add_(0, assignment, values)
    return torch.where(count > 0, total / count.clamp(min=1), fallback)


def feedback_weight(log_sum: float, gain: float, kappa: float = 1.0) -> tuple[float, float]:
    r"""
    Weight of new prototypes from their gain in validation rSum *(ours)*.

    `w_j = exp(gain_j / kappa) / sum_{i<=j} exp(gain_i / kappa)`. With `mu_j = (1 - w_j) mu_{j-1} + w_j new_j` the
    prototypes of construction `i` then carry, at every later `j`, the weight `exp(gain_i / kappa) / sum_{i<=j}`: more
    for a larger gain, in whatever order.

    Args:
        log_sum (`float`): Logarithm of the sum over earlier constructions; minus infinity before the first.
        gain (`float`): Gain in rSum points.
        kappa (`float`, *optional*, defaults to 1.0): Gain, in rSum points, that is worth a factor of e.

    Returns:
        The weight in [0, 1] and the new logarithm of the sum.
    """
    if not kappa > 0:
        raise ValueError(f"`kappa` must be greater than 0, but got {kappa}.")
    if not math.isfinite(gain):
        raise ValueError(f"the gain must be finite, but got {gain}.")
    term = gain / kappa
    high, low = max(log_sum, term), min(log_sum, term)
    new_log_sum = high if math.isinf(low) else high + math.log1p(math.exp(low - high))
    return math.exp(term - new_log_sum), new_log_sum


__all__ = ["PrototypeState", "best_start", "construct_prototypes", "feedback_weight", "weighted_kmeans"]
