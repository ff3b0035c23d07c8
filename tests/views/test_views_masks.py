"""Masks as the authors' code draws them, given its random numbers."""

import json
from random import Random

import numpy as np
import pytest
import torch

from sslcli.config.views import BlockMask, GridMask, MultiBlockMask, RandomMask, block_size
from sslcli.views.masks import (
    block_mask,
    block_sizes,
    draw_blocks,
    draw_masks,
    grid_masks,
    multiblock_masks,
    random_masks,
    ranks,
)

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


IJEPA = {
    "patch_size": 16, "enc_mask_scale": (0.2, 0.8), "pred_mask_scale": (0.2, 0.8), "aspect_ratio": (0.3, 3.0),
    "nenc": 1, "npred": 2, "min_keep": 4, "allow_overlap": False,
}  # fmt: skip
"""What the authors' sampler assumes where nothing else is said."""


def theirs(words, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and targets of the next image at a step, from torch's numbers as the authors draw them."""
    height, width = (side // words["patch_size"] for side in words["input_size"])
    generator = torch.Generator().manual_seed(step)
    u, v = (torch.rand(1, generator=generator).item() for _ in range(2))
    return multiblock_masks(
        lambda end: int(torch.randint(0, end, (1,))),
        height,
        width,
        target=block_size(u, words["pred_mask_scale"], words["aspect_ratio"], height, width),
        context=block_size(v, words["enc_mask_scale"], (1.0, 1.0), height, width),
        targets=words["npred"],
        contexts=words["nenc"],
        more_than=words["min_keep"],
        overlap=words["allow_overlap"],
    )


@pytest.mark.golden
@pytest.mark.parametrize("name", ["default16", "small", "vith14"])
def test_block_sizes_are_ijepas(golden, name):
    case = np.load(golden / "ijepa" / f"block_size_table_{name}.npz")
    words = {**IJEPA, **json.loads(str(case["meta"]))}
    height, width = (side // words["patch_size"] for side in words["input_size"])
    for u, *sizes in case["table"].tolist():
        target = block_size(u, words["pred_mask_scale"], words["aspect_ratio"], height, width)
        assert [*target, *block_size(u, words["enc_mask_scale"], (1.0, 1.0), height, width)] == sizes


@pytest.mark.golden
@pytest.mark.parametrize("name", ["nonsq", "overlap_small", "vit16_default", "vith14"])
def test_contexts_and_targets_are_ijepas(golden, name):
    """Patch by patch for their seed; their contexts are cut to the smallest of the batch."""
    case = np.load(golden / "ijepa" / f"multiblock_masks_{name}.npz")
    words = {**IJEPA, **json.loads(str(case["meta"]))}
    torch.manual_seed(int(case["global_seed"]))
    for step in range(int(case["steps"])):
        drawn = [theirs(words, step) for _ in range(int(case["batch"]))]
        least = min(int(context.sum()) for contexts, _ in drawn for context in contexts)
        for image, (contexts, targets) in enumerate(drawn):
            found = [np.flatnonzero(context)[:least] for context in contexts]
            np.testing.assert_array_equal(found, case[f"enc{step}"][:, image])
            np.testing.assert_array_equal([np.flatnonzero(target) for target in targets], case[f"pred{step}"][:, image])


@pytest.mark.golden
@pytest.mark.parametrize(("name", "seed"), [("vith14", 0), ("default16", 1), ("overlap", 2)])
def test_contexts_and_targets_lie_where_ijepas_do(golden, name, seed):
    """One image in each of many steps."""
    case = np.load(golden / "ijepa" / f"multiblock_stats_{name}.npz")
    words = {**IJEPA, **json.loads(str(case["meta"]))}
    torch.manual_seed(seed)
    drawn = [theirs(words, step) for step in range(int(case["n"]))]
    contexts, targets = (np.stack([part[number] for part in drawn]) for number in (0, 1))  # (n, E or T, h, w)
    np.testing.assert_array_equal(contexts[:, 0].sum(axis=(1, 2)), case["context_sizes"])
    np.testing.assert_allclose(contexts.mean(axis=(0, 1)), case["context_freq"], atol=1e-9)
    np.testing.assert_allclose(targets.mean(axis=(0, 1)), case["target_freq"], atol=1e-9)
    assert (contexts[:, 0] & targets.any(axis=1)).sum() == case["overlap_total"]


BLOCKS_14 = MultiBlockMask()


def test_blocks_are_a_function_of_seed_epoch_and_image():
    masks, blocks = draw_blocks(BLOCKS_14, 7, 2, np.arange(30), 14)
    for image in (0, 29):
        for found, wanted in zip(draw_blocks(BLOCKS_14, 7, 2, np.array([image]), 14), (masks, blocks), strict=True):
            np.testing.assert_array_equal(found[0], wanted[image])
    np.testing.assert_array_equal(draw_masks(BLOCKS_14, 7, 2, np.arange(30)[::-1], 224, 16), masks[::-1])
    for others in (draw_blocks(BLOCKS_14, 8, 2, np.arange(30), 14), draw_blocks(BLOCKS_14, 7, 3, np.arange(30), 14)):
        assert not any(np.array_equal(one, other) for one, other in zip(masks, others[0], strict=True))


def test_blocks_of_an_epoch_are_equally_large_and_contexts_lack_targets():
    seen = set()
    for epoch in range(12):
        sizes = block_sizes(BLOCKS_14, 0, epoch, 14)
        masks, blocks = draw_blocks(BLOCKS_14, 0, epoch, np.arange(20), 14)
        assert set((~masks).sum(axis=1)) == {sizes.visible}
        assert blocks.shape == (20, 4, sizes.target[0] * sizes.target[1])
        assert np.take_along_axis(masks, blocks.reshape(20, -1), axis=1).all()
        seen.add(sizes.target)
    assert len(seen) > 2  # another size in another epoch


def test_contexts_are_as_long_as_the_smallest_of_a_batch():
    """About as many images have shorter contexts, and are drawn again, as `among` says; few are cut a lot."""
    one, many = MultiBlockMask(among=4), MultiBlockMask(among=128)
    lengths = [[block_sizes(cfg, 0, epoch, 14).visible for epoch in range(12)] for cfg in (one, many)]
    assert sum(lengths[0]) > sum(lengths[1])
    assert all(few >= much > 10 for few, much in zip(*lengths, strict=True))


def test_blocks_that_are_never_large_enough_are_refused():
    with pytest.raises(ValueError, match="never have more than 9"):
        multiblock_masks(Random(0).randrange, 8, 8, target=(3, 3), context=(7, 7), targets=1, more_than=9)
