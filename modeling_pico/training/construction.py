"""
Staged construction of style prototypes: statistics of matched pairs, K-means, feedback, and all their state. When
what happens is decided by [`~modeling_pico.training.callbacks.PrototypeCallback`].

Method: PICO (arXiv 2510.11175). Prototypes come from K-means over feature columns, each weighted by its pseudo-style
probability; later ones enter by a weight that grows with the gain in validation retrieval. The instances, the
geometry of columns and the exact feedback weight are our reconstruction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from ..distributed import broadcast, gather_rows
from ..model.prototypes_pico import StylePrototypes, squared_distances
from .arguments import PicoTrainingArguments


STATE_FILE = "prototype_construction.safetensors"

# K-means ends in an optimum that depends on its start: from one start the energy is up to 4% above that from another.
# So many starts are tried on so many of the points, which bounds the cost by about a second a side.
NUM_STARTS = 10
START_POINTS = 2**13


def sign_shares(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Shares of a sample's real tokens at which each feature is positive, and at which it is negative: `(batch, 2, dim)`
    in float32, of tokens `(batch, tokens, dim)` with a mask `(batch, tokens)`.
    """
    real = mask.bool().float().unsqueeze(1)  # (batch, 1, tokens)
    signs = tokens.detach().sign().float()
    # Positive minus negative, and positive plus negative: two products instead of four passes over the tokens.
    difference = real @ signs
    total = real @ signs.abs_()
    return torch.cat([total + difference, total - difference], dim=1) / 2 / real.sum(dim=2, keepdim=True).clamp(min=1)


def sign_agreement(
    image_tokens: torch.Tensor, image_mask: torch.Tensor, text_tokens: torch.Tensor, text_mask: torch.Tensor
) -> torch.Tensor:
    r"""
    Share of positive products `v_id * t_jd` of each matched pair, `1/(nv*nt) * sum_ij [v_id * t_jd > 0]` (PICO). Its
    mean over pairs is the pseudo-semantic probability of feature column `d`.

    It equals `a+ b+ + a- b-` with the shares of positive and negative values on either side, so no
    `(patches, words, dim)` tensor is needed.

    Args:
        image_tokens (`torch.Tensor` of shape `(batch, patches, dim)`): Token embeddings of the images.
        image_mask (`torch.Tensor` of shape `(batch, patches)`): True at real tokens.
        text_tokens (`torch.Tensor` of shape `(batch, words, dim)`): Token embeddings of their texts.
        text_mask (`torch.Tensor` of shape `(batch, words)`): True at real tokens.

    Returns:
        `torch.Tensor` of shape `(batch, dim)` in float32.
    """
    return (sign_shares(image_tokens, image_mask) * sign_shares(text_tokens, text_mask)).sum(dim=1)


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
        points (`torch.Tensor` of shape `(points, length)`): At least one, finite, on any device.
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
    """
    The centroids `(clusters, length)` of lowest energy that [`weighted_kmeans`] finds on some of the points from
    several k-means++ starts, for K-means over all points to start from. `generator` draws points and starts.
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
def build_prototypes(
    columns: torch.Tensor,
    style: torch.Tensor,
    current: StylePrototypes,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Builds the prototypes of one side.

    The first ones take the best of several k-means++ starts; later ones start from those in use, so that identities
    persist. The unit of each coordinate is its standard deviation over the first columns and stays *(ours)*.

    Args:
        columns (`torch.Tensor` of shape `(samples, dim, length)`): Feature columns.
        style (`torch.Tensor` of shape `(dim,)`): Pseudo-style probability of each feature.
        current ([`StylePrototypes`]): The prototypes in use. Not changed.
        generator (`torch.Generator`, *optional*): Generator of the first starts.

    Returns:
        `dict[str, torch.Tensor]`: by the names of the buffers of [`StylePrototypes`].
    """
    points = columns.reshape(-1, columns.shape[-1]).float()
    weights = style.expand(len(columns), -1).reshape(-1)
    num_prototypes, is_first = len(current.prototypes), bool(current.stage == 0)
    if is_first:
        spread = points.std(dim=0, unbiased=False)
        # A coordinate that never varies says nothing; a unit of one keeps it harmless.
        scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
        initial = best_start(points / scale, weights, num_prototypes, generator=generator)
    else:
        scale = current.column_scale
        initial = current.prototypes / scale
    centroids, assignment, _ = weighted_kmeans(points / scale, weights, num_prototypes, initial=initial)
    centroids = centroids * scale
    count = torch.bincount(assignment, minlength=num_prototypes)
    total = torch.zeros(num_prototypes, device=points.device).index_add_(0, assignment, weights)
    return {
        "prototypes": centroids,
        "style_rate": torch.where(count > 0, total / count.clamp(min=1), weights.mean()),
        "column_scale": scale,
        "temperature": squared_distances(points, centroids, scale).amin(dim=1).mean().clamp(min=1e-6),
        "stage": torch.full_like(current.stage, 1 if is_first else 2),
    }


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
    term = gain / kappa
    high, low = max(log_sum, term), min(log_sum, term)
    new_log_sum = high if math.isinf(low) else high + math.log1p(math.exp(low - high))
    return math.exp(term - new_log_sum), new_log_sum


