"""NPID: tell every image from every other by what a memory bank remembers of it.

Wu et al. 2018 ("non-parametric instance discrimination"), https://arxiv.org/abs/1805.01978.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError
from sslcli.nn.bank import Bank, contrast_with_bank, slices
from sslcli.nn.heads import mlp
from sslcli.nn.precision import no_autocast, widen
from sslcli.seeds import bits_on, seed_of

EPS = 1e-7


class Config(MethodConfig):
    """Instance discrimination against a memory bank of all images."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=1, at_most=1)
    name: Literal["npid"] = "npid"
    dim: Count = 128
    """Length of what is remembered of an image; the bank takes images x dim x 4 bytes on every rank."""
    negatives: Count = 65536
    """How many rows of the bank, drawn anew for every image and step, an image is told from."""
    temperature: Positive = 0.07
    """Divisor of similarities; a smaller one weighs the hardest negatives more."""
    momentum: Fraction = 0.5
    """The share of itself that a row keeps when its image is seen again."""
    ensure_negative: bool = False
    """Never draw an image as a negative of itself."""
    shard_memory: bool = False
    """Let every rank hold the rows of its share of the images only, and ranks compare where the rows are; the loss is
    the same but for rounding."""
    loss: Literal["softmax", "nce"] = "softmax"
    """`softmax`: cross entropy over the image and its negatives (OpenSelfSup, MMSelfSup). `nce`: noise-contrastive
    estimation of the softmax over all images (the paper and its code)."""


@final
class NPID(Method[Config]):
    """A backbone, one linear layer, and the memory of every image."""

    partition: Tensor

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        if facts.images < 2:
            raise UserError(
                "`npid` tells images from each other, and the source has only one", hint="point `--data` at more images"
            )
        self.images = facts.images
        self.head = mlp([backbone.dim, cfg.dim])
        self.bank = Bank(facts.images, cfg.dim, shard=cfg.shard_memory)
        self.register_buffer("partition", torch.ones(()))  # Z of `nce_loss`, set in the first step

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss against the bank as it stands; then the features of all ranks enter it."""
        cfg = self.cfg
        features = F.normalize(widen(self.head(self.backbone(batch.views[0]))), dim=1)  # (B, D)
        key = seed_of(at.seed, "npid", at.step)
        index = self.bank.asked(batch.index)
        negatives = partial(others, index, self.images, cfg.negatives, key, cfg.ensure_negative)
        if cfg.loss == "nce" and at.step == at.part == 0:
            z = partition(self.bank, self.bank.asked(features), index, negatives, cfg.temperature)
            self.partition.copy_(dist.mean(z))
        loss_of = softmax_loss if cfg.loss == "softmax" else partial(nce_loss, z=self.partition, images=self.images)
        found = contrast_with_bank(self.bank, features, index, negatives, loss_of, cfg.temperature)
        self.bank.update(batch.index, features, cfg.momentum)
        return StepResult(found.loss, {"top1": found.top1})


def others(index: Tensor, images: int, count: int, key: int, never_itself: bool, part: slice) -> Tensor:
    """Rows (b, count) of a bank of `images`, with replacement: negatives of the images `index[part]`.

    A function of image and key alone, whatever the batch or rank the image is in.
    """
    own = index[part, None]  # (b, 1)
    drawn = bits_on(key, own, torch.arange(count, device=index.device))
    if not never_itself:
        return drawn.remainder(images)
    drawn = drawn.remainder(images - 1)
    return drawn + (drawn >= own)  # steps over the image itself


def softmax_loss(logits: Tensor) -> Tensor:
    """-log( exp(l_0) / sum_k exp(l_k) ) of each row of logits (b, 1 + K) -> (b,)."""
    return -F.log_softmax(logits, dim=1)[:, 0]


def nce_loss(logits: Tensor, z: Tensor, images: int) -> Tensor:
    """Noise-contrastive estimation (equations 6 and 7) for each row of logits (b, 1 + K) -> (b,).

    With P_k = exp(l_k) / z and uniform noise of K draws, each image expected K / N times:
    -log( P_0 / (P_0 + K/N) ) - sum_k log( (K/N) / (P_k + K/N) ), k from 1; with the authors' 1e-7 in each denominator.
    """
    noise = (logits.shape[1] - 1) / images
    p = logits.exp() / z
    real = p[:, 0] / (p[:, 0] + noise + EPS)
    noisy = noise / (p[:, 1:] + noise + EPS)
    return -real.log() - noisy.log().sum(dim=1)


@torch.no_grad()
def partition(
    bank: Tensor | Bank, features: Tensor, index: Tensor, negatives: Callable[[slice], Tensor], temperature: float
) -> Tensor:
    """Z, the constant that makes exp(logit) / Z a probability: N times the mean of exp(logit) (equation 8)."""
    with no_autocast(features):
        sums = [logits.exp().sum() for *_, logits in slices(bank, features, index, negatives, temperature)]
    compared = len(features) * (1 + negatives(slice(0, 1)).shape[1])
    return torch.stack(sums).sum() / compared * (len(bank) if isinstance(bank, Tensor) else bank.images)


build = NPID
