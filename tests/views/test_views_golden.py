"""Views against recordings of torchvision, Pillow and mmselfsup; the README beside the recordings has the origins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sslcli.config.views import CropGroup, EvalView, Jitter, Normalize, Patches, Rotations
from sslcli.views import build, build_eval, colour, reference
from sslcli.views.params import HUE, NOTHING, Boxes, Colours, boxes, colours
from sslcli.views.patches import corners, cut
from sslcli.views.resize import as_planes, resize_by_bands, resize_crop, shorter_side

pytestmark = pytest.mark.golden

Recording = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def recorded(golden: Path) -> Callable[[str], Recording]:
    def load(name: str) -> Recording:
        with np.load(golden / "augmentations" / f"{name}.npz") as file:
            return dict(file)

    return load


def draws(**changes: Any) -> Colours:
    """The draws of one crop to which only this happens."""
    nothing: dict[str, Any] = {
        "grey_first": False,
        "order": [NOTHING] * 4,
        "factors": np.ones(4, dtype=np.float32),
        "grey": False,
        "blur": False,
        "sigma": np.float32(1),
        "solarize": False,
        "threshold": np.float32(128),
    }
    return Colours(**{name: np.asarray(value)[None] for name, value in (nothing | changes).items()})


def fast(image: np.ndarray, what: Colours) -> np.ndarray:
    crops = torch.from_numpy(image).permute(2, 0, 1)[None]
    return colour.recolour(crops, what)[0].permute(1, 2, 0).numpy()


def slow(image: np.ndarray, what: Colours) -> np.ndarray:
    return np.asarray(reference.recoloured(Image.fromarray(image), what))


def largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["down", "full", "identity", "mixed_nonsq", "tiny_crop", "up"])
def test_resized_crop(recorded, name, interpolation, mirrored):
    case = recorded(f"resized_crop_{name}")
    image, size = case["image"], int(case["size"][0])
    want = case[f"pil_{interpolation}"].transpose(2, 0, 1)
    want = want[:, :, ::-1] if mirrored else want
    box = Boxes(*(case[key].reshape(1) for key in "ijhw"), np.array([mirrored]))
    tolerance, other_pillow = (1, 2) if interpolation == "bilinear" else (4, 7)
    assert largest(resize_crop(image, box, 0, size, interpolation), want) <= tolerance
    batched = resize_by_bands(as_planes(torch.from_numpy(image)[None]), box, size, interpolation)
    assert largest(batched[0].numpy(), want) <= tolerance
    seen = reference.resized_crop(Image.fromarray(image), box, size, interpolation)
    assert largest(np.asarray(seen).transpose(2, 0, 1), want) <= other_pillow


@pytest.mark.parametrize("name", ["bicubic_lanczos", "bilinear_lanczos"])
def test_a_crop_at_two_sizes(recorded, name):
    """The views of CAE: the network's, and half as large with another filter for the tokenizer."""
    case = recorded(f"twopic_{name}")
    top, left, height, width = (np.array([edge]) for edge in case["i_j_h_w"])
    box = Boxes(top, left, height, width, np.array([False]))
    for wanted, how in ((case["out1"], name.split("_")[0]), (case["out2"], "lanczos")):
        want, size = wanted.transpose(2, 0, 1), len(wanted)
        tolerance, other_pillow = (1, 2) if how == "bilinear" else (6, 7)
        assert largest(resize_crop(case["image"], box, 0, size, how), want) <= tolerance
        batched = resize_by_bands(as_planes(torch.from_numpy(case["image"])[None]), box, size, how)
        assert largest(batched[0].numpy(), want) <= tolerance
        seen = reference.resized_crop(Image.fromarray(case["image"]), box, size, how)
        assert largest(np.asarray(seen).transpose(2, 0, 1), want) <= other_pillow


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["h97w130", "odd", "pad"])
def test_resize_and_centre_crop(recorded, name, interpolation):
    case = recorded(f"resize_centercrop_{name}")
    look = build_eval(EvalView(resize=int(case["resize"]), size=int(case["crop"]), interpolation=interpolation))
    want = case[f"out_{interpolation}"].transpose(2, 0, 1)
    # PIL takes the bounds of what is kept in single precision: one level where a sum lies half-way.
    assert largest(look.crop(case["image"]), want) <= 1
    assert largest(look.crop_by_bands(as_planes(torch.from_numpy(case["image"])[None]))[0].numpy(), want) <= 1


def test_size_after_resizing_the_shorter_side(golden):
    table = json.loads((golden / "augmentations" / "resize_shorter_side_table.json").read_text())
    for height, width, size, *resized in table["rows"]:
        assert shorter_side(height, width, size) == tuple(resized)


