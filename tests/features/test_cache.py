"""Features are computed once, and again as soon as anything they depend on has changed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sslcli import dist
from sslcli.config.data import Folder
from sslcli.config.load import load as load_preset
from sslcli.config.views import EvalView
from sslcli.data import open_source
from sslcli.evaluate import _job
from sslcli.features import cache as caching
from sslcli.features.cache import Cache, remembered
from sslcli.features.compute import of_network
from sslcli.features.table import FeatureTable
from sslcli.features.weights import network

NET = {"name": "resnet", "depth": 10, "width": 8, "stem": "small"}
VIEW = EvalView(resize=32, size=32)


class Counted:
    """Tables of a fresh network, and how many images it has seen for them."""

    def __init__(self, folder: Path, cache: Path | None) -> None:
        self.folder = folder
        self.cache = None if cache is None else Cache(cache)
        self.seen = 0

    def table(self, *taps: str, view: EvalView = VIEW, seed: int = 0, on_error: str = "skip") -> FeatureTable | None:
        source = open_source(Folder(path=self.folder, on_error=on_error))  # type: ignore[arg-type]
        backbone = network(NET, seed=seed).eval()
        whole = backbone.taps

        def counting(images: Any, names: Any) -> Any:
            self.seen += len(images)
            return whole(images, names)

        backbone.taps = counting  # type: ignore[method-assign]
        return remembered(
            self.cache, source, view, taps, {"seed": seed},
            lambda lacking, room: of_network(
                backbone, source, view, lacking, what="untrained", digest=None, batch_size=4, workers=0, room=room
            ),
        )  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.bmp")  # of one size, whatever it shows
    return tmp_path / "images"


def test_a_second_table_needs_no_pass(images: Path, tmp_path: Path):
    counted = Counted(images, tmp_path / "cache")
    first = counted.table("pooled")
    second = counted.table("pooled")
    assert first is not None
    assert second is not None
    assert counted.seen == 6
    assert second.digest() == first.digest()
    assert isinstance(second.tap("pooled"), np.memmap)
    third = counted.table("pooled", "layer2+flip")
    assert third is not None
    assert counted.seen == 6 + 2 * 6  # the image and its mirror image, for the tap that was lacking alone
    assert list(third.features) == ["layer2+flip", "pooled"]
    assert np.array_equal(third.tap("pooled"), first.tap("pooled"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert counted.cache is not None
    assert [note.partition(" are ")[2][:7] or "there" for note in counted.cache.notes] == [
        "kept in",
        "there",
        "kept in",
    ]


def test_any_change_needs_another_pass(images: Path, tmp_path: Path):
    counted = Counted(images, tmp_path / "cache")
    counted.table("pooled")
    changes: list[dict[str, Any]] = [{"view": EvalView(resize=40, size=32)}, {"seed": 1}, {"on_error": "stop"}]
    for number, change in enumerate(changes, 2):
        counted.table("pooled", **change)
        assert counted.seen == 6 * number
    path = images / "cat" / "0.bmp"
    pixels = np.asarray(Image.open(path)).copy()
    Image.fromarray(255 - pixels).save(path)  # same name, same size
    os.utime(path, ns=(1, 1))
    changed = counted.table("pooled")
    assert counted.seen == 6 * 5
    assert changed is not None
    plain = Counted(images, None).table("pooled")
    assert plain is not None
    assert np.array_equal(changed.tap("pooled"), plain.tap("pooled"))


def test_damaged_entries_are_made_again(images: Path, tmp_path: Path):
    counted = Counted(images, tmp_path / "cache")
    first = counted.table("pooled")
    assert first is not None
    whole = first.digest()
    (entry,) = (tmp_path / "cache").iterdir()
    for number, name in enumerate(("pooled.tap.npy", "index.npy", "meta.json"), 2):
        (entry / name).write_bytes((entry / name).read_bytes()[:40])
        again = counted.table("pooled")
        assert counted.seen == 6 * number
        assert again is not None
        assert again.digest() == whole


def test_unreadable_images_stay_out(images: Path, tmp_path: Path):
    (images / "cat" / "1.bmp").write_bytes(b"BM")
    counted = Counted(images, tmp_path / "cache")
    for _ in range(2):
        found = counted.table("pooled")
        assert found is not None
        assert found.index.tolist() == [0, 2, 3, 4, 5]
        assert found.meta.skipped == 1
        plain = Counted(images, None).table("pooled")
        assert plain is not None
        assert np.array_equal(found.tap("pooled"), plain.tap("pooled"))
    assert counted.seen == 5


def test_a_full_disk_is_said_and_does_no_harm(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caching, "SPARE", 2**62)
    counted = Counted(images, tmp_path / "cache")
    found = counted.table("pooled")
    assert found is not None
    assert counted.cache is not None
    assert "are not kept" in counted.cache.notes[0]
    assert "GB are free" in counted.cache.notes[0]
    counted.table("pooled")
    assert counted.seen == 12


def test_two_protocols_on_one_run_share_one_pass(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    passes = []
    real = _job.of_network

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(_job, "of_network", counting)
    monkeypatch.setattr(_job, "FOLDER", str(tmp_path / "cache"))
    from sslcli.features.weights import load

    def judged(name: str, **settings: Any) -> _job.Outcome:
        preset = load_preset("eval", name).preset
        found = _job.evaluate(
            load(tiny_run), _job.Protocol(name, preset, preset), floors=False, passes=lambda title: None, **settings
        )
        assert found is not None
        return found

    judged("knn-v1")
    assert len(passes) == 2  # training images, test images
    second = judged("linear-cached-v1")
    assert len(passes) == 2
    assert all("were there already" in note for note in second.notes)
    assert judged("linear-cached-v1", cached=False).report == second.report
    assert len(passes) == 4


def cached_on_a_rank(folder: str, cache: str) -> tuple[int, str | None, int]:
    counted = Counted(Path(folder), Path(cache))
    found = [counted.table("pooled"), counted.table("pooled")]
    digests = {table.digest() for table in found if table is not None}
    return counted.seen, min(digests, default=None), dist.rank()


@pytest.mark.dist
def test_ranks_share_the_pass_and_the_answer(two_ranks: Any, images: Path, tmp_path: Path):
    (images / "cat" / "1.bmp").write_bytes(b"BM")
    alone = Counted(images, None).table("pooled")
    assert alone is not None
    main, other = two_ranks(cached_on_a_rank, str(images), str(tmp_path / "cache"))
    assert main[0] + other[0] == 5
    assert main[1] == alone.digest()
    assert other[1] is None
