"""Numbers of features with a known answer, and what the rules make of them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli.config.views import EvalView
from sslcli.engine import health
from sslcli.evaluate import knn as evaluator
from sslcli.features.table import FeatureTable, TableMeta


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_rankme_counts_equal_directions(rank: int):
    left, _ = torch.linalg.qr(noise(100, rank))
    right, _ = torch.linalg.qr(noise(16, rank, seed=1))
    assert health.rankme(5 * left @ right.T) == pytest.approx(rank, rel=1e-4)


def test_rankme_follows_its_formula():
    features = noise(40, 12) * torch.linspace(0.1, 2, 12)
    values = np.linalg.svd(features.numpy(), compute_uv=False)
    p = values / values.sum()
    assert health.rankme(features) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_rankme_of_nothing_and_of_no_numbers():
    assert health.rankme(torch.zeros(8, 4)) == 1
    assert math.isnan(health.rankme(torch.full((8, 4), torch.inf)))


def test_alignment_and_uniformity_follow_their_formulas():
    one, other = noise(9, 5), noise(9, 5, seed=1)
    x, y = (a.numpy() / np.linalg.norm(a.numpy(), axis=1, keepdims=True) for a in (one, other))
    assert health.alignment(one, other) == pytest.approx(((x - y) ** 2).sum(1).mean(), rel=1e-5)
    pairs = [np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert health.uniformity(one) == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)


def test_the_ends_of_the_scales():
    one = noise(64, 32)
    assert health.alignment(one, 3 * one) == pytest.approx(0, abs=1e-6)
    assert health.alignment(one, -one) == pytest.approx(4)
    assert health.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert health.uniformity(torch.eye(4)) == pytest.approx(-4)
    assert health.view_ratio(one, one) == pytest.approx(0, abs=1e-6)
    assert health.view_ratio(one, noise(64, 32, seed=1)) == pytest.approx(1, abs=0.05)
    assert health.view_ratio(torch.ones(5, 3), torch.ones(5, 3)) == 1


def test_the_vote_is_the_evaluators():
    labels = np.arange(60) % 3
    features = noise(60, 8) + 1.5 * torch.eye(8)[torch.from_numpy(labels)]
    meta = TableMeta(
        version="", what="untrained", weights=None, source="", images=60, skipped=0, classes=("a", "b", "c"),
        view=EvalView(),
    )  # fmt: skip
    table = FeatureTable({"pooled": features.numpy()}, np.arange(60), labels, meta)
    cfg = evaluator.Config(k=(20,), temperature=0.07, leave_one_out=True)
    wanted = evaluator.score(table, table, cfg, seed=0).metrics["top1_k20"]
    assert 40 < wanted < 100
    assert health.knn(features, torch.from_numpy(labels), k=20, temperature=0.07) == pytest.approx(wanted)


def test_fewer_images_than_neighbours():
    assert health.knn(torch.eye(2), torch.tensor([0, 1]), k=20, temperature=0.07) == 0


GOOD = {"spread": 0.6, "rank_share": 0.5, "view_ratio": 0.6, "method_spread": 0.8}


@pytest.mark.parametrize(
    ("change", "fraction", "word", "advice"),
    [
        ({}, 1.0, "healthy", ""),
        ({"spread": 0.05}, 0.0, "warning", "same features"),
        ({"spread": 0.005}, 0.0, "collapsed", "same features"),
        ({"rank_share": 0.13}, 0.5, "warning", "dimensions"),
        ({"rank_share": 0.01}, 0.5, "collapsed", "dimensions"),
        ({"rank_share": 0.01}, 0.05, "healthy", ""),
        ({"rank_share": math.nan}, 0.5, "collapsed", "dimensions"),
        ({"method_spread": 0.2}, 0.0, "warning", "what the loss compares"),
        ({"method_spread": 0.05}, 0.0, "collapsed", "what the loss compares"),
        ({"method_cluster_use": 0.05}, 0.0, "collapsed", "few clusters"),
        ({"method_cluster_certainty": 0.001}, 0.5, "collapsed", "no image prefers"),
        ({"view_ratio": 0.99}, 0.5, "warning", "two views"),
        ({"view_ratio": 0.99}, 0.1, "healthy", ""),
        ({"view_ratio": 0.99, "method_spread": 0.05}, 0.5, "collapsed", "what the loss compares"),
        ({"method_agreement": -1.0}, 0.5, "healthy", ""),
    ],
)
def test_the_gravest_rule_decides(change: dict[str, float], fraction: float, word: str, advice: str):
    found = health.judge(GOOD | change, comparing=True, fraction=fraction)
    assert found.word == word
    assert advice in found.advice
    assert bool(found.advice) == (word != "healthy")


def test_methods_that_compare_no_views_are_judged_by_fewer_rules():
    assert health.judge({"spread": 0.6, "rank_share": 0.1}, comparing=False, fraction=1).word == "healthy"
    assert health.judge({"spread": 0.6, "rank_share": 0.1}, comparing=True, fraction=1).word == "warning"
    assert health.judge({"spread": 0.6, "rank_share": 0.005}, comparing=False, fraction=1).word == "collapsed"


def test_no_vitals_no_complaint():
    assert health.judge({}, comparing=True, fraction=1.0) == health.Verdict("healthy")
