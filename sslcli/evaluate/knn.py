"""Weighted nearest neighbours: no training, so the number says what the features themselves know.

Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4: the `k` training images most similar to a test image vote
for their classes with weight exp(cosine similarity / temperature).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslcli import dist
from sslcli.config.base import EvaluatorConfig
from sslcli.config.types import Count, Positive
from sslcli.errors import DataError
from sslcli.features.table import F32, I64, FeatureTable, Scores, TableEvaluator
from sslcli.nn.neighbours import votes

QUERIES = 1024
"""Test images per block of similarities."""
BANK = 16384
"""Training images per block of similarities on a CPU."""
BANK_ON_GPU = 131072
"""The same on a GPU, which has the memory, and to which the test images are sent once per block."""


GROUP = 16
"""Similarities whose largest is looked at first on a CPU: most groups hold none that is among the best so far."""


class Config(EvaluatorConfig):
    """Weighted k-nearest-neighbour classification on cosine similarity."""

    name: Literal["knn"] = "knn"
    k: tuple[Count, ...] = Field(default=(10, 20, 100, 200), min_length=1)
    """How many neighbours vote; every value is reported."""
    temperature: Positive = 0.07
    """Lower values let the nearest neighbours decide."""
    tap: str = "pooled"
    """Which features."""
    leave_one_out: bool = False
    """Judge every training image by all the others; for data without a test set."""


class Neighbours(NamedTuple):
    """The training rows most similar to each test row, best first."""

    similarity: Tensor
    """(Q, K) cosine similarity."""
    row: Tensor
    """(Q, K) row in the training table."""


def build(cfg: Config) -> TableEvaluator:
    """The evaluator for these settings."""
    return TableEvaluator(
        score=lambda train, test, seed, told=None: score(train, test, cfg, seed),
        taps=(cfg.tap,),
        headline=f"top1_k{20 if 20 in cfg.k else cfg.k[0]}",
        same_images=cfg.leave_one_out,
    )


def score(train: FeatureTable, test: FeatureTable, cfg: Config, seed: int) -> Scores:
    """Share of test images, in percent, whose class is first (top1) or among the first five (top5) by votes.

    Nothing is drawn, so the seed changes nothing. A `k` above the number of training images means all of them.

    Raises:
        DataError: a table lacks labels or the wanted features.
    """
    labels, truth = train.known_labels(), test.known_labels()
    available = len(train) - (1 if cfg.leave_one_out else 0)
    if available < 1 or len(test) < 1:
        raise DataError("nearest neighbours need at least one training and one test image")
    used = {k: min(k, available) for k in cfg.k}
    found = neighbours(
        train.tap(cfg.tap),
        test.tap(cfg.tap),
        max(used.values()),
        device=dist.device(),
        exclude=(train.index, test.index) if cfg.leave_one_out else None,
    )
    classes = max(len(train.meta.classes), int(max(labels.max(), truth.max())) + 1)
    hits: dict[str, int] = {}
    for first in range(0, len(test), QUERIES):
        rows = slice(first, first + QUERIES)
        voters = torch.from_numpy(labels)[found.row[rows]]  # (q, K)
        right = torch.from_numpy(truth[rows])
        for k, n in used.items():
            place = place_of(right, votes(found.similarity[rows, :n], voters[:, :n], classes, cfg.temperature))
            for top in (1, 5):
                hits[f"top{top}_k{k}"] = hits.get(f"top{top}_k{k}", 0) + int((place < min(top, n)).sum())
    metrics = {name: 100 * count / len(test) for name, count in hits.items()}
    return Scores(
        metrics={name: metrics[name] for top in (1, 5) for k in cfg.k for name in [f"top{top}_k{k}"]},
        details={
            "train_images": len(train),
            "test_images": len(test),
            "classes": classes,
            "k_used": {str(k): n for k, n in used.items() if n != k},
        },
    )


def neighbours(
    bank: F32, queries: F32, k: int, *, device: torch.device, exclude: tuple[I64, I64] | None = None
) -> Neighbours:
    """The `k` rows of `bank` (N, D) most similar to each of `queries` (Q, D), by cosine similarity.

    The bank is walked once, block by block; each block is normalised where it is used and merged into the best `k` so
    far. Beside the two tables, memory holds the result (Q x k x 12 bytes), one normalised block of the bank and one of
    the queries, one block of similarities, and those that may be among the best: for 1.28 million x 2048 features and
    50,000 queries at k = 200, that is 120 MB + 134 MB + 8 MB + 67 MB + at most 46 MB on a CPU, where the full matrix of
    similarities would take 256 GB. Tables in float16 are computed with in float32.

    Args:
        bank: features of the training images, float32 or float16.
        queries: features of the test images, likewise.
        k: neighbours wanted, at most N.
        device: where to compute; the result is on the CPU.
        exclude: (N,) and (Q,) numbers; a row of the bank is no neighbour of a query with the same number.
    """
    best = torch.full((len(queries), k), -torch.inf)
    row = torch.zeros(len(queries), k, dtype=torch.int64)
    size = BANK if device.type == "cpu" else BANK_ON_GPU
    for start in range(0, len(bank), size):
        block = _unit(bank[start : start + size], device)  # (n, D)
        grouped = device.type == "cpu" and len(block) // GROUP >= k
        for first in range(0, len(queries), QUERIES):
            rows = slice(first, first + QUERIES)
            similarity = _unit(queries[rows], device) @ block.T  # (q, n)
            kept, place = best[rows].to(device), row[rows].to(device)
            if exclude is not None:
                ours, theirs = exclude[1][rows, None], exclude[0][None, start : start + size]
                similarity[torch.from_numpy(ours == theirs).to(device)] = -torch.inf
            if grouped:
                value, at = _promising(similarity, k, kept[:, -1:])
            else:
                value, at = similarity.topk(min(k, len(block)), dim=1)
            if value.shape[1]:
                value, order = torch.cat([kept, value], dim=1).topk(k, dim=1)
                best[rows], row[rows] = value.cpu(), torch.cat([place, at + start], dim=1).gather(1, order).cpu()
        del block  # before the next one is made
    return Neighbours(best, row)


def _promising(similarity: Tensor, k: int, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities (q, m) among which are the `k` largest of (q, n) that exceed a threshold (q, 1), and their columns.

    The `k` largest lie in the `k` groups of largest maximum, and in no more groups than have a maximum above the
    threshold: once the bank has been walked for a while these are few, and nearly all similarities are read just once.
    """
    whole = similarity.shape[1] // GROUP * GROUP
    apart = whole // GROUP
    highest = similarity[:, :whole].view(-1, GROUP, apart).amax(1)  # (q, n / GROUP), of columns `apart` from each other
    groups = min(k, int((highest > threshold).sum(1).max()))
    first = highest.topk(groups, dim=1, sorted=False).indices  # (q, g)
    columns = (first[:, None] + torch.arange(GROUP)[:, None] * apart).flatten(1)  # (q, g * GROUP)
    rest = torch.arange(whole, similarity.shape[1]).expand(len(similarity), -1)
    columns = torch.cat([columns, rest], dim=1)
    return similarity.gather(1, columns), columns


def place_of(label: Tensor, score: Tensor) -> Tensor:
    """Place (Q,), from 0, of each row's label (Q,) when its scores (Q, C) are sorted; ties go to the lower class."""
    own = score.gather(1, label[:, None])  # (Q, 1)
    ahead = torch.arange(score.shape[1]) < label[:, None]
    return ((score > own) | ((score == own) & ahead)).sum(1)


def _unit(rows: F32, device: torch.device) -> Tensor:
    given = torch.from_numpy(np.ascontiguousarray(rows))
    wide = given.to(device, torch.float32)
    return F.normalize(wide, dim=1, out=None if wide is given else wide)  # a copy may be written to, the table may not
