"""Which patches are hidden? Masks as arrays over images, drawn by name and counter.

The generators are pure functions of the random numbers that they are given; `draw_masks` gives them numbers that depend
on the run's seed, the epoch and the image's index, never on which images share its batch or which process asks.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sslcli.config.views import AnyMask, BlockMask, GridMask, MultiBlockMask, RandomMask, block_size
from sslcli.seeds import seed_of, uniform
from sslcli.views.params import Bools, Ints

ATTEMPTS = 10
"""Tries at placing a block before it is given up."""
RELAXED_AFTER = 20
"""Tries at placing a context block before it may overlap one target more."""


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
        case MultiBlockMask():
            return draw_blocks(cfg, seed, epoch, index, across)[0]


class BlockSizes(NamedTuple):
    """What the masks of all images have in common in an epoch, in patches."""

    target: tuple[int, int]
    """Rows and columns of a target block."""
    context: tuple[int, int]
    """Rows and columns of a context block."""
    visible: int
    """How many patches are left of the context."""


def draw_blocks(cfg: MultiBlockMask, seed: int, epoch: int, index: Ints, across: int) -> tuple[Bools, Ints]:
    """Masks (B, N), True where a patch is no part of the context, and the patches (B, T, M) of the target blocks.

    Args:
        cfg: sizes and numbers of blocks.
        seed: of the run's views.
        epoch: counted from 0.
        index: (B,), numbers of the images in their source.
        across: patches along a side of the image.
    """
    sizes = block_sizes(cfg, seed, epoch, across)
    masks, targets = [], []
    for image in index:
        draw = Random(seed_of(seed, "views", epoch, "mask", int(image)))
        visible, blocks = _context_and_targets(cfg, draw, across, sizes)
        while len(visible) < sizes.visible:
            visible, blocks = _context_and_targets(cfg, draw, across, sizes)
        mask = np.ones(across**2, dtype=np.bool_)
        mask[visible[: sizes.visible]] = False
        masks.append(mask)
        targets.append(np.nonzero(blocks.reshape(cfg.targets, -1))[1].reshape(cfg.targets, -1))
    return np.stack(masks), np.stack(targets)


@lru_cache(maxsize=8)
def block_sizes(cfg: MultiBlockMask, seed: int, epoch: int, across: int) -> BlockSizes:
    """The sizes of an epoch: the context's length is the smallest of `cfg.among` contexts that belong to no image."""
    draw = Random(seed_of(seed, "views", epoch, "block sizes"))
    target = block_size(draw.random(), cfg.target_scale, cfg.target_aspect, across, across)
    context = block_size(draw.random(), cfg.context_scale, (1.0, 1.0), across, across)
    sizes = BlockSizes(target, context, 0)
    lengths = [len(_context_and_targets(cfg, draw, across, sizes)[0]) for _ in range(cfg.among)]
    return sizes._replace(visible=min(lengths))


def _context_and_targets(cfg: MultiBlockMask, draw: Random, across: int, sizes: BlockSizes) -> tuple[Ints, Bools]:
    """Numbers (K,) of the patches of one context, and the target blocks (T, across, across)."""
    contexts, targets = multiblock_masks(
        draw.randrange,
        across,
        across,
        target=sizes.target,
        context=sizes.context,
        targets=cfg.targets,
        more_than=cfg.more_than,
    )
    return np.flatnonzero(contexts[0]), targets


def multiblock_masks(
    below: Callable[[int], int],
    height: int,
    width: int,
    *,
    target: tuple[int, int],
    context: tuple[int, int],
    targets: int,
    contexts: int = 1,
    more_than: int,
    overlap: bool = False,
) -> tuple[Bools, Bools]:
    """Contexts (E, height, width) and target blocks (T, height, width) of one image (Assran et al. 2023, section 3).

    As in the authors' code, blocks touch neither the last row nor the last column by their own choice: a corner is
    drawn from one place less than there is. A context that has too few patches outside the targets is drawn again, and
    after every 20 failures the last of the targets that it must avoid is forgotten.

    Args:
        below: `below(n)` draws an integer from 0 to n - 1; asked for rows, then columns, targets first.
        height: rows of patches.
        width: columns of patches.
        target: rows and columns of a target block, less than the image's.
        context: rows and columns of a context block, less than the image's.
        targets: T.
        contexts: E.
        more_than: what has no more patches is no context.
        overlap: whether contexts keep the patches that they share with targets.

    Raises:
        ValueError: blocks of this size never have enough patches.
    """
    if min(math.prod(target), math.prod(context)) <= more_than:
        raise ValueError(f"blocks of {target} and {context} patches never have more than {more_than}")
    blocks = [_placed(below, height, width, target) for _ in range(targets)]
    free = [] if overlap else [~block for block in blocks]
    found = [_context(below, height, width, context, free, more_than) for _ in range(contexts)]
    return np.stack(found), np.stack(blocks)


def _placed(below: Callable[[int], int], height: int, width: int, size: tuple[int, int]) -> Bools:
    """A block somewhere in the image."""
    rows, columns = size
    top, left = below(height - rows), below(width - columns)
    block = np.zeros((height, width), dtype=np.bool_)
    block[top : top + rows, left : left + columns] = True
    return block


def _context(
    below: Callable[[int], int], height: int, width: int, size: tuple[int, int], free: list[Bools], more_than: int
) -> Bools:
    """A block without what is not free, with more than so many patches."""
    failures = 0
    while True:
        block = _placed(below, height, width, size)
        for region in free[: max(len(free) - failures // RELAXED_AFTER, 0)]:
            block &= region
        if block.sum() > more_than:
            return block
        failures += 1


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
