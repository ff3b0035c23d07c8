"""Fixtures of the whole suite."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recordings from the reference implementations."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def small_data() -> Path:
    """The small real data sets kept beside the development tree."""
    found = ROOT.parent / "shared" / "data"
    if not found.is_dir():
        pytest.skip("the small real data sets are not beside this checkout (../shared/data)")
    return found


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
