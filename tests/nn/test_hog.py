"""Histograms of oriented gradients equal to those of SlowFast and MMSelfSup."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli.nn.hog import cells_of_patches, gaussian, hog

CASES = [
    "hog_mmselfsup_china112_gw0",
    "hog_mmselfsup_china112_gw16",
    "hog_mmselfsup_flower224_gw16",
    "hog_slowfast_china112_pool8_gw0",
    "hog_slowfast_china112_pool8_gw16",
    "hog_slowfast_const_and_steps16",
    "hog_slowfast_crops32_pool4_n6_gw8",
    "hog_slowfast_crops32_pool8_gw0",
    "hog_slowfast_impulse_and_ramp8",
    "hog_slowfast_noise28_pool7_default",
]


def images_in(case: np.lib.npyio.NpzFile) -> Tensor:
    if "x" in case:
        return torch.from_numpy(case["x"])
    pixels = torch.from_numpy(case["images_u8"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.from_numpy(case[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_histograms(golden: Path, name: str):
    case = np.load(golden / "maskfeat" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    found = hog(images_in(case), bins=meta["nbins"], cell=meta["pool"], window=meta.get("gaussian_window") or None)
    if "mmselfsup" in name:
        found = cells_of_patches(found, found.shape[-1] // math.isqrt(case["out"].shape[1]))
    assert found.dtype == torch.float32
    assert found.shape == case["out"].shape
    differ = np.abs(found.numpy() - case["out"]) > 1e-5
    assert differ.mean() <= 1e-3
    if "gkern" in case:
        np.testing.assert_allclose(gaussian(len(case["gkern"])).numpy(), case["gkern"], rtol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["labels_slowfast_china64_f4", "labels_slowfast_china64_f8", "labels_slowfast_two48_f3"]
)
def test_histograms_of_patches(golden: Path, name: str):
    case = np.load(golden / "maskfeat" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    cells = hog(images_in(case), bins=meta["nbins"], cell=meta["pool"])
    found = cells_of_patches(cells, cells.shape[-1] // meta["feat_size"])
    np.testing.assert_allclose(found.numpy(), case["all_tokens"], atol=1e-5)
    np.testing.assert_allclose(found[torch.from_numpy(case["mask"])].numpy(), case["masked_tokens"], atol=1e-5)


def test_an_edge_votes_for_its_own_direction():
    across = torch.arange(16.0).expand(1, 3, 16, 16)  # brightness grows from left to right
    down = across.mT
    slanted = across + down
    for images, angle in ((across, 90), (down, 0), (slanted, 45)):
        inner = hog(images, bins=9, cell=4)[0, :, :, 1:3, 1:3]
        assert torch.equal(inner.argmax(dim=1), torch.full((3, 2, 2), int(angle / 20)))
        torch.testing.assert_close(inner.amax(dim=1), torch.ones(3, 2, 2))


def test_a_flat_image_has_no_gradients():
    assert not hog(torch.full((1, 3, 8, 8), 0.3)).any()


def test_brightness_and_contrast_do_not_matter():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hog(images), hog(5 * images + 2), atol=1e-4, rtol=0)


def test_half_precision_of_the_run_does_not_reach_it():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(images), hog(images.clone()))
        inside = hog(images)
    assert torch.equal(inside, hog(images))
