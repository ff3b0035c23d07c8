from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslcli.config.views import CropGroup, Crops, Masked, Normalize, SecondLook
from sslcli.views import Seen, picture

CROPS = Crops(groups=(CropGroup(),))
RED, BLUE = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])


def read(path: Path) -> np.ndarray:
    with Image.open(path) as page:
        return np.asarray(page.convert("RGB"))


def standardised(colour: torch.Tensor, units: Normalize, count: int, side: int) -> torch.Tensor:
    mean, std = (torch.tensor(numbers) for numbers in (units.mean, units.std))
    return ((colour - mean) / std)[:, None, None].expand(count, 3, side, side)


def test_the_picture_shows_the_views_in_their_own_colours(tmp_path):
    large, small = standardised(RED, CROPS.normalize, 3, 224), standardised(BLUE, CROPS.normalize, 3, 8)
    picture(Seen([large, small, small]), CROPS, tmp_path / "views.png", columns=2)
    pixels = read(tmp_path / "views.png").reshape(-1, 3)
    reds, blues = ((pixels == colour).all(axis=1).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert reds * 2 == blues > 0  # two images: one row of large views, two of small ones
    assert (pixels.max(axis=1) < 128).sum() > 50  # captions


def test_a_target_is_drawn_in_its_own_units(tmp_path):
    kind = Masked(crop=CropGroup(size=32), target=SecondLook(size=16))
    assert kind.target is not None
    assert kind.target.normalize != kind.normalize
    view, target = standardised(RED, kind.normalize, 1, 32), standardised(BLUE, kind.target.normalize, 1, 16)
    picture(Seen([view], None, [target]), kind, tmp_path / "views.png")
    pixels = read(tmp_path / "views.png").reshape(-1, 3)
    reds, blues = ((pixels == colour).all(axis=1).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert reds == blues > 0


def test_a_small_batch_needs_fewer_columns(tmp_path):
    views = [torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)]
    picture(Seen(views), CROPS, tmp_path / "one.png")
    picture(Seen([view.expand(20, 3, 16, 16) for view in views]), CROPS, tmp_path / "eight.png")
    one, eight = read(tmp_path / "one.png"), read(tmp_path / "eight.png")
    assert one.shape[0] == eight.shape[0]
    assert one.shape[1] < eight.shape[1] / 3
