"""Where a patch lies, as numbers: fixed position embeddings."""

from typing import Literal

import torch
from torch import Tensor


def sincos_positions(dim: int, height: int, width: int, *, first: Literal["row", "column"], prefix: int = 0) -> Tensor:
    """Two-dimensional sine-cosine embeddings (prefix + height * width, dim), float32, of patches in row-major order.

    A coordinate x takes half of the channels: sin(x w_i) for every i, then cos(x w_i), with w_i = 10000^(-4i / dim)
    (Vaswani et al. 2017, section 3.5, one axis at a time). `prefix` rows of zeros for class tokens come first.

    Args:
        dim: a multiple of 4.
        height: rows of the grid.
        width: columns of the grid.
        first: the coordinate that the first half encodes: `row` in MoCo v3 and MMSelfSup, `column` in MAE.
        prefix: number of tokens that have no place.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a multiple of 4 channels (got {dim})")
    row = torch.arange(height, dtype=torch.float64).repeat_interleave(width)  # (N,)
    column = torch.arange(width, dtype=torch.float64).repeat(height)
    axes = [row, column] if first == "row" else [column, row]
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
    angles = [torch.outer(axis, frequencies) for axis in axes]  # (N, D/4)
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(prefix, dim), table]).float()
