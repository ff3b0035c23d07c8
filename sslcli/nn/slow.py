"""The slow twin: a copy of a network that follows it at a distance."""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def frozen_copy(module: M) -> M:
    """A copy that no gradient moves."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def copy_(slow: nn.Module, fast: nn.Module) -> None:
    """Make all parameters and buffers of `slow` equal to those of `fast`."""
    slow.load_state_dict(fast.state_dict())


@torch.no_grad()
def ema_(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move every parameter of `slow` to momentum * slow + (1 - momentum) * fast.

    Buffers stay: the running statistics of a slow twin come from its own forward passes, as in MoCo and BYOL.
    """
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - momentum)


def cosine_momentum(base: float, end: float, fraction: float) -> float:
    """Momentum after `fraction` of a run: half a cosine from `base` to `end` (Grill et al. 2020, section 3.2)."""
    return end - (end - base) * (math.cos(math.pi * fraction) + 1) / 2
