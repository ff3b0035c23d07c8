"""Triplet equal to the authors' code, and where it lets one choose, equal to plain arithmetic."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import triplet
from sslcli.nn.norm import group_batch_norm
from sslcli.nn.slow import cosine_momentum


class Pixels(Backbone):
    """Rows (B, D) as they are, images as the mean over their pixels; remembers the sides it saw."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.trunk, self.dim = nn.Linear(dim, dim), dim
        self.sides: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim == 4:
            self.sides.append(images.shape[-1])
            images = images.mean(dim=(2, 3))
        return self.trunk(images)

    def maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


def facts(part: int, batch: int | None = None) -> RunFacts:
    return RunFacts(images=100, batch_size=batch or part, part_size=part, steps_per_epoch=10, total_steps=100)


def at(step: int, part: int = 0) -> Progress:
    return Progress(step=step, total=100, steps_per_epoch=10, seed=5, part=part)


def batch_of(*views: Tensor) -> Batch:
    return Batch(views=list(views), index=torch.arange(len(views[0])))


def loss(guesses: Tensor, targets: Tensor, first: int = 0, **changed: Any) -> Tensor:
    usual: dict[str, Any] = {"margin": 100.0, "gamma": 2.0, "ranks": (2, 10), "aggregate": "mean"}
    return triplet.truncated_triplet(guesses, targets, first, **{**usual, **changed}).loss


@pytest.mark.golden
@pytest.mark.parametrize("name", ["loss_N11_min", "loss_N12", "loss_N32_scaled", "loss_duplicates", "loss_gamma1"])
def test_loss_and_gradients(golden, name):
    case = np.load(golden / "triplet" / f"{name}.npz")
    online = [torch.from_numpy(case[f"in_online{i}"]).requires_grad_() for i in (1, 2)]
    target = [torch.from_numpy(case[f"in_target{i}"]) for i in (1, 2)]
    settings = {"gamma": float(case["param_gamma"]), "margin": float(case["param_margin"])}
    there, back = loss(online[0], target[1], **settings), loss(online[1], target[0], **settings)
    (there + back).backward()
    np.testing.assert_allclose(there.item(), case["out_loss_12"], rtol=1e-9)
    np.testing.assert_allclose(back.item(), case["out_loss_21"], rtol=1e-9)
    np.testing.assert_allclose((there + back).item(), case["out_loss"], rtol=1e-9)
    for x, key in zip(online, ("grad_online1", "grad_online2"), strict=True):
        np.testing.assert_allclose(x.grad.numpy(), case[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [12, 13])
def test_the_median_is_over_all_others(count):
    p, t = torch.randn(2, count, 6, dtype=torch.float64)
    distances = -2 * F.normalize(p, dim=1) @ F.normalize(t, dim=1).T
    expected = [
        100 + 2 * row[i] - torch.cat([row[:i], row[i + 1 :]]).median()  # torch takes the lower of two in the middle
        for i, row in enumerate(distances)
    ]
    torch.testing.assert_close(loss(p, t, aggregate="median"), torch.stack(expected).mean())


def test_a_small_margin_closes():
    p = torch.eye(12, dtype=torch.float64)  # every guess right, every other at a right angle: 2 (-2) - 0 = -4
    assert loss(p, p, margin=3.9) == 0
    torch.testing.assert_close(loss(p, p, margin=4.5).item(), 0.5)


def test_ranks_count_from_the_nearest():
    p = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    t = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    near = (p @ t.T).fill_diagonal_(-9).sort(dim=1, descending=True).values
    expected = 100 - 4 * (p * t).sum(dim=1) + 2 * near[:, 0:2].mean(dim=1)
    torch.testing.assert_close(loss(p, t, ranks=(1, 2)), expected.mean())


def test_both_directions_and_the_part_above_the_margin():
    torch.manual_seed(0)
    method = triplet.build(triplet.Config(dim=6, hidden=7, online_size=None, target_size=None), Pixels(5), facts(16))
    a, b = torch.randn(2, 16, 5)
    result = method(batch_of(a, b), at(0))
    p = [method.predictor(method.projector(method.backbone(x))) for x in (a, b)]
    t = [method.slow_projector(method.slow_backbone(x)) for x in (a, b)]
    expected = loss(p[0], t[1]) + loss(p[1], t[0])
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.scalars["loss_above_margin"], expected.detach() - 200)
    assert abs(result.scalars["loss_above_margin"]) <= 12


