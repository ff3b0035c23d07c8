"""The memory of all images: updates, and a loss that never lays all of it side by side."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.nn import bank as banks
from sslcli.nn.bank import Bank, contrast_with_bank, slices


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def test_starts_with_random_directions():
    rows = Bank(30, 8).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30))
    assert (rows @ rows.T).fill_diagonal_(0).abs().max() < 0.999


def test_an_update_moves_the_rows_of_the_batch_only():
    bank = Bank(10, 4).double()
    before, features = bank.rows.clone(), unit(2, 4, seed=0)
    bank.update(torch.tensor([7, 2]), features, momentum=0.8)
    expected = before.clone()
    expected[[7, 2]] = F.normalize(0.8 * before[[7, 2]] + 0.2 * features, dim=1)
    torch.testing.assert_close(bank.rows, expected)


def test_the_last_of_several_features_counts():
    bank, other = Bank(10, 4).double(), Bank(10, 4).double()
    other.load_state_dict(bank.state_dict())
    features = unit(5, 4, seed=1)
    bank.update(torch.tensor([3, 6, 3, 9, 3]), features, momentum=0.5)
    other.update(torch.tensor([6, 9, 3]), features[[1, 3, 4]], momentum=0.5)
    torch.testing.assert_close(bank.rows, other.rows)


def updated() -> Tensor:
    torch.manual_seed(0)
    bank = Bank(12, 4).double()
    index, features = torch.tensor([3, 6, 3, 9, 0, 6]), unit(6, 4, seed=2)
    rank, world = dist.rank(), dist.world()
    bank.update(index.chunk(world)[rank], features.chunk(world)[rank], momentum=0.5)
    return bank.rows


@pytest.mark.dist
def test_the_features_of_all_ranks_enter_on_every_rank(two_ranks):
    for found in two_ranks(updated):
        torch.testing.assert_close(found, updated(), rtol=0, atol=0)


def cross_entropy(logits: Tensor) -> Tensor:
    return -F.log_softmax(logits, dim=1)[:, 0]


def direct(rows: Tensor, features: Tensor, index: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    chosen = rows[torch.cat([index[:, None], negatives], dim=1)]
    return cross_entropy(torch.einsum("bkd,bd->bk", chosen, features) / temperature).mean()


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_slices_give_the_loss_and_gradient_of_the_whole(monkeypatch, rows_at_once):
    rows, index = unit(40, 6, seed=3), torch.tensor([4, 11, 30, 2, 39, 7, 7])
    negatives = torch.randint(40, (7, 9), generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(banks, "AT_ONCE", rows_at_once * 10 * 6 * 8)
    ours, theirs = (unit(7, 6, seed=5).requires_grad_() for _ in range(2))
    found = contrast_with_bank(rows, ours, index, lambda part: negatives[part], cross_entropy, 0.1)
    expected = direct(rows, theirs, index, negatives, 0.1)
    (3 * found.loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_more_than_the_limit_lies_side_by_side(monkeypatch):
    monkeypatch.setattr(banks, "AT_ONCE", 5000)
    rows, features = unit(40, 6, seed=3), unit(20, 6, seed=5)
    parts = list(slices(rows, features, torch.arange(20), lambda part: torch.zeros(20, 9).long()[part], 1.0))
    assert max(each.compared.numel() * 8 for each in parts) <= 5000
    assert [each.part.start for each in parts] == list(range(0, 20, 10))


def test_the_bank_may_change_before_the_backward_pass():
    bank, index = Bank(20, 4).double(), torch.arange(5)
    features = unit(5, 4, seed=6).requires_grad_()
    negatives = torch.arange(5, 20).expand(5, 15)
    kept = bank.rows.clone()
    found = contrast_with_bank(bank.rows, features, index, lambda part: negatives[part], cross_entropy, 0.1)
    bank.update(index, features, momentum=0.0)
    found.loss.backward()
    again = features.detach().clone().requires_grad_()
    direct(kept, again, index, negatives, 0.1).backward()
    torch.testing.assert_close(features.grad, again.grad)


def test_single_precision_under_autocast():
    rows, features = unit(20, 64, seed=7).float(), unit(5, 64, seed=8).float()
    negatives = torch.arange(5, 20).expand(5, 15)

    def loss() -> Tensor:
        return contrast_with_bank(
            rows, features, torch.arange(5), lambda part: negatives[part], cross_entropy, 0.07
        ).loss

    plain = loss()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(), plain)


def test_top1_counts_queries_nearest_to_their_own_row():
    rows = torch.eye(4)
    features = torch.stack([rows[0], rows[1], rows[3], rows[3]])  # the third looks like another image
    negatives = torch.tensor([[1, 2], [0, 2], [3, 0], [0, 1]])
    found = contrast_with_bank(rows, features, torch.arange(4), lambda part: negatives[part], cross_entropy, 1.0)
    assert found.top1 == 75
