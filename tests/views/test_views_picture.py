from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslcli.config.views import Normalize
from sslcli.views import picture


def read(path: Path) -> np.ndarray:
    with Image.open(path) as page:
        return np.asarray(page.convert("RGB"))


def test_the_picture_shows_the_views_in_their_own_colours(tmp_path):
    normalize = Normalize()
    mean, std = (torch.tensor(n)[:, None, None] for n in (normalize.mean, normalize.std))
    red, blue = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    large = ((red[:, None, None] - mean) / std).expand(3, 3, 224, 224)
    small = ((blue[:, None, None] - mean) / std).expand(3, 3, 8, 8)
    picture([large, small, small], normalize, tmp_path / "views.png", columns=2)
    pixels = read(tmp_path / "views.png").reshape(-1, 3)
    reds, blues = ((pixels == colour).all(axis=1).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert reds * 2 == blues > 0  # two images: one row of large views, two of small ones
    assert (pixels.max(axis=1) < 128).sum() > 50  # captions


def test_a_small_batch_needs_fewer_columns(tmp_path):
    views = [torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)]
    picture(views, Normalize(), tmp_path / "one.png")
    picture([view.expand(20, 3, 16, 16) for view in views], Normalize(), tmp_path / "eight.png")
    one, eight = read(tmp_path / "one.png"), read(tmp_path / "eight.png")
    assert one.shape[0] == eight.shape[0]
    assert one.shape[1] < eight.shape[1] / 3
