import numpy as np
import pytest
import torch
from PIL import Image

from sslcli.config.views import Blur, CropGroup, Jitter, Normalize, Solarize
from sslcli.views import colour, reference
from sslcli.views.params import Colours, colours

EVERYTHING = CropGroup(
    jitter=Jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.4), grey=0.2, blur=Blur(), solarize=Solarize()
)
ONE_EACH = {
    "brightness": (Jitter(p=1, brightness=0.9, contrast=0, saturation=0, hue=0), 0),
    "contrast": (Jitter(p=1, brightness=0, contrast=0.9, saturation=0, hue=0), 0),
    "saturation": (Jitter(p=1, brightness=0, contrast=0, saturation=0.9, hue=0), 0),
    "hue": (Jitter(p=1, brightness=0, contrast=0, saturation=0, hue=0.5), 7),
    "no hue": (Jitter(p=0.8, hue=0), 0),
}


def both(images: np.ndarray, draws: Colours) -> tuple[np.ndarray, np.ndarray]:
    """The batch and each image alone with PIL, both (B, h, w, 3)."""
    batch = colour.recolour(torch.from_numpy(images).permute(0, 3, 1, 2), draws).permute(0, 2, 3, 1).numpy()
    rows = [draws.rows(slice(row, row + 1)) for row in range(len(images))]
    alone = [reference.recoloured(Image.fromarray(image), row) for image, row in zip(images, rows, strict=True)]
    return batch, np.stack([np.asarray(image) for image in alone])


@pytest.mark.parametrize("name", ONE_EACH)
def test_each_jitter_operation_agrees_with_pil(photos, name):
    jitter, tolerance = ONE_EACH[name]
    batch, alone = both(photos(48, 40, 40), colours(3, 0, 0, np.arange(48), CropGroup(jitter=jitter)))
    assert np.abs(batch - alone).max() <= tolerance
    assert np.abs(batch - alone).mean() < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_blur_agrees_with_pil(photos, sigma):
    group = CropGroup(blur=Blur(p=1, sigma=(sigma, sigma)))
    batch, alone = both(photos(16, 40, 30), colours(3, 0, 0, np.arange(16), group))
    assert np.abs(batch - alone).max() <= 2  # PIL sums in 24-bit fixed point
    assert np.abs(batch - alone).mean() < 0.15
    assert np.abs(alone - photos(16, 40, 30).astype(int)).max() > 0 or sigma == 0.1


@pytest.mark.parametrize("group", [EVERYTHING, EVERYTHING.model_copy(update={"grey_first": True})])
def test_everything_together_agrees_with_pil(photos, group):
    batch, alone = both(photos(64, 48, 48), colours(5, 1, 0, np.arange(64), group))
    # A level of difference can be solarized apart; all but a few pixels agree.
    assert np.abs(batch - alone).mean() < 0.05
    assert (np.abs(batch - alone) > 2).mean() < 0.005


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_plain_greys_keep_to_pil(level):
    images = np.full((48, 4, 4, 3), level, dtype=np.uint8)
    group = CropGroup(jitter=Jitter(p=1, hue=0.5), blur=Blur(p=0.5))
    batch, alone = both(images, colours(0, 0, 0, np.arange(48), group))
    assert np.abs(batch - alone).max() <= 1
    assert np.abs(batch - batch[..., :1]).max() == 0


def test_pure_colours_turn_as_in_pil():
    pure = np.array([[c * 255 for c in (k & 1, k >> 1 & 1, k >> 2)] for k in range(8)], dtype=np.uint8)
    images = np.repeat(pure[:, None, None], 48, axis=0)  # (384, 1, 1, 3)
    group = CropGroup(jitter=Jitter(p=1, brightness=0, contrast=0, saturation=0, hue=0.5))
    batch, alone = both(images, colours(0, 0, 0, np.arange(len(images)), group))
    assert np.abs(batch - alone).max() <= 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_crops_of_hardly_a_pixel(photos, size):
    batch, alone = both(photos(32, size, size), colours(0, 0, 0, np.arange(32), EVERYTHING))
    assert batch.shape == (32, size, size, 3)
    assert (np.abs(batch - alone) > 2).mean() < 0.05


def test_an_image_comes_out_the_same_in_any_batch(photos, monkeypatch):
    crops = torch.from_numpy(photos(37, 19, 19)).permute(0, 3, 1, 2)
    draws = colours(0, 0, 0, np.arange(37), EVERYTHING)
    together = colour.finish(crops, draws, Normalize())
    for row in range(37):
        alone = colour.finish(crops[row : row + 1], draws.rows(slice(row, row + 1)), Normalize())
        assert torch.equal(alone[0], together[row])
    monkeypatch.setattr(colour, "_NEAR", 5 * crops[0].numel())
    assert torch.equal(colour.finish(crops, draws, Normalize()), together)


def test_the_mean_of_a_large_crop_is_exact():
    # More than 2^24 grey levels in all: a float32 sum over the whole crop would be off.
    image = np.full((1, 300, 300, 3), 255, dtype=np.uint8)
    image[:, :150, :, :] = 254
    group = CropGroup(jitter=Jitter(p=1, brightness=0, contrast=0.9, saturation=0, hue=0))
    batch, alone = both(image, colours(0, 0, 0, np.arange(1), group))
    np.testing.assert_array_equal(batch, alone)


def test_crops_are_left_alone(photos):
    crops = torch.from_numpy(photos(8, 16, 16)).permute(0, 3, 1, 2).contiguous()
    before = crops.clone()
    colour.finish(crops, colours(0, 0, 0, np.arange(8), EVERYTHING), Normalize())
    assert torch.equal(crops, before)
