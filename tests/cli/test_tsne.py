"""Pictures of neighbourhoods: what lies together, a page that needs nothing, and what is refused."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from parts import ran
from PIL import Image

from sslcli.data.digits import coloured_digits
from sslcli.errors import DataError, UserError
from sslcli.features.embed import few, in_plane
from sslcli.runs import scatter


def test_alike_features_lie_together():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 60))
    rows = (centres[np.arange(60) % 3] + 0.1 * rng.normal(size=(60, 60))).astype(np.float32)
    points = in_plane(rows, "tsne", seed=0, perplexity=10)
    assert points.shape == (60, 2)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (distance.argmin(1) % 3 == np.arange(60) % 3).all()
    assert np.array_equal(points, in_plane(rows, "tsne", seed=0, perplexity=10))
    with pytest.raises(DataError, match="4 images are too few"):
        in_plane(rows[:4], "tsne", seed=0, perplexity=10)


def test_umap_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="umap-learn") as caught:
        in_plane(np.eye(8, dtype=np.float32), "umap", seed=0, perplexity=3)
    assert "sslcli[umap]" in str(caught.value.hint)


def test_few_images_are_drawn_by_the_seed():
    whole = coloured_digits("train", 40, 32, 0)
    part = few(whole, 10, seed=3)
    names = [part.name(i) for i in range(10)]
    assert len(set(names)) == 10
    assert names == [few(whole, 10, seed=3).name(i) for i in range(10)]
    assert names != [few(whole, 10, seed=4).name(i) for i in range(10)]
    assert few(whole, 10, seed=4).stamp() != part.stamp()
    held = part.resident()
    assert held is not None
    assert np.array_equal(held[4], part.read(4))
    assert part.labels is not None
    assert whole.labels is not None
    assert part.labels[4] == whole.labels[int(re.findall(r"\d+", names[4])[0])]
    assert few(whole, 40, seed=0) is whole


def test_a_page_is_whole_and_names_cannot_break_out_of_it(tmp_path: Path):
    points = np.array([[0, 0], [2, 4]], dtype=np.float32)
    pictures = [np.full((90, 60, 3), 7, dtype=np.uint8)] * 2
    odd = "</script><b>"
    scatter.page(points, np.array([0, 1]), ("cat", odd), ("a.png", odd), pictures, odd, tmp_path / "map.html")
    text = (tmp_path / "map.html").read_text()
    assert text.count("</script>") == 1
    assert not re.search(r"(https?:)?//[a-z]", text)
    data = json.loads(text.split("const data = ")[1].split(";\n")[0])
    assert data["names"][1] == odd
    assert data["points"] == [[0, 0], [1, 1]]
    assert len(set(scatter.colours(100))) == 100


def test_the_command_writes_both_kinds_and_computes_once(run: Path, tmp_path: Path):
    source = coloured_digits("train", 30, 32, 1)
    np.savez("photos.npz", images=source.resident(), labels=source.labels)

    def drawn(*words: str):
        return ran("tsne", run, "--data", "photos.npz", *words)

    assert drawn("--out", "map.html", "--images", "20").stdout == "map.html\n"
    entries = list((tmp_path / "run" / "features").iterdir())
    assert "next: ssl eval knn run" in drawn("--out", "map.png", "--images", "20").stderr
    assert list((tmp_path / "run" / "features").iterdir()) == entries
    assert len(entries) == 1
    with Image.open("map.png") as picture:
        assert picture.size[0] > 500
    assert (tmp_path / "map.html").read_text().count("/9j/") == 20  # how every JPEG begins
    for words, message in {
        ("--out", "map.pdf"): "neither in `.png` nor",
        ("--out", "map.png", "--method", "pca"): "there is `tsne` and `umap`",
        ("--out", "map.png", "--tap", "layer9"): "no tap `layer9`",
    }.items():
        with pytest.raises(UserError, match=message):
            drawn(*words)


def test_unlabelled_images_are_not_to_be_judged(run: Path):
    np.savez("unknown.npz", images=coloured_digits("train", 20, 32, 1).resident())
    done = ran("tsne", run, "--data", "unknown.npz", "--out", "map.png")
    assert done.stderr.endswith("next: ssl tsne run --data unknown.npz --out map.html\n")
    assert ran(*shlex.split(done.stderr.split("next: ssl ")[1])).stdout == "map.html\n"
