"""Exchange between ranks: the same numbers as the reference implementations, and true gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli import dist

pytestmark = pytest.mark.dist


def mine(x: np.ndarray) -> Tensor:
    """This rank's share of the rows."""
    return torch.from_numpy(x).chunk(dist.world())[dist.rank()]


def shuffled(path: Path) -> None:
    case = np.load(path)
    order, x = torch.from_numpy(case["in_perm_rank0"]), mine(case["in_x"])
    seen = dist.shuffle(x, order)
    out = dist.unshuffle(seen.cumsum(0), order)  # an encoder whose output depends on what lies together
    rank = dist.rank()
    np.testing.assert_array_equal(seen.numpy(), case["out_shuffled"][rank])
    np.testing.assert_allclose(out.numpy(), case["out_unshuffled"][rank], rtol=1e-12)
    np.testing.assert_array_equal(dist.gather(x).numpy(), case["out_gathered"][rank])
    np.testing.assert_array_equal(dist.unshuffle(seen, order).numpy(), x.numpy())


@pytest.mark.golden
def test_shuffle_on_two_ranks(golden, two_ranks):
    two_ranks(shuffled, golden / "dist" / "shuffle_2.npz")


@pytest.mark.golden
def test_shuffle_on_four_ranks(golden, four_ranks):
    four_ranks(shuffled, golden / "dist" / "shuffle_4.npz")


def gathered_gradient(path: Path) -> None:
    case = np.load(path)
    x = mine(case["in_x"]).clone().requires_grad_()
    weights = torch.from_numpy(case["in_W"][dist.rank()])
    (weights * dist.gather_with_grad(x).square()).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), case["grad_vicreg_fullgatherlayer"][dist.rank()], rtol=1e-12)
    assert not dist.gather(x).requires_grad


@pytest.mark.golden
def test_gather_sums_the_gradient_of_all_ranks(golden, two_ranks):
    two_ranks(gathered_gradient, golden / "dist" / "gather_grad_2.npz")


def summed() -> tuple[float, float]:
    x = torch.tensor([2.0 + dist.rank()], dtype=torch.float64, requires_grad=True)
    loss = (dist.rank() + 1) * dist.sum_with_grad(x).square().sum()
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad.item()


def test_sum_with_grad(two_ranks):
    # the sum is 2 + 3 = 5; losses are 1 * 25 and 2 * 25; d(1 * s^2 + 2 * s^2)/dx = 6 s = 30 on both ranks
    assert two_ranks(summed) == [(25.0, 30.0), (50.0, 30.0)]


def averaged() -> list[Tensor]:
    rank = float(dist.rank())
    tensors = [torch.full((2, 3), rank), torch.tensor(10 * rank)]
    dist.mean_(tensors)
    return tensors


def test_mean_of_many_tensors_at_once(two_ranks):
    for a, b in two_ranks(averaged):
        torch.testing.assert_close(a, torch.full((2, 3), 0.5))
        assert b == 5.0


def test_alone_everything_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    order = torch.tensor([2, 0, 1])
    assert dist.gather_with_grad(x) is x
    assert dist.sum_with_grad(x) is x
    assert not dist.gather(x).requires_grad
    torch.testing.assert_close(dist.unshuffle(dist.shuffle(x, order), order), x.detach())


def fails_on_the_second() -> None:
    assert dist.rank() == 0, "as it should"


def test_the_pool_reports_failures_and_goes_on(two_ranks):
    with pytest.raises(AssertionError, match=r"rank 1 of 2:[\s\S]*as it should"):
        two_ranks(fails_on_the_second)
    assert two_ranks(averaged)
