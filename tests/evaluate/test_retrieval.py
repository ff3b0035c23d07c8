"""Search by example: mAP and CMC by hand, what is passed over, and lists with cameras."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslcli import __version__
from sslcli.config.data import FileList
from sslcli.config.views import EvalView
from sslcli.data import guess_source, open_source, other_split
from sslcli.errors import DataError
from sslcli.evaluate import retrieval
from sslcli.features.table import FeatureTable, TableMeta


def table(angles: list[float], labels: list[int], cameras: list[int] | None = None) -> FeatureTable:
    """Images as directions in the plane, in degrees; a query at 0 ranks a gallery by them."""
    turns = np.deg2rad(np.array(angles))
    meta = TableMeta(
        version=__version__, what="weights", source="0" * 16, images=len(turns), classes=("a", "b", "c"),
        view=EvalView(),
    )  # fmt: skip
    rows = 3 * np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)
    seen_by = None if cameras is None else np.array(cameras)
    return FeatureTable({"pooled": rows}, np.arange(len(rows)), np.array(labels), meta, cameras=seen_by)


def test_by_hand():
    """Right answers at places 2 and 5, and for the second query at 1."""
    gallery = table([10, 20, 30, 40, 50, 90], [1, 0, 1, 2, 0, 1])
    found = retrieval.score(gallery, table([0, 100], [0, 1]), retrieval.Config(ranks=(1, 2, 5)), 0)
    second = (1 / 1 + 2 / 4 + 3 / 6) / 3  # of label 1 at places 1, 4 and 6
    assert found.metrics["map"] == pytest.approx(100 * ((1 / 2 + 2 / 5) / 2 + second) / 2)
    assert [found.metrics[f"rank{n}"] for n in (1, 2, 5)] == [50.0, 100.0, 100.0]
    other = retrieval.score(gallery, table([0], [0]), retrieval.Config(ap="trapezia"), 0)
    assert other.metrics["map"] == pytest.approx(100 * ((0 + 1 / 2) / 2 + (1 / 4 + 2 / 5) / 2) / 2)


def test_the_querys_own_camera_and_junk_are_passed_over():
    gallery = table([10, 20, 30, 40], [0, 1, 0, 2], [7, 7, 8, 8])
    query = table([0], [0], [7])
    assert retrieval.score(gallery, query, retrieval.Config(), 0).metrics["map"] == pytest.approx(50)
    everything = retrieval.Config(other_cameras=False)
    assert retrieval.score(gallery, query, everything, 0).metrics["map"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert retrieval.score(gallery, query, retrieval.Config(junk=("b",)), 0).metrics["map"] == 100


def test_queries_without_an_answer_are_left_out_and_counted():
    gallery = table([10, 20], [0, 1], [7, 7])
    found = retrieval.score(gallery, table([0, 0, 0], [0, 0, 2], [8, 7, 9]), retrieval.Config(), 0)
    assert found.details["queries_without_answer"] == 2
    assert found.metrics["rank1"] == 100
    with pytest.raises(DataError, match="no query has a right answer"):
        retrieval.score(gallery, table([0], [2], [8]), retrieval.Config(), 0)
    with pytest.raises(DataError, match="cameras are known of one side only"):
        retrieval.score(gallery, table([0], [0]), retrieval.Config(), 0)


@pytest.mark.parametrize("pairs", [1, 7, 2**24])
def test_blocks_of_any_size_find_the_same(monkeypatch: pytest.MonkeyPatch, pairs: int):
    rng = np.random.default_rng(0)
    angles, labels = rng.uniform(0, 360, 40).tolist(), rng.integers(0, 3, 40).tolist()
    cfg = retrieval.Config(leave_one_out=True)
    whole = table(angles, labels)
    expected = retrieval.score(whole, whole, cfg, 0)
    monkeypatch.setattr(retrieval, "PAIRS", pairs)
    monkeypatch.setattr(retrieval, "BLOCK", 9)
    assert retrieval.score(whole, whole, cfg, 0).metrics == expected.metrics
    assert expected.metrics["rank1"] < 100


def test_a_list_says_who_where_and_which_part(tmp_path: Path):
    for name in "abcd":
        Image.new("RGB", (4, 8)).save(tmp_path / f"{name}.png")
    path = tmp_path / "persons.csv"
    path.write_text("path,id,camera,part\na.png,ann,c1,query\nb.png,ann,c2,gallery\nc.png,bob,c1,gallery\n")
    gallery = guess_source(path)
    assert gallery == FileList(path=path, part="gallery")
    query = other_split(gallery)
    assert query == FileList(path=path, part="query")
    opened, asked = open_source(gallery), open_source(query)
    assert (len(opened), len(asked)) == (2, 1)
    assert opened.classes == ("ann", "bob")
    assert opened.cameras is not None
    assert asked.cameras is not None
    assert (opened.cameras == asked.cameras[0]).tolist() == [False, True]
    with pytest.raises(DataError, match="names no image of part `train`"):
        open_source(FileList(path=path, part="train"))
    (tmp_path / "plain.csv").write_text("path,label\nd.png,1\n")
    with pytest.raises(DataError, match="has no column `part`"):
        open_source(FileList(path=tmp_path / "plain.csv", part="query"))
