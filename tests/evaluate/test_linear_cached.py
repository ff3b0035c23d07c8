"""Logistic regression on stored features: right on what it must find, untouched by test images, repeatable."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sslcli import __version__
from sslcli.config.views import EvalView
from sslcli.errors import DataError
from sslcli.evaluate import linear_cached
from sslcli.features.table import FeatureTable, TableMeta


def table(features: np.ndarray, labels: np.ndarray) -> FeatureTable:
    meta = TableMeta(version=__version__, what="weights", source="0" * 16, images=len(features), view=EvalView())
    return FeatureTable({"pooled": features.astype(np.float32)}, np.arange(len(features)), labels, meta)


@pytest.fixture(scope="module")
def digits() -> tuple[FeatureTable, FeatureTable]:
    x, y = load_digits(return_X_y=True)
    return table(x[:1297], y[:1297]), table(x[1297:], y[1297:])


def test_reads_handwriting_and_repeats_itself(digits: tuple[FeatureTable, FeatureTable]):
    found = linear_cached.score(*digits, linear_cached.Config(), seed=0)
    assert found.metrics["top1"] > 90
    assert found.metrics["top5"] > 98
    assert found.details["converged"]
    assert linear_cached.score(*digits, linear_cached.Config(), seed=0) == found


def test_the_penalty_is_chosen_without_looking_at_test_images(digits: tuple[FeatureTable, FeatureTable]):
    train, test = digits
    wrong = replace(test, labels=(test.known_labels() + 1) % 10)
    chosen = [linear_cached.score(train, t, linear_cached.Config(), seed=3).details["c"] for t in (test, wrong)]
    assert chosen[0] == chosen[1]
    tried = linear_cached.score(train, test, linear_cached.Config(), seed=3).details["held_out_top1"]
    assert tried[f"{chosen[0]:g}"] == max(tried.values())


def test_scale_and_constant_columns_do_not_matter(digits: tuple[FeatureTable, FeatureTable]):
    cfg = linear_cached.Config(c=(0.01,))
    plain = linear_cached.score(*digits, cfg, seed=0).metrics["top1"]
    scale = np.geomspace(1e-2, 1e2, 64, dtype=np.float32)
    scaled = [
        replace(t, features={"pooled": np.hstack([t.tap("pooled") * scale, np.full((len(t), 1), 7, np.float32)])})
        for t in digits
    ]
    assert linear_cached.score(*scaled, cfg, seed=0).metrics["top1"] == pytest.approx(plain, abs=0.5)


def test_two_classes_and_a_class_that_training_lacks():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    rows = rng.normal(size=(60, 3)) + 6 * labels[:, None]
    found = linear_cached.score(table(rows, labels), table(rows, labels), linear_cached.Config(), seed=0)
    assert found.metrics == {"top1": 100.0, "top5": 100.0}
    unseen = np.where(labels == 1, 7, 0)
    assert (
        linear_cached.score(table(rows, labels), table(rows, unseen), linear_cached.Config(), 0).metrics["top1"] == 50
    )


def test_an_unfinished_fit_says_so(digits: tuple[FeatureTable, FeatureTable]):
    found = linear_cached.score(*digits, linear_cached.Config(c=(10.0,), iterations=2), seed=0)
    assert not found.details["converged"]


def test_one_class_is_refused():
    one = table(np.random.default_rng(0).normal(size=(10, 3)), np.zeros(10, dtype=np.int64))
    with pytest.raises(DataError, match="too few"):
        linear_cached.score(one, one, linear_cached.Config(), seed=0)
