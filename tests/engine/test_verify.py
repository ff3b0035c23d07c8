"""Small copies of presets, on which `ssl verify resume` proves its promise."""

import numpy as np
import pytest

from sslcli.config.load import load
from sslcli.engine.verify import small_copy
from sslcli.views import build


@pytest.mark.parametrize(
    ("name", "overrides", "side"),
    [
        ("mae-vith14-1600e", (), 28),
        ("ijepa-vith14-300e", (), 28),
        ("mae-vitb16-300e", (), 32),
        ("dino-vits16-100e", ("backbone.patch=14", "views.groups.1.size=98"), 28),
        ("dino-vits16-100e", ("backbone.patch=56", "views.groups.1.size=112"), 56),
        ("simclr-r50-200e", (), 32),
        ("relative-loc-r50-70e", (), 32),
    ],
)
def test_a_small_copy_is_of_whole_patches(name: str, overrides: tuple[str, ...], side: int):
    small = small_copy(load("pretrain", name, overrides).preset, steps=4, ranks=1)
    assert small.data.source.size == side
    assert getattr(small.backbone, "image_size", side) == side
    assert small.views.eval_view.size == side
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    crop = build(small.views, 0).crop(image, 3, 0)[0]
    assert crop.shape[1] <= side
    if small.views.name == "masked":
        assert crop.shape[1] % small.views.patch == 0
