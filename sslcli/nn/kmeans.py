"""Whitening and k-means of rows that are spread over ranks, each holding the share that `dist.share` names.

Results are equal on all ranks, and up to rounding those of one rank that holds all rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist, seeds
from sslcli.errors import DivergedError, UserError
from sslcli.nn.precision import no_autocast

AT_ONCE = 2**24
"""Distances, or numbers of rows, that are in memory at one time."""
NUDGE = 1 / 1024
"""How far apart the two halves of a split cluster start, relative to its centroid; as in faiss."""
FLAT = 1e-12
"""A variance below this share of the largest is none."""
NONE = 1e-30
"""And so is one below this."""


class Clusters(NamedTuple):
    """Rows in groups."""

    labels: Tensor
    """(n,) int64: the cluster of each row of this rank's share."""
    centroids: Tensor
    """(K, D) means, equal on all ranks."""
    objective: Tensor
    """(T,) float64: the sum of squared distances to the nearest centroid before every update."""


@torch.no_grad()
def kmeans(
    rows: Tensor, total: int, clusters: int, *, iterations: int = 20, key: int, start: Tensor | None = None
) -> Clusters:
    """Lloyd's algorithm by Euclidean distance, as faiss runs it for DeepCluster: all rows, one start.

    A cluster that has lost all its rows takes half of another, drawn in proportion to size (Caron et al. 2018, section
    3.3 "Trivial solutions": the centroid of a non-empty cluster, nudged). After the last update rows are assigned once
    more, and no cluster is refilled: some may be empty. Ends early when no row changes its cluster.

    Args:
        rows: (n, D), this rank's share of `total` rows, finite.
        total: rows of all ranks.
        clusters: K.
        iterations: most updates of the centroids.
        key: of the draws: which rows are the first centroids, which clusters are split.
        start: (K, D), first centroids in place of drawn rows.

    Raises:
        UserError: there are more clusters than rows.
        DivergedError: a number is not finite.
    """
    if clusters > total:
        raise UserError(
            f"{clusters} clusters are more than the {total} images there are",
            hint="lower `method.clusters`, to a hundredth of the images or so",
        )
    check_finite(rows)
    centroids = start_rows(rows, total, clusters, seeds.seed_of(key, "start")) if start is None else start.clone()
    labels = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    objective: list[Tensor] = []
    for turn in range(iterations):
        before, sums = labels, torch.zeros_like(centroids, dtype=torch.float64)
        labels, distances = nearest(rows, centroids, sums)
        objective.append(dist.sum_(distances.double().sum()))
        if not dist.sum_((labels != before).sum()):
            break
        counts = dist.sum_(torch.bincount(labels, minlength=clusters))  # (K,)
        means = dist.sum_(sums) / counts[:, None].clamp_min(1)
        centroids = torch.where(counts[:, None] > 0, means.to(centroids.dtype), centroids)
        refill_(centroids, counts.cpu().numpy(), seeds.seed_of(key, "split", turn))
    labels, _ = nearest(rows, centroids)
    return Clusters(labels, centroids, torch.stack(objective))


def start_rows(rows: Tensor, total: int, count: int, key: int) -> Tensor:
    """So many different rows (K, D) of all ranks', drawn at random; equal on all ranks."""
    share = dist.share(total)
    assert len(rows) == len(share), f"rank {dist.rank()} holds {len(rows)} of {total} rows, not {len(share)}"
    chosen = torch.from_numpy(seeds.permuted(np.arange(count), total, key)).to(rows.device)
    mine = (chosen >= share.start) & (chosen < share.stop)
    found = rows.new_zeros(count, rows.shape[1])
    found[mine] = rows[chosen[mine] - share.start]
    return dist.sum_(found)


def nearest(rows: Tensor, centroids: Tensor, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row (n,) and the squared distance to it (n,); rows are added to `sums` (K, D)."""
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    distances = rows.new_empty(len(rows))
    half = centroids.square().sum(dim=1) / 2  # (K,)
    with no_autocast(rows):
        for part in parts(len(rows), len(centroids)):
            some = rows[part]
            least, labels[part] = torch.addmm(half, some, centroids.T, alpha=-1).min(dim=1)
            distances[part] = (some.square().sum(dim=1) + 2 * least).clamp_min(0)
            if sums is not None:
                sums.index_add_(0, labels[part], some.to(sums.dtype))
    return labels, distances


def refill_(centroids: Tensor, counts: np.ndarray, key: int) -> None:
    """Split clusters in two until none is empty, in place, as faiss does.

    The halves start a little to either side of the centroid, along alternating signs of its coordinates.
    """
    counts = counts.copy()
    signs = torch.where(torch.arange(centroids.shape[1], device=centroids.device) % 2 == 0, 1.0, -1.0)
    for number, empty in enumerate(np.flatnonzero(counts == 0).tolist()):
        chances = np.cumsum((counts - 1).clip(min=0))
        split = int(np.searchsorted(chances, seeds.uniform(key, number) * chances[-1], side="right"))
        centroids[empty] = centroids[split] * (1 + NUDGE * signs)
        centroids[split] *= 1 - NUDGE * signs
        counts[empty] = counts[split] // 2
        counts[split] -= counts[empty]


@torch.no_grad()
def whiten(rows: Tensor, total: int, dim: int) -> Tensor:
    """The first `dim` principal components (n, dim) of rows (n, D), each of variance 1, then rows of length 1.

    What Caron et al. 2018 do to features before they cluster them (section 4.1; PCA matrix of faiss, power -0.5).
    Mean and covariance are those of the rows of all ranks; signs of components are arbitrary.

    Raises:
        UserError: rows have fewer than `dim` numbers, or are fewer.
        DivergedError: a number is not finite.
    """
    length = rows.shape[1]
    if dim > min(length, total):
        raise UserError(
            f"{total} images with features of length {length} have no {dim} principal components",
            hint=f"set `method.components` to at most {min(length, total)}, or to null for features as they are",
        )
    check_finite(rows)
    mean = dist.sum_(rows.sum(dim=0, dtype=torch.float64)) / total
    centre = mean.to(rows.dtype)
    covariance = torch.zeros(length, length, dtype=torch.float64, device=rows.device)
    with no_autocast(rows):
        for part in parts(len(rows), length):
            some = rows[part] - centre
            covariance += some.T @ some
        values, vectors = torch.linalg.eigh(dist.sum_(covariance) / total)  # ascending
        scales = values[-dim:].clamp_min(max(float(values[-1]) * FLAT, NONE)).rsqrt()
        matrix = dist.broadcast((vectors[:, -dim:] * scales).flip(1).contiguous()).to(rows.dtype)  # (D, dim)
        found = rows.new_empty(len(rows), dim)
        for part in parts(len(rows), length):
            found[part] = F.normalize((rows[part] - centre) @ matrix, dim=1)
    return found


def check_finite(rows: Tensor) -> None:
    """Refuse to cluster numbers that are none.

    Raises:
        DivergedError: on some rank a number is not finite.
    """
    bad = dist.sum_((~torch.isfinite(rows).all(dim=1)).sum())
    if bad:
        raise DivergedError(
            f"the features of {int(bad)} images are not finite, and cannot be clustered",
            hint="try a lower `optim.lr`, a longer `schedule.warmup`, or `run.precision=fp32`",
        )


def parts(rows: int, numbers: int) -> Iterator[slice]:
    """Cuts of so many rows for which so many numbers each can be held at one time."""
    step = max(1, AT_ONCE // numbers)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
