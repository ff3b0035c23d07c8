"""Small turns of crops, to the pixel those of PIL: nearest neighbour, black where nothing was."""

from math import cos, radians, sin

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslcli.seeds import F32
from sslcli.views.params import Ints

BITS = 16
"""PIL computes places in fixed point, with so many bits behind the point."""


def turned(image: Image.Image, degrees: float) -> Image.Image:
    """An image turned counter-clockwise about its centre."""
    return image.rotate(degrees) if degrees else image


def turned_all(crops: Tensor, degrees: F32) -> Tensor:
    """Square crops (B, 3, s, s) uint8 turned by so many degrees each (B,), on their device."""
    size = crops.shape[-1]
    terms = torch.from_numpy(_terms(degrees, size)).to(crops.device, non_blocking=True)[..., None, None]  # (B, 6, 1, 1)
    x = torch.arange(size, device=crops.device)
    y = x[:, None]
    column = (terms[:, 0] * x + terms[:, 1] * y + terms[:, 2]) >> BITS  # (B, s, s)
    row = (terms[:, 3] * x + terms[:, 4] * y + terms[:, 5]) >> BITS
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    place = (row.clamp(0, size - 1) * size + column.clamp(0, size - 1)).flatten(1)[:, None]  # (B, 1, s*s)
    found = crops.flatten(2).gather(2, place.expand(-1, crops.shape[1], -1)).view_as(crops)
    return torch.where(inside[:, None], found, 0)


def _terms(degrees: F32, size: int) -> Ints:
    """The six terms (B, 6) by which a place in the output leads to one in the input, as `Image.rotate` has them."""
    found = []
    for angle in degrees.tolist():
        turn = -radians(angle % 360.0)
        a, b = round(cos(turn), 15), round(sin(turn), 15)
        c, f = size / 2 - (a + b) * size / 2, size / 2 - (a - b) * size / 2
        found.append((a, b, c + (a + b) * 0.5, -b, a, f + (a - b) * 0.5))
    terms: Ints = np.floor(np.array(found, dtype=np.float64) * 2**BITS + 0.5).astype(np.int64)
    return terms