@pytest.mark.parametrize("file", ["brightness_contrast", "saturation_hue", "hue_small", "gray_input"])
def test_one_adjustment(recorded, file):
    case = recorded(f"color_{file}")
    compared = 0
    for operation, name in enumerate(["brightness", "contrast", "saturation", "hue"]):
        for factor, want in zip(case.get(f"{name}_factors", []), case.get(f"{name}_pil", []), strict=True):
            order, factors = np.full(4, NOTHING), np.ones(4, dtype=np.float32)
            order[2], factors[operation] = operation, factor
            what = draws(order=order, factors=factors)
            assert largest(slow(case["image"], what), want) == 0
            assert largest(fast(case["image"], what), want) <= (1 if operation == HUE else 0)
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("name", ["o0123", "o1302", "o2031", "o3210", "only_hue"])
def test_jitter_in_every_order(recorded, name):
    case = recorded(f"color_jitter_{name}")
    factors = case["factors_b_c_s_h"]
    order = np.where(np.isnan(factors[case["order"]]), NOTHING, case["order"])
    what = draws(order=order, factors=np.nan_to_num(factors).astype(np.float32))
    assert largest(slow(case["image"], what), case["pil"]) == 0
    assert largest(fast(case["image"], what), case["pil"]) <= 1


@pytest.mark.parametrize("name", ["china", "flower", "random"])
@pytest.mark.parametrize("when", ["grey_first", "grey"])
def test_grey(recorded, name, when):
    case = recorded(f"grayscale_{name}")
    what = draws(**{when: True})
    assert largest(slow(case["image"], what), case["pil"]) == 0
    assert largest(fast(case["image"], what), case["pil"]) == 0


@pytest.mark.parametrize("name", ["china", "ramp", "mmselfsup_china128", "mmselfsup_ramp128", "mmselfsup_ramp255"])
def test_solarize(recorded, name):
    case = recorded(f"solarize_{name}")
    if "threshold" in case:
        wanted = {int(case["threshold"]): case["out"]}
    else:
        wanted = {int(threshold): case[f"pil_{threshold}"] for threshold in case["thresholds"]}
    for threshold, want in wanted.items():
        what = draws(solarize=True, threshold=np.float32(threshold))
        assert largest(slow(case["image"], what), want) == 0
        assert largest(fast(case["image"], what), want) == 0


@pytest.mark.parametrize("name", ["china32", "flower24x40", "impulse", "step"])
def test_blur(recorded, name):
    case = recorded(f"gaussian_blur_{name}")
    for sigma in case["sigmas"]:
        what = draws(blur=True, sigma=np.float32(sigma))
        assert largest(slow(case["image"], what), case[f"pil_radius_{sigma}"]) == 0
        assert largest(fast(case["image"], what), case[f"pil_radius_{sigma}"]) <= 2


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_blur_of_mmselfsup(recorded, name):
    case = recorded(f"blur_mmselfsup_{name}")
    what = draws(blur=True, sigma=case["sigma"].astype(np.float32))
    assert largest(slow(case["image"], what), case["out"]) == 0
    assert largest(fast(case["image"], what), case["out"]) <= 2


@pytest.mark.parametrize("name", ["imagenet", "half", "clip"])
def test_standardisation(recorded, name):
    case = recorded(f"normalize_{name}")
    normalize = Normalize(mean=tuple(case["mean"]), std=tuple(case["std"]))
    want = case["normalized_f32"]
    pixels = torch.from_numpy(case["image"]).permute(2, 0, 1)[None]
    # Values reach 3 in size, so 1e-6 is a few units in the last place of float32.
    np.testing.assert_allclose(colour.finish(pixels, draws(), normalize)[0].numpy(), want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        reference.standardised(Image.fromarray(case["image"]), normalize), want, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["extreme_aspect_i100x600", "i256_s02", "i375x500_s008", "i500x333_s005_014", "simmim_i375x500_s067"]
)
def test_where_crops_fall(recorded, name):
    case = recorded(f"rrc_sampling_tv_{name}")
    height, width = int(case["H"]), int(case["W"])
    group = CropGroup(scale=tuple(case["scale"]), ratio=tuple(case["ratio"]))
    drawn = boxes(1, 0, 0, np.arange(100_000), group, height, width)
    area, log_ratio = drawn.height * drawn.width / (height * width), np.log(drawn.width / drawn.height)
    assert area.mean() == pytest.approx(case["mean_area"], abs=0.005)
    assert area.std() == pytest.approx(case["std_area"], abs=0.005)
    assert log_ratio.mean() == pytest.approx(case["mean_log_ratio"], abs=0.005)
    assert log_ratio.std() == pytest.approx(case["std_log_ratio"], abs=0.005)
    whole = (drawn.height == height) & (drawn.width == width)
    assert whole.mean() == pytest.approx(case["frac_full_image"], abs=0.003)
    for key, values in {"area": area, "log_ratio": log_ratio, "h": drawn.height, "w": drawn.width}.items():
        assert variation(values, case[f"{key}_hist"], case[f"{key}_edges"]) < 0.03
    for key, place, room in (("i", drawn.top, height - drawn.height), ("j", drawn.left, width - drawn.width)):
        some = room > 20
        assert variation(place[some] / room[some], case[f"rel_{key}_hist"], case["rel_edges"]) < 0.03


