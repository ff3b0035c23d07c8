import numpy as np
import pytest

from sslcli.config.views import Blur, CropGroup, Jitter, Solarize
from sslcli.views.params import CONTRAST, HUE, NOTHING, boxes, colours

GROUP = CropGroup(size=32, jitter=Jitter(), grey=0.2, blur=Blur(), solarize=Solarize())
FIELDS = ("grey_first", "order", "factors", "grey", "blur", "sigma", "solarize", "threshold")


def test_a_draw_does_not_depend_on_its_company():
    index = np.array([5, 3, 900, 3_000_000_000])
    together, tints = boxes(7, 2, 1, index, GROUP, 60, 80), colours(7, 2, 1, index, GROUP)
    for row, one in enumerate(index):
        alone, tint = boxes(7, 2, 1, np.array([one]), GROUP, 60, 80), colours(7, 2, 1, np.array([one]), GROUP)
        for name in ("top", "left", "height", "width", "flip"):
            assert getattr(alone, name)[0] == getattr(together, name)[row]
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(tint, name)[0], getattr(tints, name)[row])


def test_images_of_different_sizes_are_drawn_like_each_alone():
    index, height, width = np.arange(3), np.array([10, 400, 37]), np.array([300, 200, 37])
    together = boxes(0, 0, 0, index, GROUP, height, width)
    for row in range(3):
        alone = boxes(0, 0, 0, index[row : row + 1], GROUP, int(height[row]), int(width[row]))
        assert (alone.top[0], alone.left[0]) == (together.top[row], together.left[row])
        assert (alone.height[0], alone.width[0]) == (together.height[row], together.width[row])


@pytest.mark.parametrize("other", [(8, 2, 1), (7, 3, 1), (7, 2, 0)], ids=["seed", "epoch", "view"])
def test_another_name_gives_another_draw(other):
    index = np.arange(64)
    assert (boxes(7, 2, 1, index, GROUP, 60, 80).width != boxes(*other, index, GROUP, 60, 80).width).mean() > 0.8
    assert (colours(7, 2, 1, index, GROUP).factors != colours(*other, index, GROUP).factors).mean() > 0.9


@pytest.mark.parametrize("size", [(640, 8), (1, 640), (640, 1), (1, 1), (2, 3), (375, 500)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.001, 0.002), (1.0, 1.0)])
def test_boxes_lie_inside_the_image(size, scale):
    height, width = size
    drawn = boxes(0, 0, 0, np.arange(2000), CropGroup(scale=scale), height, width)
    assert (drawn.height >= 1).all()
    assert (drawn.width >= 1).all()
    assert (drawn.top >= 0).all()
    assert (drawn.left >= 0).all()
    assert (drawn.top + drawn.height <= height).all()
    assert (drawn.left + drawn.width <= width).all()


@pytest.mark.parametrize(
    ("size", "box"),
    [((100, 600), (0, 233, 100, 133)), ((600, 100), (233, 0, 133, 100)), ((300, 301), (0, 0, 300, 301))],
    ids=["wide", "tall", "nearly square"],
)
def test_where_no_try_fits_the_crop_is_central(size, box):
    drawn = boxes(0, 0, 0, np.arange(1), CropGroup(scale=(1.0, 1.0)), *size)
    assert (drawn.top[0], drawn.left[0], drawn.height[0], drawn.width[0]) == box


def test_probabilities_are_kept():
    n = 40_000
    index = np.arange(n)
    group = CropGroup(flip=0.3, jitter=Jitter(p=0.8), grey=0.2, blur=Blur(p=0.1), solarize=Solarize(p=0.25))
    drawn = colours(0, 0, 0, index, group)
    shares = {
        0.3: boxes(0, 0, 0, index, group, 32, 32).flip,
        0.8: (drawn.order != NOTHING).any(axis=1),
        0.2: drawn.grey,
        0.1: drawn.blur,
        0.25: drawn.solarize,
    }
    for share, happened in shares.items():
        assert happened.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    together = np.corrcoef([happened.astype(float) for happened in shares.values()])
    assert np.abs(together - np.eye(len(shares))).max() < 0.025


def test_nothing_and_always():
    index = np.arange(1000)
    never = colours(0, 0, 0, index, CropGroup(jitter=Jitter(p=0), blur=Blur(p=0), solarize=Solarize(p=0)))
    assert (never.order == NOTHING).all()
    assert not (never.blur | never.solarize | never.grey | never.grey_first).any()
    always = colours(0, 0, 0, index, CropGroup(jitter=Jitter(p=1), grey=1, blur=Blur(p=1), solarize=Solarize(p=1)))
    assert (always.order != NOTHING).all()
    assert (always.blur & always.solarize & always.grey).all()
    assert (np.sort(always.order, axis=1) == np.arange(4)).all()


def test_an_operation_without_strength_is_left_out():
    drawn = colours(0, 0, 0, np.arange(500), CropGroup(jitter=Jitter(p=1, contrast=0, hue=0)))
    assert not np.isin(drawn.order, [CONTRAST, HUE]).any()
    assert ((drawn.order == NOTHING).sum(axis=1) == 2).all()


def test_grey_first_moves_grey_before_the_jitter():
    usual = colours(0, 0, 0, np.arange(500), CropGroup(grey=0.4))
    early = colours(0, 0, 0, np.arange(500), CropGroup(grey=0.4, grey_first=True))
    np.testing.assert_array_equal(early.grey_first, usual.grey)
    assert not early.grey.any()


def test_sigma_and_threshold_come_from_the_settings():
    drawn = colours(0, 0, 0, np.arange(5000), CropGroup(blur=Blur(sigma=(0.5, 0.75)), solarize=Solarize(threshold=99)))
    assert drawn.sigma.min() == pytest.approx(0.5, abs=0.001)
    assert drawn.sigma.max() == pytest.approx(0.75, abs=0.001)
    assert (drawn.threshold == 99).all()
