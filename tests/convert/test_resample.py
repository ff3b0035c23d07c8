"""Positions resampled as the reference implementations do it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sslcli.convert._resample import absolute, fitted, relative

GOLDEN = Path(__file__).parents[1] / "golden" / "resample"


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("relpos_interp_swin_*.npz")), ids=lambda p: p.stem)
def test_relative_biases_of_swin(path: Path):
    case = np.load(path)
    found = relative(torch.from_numpy(case["table_in"]), 2 * int(case["dst_window"]) - 1, extra=0)
    np.testing.assert_allclose(found.numpy(), case["table_out"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("relpos_interp_vit_*.npz")), ids=lambda p: p.stem)
def test_relative_biases_of_beit(path: Path):
    case = np.load(path)
    found = relative(torch.from_numpy(case["table_in"]), 2 * int(case["dst_grid"]) - 1, extra=3)
    np.testing.assert_allclose(found.numpy(), case["table_out"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("interpolate_pos_embed_*.npz")), ids=lambda p: p.stem)
def test_positions(path: Path):
    case = np.load(path)
    found = absolute(torch.from_numpy(case["pos_embed_in"]), int(case["new_grid"]), extra=int(case["num_extra_tokens"]))
    np.testing.assert_allclose(found.numpy(), case["pos_embed_out"], atol=1e-6)


def test_what_differs_in_size_alone_is_resampled_and_said():
    table, positions = torch.rand(81, 2), torch.rand(1, 17, 8)
    wanted = {"layers.0.x.relative_position_bias_table": torch.empty(49, 2), "pos_embed": torch.empty(1, 50, 8),
              "w": torch.empty(3), "other.pos_embed": torch.empty(1, 50, 9)}  # fmt: skip
    given = {"layers.0.x.relative_position_bias_table": table, "pos_embed": positions, "w": torch.rand(2),
             "other.pos_embed": positions}  # fmt: skip
    found, notes = fitted(given, wanted)
    assert found["layers.0.x.relative_position_bias_table"].shape == (49, 2)
    assert torch.equal(found["pos_embed"][:, :1], positions[:, :1])
    assert found["pos_embed"].shape == (1, 50, 8)
    assert found["w"].shape == (2,)
    assert found["other.pos_embed"] is positions
    assert notes == [
        "relative position biases resampled from 5 x 5 to 4 x 4",
        "positions resampled from 4 x 4 to 7 x 7",
    ]
