"""Feature tables on disk: NumPy reads them without pickle, nothing is lost, damage is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sslcli import __version__
from sslcli.config.views import EvalView
from sslcli.errors import DataError, SslError
from sslcli.features.table import FeatureTable, TableMeta


def table() -> FeatureTable:
    rng = np.random.default_rng(0)
    meta = TableMeta(
        version=__version__,
        what="weights",
        weights="ab" * 32,
        source="0" * 16,
        images=6,
        skipped=1,
        classes=("cat", "dog"),
        view=EvalView(resize=32, size=32),
    )
    return FeatureTable(
        features={"pooled": rng.random((5, 4), np.float32), "layer3": rng.random((5, 2), np.float32)},
        index=np.array([0, 1, 2, 4, 5]),
        labels=np.array([0, 1, 1, 0, 1]),
        meta=meta,
        names=("a.png", "b/ü.png", "bad\udcff.png", "d.png", "e.png"),
    )


def test_what_is_saved_is_loaded(tmp_path: Path):
    kept = table()
    kept.save(tmp_path / "new" / "t.npz")
    found = FeatureTable.load(tmp_path / "new" / "t.npz")
    assert found.meta == kept.meta
    assert found.names == kept.names
    assert found.features.keys() == kept.features.keys()
    for name, rows in kept.features.items():
        np.testing.assert_array_equal(found.tap(name), rows)
        assert found.tap(name).dtype == np.float32
    np.testing.assert_array_equal(found.index, kept.index)
    np.testing.assert_array_equal(found.known_labels(), kept.known_labels())
    assert found.digest() == kept.digest()


def test_without_labels_and_names(tmp_path: Path):
    replace(table(), labels=None, names=()).save(tmp_path / "t.npz")
    found = FeatureTable.load(tmp_path / "t.npz")
    assert found.labels is None
    assert found.names == ()
    with pytest.raises(DataError, match="no labels"):
        found.known_labels()


def test_numpy_reads_it_alone(tmp_path: Path):
    table().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"features_pooled", "features_layer3", "index", "labels", "names", "meta"}
        assert json.loads(str(archive["meta"]))["weights"] == "ab" * 32
        assert archive["names"][1].decode() == "b/ü.png"


def test_the_digest_changes_with_everything_but_names():
    kept = table()
    others = [
        replace(kept, features={**kept.features, "pooled": kept.tap("pooled") + 1}),
        replace(kept, index=kept.index + 1),
        replace(kept, labels=1 - kept.known_labels()),
        replace(kept, meta=kept.meta.model_copy(update={"weights": "cd" * 32})),
    ]
    assert len({kept.digest(), *(other.digest() for other in others)}) == 5
    assert replace(kept, names=()).digest() == kept.digest()


def test_labels_are_renumbered_by_name():
    kept = table()
    moved = kept.counted_in(("bird", "dog", "cat"))
    assert moved.known_labels().tolist() == [2, 1, 1, 2, 1]
    assert moved.meta.classes == ("bird", "dog", "cat")
    assert kept.counted_in(("cat", "dog")) is kept
    with pytest.raises(DataError, match="class `dog` of the test images is not among the 1 training classes"):
        kept.counted_in(("cat",))


def test_other_files_are_refused_by_name(tmp_path: Path):
    table().save(tmp_path / "t.npz")
    whole = (tmp_path / "t.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with np.load(tmp_path / "t.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "odd.npz", **{**arrays, "index": np.arange(3)})
    np.savez(tmp_path / "later.npz", **{**arrays, "meta": np.array('{"format": 2}')})
    for name, told in {
        "none.npz": "no file",
        "cut.npz": "not a whole",
        "text.npz": "not a whole",
        "images.npz": "not a table made by `ssl features`: it holds `images`",
        "odd.npz": "differ in length",
        "later.npz": "does not understand",
    }.items():
        with pytest.raises(DataError, match=told) as caught:
            FeatureTable.load(tmp_path / name)
        assert name in str(caught.value)


def test_a_failed_write_is_one_line_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SslError, match="cannot write"):
        table().save(tmp_path / "file" / "t.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
