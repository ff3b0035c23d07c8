"""Spread of outputs, and the smallest batch."""

import pytest
import torch

from sslcli.contracts import RunFacts
from sslcli.errors import UserError
from sslcli.nn.needs import need_two_images
from sslcli.nn.spread import spread


def test_near_one_on_the_sphere_and_zero_at_a_point():
    rows = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert spread(rows).item() == pytest.approx(1, abs=0.02)
    assert spread(7 * rows).item() == pytest.approx(spread(rows).item())  # lengths do not count
    assert spread(rows[:1].expand(8, -1)).item() == pytest.approx(0, abs=1e-6)
    assert not spread(rows.requires_grad_()).requires_grad


def test_half_precision_is_widened():
    rows = torch.randn(64, 8)
    assert spread(rows.bfloat16()).dtype == torch.float32


def test_one_image_is_not_enough():
    need_two_images(RunFacts(100, 4, 2, 25, 25), "byol")
    with pytest.raises(UserError, match="`byol` compares the images of a forward pass, which here holds only 1") as e:
        need_two_images(RunFacts(100, 4, 1, 25, 25), "byol")
    assert e.value.hint == "raise `data.batch_size`, or lower `run.accumulate`"
