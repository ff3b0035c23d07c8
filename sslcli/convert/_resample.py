"""Positions made for images of another size, resampled to the places a network has."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TABLE = "relative_position_bias_table"
_CLASS_ENTRIES = 3
"""Entries of BEiT's tables that stand for pairs with the class token; they are kept."""


def fitted(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with positions in the shapes that a network wants, and what was done; others are left as they are."""
    out: dict[str, Tensor] = {}
    changed: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        target = wanted.get(name)
        out[name] = tensor
        if target is None or target.shape == tensor.shape or not tensor.is_floating_point():
            continue
        if name.endswith(TABLE) and tensor.ndim == target.ndim == 2 and tensor.shape[1] == target.shape[1]:
            sides = _sides(len(tensor), len(target), (0, _CLASS_ENTRIES))
            if sides is not None:
                out[name] = relative(tensor.float(), sides[1], extra=sides[2])
                changed["relative position biases"] = ((sides[0] + 1) // 2, (sides[1] + 1) // 2)
        elif name.endswith("pos_embed") and tensor.ndim == target.ndim == 3 and tensor.shape[2] == target.shape[2]:
            sides = _sides(tensor.shape[1], target.shape[1], (0, 1, 2))
            if sides is not None:
                out[name] = absolute(tensor.float(), sides[1], extra=sides[2])
                changed["positions"] = sides[:2]
    return out, [f"{what} resampled from {old} x {old} to {new} x {new}" for what, (old, new) in changed.items()]


def absolute(positions: Tensor, side: int, *, extra: int) -> Tensor:
    """Position embeddings (1, extra + n n, D) for a grid of side x side, bicubic without antialiasing (MAE's code).

    Args:
        positions: of the old grid, row-major, behind those of `extra` tokens, which are kept.
        side: of the new grid.
        extra: tokens that are no patches.
    """
    first, grid = positions[:, :extra], positions[:, extra:]
    old = math.isqrt(grid.shape[1])
    if old == side:
        return positions
    maps = grid.mT.reshape(1, -1, old, old)  # (1, D, n, n)
    resized = functional.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.flatten(2).mT], dim=1)


def relative(table: Tensor, side: int, *, extra: int) -> Tensor:
    """Biases by relative position (n n + extra, heads) for tables of side x side, by cubic splines.

    The old distances are spread in a geometric progression over the new ones: near ones stay near (BEiT's code).

    Args:
        table: n = 2 w - 1 rows of n columns for a window of w, then `extra` entries, which are kept.
        side: the new n.
        extra: entries that are no relative positions.
    """
    from scipy.interpolate import RectBivariateSpline

    grid, last = table[: len(table) - extra], table[len(table) - extra :]
    old = math.isqrt(len(grid))
    if old == side:
        return table
    places, new = _progression(old, side), np.arange(-(side // 2), side // 2 + 1)
    order = min(3, old - 1)
    maps = grid.double().numpy().reshape(old, old, -1)
    resized = np.stack(
        [
            RectBivariateSpline(places, places, maps[:, :, head], kx=order, ky=order)(new, new)
            for head in range(maps.shape[2])
        ],
        axis=-1,
    )
    return torch.cat([torch.from_numpy(resized).to(table).reshape(side * side, -1), last])


def _progression(old: int, new: int) -> np.ndarray:
    """Where `old` distances lie among `new` ones: 0, +-1, +-(1 + q), +-(1 + q + q^2), …, the last at the edge."""
    low, high = 1.01, 1.5
    q = low
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    far = np.cumsum(q ** np.arange(old // 2))
    return np.concatenate([-far[::-1], [0.0], far])


def _sides(old: int, new: int, extras: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Sides of the old and new grid and the number of other entries, None where there is no such reading."""
    for extra in extras:
        sides = math.isqrt(max(old - extra, 0)), math.isqrt(max(new - extra, 0))
        if sides[0] ** 2 == old - extra and sides[1] ** 2 == new - extra and min(sides):
            return (*sides, extra)
    return None
