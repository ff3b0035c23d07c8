"""VICReg: make two views agree while every feature varies and no two features covary.

Bardes et al. 2022, https://arxiv.org/abs/2105.04906.
"""

from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, NonNegative
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.heads import mlp
from sslcli.nn.needs import need_two_images
from sslcli.nn.precision import no_autocast, widen


class Config(MethodConfig):
    """Invariance between views; variance and covariance within each."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["vicreg"] = "vicreg"
    dim: Count = 8192
    """Length of the embeddings."""
    hidden: Count = 8192
    """Width of the expander's other layers."""
    layers: Count = 3
    """Linear layers of the expander."""
    invariance: NonNegative = 25.0
    """Weight of the distance between the two views."""
    variance: NonNegative = 25.0
    """Weight of features that vary too little."""
    covariance: NonNegative = 1.0
    """Weight of features that covary."""


@final
class VICReg(Method[Config]):
    """Backbone and expander."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_two_images(facts, cfg.name)
        self.expander = mlp([backbone.dim, *[cfg.hidden] * (cfg.layers - 1), cfg.dim], norm=True, last_bias=False)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Distance over this rank's rows, variance and covariance over those of all ranks; each view passes alone."""
        z1, z2 = (widen(self.expander(self.backbone(view))) for view in batch.views)  # (B, D)
        terms = vic_terms(z1, z2, dist.gather_with_grad(z1), dist.gather_with_grad(z2))
        cfg = self.cfg
        loss = cfg.invariance * terms.invariance + cfg.variance * terms.variance + cfg.covariance * terms.covariance
        return StepResult(loss, {name: term.detach() for name, term in terms._asdict().items()})


class Terms(NamedTuple):
    """The three terms, before weighting; scalars."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vic_terms(z1: Tensor, z2: Tensor, everyone1: Tensor, everyone2: Tensor) -> Terms:
    """Invariance of rows z1, z2 (B, D); variance and covariance of all rows (N, D) they belong to (equations 1 to 5).

    Invariance: (z1 - z2)^2, mean over entries. Variance: max(0, 1 - sqrt(var_j + 1e-4)), mean over dimensions j and
    views (the paper adds the views; the authors' code, followed here, averages them). Covariance: sum over pairs of
    different dimensions of cov_ij^2 / D, views added. Variances are unbiased. In at least float32, also under autocast.
    """
    with no_autocast(z1):
        everyone = [widen(everyone1), widen(everyone2)]
        variance = torch.stack([too_still(z) for z in everyone]).mean()
        covariance = torch.stack([entangled(z) for z in everyone]).sum()
        return Terms(F.mse_loss(widen(z1), widen(z2)), variance, covariance)


def too_still(z: Tensor) -> Tensor:
    """How far below 1 the standard deviations of the columns of (N, D) lie, mean over columns."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def entangled(z: Tensor) -> Tensor:
    """Sum of the squared covariances between different columns of (N, D), over D."""
    centred = z - z.mean(dim=0)
    covariance = centred.T @ centred / (len(z) - 1)  # (D, D)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


build = VICReg
