"""The one view of evaluation and extraction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslcli.config.views import EvalView
from sslcli.views import colour, reference
from sslcli.views.resize import Pixels, apply_bands, as_arrays, as_planes, shorter_side, window_band

THIN = 64
"""An image with sides in a larger proportion than this is squeezed in one step."""


@final
@dataclass(frozen=True, slots=True)
class EvalLook:
    """Resize the shorter side, crop the centre; where the image is too small, black surrounds it.

    Or, under `squeeze`, resize the whole image to a height and a width, in one step or after its shorter side.
    """

    cfg: EvalView

    def crop(self, image: Pixels) -> Pixels:
        """One image (H, W, 3) uint8: (3, h, w) uint8."""
        if self.cfg.squeeze is not None:
            whole = Image.fromarray(image)
            for height, width in self._steps(image.shape[:2]):
                whole = whole.resize((width, height), reference.FILTERS[self.cfg.interpolation])
            return np.ascontiguousarray(np.asarray(whole).transpose(2, 0, 1))
        down, across = self._spans(image.shape[:2])
        # Resizing only what the crop keeps equals resizing everything first, and stays affordable for a thin strip.
        box = (across.begin, down.begin, across.end, down.end)
        kept = Image.fromarray(image).resize((across.count, down.count), reference.FILTERS[self.cfg.interpolation], box)
        out = np.zeros((3, self.cfg.size, self.cfg.size), dtype=np.uint8)
        out[:, down.place, across.place] = np.asarray(kept).transpose(2, 0, 1)
        return out

    def crop_batch(self, images: Tensor) -> Tensor:
        """`crop` of images of one size on one device, (B, H, W, 3) or (B, 3, H, W) uint8: (B, 3, h, w) uint8."""
        if images.device.type == "cpu":
            return torch.from_numpy(np.stack([self.crop(image) for image in as_arrays(images)]))
        return self.crop_by_bands(as_planes(images))

    def crop_by_bands(self, planes: Tensor) -> Tensor:
        """The same by matrix products, for images (3, B, H, W) float32: equal to within one grey level per resizing."""
        if self.cfg.squeeze is not None:
            return self._squeezed(planes)
        spans, device = self._spans(planes.shape[2:]), planes.device
        down, across = spans
        rows, columns = (
            window_band(
                span.source, span.resized, np.array([span.first]), span.count, self.cfg.interpolation, device
            ).expand(planes.shape[1], -1, -1)
            for span in spans
        )
        shape = (planes.shape[1], 3, self.cfg.size, self.cfg.size)
        out = torch.zeros(shape, dtype=torch.uint8, device=planes.device)
        out[:, :, down.place, across.place] = apply_bands(planes, rows, columns)
        return out

    def finish(self, crops: Tensor) -> Tensor:
        """Standardise crops (B, 3, h, w) uint8: float32."""
        return colour.standardise_(crops.float(), self.cfg.normalize)

    def _squeezed(self, planes: Tensor) -> Tensor:
        """The whole of images (3, B, H, W) float32 at another size: (B, 3, h, w) uint8."""
        for step in self._steps(planes.shape[2:]):
            rows, columns = (
                window_band(source, size, np.array([0]), size, self.cfg.interpolation, planes.device).expand(
                    planes.shape[1], -1, -1
                )
                for source, size in zip(planes.shape[2:], step, strict=True)
            )
            squeezed = apply_bands(planes, rows, columns)
            planes = as_planes(squeezed)
        return squeezed

    def _steps(self, image_size: Sequence[int]) -> list[tuple[int, int]]:
        """Heights and widths that the whole image takes one after the other."""
        assert self.cfg.squeeze is not None
        height, width = image_size
        thin = max(height, width) > THIN * min(height, width)  # its longer side would not fit into memory
        first = [] if self.cfg.resize is None or thin else [shorter_side(height, width, self.cfg.resize)]
        return [*first, self.cfg.squeeze]

    def _spans(self, image_size: Sequence[int]) -> tuple["_Span", "_Span"]:
        """What is kept of an image's height and width."""
        assert self.cfg.resize is not None
        height, width = image_size
        resized = shorter_side(height, width, self.cfg.resize)
        return _Span(height, resized[0], self.cfg.size), _Span(width, resized[1], self.cfg.size)


@dataclass(frozen=True, slots=True)
class _Span:
    """The central `size` pixels of a line that is resized from `source` to `resized` pixels."""

    source: int
    resized: int
    size: int

    @property
    def first(self) -> int:
        """First pixel of the resized line that is kept."""
        return round(max(self.resized - self.size, 0) / 2)

    @property
    def count(self) -> int:
        """How many pixels are kept."""
        return min(self.resized, self.size)

    @property
    def place(self) -> slice:
        """Where they stand in the output."""
        start = max(self.size - self.resized, 0) // 2
        return slice(start, start + self.count)

    @property
    def begin(self) -> float:
        """Where they begin in the source."""
        return self.first * self.source / self.resized

    @property
    def end(self) -> float:
        """Where they end in the source."""
        return min((self.first + self.count) * self.source / self.resized, self.source)
