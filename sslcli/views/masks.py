"""Which patches are hidden? Masks as arrays over images, drawn by name and counter.

The generators are pure functions of the random numbers that they are given; `draw_masks` gives them numbers that depend
on the run's seed, the epoch and the image's index, never on which images share its batch or which process asks.
"""

import math
from random import Random

import numpy as np
import numpy.typing as npt

from sslcli.config.views import AnyMask, BlockMask, GridMask, RandomMask
from sslcli.seeds import seed_of, uniform
from sslcli.views.params import Bools, Ints

ATTEMPTS = 10
"""Tries at placing a block before it is given up."""


def draw_masks(cfg: AnyMask, seed: int, epoch: int, index: Ints, side: int, patch: int) -> Bools:
    """Masks (B, N) of images `index` (B,), True where a patch is hidden.

    Args:
        cfg: which kind of mask.
        seed: of the run's views.
        epoch: counted from 0.
        index: numbers of the images in their source.
        side: of an image, in pixels.
        patch: side of a patch, in pixels.
    """
    across = side // patch
    match cfg:
        case RandomMask(ratio=ratio):
            return random_masks(_noise(seed, epoch, index, across**2), ratio)
        case GridMask(ratio=ratio, cell=cell):
            order = np.argsort(_noise(seed, epoch, index, (side // cell) ** 2), axis=1, kind="stable")
            return grid_masks(order, ratio, scale=cell // patch)
        case BlockMask():
            drawn = [
                block_mask(
                    Random(seed_of(seed, "views", epoch, "mask", int(image))),
                    across,
                    across,
                    count=cfg.patches,
                    least=cfg.least,
                    most=cfg.most,
                    aspect=cfg.aspect,
                    exact=cfg.exact,
                )
                for image in index
            ]
            return np.stack(drawn).reshape(len(index), -1)


def ranks(noise: npt.NDArray[np.floating]) -> Ints:
    """The place of every patch when the patches (B, N) of an image are sorted by noise: MAE's `ids_restore`."""
    return np.argsort(np.argsort(noise, axis=1, kind="stable"), axis=1, kind="stable")


def random_masks(noise: npt.NDArray[np.floating], ratio: float) -> Bools:
    """Hide all but the patches with the least noise (B, N) (He et al. 2022, section 3).

    Visible stay int(N * (1 - ratio)) patches, the product rounded as floats are: 9 of 100 at a ratio of 0.9.
    """
    return ranks(noise) >= int(noise.shape[1] * (1 - ratio))


def grid_masks(order: Ints, ratio: float, scale: int) -> Bools:
    """Hide the first ceil(ratio * C) of C coarse square cells, each of scale x scale patches (Xie et al. 2022, 3.2).

    Args:
        order: (B, C), numbers of the cells in random order.
        ratio: share of the cells that are hidden.
        scale: side of a cell in patches.
    """
    count = order.shape[1]
    across = math.isqrt(count)
    cells = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(cells, order[:, : math.ceil(count * ratio)], True, axis=1)
    fine = cells.reshape(-1, across, across).repeat(scale, axis=1).repeat(scale, axis=2)
    return fine.reshape(len(order), -1)


def block_mask(
    draw: Random,
    height: int,
    width: int,
    *,
    count: float,
    least: float,
    most: float | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    exact: bool = False,
) -> Bools:
    """Hide rectangular blocks of patches until `count` are hidden (Bao et al. 2022, algorithm 1): (height, width).

    A block has an area between `least` and what is missing, a log-uniform ratio of height to width, is narrower and
    lower than the image, and hides at least one patch more and no more than are missing. When ten tries in a row fail,
    BEiT, iBOT and MaskFeat stop, with up to `count` patches hidden; CAE and MMSelfSup's BEiT (`exact`) go on.

    Args:
        draw: where random numbers come from, in the order of the authors' code.
        height: rows of patches.
        width: columns of patches.
        count: patches to hide; iBOT gives a number with a fraction.
        least: least area of a block: 16 in BEiT, 15 in MaskFeat, (min(height, width) // 3)^2 in iBOT.
        most: largest area of a block; `count` when absent.
        aspect: smallest and largest ratio.
        exact: go on until `count` patches are hidden.
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    ratios = (math.log(aspect[0]), math.log(aspect[1]))
    hidden = 0
    while hidden < count:
        missing = min(count - hidden, count if most is None else most)
        added = _add_block(draw, mask, least, missing, ratios)
        if added == 0 and not exact:
            break
        hidden += added
    return mask


def _add_block(draw: Random, mask: Bools, least: float, missing: float, ratios: tuple[float, float]) -> int:
    """Hide one more block in place; how many patches that added, 0 if no try fitted."""
    height, width = mask.shape
    for _ in range(ATTEMPTS):
        area = draw.uniform(least, missing)
        ratio = math.exp(draw.uniform(*ratios))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < width and h < height:
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            block = mask[top : top + h, left : left + w]
            added = h * w - int(block.sum())
            if 0 < added <= missing:
                block[:] = True
                return added
    return 0


def _noise(seed: int, epoch: int, index: Ints, count: int) -> npt.NDArray[np.float32]:
    return uniform(seed_of(seed, "views", epoch, "mask"), index[:, None], np.arange(count))
