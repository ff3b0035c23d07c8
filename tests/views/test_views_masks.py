"""Masks as the authors' code draws them, given its random numbers."""

import json
from random import Random

import numpy as np
import pytest

from sslcli.config.views import BlockMask, GridMask, RandomMask
from sslcli.views.masks import block_mask, draw_masks, grid_masks, random_masks, ranks

MAE = [f"random_masking_{name}" for name in (
    "n1_l16_r000", "n2_l10_r075", "n2_l16_r075", "n2_l100_r090_fpfloor", "n3_l49_r060", "n4_l196_r075",
)]  # fmt: skip
SIMMIM = ["ratio_tiny", "same_patch", "swin192", "vit224"]
STOPS, GOES_ON = {"exact": False}, {"exact": True}
BLOCKS = {
    "generator_beit_unilm_14_75": (75, 16, STOPS),
    "generator_beit_unilm_14_98": (98, 16, STOPS),
    "generator_beit_unilm_8_40_min4": (40, 4, STOPS),
    "generator_block_cae_14_75": (75, 16, GOES_ON),
    "generator_block_cae_14_98": (98, 16, GOES_ON),
    "generator_block_cae_7_20_max6": (20, 2, {"most": 6, "exact": True}),
    "generator_mmselfsup_beit_14_75": (75, 16, GOES_ON),
    "generator_mmselfsup_default": (78, 15, STOPS),
    "generator_mmselfsup_r060_min10": (117, 10, STOPS),
    "generator_slowfast_w14_m78": (78, 15, STOPS),
    "generator_slowfast_w14_m98_min16": (98, 16, STOPS),
    "generator_slowfast_w7_m20_max8": (20, 4, {"most": 8, "exact": False}),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", MAE)
def test_random_masks_are_maes(golden, name):
    case = np.load(golden / "masks" / f"{name}.npz")
    np.testing.assert_array_equal(ranks(case["noise"]), case["ids_restore"])
    found = random_masks(case["noise"], float(case["mask_ratio"]))
    np.testing.assert_array_equal(found, case["mask"].astype(bool))
    assert (~found).sum(axis=1).tolist() == [int(case["len_keep"])] * len(found)


@pytest.mark.golden
def test_visible_patches_are_rounded_down_as_floats_are(golden):
    for length, ratio, kept in json.loads((golden / "masks" / "len_keep_table.json").read_text())["rows"]:
        assert (~random_masks(np.random.default_rng(0).random((1, length)), ratio)).sum() == kept, (length, ratio)


@pytest.mark.golden
@pytest.mark.parametrize("name", SIMMIM)
def test_grid_masks_are_simmims(golden, name):
    case = np.load(golden / "masks" / f"mask_generator_{name}.npz")
    words = json.loads(str(case["meta"]))
    found = grid_masks(case["permutations"], words["mask_ratio"], scale=int(case["scale"]))
    np.testing.assert_array_equal(found.reshape(case["masks"].shape), case["masks"].astype(bool))


@pytest.mark.golden
@pytest.mark.parametrize("name", BLOCKS)
def test_block_masks_are_the_authors(golden, name):
    """Mask by mask for their seeds; and how often which number is hidden, in many draws from one seed."""
    case = np.load(golden / "masks" / f"mask_{name}.npz")
    count, least, more = BLOCKS[name]
    height, width = case["masks"].shape[1:]
    for seed, wanted in zip(case["seeds"], case["masks"], strict=True):
        found = block_mask(Random(int(seed)), height, width, count=count, least=least, **more)
        np.testing.assert_array_equal(found, wanted.astype(bool))
    draw, often = Random(12345), np.zeros_like(case["stat_count_hist"])
    for _ in range(int(case["stat_n"])):
        often[block_mask(draw, height, width, count=count, least=least, **more).sum()] += 1
    np.testing.assert_array_equal(often, case["stat_count_hist"])


@pytest.mark.golden
@pytest.mark.parametrize("name", ["block_14_03_02", "block_6x8_start"])
def test_block_masks_are_ibots(golden, name):
    """Its number of patches has a fraction, and its least area depends on the shape of the grid."""
    case = np.load(golden / "masks" / f"mask_sampler_{name}.npz")
    words = json.loads(str(case["meta"]))
    height, width = case["masks"].shape[2:]
    for seed, wanted in zip(case["seeds"], case["masks"], strict=True):
        draw, spread = Random(int(seed)), words["pred_ratio_var"]
        ratio = draw.uniform(words["pred_ratio"] - spread, words["pred_ratio"] + spread) if spread else 0.4
        count, least = ratio * height * width, (min(height, width) // 3) ** 2
        found = block_mask(draw, height, width, count=0 if "start" in name else count, least=least)
        np.testing.assert_array_equal(found, wanted[0])


@pytest.mark.golden
def test_shuffled_masks_are_caes(golden):
    case = np.load(golden / "masks" / "mask_generator_random_cae_14_050.npz")
    for seed, wanted in zip(case["seeds"], case["masks"], strict=True):
        places = np.random.RandomState(seed).permutation(196)  # numpy shuffles a range as it shuffles a mask
        np.testing.assert_array_equal(random_masks(places[None], 0.5)[0], wanted.astype(bool))


KINDS = [RandomMask(), GridMask(cell=8), BlockMask(patches=30, least=4, exact=True), BlockMask(patches=30, least=4)]


@pytest.mark.parametrize("cfg", KINDS, ids=["random", "grid", "exact", "blocks"])
def test_a_mask_is_a_function_of_seed_epoch_and_image(cfg):
    together = draw_masks(cfg, 7, 2, np.arange(40), 32, 4)
    assert together.shape == (40, 64)
    for image in (0, 39):
        np.testing.assert_array_equal(draw_masks(cfg, 7, 2, np.array([image]), 32, 4)[0], together[image])
    np.testing.assert_array_equal(draw_masks(cfg, 7, 2, np.arange(40)[::-1], 32, 4), together[::-1])
    others = [together, draw_masks(cfg, 8, 2, np.arange(40), 32, 4), draw_masks(cfg, 7, 3, np.arange(40), 32, 4)]
    assert len({row.tobytes() for each in others for row in each}) > 100
    counts = set(together.sum(axis=1).tolist())
    assert counts == {cfg.count(32, 4)} if cfg.count(32, 4) is not None else len(counts) > 1


def test_how_many_are_hidden_and_where():
    drawn = draw_masks(RandomMask(), 0, 0, np.arange(2000), 32, 4)
    assert set(drawn.sum(axis=1)) == {48}
    np.testing.assert_allclose(drawn.mean(axis=0), 0.75, atol=0.05)
    drawn = draw_masks(GridMask(), 0, 0, np.arange(2000), 192, 4)
    assert set(drawn.sum(axis=1)) == {22 * 64}
    cells = drawn.reshape(-1, 6, 8, 6, 8)
    assert (cells == cells[:, :, :1, :, :1]).all()
    np.testing.assert_allclose(cells[:, :, 0, :, 0].mean(axis=0), 22 / 36, atol=0.05)
    assert set(draw_masks(BlockMask(exact=True), 0, 0, np.arange(50), 224, 16).sum(axis=1)) == {75}
    assert max(draw_masks(BlockMask(), 0, 0, np.arange(50), 224, 16).sum(axis=1)) == 75
