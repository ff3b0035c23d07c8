"""Support vector machines: equal to the protocol's own code, deterministic, and clear about what is missing."""

from pathlib import Path

import numpy as np
import pytest

from sslcli import __version__
from sslcli.config.load import load as load_preset
from sslcli.config.views import EvalView
from sslcli.errors import DataError
from sslcli.evaluate import svm, svm_lowshot
from sslcli.features.table import FeatureTable, TableMeta
from sslcli.nn.margin import costs_of, fitted, normalised, turned


def table(rows: np.ndarray, targets: np.ndarray, tap: str = "pooled") -> FeatureTable:
    classes = tuple("abcdefghij"[: targets.shape[1]])
    meta = TableMeta(
        version=__version__, what="weights", source="0" * 16, images=len(rows), classes=classes, view=EvalView()
    )
    return FeatureTable(
        {tap: rows.astype(np.float32)}, np.arange(len(rows)), None, meta, targets=targets.astype(np.int64)
    )


def scene(images: int, classes: int, seed: int, noise: float = 0.5) -> FeatureTable:
    """Images that show about a third of the classes, each class along a direction of its own."""
    rng = np.random.default_rng(seed)
    shown = (rng.random((images, classes)) < 0.3).astype(np.int64)
    rows = shown @ np.eye(classes, 16) + noise * rng.normal(size=(images, 16))
    return table(rows, shown)


@pytest.mark.golden
def test_equals_the_protocols_own_code(golden: Path):
    with np.load(golden / "voc_map" / "svm_full_small.npz") as recorded:
        costs = tuple(float(cost) for cost in str(recorded["param_costs"]).split(","))
        train = table(recorded["in_train_features"], recorded["in_train_targets"])
        test = table(recorded["in_test_features"], recorded["in_test_targets"])
        rows = normalised(train.tap("pooled"))
        np.testing.assert_allclose(rows[0], recorded["info_normalised_train_features_row0"], atol=1e-7)
        tried = [svm.cross_validated(rows, train.known_targets()[:, c], costs, 3, 0) for c in range(4)]
        np.testing.assert_allclose(tried, recorded["out_crossval_ap"], atol=1e-3)
        found = svm.score(train, test, svm.Config(costs=costs, taps=("pooled",)), seed=0)
        assert list(found.details["by_tap"]["pooled"]["cost"].values()) == recorded["out_chosen_cost"].tolist()
        ap = np.array(list(found.details["by_tap"]["pooled"]["ap"].values())) / 100
        np.testing.assert_allclose(ap, recorded["out_test_ap"][:, 0], atol=1e-3)
        assert found.metrics["map"] == pytest.approx(100 * float(recorded["out_map"]), abs=0.1)


@pytest.mark.golden
def test_the_costs_are_those_of_the_code(golden: Path):
    with np.load(golden / "voc_map" / "cost_list.npz") as recorded:
        assert list(costs_of((0.01, 0.1))) == recorded["out_costs"].tolist()
    for name in ("svm-voc07-v1", "svm-lowshot-voc07-v1"):
        evaluator = load_preset("eval", name).preset.evaluator
        assert evaluator.costs == costs_of((1.0, 10.0, 100.0))  # type: ignore[attr-defined]
        assert len(costs_of((1.0, 10.0, 100.0))) == 19


@pytest.mark.golden
def test_low_shot_draws_and_sums_up_like_the_scripts(golden: Path):
    with np.load(golden / "voc_map" / "lowshot_samples.npz") as recorded:
        drawn = svm_lowshot.samples(recorded["in_targets"].astype(np.int64), (1, 2, 4), 2, int(recorded["param_seed"]))
        for sample in (1, 2):
            for k in (1, 2, 4):
                np.testing.assert_array_equal(next(drawn), recorded[f"out_sample{sample}_k{k}"])
    with np.load(golden / "voc_map" / "lowshot_aggregate.npz") as recorded:
        found = svm_lowshot.summarised(recorded["in_test_ap"])
        scale = 100 if recorded["out_mean"].max() > 1 else 1  # the recording's unit
        for ours, theirs in ((found.mean, "mean"), (found.high, "max"), (found.low, "min"), (found.std, "std")):
            np.testing.assert_allclose(ours, recorded[f"out_{theirs}"] * 100 / scale, atol=1e-9)
        np.testing.assert_allclose(found.mean[np.arange(4), found.best], recorded["out_reported_mean"], atol=1e-9)


def test_hard_to_tell_images_are_negatives_in_training_and_left_out_of_the_test():
    train, test = scene(90, 3, 0), scene(60, 3, 1)
    cfg = svm.Config(costs=(1.0,), taps=("pooled",))
    plain = svm.score(train, test, cfg, 0)
    hard = train.known_targets().copy()
    hard[hard[:, 0] == 0, 0] = -1
    same = svm.score(table(train.tap("pooled"), hard), test, cfg, 0)
    assert same.metrics == plain.metrics
    assert same.details["hard_to_tell"]["train"] == int((hard == -1).sum())
    unsure = test.known_targets().copy()
    unsure[:20] = -1
    kept = table(test.tap("pooled")[20:], unsure[20:])
    assert svm.score(train, table(test.tap("pooled"), unsure), cfg, 0).metrics == svm.score(train, kept, cfg, 0).metrics


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch):
    train, test = scene(60, 3, 0), scene(40, 3, 1)
    cfg = svm.Config(costs=(0.01, 1.0), taps=("pooled",))
    alone = svm.score(train, test, cfg, 0)
    monkeypatch.setattr(svm, "processes", lambda work: 2)
    assert svm.score(train, test, cfg, 0) == alone


