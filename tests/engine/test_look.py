"""One pass over all images: the same rows in the same order, with any number of ranks and workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sslcli import dist
from sslcli.config.views import EvalView
from sslcli.data.arrays import Arrays
from sslcli.data.folder import open_folder
from sslcli.data.source import Source
from sslcli.engine import look
from sslcli.errors import DataError
from sslcli.views import build_eval

VIEW = EvalView(resize=8, size=8)
CPU = torch.device("cpu")


def images(count: int) -> Arrays:
    return Arrays(np.random.default_rng(0).integers(0, 256, (count, 9, 12, 3), dtype=np.uint8))


def apply(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": batch.mean((2, 3)), "flat": batch.flatten(1)}


def passed(source: Source, **changes: Any) -> look.Pass:
    settings = {"batch_size": 3, "workers": 0, "device": CPU, **changes}
    return look.features_of(apply, source, build_eval(VIEW), **settings)


def one_by_one(source: Source, numbers: list[int]) -> np.ndarray:
    view = build_eval(VIEW)
    crops = np.stack([view.crop(source.read(i)) for i in numbers])
    return view.finish(torch.from_numpy(crops)).flatten(1).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven small images of different sizes, of which numbers 3 and 7 cannot be read."""
    rng = np.random.default_rng(1)
    for i in range(11):
        path = tmp_path / f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, (8 + i, 20 - i, 3), dtype=np.uint8)).save(path)
        if i in (3, 7):
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path


def test_rows_come_in_index_order():
    source = images(10)
    told: list[tuple[int, int]] = []
    found = passed(source, progress=lambda done, total: told.append((done, total)))
    np.testing.assert_allclose(found.rows["flat"], one_by_one(source, list(range(10))), atol=2 / 255 / 0.224)
    assert found.kept.tolist() == list(range(10))
    assert found.rows["mean"].shape == (10, 3)
    assert found.rows["mean"].dtype == np.float32
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_named(folder: Path, workers: int):
    source = open_folder(folder, None, "skip")
    found = passed(source, workers=workers)
    readable = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert found.kept.tolist() == readable
    np.testing.assert_array_equal(found.rows["flat"], one_by_one(source, readable))
    assert list(found.skipped) == [3, 7]
    assert found.skipped[3].startswith("03.png: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_or_stop_the_job_if_the_source_says_so(folder: Path, workers: int):
    with pytest.raises(DataError, match=r"03\.png"):
        passed(open_folder(folder, None, "stop"), workers=workers)


def test_nothing_readable_is_an_error(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match="not one of the 1 images"):
        passed(open_folder(tmp_path, None, "skip"))


def test_a_network_in_training_mode_is_refused():
    network = nn.BatchNorm2d(3)
    with pytest.raises(AssertionError, match="training mode"):
        passed(images(4), network=network)
    passed(images(4), network=network.eval())


def pass_on_a_rank(folder: str, count: int, everywhere: bool) -> tuple[Any, ...]:
    source = open_folder(Path(folder), None, "skip") if folder else images(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "BLOCK_BYTES", 4 * 192 * dist.world() * 2)  # two rows at a time
        found = passed(source, everywhere=everywhere)
    return found.rows["flat"], found.kept, found.skipped


@pytest.mark.dist
@pytest.mark.parametrize("count", [10, 5, 1])
def test_two_ranks_bring_back_what_one_does(two_ranks: Any, count: int):
    alone = passed(images(count))
    for rows, kept, _ in two_ranks(pass_on_a_rank, "", count, True):
        np.testing.assert_array_equal(rows, alone.rows["flat"])
        np.testing.assert_array_equal(kept, alone.kept)


@pytest.mark.dist
def test_two_ranks_agree_on_what_is_unreadable(two_ranks: Any, folder: Path):
    alone = passed(open_folder(folder, None, "skip"))
    (rows, kept, skipped), other = two_ranks(pass_on_a_rank, str(folder), 0, False)
    np.testing.assert_array_equal(rows, alone.rows["flat"])
    np.testing.assert_array_equal(kept, alone.kept)
    assert skipped == alone.skipped == other[2]
    assert len(other[0]) == len(other[1]) == 0  # only the main rank wanted the rows
