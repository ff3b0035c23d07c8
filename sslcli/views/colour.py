"""Colours of a whole batch on its device, each image with its own draws, in whole grey levels as PIL computes them.

The crops are sorted by where hue stands in their jitter, so that every step works on a contiguous range: up to three
blends before hue, hue, up to three blends after it. Everything that depends on the draws is decided on the host: the
device is never waited for. Every sum is exact or a single rounded operation, so an image comes out the same to the bit
in any batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslcli.config.views import Normalize
from sslcli.seeds import F32
from sslcli.views.params import CONTRAST, HUE, NOTHING, SATURATION, Colours, Ints
from sslcli.views.resize import STEP

# ITU-R 601 luma in 16-bit fixed point, PIL's `convert("L")`; in float32 these sums are exact.
_RED, _GREEN, _BLUE = 19595 / 65536, 38470 / 65536, 7471 / 65536

# Values worked on at once: few enough to stay in cache, or to bound what a GPU needs beside the network.
_NEAR = 1 << 20
_AT_ONCE = 1 << 27


def finish(crops: Tensor, draws: Colours, normalize: Normalize) -> Tensor:
    """What the network sees of crops (B, 3, h, w) uint8: recoloured, standardised, float32.

    Large batches go in parts that stay near the processor (CPU) or in memory (other devices).
    """
    part = max(1, (_NEAR if crops.device.type == "cpu" else _AT_ONCE) // crops.shape[1:].numel())
    ranges = [slice(start, start + part) for start in range(0, len(crops), part)]
    parts = [standardise_(recolour(crops[which], draws.rows(which)), normalize) for which in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def standardise_(levels: Tensor, normalize: Normalize) -> Tensor:
    """(x / 255 - mean) / std of grey levels (B, 3, h, w) float32, in place."""
    for channel, (mean, std) in enumerate(zip(normalize.mean, normalize.std, strict=True)):
        levels[:, channel].sub_(255 * mean).div_(255 * std)
    return levels


def recolour(crops: Tensor, draws: Colours) -> Tensor:
    """Grey, jitter, grey, blur, solarize crops (B, 3, h, w) uint8: whole grey levels (B, 3, h, w), float32."""
    batch, _, height, width = crops.shape
    plan = _plan(draws)
    numbers = torch.from_numpy(plan.numbers).to(crops.device, non_blocking=True)
    lists = torch.from_numpy(np.concatenate(plan.lists)).to(crops.device, non_blocking=True)
    place, back, grey_first, grey, blurred, solarized = torch.split(lists, [len(part) for part in plan.lists])

    planes = crops.index_select(0, place).permute(1, 0, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    x = planes.view(3, batch, height * width)
    if len(grey_first):
        x.index_copy_(1, grey_first, luma(x.index_select(1, grey_first)).expand(3, -1, -1))
    for slot in range(3):
        _blend_range(x, width, numbers[slot], plan.first[0], plan.first[3 - slot])
    if plan.first[4]:
        shift_hue_(x[:, : plan.first[4]], numbers[6, 0, : plan.first[4], None])
    for slot in range(3):
        _blend_range(x, width, numbers[3 + slot], plan.first[slot + 1], plan.first[5])
    if len(grey):
        x.index_copy_(1, grey, luma(x.index_select(1, grey)).expand(3, -1, -1))
    if len(blurred):
        radius = numbers[6, 1].index_select(0, blurred)
        planes.index_copy_(1, blurred, box_blur(planes.index_select(1, blurred), radius, plan.reach))
    if len(solarized):
        some = x.index_select(1, solarized)
        threshold = numbers[6, 2].index_select(0, solarized)[:, None]
        x.index_copy_(1, solarized, torch.where(some >= threshold, 255 - some, some))
    return planes.permute(1, 0, 2, 3).index_select(0, back)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the draws of a batch mean for the sorted crops."""

    first: Ints
    """(6,) where each rank starts: 0-3 hue after 3, 2, 1, 0 blends; 4 blends only; 5 no jitter."""
    numbers: F32
    """(7, 3, B): factor, share of the mean, share of the luma of blend slots 0-2 before hue and 3-5 after; then
    hue shift, blur radius, threshold."""
    lists: tuple[Ints, ...]
    """Sorted order, its inverse, and which sorted crops are grey first, grey, blurred, solarized."""
    reach: int
    """Whole pixels that one pass of the widest box blur reaches out."""


def _plan(draws: Colours) -> _Plan:
    hue = draws.order == HUE  # (B, 4)
    before = hue.argmax(axis=1)  # blends before hue
    jittered = (draws.order != NOTHING).any(axis=1)
    rank = np.where(hue.any(axis=1), 3 - before, np.where(jittered, 4, 5))
    place = np.argsort(rank, kind="stable")
    first = np.searchsorted(rank[place], np.arange(6))

    order, factors, before = draws.order[place], draws.factors[place], before[place]
    dropped = np.where(rank[place] < 4, before, (order == NOTHING).argmax(axis=1))
    kept = np.arange(3) + (np.arange(3) >= dropped[:, None])
    blends = np.take_along_axis(order, kept, axis=1)  # (B, 3), hue left out
    after = np.take_along_axis(blends, np.minimum(before[:, None] + np.arange(3), 2), axis=1)
    slots = np.concatenate([blends, after], axis=1)  # (B, 6)
    factor = np.where(slots == NOTHING, 1, np.take_along_axis(factors, np.maximum(slots, 0), axis=1))
    table = np.stack([factor, slots == CONTRAST, slots == SATURATION]).transpose(2, 0, 1)  # (6, 3, B)
    shift = np.trunc(factors[:, HUE].astype(np.float64) * 255)
    radius = box_radius(draws.sigma[place])
    numbers = np.concatenate([table, np.stack([shift, radius, draws.threshold[place]])[None]]).astype(np.float32)

    chosen = (draws.grey_first, draws.grey, draws.blur, draws.solarize)
    lists = (place, np.argsort(place), *(np.flatnonzero(flags[place]) for flags in chosen))
    reach = int(np.ceil(radius[lists[4]].max(initial=0)))
    return _Plan(first, numbers, lists, reach)