def sides_of_many_steps() -> np.ndarray:
    cfg = triplet.Config(dim=6, hidden=7, online_size=(20, 30), target_size=(25, 30), ranks=(1, 2))
    method = triplet.build(cfg, Pixels(3), facts(8))
    view, found = torch.randn(8 // dist.world(), 3, 24, 24), []
    for step in range(100):
        method(batch_of(view, view), at(step // 2, part=step % 2))
        found.append([*method.backbone.sides[-2:], *method.slow_backbone.sides[-2:]])
    return np.array(found)


def test_every_pass_has_a_size_of_its_own():
    sides = sides_of_many_steps()
    assert set(sides[:, 0]) == set(sides[:, 1]) == set(range(20, 31))
    assert set(sides[:, 2]) == set(sides[:, 3]) == set(range(25, 31))
    assert (sides[:, 0] != sides[:, 1]).any()
    assert (sides[:, 2] != sides[:, 3]).any()
    assert (sides[::2, 0] != sides[1::2, 0]).any()  # slices of one step, too


@pytest.mark.dist
def test_sizes_are_equal_on_all_ranks(two_ranks):
    for found in two_ranks(sides_of_many_steps):
        np.testing.assert_array_equal(found, sides_of_many_steps())


def trained(negatives: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and state after three steps of twelve images, over however many ranks there are."""
    torch.manual_seed(0)
    cfg = triplet.Config(dim=6, hidden=7, ranks=(2, 4), negatives=negatives, online_size=None, target_size=None)
    method = triplet.build(cfg, Pixels(5), facts(12)).double()
    method.copy_student()
    group_batch_norm(method, local=12 // dist.world(), group="global")
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        views = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        value = method(batch_of(*views.chunk(dist.world(), dim=1)[dist.rank()]), at(step)).loss
        value.backward()
        dist.mean_([p.grad for p in method.parameters() if p.grad is not None])
        optimizer.step()
        method.after_step(at(step))
    return dist.mean(value), dict(method.state_dict())


@pytest.mark.dist
@pytest.mark.parametrize("negatives", ["all", 6])  # among all images, or in the groups that two ranks are
def test_two_ranks_equal_one(two_ranks, negatives):
    for found in two_ranks(trained, negatives):
        torch.testing.assert_close(found, trained(negatives))


@pytest.mark.dist
def test_the_negatives_of_a_rank_are_its_own(two_ranks):
    for (value, state), (expected, other) in zip(two_ranks(trained, "rank"), two_ranks(trained, 6), strict=True):
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(state, other)
    assert not torch.allclose(trained("rank")[0], trained(6)[0])


def test_the_target_follows():
    method = triplet.build(triplet.Config(dim=6, hidden=7), Pixels(5), facts(16))
    before, fast = method.slow_projector[0].weight.clone(), method.projector[0].weight
    fast.data.add_(1)
    method.after_step(at(50))
    momentum = cosine_momentum(0.99, 1.0, 0.5)
    torch.testing.assert_close(method.slow_projector[0].weight, momentum * before + (1 - momentum) * fast.detach())


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="asks for 10 negatives, but only 10 images"):
        triplet.build(triplet.Config(), Pixels(5), facts(10, batch=40))
    triplet.build(triplet.Config(), Pixels(5), facts(11))
    triplet.build(triplet.Config(aggregate="median"), Pixels(5), facts(2))


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="groups of 12 images cannot be formed from the 30"):
        triplet.build(triplet.Config(negatives=12), Pixels(5), facts(30))
    with pytest.raises(UserError, match="only 6 images look"):
        triplet.build(triplet.Config(negatives=6), Pixels(5), facts(30))


def test_ranges_ascend():
    with pytest.raises(ValidationError, match="the smaller number comes first"):
        triplet.Config(ranks=(10, 2))
