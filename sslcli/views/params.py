"""Which crop, which colours? Every random number of a view, as arrays over images, drawn by name and counter.

A draw depends on the run's seed, the epoch, the number of the view and the image's index, never on which images share
its batch, which process asks, or what was drawn before. Both readings of a view use these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt

from sslcli.config.views import CropGroup
from sslcli.seeds import F32, seed_of, uniform

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NOTHING = -1
ORDERS = np.array(list(permutations(range(4))))  # (24, 4)
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Boxes:
    """Where to crop B images, in pixels, and whether to mirror the crop."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints
    flip: Bools

    def rows(self, part: slice) -> "Boxes":
        """The boxes of some of the images."""
        return Boxes(self.top[part], self.left[part], self.height[part], self.width[part], self.flip[part])


@dataclass(frozen=True, slots=True)
class Colours:
    """What happens to the colours of B crops."""

    grey_first: Bools
    """(B,) grey before the jitter."""
    order: Ints
    """(B, 4) jitter operations in turn: BRIGHTNESS, CONTRAST, SATURATION, HUE, or NOTHING."""
    factors: F32
    """(B, 4) strength of each operation, by its number; hue in turns of the circle."""
    grey: Bools
    """(B,) grey after the jitter."""
    blur: Bools
    """(B,)"""
    sigma: F32
    """(B,) standard deviation of the blur, in pixels."""
    solarize: Bools
    """(B,)"""
    threshold: F32
    """(B,) values from here on are inverted."""

    @staticmethod
    def plain(grey: Bools) -> "Colours":
        """No change but that some of B crops (B,) turn grey."""
        never, count = np.zeros(len(grey), dtype=bool), len(grey)
        return Colours(
            grey_first=never,
            order=np.full((count, 4), NOTHING),
            factors=np.ones((count, 4), dtype=np.float32),
            grey=grey,
            blur=never,
            sigma=np.ones(count, dtype=np.float32),
            solarize=never,
            threshold=np.full(count, 128, dtype=np.float32),
        )

    def rows(self, which: slice) -> "Colours":
        """The draws of some of the crops."""
        return Colours(*(column[which] for column in self._columns()))

    @staticmethod
    def join(parts: Sequence["Colours"]) -> "Colours":
        """The draws of several views, one after the other."""
        return Colours(*(np.concatenate(columns) for columns in zip(*(p._columns() for p in parts), strict=True)))

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return (
            self.grey_first,
            self.order,
            self.factors,
            self.grey,
            self.blur,
            self.sigma,
            self.solarize,
            self.threshold,
        )


def boxes(
    seed: int,
    epoch: int,
    view: int,
    index: Ints,
    group: CropGroup,
    image_height: int | Ints,
    image_width: int | Ints,
) -> Boxes:
    """Crops by torchvision's RandomResizedCrop rule for images `index` (B,) of the given sizes (numbers or (B,)).

    Up to ten tries at an area uniform in `scale` and a log-uniform ratio; the first that fits is placed uniformly.
    Where none fits: the largest centred crop with a ratio in range.
    """
    draws = uniform(seed_of(seed, "views", epoch, view, "crop"), index[:, None], np.arange(2 * _ATTEMPTS + 3))
    u = draws.astype(np.float64)  # (B, 23)
    full_h = np.full(len(u), image_height, dtype=np.float64)  # (B,)
    full_w = np.full(len(u), image_width, dtype=np.float64)
    low, high = group.ratio

    area = _between(u[:, :_ATTEMPTS], group.scale) * (full_h * full_w)[:, None]
    ratio = np.exp(_between(u[:, _ATTEMPTS : 2 * _ATTEMPTS], (log(low), log(high))))
    w = np.rint(np.sqrt(area * ratio))  # (B, 10)
    h = np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= full_w[:, None]) & (h > 0) & (h <= full_h[:, None])
    first = (np.arange(len(u)), fits.argmax(axis=1))
    w, h, found = w[first], h[first], fits[first]
    top = np.floor(u[:, -3] * (full_h - h + 1))
    left = np.floor(u[:, -2] * (full_w - w + 1))
    if not found.all():
        widest = np.where(full_w / full_h > high, np.rint(full_h * high), full_w)
        tallest = np.where(full_w / full_h < low, np.rint(full_w / low), full_h)
        w = np.where(found, w, np.maximum(widest, 1))
        h = np.where(found, h, np.maximum(tallest, 1))
        top = np.where(found, top, np.floor((full_h - h) / 2))
        left = np.where(found, left, np.floor((full_w - w) / 2))
    return Boxes(
        top=top.astype(np.int64),
        left=left.astype(np.int64),
        height=h.astype(np.int64),
        width=w.astype(np.int64),
        flip=draws[:, -1] < group.flip,
    )


def colours(seed: int, epoch: int, view: int, index: Ints, group: CropGroup) -> Colours:
    """Colour draws of images `index` (B,) in one view."""
    u = uniform(seed_of(seed, "views", epoch, view, "colour"), index[:, None], np.arange(10))  # (B, 10)
    order, factors = _jitter(u[:, :6], group)
    grey = u[:, 6] < group.grey
    blur, sigma, solarize, threshold = 0.0, (1.0, 1.0), 0.0, 128
    if group.blur is not None:
        blur, sigma = group.blur.p, group.blur.sigma
    if group.solarize is not None:
        solarize, threshold = group.solarize.p, group.solarize.threshold
    return Colours(
        grey_first=grey & group.grey_first,
        order=order,
        factors=factors,
        grey=grey & (not group.grey_first),
        blur=u[:, 7] < blur,
        sigma=_between(u[:, 8].astype(np.float64), sigma).astype(np.float32),
        solarize=u[:, 9] < solarize,
        threshold=np.full(index.shape, threshold, dtype=np.float32),
    )


def angles(seed: int, epoch: int, view: int, index: Ints, group: CropGroup) -> F32:
    """Degrees (B,) by which one view of images `index` (B,) is turned, counter-clockwise."""
    u = uniform(seed_of(seed, "views", epoch, view, "turn"), index)
    return _between(u.astype(np.float64), (-group.rotate, group.rotate)).astype(np.float32)


def _jitter(u: F32, group: CropGroup) -> tuple[Ints, F32]:
    """Order (B, 4) and factors (B, 4) of the jitter from uniform draws (B, 6)."""
    jitter = group.jitter
    if jitter is None:
        return np.full((len(u), 4), NOTHING), np.ones((len(u), 4), dtype=np.float32)
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    order = ORDERS[(u[:, 1].astype(np.float64) * len(ORDERS)).astype(np.int64)]
    idle = [op for op, strength in enumerate(strengths) if strength == 0]
    order = np.where((u[:, :1] < jitter.p) & ~np.isin(order, idle), order, NOTHING)
    ranges = [(max(0.0, 1 - x), 1 + x) for x in strengths[:HUE]] + [(-jitter.hue, jitter.hue)]
    factors = [_between(u[:, 2 + op].astype(np.float64), ranges[op]) for op in range(4)]
    return order, np.stack(factors, axis=1).astype(np.float32)


def _between(u: Doubles, ends: tuple[float, float]) -> Doubles:
    """Uniform draws in [0, 1) stretched over a range."""
    return ends[0] + u * (ends[1] - ends[0])
