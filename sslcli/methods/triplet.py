"""Triplet: be nearer to the other view of the image than to its second to tenth nearest neighbours.

Wang et al. 2021 ("Solving inefficiency of self-supervised representation learning"), https://arxiv.org/abs/2104.08760.
"""

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, NonNegative, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError
from sslcli.nn import slow
from sslcli.nn.contrast import Contrast, percent_right
from sslcli.nn.heads import mlp
from sslcli.nn.precision import no_autocast, widen
from sslcli.nn.spread import spread
from sslcli.seeds import bits, seed_of


def _ascending(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] > pair[1]:
        raise ValueError(f"the smaller number comes first (got {list(pair)})")
    return pair


FromTo = Annotated[tuple[Count, Count], AfterValidator(_ascending)]


class Config(MethodConfig):
    """BYOL's networks under a truncated triplet loss; all passes see images of random size."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["triplet"] = "triplet"
    hidden: Count = 4096
    """Width of the hidden layer of projector and predictor."""
    dim: Count = 256
    """Length of projections."""
    momentum: Fraction = 0.99
    """The share of itself that the target network keeps at every step, at first; it grows to 1 along half a cosine."""
    margin: NonNegative = 100.0
    """How much farther negatives should be; 100 is out of reach, so that every triplet always counts."""
    gamma: Positive = 2.0
    """Weight of the distance to the image's own other view."""
    ranks: FromTo = (2, 10)
    """Which of the nearest others, from 1, serve as negatives, averaged. Without the very nearest, which may be more
    of the same; starting at 1 is the plain hardest-negative loss that collapses."""
    aggregate: Literal["mean", "median"] = "mean"
    """`mean` of the others at `ranks`, or the `median` of all others (the first version of the paper)."""
    negatives: Literal["rank", "all"] | Count = "rank"
    """Among which images: those of a rank's forward pass, those of all ranks, or groups of so many (the authors'
    images per GPU, whatever the number of GPUs here)."""
    online_size: FromTo | None = (96, 224)
    """Smallest and largest side in pixels to which the online network's images are resized, drawn for each pass."""
    target_size: FromTo | None = (128, 224)
    """The same for the target network; without it, images stay as they are."""


@final
class Triplet(Method[Config]):
    """Online network with predictor, slow target network."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        self.group = group_size(cfg.negatives, facts.part_size, cfg.ranks[1] if cfg.aggregate == "mean" else 1)
        self.projector = mlp([backbone.dim, cfg.hidden, cfg.dim], norm=True)
        self.predictor = mlp([cfg.dim, cfg.hidden, cfg.dim], norm=True)
        self.slow_backbone = slow.frozen_copy(backbone)
        self.slow_projector = slow.frozen_copy(self.projector)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of the first view's guess at the second's target, and the other way round, added."""
        cfg = self.cfg
        key = seed_of(at.seed, "triplet", at.step, at.part)
        guesses = [
            self.predictor(self.projector(self.backbone(resized(view, cfg.online_size, key, slot))))
            for slot, view in enumerate(batch.views)
        ]
        with torch.no_grad():
            targets = [
                self.slow_projector(self.slow_backbone(resized(view, cfg.target_size, key, slot)))
                for slot, view in enumerate(batch.views, start=2)
            ]
        there, back = self._loss(guesses[0], targets[1]), self._loss(guesses[1], targets[0])
        loss = there.loss + back.loss
        return StepResult(
            loss,
            {
                "top1": (there.top1 + back.top1) / 2,
                "loss_above_margin": loss.detach() - 2 * cfg.margin,
                "spread": spread(guesses[0]),
            },
        )

    def _loss(self, guesses: Tensor, targets: Tensor) -> Contrast:
        """Loss of guesses (B, D) for targets (B, D), with negatives from where the preset says."""
        cfg, first = self.cfg, 0
        if cfg.negatives == "all":
            first, targets = dist.rank() * len(guesses), dist.gather(targets)
            pairs = [(guesses, targets)]
        else:
            pairs = list(zip(guesses.split(self.group), targets.split(self.group), strict=True))
        found = [
            truncated_triplet(p, t, first, margin=cfg.margin, gamma=cfg.gamma, ranks=cfg.ranks, aggregate=cfg.aggregate)
            for p, t in pairs
        ]
        loss, top1 = (torch.stack(values).mean() for values in zip(*found, strict=True))
        return Contrast(loss, top1)

    def after_step(self, at: Progress) -> None:
        """Move the target network's parameters towards the online network's."""
        momentum = slow.cosine_momentum(self.cfg.momentum, 1.0, at.fraction)
        slow.ema_(self.slow_backbone, self.backbone, momentum)
        slow.ema_(self.slow_projector, self.projector, momentum)

    def copy_student(self) -> None:
        """Start the target network where the online network starts."""
        slow.copy_(self.slow_backbone, self.backbone)
        slow.copy_(self.slow_projector, self.projector)


