import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sslcli.config.views import Blur, CropGroup, Crops, EvalView, Jitter, Normalize, Solarize, ViewChange
from sslcli.views import build, build_eval
from sslcli.views.resize import as_planes, shorter_side

JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
MOCO = Crops(groups=(CropGroup(repeat=2, size=64, scale=(0.2, 1.0), jitter=JITTER, grey=0.2, blur=Blur()),))
ONE = CropGroup(size=48, interpolation="bicubic", jitter=JITTER, grey=0.2, blur=Blur(p=1.0))
BYOL = Crops(groups=(ONE, ONE.model_copy(update={"blur": Blur(p=0.1), "solarize": Solarize(p=0.2)})))
SWAV = Crops(
    groups=(
        CropGroup(repeat=2, size=64, scale=(0.14, 1.0), jitter=JITTER, grey=0.2, blur=Blur()),
        CropGroup(repeat=6, size=28, scale=(0.05, 0.14), jitter=JITTER, grey=0.2, blur=Blur()),
    )
)
STRIPS = [(640, 8), (8, 640), (640, 1), (1, 640), (1, 1)]


def finished(views, images, index, epoch):
    crops = [views.crop(image, int(one), epoch) for image, one in zip(images, index, strict=True)]
    return views.finish([torch.from_numpy(np.stack(view)) for view in zip(*crops, strict=True)], index, epoch)


@pytest.mark.parametrize("cfg", [MOCO, BYOL, SWAV], ids=["moco", "byol", "swav"])
def test_the_two_readings_agree(photos, cfg):
    views, images, index = build(cfg, 11), photos(24, 150, 200), np.arange(100, 124)
    fast = finished(views, images, index, 3)
    slow = [views.reference(image, int(one), 3) for image, one in zip(images, index, strict=True)]
    assert len(fast) == len(views.arrange(fast, index, 3).views) == cfg.count
    levels = 255 * np.array(cfg.normalize.std)[:, None, None]
    sizes = [group.size for group in cfg.groups for _ in range(group.repeat)]
    for view, size in enumerate(sizes):
        want = np.stack([one[view] for one in slow])
        assert fast[view].shape == want.shape == (24, 3, size, size)
        assert fast[view].dtype == torch.float32
        assert want.dtype == np.float32
        difference = np.abs(fast[view].numpy() - want) * levels
        assert difference.mean() < 0.1
        assert (difference > 2.01).mean() < 0.005


def test_views_differ_from_each_other_and_between_epochs(photos):
    views, image = build(SWAV, 0), photos(1, 150, 200)[0]
    once, again, later = views.reference(image, 5, 0), views.reference(image, 5, 0), views.reference(image, 5, 1)
    for view in range(8):
        np.testing.assert_array_equal(once[view], again[view])
        assert np.abs(once[view] - later[view]).mean() > 0.1
    assert np.abs(once[0] - once[1]).mean() > 0.1
    assert np.abs(once[2] - once[3]).mean() > 0.1


def test_an_image_looks_the_same_whoever_shares_its_batch(photos):
    views, images, index = build(BYOL, 4), photos(10, 60, 60), np.arange(10)
    whole = finished(views, images, index, 0)
    for part in (slice(0, 3), slice(3, 10), slice(9, 10)):
        for view, of_part in enumerate(finished(views, images[part], index[part], 0)):
            assert torch.equal(of_part, whole[view][part])


def test_resident_images_are_cropped_as_in_a_worker(photos):
    views, images, index = build(SWAV, 4), photos(6, 100, 120), np.array([9, 2, 4, 77, 1, 0])
    resident = views.crop_batch(torch.from_numpy(images), index, 2)
    channels_first = views.crop_batch(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), index, 2)
    alone = [views.crop(image, int(one), 2) for image, one in zip(images, index, strict=True)]
    for view in range(8):
        want = torch.from_numpy(np.stack([one[view] for one in alone]))
        assert want.dtype == torch.uint8
        assert torch.equal(resident[view], want)
        assert torch.equal(channels_first[view], want)


def test_asymmetric_groups_keep_their_own_settings(photos):
    group = CropGroup(size=32, flip=0.0, scale=(1.0, 1.0))
    views = build(Crops(groups=(group, group.model_copy(update={"solarize": Solarize(p=1.0, threshold=0)}))), 0)
    images, index = photos(4, 32, 32), np.arange(4)
    plain, solarized = finished(views, images, index, 0)
    mean, std = (torch.tensor(n)[:, None, None] for n in (views.cfg.normalize.mean, views.cfg.normalize.std))
    torch.testing.assert_close((plain + solarized) * std + 2 * mean, torch.ones(4, 3, 32, 32), rtol=0, atol=1e-5)


def test_views_travel_to_workers():
    views = pickle.loads(pickle.dumps(build(SWAV, 3)))
    assert views == build(SWAV, 3)
    crop = pickle.loads(pickle.dumps(views.crop))
    assert [c.shape for c in crop(np.zeros((40, 50, 3), dtype=np.uint8), 0, 0)] == [(3, 64, 64)] * 2 + [(3, 28, 28)] * 6