def luma(x: Tensor) -> Tensor:
    """Grey value (n, P) of colours (3, n, P)."""
    return (x[0] * _RED).add_(x[1], alpha=_GREEN).add_(x[2], alpha=_BLUE).add_(0.5).floor_()


def _blend_range(x: Tensor, width: int, numbers: Tensor, start: int, stop: int) -> None:
    """One blend of the sorted crops [start, stop)."""
    if start < stop:
        factor, mean, grey = numbers[:, start:stop, None]
        blend_(x[:, start:stop], width, factor, mean, grey)


def blend_(x: Tensor, width: int, factor: Tensor, mean: Tensor, grey: Tensor) -> None:
    """Brightness, contrast or saturation of crops (3, n, P), `width` pixels to a row, in place.

    Each crop moves away from black, from its mean luma (`mean` 1) or from its own luma (`grey` 1); all are (n, 1).
    """
    values = luma(x)  # (n, P)
    rows = values.view(len(values), -1, width).sum(dim=2)  # exact; a sum of a whole crop might not be
    average = (rows.double().sum(dim=1, keepdim=True) / values.shape[1] + 0.5).floor_().float()  # (n, 1)
    origin = values.mul_(grey).add_(average * mean)
    x.sub_(origin).mul_(factor).add_(origin).clamp_(0, 255).floor_()


def shift_hue_(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of crops (3, n, P) by `shift` (n, 1) 255ths of the circle, in place, by way of PIL's 8-bit HSV."""
    r, g, b = x
    high = torch.maximum(torch.maximum(r, g), b)
    chroma = high - torch.minimum(torch.minimum(r, g), b)
    scale = chroma.clamp_min(1)
    red, green, blue = (high - r).div_(scale), (high - g).div_(scale), (high - b).div_(scale)
    hue = torch.where(g == high, 2 + red - blue, 4 + green - red)
    hue = torch.where(r == high, blue - green, hue)  # (n, P), in sixths of the circle, from -1
    hue = torch.where(hue < 0, hue + 6, hue).mul_(42.5).floor_().add_(shift)  # 0..255
    hue = hue.sub_((hue / 256).floor_().mul_(256)).mul_(6 / 255)
    saturation = (chroma * 255).div_(high.clamp_min(1)).floor_()
    depth = saturation.mul_(high).mul_(1 / 255)  # (n, P) how far the least channel lies below the greatest
    base = (high - depth).add_(0.5)
    x[0] = (hue - 3).abs_().sub_(1).clamp_(0, 1).mul_(depth).add_(base).floor_()
    x[1] = (hue - 2).abs_().neg_().add_(2).clamp_(0, 1).mul_(depth).add_(base).floor_()
    x[2] = (hue - 4).abs_().neg_().add_(2).clamp_(0, 1).mul_(depth).add_(base).floor_()


def box_radius(sigma: F32) -> F32:
    """Radius (B,) of the box whose threefold use resembles a Gaussian, as PIL's GaussianBlur chooses it.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", eqs. 7, 11, 14.
    """
    variance = np.square(sigma, dtype=np.float32) / np.float32(3)
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return np.asarray(whole + part, dtype=np.float32)


def box_blur(planes: Tensor, radius: Tensor, reach: int) -> Tensor:
    """Three box blurs of each crop (3, n, h, w) along its rows, three along its columns, each rounded to grey levels.

    `radius` (n,) is at most `reach`. A line goes on beyond its ends with its end values.
    """
    tap = torch.arange(reach + 1, dtype=torch.float32, device=radius.device)[:, None]
    weights = (radius + 1 - tap).clamp_(0, 1).div_(2 * radius + 1)  # (reach + 1, n)
    weights = weights.div_(STEP).round_().mul_(STEP)[..., None, None]
    for _ in range(3):
        planes = _box_pass(planes, weights, 3)
    for _ in range(3):
        planes = _box_pass(planes, weights, 2)
    return planes


def _box_pass(planes: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Weighted sum of each value and its neighbours at distance 1, 2, ... along one dimension, rounded half up."""
    reach, length = len(weights) - 1, planes.shape[dim]
    margins = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
    padded = torch.nn.functional.pad(planes, margins, mode="replicate")
    total = (planes * weights[0]).add_(0.5)
    for tap in range(1, reach + 1):
        pair = padded.narrow(dim, reach - tap, length) + padded.narrow(dim, reach + tap, length)
        total.addcmul_(pair, weights[tap])
    return total.floor_()
