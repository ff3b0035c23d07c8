"""Barlow Twins: make the features of two views agree one by one and otherwise be uncorrelated.

Zbontar et al. 2021, https://arxiv.org/abs/2103.03230.
"""

from typing import ClassVar, Literal, final

from torch import Tensor, nn

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, NonNegative
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.heads import mlp
from sslcli.nn.needs import need_two_images
from sslcli.nn.precision import no_autocast, widen


class Config(MethodConfig):
    """Cross-correlation of the two views' projections, driven towards the identity."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["barlowtwins"] = "barlowtwins"
    dim: Count = 8192
    """Length of projections."""
    hidden: Count = 8192
    """Width of the projector's other layers."""
    layers: Count = 3
    """Linear layers of the projector."""
    off_diagonal: NonNegative = 0.0051
    """Weight of correlations between different features: the paper's lambda."""


@final
class BarlowTwins(Method[Config]):
    """Backbone, projector, and the batch norm that turns products into correlations."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_two_images(facts, cfg.name)
        hidden = [cfg.hidden] * (cfg.layers - 1)
        self.projector = mlp([backbone.dim, *hidden, cfg.dim], norm=True, bias=False, last_bias=False)
        self.norm = nn.BatchNorm1d(cfg.dim, affine=False)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss over the images of all ranks; each view passes alone."""
        z1, z2 = (self.norm(widen(self.projector(self.backbone(view)))) for view in batch.views)  # (B, D)
        correlation = cross_correlation(z1, z2)
        loss = redundancy(correlation, self.cfg.off_diagonal)
        return StepResult(loss, {"agreement": correlation.detach().diagonal().mean()})


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """sum_b z1[b, i] z2[b, j] / N (D, D), over the N rows of all ranks, of standardised rows (B, D) (equation 2).

    The sum over ranks is differentiated: every rank computes the whole loss, and after DDP has averaged gradients they
    are those of the whole batch. In the authors' code and MMSelfSup the sum has no gradient, so theirs are smaller by
    the number of GPUs; LARS hides it except for biases and gains.
    """
    with no_autocast(z1):
        return dist.sum_with_grad(widen(z1).T @ widen(z2)) / (dist.world() * len(z1))


def redundancy(correlation: Tensor, off_diagonal: float) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2 (equation 1)."""
    own = correlation.diagonal()
    others = correlation.square().sum() - own.square().sum()
    return (own - 1).square().sum() + off_diagonal * others


build = BarlowTwins
