"""ODC: learn to tell clusters apart while they form, from memories of all images that every step moves a little.

Zhan et al. 2020 ("online deep clustering"), https://arxiv.org/abs/2006.10645.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, NonNegative
from sslcli.contracts import Backbone, Batch, Look, Method, Progress, RunFacts, StepResult
from sslcli.nn.clusters import use_and_certainty, weighted_cross_entropy, weights_of
from sslcli.nn.contrast import percent_right
from sslcli.nn.memory import Memory
from sslcli.nn.needs import need_clusters
from sslcli.nn.precision import widen
from sslcli.seeds import seed_of


class Config(MethodConfig):
    """Online clusters as classes."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=1, at_most=1)
    name: Literal["odc"] = "odc"
    hidden: Count = 512
    """Width of the layer between backbone and feature."""
    dim: Count = 256
    """Length of what is remembered of an image; the memory takes images x dim x 4 bytes on every rank."""
    dropout: Fraction = 0.5
    """Share of the hidden layer that is left out at random."""
    clusters: Count = 10000
    """How many clusters there are: classes of the classifier."""
    iterations: Count = 20
    """Most rounds of the k-means that makes the first clusters."""
    momentum: Fraction = 0.5
    """The share of itself that a remembered feature keeps when its image is seen again."""
    centroids_every: Count = 10
    """Steps between updates of the centroids."""
    min_cluster: Count = 20
    """A cluster of fewer images is dissolved, and gets half of the largest one in exchange."""
    reweight: NonNegative = 0.5
    """Weigh the loss of an image by the size of its cluster to the power of minus this; 0: all the same."""
    replace: bool = True
    """Draw the images of an epoch with replacement, instead of every image once."""
    shard_memory: bool = False
    """Let every rank remember the features of its share of the images only; the same but for rounding."""


@final
class ODC(Method[Config]):
    """Backbone, two layers, a linear classifier, and memories of all images."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_clusters(facts, cfg.clusters, each=cfg.min_cluster)
        self.images = facts.images
        self.neck = neck(backbone.dim, cfg.hidden, cfg.dim, cfg.dropout)
        self.head = nn.Linear(cfg.dim, cfg.clusters)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.memory = Memory(facts.images, cfg.dim, cfg.clusters, shard=cfg.shard_memory)

    def before_epoch(self, at: Progress, look: Look) -> None:
        """Before the first step, cluster what the untrained network makes of all images."""
        if at.epoch == 0:
            rows = look(lambda images: self.neck(self.backbone(images)))
            self.memory.start(rows, iterations=self.cfg.iterations, key=seed_of(at.seed, "odc"))

    def sample_weights(self) -> np.ndarray | None:
        """All the same, drawn with replacement."""
        return np.ones(self.images) if self.cfg.replace else None

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Weighted cross entropy with the labels in memory, which then changes (figure 2)."""
        labels = self.memory.labels[batch.index]
        features = self.neck(self.backbone(batch.views[0]))  # (B, D)
        scores = self.head(features)  # (B, K)
        loss = weighted_cross_entropy(scores, labels, weights_of(self.memory.counts, self.cfg.reweight))
        changed = self.memory.update(batch.index, widen(features.detach()), self.cfg.momentum)
        scalars = {
            "top1": percent_right(scores, labels),
            "changed": changed,
            "smallest_cluster": self.memory.counts.min(),
            "largest_cluster": self.memory.counts.max(),
        }
        return StepResult(loss, scalars)

    def after_step(self, at: Progress) -> None:
        """Move the centroids now and then, and deal with small clusters in every step."""
        if (at.step + 1) % self.cfg.centroids_every == 0:
            self.memory.move_centroids()
        self.memory.absorb_small(self.cfg.min_cluster)

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Use and certainty of the classifier's answers."""
        scores = self.head(self.neck(self.backbone(batch.views[0])))
        return use_and_certainty(F.softmax(widen(scores), dim=1))


def neck(dim_in: int, hidden: int, dim: int, dropout: float) -> nn.Sequential:
    """Features (B, dim), none negative, from those of the backbone (B, in); OpenMMLab's `ODCNeck`."""
    layers: Sequence[nn.Module] = (
        nn.Linear(dim_in, hidden),
        nn.BatchNorm1d(hidden, momentum=0.001, affine=False),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, dim),
        nn.ReLU(inplace=True),
    )
    return nn.Sequential(*layers)


build = ODC
