"""Small turns: the same pixels on the device as from PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslcli.config.views import CropGroup, Crops
from sslcli.views import build
from sslcli.views.params import angles
from sslcli.views.rotate import turned, turned_all


@pytest.mark.parametrize("size", [1, 7, 32, 225])
def test_every_pixel_is_pils(size):
    crops = np.random.default_rng(0).integers(1, 256, (9, 3, size, size), dtype=np.uint8)
    degrees = np.array([0, 0.01, -2, 2, 1.234, -0.7, 30, 179, -91.5], dtype=np.float32)
    found = turned_all(torch.from_numpy(crops), degrees).numpy()
    for crop, angle, image in zip(crops, degrees.tolist(), found, strict=True):
        expected = np.asarray(turned(Image.fromarray(crop.transpose(1, 2, 0)), angle)).transpose(2, 0, 1)
        np.testing.assert_array_equal(image, expected)


def test_both_readings_turn_alike():
    cfg = Crops(groups=(CropGroup(size=24, rotate=20.0), CropGroup(size=24)))
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    views = build(cfg, seed=3)
    crops = [torch.from_numpy(crop)[None] for crop in views.crop(image, 5, 0)]
    fast = views.finish(crops, np.array([5]), 0)
    slow = views.reference(image, 5, 0)
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one[0].numpy(), other, atol=2 / 255 / 0.224)
    assert (torch.from_numpy(slow[0]) == torch.from_numpy(slow[0])[:, :1, :1]).all(dim=0).sum() > 10  # black corners


def test_angles_fill_their_range():
    drawn = angles(0, 0, 0, np.arange(2000), CropGroup(rotate=2.0))
    assert drawn.min() < -1.99
    assert drawn.max() > 1.99
    assert abs(drawn.mean()) < 0.1
    assert not angles(0, 0, 0, np.arange(5), CropGroup()).any()
