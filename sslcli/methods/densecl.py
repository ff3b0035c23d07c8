"""DenseCL: MoCo twice over, for the whole image and for every place in its feature map.

Wang et al. 2021, https://arxiv.org/abs/2011.09157.
"""

from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, Index, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError
from sslcli.nn import slow
from sslcli.nn.contrast import info_nce
from sslcli.nn.heads import mlp
from sslcli.nn.precision import no_autocast, widen
from sslcli.nn.queue import Queue
from sslcli.seeds import permutation, seed_of


class Config(MethodConfig):
    """Dense contrast; the first view asks, the second answers."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["densecl"] = "densecl"
    dim: Count = 128
    """Length of queries and keys."""
    hidden: Count | None = None
    """Width of the layer before them; when absent, the length of the backbone's feature."""
    queue: Count = 65536
    """How many keys of past images serve as negatives, in each of the two queues."""
    momentum: Fraction = 0.999
    """How slowly the key network follows: the share of itself that it keeps at every step."""
    temperature: Positive = 0.2
    """Divisor of similarities; a smaller one weighs the hardest negatives more."""
    dense: Fraction = 0.5
    """Share of the dense loss in the sum."""
    warmup_steps: Index = 0
    """Steps from the start in which the dense loss counts nothing; the authors' code knows it, no preset uses it."""
    grid: Count | None = None
    """Average the feature map to this many places along each side first; when absent, it stays as it is."""


class Found(NamedTuple):
    """What a network makes of images; unit vectors."""

    whole: Tensor
    """(B, D), of each image."""
    places: Tensor
    """(B, S, D), of each place in its map."""
    mean: Tensor
    """(B, D), of the average over places."""
    features: Tensor
    """(B, S, C), the backbone's own, by which places are matched."""


@final
class DenseCL(Method[Config]):
    """Query network, slow key network, and two queues: of image keys and of averaged place keys."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        if facts.part_size > cfg.queue:
            raise UserError(
                f"`method.queue` {cfg.queue} is shorter than the {facts.part_size} keys of one forward pass",
                hint=f"set `method.queue` to at least {facts.part_size}; the paper has room for many batches",
            )
        self.head = Head(backbone.dim, cfg.hidden or backbone.dim, cfg.dim, cfg.grid)
        self.slow_backbone = slow.frozen_copy(backbone)
        self.slow_head = slow.frozen_copy(self.head)
        self.queue = Queue(cfg.queue, cfg.dim)
        self.dense_queue = Queue(cfg.queue, cfg.dim)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of the first view's queries; then the second's keys, from all ranks, enter the queues."""
        cfg = self.cfg
        first, second = batch.views
        q = self.head(self.backbone.maps(first))
        keys = self._keys(second, seed_of(at.seed, "shuffle", at.step, at.part))
        # the backward pass needs the queues as they are before the push
        whole = info_nce(q.whole, keys.whole, self.queue.rows.clone(), cfg.temperature)
        dense = info_nce(
            q.places.flatten(0, 1),
            counterparts(q.features, keys.features, keys.places).flatten(0, 1),
            self.dense_queue.rows.clone(),
            cfg.temperature,
        )
        self.queue.push(dist.gather(keys.whole))
        self.dense_queue.push(dist.gather(keys.mean))
        share = cfg.dense if at.step >= cfg.warmup_steps else 0.0
        return StepResult(
            (1 - share) * whole.loss + share * dense.loss,
            {"top1": whole.top1, "loss_whole": whole.loss.detach(), "loss_dense": dense.loss.detach()},
        )

    @torch.no_grad()
    def _keys(self, images: Tensor, seed: int) -> Found:
        """Keys of this rank's images, made from another share of the global batch (He et al. 2020, section 3.3)."""
        order = torch.from_numpy(permutation(dist.world() * len(images), seed))
        found: Found = self.slow_head(self.slow_backbone.maps(dist.shuffle(images, order)))
        return Found(*(dist.unshuffle(each, order) for each in found))

    def after_step(self, at: Progress) -> None:
        """Let the key network follow, for the parameters of backbone and head."""
        slow.ema_(self.slow_backbone, self.backbone, self.cfg.momentum)
        slow.ema_(self.slow_head, self.head, self.cfg.momentum)

    def copy_student(self) -> None:
        """Start the key network where the query network starts."""
        slow.copy_(self.slow_backbone, self.backbone)
        slow.copy_(self.slow_head, self.head)


@final
class Head(nn.Module):
    """Two perceptrons of two layers: one on the averaged map, one on every place of it."""

    def __init__(self, dim_in: int, hidden: int, dim: int, grid: int | None) -> None:
        super().__init__()
        self.whole = mlp([dim_in, hidden, dim])
        self.places = nn.Sequential(nn.Conv2d(dim_in, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, dim, 1))
        self.grid = grid

    def forward(self, maps: Tensor) -> Found:
        """Unit vectors from feature maps (B, C, h, w)."""
        whole, places, coarse = (widen(each) for each in self.raw(maps))
        return Found(
            F.normalize(whole, dim=1),
            F.normalize(places, dim=2),
            F.normalize(places.mean(dim=1), dim=1),
            F.normalize(coarse.detach(), dim=2),
        )

    def raw(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of maps (B, C, h, w): (B, D) for the average, (B, S, D) for the places, and their own features (B, S, C)."""
        coarse = maps if self.grid is None else F.adaptive_avg_pool2d(maps, self.grid)
        whole: Tensor = self.whole(maps.mean(dim=(2, 3)))
        places: Tensor = self.places(coarse)
        return whole, places.flatten(2).mT, coarse.flatten(2).mT


@torch.no_grad()
def counterparts(q_features: Tensor, k_features: Tensor, k_places: Tensor) -> Tensor:
    """Keys (B, S, D), for every place of the query's map the one whose backbone feature is most like (equation 3).

    Features are unit vectors (B, S, C), keys (B, S, D); each place is matched within its own image.
    """
    with no_autocast(q_features):
        match = torch.bmm(widen(q_features), widen(k_features).mT).argmax(dim=2)  # (B, S)
    return k_places.gather(1, match[..., None].expand(-1, -1, k_places.shape[2]))


build = DenseCL
