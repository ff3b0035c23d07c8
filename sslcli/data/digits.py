"""scikit-learn's 1,797 handwritten digits: plain, and as coloured pictures whose class is all that two views share.

The digits are the test half of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, UCI), bundled with
scikit-learn: 8 x 8 pixels of 0 to 16. Why the coloured pictures exist: raw pixels already tell plain digits apart (98 %
by nearest neighbours), so nothing a network learns from them would show.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from sslcli import seeds
from sslcli.data.arrays import Arrays
from sslcli.data.source import I64, U8

I32 = npt.NDArray[np.int32]

FULL = 16  # the darkest value of the original pixels
TRAIN = 1297  # digits that training may see; the last 500 are for testing
CLASSES = tuple("0123456789")

STEPS = 32  # weights of the enlargement are whole 32nds, so that a picture is the same to the bit on every machine
SMALLEST, LARGEST = 18 / 32, 28 / 32  # side of the digit, as a share of the picture's
CONTRAST = 160  # least distance of ink and ground in RGB; black to white is 442
INKS = 8  # how many inks are tried for that contrast


def digits(split: Literal["train", "test", "all"]) -> Arrays:
    """Plain digits, grey, enlarged four times to 32 x 32."""
    ink, labels = _handwriting(split)
    grey = ((ink * 255 + FULL // 2) // FULL).astype(np.uint8)  # (N, 8, 8)
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    return Arrays(np.repeat(large[..., None], 3, axis=3), labels, CLASSES)


def coloured_digits(split: Literal["train", "test"], count: int, size: int, seed: int) -> Arrays:
    """`count` pictures of `size` x `size`: a digit in random colour, place and size on a plain random colour."""
    ink, labels = _handwriting(split)
    key = seeds.seed_of(seed, "coloured_digits", split)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for first in range(0, count, 1024):
        numbers = np.arange(first, min(first + 1024, count))
        images[numbers] = _draw(ink[numbers % len(ink)], numbers, size, key)
    return Arrays(images, labels[np.arange(count) % len(ink)], CLASSES)


def _handwriting(split: Literal["train", "test", "all"]) -> tuple[I32, I64]:
    """Ink (N, 8, 8) in 0..16 and classes (N,)."""
    from sklearn.datasets import load_digits  # imports slowly, and few jobs need it

    bunch = load_digits()
    part = {"train": slice(TRAIN), "test": slice(TRAIN, None), "all": slice(None)}[split]
    return bunch.images[part].astype(np.int32), bunch.target[part].astype(np.int64)


def _draw(ink: I32, numbers: I64, size: int, key: int) -> U8:
    """Pictures (n, size, size, 3) of digits (n, 8, 8); everything drawn is a function of the key and the number."""
    low, high = max(1, round(size * SMALLEST)), max(1, round(size * LARGEST))
    side = low + (seeds.uniform(seeds.seed_of(key, "side"), numbers) * (high - low + 1)).astype(np.int64)
    top = (seeds.uniform(seeds.seed_of(key, "top"), numbers) * (size - side + 1)).astype(np.int64)
    left = (seeds.uniform(seeds.seed_of(key, "left"), numbers) * (size - side + 1)).astype(np.int64)

    cover = np.zeros((len(numbers), size, size), dtype=np.int32)
    for s in np.unique(side):
        of = np.flatnonzero(side == s)
        grow = _enlargement(int(s))
        across = np.arange(s)
        rows = top[of, None, None] + across[:, None]
        columns = left[of, None, None] + across
        cover[of[:, None, None], rows, columns] = grow @ ink[of] @ grow.T

    ground, colour = _colours(numbers, key)
    whole = FULL * STEPS**2
    cover = cover[..., None]  # (n, size, size, 1), 0 to `whole`
    mixed = ground[:, None, None] * (whole - cover) + colour[:, None, None] * cover
    return ((mixed + whole // 2) // whole).astype(np.uint8)


def _enlargement(side: int) -> I32:
    """Bilinear weights (side, 8) in whole 32nds; pixel centres, edges repeated."""
    at = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    below = np.minimum(at.astype(np.int64), 6)
    share = np.rint((at - below) * STEPS).astype(np.int32)
    weights = np.zeros((side, 8), dtype=np.int32)
    weights[np.arange(side), below] = STEPS - share
    weights[np.arange(side), below + 1] = share
    return weights


def _colours(numbers: I64, key: int) -> tuple[I32, I32]:
    """Ground and ink (n, 3) in 0..255: of several inks the first that stands out, or else the one that does most."""
    channel = np.arange(3)
    ground = (seeds.bits(seeds.seed_of(key, "ground"), numbers[:, None], channel) >> np.uint64(56)).astype(np.int32)
    tries = np.arange(INKS)[:, None]
    inks = (seeds.bits(seeds.seed_of(key, "ink"), numbers[:, None, None], tries, channel) >> np.uint64(56)).astype(
        np.int32
    )  # (n, INKS, 3)
    distance = ((inks - ground[:, None]) ** 2).sum(-1)
    chosen = np.minimum(distance, CONTRAST**2).argmax(-1)  # argmax takes the first of equals
    return ground, inks[np.arange(len(numbers)), chosen]
