"""The newest keys of past batches: a ring of negatives."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@final
class Queue(nn.Module):
    """The last `size` rows pushed, each (dim,); at first random directions.

    Equal on all ranks if all ranks push the same rows. Nothing here waits for the device.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))  # (K, D)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # where the next row goes

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put rows (B, D), at most `size` of them, over the oldest ones."""
        size, count = self.rows.shape[0], rows.shape[0]
        places = (self.pointer + torch.arange(count, device=rows.device)) % size
        self.rows.index_copy_(0, places, rows.to(self.rows.dtype))
        self.pointer.copy_((self.pointer + count) % size)
