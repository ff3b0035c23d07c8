"""Every kind of views: two readings that agree, draws that depend on seed, epoch and image alone."""

import pickle

import numpy as np
import pytest
import torch

from sslcli.config.views import (
    BlockMask,
    CropGroup,
    Crops,
    GridMask,
    Jitter,
    Masked,
    MultiBlockMask,
    Patches,
    Rotations,
    SecondLook,
)
from sslcli.views import Seen, build
from sslcli.views.resize import as_planes

JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
KINDS = {
    "crops": Crops(groups=(CropGroup(repeat=2, size=48, jitter=JITTER),)),
    "rotations": Rotations(crop=CropGroup(size=48, jitter=JITTER, grey=0.3)),
    "patches": Patches(resize=110, size=99, gap=2, jitter=8, grey=0.5),
    "masked": Masked(crop=CropGroup(size=48, interpolation="bicubic"), patch=8),
    "masked, grid": Masked(crop=CropGroup(size=48, jitter=JITTER), patch=4, mask=GridMask(cell=12)),
    "masked, target": Masked(
        crop=CropGroup(size=48, interpolation="bicubic"),
        patch=8,
        mask=BlockMask(patches=18, least=4, exact=True),
        target=SecondLook(size=24),
    ),
    "masked, blocks": Masked(crop=CropGroup(size=48), patch=4, mask=MultiBlockMask(among=16)),
}
every_kind = pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS.keys())


def seen(views, images, index, epoch) -> Seen:
    crops = [views.crop(image, int(one), epoch) for image, one in zip(images, index, strict=True)]
    stacked = [torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True)]
    return views.arrange(views.finish(stacked, index, epoch), index, epoch)


def seen_slowly(views, images, index, epoch) -> Seen:
    each = [views.reference(image, int(one), epoch) for image, one in zip(images, index, strict=True)]
    return views.arrange([torch.from_numpy(np.stack(part)) for part in zip(*each, strict=True)], index, epoch)


