import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from sslcli.config.supervised import TrainCrop
from sslcli.config.views import Normalize
from sslcli.errors import PresetError
from sslcli.seeds import seed_of, seeded
from sslcli.views import AugmentedCrops, CropViews
from sslcli.views.augment import posterized

WORDS = "rand-m9-mstd0.5-inc1"
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)


def made(words: str = WORDS) -> AugmentedCrops:
    return AugmentedCrops(CropViews(TrainCrop(interpolation="bicubic").views(32, Normalize()), 7), words)


def test_it_is_the_crop_and_then_timms_randaugment():
    views = made()
    (plain,) = views.views.crop(IMAGES[0], 3, 1)
    picture = Image.fromarray(np.ascontiguousarray(plain.transpose(1, 2, 0)))
    params = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    with seeded(7, "augment", 1, 3):
        theirs = rand_augment_transform(WORDS, params)(picture)
    assert np.array_equal(views.crop(IMAGES[0], 3, 1)[0], np.asarray(theirs).transpose(2, 0, 1))


def test_it_is_a_function_of_image_and_epoch_alone():
    views, again = made(), made()
    index = np.array([5, 6, 7, 8])
    together = views.crop_batch(torch.from_numpy(IMAGES), index, 2)[0]
    for row, number in enumerate(index.tolist()):
        assert np.array_equal(together[row], again.crop(IMAGES[row], number, 2)[0])
    assert not np.array_equal(views.crop(IMAGES[0], 5, 3)[0], together[0])
    standard = views.finish([together], index, 2)[0]
    np.testing.assert_allclose(views.reference(IMAGES[1], 6, 2)[0], standard[1], atol=1e-5)


def test_generators_of_others_are_lent_and_given_back():
    random.seed(1)
    np.random.seed(1)  # the generator that timm draws from
    torch.manual_seed(1)
    before = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeded("a", 1):
        inside = random.random(), np.random.rand(), torch.rand(1).item()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before
    with seeded("a", 1):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == inside
    assert seed_of("a", 1) != seed_of("a", 2)


def test_magnitudes_that_leave_no_bit_give_black():
    picture = Image.fromarray(IMAGES[0])
    for bits in range(1, 8):
        kept = 256 - 2 ** (8 - bits)
        assert np.array_equal(np.asarray(posterized(picture, bits)), IMAGES[0] & kept)
    assert posterized(picture, 8) is picture
    assert np.asarray(posterized(picture, 0)).max() == 0
    views = made("rand-m10-mstd101-inc1")
    for index in range(200):  # every operation, at every strength
        assert views.crop(IMAGES[index % 4], index, 0)[0].shape == (3, 32, 32)


def test_words_that_timm_does_not_know_are_refused():
    with pytest.raises(PresetError, match="timm does not understand `nonsense-m9`"):
        _ = made("nonsense-m9").transform
