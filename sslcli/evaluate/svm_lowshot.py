"""Linear support vector machines on a few images per class: how mAP on VOC07 grows with what may be learned from.

Goyal et al. 2019, https://arxiv.org/abs/1905.01235, section 5.2: for every k, k images that show a class and, for each
other class, k that do not; several drawings of them, their mean reported.
"""

import random
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from pydantic import Field

from sslcli.config.base import EvaluatorConfig
from sslcli.config.types import Count, Positive
from sslcli.errors import DataError
from sslcli.features.table import I64, FeatureTable, Scores, TableEvaluator, Told
from sslcli.nn.margin import costs_of, counted, fitted, normalised, processes, turned
from sslcli.nn.ranking import F64, area, recall_and_precision
from sslcli.seeds import seed_of


class Config(EvaluatorConfig):
    """Linear support vector machines on k images per class, several drawings of them."""

    protocol: ClassVar[str] = "svm-lowshot-voc07"
    name: Literal["svm_lowshot"] = "svm_lowshot"
    k: tuple[Count, ...] = Field(default=(1, 2, 4, 8, 16, 32, 64, 96), min_length=1)
    """Images per class that show it; every value is reported."""
    samplings: Count = 5
    """How often images are drawn."""
    costs: tuple[Positive, ...] = Field(default=costs_of((1.0, 10.0, 100.0)), min_length=1)
    """Inverse strengths of the penalty; for every k the one with the best mean on the test images is reported."""
    tap: str = "layer4@9k"
    """Which features."""


class Summary(NamedTuple):
    """Over samplings, for every k and cost (K, C), in percent."""

    mean: F64
    low: F64
    high: F64
    std: F64
    """Standard deviation of the population."""
    best: I64
    """(K,) which cost has the highest mean."""


def build(cfg: Config) -> TableEvaluator:
    """The evaluator for these settings."""
    return TableEvaluator(
        score=lambda train, test, seed, told=None: score(train, test, cfg, seed, told),
        taps=(cfg.tap,),
        headline=f"map_k{max(cfg.k)}",
        draws=True,
        counts="machines",
        many_classes=True,
    )


def score(train: FeatureTable, test: FeatureTable, cfg: Config, seed: int, told: Told | None = None) -> Scores:
    """For every k, the mean over samplings of mAP on the test images, in percent, with its spread.

    The cost is chosen on the test images, as in the protocol's own code: the number is an upper bound of what a choice
    without them would reach, the same for all who follow the protocol.

    Raises:
        DataError: a table lacks labels or the wanted features, or a class is shown by too few training images or by no
            test image.
    """
    shown, truth = train.known_targets(), test.known_targets()
    classes = [str(name) for name in train.meta.classes or range(shown.shape[1])]
    _check(shown, truth, classes, cfg.k)
    rows, unseen = turned(normalised(train.tap(cfg.tap)), normalised(test.tap(cfg.tap)))
    drawn = list(samples(shown, cfg.k, cfg.samplings, seed))
    work = 10.0 * unseen.shape[1] * len(cfg.costs) * sum(int((targets >= 0).sum()) for targets in drawn)
    results = Parallel(n_jobs=processes(work), return_as="generator")(
        delayed(of_class)(
            rows[targets[:, c] >= 0],
            targets[targets[:, c] >= 0, c],
            unseen,
            truth[:, c],
            cfg.costs,
            seed_of(seed, "svm_lowshot", number, c) % 2**32,
        )
        for number, targets in enumerate(drawn)
        for c in range(len(classes))
    )
    found = list(counted(results, told, len(cfg.costs), 0, len(drawn) * len(classes) * len(cfg.costs)))
    by_class = np.array(found).reshape(cfg.samplings, len(cfg.k), len(classes), len(cfg.costs))
    summary = summarised(by_class.mean(axis=2).transpose(1, 0, 2))
    at = np.arange(len(cfg.k)), summary.best
    names = [f"map_k{k}" for k in cfg.k]
    return Scores(
        metrics=dict(zip(names, summary.mean[at].tolist(), strict=True)),
        spread=dict(zip(names, summary.std[at].tolist(), strict=True)),
        details={
            "train_images": len(train),
            "test_images": len(test),
            "classes": len(classes),
            "samplings": cfg.samplings,
            "low": dict(zip(names, summary.low[at].tolist(), strict=True)),
            "high": dict(zip(names, summary.high[at].tolist(), strict=True)),
            "cost": dict(zip(names, [cfg.costs[i] for i in summary.best], strict=True)),
            "cost_chosen_on": "test images",
        },
    )


def samples(targets: I64, ks: Sequence[int], samplings: int, seed: int) -> Iterator[I64]:
    """Targets (N, C) of every drawing, all k of a sampling before the next: 1, 0, and -1 for what is left out.

    Per class `k` of the images that show it and `(C - 1) k` of those that do not, drawn without replacement by
    Python's generator: with equal seeds the same as the protocol's own script, which sets none.

    Args:
        targets: (N, C) 1 shown, 0 not shown, -1 hard to tell.
        ks: numbers of images per class.
        samplings: how often all of them are drawn.
        seed: of the first drawing; the others follow on it.
    """
    draw = random.Random(seed)
    classes = targets.shape[1]
    shown = [np.flatnonzero(targets[:, c] == 1).tolist() for c in range(classes)]
    absent = [np.flatnonzero(targets[:, c] == 0).tolist() for c in range(classes)]
    for _ in range(samplings):
        for k in ks:
            chosen = np.full_like(targets, -1)
            for c in range(classes):
                chosen[draw.sample(shown[c], k), c] = 1
            for c in range(classes):
                chosen[draw.sample(absent[c], (classes - 1) * k), c] = 0
            yield chosen


def of_class(rows: F64, shown: I64, unseen: F64, truth: I64, costs: Sequence[float], seed: int) -> list[float]:
    """Average precision in [0, 1] of one class on test images, for every cost."""
    known = truth != -1
    found = []
    for cost in costs:
        machine, _ = fitted(rows, shown, cost, seed)
        found.append(area(*recall_and_precision(truth[known], machine.decision_function(unseen[known]))))
    return found


def summarised(ap: F64) -> Summary:
    """What is reported of mAP (K, S, C) in [0, 1], over S samplings."""
    percent = 100 * ap
    mean = percent.mean(axis=1)
    return Summary(mean, percent.min(axis=1), percent.max(axis=1), percent.std(axis=1), mean.argmax(axis=1))


def _check(shown: I64, truth: I64, classes: Sequence[str], ks: Sequence[int]) -> None:
    lacking = np.flatnonzero(~(truth == 1).any(axis=0))
    if len(lacking):
        raise DataError(
            f"no test image shows class `{classes[lacking[0]]}`: its precision would have no meaning",
            hint="give images of every class on both sides, or leave the class out on both",
        )
    there = np.minimum((shown == 1).sum(axis=0), (shown == 0).sum(axis=0) // max(1, len(classes) - 1))
    rarest = int(there.argmin())
    if there[rarest] < max(ks):
        allowed = [k for k in ks if k <= there[rarest]]
        raise DataError(
            f"k = {max(ks)} needs {max(ks)} training images that show each class and {len(classes) - 1} times as many "
            f"that do not; class `{classes[rarest]}` has enough for k = {there[rarest]}",
            hint=f"use `-o evaluator.k={allowed}`" if allowed else "give more images of that class",
        )
