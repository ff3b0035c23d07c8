import numpy as np
import pytest
import torch

from sslcli.config.views import CropGroup
from sslcli.views.params import Boxes, boxes
from sslcli.views.resize import as_planes, resize_by_bands, resize_crop, resize_crops


def box(top: int, left: int, height: int, width: int, flip: bool = False) -> Boxes:
    return Boxes(*(np.array([n]) for n in (top, left, height, width)), np.array([flip]))


@pytest.mark.parametrize(("interpolation", "tolerance"), [("bilinear", 1), ("bicubic", 4), ("lanczos", 6)])
@pytest.mark.parametrize("shape", [(32, 32), (50, 90), (200, 150)])
def test_the_batch_agrees_with_each_image_alone(photos, shape, interpolation, tolerance):
    images = photos(12, *shape)
    drawn = boxes(0, 0, 0, np.arange(12), CropGroup(), *shape)
    batched = resize_by_bands(as_planes(torch.from_numpy(images)), drawn, 48, interpolation).numpy()
    alone = np.stack([resize_crop(image, drawn, row, 48, interpolation) for row, image in enumerate(images)])
    difference = np.abs(batched.astype(int) - alone)
    assert difference.max() <= tolerance
    assert difference.mean() < 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_matrix_products_give_the_same_bits_in_any_batch(photos, interpolation):
    planes = as_planes(torch.from_numpy(photos(33, 60, 70)))
    drawn = boxes(0, 0, 0, np.arange(33), CropGroup(), 60, 70)
    together = resize_by_bands(planes, drawn, 24, interpolation)
    for row in range(0, 33, 4):
        one = drawn.rows(slice(row, row + 1))
        assert torch.equal(resize_by_bands(planes[:, row : row + 1], one, 24, interpolation)[0], together[row])


@pytest.mark.parametrize(("side", "size"), [(40, 32), (32, 16), (28, 28), (48, 32), (32, 64)])
@pytest.mark.parametrize("levels", [256, 2])
def test_on_a_cpu_a_batch_has_the_bits_of_each_image_alone(side, size, levels):
    """Every height with every width, on noise of many grey levels and of black and white."""
    draw = np.random.default_rng(side + size)
    height, width = (n.ravel() for n in np.mgrid[1 : side + 1, 1 : side + 1])
    images = draw.integers(0, levels, (len(height), side, side, 3), dtype=np.uint8) * np.uint8(255 // (levels - 1))
    top, left = (draw.integers(0, side + 1 - n) for n in (height, width))
    drawn = Boxes(top, left, height, width, draw.random(len(height)) < 0.5)
    together = resize_crops(torch.from_numpy(images), drawn, size, "bilinear").numpy()
    alone = np.stack([resize_crop(image, drawn, row, size, "bilinear") for row, image in enumerate(images)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_pixels_outside_the_crop_do_not_contribute(photos, interpolation):
    image = photos(1, 40, 40)[0]
    other = 255 - image
    other[8:29, 5:31] = image[8:29, 5:31]
    where = box(8, 5, 21, 26)
    np.testing.assert_array_equal(
        resize_crop(image, where, 0, 16, interpolation), resize_crop(other, where, 0, 16, interpolation)
    )
    planes = as_planes(torch.from_numpy(np.stack([image, other])))
    twice = Boxes(*(np.repeat(n, 2) for n in (where.top, where.left, where.height, where.width, where.flip)))
    first, second = resize_by_bands(planes, twice, 16, interpolation)
    assert torch.equal(first, second)


def test_a_mirrored_crop_is_the_crop_mirrored(photos):
    image = photos(1, 40, 50)[0]
    plain, mirrored = box(3, 4, 30, 40), box(3, 4, 30, 40, flip=True)
    np.testing.assert_array_equal(
        resize_crop(image, mirrored, 0, 16, "bilinear"), resize_crop(image, plain, 0, 16, "bilinear")[:, :, ::-1]
    )
    planes = as_planes(torch.from_numpy(image)[None])
    assert torch.equal(
        resize_by_bands(planes, mirrored, 16, "bilinear"), resize_by_bands(planes, plain, 16, "bilinear").flip(3)
    )


def test_a_plain_colour_stays_that_colour():
    for level in (0, 1, 127, 254, 255):
        planes = torch.full((3, 2, 333, 77), float(level))
        where = Boxes(*(np.array(pair) for pair in ((0, 100), (0, 11), (333, 7), (77, 66))), np.array([False, True]))
        for interpolation in ("bilinear", "bicubic", "lanczos"):
            assert (resize_by_bands(planes, where, 32, interpolation) == level).all()


def test_both_layouts_and_read_only_images(photos):
    images = photos(4, 40, 50)
    images.flags.writeable = False
    drawn = boxes(0, 0, 0, np.arange(4), CropGroup(), 40, 50)
    want = np.stack([resize_crop(image, drawn, row, 24, "bilinear") for row, image in enumerate(images)])
    last = torch.from_numpy(images.copy())
    first = last.permute(0, 3, 1, 2).contiguous()
    assert torch.equal(resize_crops(last, drawn, 24, "bilinear"), torch.from_numpy(want))
    assert torch.equal(resize_crops(first, drawn, 24, "bilinear"), torch.from_numpy(want))
    assert torch.equal(as_planes(last), as_planes(first))


def test_a_crop_of_the_output_size_is_copied(photos):
    image = photos(1, 40, 40)[0]
    out = resize_crop(image, box(2, 3, 32, 32), 0, 32, "bicubic")
    np.testing.assert_array_equal(out, image[2:34, 3:35].transpose(2, 0, 1))
    assert out.flags.c_contiguous
    assert not np.shares_memory(out, image)
