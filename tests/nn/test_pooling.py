"""Maps as about 9,000 values: the published windows, and a grid for everything else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sslcli.errors import UserError
from sslcli.nn.pooling import STAGES, as_vectors, in_grid, in_windows, to_9k
from sslcli.nn.taps import Tap, parse_tap

SIDES = (12, 6, 4, 3, 2)
"""Windows a side that cover the maps of the stages and give about as many values."""


@pytest.mark.golden
@pytest.mark.parametrize("case", ["s1234", "s4_odd"])
def test_windows_and_grids_equal_mmselfsup(golden: Path, case: str):
    for kind in ("specified", "adaptive"):
        with np.load(golden / "pooling" / f"multi_pooling_{kind}_{case}.npz") as recorded:
            for stage in recorded["indices"].tolist():
                maps = torch.from_numpy(recorded[f"in{stage}"])
                found = in_windows(maps, stage) if kind == "specified" else in_grid(maps, SIDES[stage])
                np.testing.assert_allclose(found.numpy(), recorded[f"out{stage}"], atol=1e-6)


def test_a_resnet50_gives_the_published_sizes():
    for number, (channels, side) in enumerate(STAGES):
        maps = torch.rand(1, channels, side, side)
        found = to_9k(maps)
        assert found.shape[1] == (9216, 9216, 8192, 9216, 8192)[number]
        assert torch.equal(found, in_windows(maps, number).flatten(1))


@pytest.mark.parametrize(("shape", "values"), [((512, 7, 7), 8192), ((384, 14, 14), 6144), ((512, 2, 3), 3072)])
def test_other_maps_are_pooled_to_no_more(shape: tuple[int, int, int], values: int):
    assert to_9k(torch.rand(2, *shape)).shape == (2, values)


def test_taps_say_what_becomes_of_maps():
    assert parse_tap("layer4") == Tap("layer4", False, False)
    assert parse_tap("layer4@9k") == Tap("layer4", True, False)
    assert parse_tap("blocks.11+flip") == Tap("blocks.11", False, True)
    assert parse_tap("layer4@9k+flip") == Tap("layer4", True, True)
    maps = torch.rand(2, 3, 4, 4)
    assert torch.equal(as_vectors(maps, "layer4", many=False), maps.mean((2, 3)))
    with pytest.raises(UserError, match="`pooled` gives vectors"):
        as_vectors(torch.rand(2, 3), "pooled", many=True)
