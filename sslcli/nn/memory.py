"""A feature and a cluster for every image, kept up to date from step to step (online clustering).

Zhan et al. 2020, "Online deep clustering for unsupervised representation learning", https://arxiv.org/abs/2006.10645,
section 3.2.
"""

import warnings
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist, seeds
from sslcli.nn.bank import Bank
from sslcli.nn.kmeans import kmeans
from sslcli.nn.precision import no_autocast

ROUNDS = 20
"""Most rounds of the k-means that halves a cluster."""


@final
class Memory(nn.Module):
    """The samples memory (rows and labels) and the centroids memory; equal on all ranks, but for rows in shares."""

    labels: Tensor
    counts: Tensor
    centroids: Tensor

    def __init__(self, images: int, dim: int, clusters: int, *, shard: bool = False) -> None:
        super().__init__()
        self.bank = Bank(images, dim, shard=shard)
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))  # (N,)
        self.register_buffer("counts", torch.zeros(clusters, dtype=torch.int64))  # (K,)
        self.register_buffer("centroids", torch.zeros(clusters, dim))  # (K, D), means of unit rows: shorter than 1

    @torch.no_grad()
    def start(self, rows: Tensor, *, iterations: int, key: int) -> None:
        """Fill it with the features (n, D) of this rank's share of the images, in clusters made by k-means."""
        rows = F.normalize(rows.to(self.centroids), dim=1)
        found = kmeans(rows, self.bank.images, len(self.centroids), iterations=iterations, key=key)
        self.fill(rows, dist.gather_shares(found.labels, self.bank.images))

    @torch.no_grad()
    def fill(self, rows: Tensor, labels: Tensor) -> None:
        """Fill it with unit rows (n, D) of this rank's share of the images, and labels (N,) of all."""
        self.bank.own.copy_(rows if self.bank.shard else dist.gather_shares(rows, self.bank.images))
        self.labels.copy_(labels)
        self.move_centroids()
        self._count()

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor, momentum: float) -> Tensor:
        """Move the rows of images `index` (B,) towards their features (B, D), unit length after, on all ranks.

        Each image then belongs to the centroid that its row is most like. Returns the share of images that changed.
        """
        index, rows = self.bank.update(index, F.normalize(features, dim=1), momentum)
        labels = dist.broadcast(self._most_like(rows, self.centroids))  # ranks of different make may round differently
        changed = (labels != self.labels[index]).float().mean()
        self.labels[index] = labels
        return changed

    @torch.no_grad()
    def move_centroids(self) -> None:
        """Make every centroid the mean of its rows; without any it stays."""
        labels = self.labels[self.bank.held.start : self.bank.held.stop]
        sums = self.bank.summed(torch.zeros_like(self.centroids).index_add_(0, labels, self.bank.own))
        counts = torch.bincount(self.labels, minlength=len(sums))[:, None]  # (K, 1)
        self.centroids.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), self.centroids))
        dist.broadcast(self.centroids)

    @torch.no_grad()
    def absorb_small(self, least: int) -> None:
        """Dissolve clusters of fewer than `least` images, and refill them, so that none stays empty.

        Their images go to the clusters they are most like; then each emptied one, in order, gets half of what is now
        the largest ("Dealing with small clusters"). A half may be small again.
        """
        self._count()
        small = self.counts < least  # (K,)
        if not small.any():
            return
        large = (~small).nonzero()[:, 0]
        lost = small[self.labels].nonzero()[:, 0]
        if len(lost):
            self.labels[lost] = large[dist.broadcast(self._most_like(self.bank.fetch(lost), self.centroids[large]))]
        for empty in small.nonzero()[:, 0].tolist():
            self._count()
            largest = int(self.counts.cpu().numpy().argmax())
            members = (self.labels == largest).nonzero()[:, 0]
            rows = self.bank.fetch(members)
            second = dist.broadcast(halves(rows).to(torch.uint8)).bool()
            self.labels[members[second]] = empty
            for cluster, part in ((largest, ~second), (empty, second)):
                self.centroids[cluster] = rows[part].mean(dim=0)
        self._count()
        dist.broadcast(self.centroids)

    def _count(self) -> None:
        self.counts.copy_(torch.bincount(self.labels, minlength=len(self.counts)))

    @staticmethod
    def _most_like(rows: Tensor, centroids: Tensor) -> Tensor:
        with no_autocast(rows):
            return (rows @ centroids.T).argmax(dim=1)


def halves(rows: Tensor) -> Tensor:
    """Which of the rows (M, D) are in the second of two clusters (M,), neither of them empty; M is at least 2.

    Two-means of scikit-learn with a fixed seed, as OpenMMLab has it; any two halves of rows that are all the same.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer than two different rows
        found = KMeans(n_clusters=2, random_state=0, max_iter=ROUNDS).fit(rows.cpu().numpy()).labels_ == 1
    if found.all() or not found.any():
        found = seeds.permutation(len(rows), 0) >= len(rows) // 2
    return torch.from_numpy(np.asarray(found)).to(rows.device)
