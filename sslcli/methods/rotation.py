"""Rotation: tell by how many quarters an image is turned.

Gidaris et al. 2018 (RotNet), https://arxiv.org/abs/1803.07728.
"""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.precision import widen
from sslcli.nn.views import interleave

TURNS = 4
INIT_STD = 0.01


class Config(MethodConfig):
    """Classification of the four quarter turns of every image."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="rotations", at_least=TURNS, at_most=TURNS)
    name: Literal["rotation"] = "rotation"


@final
class Rotation(Method[Config]):
    """A backbone and a linear classifier of four classes."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        self.head = nn.Linear(backbone.dim, TURNS)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Equations 2 and 3, over all turns of all images in one pass."""
        turned, labels = rows_of(batch.views)
        logits = widen(self.head(self.backbone(turned)))  # (4B, 4)
        top1 = (logits.detach().argmax(dim=1) == labels).float().mean()
        return StepResult(F.cross_entropy(logits, labels), {"top1": top1})


def rows_of(views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The turns of one image after the other (4B, 3, s, s), and by how many quarters each is turned (4B,)."""
    turned = interleave(views)
    return turned, torch.arange(TURNS, device=turned.device).repeat(len(views[0]))


build = Rotation
