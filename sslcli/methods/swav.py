"""SwAV: predict from one crop which prototypes another crop of the image was assigned to.

Caron et al. 2020, https://arxiv.org/abs/2006.09882.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Index, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError
from sslcli.nn.assign import sinkhorn
from sslcli.nn.clusters import use_and_certainty
from sslcli.nn.crops import features_of, head_over
from sslcli.nn.heads import mlp
from sslcli.nn.precision import no_autocast, widen
from sslcli.nn.spread import spread


class Config(MethodConfig):
    """Swapped assignments between crops."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=None)
    name: Literal["swav"] = "swav"
    dim: Count = 128
    """Length of the projection, and of a prototype."""
    hidden: Count | None = None
    """Width of the layer before it; when absent, the length of the backbone's feature."""
    prototypes: Count = 3000
    """How many prototypes; more than there are classes."""
    assign: Annotated[tuple[Index, ...], Field(min_length=1)] = (0, 1)
    """Which crops, numbered from 0, are assigned to prototypes and predicted from all others: the large ones."""
    temperature: Positive = 0.1
    """Divisor of similarities in the prediction; a smaller one makes predictions sharper."""
    epsilon: Positive = 0.05
    """Softness of assignments; the authors advise 0.03 when the loss stays at ln(prototypes)."""
    iterations: Count = 3
    """Rounds of Sinkhorn-Knopp."""
    queue: Index = 0
    """How many features of past images, over all ranks, help to balance assignments; for small batches."""
    queue_from_epoch: Index = 15
    """Epoch, from 0, in which the queue begins to fill; it is used once it is full."""
    freeze_steps: Index = 313
    """Steps from the start in which prototypes stay where they are; the authors take about one epoch."""


@final
class SwAV(Method[Config]):
    """A backbone, a projection, prototypes, and a queue of projections for each assigned crop."""

    queue: Tensor

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        if cfg.queue % facts.part_size:
            raise UserError(
                f"`method.queue` {cfg.queue} is not a multiple of the {facts.part_size} images of a forward pass",
                hint=f"set it to {max(cfg.queue // facts.part_size, 1) * facts.part_size}, or to 0 for no queue",
            )
        self.head = mlp([backbone.dim, cfg.hidden or backbone.dim, cfg.dim], norm=True)
        self.prototypes = nn.Linear(cfg.dim, cfg.prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(len(cfg.assign), cfg.queue, cfg.dim))  # (A, L, D), newest first
        self.parts = facts.batch_size // facts.part_size
        self.queue_from = cfg.queue_from_epoch * facts.steps_per_epoch
        self._to_unit_length()

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Swapped prediction over all crops; the assigned crops of all ranks then enter the queue."""
        cfg = self.cfg
        if max(cfg.assign) >= len(batch.views):
            raise UserError(
                f"`method.assign` names crop {max(cfg.assign)}, but there are only {len(batch.views)} crops, from 0",
                hint="name crops that `views` gives",
            )
        z = torch.stack(head_over(self.head, features_of(self.backbone, batch.views)))  # (V, B, D)
        z = F.normalize(widen(z), dim=2)
        scores = self._scores(z)  # (V, B, K)
        codes = [self._codes(place, z[crop], scores[crop], at) for place, crop in enumerate(cfg.assign)]
        loss = swapped_prediction(scores, torch.stack(codes), cfg.assign, cfg.temperature)
        return StepResult(loss, {"spread": spread(z[0])})

    def _scores(self, z: Tensor) -> Tensor:
        """Cosines (..., K) of unit projections (..., D) with the prototypes."""
        with no_autocast(z):
            return F.linear(z, self.prototypes.weight)

    @torch.no_grad()
    def _codes(self, place: int, z: Tensor, scores: Tensor, at: Progress) -> Tensor:
        """Assignments (B, K) of one crop's projections (B, D), balanced over ranks and, once it is full, the queue.

        The authors' ranks keep a queue each. Here all see one, and each takes its share into the assignment, whose
        sums run over all ranks: the same set of rows, so the same assignment.
        """
        cfg, count = self.cfg, len(z)
        if cfg.queue and at.step >= self.queue_from:
            queue = self.queue[place]
            pushes = (at.step - self.queue_from) * self.parts + at.part
            fresh = dist.gather(z)  # (W*B, D)
            if pushes * len(fresh) >= cfg.queue:
                scores = torch.cat([self._scores(queue.chunk(dist.world())[dist.rank()]), scores])
            queue.copy_(torch.cat([fresh, queue[: -len(fresh)]]))
        return sinkhorn(scores, cfg.epsilon, cfg.iterations)[-count:]

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Use and certainty of the predicted assignments."""
        z = F.normalize(widen(self.head(self.backbone(batch.views[0]))), dim=1)
        return use_and_certainty(F.softmax(self._scores(z) / self.cfg.temperature, dim=1))

    def before_update(self, at: Progress) -> None:
        """Leave the prototypes where they are in the first steps: without gradient, momentum and decay rest too."""
        if at.step < self.cfg.freeze_steps:
            self.prototypes.weight.grad = None

    def after_step(self, at: Progress) -> None:
        """Bring the prototypes back to unit length. The authors do so before the next forward pass."""
        self._to_unit_length()

    def copy_student(self) -> None:
        """There is no twin; prototypes that were loaded are brought to unit length."""
        self._to_unit_length()

    @torch.no_grad()
    def _to_unit_length(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


def swapped_prediction(scores: Tensor, codes: Tensor, assign: Sequence[int], temperature: float) -> Tensor:
    """Cross entropy between the codes of a crop and what every other crop predicts (equation 6 and section 3.2).

    -sum_k q_a(k) log softmax(s_v / T)(k), mean over images, over crops v other than a, and over assigned crops a.

    Args:
        scores: (V, B, K), similarity of every crop to every prototype.
        codes: (A, B, K), the assignments q of the crops that `assign` names; rows sum to 1.
        assign: numbers of the assigned crops.
        temperature: T.
    """
    predictions = F.log_softmax(scores / temperature, dim=2)
    losses = [
        -(code * predictions[[v for v in range(len(scores)) if v != crop]]).sum(dim=2).mean()
        for crop, code in zip(assign, codes, strict=True)
    ]
    return torch.stack(losses).mean()


build = SwAV
