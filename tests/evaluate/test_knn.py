"""Weighted nearest neighbours: equal to the references, bounded in memory, for any number of classes and images."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from sslcli import __version__
from sslcli.config.views import EvalView
from sslcli.errors import DataError
from sslcli.evaluate import knn
from sslcli.features.table import FeatureTable, TableMeta

CPU = torch.device("cpu")
RECORDED = ("knn_k200_T0.1", "knn_k20_T0.07", "knn_k3", "knn_small_test", "knn_unnormalised")


def table(features: np.ndarray, labels: np.ndarray | None, classes: int = 0) -> FeatureTable:
    meta = TableMeta(
        version=__version__,
        what="weights",
        source="0" * 16,
        images=len(features),
        classes=tuple(map(str, range(classes))),
        view=EvalView(),
    )
    rows = features.astype(np.float32)
    return FeatureTable({"pooled": rows}, np.arange(len(rows)), labels, meta)


def brute_force(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, queries)]
    similarity = unit[1] @ unit[0].T
    order = np.argsort(-similarity, axis=1)[:, :k]
    return np.take_along_axis(similarity, order, 1), order


@pytest.mark.golden
@pytest.mark.parametrize("case", RECORDED)
def test_equals_mmselfsup_and_solo_learn(golden: Path, case: str):
    with np.load(golden / "knn" / f"{case}.npz") as recorded:
        constants = json.loads(str(recorded["meta"]))["constants"]
        k, temperature, classes = constants["k"], constants["T"], constants["num_classes"]
        train = table(recorded["in_train_features"], recorded["in_train_labels"], classes)
        test = table(recorded["in_test_features"], recorded["in_test_labels"], classes)
        found = knn.score(train, test, knn.Config(k=(k,), temperature=temperature), seed=0).metrics
        near = knn.neighbours(train.tap("pooled"), test.tap("pooled"), k, device=CPU)
        votes = knn.votes(near.similarity, torch.from_numpy(train.known_labels())[near.row], classes, temperature)
        predicted = votes.sort(dim=1, descending=True, stable=True).indices[:, :5].numpy()
        references = [name for name in ("mmselfsup", "sololearn") if f"out_{name}" in recorded]
        assert references
        for name in references:
            assert [found[f"top1_k{k}"], found[f"top5_k{k}"]] == pytest.approx(recorded[f"out_{name}"], abs=1e-9)
            assert np.array_equal(predicted, recorded[f"out_{name}_top5pred"])


@pytest.mark.parametrize(("bank", "queries"), [(7, 3), (64, 1000), (10_000, 10_000)])
def test_blocks_of_any_size_find_the_same_neighbours(monkeypatch: pytest.MonkeyPatch, bank: int, queries: int):
    monkeypatch.setattr(knn, "BANK", bank)
    monkeypatch.setattr(knn, "QUERIES", queries)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 8)).astype(np.float32) for n in (200, 50))
    found = knn.neighbours(a, b, 20, device=CPU)
    similarity, row = brute_force(a, b, 20)
    assert np.array_equal(found.row.numpy(), row)
    np.testing.assert_allclose(found.similarity.numpy(), similarity, atol=1e-6)


def test_the_matrix_of_similarities_is_never_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn, "BANK", 256)
    monkeypatch.setattr(knn, "QUERIES", 64)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    rng = np.random.default_rng(0)
    bank, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (20_000, 1_000))
    tracemalloc.start()
    with Watch():
        knn.neighbours(bank, queries, 10, device=CPU)
    copied = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest == 64 * 256  # one block of similarities; the result has 1,000 x 10
    assert copied < bank.nbytes / 4  # NumPy does not copy the bank either


def test_more_neighbours_than_images_means_all_of_them():
    rng = np.random.default_rng(1)
    train = table(rng.normal(size=(12, 4)), np.arange(12) % 3, 3)
    found = knn.score(train, train, knn.Config(k=(5, 200)), seed=0)
    assert found.details["k_used"] == {"200": 12}
    exact = knn.score(train, train, knn.Config(k=(12,)), seed=0)
    assert found.metrics["top1_k200"] == exact.metrics["top1_k12"]


def test_labels_may_be_few_large_or_absent_on_one_side():
    features = np.eye(4)
    train = table(features, np.array([70_000, 3, 3, 9]))
    test = table(features, np.array([70_000, 3, 3, 50]))
    found = knn.score(train, test, knn.Config(k=(1,)), seed=0)
    assert found.metrics["top1_k1"] == 75.0
    assert found.details["classes"] == 70_001
    with pytest.raises(DataError, match="no labels"):
        knn.score(table(features, None), test, knn.Config(), seed=0)
    with pytest.raises(DataError, match="`pooled`"):
        knn.score(train, test, knn.Config(tap="layer3"), seed=0)


def test_low_temperatures_stay_finite():
    similarity = torch.tensor([[1.0, 0.99, -1.0]])
    votes = knn.votes(similarity, torch.tensor([[1, 0, 0]]), 2, temperature=1e-3)
    assert torch.isfinite(votes).all()
    assert votes.argmax() == 1


def test_leave_one_out_judges_each_image_by_the_others():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(40, 6)).astype(np.float32)
    labels = rng.integers(0, 3, 40)
    train = table(rows, labels, 3)
    found = knn.score(train, train, knn.Config(k=(1,), leave_one_out=True), seed=0).metrics["top1_k1"]
    _, order = brute_force(rows, rows, 2)
    assert found == pytest.approx(100 * (labels[order[:, 1]] == labels).mean())
    assert knn.score(train, train, knn.Config(k=(1,)), seed=0).metrics["top1_k1"] == 100.0
    assert knn.build(knn.Config(leave_one_out=True)).same_images
    assert knn.score(train, train, knn.Config(k=(40,), leave_one_out=True), seed=0).details["k_used"] == {"40": 39}


def test_the_headline_is_one_of_the_metrics():
    train = table(np.eye(3), np.arange(3))
    for cfg in (knn.Config(), knn.Config(k=(1, 2))):
        judge = knn.build(cfg)
        assert judge.headline in judge.score(train, train, 0).metrics
