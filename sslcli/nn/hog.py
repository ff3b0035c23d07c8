"""Histograms of oriented gradients (Dalal & Triggs 2005), for whole batches on their device."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli.nn.precision import no_autocast


@torch.no_grad()
def hog(images: Tensor, *, bins: int = 9, cell: int = 8, window: int | None = None) -> Tensor:
    """Unsigned orientations in every cell of every colour: (B, 3, bins, H // cell, W // cell), float32.

    Gradients are Sobel's, with the border mirrored. A pixel votes with the length of its gradient (gx, gy) for the one
    bin floor(bins * atan2(gx, gy) / pi) mod bins; the votes of a cell are summed, then scaled to unit length
    (Wei et al. 2022, section 3.2 and appendix).

    Args:
        images: (B, 3, H, W).
        bins: orientations between 0 and 180 degrees.
        cell: side of a cell in pixels; what is left at the right and lower border does not vote.
        window: side in pixels of a Gaussian (standard deviation `window // 2`, sum 1) that weighs the votes, repeated
            over the image like tiles; its side divides that of the image. None weighs all pixels alike.
    """
    colours = images.shape[1]
    # Rounding decides on the bin of a gradient that lies on the edge of two, so the sums are the original's.
    with no_autocast(images):
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        sobel = padded.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(colours, 1, 3, 3)
        gx = F.conv2d(padded, sobel, groups=colours)  # (B, 3, H, W)
        gy = F.conv2d(padded, sobel.mT, groups=colours)
    votes = torch.hypot(gx, gy)
    bin_of = (torch.atan2(gx, gy) / math.pi * bins).floor() % bins
    if window is not None:
        height, width = votes.shape[2:]
        votes = votes * gaussian(window, votes.device).repeat(height // window, width // window)
    counted = [F.avg_pool2d(votes * (bin_of == number), cell, divisor_override=1) for number in range(bins)]
    return F.normalize(torch.stack(counted, dim=2), dim=2)


def cells_of_patches(cells: Tensor, across: int) -> Tensor:
    """What `hog` found, (B, 3, bins, h, w), as patches (B, N, 3 * bins * across^2) of `across` x `across` cells each.

    Patches are in row-major order. In a patch, colours come first, then bins, then its cells in row-major order.
    """
    batch, colours, bins, height, width = cells.shape
    grid = cells.reshape(batch, colours, bins, height // across, across, width // across, across)
    return grid.permute(0, 3, 5, 1, 2, 4, 6).reshape(batch, -1, colours * bins * across**2)


def gaussian(side: int, device: torch.device | None = None) -> Tensor:
    """A square (side, side) of normal density around its centre, of standard deviation side // 2; its sum is 1."""
    place = torch.arange(side, device=device) - (side - 1) / 2
    line = torch.exp(-0.5 * (place / (side // 2)) ** 2)
    square = line[:, None] * line
    return square / square.sum()
