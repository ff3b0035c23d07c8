"""Multinomial logistic regression on stored features: what a linear classifier can read from a frozen network.

One view per image and a convex problem solved to the end (as in Radford et al. 2021, https://arxiv.org/abs/2103.00020,
appendix A.3), so there is no learning rate to choose; the protocols that train a linear layer on augmented images are
others, and their numbers are not these.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from sslcli.config.base import EvaluatorConfig
from sslcli.config.types import Count, Positive
from sslcli.errors import DataError
from sslcli.features.table import F32, I64, FeatureTable, Scores, TableEvaluator
from sslcli.seeds import permutation, seed_of


class Config(EvaluatorConfig):
    """Logistic regression with the penalty chosen on a held-out part of the training images."""

    name: Literal["linear_cached"] = "linear_cached"
    c: tuple[Positive, ...] = Field(default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), min_length=1)
    """Inverse strengths of the L2 penalty to choose from, tried from the smallest until the accuracy falls."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training images that the choice is made on."""
    iterations: Count = 1000
    """Most steps of L-BFGS."""
    tap: str = "pooled"
    """Which features."""


def build(cfg: Config) -> TableEvaluator:
    """The evaluator for these settings."""
    return TableEvaluator(
        score=lambda train, test, seed, told=None: score(train, test, cfg, seed), taps=(cfg.tap,), headline="top1",
        draws=len(cfg.c) > 1,
    )  # fmt: skip


def score(train: FeatureTable, test: FeatureTable, cfg: Config, seed: int) -> Scores:
    """Share of test images, in percent, whose class is the likeliest (top1) or among the five likeliest (top5).

    Features are standardised with the training images' mean and deviation. The penalty is chosen on a share of the
    training images drawn by the seed, then the classifier is fitted to all of them; test images have no part in it.

    Raises:
        DataError: a table lacks labels or the wanted features, or the training images are too few to choose on.
    """
    labels, truth = train.known_labels(), test.known_labels()
    mean, scale = _moments(train.tap(cfg.tap))
    x, y = (train.tap(cfg.tap) - mean) / scale, (test.tap(cfg.tap) - mean) / scale
    order = permutation(len(train), seed_of(seed, "linear_cached", "held out"))
    held = max(1, round(len(train) * cfg.held_out))
    chosen_on, fitted_on = order[:held], order[held:]
    if len(np.unique(labels[fitted_on])) < 2:
        raise DataError(
            f"{len(train)} training images are too few for a classifier: those left to fit have one class at most",
            hint="give more labelled images of at least two classes",
        )
    tried = _tried(x, labels, fitted_on, chosen_on, cfg) if len(cfg.c) > 1 else {cfg.c[0]: 0.0}
    best = max(tried, key=lambda c: (tried[c], -c))
    model = LogisticRegression(C=best, max_iter=cfg.iterations)
    converged = _fit(model, x, labels)
    top1, top5 = _hits(model, y, truth, (1, 5))
    return Scores(
        metrics={"top1": top1, "top5": top5},
        details={
            "train_images": len(train),
            "test_images": len(test),
            "classes": len(model.classes_),
            "c": best,
            "held_out_top1": {f"{c:g}": value for c, value in tried.items()},
            "converged": converged,
        },
    )


def _moments(rows: F32) -> tuple[F32, F32]:
    """Mean and deviation (D,) of the columns; a constant column is left as it is."""
    scale = rows.std(axis=0, dtype=np.float64)
    mean = rows.mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(scale > 1e-6, scale, 1.0).astype(np.float32)


def _tried(rows: F32, labels: I64, fitted_on: I64, chosen_on: I64, cfg: Config) -> dict[float, float]:
    """Held-out accuracy by C; every fit starts where the one with the next stronger penalty ended."""
    model = LogisticRegression(max_iter=cfg.iterations, warm_start=True)
    tried: dict[float, float] = {}
    for c in sorted(cfg.c):
        _fit(model.set_params(C=c), rows[fitted_on], labels[fitted_on])
        tried[c] = _hits(model, rows[chosen_on], labels[chosen_on], (1,))[0]
        if tried[c] < max(tried.values()):
            break
    return tried


def _fit(model: LogisticRegression, rows: F32, labels: I64) -> bool:
    """Fit in place; whether L-BFGS came to its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(rows, labels)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _hits(model: LogisticRegression, rows: F32, labels: I64, tops: Sequence[int]) -> list[float]:
    """For each of `tops`, the percentage of rows whose label is among that many likeliest classes."""
    scores = np.atleast_2d(model.decision_function(rows))
    if len(model.classes_) == 2:
        scores = np.stack([-scores.ravel(), scores.ravel()], axis=1)
    ranked = model.classes_[np.argsort(-scores, axis=1, kind="stable")]  # (Q, C)
    return [100 * float((ranked[:, :top] == labels[:, None]).any(axis=1).mean()) for top in tops]
