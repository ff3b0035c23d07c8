"""Nine patches of an image, cut from a jittered 3 x 3 grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslcli.config.views import Patches
from sslcli.seeds import F32, seed_of, uniform
from sslcli.views import colour, reference
from sslcli.views.kind import Seen
from sslcli.views.params import Bools, Colours, Ints
from sslcli.views.resize import Pixels, apply_bands, as_arrays, as_planes, shorter_side, window_band

GRID = 3


@dataclass(frozen=True, slots=True)
class Places:
    """Where B images are cut, and whether they turn grey."""

    top: Ints
    """(B,) of the square, in pixels of the resized image."""
    left: Ints
    """(B,)"""
    down: Ints
    """(B, 9) of each patch within its cell."""
    across: Ints
    """(B, 9)"""
    grey: Bools
    """(B,)"""


@final
@dataclass(frozen=True, slots=True)
class PatchViews:
    """The nine patches of images, row by row: functions of (seed, epoch, image index) alone."""

    cfg: Patches
    seed: int

    def crop(self, image: Pixels, index: int, epoch: int) -> list[Pixels]:
        """Resize, cut the square, cut the patches of one image (H, W, 3) uint8: nine (3, p, p) uint8."""
        cfg, (height, width) = self.cfg, image.shape[:2]
        tall, wide = shorter_side(height, width, cfg.resize)
        places = self._places(_one(index), epoch, tall, wide)
        top, left = int(places.top[0]), int(places.left[0])
        box = (
            left * width / wide,
            top * height / tall,
            (left + cfg.size) * width / wide,
            (top + cfg.size) * height / tall,
        )
        how = reference.FILTERS[cfg.interpolation]
        square = np.asarray(Image.fromarray(image).resize((cfg.size, cfg.size), how, box))
        return [patch.transpose(2, 0, 1).copy() for patch in cut(square, self._corners(places)[:, 0], cfg.patch)]

    def crop_batch(self, images: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """`crop` of images of one size on one device: nine (B, 3, p, p) uint8."""
        if images.device.type == "cpu":
            each = [self.crop(image, int(one), epoch) for image, one in zip(as_arrays(images), index, strict=True)]
            return [torch.from_numpy(np.stack(patch)) for patch in zip(*each, strict=True)]
        return self.crop_by_bands(as_planes(images), index, epoch)

    def crop_by_bands(self, planes: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """The same by matrix products, for images (3, B, H, W) float32: equal to within one grey level."""
        cfg, (height, width), device = self.cfg, planes.shape[2:], planes.device
        tall, wide = shorter_side(height, width, cfg.resize)
        places = self._places(index, epoch, tall, wide)
        rows = window_band(height, tall, places.top, cfg.size, cfg.interpolation, device)
        columns = window_band(width, wide, places.left, cfg.size, cfg.interpolation, device)
        square = apply_bands(planes, rows, columns).permute(0, 2, 3, 1)  # (B, s, s, 3)
        pixels = self._corners(places)[..., None] + np.arange(cfg.patch)
        y, x = torch.from_numpy(pixels).to(device, non_blocking=True)  # (B, 9, p)
        image = torch.arange(len(index), device=device)[:, None, None]
        return [
            square[image, y[:, patch, :, None], x[:, patch, None, :]].permute(0, 3, 1, 2) for patch in range(GRID**2)
        ]

    def finish(self, crops: Sequence[Tensor], index: Ints, epoch: int) -> list[Tensor]:
        """Grey and standardise the patches: nine (B, 3, p, p) uint8 to float32."""
        draws = Colours.plain(np.tile(self._places(index, epoch, self.cfg.size, self.cfg.size).grey, GRID**2))
        return list(torch.split(colour.finish(torch.cat(list(crops)), draws, self.cfg.normalize), len(index)))

    def reference(self, image: Pixels, index: int, epoch: int) -> list[F32]:
        """The patches of one image as PIL and torchvision make them: each (3, p, p) float32."""
        cfg = self.cfg
        tall, wide = shorter_side(image.shape[0], image.shape[1], cfg.resize)
        places = self._places(_one(index), epoch, tall, wide)
        resized = Image.fromarray(image).resize((wide, tall), reference.FILTERS[cfg.interpolation])
        top, left = int(places.top[0]), int(places.left[0])
        square = resized.crop((left, top, left + cfg.size, top + cfg.size))
        square = reference.grey(square) if places.grey[0] else square
        patches = cut(np.asarray(square), self._corners(places)[:, 0], cfg.patch)
        return [reference.standardised(Image.fromarray(patch), cfg.normalize) for patch in patches]

    def arrange(self, rendered: Sequence[Tensor], index: Ints, epoch: int) -> Seen:
        """Every patch is a view."""
        return Seen(list(rendered))

    def _corners(self, places: Places) -> Ints:
        """Rows and columns (2, B, 9) of the patches' corners in the square."""
        half = self.cfg.gap // 2
        return corners(self.cfg.cell, places.down + half, places.across + half)

    def _places(self, index: Ints, epoch: int, tall: int, wide: int) -> Places:
        """The draws of images `index` (B,) resized to (tall, wide)."""
        cfg = self.cfg
        key = seed_of(self.seed, "views", epoch, "patches")
        u = uniform(key, index[:, None], np.arange(3 + 2 * GRID**2)).astype(np.float64)  # (B, 21)
        shifts = np.floor(u[:, 3:] * (cfg.jitter + 1)).astype(np.int64)
        return Places(
            top=np.floor(u[:, 0] * (tall - cfg.size + 1)).astype(np.int64),
            left=np.floor(u[:, 1] * (wide - cfg.size + 1)).astype(np.int64),
            down=shifts[:, : GRID**2],
            across=shifts[:, GRID**2 :],
            grey=u[:, 2] < cfg.grey,
        )


def corners(cell: int, down: Ints, across: Ints) -> Ints:
    """Rows and columns (2, ..., 9) of the patches' corners, from where they lie in their cells, (..., 9) each."""
    number = np.arange(GRID**2)
    return np.stack([cell * (number // GRID) + down, cell * (number % GRID) + across])


def cut(square: Pixels, at: Ints, patch: int) -> list[Pixels]:
    """The patches (p, p, 3) of a square (s, s, 3) with corners (2, 9)."""
    return [square[y : y + patch, x : x + patch] for y, x in at.T.tolist()]


def _one(index: int) -> Ints:
    return np.array([index])