class PrototypeConstruction:
    r"""
    Collects feature columns and statistics of pairs in the ordinary training pass, proposes prototypes, and holds a
    proposal until it may come into use: at the start of the next step, after the checkpoint of the evaluation that it
    follows from was written with the prototypes that were evaluated.

    A model that brings prototypes along starts with an update of them.

    Args:
        prototypes (`nn.ModuleDict`): The model's [`StylePrototypes`] by side.
        args ([`PicoTrainingArguments`]): Feedback and size of the reservoir.

    Attributes:
        collects_statistics, collects_columns (`bool`): Whether the batches of this step are collected.
        due (`bool`): Whether the evaluation that follows proposes prototypes.
        num_constructions (`int`): Number of proposals so far.
        pending (`dict[str, torch.Tensor]`, *optional*): Buffers that come into use at the next step.
        previous_rsum (`float`): Of the last evaluation, from which `feedback="epoch_delta"` takes its gain.
        agreement_sum `(dim,)`, num_pairs: [`sign_agreement`] of the pairs since the last proposal, summed.
        columns (`dict[str, torch.Tensor]`): By side `(pairs, dim, length)`, of the last `reservoir_pairs` of them.
    """

    def __init__(self, prototypes: Any, args: PicoTrainingArguments):
        self.prototypes = prototypes
        self.args = args
        self.collects_statistics = self.collects_columns = self.due = False
        self.num_constructions = int(prototypes["image"].stage > 0)
        self.pending: dict[str, torch.Tensor] | None = None
        # What came before counts as a gain of zero.
        self.feedback_log_sum = torch.tensor(0.0 if self.num_constructions else -math.inf)
        self.previous_rsum = math.nan
        self._start_collection()

    def _start_collection(self) -> None:
        self.agreement_sum, self.num_pairs = torch.zeros(()), torch.zeros(())
        self.columns: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def collect(self, outputs: Any) -> None:
        """Takes what it needs of a batch ([`PicoOutput`]): nothing, signs, or signs and columns."""
        if not self.collects_statistics:
            return
        sides = {side: (outputs[f"{side}_tokens"].detach(), outputs[f"{side}_mask"]) for side in self.prototypes}
        # What a step that is left out saw must not reach the prototypes either.
        valid = torch.stack(
            [mask.any(dim=1) & tokens.flatten(1).sum(dim=1).isfinite() for tokens, mask in sides.values()]
        ).all(dim=0)
        agreement = gather_rows(sign_agreement(*sides["image"], *sides["text"]))
        counts = gather_rows(valid.long())
        self.agreement_sum = self.agreement_sum + (agreement * counts[:, None]).sum(dim=0)
        self.num_pairs = self.num_pairs + counts.sum()
        if not self.collects_columns:
            return
        for side, (tokens, mask) in sides.items():
            columns = gather_rows(self.prototypes[side].columns(tokens, mask)[valid])
            columns = torch.cat([self.columns[side], columns]) if side in self.columns else columns
            self.columns[side] = columns[-self.args.reservoir_pairs :]

    def feedback_images(self, num_images: int) -> torch.Tensor | None:
        r"""
        Which of `num_images` validation images give the counterfactual feedback: one at random of each of
        `args.feedback_images` blocks of equal size, the same ones for every construction *(ours)*.

        A multiple of the number of processes is taken, so that blocks do not cross the borders between processes.

        Returns:
            `torch.Tensor` of shape `(chosen,)`, ascending, or None for all images.
        """
        args = self.args
        if args.feedback != "counterfactual" or args.feedback_images is None:
            return None
        count = -(-args.feedback_images // args.world_size) * args.world_size
        if count >= num_images:
            return None
        borders = torch.arange(count + 1) * num_images // count
        share = torch.rand(count, generator=torch.Generator().manual_seed(args.seed), dtype=torch.float64)
        return borders[:-1] + (share * borders.diff()).long()

    @torch.no_grad()
    def propose(self, score: Callable[[], float] | None = None, rsum: float | None = None) -> dict[str, float]:
        r"""
        Builds prototypes from what was collected, weighs them by the configured feedback, and queues the update.

        Args:
            score (`Callable`, *optional*):
                Gives the rSum of the same network and embeddings under whatever prototypes the model holds when it is
                called. Not needed for `feedback="constant"`.
            rsum (`float`, *optional*): What `score` gives under the prototypes in use, where that is known.

        Returns:
            What to log: stage, gain, weight and how far the prototypes move.
        """
        if not self.columns or not len(self.columns["image"]):
            raise ValueError(
                "No columns were collected before the construction of prototypes; train for a step first."
            )
        style = 1 - self.agreement_sum / self.num_pairs.clamp(min=1)
        # One seed per construction: a resumed run draws what the uninterrupted one would have drawn.
        generator = torch.Generator().manual_seed(self.args.seed + self.num_constructions)
        old = {name: buffer.clone() for name, buffer in self.prototypes.named_buffers()}
        new = {}
        for side, current in self.prototypes.items():
            for name, tensor in build_prototypes(self.columns[side], style, current, generator=generator).items():
                # All processes computed the same from the same data; different hardware may still round differently.
                new[f"{side}.{name}"] = broadcast(tensor)

        gain = self._gain(old, new, score, rsum)
        weight, log_sum = feedback_weight(float(self.feedback_log_sum), gain or 0.0, self.args.feedback_kappa)
        if gain is None and self.num_constructions:
            weight = self.args.feedback_weight
        self.feedback_log_sum = torch.tensor(log_sum)
        self.pending = {
            name: old[name] * (1 - weight) + tensor * weight if tensor.is_floating_point() else tensor
            for name, tensor in new.items()
        }
        self.num_constructions += 1
        self.due = False
        self._start_collection()

        report = {"prototype_stage": float(new["image.stage"]), "prototype_feedback_weight": weight}
        if gain is not None:
            report["prototype_feedback_gain"] = gain
        for side in self.prototypes:
            moved = self.pending[f"{side}.prototypes"] - old[f"{side}.prototypes"]
            report[f"{side}_prototype_movement"] = float((moved / new[f"{side}.column_scale"]).norm(dim=1).mean())
        return report

    def _gain(
        self,
        old: dict[str, torch.Tensor],
        new: dict[str, torch.Tensor],
        score: Callable[[], float] | None,
        rsum: float | None,
    ) -> float | None:
        if score is None:
            return None
        rsum = score() if rsum is None else rsum
        if self.args.feedback == "epoch_delta":
            return 0.0 if math.isnan(self.previous_rsum) else rsum - self.previous_rsum
        try:
            self._use(new)
            return score() - rsum
        finally:
            self._use(old)

    @torch.no_grad()
    def _use(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, buffer in self.prototypes.named_buffers():
            buffer.copy_(buffers[name])

    def apply_pending(self) -> None:
        """Brings a queued update into use."""
        if self.pending is not None:
            self._use(self.pending)
            self.pending = None

    def save(self, folder: str) -> None:
        """Writes all state that is not in the model beside a checkpoint, so that a resumed run continues exactly."""
        tensors = {
            "num_constructions": torch.tensor(self.num_constructions),
            "feedback_log_sum": self.feedback_log_sum,
            "previous_rsum": torch.tensor(self.previous_rsum, dtype=torch.float64),
            "agreement_sum": self.agreement_sum,
            "num_pairs": self.num_pairs,
            **{f"columns.{side}": columns for side, columns in self.columns.items()},
            **{f"pending.{name}": tensor for name, tensor in (self.pending or {}).items()},
        }
        safetensors.torch.save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, os.path.join(folder, STATE_FILE)
        )

    def load(self, folder: str) -> None:
        """Reads what [`save`] wrote."""
        device = self.prototypes["image"].prototypes.device
        tensors = safetensors.torch.load_file(os.path.join(folder, STATE_FILE), device=str(device))
        self.num_constructions = int(tensors["num_constructions"])
        self.feedback_log_sum = tensors["feedback_log_sum"]
        self.previous_rsum = float(tensors["previous_rsum"])
        self.agreement_sum, self.num_pairs = tensors["agreement_sum"], tensors["num_pairs"]
        self.columns = _below("columns.", tensors)
        self.pending = _below("pending.", tensors) or None


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


__all__ = [
    "STATE_FILE",
    "PrototypeConstruction",
    "best_start",
    "build_prototypes",
    "feedback_weight",
    "weighted_kmeans",
]
