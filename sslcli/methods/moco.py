"""MoCo: tell an image from a queue of others, whose keys a slow twin has made.

v1: He et al. 2020, https://arxiv.org/abs/1911.05722. v2: Chen et al. 2020, https://arxiv.org/abs/2003.04297.
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
from sslcli.errors import UserError
from sslcli.nn import slow
from sslcli.nn.contrast import Contrast, info_nce
from sslcli.nn.heads import mlp
from sslcli.nn.precision import widen
from sslcli.nn.queue import Queue
from sslcli.seeds import permutation, seed_of


class Config(MethodConfig):
    """Momentum contrast; the first view asks, the second answers."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["moco"] = "moco"
    dim: Count = 128
    """Length of queries and keys."""
    queue: Count = 65536
    """How many keys of past images serve as negatives."""
    momentum: Fraction = 0.999
    """How slowly the key network follows: the share of itself that it keeps at every step."""
    temperature: Positive = 0.2
    """Divisor of similarities; a smaller one weighs the hardest negatives more. v1 0.07, v2 0.2."""
    mlp: bool = True
    """Two linear layers with ReLU between them on top of the backbone (v2) instead of one (v1)."""
    hidden: Count | None = None
    """Width of the layer between them; when absent, the length of the backbone's feature."""
    symmetric: bool = False
    """Let the second view ask and the first answer too, and add the two losses (CIFAR demo of the authors)."""


@final
class MoCo(Method[Config]):
    """Query network, slow key network, and a queue of keys that all ranks share."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        pushed = facts.part_size * (2 if cfg.symmetric else 1)
        if pushed > cfg.queue:
            raise UserError(
                f"`method.queue` {cfg.queue} is shorter than the {pushed} keys of one forward pass",
                hint=f"set `method.queue` to at least {pushed}; the paper has room for many batches",
            )
        hidden = [cfg.hidden or backbone.dim] if cfg.mlp else []
        self.head = mlp([backbone.dim, *hidden, cfg.dim])
        self.slow_backbone = slow.frozen_copy(backbone)
        self.slow_head = slow.frozen_copy(self.head)
        self.queue = Queue(cfg.queue, cfg.dim)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of views a -> b, and of b -> a if symmetric; then their keys, from all ranks, enter the queue."""
        first, second = batch.views
        negatives = self.queue.rows.clone()  # the backward pass needs them as they are before the push
        pairs = [(first, second), (second, first)] if self.cfg.symmetric else [(first, second)]
        found: list[Contrast] = []
        fresh: list[Tensor] = []
        for turn, (asking, answering) in enumerate(pairs):
            q = F.normalize(widen(self.head(self.backbone(asking))), dim=1)  # (B, D)
            keys = self._keys(answering, seed_of(at.seed, "shuffle", at.step, at.part, turn))  # (B, D)
            found.append(info_nce(q, keys, negatives, self.cfg.temperature))
            fresh.append(dist.gather(keys))  # (W*B, D)
        self.queue.push(torch.cat(fresh))
        loss, top1 = (torch.stack(values) for values in zip(*found, strict=True))
        return StepResult(loss.sum(), {"top1": top1.mean()})

    @torch.no_grad()
    def _keys(self, images: Tensor, seed: int) -> Tensor:
        """Unit keys (B, D), made from another share of the global batch than the queries.

        Otherwise query and key would share batch-norm statistics, and the network would recognise those instead of
        the image (section 3.3, "Shuffling BN").
        """
        order = torch.from_numpy(permutation(dist.world() * len(images), seed))
        keys = F.normalize(widen(self.slow_head(self.slow_backbone(dist.shuffle(images, order)))), dim=1)
        return dist.unshuffle(keys, order)

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Cosine of a query with the key of the other view."""
        query = widen(self.head(self.backbone(batch.views[0])))
        key = widen(self.slow_head(self.slow_backbone(batch.views[1])))
        return {"agreement": F.cosine_similarity(query, key).mean()}

    def after_step(self, at: Progress) -> None:
        """Equation 2, for the parameters of backbone and head.

        The papers do this at the start of the next forward pass: the same sequence, since keys start equal to queries.
        """
        slow.ema_(self.slow_backbone, self.backbone, self.cfg.momentum)
        slow.ema_(self.slow_head, self.head, self.cfg.momentum)

    def copy_student(self) -> None:
        """Start the key network where the query network starts."""
        slow.copy_(self.slow_backbone, self.backbone)
        slow.copy_(self.slow_head, self.head)


build = MoCo
