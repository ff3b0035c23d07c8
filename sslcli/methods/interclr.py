"""InterCLR: MoCo, and beside it, telling a random image of one's own cluster from images of other clusters.

Xie et al. 2022, "Delving into inter-image invariance for unsupervised visual representations",
https://arxiv.org/abs/2008.11702.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, Index, Positive
from sslcli.contracts import Backbone, Batch, Look, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError
from sslcli.nn import slow
from sslcli.nn.bank import contrast_with_bank
from sslcli.nn.contrast import Contrast, info_nce_logits, percent_right
from sslcli.nn.heads import mlp
from sslcli.nn.kmeans import parts
from sslcli.nn.memory import Memory
from sslcli.nn.needs import need_clusters
from sslcli.nn.precision import widen
from sslcli.nn.queue import Queue
from sslcli.seeds import permutation, seed_of, uniform_on

Choice = Literal["random", "semihard", "semieasy", "hard"]


class Config(MethodConfig):
    """Momentum contrast within and between images; the first view asks, the second answers."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["interclr"] = "interclr"
    dim: Count = 128
    """Length of queries and keys; the memory takes images x dim x 4 bytes on every rank."""
    queue: Count = 65536
    """How many keys of past images serve as negatives within images."""
    momentum: Fraction = 0.999
    """How slowly the key network follows: the share of itself that it keeps at every step."""
    temperature: Positive = 0.2
    """Divisor of similarities; a smaller one weighs the hardest negatives more."""
    hidden: Count | None = None
    """Width of the head's hidden layer; when absent, the length of the backbone's feature."""
    share_head: bool = True
    """Compare images within and between by the same head; otherwise each way has its own."""
    inter: Fraction = 0.25
    """Weight of the loss between images; the other loss has what is left of 1."""
    warmup_epochs: Index = 0
    """Epochs without the loss between images."""
    clusters: Count = 10000
    """How many clusters there are."""
    iterations: Count = 20
    """Most rounds of the k-means that makes the first clusters."""
    memory_momentum: Fraction = 0.0
    """The share of itself that a remembered key keeps when its image is seen again; 0: the newest key replaces it."""
    centroids_every: Count = 10
    """Steps between updates of the centroids."""
    min_cluster: Count = 20
    """A cluster of fewer images is dissolved, and gets half of the largest one in exchange."""
    choose: Choice = "semihard"
    """Which images of other clusters are negatives: `random`; a random part of the `pool` most similar (`semihard`) or
    least similar ones (`semieasy`); the most similar ones (`hard`)."""
    negatives: Count = 16384
    """How many."""
    pool: Count = 128000
    """Images that semihard and semieasy negatives are drawn from."""
    intra_cosine_margin: float = 0.0
    """Taken off the similarity of query and key, within images."""
    intra_arc_margin: float = 0.0
    """Added to the angle between query and key, in radians."""
    inter_cosine_margin: float = -0.5
    """Taken off the similarity of query and positive, between images; a negative one asks for less."""
    inter_arc_margin: float = 0.0
    """Added to the angle between query and positive, in radians."""
    replace: bool = True
    """Draw the images of an epoch with replacement, instead of every image once."""
    shard_memory: bool = False
    """Let every rank remember the keys of its share of the images only; the same but for rounding."""


class Chosen(NamedTuple):
    """What queries are compared with between images."""

    positives: Tensor
    """(B,) an image of the query's own cluster, maybe itself."""
    negatives: Tensor
    """(B, K) images of other clusters."""


