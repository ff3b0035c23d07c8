"""Crop and resize with antialiasing, as PIL does it: one image at a time on a CPU, or a batch by two matrix products.

Both spread each output pixel over all source pixels it covers (triangle, cubic with a = -0.5, or Lanczos of order 3,
stretched by the scale), along the rows, rounded to whole grey levels, then along the columns. Pixels outside the crop
do not contribute.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslcli.config.views import Interpolation
from sslcli.views.params import Boxes, Ints

Pixels = npt.NDArray[np.uint8]

# Weights are whole multiples of this, so that sums of weight times grey level are exact in float32 in whatever order a
# batch size, a thread count or a device brings about.
STEP = 2.0**-15

# On a CPU products give the bits of `resize_crop` from images up to twice these sizes, faster up to so many pixels.
EQUAL_BY_BANDS = (16, 32)
LARGEST_BY_BANDS = 40
ROWS_IN_CACHE = 128


def resize_crop(image: Pixels, boxes: Boxes, row: int, size: int, interpolation: Interpolation) -> Pixels:
    """One image (H, W, 3) uint8 cropped to one of the boxes, resized, mirrored: (3, size, size) uint8."""
    top, left, height, width = (int(n[row]) for n in (boxes.top, boxes.left, boxes.height, boxes.width))
    crop = image[top : top + height, left : left + width].copy()
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]  # (1, 3, h, w), channels last: torch's fast path for uint8
    if (height, width) != (size, size):
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    if boxes.flip[row]:
        pixels = pixels.flip(3)
    return pixels[0].contiguous().numpy()


def resize_crops(images: Tensor, boxes: Boxes, size: int, interpolation: Interpolation) -> Tensor:
    """`resize_crop` of B images of one size, (B, H, W, 3) or (B, 3, H, W) uint8: (B, 3, size, size) uint8.

    A CPU gives the same to the bit: one by one, or by products where those are equal and faster. Other devices differ
    by one grey level (bicubic: a few) in some pixels.
    """
    if images.device.type != "cpu":
        return resize_by_bands(as_planes(images), boxes, size, interpolation)
    arrays = as_arrays(images)
    largest = max(arrays.shape[1:3])
    if interpolation == "bilinear" and size in EQUAL_BY_BANDS and largest <= min(2 * size, LARGEST_BY_BANDS):
        parts = [slice(row, row + ROWS_IN_CACHE) for row in range(0, len(images), ROWS_IN_CACHE)]
        return torch.cat([resize_by_bands(as_planes(images[p]), boxes.rows(p), size, interpolation) for p in parts])
    return torch.from_numpy(
        np.stack([resize_crop(image, boxes, row, size, interpolation) for row, image in enumerate(arrays)])
    )


def resize_by_bands(planes: Tensor, boxes: Boxes, size: int, interpolation: Interpolation) -> Tensor:
    """Images of one size, (3, B, H, W) float32, each cropped to its box and resized: (B, 3, size, size) uint8."""
    height, width = planes.shape[2:]
    numbers = np.stack([boxes.top, boxes.height, boxes.left, boxes.width, boxes.flip]).astype(np.float32)  # (5, B)
    top, tall, left, wide, flip = torch.from_numpy(numbers).to(planes.device, non_blocking=True)
    rows = bands(top, tall, height, size, interpolation)
    columns = bands(left, wide, width, size, interpolation, flip)
    return apply_bands(planes, rows, columns)


def as_arrays(images: Tensor) -> Pixels:
    """(B, H, W, 3) or (B, 3, H, W) uint8 on the host to (B, H, W, 3), sharing memory."""
    return (images if images.shape[-1] == 3 else images.permute(0, 2, 3, 1)).numpy()


def as_planes(images: Tensor) -> Tensor:
    """(B, H, W, 3) or (B, 3, H, W) uint8 to (3, B, H, W) float32."""
    planes = images.permute(3, 0, 1, 2) if images.shape[-1] == 3 else images.permute(1, 0, 2, 3)
    return planes.to(torch.float32, memory_format=torch.contiguous_format)


def apply_bands(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(3, B, H, W) float32 of whole grey levels by weights (B, h, H) and (B, w, W): (B, 3, h, w) uint8."""
    batch, height, width = planes.shape[1], rows.shape[1], columns.shape[1]
    out = torch.empty((batch, 3, height, width), dtype=torch.uint8, device=planes.device)
    for channel, plane in enumerate(planes):
        middle = _levels(torch.bmm(plane, columns.mT)).floor_()  # (B, H, w)
        out[:, channel] = _levels(torch.bmm(rows, middle))
    return out


def _levels(values: Tensor) -> Tensor:
    """Grey levels in [0, 255] whose integer part is the value rounded half up, in place."""
    return values.add_(0.5).clamp_(0, 255)


def bands(
    start: Tensor, length: Tensor, source: int, size: int, interpolation: Interpolation, mirror: Tensor | None = None
) -> Tensor:
    """Resizing weights (B, size, source) that map pixels [start, start + length) to `size` pixels, per sample.

    `start`, `length` and `mirror` (1 to run backwards) are (B,) float32. Rows sum to 1 up to 2^-15 per tap.
    """
    out = torch.arange(size, dtype=torch.float32, device=start.device)  # (s,)
    if mirror is not None:
        out = torch.where(mirror[:, None] > 0, out.flip(0), out)  # (B, s)
    return _weights(start, length, length / size, out, source, interpolation)


def window_band(
    source: int, resized: int, first: Ints, count: int, interpolation: Interpolation, device: torch.device
) -> Tensor:
    """Weights (B, count, source) that give pixels [first, first + count) of a line of `source` made `resized` long."""
    starts = torch.from_numpy(first.astype(np.float32)).to(device, non_blocking=True)  # (B,)
    out = starts[:, None] + torch.arange(count, dtype=torch.float32, device=device)
    whole = torch.full((len(first),), float(source), device=device)
    return _weights(torch.zeros_like(whole), whole, whole / resized, out, source, interpolation)


def _weights(
    start: Tensor, length: Tensor, scale: Tensor, out: Tensor, source: int, interpolation: Interpolation
) -> Tensor:
    start, length, scale = start[:, None, None], length[:, None, None], scale[:, None, None]
    place = torch.arange(source, dtype=torch.float32, device=start.device) - start  # (B, 1, S), from the crop's edge
    stretch = scale.clamp_min(1.0)
    distance = (place + 0.5 - (out[..., None] + 0.5) * scale).abs_().div_(stretch)  # (B, s, S)
    weights = KERNELS[interpolation](distance)
    weights.mul_((place >= 0) & (place < length))
    return weights.div_(weights.sum(dim=2, keepdim=True)).div_(STEP).round_().mul_(STEP)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min_(0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981, eq. 15)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side to `size`; the longer side is rounded down."""
    longer = int(size * max(height, width) / min(height, width))
    return (longer, size) if width <= height else (size, longer)


def _lanczos(distance: Tensor) -> Tensor:
    """Sinc windowed by a sinc three times as wide (Duchon 1979)."""
    return torch.where(distance < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)


KERNELS: dict[Interpolation, Callable[[Tensor], Tensor]] = {
    "bilinear": _triangle,
    "bicubic": _cubic,
    "lanczos": _lanczos,
}
