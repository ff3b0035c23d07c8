"""SimSiam: predict the other view's projection, which holds still; neither negatives nor a slow twin.

Chen & He 2021, https://arxiv.org/abs/2011.10566.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from torch import Tensor
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.optim import ParamRule
from sslcli.config.types import Count
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.heads import mlp
from sslcli.nn.needs import need_two_images
from sslcli.nn.precision import widen
from sslcli.nn.spread import spread


class Config(MethodConfig):
    """Each view predicts the projection of the other, through which no gradient flows."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["simsiam"] = "simsiam"
    dim: Count = 2048
    """Length of projections and predictions."""
    hidden: Count | None = None
    """Width of the projector's other layers; when absent, the length of the backbone's feature."""
    layers: Count = 3
    """Linear layers of the projector (2 in the authors' CIFAR-10 experiment)."""
    bottleneck: Count = 512
    """Width of the predictor's middle layer."""
    fixed_predictor_lr: bool = True
    """Keep the predictor's learning rate at its base value throughout (table 1, last row)."""


@final
class SimSiam(Method[Config]):
    """Backbone, projector, predictor."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_two_images(facts, cfg.name)
        hidden = [cfg.hidden or backbone.dim] * (cfg.layers - 1)
        self.projector = mlp(
            [backbone.dim, *hidden, cfg.dim],
            norm=True,
            bias=False,
            last_norm=True,
            last_affine=False,
            last_bias=False,
        )
        self.predictor = mlp([cfg.dim, cfg.bottleneck, cfg.dim], norm=True, bias=False)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Equation 2; each view passes alone, so that batch-norm statistics are those of one view."""
        z1, z2 = (self.projector(self.backbone(view)) for view in batch.views)  # (B, D)
        loss = (negative_cosine(self.predictor(z1), z2) + negative_cosine(self.predictor(z2), z1)) / 2
        return StepResult(loss, {"spread": spread(z1)})

    def param_rules(self) -> Sequence[ParamRule]:
        """The predictor keeps its learning rate, so that it keeps up with the projections."""
        return [ParamRule(match=r"^predictor\.", fixed_lr=True)] if self.cfg.fixed_predictor_lr else []


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(p, stop-gradient(t)), mean over rows (B, D) (equation 1)."""
    p, t = F.normalize(widen(prediction), dim=1), F.normalize(widen(target.detach()), dim=1)
    return -(p * t).sum(dim=1).mean()


build = SimSiam
