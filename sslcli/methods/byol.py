"""BYOL: predict what a slow twin makes of the other view; no negatives.

Grill et al. 2020, https://arxiv.org/abs/2006.07733.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn import slow
from sslcli.nn.heads import mlp
from sslcli.nn.needs import need_two_images
from sslcli.nn.precision import widen
from sslcli.nn.spread import spread


class Config(MethodConfig):
    """Each view predicts the slow twin's projection of the other."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["byol"] = "byol"
    dim: Count = 256
    """Length of projections and predictions."""
    hidden: Count = 4096
    """Width of the layer between, in projector and predictor."""
    last_bias: bool = False
    """Give the last layer of projector and predictor a bias (OpenSelfSup does; DeepMind and MMSelfSup do not)."""
    momentum: Fraction = 0.99
    """How slowly the twin follows at first: the share of itself that it keeps at every step."""
    end_momentum: Fraction = 1.0
    """The same at the end; half a cosine lies between."""


@final
class BYOL(Method[Config]):
    """Online backbone, projector and predictor; slow backbone and projector."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_two_images(facts, cfg.name)

        def head(width: int) -> nn.Sequential:
            return mlp([width, cfg.hidden, cfg.dim], norm=True, last_bias=cfg.last_bias)

        self.projector = head(backbone.dim)
        self.predictor = head(cfg.dim)
        self.slow_backbone = slow.frozen_copy(backbone)
        self.slow_projector = slow.frozen_copy(self.projector)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of both directions; each view passes alone, so that batch-norm statistics are those of one view."""
        z1, z2 = (self.projector(self.backbone(view)) for view in batch.views)  # (B, D)
        with torch.no_grad():
            target1, target2 = (self.slow_projector(self.slow_backbone(view)) for view in batch.views)
        loss = regression(self.predictor(z1), target2) + regression(self.predictor(z2), target1)
        return StepResult(loss, {"spread": spread(z1)})

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Cosine of the prediction with the twin's projection of the other view."""
        guess = widen(self.predictor(self.projector(self.backbone(batch.views[0]))))
        target = widen(self.slow_projector(self.slow_backbone(batch.views[1])))
        return {"agreement": F.cosine_similarity(guess, target).mean()}

    def after_step(self, at: Progress) -> None:
        """Move the twin (equation 1) by momentum(k / K) after step k of K, as DeepMind's code does.

        Steps are optimiser steps. MMSelfSup counts forward passes instead: with gradients accumulated over n of them,
        it uses the momentum of the pass that ends the step, (n - 1) / (n K) further on.
        """
        momentum = slow.cosine_momentum(self.cfg.momentum, self.cfg.end_momentum, at.fraction)
        slow.ema_(self.slow_backbone, self.backbone, momentum)
        slow.ema_(self.slow_projector, self.projector, momentum)

    def copy_student(self) -> None:
        """Start the twin where the online network starts."""
        slow.copy_(self.slow_backbone, self.backbone)
        slow.copy_(self.slow_projector, self.projector)


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """|p / |p| - t / |t||^2 = 2 - 2 cos(p, t), mean over rows (B, D) (equation 2).

    MMSelfSup and OpenSelfSup leave out the constant: their sum of both directions is 4 less.
    """
    p, t = F.normalize(widen(prediction), dim=1), F.normalize(widen(target), dim=1)
    return 2 - 2 * (p * t).sum(dim=1).mean()


build = BYOL
