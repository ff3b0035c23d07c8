"""MoCo v3: tell an image from the others of its batch, whose keys a slow twin has made; for ViT and ResNet.

Chen, Xie & He 2021, https://arxiv.org/abs/2104.02057.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn import slow
from sslcli.nn.contrast import Contrast, percent_right
from sslcli.nn.heads import mlp
from sslcli.nn.needs import need_two_images
from sslcli.nn.precision import no_autocast, widen


class Config(MethodConfig):
    """Both views ask and answer; no queue. As they stand, the settings are those for ViT."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["mocov3"] = "mocov3"
    dim: Count = 256
    """Length of queries and keys."""
    hidden: Count = 4096
    """Width of the other layers, in projector and predictor."""
    layers: Count = 3
    """Linear layers of the projector: 3 for ViT, 2 for ResNet."""
    predictor_norm: bool = True
    """Batch norm at the end of the predictor: with ViT, not with ResNet."""
    temperature: Positive = 0.2
    """Divisor of similarities: 0.2 for ViT, 1.0 for ResNet."""
    momentum: Fraction = 0.99
    """How slowly the twin follows at first: the share of itself that it keeps at every step."""
    end_momentum: Fraction = 1.0
    """The same at the end; half a cosine lies between."""


@final
class MoCoV3(Method[Config]):
    """Backbone, projector and predictor make queries; slow backbone and projector make keys."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_two_images(facts, cfg.name)
        hidden = [cfg.hidden] * (cfg.layers - 1)
        self.projector = mlp(
            [backbone.dim, *hidden, cfg.dim],
            norm=True,
            bias=False,
            last_norm=True,
            last_affine=False,
            last_bias=False,
        )
        self.predictor = mlp(
            [cfg.dim, cfg.hidden, cfg.dim],
            norm=True,
            bias=False,
            last_norm=cfg.predictor_norm,
            last_affine=False,
            last_bias=False,
        )
        self.slow_backbone = slow.frozen_copy(backbone)
        self.slow_projector = slow.frozen_copy(self.projector)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of both directions (algorithm 1); each view passes alone."""
        first = dist.rank() * len(batch.index)
        q1, q2 = (self.predictor(self.projector(self.backbone(view))) for view in batch.views)  # (B, D)
        with torch.no_grad():
            keys = [dist.gather(self.slow_projector(self.slow_backbone(view))) for view in batch.views]  # (W*B, D)
        one = contrast(q1, keys[1], first, self.cfg.temperature)
        two = contrast(q2, keys[0], first, self.cfg.temperature)
        return StepResult(one.loss + two.loss, {"top1": (one.top1 + two.top1) / 2})

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Cosine of a query with the key of the other view."""
        query = widen(self.predictor(self.projector(self.backbone(batch.views[0]))))
        key = widen(self.slow_projector(self.slow_backbone(batch.views[1])))
        return {"agreement": F.cosine_similarity(query, key).mean()}

    def after_step(self, at: Progress) -> None:
        """Move the twin as the authors do in the forward pass of the next step: by momentum((k + 1) / K) after step k.

        The sequence is theirs, for at the first pass their twin is still equal to the student. Steps are optimiser
        steps; MMSelfSup moves the twin after a step by momentum(k / K).
        """
        momentum = slow.cosine_momentum(self.cfg.momentum, self.cfg.end_momentum, at.next().fraction)
        slow.ema_(self.slow_backbone, self.backbone, momentum)
        slow.ema_(self.slow_projector, self.projector, momentum)

    def copy_student(self) -> None:
        """Start the twin where the student starts."""
        slow.copy_(self.slow_backbone, self.backbone)
        slow.copy_(self.slow_projector, self.projector)


def contrast(queries: Tensor, keys: Tensor, first: int, temperature: float) -> Contrast:
    """2 T times -log( exp(q.k/T) / sum_j exp(q.k_j/T) ), mean over queries (equation 1 and algorithm 1).

    Args:
        queries: (B, D), brought to unit length here, as are keys.
        keys: (N, D); that of query i is row `first` + i.
        first: where this rank's keys begin.
        temperature: T.
    """
    with no_autocast(queries):
        q, k = F.normalize(widen(queries), dim=1), F.normalize(widen(keys), dim=1)
        logits = q @ k.T / temperature  # (B, N)
    own = first + torch.arange(len(q), device=q.device)
    return Contrast(2 * temperature * F.cross_entropy(logits, own), percent_right(logits, own))


build = MoCoV3
