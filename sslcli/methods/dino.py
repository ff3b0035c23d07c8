"""DINO: agree with a slow, sharpened, centred copy of yourself about every crop of an image.

Caron et al. 2021, https://arxiv.org/abs/2104.14294.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, Index, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn import slow
from sslcli.nn.clusters import use_and_certainty
from sslcli.nn.crops import features_of, head_over
from sslcli.nn.precision import widen

GLOBAL = 2
"""How many crops, the first ones, the teacher sees."""


class Config(MethodConfig):
    """Self-distillation with no labels; the first two crops are the large ones, which the teacher sees."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=None)
    name: Literal["dino"] = "dino"
    prototypes: Count = 65536
    """Length of the head's output."""
    hidden: Count = 2048
    """Width of the head's hidden layers."""
    bottleneck: Count = 256
    """Length of the unit vector that is compared with the prototypes."""
    layers: Count = 3
    """Linear layers of the head before the prototypes."""
    batch_norm: bool = False
    """Batch norm in the head's hidden layers."""
    fixed_gain: bool = True
    """Keep prototypes at unit length. Letting them grow gives better features and less stable training."""
    momentum: Fraction = 0.996
    """The share of itself that the teacher keeps at every step, at first; it grows to 1 along half a cosine. Larger
    for small batches: the authors advise 0.9995 for 256 images."""
    temperature: Positive = 0.1
    """Divisor of the student's output."""
    teacher_temperature: Positive = 0.04
    """Divisor of the teacher's output; a larger one softens the target, and above 0.07 is mostly unstable."""
    warmup_teacher_temperature: Positive = 0.04
    """Where the teacher's temperature starts; smaller if the loss does not fall."""
    warmup_epochs: Index = 0
    """Epochs in which it rises, along a line."""
    centre_momentum: Fraction = 0.9
    """The share of itself that the centre keeps in every pass."""
    freeze_epochs: Index = 1
    """Epochs in which the prototypes stay where they are; more if the loss does not fall."""


@final
class DINO(Method[Config]):
    """Student, slow teacher, and the centre of the teacher's output. The teacher is what is exported."""

    centre: Tensor

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        self.head = Head([backbone.dim, *[cfg.hidden] * (cfg.layers - 1), cfg.bottleneck], cfg.prototypes,
                         batch_norm=cfg.batch_norm, fixed_gain=cfg.fixed_gain)  # fmt: skip
        self.slow_backbone = never_dropping(slow.frozen_copy(backbone))
        self.slow_head = slow.frozen_copy(self.head)
        self.register_buffer("centre", torch.zeros(cfg.prototypes))  # (K,)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Cross entropy of all crops with the teacher's view of the first two; then the centre moves."""
        cfg = self.cfg
        temperature = ramp(cfg.warmup_teacher_temperature, cfg.teacher_temperature, cfg.warmup_epochs, at.epoch)
        student = torch.stack(head_over(self.head, features_of(self.backbone, batch.views)))  # (V, B, K)
        with torch.no_grad():
            features = features_of(self.slow_backbone, batch.views[:GLOBAL])
            teacher = widen(torch.stack(head_over(self.slow_head, features)))  # (2, B, K)
            targets = F.softmax((teacher - self.centre) / temperature, dim=2)
            centre = dist.mean(teacher.mean(dim=(0, 1)))  # (K,)
            self.centre.lerp_(centre.to(self.centre.dtype), 1 - cfg.centre_momentum)
            entropy = -torch.xlogy(targets, targets).sum(dim=2).mean()
        return StepResult(distillation(widen(student), targets, cfg.temperature), {"teacher_entropy": entropy})

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Use and certainty of the teacher's assignments."""
        teacher = widen(self.slow_head(self.slow_backbone(batch.views[0]))) - self.centre
        return use_and_certainty(F.softmax(teacher / self.cfg.teacher_temperature, dim=1))

    def before_update(self, at: Progress) -> None:
        """Leave the prototypes where they are in the first epochs."""
        if at.epoch < self.cfg.freeze_epochs:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, at: Progress) -> None:
        """Move the teacher's parameters towards the student's; momentum follows the cosine of section 3.1."""
        momentum = slow.cosine_momentum(self.cfg.momentum, 1.0, at.fraction)
        slow.ema_(self.slow_backbone, self.backbone, momentum)
        slow.ema_(self.slow_head, self.head, momentum)

    def copy_student(self) -> None:
        """Start the teacher where the student starts."""
        slow.copy_(self.slow_backbone, self.backbone)
        slow.copy_(self.slow_head, self.head)

    def exported(self) -> Backbone:
        """The teacher's backbone, which is better than the student's throughout training (section 5.2)."""
        return self.slow_backbone


@final
class Head(nn.Module):
    """Perceptron with GELU, unit length, prototypes; (B, in) to (B, K). Names are those of the authors' code."""

    def __init__(self, dims: Sequence[int], prototypes: int, *, batch_norm: bool, fixed_gain: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        *hidden, last = pairwise(dims)
        for wide_in, wide_out in hidden:
            layers += [nn.Linear(wide_in, wide_out), *([nn.BatchNorm1d(wide_out)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(*last))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(dims[-1], prototypes, fixed_gain=fixed_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Similarity to every prototype, (B, K), of features (B, in)."""
        x = F.normalize(widen(self.mlp(x)), dim=-1)
        y: Tensor = self.last_layer(x)
        return y


@final
class Prototypes(nn.Module):
    """Linear layer without bias whose weight is split into direction and length (Salimans & Kingma 2016)."""

    def __init__(self, dim: int, count: int, *, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(B, K) from (B, D)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


def never_dropping(network: Backbone) -> Backbone:
    """The network with dropout and stochastic depth turned off, in place: a teacher answers with all of itself."""
    from timm.layers.drop import DropPath

    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return network


def ramp(start: float, end: float, epochs: int, epoch: int) -> float:
    """A line from `start` in epoch 0 to `end` in the last of `epochs`; `end` from then on."""
    return end if epoch >= epochs else start + (end - start) * epoch / max(epochs - 1, 1)


def distillation(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross entropy between the teacher's and the student's views of different crops (equation 3).

    -sum_k t_a(k) log softmax(s_v / T)(k), mean over images and over the pairs of a crop a of the teacher's and
    another crop v of the student's.

    Args:
        student: (V, B, K), output for every crop.
        targets: (G, B, K), the teacher's distributions t for the first G crops.
        temperature: T.
    """
    predictions = F.log_softmax(student / temperature, dim=2)
    losses = [
        -(target * prediction).sum(dim=1).mean()
        for seen, target in enumerate(targets)
        for crop, prediction in enumerate(predictions)
        if crop != seen
    ]
    return torch.stack(losses).mean()


build = DINO
