"""views.png: what the network sees, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sslcli.config.views import Normalize

_CELL, _GAP, _MARGIN, _LINE = 112, 6, 84, 16


def picture(views: Sequence[Tensor], normalize: Normalize, path: Path, columns: int = 8) -> None:
    """Draw the first `columns` images, one column each, with one row per view.

    `views` are standardised, each (B, 3, s, s); what is drawn is back in grey levels, every view at the same size.
    """
    count = min(columns, len(views[0]))
    width = _MARGIN + count * (_CELL + _GAP)
    height = _LINE + _GAP + len(views) * (_CELL + _GAP)
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for column in range(count):
        draw.text((_MARGIN + column * (_CELL + _GAP), 2), f"image {column + 1}", "black", font)
    for row, view in enumerate(views):
        top = _LINE + _GAP + row * (_CELL + _GAP)
        draw.text((_GAP, top), f"view {row + 1}", "black", font)
        draw.text((_GAP, top + _LINE), f"{view.shape[3]} x {view.shape[2]} px", "black", font)
        for column in range(count):
            left = _MARGIN + column * (_CELL + _GAP)
            page.paste(_cell(view[column], normalize), (left, top))
    page.save(path)


def _cell(view: Tensor, normalize: Normalize) -> Image.Image:
    """One standardised view (3, s, s) as a picture of the common size."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (normalize.mean, normalize.std))
    levels = (view.detach().float().cpu() * std + mean).mul(255).round().clamp(0, 255)
    pixels = np.asarray(levels.permute(1, 2, 0).to(torch.uint8).numpy())
    enlarging = max(view.shape[1:]) < _CELL
    how = Image.Resampling.NEAREST if enlarging else Image.Resampling.BICUBIC
    return Image.fromarray(pixels).resize((_CELL, _CELL), how)