@final
class InterCLR(Method[Config]):
    """Query network, slow key network, a queue, and online clusters of all images."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_clusters(facts, cfg.clusters, each=cfg.min_cluster)
        check_sizes(cfg, facts)
        self.images = facts.images
        dims = [backbone.dim, cfg.hidden or backbone.dim, cfg.dim]
        self.head = mlp(dims)
        self.inter_head = self.head if cfg.share_head else mlp(dims)
        self.slow_backbone = slow.frozen_copy(backbone)
        self.slow_head = slow.frozen_copy(self.head)
        self.slow_inter_head = self.slow_head if cfg.share_head else slow.frozen_copy(self.inter_head)
        self.queue = Queue(cfg.queue, cfg.dim)
        self.memory = Memory(facts.images, cfg.dim, cfg.clusters, shard=cfg.shard_memory)

    def before_epoch(self, at: Progress, look: Look) -> None:
        """Before the first step, cluster what the untrained query network makes of all images."""
        if at.epoch == 0:
            rows = look(lambda images: self.inter_head(self.backbone(images)))
            self.memory.start(rows, iterations=self.cfg.iterations, key=seed_of(at.seed, "interclr"))

    def sample_weights(self) -> np.ndarray | None:
        """All the same, drawn with replacement."""
        return np.ones(self.images) if self.cfg.replace else None

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Both losses; then the keys of all ranks enter queue and memory."""
        cfg = self.cfg
        features = self.backbone(batch.views[0])
        q = F.normalize(widen(self.head(features)), dim=1)  # (B, D)
        between = q if cfg.share_head else F.normalize(widen(self.inter_head(features)), dim=1)
        keys, stored = self._keys(batch.views[1], seed_of(at.seed, "shuffle", at.step, at.part))
        negatives = self.queue.rows.clone()  # the backward pass needs them as they are before the push
        margins = (cfg.intra_cosine_margin, cfg.intra_arc_margin)
        intra = info_nce_with_margins(q, keys, negatives, cfg.temperature, *margins)
        chosen = self._chosen(between.detach(), batch.index, at)
        inter = self._inter(between, chosen)
        self.queue.push(dist.gather(keys))
        changed = self.memory.update(batch.index, stored, cfg.memory_momentum)
        share = cfg.inter if at.epoch >= cfg.warmup_epochs else 0.0
        return StepResult(
            (1 - share) * intra.loss + share * inter.loss,
            {
                "top1": intra.top1,
                "loss_intra": intra.loss.detach(),
                "loss_inter": inter.loss.detach(),
                "changed": changed,
                "largest_cluster": self.memory.counts.max(),
            },
        )

    def _inter(self, q: Tensor, chosen: Chosen) -> Contrast:
        """Loss between images, of queries (B, D) against the memory as it stands."""
        cfg, bank = self.cfg, self.memory.bank
        margins = (cfg.inter_cosine_margin, cfg.inter_arc_margin)
        loss_of = partial(margin_loss, temperature=cfg.temperature, cosine_margin=margins[0], arc_margin=margins[1])
        positives, negatives = (bank.asked(each) for each in chosen)
        return contrast_with_bank(bank, q, positives, lambda part: negatives[part], loss_of, 1.0)

    @torch.no_grad()
    def _chosen(self, q: Tensor, index: Tensor, at: Progress) -> Chosen:
        """Positives and negatives, from queries (B, D) of images `index` (B,), few at a time."""
        cfg, memory = self.cfg, self.memory
        every = torch.arange(self.images, device=index.device)
        keys = [seed_of(at.seed, "interclr", name, at.step) for name in ("positive", "negative")]
        found: list[Chosen] = []
        for part in parts(len(index), self.images):
            same = memory.labels[index[part], None] == memory.labels  # (b, N)
            draws = [uniform_on(key, index[part, None], every) for key in keys]
            positives = draws[0].masked_fill(~same, 1).argmin(dim=1)
            similarity = draws[1] if cfg.choose == "random" else memory.bank.similarity(q[part])
            negatives = others(same, similarity, draws[1], cfg.choose, cfg.negatives, cfg.pool)
            found.append(Chosen(positives, negatives))
        return Chosen(*(torch.cat(each) for each in zip(*found, strict=True)))

    @torch.no_grad()
    def _keys(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Unit keys (B, D) within and between images, made from another share of the global batch (MoCo, 3.3)."""
        order = torch.from_numpy(permutation(dist.world() * len(images), seed))
        features = self.slow_backbone(dist.shuffle(images, order))
        heads = (self.slow_head,) if self.cfg.share_head else (self.slow_head, self.slow_inter_head)
        found = [dist.unshuffle(F.normalize(widen(head(features)), dim=1), order) for head in heads]
        return found[0], found[-1]

    def after_step(self, at: Progress) -> None:
        """Let the key network follow, move the centroids now and then, and deal with small clusters in every step."""
        for behind, ahead in self._twins():
            slow.ema_(behind, ahead, self.cfg.momentum)
        if (at.step + 1) % self.cfg.centroids_every == 0:
            self.memory.move_centroids()
        self.memory.absorb_small(self.cfg.min_cluster)

    def copy_student(self) -> None:
        """Start the key network where the query network starts."""
        for behind, ahead in self._twins():
            slow.copy_(behind, ahead)

    def _twins(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = [
            (self.slow_backbone, self.backbone),
            (self.slow_head, self.head),
        ]
        return pairs if self.cfg.share_head else [*pairs, (self.slow_inter_head, self.inter_head)]

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """Cosine of a query with the key of the other view."""
        query = widen(self.head(self.backbone(batch.views[0])))
        key = widen(self.slow_head(self.slow_backbone(batch.views[1])))
        return {"agreement": F.cosine_similarity(query, key).mean()}


def check_sizes(cfg: Config, facts: RunFacts) -> None:
    """Refuse a queue shorter than a batch, and more negatives than there are.

    Raises:
        UserError: with what would do.
    """
    if facts.part_size > cfg.queue:
        raise UserError(
            f"`method.queue` {cfg.queue} is shorter than the {facts.part_size} keys of one forward pass",
            hint=f"set `method.queue` to at least {facts.part_size}; the paper has room for many batches",
        )
    pooled = cfg.choose in ("semihard", "semieasy")
    most = min(cfg.pool, facts.images) if pooled else facts.images
    if cfg.negatives >= most or (pooled and cfg.pool > facts.images):
        raise UserError(
            f"`method.negatives` {cfg.negatives}, `method.pool` {cfg.pool}: "
            f"more than the {facts.images} images can give",
            hint="the paper has an eighth of the pool, and a pool of a tenth of the images",
        )


def others(same: Tensor, similarity: Tensor, draws: Tensor, choose: Choice, count: int, pool: int) -> Tensor:
    """Different images (B, K) of other clusters for each query; where there are too few, the first again and again.

    Args:
        same: (B, N) whether an image is of the query's cluster.
        similarity: (B, N) of the query to the image.
        draws: (B, N) uniform in [0, 1).
        choose: the strategy (section 3.2).
        count: K.
        pool: images that semihard and semieasy ones are drawn from: what is missing there comes from elsewhere.
    """
    order = draws
    if choose == "hard":
        order = -similarity
    elif choose != "random":
        towards = similarity if choose == "semihard" else -similarity
        order = draws + (towards < towards.topk(pool, dim=1).values[:, -1:])
    found = (order + 8 * same).topk(count, dim=1, largest=False).indices
    return torch.where(same.gather(1, found), found[:, :1], found)


def with_margins(positive: Tensor, cosine_margin: float, arc_margin: float) -> Tensor:
    """Similarities (B,) made harder to reach by margins, or easier by negative ones (section 3.3, equations 4 and 5).

    cos(theta) - m, then cos(theta + m'); beyond the angle at which the latter would rise again, a line goes on.
    """
    positive = positive - cosine_margin
    if not arc_margin:
        return positive
    # at 0 and pi the root has no slope: a number too small to matter keeps it finite
    sine = (1 - positive.square()).clamp_min(torch.finfo(positive.dtype).tiny).sqrt()
    turned = positive * math.cos(arc_margin) - sine * math.sin(arc_margin)
    if arc_margin > 0:
        beyond = positive <= math.cos(math.pi - arc_margin)
        line = positive - math.sin(math.pi - arc_margin) * arc_margin
    else:
        beyond = positive >= math.cos(arc_margin)
        line = positive + math.sin(arc_margin) * arc_margin
    return torch.where(beyond, line, turned)


def margin_loss(cosines: Tensor, temperature: float, cosine_margin: float, arc_margin: float) -> Tensor:
    """-log( exp(m(c_0)/T) / (exp(m(c_0)/T) + sum_k exp(c_k/T)) ) of each row of (B, 1 + K) -> (B,); m: margins."""
    positive = with_margins(cosines[:, :1], cosine_margin, arc_margin)
    return -F.log_softmax(torch.cat([positive, cosines[:, 1:]], dim=1) / temperature, dim=1)[:, 0]


def info_nce_with_margins(
    q: Tensor, keys: Tensor, negatives: Tensor, temperature: float, cosine_margin: float, arc_margin: float
) -> Contrast:
    """`info_nce` of unit rows, with margins on the similarity of query (B, D) and key (B, D)."""
    cosines = info_nce_logits(q, keys, negatives, 1.0)
    loss = margin_loss(cosines, temperature, cosine_margin, arc_margin).mean()
    return Contrast(loss, percent_right(cosines, torch.zeros(len(q), dtype=torch.int64, device=q.device)))


build = InterCLR
