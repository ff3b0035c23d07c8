"""Fixtures of the whole suite."""

from pathlib import Path

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