@pytest.mark.parametrize("shape", STRIPS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_strips_give_views(shape, interpolation):
    image = np.arange(shape[0] * shape[1] * 3, dtype=np.uint32).astype(np.uint8).reshape(*shape, 3)
    views = build(Crops(groups=(CropGroup(repeat=2, size=32, interpolation=interpolation),)), 0)
    for index in range(20):
        crops, slow = views.crop(image, index, 0), views.reference(image, index, 0)
        assert [c.shape for c in crops] == [c.shape for c in slow] == [(3, 32, 32)] * 2
        for crop, want in zip(crops, slow, strict=True):
            fast = views.finish([torch.from_numpy(crop[None])] * 2, np.array([index]), 0)[0]
            difference = np.abs(fast[0].numpy() - want) * 255 * np.array(views.cfg.normalize.std)[:, None, None]
            assert difference.max() < (2.1 if interpolation == "bilinear" else 7.1)


@pytest.mark.parametrize("shape", [*STRIPS[:2], (100, 130), (130, 100), (77, 77), (20, 31)])
@pytest.mark.parametrize(
    "cfg", [EvalView(resize=40, size=32), EvalView(resize=32, size=32), EvalView(resize=24, size=33)]
)
def test_evaluation_equals_resizing_all_then_cropping(photos, shape, cfg):
    image = np.resize(photos(1, 130, 130)[0], (*shape, 3)).astype(np.uint8)
    height, width = shorter_side(*shape, cfg.resize)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    wide = np.zeros((max(height, cfg.size), max(width, cfg.size), 3), dtype=np.uint8)
    top, left = (wide.shape[0] - height) // 2, (wide.shape[1] - width) // 2
    wide[top : top + height, left : left + width] = resized
    top, left = round((wide.shape[0] - cfg.size) / 2), round((wide.shape[1] - cfg.size) / 2)
    want = wide[top : top + cfg.size, left : left + cfg.size].transpose(2, 0, 1).astype(int)
    look = build_eval(cfg)
    assert np.abs(look.crop(image) - want).max() <= 1
    assert np.abs(look.crop_by_bands(as_planes(torch.from_numpy(image)[None]))[0].numpy() - want).max() <= 1


def test_evaluation_of_a_long_thin_strip_is_affordable():
    look = build_eval(EvalView())
    assert look.crop(np.zeros((1, 100_000, 3), dtype=np.uint8)).shape == (3, 224, 224)


def test_evaluation_in_batches(photos):
    images = photos(5, 60, 70)
    images.flags.writeable = False
    look = build_eval(EvalView(resize=40, size=32))
    want = torch.from_numpy(np.stack([look.crop(image) for image in images]))
    batch = torch.from_numpy(images.copy())
    assert torch.equal(look.crop_batch(batch), want)
    assert torch.equal(look.crop_batch(batch.permute(0, 3, 1, 2)), want)
    normal = Normalize()
    mean, std = (torch.tensor(n)[:, None, None] for n in (normal.mean, normal.std))
    torch.testing.assert_close(look.finish(want), (want / 255 - mean) / std, rtol=0, atol=1e-6)
    assert pickle.loads(pickle.dumps(look)) == look


def test_small_images_are_looked_at_whole(photos):
    image = photos(1, 32, 32)[0]
    np.testing.assert_array_equal(build_eval(EvalView(resize=32, size=32)).crop(image), image.transpose(2, 0, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees_and_is_never_waited_for(photos):
    views, images, index = build(BYOL, 4), torch.from_numpy(photos(16, 60, 60)), np.arange(16)
    want = views.crop_batch(images, index, 0)
    resident = images.cuda()
    look = build_eval(EvalView(resize=40, size=32))
    views.finish(views.crop_batch(resident, index, 0), index, 0)  # first use may wait while it loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops = views.crop_batch(resident, index, 0)
        done = views.finish([view.cuda(non_blocking=True) for view in want], index, 0)
        seen = look.crop_batch(resident)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (seen.cpu().int() - look.crop_batch(images).int()).abs().max() <= 1
    for view, expected in enumerate(views.finish(want, index, 0)):
        assert (crops[view].cpu().int() - want[view].int()).abs().max() <= 4
        assert (done[view].cpu() - expected).abs().mean() < 1e-3


@pytest.mark.parametrize("shape", [(100, 130), (130, 100), (24, 33), *STRIPS[:2]])
@pytest.mark.parametrize("resize", [None, 40])
def test_squeezing_resizes_the_whole_image(photos, shape, resize):
    image = np.resize(photos(1, 130, 130)[0], (*shape, 3)).astype(np.uint8)
    look = build_eval(EvalView(resize=resize, squeeze=(48, 24)))
    want = Image.fromarray(image)
    if resize is not None and max(shape) <= 64 * min(shape):
        height, width = shorter_side(*shape, resize)
        want = want.resize((width, height), Image.Resampling.BILINEAR)
    want = np.asarray(want.resize((24, 48), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
    assert np.array_equal(look.crop(image), want)
    found = look.crop_by_bands(as_planes(torch.from_numpy(image)[None]))[0].numpy()
    assert np.abs(found - want).max() <= (1 if resize is None else 2)


def test_a_protocol_changes_only_what_it_names():
    own = EvalView(resize=40, size=32, normalize=Normalize(mean=(0, 0, 0)))
    assert ViewChange().applied_to(own) == own
    assert ViewChange(squeeze=(256, 128)).applied_to(own).resize is None
    found = ViewChange(resize=256, squeeze=(224, 224)).applied_to(own)
    assert (found.resize, found.shape, found.normalize) == (256, (224, 224), own.normalize)
    with pytest.raises(ValueError, match="needs `squeeze`"):
        EvalView(resize=None)
