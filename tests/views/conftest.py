"""Pieces of two real photographs, for views to look at."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from sslcli.seeds import bits


@pytest.fixture(scope="session")
def photos() -> Callable[[int, int, int], np.ndarray]:
    """`photos(n, height, width)`: n pieces as (n, height, width, 3) uint8."""
    whole = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]

    def pieces(n: int, height: int, width: int) -> np.ndarray:
        tops = bits(1, np.arange(n)) % np.uint64(427 - height + 1)
        lefts = bits(2, np.arange(n)) % np.uint64(640 - width + 1)
        return np.stack(
            [whole[k % 2][t : t + height, s : s + width] for k, (t, s) in enumerate(zip(tops, lefts, strict=True))]
        )

    return pieces
