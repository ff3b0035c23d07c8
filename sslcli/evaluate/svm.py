"""Linear support vector machines on frozen features of images that show several classes each: mAP on VOC07.

Goyal et al. 2019, https://arxiv.org/abs/1905.01235, section 5.1: one machine per class, its cost chosen by
cross-validation on the training images. Without network training, so that the number is the features' own.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
from joblib import Parallel, delayed
from pydantic import Field
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from sslcli.config.base import EvaluatorConfig
from sslcli.config.types import Positive
from sslcli.errors import DataError
from sslcli.features.table import I64, FeatureTable, Scores, TableEvaluator, Told
from sslcli.nn.margin import costs_of, counted, fitted, normalised, processes, turned
from sslcli.nn.ranking import F64, area, at_eleven_points, recall_and_precision
from sslcli.seeds import seed_of

AP = {"area": area, "eleven_points": at_eleven_points}
"""Average precision from recall and precision, by name."""


class Config(EvaluatorConfig):
    """One linear support vector machine per class, its cost chosen by cross-validation."""

    protocol: ClassVar[str] = "svm-voc07"
    name: Literal["svm"] = "svm"
    costs: tuple[Positive, ...] = Field(default=costs_of((1.0, 10.0, 100.0)), min_length=1)
    """Inverse strengths of the penalty to choose from, per class; of equally good ones the first is taken."""
    folds: int = Field(default=3, ge=2)
    """Parts of the training images, each left out once to choose the cost."""
    ap: Literal["area", "eleven_points"] = "area"
    """Average precision on the test images: area under the envelope, or its mean at eleven recalls."""
    taps: tuple[str, ...] = Field(default=("layer4@9k",), min_length=1)
    """Which features; each is judged by itself."""


def build(cfg: Config) -> TableEvaluator:
    """The evaluator for these settings."""
    return TableEvaluator(
        score=lambda train, test, seed, told=None: score(train, test, cfg, seed, told),
        taps=cfg.taps,
        headline=_metric(cfg, cfg.taps[-1]),
        draws=True,
        counts="machines",
        many_classes=True,
    )


def score(train: FeatureTable, test: FeatureTable, cfg: Config, seed: int, told: Told | None = None) -> Scores:
    """Mean over classes of average precision on the test images, in percent.

    Images that show a class but are hard to see are negatives in training and left out of the test of that class, as
    in the protocol's own code. Training images of one class each work too: one class against the rest. `told` hears
    after every class how many machines are fitted.

    Raises:
        DataError: a table lacks labels or the wanted features, a class is shown by no image of a table, or there are
            fewer images than folds.
    """
    if len(train) < cfg.folds:
        raise DataError(f"{len(train)} training images are too few for {cfg.folds} folds")
    shown, truth = train.known_targets(), test.known_targets()
    classes = [str(name) for name in train.meta.classes or range(shown.shape[1])]
    for part, targets in (("training", shown), ("test", truth)):
        lacking = np.flatnonzero(~(targets == 1).any(axis=0))
        if len(lacking):
            raise DataError(
                f"no {part} image shows class `{classes[lacking[0]]}`: its precision would have no meaning",
                hint="give images of every class on both sides, or leave the class out on both",
            )
    metrics: dict[str, float] = {}
    details: dict[str, dict[str, object]] = {}
    machines = len(cfg.costs) * cfg.folds + 1  # of a class
    for number, tap in enumerate(cfg.taps):
        rows, unseen = turned(normalised(train.tap(tap)), normalised(test.tap(tap)))
        work = rows.size * len(cfg.costs) * cfg.folds * len(classes) * 10.0
        results = Parallel(n_jobs=processes(work), return_as="generator")(
            delayed(of_class)(rows, shown[:, c], unseen, truth[:, c], cfg, seed_of(seed, "svm", tap, c) % 2**32)
            for c in range(len(classes))
        )
        done, of_all = (taps * len(classes) * machines for taps in (number, len(cfg.taps)))
        found = list(counted(results, told, machines, done, of_all))
        metrics[_metric(cfg, tap)] = 100 * float(np.mean([each[0] for each in found]))
        details[tap] = {
            "ap": {name: 100 * each[0] for name, each in zip(classes, found, strict=True)},
            "cost": {name: each[1] for name, each in zip(classes, found, strict=True)},
            "converged": all(each[2] for each in found),
        }
    return Scores(
        metrics=metrics,
        details={
            "train_images": len(train),
            "test_images": len(test),
            "classes": len(classes),
            "hard_to_tell": {"train": int((shown == -1).sum()), "test": int((truth == -1).sum())},
            "by_tap": details,
        },
    )


def of_class(rows: F64, shown: I64, unseen: F64, truth: I64, cfg: Config, seed: int) -> tuple[float, float, bool]:
    """Average precision in [0, 1] of one class on test images, the cost that was chosen, whether the solver ended."""
    tried = cross_validated(rows, shown, cfg.costs, cfg.folds, seed)
    cost = cfg.costs[int(np.argmax(tried))]
    machine, ended = fitted(rows, shown, cost, seed)
    known = truth != -1
    scores = machine.decision_function(unseen[known])
    return AP[cfg.ap](*recall_and_precision(truth[known], scores)), cost, ended


def cross_validated(rows: F64, shown: I64, costs: Sequence[float], folds: int, seed: int) -> F64:
    """Mean over folds of average precision without an envelope, for every cost (K,).

    Folds keep the share of positives and the order of the images. A class with fewer positives than folds has folds
    that teach or test nothing; they count as 0, the same for every cost.
    """
    positive = shown == 1
    labels = np.where(positive, 1, -1)
    found = np.zeros((len(costs), folds))
    for fold, (fit, left_out) in enumerate(_folds(labels, folds)):
        if not positive[left_out].any() or len(np.unique(labels[fit])) < 2:
            continue
        for number, cost in enumerate(costs):
            machine, _ = fitted(rows[fit], labels[fit], cost, seed)
            scores = machine.decision_function(rows[left_out])
            found[number, fold] = average_precision_score(labels[left_out], scores)
    mean: F64 = found.mean(axis=1)
    return mean


def _folds(labels: I64, folds: int) -> Iterator[tuple[I64, I64]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes rarer than folds, which are allowed
        yield from StratifiedKFold(folds).split(np.zeros(len(labels)), labels)


def _metric(cfg: Config, tap: str) -> str:
    return "map" if len(cfg.taps) == 1 else f"map_{tap}"
