"""Find the right one among many: the contrastive loss with a given set of negatives."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli.nn.precision import no_autocast, widen


class Contrast(NamedTuple):
    """How well queries find their keys."""

    loss: Tensor
    """Scalar to minimise."""
    top1: Tensor
    """Detached scalar: percentage of queries that no wrong key resembles more than their own."""


def info_nce_logits(q: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Logits (B, 1 + K): similarity of q (B, D) to its key (B, D) in column 0, to negatives (K, D) in the others."""
    with no_autocast(q):
        q, keys, negatives = widen(q), widen(keys), widen(negatives)
        own = (q * keys).sum(dim=1, keepdim=True)  # (B, 1)
        return torch.cat([own, q @ negatives.T], dim=1) / temperature


def info_nce(q: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Contrast:
    """-log( exp(q.k/T) / (exp(q.k/T) + sum_n exp(q.n/T)) ), mean over the queries (van den Oord et al. 2018, eq. 4).

    Rows are expected to have unit length. In at least float32, also under autocast.
    """
    logits = info_nce_logits(q, keys, negatives, temperature)
    own = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return Contrast(F.cross_entropy(logits, own), percent_right(logits, own))


def percent_right(logits: Tensor, target: Tensor) -> Tensor:
    """Percentage of rows of logits (B, K) whose largest entry is at target (B,); detached."""
    return (logits.detach().argmax(dim=1) == target).float().mean() * 100