@every_kind
@pytest.mark.parametrize("shape", [(150, 200), (200, 130)])
def test_the_two_readings_agree(photos, cfg, shape):
    views, images, index = build(cfg, 11), photos(12, *shape), np.arange(100, 112)
    fast, slow = seen(views, images, index, 3), seen_slowly(views, images, index, 3)
    assert len(fast.views) == len(slow.views) == cfg.count
    levels = 255 * torch.tensor(cfg.normalize.std)[:, None, None]
    for found, wanted in zip(fast.views, slow.views, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype == torch.float32
        difference = (found - wanted).abs() * levels
        assert difference.mean() < 0.2
        assert (difference > 2.01).float().mean() < 0.005


@every_kind
def test_an_image_looks_the_same_whoever_shares_its_batch(photos, cfg):
    views, images, index = build(cfg, 4), photos(6, 120, 140), np.arange(6)
    whole = seen(views, images, index, 0)
    for part in (slice(0, 2), slice(2, 6)):
        for of_part, of_all in zip(seen(views, images[part], index[part], 0).views, whole.views, strict=True):
            assert torch.equal(of_part, of_all[part])
    for found in (
        seen(views, images, index, 1),
        seen(views, images, index + 6, 0),
        seen(build(cfg, 5), images, index, 0),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(found.views, whole.views, strict=True))


@every_kind
def test_resident_images_are_cropped_as_in_a_worker(photos, cfg):
    views, images, index = build(cfg, 4), photos(5, 120, 140), np.array([9, 2, 4, 77, 1])
    batch = torch.from_numpy(images)
    each = [views.crop(image, int(one), 2) for image, one in zip(images, index, strict=True)]
    for part, alone in zip(views.crop_batch(batch, index, 2), zip(*each, strict=True), strict=True):
        assert torch.equal(part, torch.from_numpy(np.stack(alone)))
    for part, again in zip(
        views.crop_batch(batch.permute(0, 3, 1, 2), index, 2), views.crop_batch(batch, index, 2), strict=True
    ):
        assert torch.equal(part, again)


@every_kind
def test_views_travel_to_workers(cfg):
    views = build(cfg, 3)
    assert pickle.loads(pickle.dumps(views)) == views


@every_kind
def test_a_miniature_is_of_the_same_kind_and_small(cfg):
    small = type(cfg).model_validate(cfg.shrunk(32).model_dump(mode="json"))
    assert small.count == cfg.count
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    assert all(max(part.shape) <= 32 for part in build(small, 0).crop(image, 0, 0) if part.ndim == 3)
    assert small.eval_view.size <= 32


@pytest.mark.parametrize("name", ["masked", "masked, grid", "masked, target", "masked, blocks"])
def test_masks_and_targets_belong_to_the_image(photos, name):
    cfg = KINDS[name]
    views, images, index = build(cfg, 4), photos(6, 120, 140), np.arange(6)
    whole, part = seen(views, images, index, 2), seen(views, images[2:], index[2:], 2)
    slow, other = seen_slowly(views, images, index, 2), seen(views, images, index, 3)
    assert torch.equal(part.masks, whole.masks[2:])
    assert torch.equal(slow.masks, whole.masks)
    assert not torch.equal(other.masks, whole.masks)
    assert whole.masks.shape == (6, (48 // cfg.patch) ** 2)
    assert whole.masks.dtype == torch.bool
    assert whole.masks.sum(dim=1).tolist() == [whole.masked] * 6
    assert (whole.blocks is not None) == (name == "masked, blocks")
    if whole.blocks is not None:
        assert torch.equal(part.blocks, whole.blocks[2:])
        assert torch.equal(slow.blocks, whole.blocks)
        assert whole.masks.gather(1, whole.blocks.flatten(1)).all()
    assert len(whole.targets) == len(slow.targets) == (cfg.target is not None)
    for target, slowly in zip(whole.targets, slow.targets, strict=True):
        assert target.shape == (6, 3, 24, 24)
        assert 0 <= target.min() <= target.max() <= 1
        assert ((target - slowly).abs() * 255).mean() < 0.2
        halved = torch.nn.functional.interpolate(whole.views[0], (24, 24), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(x)[:, None, None] for x in (cfg.normalize.mean, cfg.normalize.std))
        assert (halved * std + mean - target).abs().mean() < 0.02


def test_patches_by_matrix_products_equal_those_of_a_worker(photos):
    views, images, index = build(KINDS["patches"], 4), photos(5, 120, 140), np.array([9, 2, 4, 77, 1])
    products = views.crop_by_bands(as_planes(torch.from_numpy(images)), index, 2)
    for found, wanted in zip(products, views.crop_batch(torch.from_numpy(images), index, 2), strict=True):
        assert found.shape == wanted.shape == (5, 3, 23, 23)
        assert (found.int() - wanted.int()).abs().max() <= 1


def test_rotations_are_quarter_turns_of_one_view(photos):
    found = seen(build(KINDS["rotations"], 0), photos(3, 100, 120), np.arange(3), 0).views
    for turns, view in enumerate(found):
        np.testing.assert_array_equal(view.numpy(), np.rot90(found[0].numpy(), turns, axes=(2, 3)))
    assert build(KINDS["rotations"], 0).cfg.pair() is None


def test_patches_keep_their_distance_and_use_all_of_their_room():
    cfg = Patches(resize=64, size=60, gap=3, jitter=4, grey=0.0)
    assert (cfg.cell, cfg.patch) == (20, 13)
    # every pixel says where it is, so that every patch does
    rows, columns = np.mgrid[:64, :64]
    image = np.stack([rows, columns, rows], axis=2).astype(np.uint8)
    views, shifts, squares = build(cfg, 0), set(), set()
    for index in range(60):
        corners = np.array([[int(p[0, 0, 0]), int(p[1, 0, 0])] for p in views.crop(image, index, 0)]).reshape(3, 3, 2)
        assert (np.diff(corners[..., 0], axis=0) >= cfg.patch + cfg.gap).all()
        assert (np.diff(corners[..., 1], axis=1) >= cfg.patch + cfg.gap).all()
        places = views._places(np.array([index]), 0, 64, 64)
        shifts |= set(places.down.flat) | set(places.across.flat)
        squares |= {int(places.top[0]), int(places.left[0])}
        assert corners[0, 0].tolist() == [
            places.top[0] + places.down[0, 0] + 1,
            places.left[0] + places.across[0, 0] + 1,
        ]
    assert shifts == set(range(5))
    assert squares == set(range(5))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Patches, {"size": 300}, "does not fit into an image resized to 292"),
        (Patches, {"jitter": 85}, "leave nothing of a cell of 85 pixels"),
        (Rotations, {"crop": {"repeat": 2}}, "one crop is turned four times"),
        (Masked, {"crop": {"repeat": 2}}, "one crop of each image is masked"),
        (Masked, {"crop": {"size": 100}}, r"`patch` must divide `crop.size` \(got 16 and 100\)"),
        (Masked, {"crop": {}, "mask": {"name": "grid", "cell": 24}}, "`mask.cell` must be a multiple of `patch` 16"),
        (Masked, {"crop": {}, "mask": {"name": "blocks", "patches": 196}}, "less than the 196 patches of an image"),
    ],
)
def test_what_cannot_be_cut_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_a_gpu_agrees_and_is_never_waited_for(photos, cfg):
    views, images, index = build(cfg, 4), torch.from_numpy(photos(8, 120, 140)), np.arange(8)
    want = views.crop_batch(images, index, 0)
    resident = images.cuda()

    def on_the_gpu():
        crops = views.crop_batch(resident, index, 0)
        return crops, views.arrange(views.finish([crop.cuda(non_blocking=True) for crop in want], index, 0), index, 0)

    on_the_gpu()  # first use may wait while it loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops, found = on_the_gpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for crop, expected in zip(crops, want, strict=True):
        assert (crop.cpu().int() - expected.int()).abs().max() <= 4
    for view, expected in zip(found.views, views.arrange(views.finish(want, index, 0), index, 0).views, strict=True):
        assert (view.cpu() - expected).abs().mean() < 1e-3
