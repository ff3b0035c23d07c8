"""Several views of the same images in one pass through a network."""

from collections.abc import Sequence

import torch
from torch import Tensor


def interleave(views: Sequence[Tensor]) -> Tensor:
    """V tensors (B, ...) of equal shape as one (B*V, ...), image by image.

    Rows i*V to i*V + V - 1 are the views of image i, so that any run of whole images (the share of a rank, a group
    of batch-norm statistics) holds all of their views.
    """
    return torch.stack(list(views), dim=1).flatten(0, 1)


def separate(rows: Tensor, views: int) -> tuple[Tensor, ...]:
    """Undo `interleave`: (B*V, ...) as V tensors (B, ...)."""
    apart: tuple[Tensor, ...] = rows.unflatten(0, (-1, views)).unbind(1)
    return apart
