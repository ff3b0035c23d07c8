"""Feature maps as vectors: the mean over space, or the about 9,000 values of Goyal et al. 2019."""

import math

import torch.nn.functional as F
from torch import Tensor

from sslcli.errors import UserError

VALUES = 9000
"""About how many values a map is pooled to (Goyal et al. 2019, https://arxiv.org/abs/1905.01235, appendix)."""
WINDOWS = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))
"""Side, stride and padding of the windows for the five stages of a ResNet-50 that sees 224 x 224 pixels."""
STAGES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and side of the maps those windows are made for; they give 9216, 9216, 8192, 9216 and 8192 values."""


def in_windows(maps: Tensor, stage: int) -> Tensor:
    """Mean of maps (B, C, h, w) in the windows for a stage of ResNet-50, from 0; padded zeros count in the mean."""
    side, stride, padding = WINDOWS[stage]
    return F.avg_pool2d(maps, side, stride, padding)


def in_grid(maps: Tensor, side: int) -> Tensor:
    """Mean of maps (B, C, h, w) in a grid of side x side windows that cover them; no more than they have places."""
    height, width = maps.shape[2:]
    return F.adaptive_avg_pool2d(maps, (min(side, height), min(side, width)))


def to_9k(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) as vectors of about 9,000 values (B, D).

    The maps of a ResNet-50 at 224 x 224 are pooled in the published windows; others in a grid of floor(sqrt(9000 / C))
    a side, for which there is no published rule.
    """
    channels, height, width = maps.shape[1:]
    if height == width and (channels, height) in STAGES:
        return in_windows(maps, STAGES.index((channels, height))).flatten(1)
    return in_grid(maps, max(1, math.isqrt(VALUES // channels))).flatten(1)


def as_vectors(value: Tensor, name: str, *, many: bool) -> Tensor:
    """Features at a place of a network, (B, D) or maps (B, C, h, w), as vectors (B, D).

    Args:
        value: the features.
        name: what the place is called.
        many: pool maps to about 9,000 values instead of averaging them over space.

    Raises:
        UserError: `many` is asked of features that are no maps.
    """
    if value.ndim == 4:
        return to_9k(value) if many else value.mean((2, 3))
    if many:
        raise UserError(f"`{name}` gives vectors, which cannot be pooled to 9,000 values", hint=f"use `{name}` itself")
    return value
