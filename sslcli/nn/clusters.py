"""Are images still assigned to different clusters, and with any conviction?"""

import math

import torch
from torch import Tensor


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
