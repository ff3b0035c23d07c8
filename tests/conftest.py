"""Fixtures of the whole suite."""

import importlib.util
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recordings from the reference implementations."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def filled() -> Callable[[str, Sequence[int]], npt.NDArray[np.float64]]:
    """`filled(key, shape)`: the weights that recordings of whole networks were made with, instead of storing them."""
    return _filled


@pytest.fixture(scope="session")
def hashed() -> Callable[[str, int], npt.NDArray[np.float64]]:
    """`hashed(key, count)`: the numbers that inputs of such recordings were made from."""
    return _hashed


def _hashed(key: str, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [-1, 1) that depend on a text and a position only: CRC-32, then a 32-bit mixing function."""
    x = np.uint32(zlib.crc32(key.encode())) + np.arange(count, dtype=np.uint32) * np.uint32(2654435769)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(2146121005)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(2221713035)
    return (x ^ (x >> np.uint32(16))) / 2.0**31 - 1


def _filled(key: str, shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """The tensor of this name in the reference's state dict."""
    u = _hashed(key, math.prod(shape)).reshape(shape)
    if key.endswith("num_batches_tracked"):
        return 0 * u
    if key.endswith("running_var"):
        return 1 + 0.5 * u
    if len(shape) <= 1:
        return 1 + 0.1 * u if key.endswith("weight") else 0.1 * u
    if shape[0] == 1 and len(shape) >= 3:
        return 0.5 * u
    return math.sqrt(3 / math.prod(shape[1:])) * u


@pytest.fixture(scope="session")
def small_data() -> Path:
    """The small real data sets kept beside the development tree."""
    found = ROOT.parent / "shared" / "data"
    if not found.is_dir():
        pytest.skip("the small real data sets are not beside this checkout (../shared/data)")
    return found


@pytest.fixture
def tiny_run(_tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished SimCLR run of four steps on 64 coloured digits, with checkpoints after each two.

    Every test has its own: what one leaves there (features that are kept, reports) must not be another's.
    """
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(_tiny_run, folder, symlinks=True)
    return folder


@pytest.fixture
def run(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`tiny_run` as a user has it: the folder `run` in the folder where commands are given."""
    monkeypatch.chdir(tmp_path)
    return tiny_run.rename("run")


@pytest.fixture(scope="session")
def _tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_run` is a copy of."""
    from sslcli.config.load import load
    from sslcli.engine.pretrain import pretrain

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    settings = (
        "data.source.count=64", "data.batch_size=32", "run.epochs=2", "run.views=fast", "run.tensorboard=false",
        "backbone.width=8",
    )  # fmt: skip
    pretrain(load("pretrain", "demo-digits", settings).preset, folder)
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Any]:
    """`two_ranks(function, *args)`: what a function of a test file returns on each rank of a group of two processes."""
    yield from _pool(2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Any]:
    """The same with four processes, which live as long as the tests of one file."""
    yield from _pool(4)


def _pool(world: int) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("pool", ROOT / "tests" / "dist" / "pool.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    pool = made.Pool(world)
    yield pool
    pool.stop()
