"""Does the network still tell images apart? Numbers that say so, and the verdict they lead to.

docs/explanation/health.md gives the reason of every limit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli.nn.neighbours import votes
from sslcli.nn.spread import spread

Vitals = dict[str, float]

ROUNDING = 1e-9
"""A squared distance of unit rows below this is none: it comes from the arithmetic."""


def rankme(features: Tensor) -> float:
    """How many dimensions features (N, D) really use: from 1 to min(N, D); NaN if they are not finite.

    exp(-sum_k p_k log p_k) with p_k = s_k / |s|_1 + 1e-7 over the singular values s (Garrido et al. 2023, equation 1).
    """
    if not torch.isfinite(features).all():
        return math.nan
    values = torch.linalg.svdvals(features.double().cpu())
    if values[0] == 0:
        return 1.0
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean of |x - y|^2 over pairs of unit rows (N, D): 0 when two views agree (Wang & Isola 2020, alpha = 2)."""
    return float((F.normalize(one.double(), dim=1) - F.normalize(other.double(), dim=1)).square().sum(dim=1).mean())


def uniformity(features: Tensor) -> float:
    """Log of the mean of exp(-2 |x - y|^2) over pairs of different unit rows (N, D) (Wang & Isola 2020, t = 2).

    0 when all are the same; near -4 when they cover a sphere of many dimensions evenly.
    """
    return float(_distances(features).mul(-2).exp().mean().log())


def view_ratio(one: Tensor, other: Tensor) -> float:
    """Mean squared distance of two views of an image over that of two images, unit rows (N, D).

    0 when views agree and images differ; 1 when views of an image are as far apart as views of different images.
    1 also where all are the same.
    """
    different = (_distances(one).mean() + _distances(other).mean()) / 2
    return alignment(one, other) / float(different) if different > ROUNDING else 1.0


def _distances(features: Tensor) -> Tensor:
    """Squared distances (N (N - 1) / 2,) of all pairs of different rows, scaled to unit length."""
    unit = F.normalize(features.double(), dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (2 - 2 * (unit @ unit.T)[first, second]).clamp_min(0)


def knn(features: Tensor, labels: Tensor, *, k: int, temperature: float) -> float:
    """Percent of rows (N, D) whose class is elected by their `k` most similar other rows, weighted by similarity."""
    unit, labels = F.normalize(features.cpu(), dim=1), labels.cpu()
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest, row = similarity.topk(min(k, len(unit) - 1), dim=1)
    elected = votes(nearest, labels[row], int(labels.max()) + 1, temperature).argmax(dim=1)
    return 100 * float((elected == labels).float().mean())


def measure(features: Tensor) -> Vitals:
    """What one view of each image tells, from features (N, D) of N different images."""
    rank = rankme(features)
    return {"rankme": rank, "rank_share": rank / min(features.shape), "spread": float(spread(features))}


def measure_pair(one: Tensor, other: Tensor) -> Vitals:
    """What two views of each image tell, from features (N, D) of both."""
    return {
        "alignment": alignment(one, other),
        "uniformity": (uniformity(one) + uniformity(other)) / 2,
        "view_ratio": view_ratio(one, other),
    }


class Verdict(NamedTuple):
    """What the vitals mean."""

    word: Literal["healthy", "warning", "collapsed"]
    advice: str = ""
    """One sentence; empty when healthy."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One vital sign with its limits."""

    vital: str
    """Name of the value; the rule says nothing where it was not measured."""
    collapsed: float | None
    """On the bad side of this, the network has collapsed."""
    warning: float
    """On the bad side of this, something is wrong."""
    advice: str
    """What is seen, and what to do about it."""
    high_is_bad: bool = False
    after: float = 0.0
    """Share of the run before which the rule says nothing."""

    def judge(self, value: float) -> Verdict:
        """What this value means by itself."""
        sign = -1.0 if self.high_is_bad else 1.0
        if self.collapsed is not None and not sign * value >= sign * self.collapsed:
            return Verdict("collapsed", self.advice)
        return Verdict("healthy") if sign * value >= sign * self.warning else Verdict("warning", self.advice)


START_AGAIN = "go back to an earlier checkpoint with a lower `optim.lr` or a longer `schedule.warmup`"
SAME = Rule("spread", 0.01, 0.1, f"the backbone gives nearly the same features for every image; {START_AGAIN}")
COMPARING = (
    SAME,
    Rule("rank_share", 0.02, 0.2, f"the features use few of their dimensions; {START_AGAIN}", after=0.1),
    Rule(
        "method_spread",
        0.1,
        0.3,
        "what the loss compares is nearly the same for every image, so that there is nothing left to learn; "
        "check what keeps this method from collapsing (predictor, stop-gradient, slow twin, centring), "
        "or go back to an earlier checkpoint with a lower `optim.lr`",
    ),
    Rule(
        "method_cluster_use",
        0.1,
        0.5,
        "nearly all images go to a few clusters; use fewer clusters, larger batches or a queue, or a lower `optim.lr`",
    ),
    Rule(
        "method_cluster_certainty",
        0.01,
        0.05,
        "no image prefers any cluster; lower the temperature of the assignments, or `optim.lr`",
        after=0.1,
    ),
    Rule(
        "view_ratio",
        None,
        0.95,
        "two views of an image are hardly more alike than two images, so nothing is learned yet; "
        "try weaker `views`, another `optim.lr`, or a longer run",
        high_is_bad=True,
        after=0.2,
    ),
)
"""For methods whose loss compares views of an image."""
PREDICTING = (
    SAME,
    Rule("rank_share", 0.01, 0.05, f"the features use very few of their dimensions; {START_AGAIN}", after=0.1),
)
"""For methods that predict something about one picture, such as its rotation or hidden pixels: nothing spreads it."""


def judge(vitals: Mapping[str, float], *, comparing: bool, fraction: float) -> Verdict:
    """The gravest verdict of all rules, and the first advice that goes with it.

    Args:
        vitals: by name; those of the method itself start with `method_`.
        comparing: whether the loss compares views of an image.
        fraction: share of the run that is done, in [0, 1].
    """
    found = [
        rule.judge(vitals[rule.vital])
        for rule in (COMPARING if comparing else PREDICTING)
        if rule.vital in vitals and fraction >= rule.after
    ]
    gravest = ("collapsed", "warning", "healthy")
    return min(found, key=lambda verdict: gravest.index(verdict.word), default=Verdict("healthy"))
