"""Fixed positions equal to those of MAE and MoCo v3."""

import numpy as np
import pytest
import torch

from sslcli.nn.positions import sincos_positions


@pytest.mark.golden
@pytest.mark.parametrize("name", ["d12_g3_cls0", "d16_g7_cls1", "d32_g4_cls1"])
def test_mae(golden, name):
    case = np.load(golden / "positions" / f"mae_pos_embed_{name}.npz")
    side, prefix = int(case["grid_size"]), int(case["cls_token"])
    found = sincos_positions(int(case["embed_dim"]), side, side, first="column", prefix=prefix)
    np.testing.assert_allclose(found, case["pos_embed"], rtol=0, atol=1e-7)


@pytest.mark.golden
def test_full_table_of_mae(golden):
    case = np.load(golden / "positions" / "mae_pos_embed_full_d768_g14_rows.npz")
    assert_rows(sincos_positions(768, 14, 14, first="column", prefix=1), case, atol=1e-7)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["d12_g7x7", "d16_g4x4", "d32_g8x8"])
def test_mocov3(golden, name):
    case = np.load(golden / "positions" / f"mocov3_pos_embed_{name}.npz")
    height, width = case["grid_hw"]
    found = sincos_positions(int(case["embed_dim"]), int(height), int(width), first="row", prefix=1)
    np.testing.assert_allclose(found, case["pos_embed"], rtol=0, atol=1e-6)


@pytest.mark.golden
def test_full_table_of_mocov3(golden):
    case = np.load(golden / "positions" / "mocov3_pos_embed_vit_small_rows.npz")
    assert_rows(sincos_positions(384, 14, 14, first="row", prefix=1), case, atol=1e-6)


def assert_rows(table: torch.Tensor, case: np.lib.npyio.NpzFile, atol: float) -> None:
    assert tuple(table.shape) == tuple(case["shape"])
    np.testing.assert_allclose(table[case["rows"]], case["values"], rtol=0, atol=atol)
    np.testing.assert_allclose(table.double().sum(1), case["row_sums"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(table.double().sum(0), case["col_sums"], rtol=0, atol=1e-4)


def test_each_half_knows_one_coordinate():
    table = sincos_positions(8, 2, 5, first="row").unflatten(0, (2, 5))  # (rows, columns, channels)
    assert (table[:, :, :4] == table[:, :1, :4]).all()
    assert (table[:, :, 4:] == table[:1, :, 4:]).all()
    assert len(table.flatten(0, 1).unique(dim=0)) == 10
    swapped = sincos_positions(8, 2, 5, first="column").unflatten(0, (2, 5))
    assert torch.equal(swapped, table.roll(4, dims=2))


def test_class_tokens_have_no_place():
    table = sincos_positions(12, 3, 3, first="row", prefix=2)
    assert table.dtype == torch.float32
    assert (table[:2] == 0).all()
    assert torch.equal(table[2:], sincos_positions(12, 3, 3, first="row"))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a multiple of 4 channels"):
        sincos_positions(6, 2, 2, first="row")
