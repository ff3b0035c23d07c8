"""Relative location: tell on which side of an image's central patch another of its patches lies.

Doersch et al. 2015 ("context prediction"), https://arxiv.org/abs/1505.05192.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.precision import widen
from sslcli.nn.views import interleave, separate

PATCHES, CENTRE = 9, 4
SIDES = PATCHES - 1
NECK_STD, HEAD_STD = 0.01, 0.005


class Config(MethodConfig):
    """Classification of pairs of patches by their eight possible arrangements."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="patches", at_least=PATCHES, at_most=PATCHES)
    name: Literal["relative_loc"] = "relative_loc"
    hidden: Count = 4096
    """Width of the layer that looks at both patches of a pair."""
    momentum: Fraction = 0.003
    """Share of each step's statistics in the running ones of that layer's batch norm."""
    dropout: Fraction = 0.5
    """Share of that layer's outputs that a training step leaves out."""


@final
class RelativeLoc(Method[Config]):
    """A backbone that sees each patch alone, a layer that sees pairs, a linear classifier of eight classes."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        self.neck = neck(2 * backbone.dim, cfg.hidden, cfg.momentum, cfg.dropout)
        self.head = nn.Linear(cfg.hidden, SIDES)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Cross entropy over the eight pairs of every image.

        The neighbours pass together and the centre by itself, so that batch-norm statistics are theirs alone. The
        centre passes once: seven copies more would change neither statistics nor gradient.
        """
        neighbours = self.backbone(interleave(batch.views[:CENTRE] + batch.views[CENTRE + 1 :]))  # (8B, D)
        centre = self.backbone(batch.views[CENTRE])  # (B, D)
        paired, labels = pairs(separate(neighbours, SIDES), centre)
        logits = widen(self.head(self.neck(paired)))  # (8B, 8)
        top1 = (logits.detach().argmax(dim=1) == labels).float().mean()
        return StepResult(F.cross_entropy(logits, labels), {"top1": top1})


def pairs(neighbours: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """Each of V neighbours (B, D, ...) before its image's centre (B, D, ...): (V*B, 2D, ...), image by image.

    The labels (V*B,) number the neighbours, row by row of the grid without its middle.
    """
    paired = interleave([torch.cat([neighbour, centre], dim=1) for neighbour in neighbours])
    return paired, torch.arange(len(neighbours), device=centre.device).repeat(len(centre))


def neck(inputs: int, hidden: int, momentum: float, dropout: float) -> nn.Sequential:
    """What looks at a pair (B, inputs) -> (B, hidden): a linear layer, batch norm, ReLU, dropout."""
    linear = nn.Linear(inputs, hidden)
    nn.init.normal_(linear.weight, std=NECK_STD)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.BatchNorm1d(hidden, momentum=momentum), nn.ReLU(inplace=True), nn.Dropout(dropout))


build = RelativeLoc
