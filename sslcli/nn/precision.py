"""Where half precision would spoil a sum: losses and statistics are computed in at least 32 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, as it stands otherwise (float64 stays float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def no_autocast(x: Tensor) -> Iterator[None]:
    """Context in which products of tensors on the device of `x` keep their precision: no autocast, no TF32.

    A similarity over a small temperature is exponentiated: 10 bits of mantissa would be seen. The products of the
    backward pass come later, and need no more than what the run gives them.
    """
    before = torch.get_float32_matmul_precision()
    if x.is_cuda:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        if x.is_cuda:
            torch.set_float32_matmul_precision(before)
