"""Archives of arrays: shapes, labels, names, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslcli.config.data import Npz
from sslcli.data.open import open_source
from sslcli.data.source import Source
from sslcli.errors import DataError

IMAGES = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)


def opened(folder: Path, images_key: str = "images", labels_key: str | None = None, /, **arrays: Any) -> Source:
    np.savez(folder / "x.npz", **arrays)
    return open_source(Npz(path=folder / "x.npz", images=images_key, labels=labels_key))


def test_colour_and_grey(tmp_path: Path) -> None:
    source = opened(tmp_path, images=IMAGES)
    assert len(source) == 4
    assert np.array_equal(source.read(2), IMAGES[2])
    assert source.resident() is not None
    assert source.name(2) == "images[2]"
    assert source.labels is None
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
        image = opened(tmp_path, images=grey).read(3)
        assert image.shape == (5, 6, 3)
        assert (image == IMAGES[3, ..., :1]).all()


def test_labels_are_found_named_and_contiguous(tmp_path: Path) -> None:
    source = opened(tmp_path, images=IMAGES, labels=np.array([30, 7, 7, 12], dtype=np.uint16))
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 0, 1]
    assert source.labels.dtype == np.int64
    assert source.classes == ("7", "12", "30")
    named = opened(tmp_path, "x", "y", x=IMAGES, y=np.array([2, 0, 0, 2]), classes=np.array(["cat", "cow", "dog"]))
    assert named.classes == ("cat", "cow", "dog")
    assert named.labels is not None
    assert named.labels.tolist() == [2, 0, 0, 2]


def test_fingerprint_follows_pixels_and_labels(tmp_path: Path) -> None:
    plain = opened(tmp_path, images=IMAGES).fingerprint()
    assert plain == opened(tmp_path, images=IMAGES.copy()).fingerprint()
    assert plain != opened(tmp_path, images=IMAGES + np.uint8(1)).fingerprint()
    assert plain != opened(tmp_path, images=IMAGES, labels=np.arange(4)).fingerprint()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"no array `images`; it has `pictures`"),
        ({"images": IMAGES.astype(np.float32)}, "images are uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"shape \(4, 3, 5, 6\)"),
        ({"images": IMAGES[0, 0]}, "shape"),
        ({"images": IMAGES[:0]}, "shape"),
        ({"images": np.array([IMAGES, None], dtype=object)}, "Python objects"),
        ({"images": IMAGES, "labels": np.arange(3)}, "one for each of 4 images"),
        ({"images": IMAGES, "labels": np.zeros(4)}, "whole numbers"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_source(Npz(path=tmp_path / "x.npz"))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "cut.npz", images=IMAGES)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", IMAGES)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(bytes(damaged))
    for name in ("cut.npz", "text.npz", "empty.npz", "one.npy", "damaged.npz", "gone.npz"):
        with pytest.raises(DataError, match=name):
            open_source(Npz(path=tmp_path / name))


@pytest.mark.data
def test_tiny_cifar(small_data: Path) -> None:
    source = open_source(Npz(path=small_data / "cifar10_tiny.npz", images="x_train", labels="y_train"))
    assert len(source) == 500
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [50] * 10
    assert "airplane" in source.classes
