"""Where half precision would spoil a sum: losses and statistics are computed in at least 32 bits."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, as it stands otherwise (float64 stays float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(x: Tensor) -> torch.autocast:
    """Context in which products of tensors on the device of `x` keep their precision."""
    return torch.autocast(x.device.type, enabled=False)
