"""Average precision in all its meanings, against the code of those who defined them."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from sslcli.nn.ranking import area, at_eleven_points, at_hits, by_trapezia, recall_and_precision


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ap_basic", "ap_ignore_labels", "ap_single_positive", "ap_all_positive", "ap_ties"])
def test_area_equals_the_svm_protocols_own(golden: Path, case: str):
    with np.load(golden / "voc_map" / f"{case}.npz") as recorded:
        targets, scores = recorded["in_targets"], recorded["in_scores"]
        found = []
        for c in range(targets.shape[1]):
            known = targets[:, c] != -1
            curve = recall_and_precision(targets[known, c], scores[known, c])
            found.append(area(*curve))
            if c == 0:
                np.testing.assert_allclose(curve[0], recorded["out_recall_cls0"], atol=1e-12)
                np.testing.assert_allclose(curve[1], recorded["out_precision_cls0"], atol=1e-12)
        np.testing.assert_allclose(found, recorded["out_ap"], atol=1e-12)
        assert np.mean(found) == pytest.approx(float(recorded["out_map"]), abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["all_wrong", "exact_tenths", "low_recall", "nonmono", "perfect", "rand30"])
def test_curves_equal_detectron2(golden: Path, case: str):
    with np.load(golden / "average_precision" / f"voc_ap_{case}.npz") as recorded:
        curve = recorded["recall"], recorded["precision"]
        assert at_eleven_points(*curve) == pytest.approx(float(recorded["ap_11point_detectron2"]), abs=1e-12)
        assert area(*curve) == pytest.approx(float(recorded["ap_allpoint_detectron2"]), abs=1e-12)
        assert area(*curve) == pytest.approx(float(recorded["ap_allpoint_svm_helper"]), abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["n100_c20", "n40_c4", "ties"])
def test_classification_equals_every_reference(golden: Path, case: str):
    with np.load(golden / "average_precision" / f"classification_map_{case}.npz") as recorded:
        scores, labels = recorded["scores"], recorded["labels"]
        curves = [recall_and_precision(labels[:, c], scores[:, c]) for c in range(labels.shape[1])]
        np.testing.assert_allclose([area(*curve) for curve in curves], recorded["ap_svm"], atol=1e-12)
        if case != "ties":  # the others leave equal scores in another order
            np.testing.assert_allclose([area(*curve) for curve in curves], recorded["ap_d2_all"], atol=1e-12)
            np.testing.assert_allclose([at_eleven_points(*curve) for curve in curves], recorded["ap_d2_11"], atol=1e-12)
            places = [np.flatnonzero(labels[np.argsort(-scores[:, c]), c]) for c in range(labels.shape[1])]
            np.testing.assert_allclose([at_hits(each) for each in places], recorded["ap_sk"], atol=1e-12)


def test_retrieval_by_hand():
    """Hits at places 1, 3 and 6 of six."""
    places = np.array([0, 2, 5])
    assert at_hits(places) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert at_hits(places) == pytest.approx(average_precision_score([1, 0, 1, 0, 0, 1], -np.arange(6.0)))
    assert by_trapezia(places) == pytest.approx(((1 + 1) + (1 / 2 + 2 / 3) + (2 / 5 + 3 / 6)) / 6)


def test_nothing_to_find_is_no_precision():
    curve = recall_and_precision(np.zeros(4, dtype=np.int64), np.arange(4.0))
    assert [area(*curve), at_eleven_points(*curve)] == [0, 0]