def test_fewer_images_than_numbers_of_each_make_the_same_machines_of_fewer_numbers():
    rng = np.random.default_rng(0)
    rows, unseen = normalised(rng.normal(size=(30, 200))), normalised(rng.normal(size=(20, 200)))
    short, short_unseen = turned(rows, unseen)
    assert short.shape == (30, 30)
    assert short_unseen.shape == (20, 30)
    shown = np.arange(30) % 3 == 0
    for cost in (100.0, 0.01):
        whole, less = (fitted(some, shown, cost, 0)[0] for some in (rows, short))
        assert less.n_iter_ == whole.n_iter_
        scores = whole.decision_function(unseen)
        np.testing.assert_allclose(less.decision_function(short_unseen), scores, rtol=0, atol=1e-9)
    same = turned(short, short_unseen)
    assert same[0] is short


@pytest.mark.parametrize("judge", [svm, svm_lowshot])
def test_machines_are_fitted_in_few_numbers(judge, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    train, test = (
        table(np.hstack([part.tap("pooled"), rng.normal(size=(len(part), 200))]), part.known_targets())
        for part in (scene(40, 3, 0), scene(30, 3, 1))
    )
    widths: list[int] = []

    def watched(rows, *rest):
        widths.append(rows.shape[1])
        return fitted(rows, *rest)

    monkeypatch.setattr(judge, "fitted", watched)
    few = {"taps": ("pooled",)} if judge is svm else {"tap": "pooled", "k": (2,), "samplings": 1}
    judge.score(train, test, judge.Config(costs=(1.0,), **few), 0)
    assert set(widths) == {40}


@pytest.mark.parametrize(
    ("judge", "settings", "wanted"),
    [
        (svm, {"taps": ("pooled", "pooled"), "folds": 2}, [(n, 30) for n in (5, 10, 15, 20, 25, 30)]),
        (svm_lowshot, {"tap": "pooled", "k": (1, 2), "samplings": 1}, [(n, 12) for n in (2, 4, 6, 8, 10, 12)]),
    ],
)
def test_it_is_told_how_many_machines_are_fitted(judge, settings, wanted):
    told: list[tuple[int, int]] = []
    cfg = judge.Config(costs=(0.1, 1.0), **settings)
    found = judge.score(scene(60, 3, 0), scene(40, 3, 1), cfg, 0, lambda done, of_all: told.append((done, of_all)))
    assert told == wanted
    assert found == judge.score(scene(60, 3, 0), scene(40, 3, 1), cfg, 0)


def test_several_taps_and_one_label_an_image():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    rows = np.eye(3, 8)[labels] + 0.1 * rng.normal(size=(60, 8))
    known = table(rows, np.zeros((60, 3)))
    both = FeatureTable({"a": known.tap("pooled"), "b": 0 * known.tap("pooled")}, known.index, labels, known.meta)
    found = svm.score(both, both, svm.Config(costs=(1.0,), taps=("a", "b")), 0)
    assert found.metrics["map_a"] == pytest.approx(100)
    assert found.metrics["map_b"] < 60


def test_classes_nobody_shows_are_refused():
    train, test = scene(60, 3, 0), scene(40, 3, 1)
    for part, pair in {
        "training": (table(train.tap("pooled"), np.minimum(train.known_targets(), [1, 0, 1])), test),
        "test": (train, table(test.tap("pooled"), np.minimum(test.known_targets(), [1, 0, 1]))),
    }.items():
        with pytest.raises(DataError, match=f"no {part} image shows class `b`"):
            svm.score(*pair, svm.Config(costs=(1.0,), taps=("pooled",)), 0)


def test_a_class_rarer_than_folds_is_judged_all_the_same():
    train, test = scene(60, 3, 0), scene(40, 3, 1)
    rare = train.known_targets().copy()
    rare[1:, 1] = 0
    rare[0, 1] = 1
    found = svm.score(table(train.tap("pooled"), rare), test, svm.Config(costs=(0.5, 1.0), taps=("pooled",)), 0)
    assert found.details["by_tap"]["pooled"]["cost"]["b"] == 0.5


def test_low_shot_grows_with_k_and_says_its_spread():
    train, test = scene(400, 4, 0, noise=1.0), scene(200, 4, 1, noise=1.0)
    cfg = svm_lowshot.Config(k=(1, 16), samplings=3, costs=(0.1, 1.0), tap="pooled")
    found = svm_lowshot.score(train, test, cfg, 0)
    assert found.metrics["map_k16"] > found.metrics["map_k1"] + 5
    assert found.details["low"]["map_k1"] < found.metrics["map_k1"] < found.details["high"]["map_k1"]
    assert found.spread["map_k1"] > 0
    assert svm_lowshot.score(train, test, cfg, 0) == found
    assert svm_lowshot.score(train, test, cfg, 1).metrics != found.metrics


def test_too_few_images_for_k_are_refused_with_the_fix():
    train, test = scene(60, 3, 0), scene(40, 3, 1)
    with pytest.raises(DataError, match="k = 96 needs 96 training images") as caught:
        svm_lowshot.score(train, test, svm_lowshot.Config(tap="pooled"), 0)
    assert caught.value.hint == "use `-o evaluator.k=[1, 2, 4, 8]`"
