"""The bundled digits, plain and coloured."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sslcli.config.data import ColouredDigits, Digits
from sslcli.data.digits import CONTRAST, coloured_digits, digits
from sslcli.data.open import open_source


def test_plain_digits_are_the_originals_enlarged() -> None:
    whole = load_digits()
    train, test, both = (digits(split).resident() for split in ("train", "test", "all"))
    assert [len(part) for part in (train, test, both)] == [1297, 500, 1797]
    assert np.array_equal(np.concatenate([train, test]), both)
    assert both.shape[1:] == (32, 32, 3)
    assert np.abs(both[:, 1::4, 2::4, 0] / 255 * 16 - whole.images).max() < 0.04
    assert np.array_equal(both[:, ::4, ::4], both[:, 3::4, 3::4]), "every pixel is a block of 4 x 4"
    assert both.max() == 255
    source = open_source(Digits(split="test"))
    assert source.labels is not None
    assert source.labels.tolist() == whole.target[1297:].tolist()
    assert source.classes == tuple("0123456789")


def test_coloured_digits_are_a_function_of_the_seed() -> None:
    cfg = ColouredDigits(count=40)
    assert open_source(cfg).fingerprint() == open_source(cfg).fingerprint()
    assert open_source(cfg).fingerprint() != open_source(ColouredDigits(count=40, seed=1)).fingerprint()
    few, many = coloured_digits("train", 40, 32, 0).resident(), coloured_digits("train", 1100, 32, 0).resident()
    assert np.array_equal(few, many[:40]), "a picture does not depend on how many are drawn"
    assert len(np.unique(many.reshape(1100, -1), axis=0)) == 1100


def test_coloured_digits_are_the_same_to_the_bit_everywhere() -> None:
    assert coloured_digits("train", 300, 32, 0).fingerprint() == "0ac96e9ae9adb996"


def test_coloured_digits_have_one_ground_and_one_ink_that_differ() -> None:
    images = coloured_digits("train", 500, 32, 3).resident().reshape(500, -1, 3)
    for image in images:
        colours, counts = np.unique(image, axis=0, return_counts=True)
        ground = colours[counts.argmax()].astype(int)
        assert counts.max() > 300, "most of a picture is ground"
        away = image - ground  # (P, 3): every pixel lies on the line from ground to ink
        ink = away[np.square(away).sum(-1).argmax()]
        assert np.abs(np.cross(away, ink)).max() <= 2 * np.abs(ink).max()
    strongest = np.sqrt(np.square(images.astype(int) - images[:, :1]).sum(-1).max(-1))
    assert np.quantile(strongest, 0.05) > CONTRAST * 0.8


def test_coloured_digits_are_spread_over_place_size_and_class() -> None:
    source = coloured_digits("train", 1000, 32, 0)
    images = source.resident().astype(int)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    ground = np.median(border, axis=1).astype(int)
    inked = np.abs(images - ground[:, None, None]).sum(-1) > 30
    rows = inked.any(2)
    height = rows.sum(1)
    top = rows.argmax(1)
    assert height.std() > 2
    assert top.std() > 2
    assert source.labels is not None
    assert np.bincount(source.labels).min() > 80


def test_test_pictures_show_other_handwriting() -> None:
    train, test = digits("train"), digits("test")
    a = coloured_digits("train", 1297, 32, 0)
    b = coloured_digits("test", 500, 32, 0)
    assert np.array_equal(a.labels, train.labels)
    assert np.array_equal(b.labels, test.labels)
    assert not np.array_equal(a.resident()[:500], b.resident())


@pytest.mark.parametrize("size", [1, 8, 32, 65])
def test_any_size(size: int) -> None:
    assert coloured_digits("test", 3, size, 0).resident().shape == (3, size, size, 3)


def test_raw_pixels_do_not_tell_coloured_digits_apart() -> None:
    """Weighted cosine kNN on pixels (k = 20, T = 0.07): 27 % with 6,000 and 1,500 pictures; plain digits give 96 %."""
    train, test = coloured_digits("train", 2000, 32, 0), coloured_digits("test", 500, 32, 0)
    rows, queries = (s.resident().reshape(len(s), -1).astype(np.float32) for s in (train, test))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    similarity = queries @ rows.T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = np.stack([(weight * (train.labels[nearest] == c)).sum(1) for c in range(10)], axis=1)
    assert 0.12 < (votes.argmax(1) == test.labels).mean() < 0.35
