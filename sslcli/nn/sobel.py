"""Edges instead of colours."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@final
class Sobel(nn.Module):
    """Images (B, 3, H, W) as two maps of slopes (B, 2, H, W): from left to right, and from top to bottom.

    The mean of the colours through two fixed 3 x 3 filters with zeros around the border (Caron et al. 2018, section
    3.3, and the authors' `models/alexnet.py`). Nothing here is learned, nor part of a state dict.
    """

    grey: Tensor
    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("grey", torch.full((1, 3, 1, 1), 1 / 3), persistent=False)
        self.register_buffer("kernels", torch.stack([across, across.T])[:, None], persistent=False)  # (2, 1, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Slopes (B, 2, H, W)."""
        return F.conv2d(F.conv2d(images, self.grey), self.kernels, padding=1)