@pytest.mark.parametrize(
    ("name", "strengths", "tolerance"),
    [
        ("moco", (0.4, 0.4, 0.4, 0.1), 0.03),
        ("simclr", (0.8, 0.8, 0.8, 0.2), 0.03),
        ("clip_at_zero", (1.5, 0, 0, 0), 0.05),
    ],
)
def test_how_jitter_is_drawn(recorded, name, strengths, tolerance):
    case = recorded(f"color_jitter_sampling_{name}")
    brightness, contrast, saturation, hue = strengths
    jitter = Jitter(p=1, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    drawn = colours(1, 0, 0, np.arange(100_000), CropGroup(jitter=jitter))
    for operation, key in enumerate(["brightness", "contrast", "saturation", "hue"]):
        if strengths[operation] > 0:
            values = drawn.factors[:, operation]
            assert variation(values, case[f"{key}_hist"], case[f"{key}_edges"]) < tolerance
    if all(strengths):
        codes = drawn.order @ np.array([64, 16, 4, 1])
        counts = np.array([(codes == code).mean() for code in case["order_codes_base4"]])
        assert np.abs(counts - case["order_counts"] / case["order_counts"].sum()).sum() / 2 < tolerance


def variation(values: np.ndarray, histogram: np.ndarray, edges: np.ndarray) -> float:
    """Total variation between a sample and a recorded histogram."""
    counts = np.histogram(values, edges)[0]
    return float(np.abs(counts / counts.sum() - histogram / histogram.sum()).sum() / 2)


@pytest.mark.parametrize("name", ["rotation_china20", "rotation_flower16", "rotation_odd7"])
def test_quarter_turns(golden, name):
    case = np.load(golden / "pretext" / f"{name}.npz")
    views = build(Rotations(crop=CropGroup(size=len(case["image"]))), 0)
    image = torch.from_numpy(case["image"]).permute(2, 0, 1)[None]
    for turns, turned in enumerate(views.arrange([image], np.array([0]), 0).views):
        assert case["labels"][turns] == turns
        np.testing.assert_array_equal(turned[0].numpy(), case[f"mmselfsup_rot{turns}"])
        np.testing.assert_array_equal(turned[0].permute(1, 2, 0).numpy(), case[f"rotnet_rot{turns}"])


@pytest.mark.parametrize("name", ["relative_loc_sq96", "relative_loc_sq99", "relative_loc_sq255"])
def test_patches_of_a_square(golden, name):
    case = np.load(golden / "pretext" / f"{name}.npz")
    image, shifts = case["image"], case["crop_i_j_h_w"]
    side = len(image)
    cfg = Patches(resize=side, size=side, jitter=21)
    assert shifts[:, 2:].tolist() == [[cfg.patch, cfg.patch]] * 9
    found = cut(image, corners(cfg.cell, shifts[:, 0], shifts[:, 1]), cfg.patch)
    np.testing.assert_array_equal(np.stack(found), case["patches"])
    if "pairs" in case.files:
        neighbours = [patch for number, patch in enumerate(found) if number != 4]
        pairs = [np.concatenate([patch, found[4]], axis=2).transpose(2, 0, 1) for patch in neighbours]
        np.testing.assert_array_equal(np.stack(pairs), case["pairs"])


def test_the_reference_exchanges_height_and_width(golden):
    """Only for images that are not square, which `Patches` never cuts: what lies outside is black there."""
    case = np.load(golden / "pretext" / "relative_loc_nonsq_w120_h96.npz")
    image, shifts = case["image"], case["crop_i_j_h_w"]
    tall, wide = image.shape[1] // 3, image.shape[0] // 3  # exchanged
    padded = np.pad(image, ((0, 200), (0, 200), (0, 0)))
    for number, (down, across, height, width) in enumerate(shifts.tolist()):
        assert (height, width) == (tall - 21, wide - 21)
        top, left = tall * (number // 3) + down, wide * (number % 3) + across
        np.testing.assert_array_equal(padded[top : top + height, left : left + width], case["patches"][number])