def group_size(negatives: Literal["rank", "all"] | int, part_size: int, farthest: int) -> int:
    """How many images look for negatives among each other, of the `part_size` images of a forward pass.

    Raises:
        UserError: groups of that size cannot be formed, or are too small to have a negative of rank `farthest`.
    """
    local = part_size // dist.world()
    size = part_size if negatives == "all" else local if negatives == "rank" else negatives
    if negatives not in ("rank", "all") and local % size:
        raise UserError(
            f"`method.negatives`: groups of {size} images cannot be formed from the {local} of a rank's forward pass",
            hint="use fewer ranks, or set `method.negatives` to `rank`",
        )
    if size <= farthest:
        raise UserError(
            f"`method.ranks` asks for {farthest} negatives, but only {size} images look for them among each other",
            hint=f"at least {farthest + 1} are needed: fewer ranks, a larger `data.batch_size`, a smaller "
            "`run.accumulate`, or `method.negatives: all`",
        )
    return size


def resized(images: Tensor, sizes: tuple[int, int] | None, key: int, slot: int) -> Tensor:
    """Images (B, 3, H, W) bilinearly resized, without antialiasing as the authors do, to a square of a drawn side."""
    if sizes is None:
        return images
    smallest, largest = sizes
    side = smallest + int(bits(key, slot) % (largest - smallest + 1))
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def truncated_triplet(
    guesses: Tensor,
    targets: Tensor,
    first: int,
    *,
    margin: float,
    gamma: float,
    ranks: tuple[int, int],
    aggregate: Literal["mean", "median"],
) -> Contrast:
    """max(0, margin + gamma d(p_i, t_i) - mean_j d(p_i, t_j)), mean over guesses, with d(a, b) = -2 cos(a, b).

    j runs over the others at places ranks[0] to ranks[1] in order of nearness; with `median`, d of the negatives is
    the median over all others. As |d| <= 2, a margin of 100 makes the loss linear.

    Args:
        guesses: (B, D), p.
        targets: (N, D), t; row `first` + i is the other view of guess i.
        first: see there.
        margin: least difference wanted.
        gamma: weight of the positive.
        ranks: first and last place, from 1; N is larger than the last.
        aggregate: how negatives are made one.
    """
    with no_autocast(guesses):
        cosines = F.normalize(widen(guesses), dim=1) @ F.normalize(widen(targets), dim=1).T  # (B, N)
    here = torch.arange(len(guesses), device=guesses.device)
    own = first + here
    distances = -2 * cosines
    positive = distances[here, own]
    others = distances.index_put((here, own), distances.new_tensor(torch.inf))
    if aggregate == "mean":
        nearest = others.topk(ranks[1], dim=1, largest=False, sorted=True).values
        negative = nearest[:, ranks[0] - 1 :].mean(dim=1)
    else:
        negative = others.sort(dim=1).values[:, (others.shape[1] - 2) // 2]
    loss = (margin + gamma * positive - negative).clamp(min=0).mean()
    return Contrast(loss, percent_right(cosines, own))


build = Triplet
