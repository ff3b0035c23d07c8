"""views.png: what the network sees, for people to look at."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sslcli.config.views import Normalize, ViewKind
from sslcli.views.kind import Seen

_CELL, _GAP, _MARGIN, _LINE = 112, 6, 84, 16


class Row(NamedTuple):
    """A row of a sheet."""

    name: str
    images: Tensor
    """(b, 3, h, w), standardised; up to one image per column."""
    units: Normalize
    """How they were standardised."""


def picture(seen: Seen, kind: ViewKind, path: Path, columns: int = 8) -> None:
    """Draw the first `columns` images, one column each, with one row per view, then masks, then targets.

    What is drawn is back in grey levels, every one at the same size. Masks (B, N), N a square of whole patches, are
    drawn over the first view.
    """
    first = seen._replace(
        views=[view[:columns] for view in seen.views], targets=[target[:columns] for target in seen.targets]
    )
    captions = [f"image {column + 1}" for column in range(len(first.views[0]))]
    page(rows_of(first, kind), captions).save(path)


def rows_of(seen: Seen, kind: ViewKind) -> list[Row]:
    """What to draw of a batch of views of this kind: every view, what masks leave of the first, every target."""
    rows = [Row(f"view {number + 1}", view, kind.normalize) for number, view in enumerate(seen.views)]
    if seen.masks is not None:
        rows.append(Row("masked", hidden(seen.views[0], seen.masks[: len(seen.views[0])]), kind.normalize))
    rows += [Row(f"target {n + 1}", target, kind.units_of_targets) for n, target in enumerate(seen.targets)]
    return [row._replace(name=f"{row.name}\n{row.images.shape[3]} x {row.images.shape[2]} px") for row in rows]


def page(rows: Sequence[Row], captions: Sequence[str]) -> Image.Image:
    """A sheet of images in grey levels, row by row under captions."""
    width = _MARGIN + len(captions) * (_CELL + _GAP)
    height = _LINE + _GAP + len(rows) * (_CELL + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, caption in enumerate(captions):
        draw.text((_MARGIN + column * (_CELL + _GAP), 2), caption, "black", font)
    for row, (name, images, units) in enumerate(rows):
        top = _LINE + _GAP + row * (_CELL + _GAP)
        draw.multiline_text((_GAP, top), name, "black", font)
        for column, image in enumerate(images):
            left = _MARGIN + column * (_CELL + _GAP)
            sheet.paste(_cell(image, units), (left, top))
    return sheet


def hidden(views: Tensor, masks: Tensor) -> Tensor:
    """Views (B, 3, s, s) with the average colour, 0 after standardisation, in place of masked patches (B, N)."""
    side = isqrt(masks.shape[1])
    seen = (~masks).view(-1, 1, side, side).to(views.dtype)
    return views * torch.nn.functional.interpolate(seen, views.shape[2:], mode="nearest")


def _cell(view: Tensor, units: Normalize) -> Image.Image:
    """One standardised view (3, s, s) as a picture of the common size."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (units.mean, units.std))
    levels = (view.detach().float().cpu() * std + mean).mul(255).round().clamp(0, 255)
    pixels = np.asarray(levels.permute(1, 2, 0).to(torch.uint8).numpy())
    enlarging = max(view.shape[1:]) < _CELL
    how = Image.Resampling.NEAREST if enlarging else Image.Resampling.BICUBIC
    return Image.fromarray(pixels).resize((_CELL, _CELL), how)
