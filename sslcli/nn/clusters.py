"""Clusters of images as something to learn: how they are used, how they change, and how much each of them weighs."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.nn.precision import widen

NONE = 1e-10
"""Added to the size of a cluster before dividing by it, as OpenMMLab does: an empty one weighs very much."""


@torch.no_grad()
def use_and_certainty(p: Tensor) -> dict[str, Tensor]:
    """The two ways in which assignments p (N, K), rows that sum to 1, collapse (Caron et al. 2021, section 5.3).

    `cluster_use` is the entropy of the mean assignment over ln min(N, K), at most 1: 0 when all images are in one
    cluster. `cluster_certainty` is 1 minus the mean entropy of single assignments over ln K: 0 when no image prefers
    any cluster.
    """
    count, clusters = p.shape
    used = entropy(p.mean(dim=0)) / math.log(min(count, clusters))
    return {
        "cluster_use": used.clamp(max=1),
        "cluster_certainty": 1 - entropy(p).mean() / math.log(clusters),
    }


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p over the last dimension."""
    return -torch.xlogy(p, p).sum(dim=-1)


def weights_of(counts: Tensor, power: float) -> Tensor:
    """Loss weights (K,) of clusters with so many images (K,): 1 / count^power, scaled to sum 1; in float32.

    Weights that make up for size (Zhan et al. 2020, section 3.3, with power 1/2).
    """
    weights = (1 / (counts.float() + NONE)).pow(power)
    return weights / weights.sum()


def weighted_cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum_i w(y_i) l_i / sum_i w(y_i) with l_i = -log softmax(s_i)(y_i), over the samples of all ranks.

    Each rank gets its own part of the numerator, scaled so that the mean over ranks is the whole: on one rank this is
    torch's weighted mean.

    Args:
        scores: (B, K) of this rank's samples.
        labels: (B,) their clusters y.
        weights: (K,) w.
    """
    each = weights.to(widen(scores).dtype)[labels]  # (B,)
    losses = F.cross_entropy(widen(scores), labels, reduction="none")
    return (each * losses).sum() / dist.mean(each.sum())


@torch.no_grad()
def nmi(one: Tensor, other: Tensor) -> Tensor:
    """Normalised mutual information of two assignments (N,) of the same images, in [0, 1]: 1 where they are the same.

    I(a; b) / ((H(a) + H(b)) / 2), and 0 where neither tells anything (Caron et al. 2018, section 4.1, who watch how
    clusters change from epoch to epoch; the arithmetic mean is scikit-learn's). In float64.
    """
    pairs = torch.stack([one, other])
    together = _entropy_of(torch.unique(pairs, dim=1, return_counts=True)[1])
    first, second = (_entropy_of(torch.unique(each, return_counts=True)[1]) for each in (one, other))
    shared = (first + second - together).clamp_min(0)
    return torch.where(first + second > 0, 2 * shared / (first + second).clamp_min(NONE), 0.0)


def _entropy_of(counts: Tensor) -> Tensor:
    return entropy(counts.double() / counts.sum())
