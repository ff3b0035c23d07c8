"""DeepCluster: sort all images into clusters at the start of an epoch, then learn to tell the clusters apart.

Caron et al. 2018, https://arxiv.org/abs/1807.05520.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, NonNegative
from sslcli.contracts import Backbone, Batch, Look, Method, Progress, RunFacts, StepResult
from sslcli.nn.clusters import nmi, use_and_certainty, weighted_cross_entropy, weights_of
from sslcli.nn.contrast import percent_right
from sslcli.nn.kmeans import kmeans, whiten
from sslcli.nn.needs import need_clusters
from sslcli.seeds import seed_of

STD = 0.01
"""Standard deviation of the weights of a new classifier."""


class Config(MethodConfig):
    """Clusters as classes."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=1, at_most=1)
    name: Literal["deepcluster"] = "deepcluster"
    clusters: Count = 10000
    """How many clusters k-means makes: classes of the classifier; ten times the true classes did best in the paper."""
    components: Count | None = 256
    """Principal components of the features, whitened, that k-means looks at; null: the features as they are, at unit
    length."""
    iterations: Count = 20
    """Most rounds of k-means."""
    every: Count = 1
    """Epochs between clusterings."""
    balance: bool = True
    """Show equally many images of every cluster in an epoch, instead of every image once."""
    reweight: NonNegative = 0.0
    """Weigh the loss of an image by the size of its cluster to the power of minus this; 0: all the same."""


@final
class DeepCluster(Method[Config]):
    """A backbone, a linear classifier, and the cluster of every image."""

    labels: Tensor
    counts: Tensor
    change: Tensor

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_clusters(facts, cfg.clusters)
        self.images = facts.images
        self.head = nn.Linear(backbone.dim, cfg.clusters)
        nn.init.normal_(self.head.weight, std=STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("labels", torch.zeros(facts.images, dtype=torch.int64))  # (N,), by number of the image
        self.register_buffer("counts", torch.zeros(cfg.clusters, dtype=torch.int64))  # (K,) images of each cluster
        self.register_buffer("change", torch.zeros(()))  # NMI of the last two clusterings

    def before_epoch(self, at: Progress, look: Look) -> None:
        """Cluster all images (section 3.2), and begin with a new classifier, whose old classes mean nothing now."""
        if at.epoch % self.cfg.every:
            return
        key = seed_of(at.seed, "deepcluster", at.epoch)
        rows = look(self.backbone).to(self.labels.device)  # (n, D)
        few = (
            F.normalize(rows, dim=1) if self.cfg.components is None else whiten(rows, self.images, self.cfg.components)
        )
        found = kmeans(few, self.images, self.cfg.clusters, iterations=self.cfg.iterations, key=key)
        labels = dist.gather_shares(found.labels, self.images)
        self.change.copy_(nmi(self.labels, labels))
        self.labels.copy_(labels)
        self.counts.copy_(torch.bincount(labels, minlength=self.cfg.clusters))
        self._new_head(seed_of(key, "head"))

    @torch.no_grad()
    def _new_head(self, key: int) -> None:
        generator = torch.Generator().manual_seed(key >> 1)
        weight = torch.empty(self.head.weight.shape).normal_(std=STD, generator=generator)
        for parameter, new in ((self.head.weight, weight), (self.head.bias, torch.zeros(self.head.bias.shape))):
            parameter.copy_(dist.share_of(new.to(parameter.device), parameter))

    def sample_weights(self) -> np.ndarray | None:
        """Every cluster that has images is shown equally often (section 3.3, "Trivial parametrization")."""
        return (1 / self.counts.double())[self.labels].cpu().numpy() if self.cfg.balance else None

    def sample_groups(self) -> np.ndarray | None:
        """The clusters."""
        return self.labels.cpu().numpy() if self.cfg.balance else None

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Cross entropy with the clusters of the images (equation 1)."""
        labels = self.labels[batch.index]
        scores = self.head(self.backbone(batch.views[0]))  # (B, K)
        loss = weighted_cross_entropy(scores, labels, weights_of(self.counts, self.cfg.reweight))
        scalars = {
            "top1": percent_right(scores, labels),
            "clusters": (self.counts > 0).sum(),
            "largest_cluster": self.counts.max(),
            "nmi": self.change,
        }
        return StepResult(loss, scalars)

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Use and certainty of the classifier's answers."""
        return use_and_certainty(F.softmax(self.head(self.backbone(batch.views[0])).float(), dim=1))


build = DeepCluster
