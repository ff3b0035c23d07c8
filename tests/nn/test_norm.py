"""Batch-norm statistics over a given number of images, on any number of ranks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.errors import UserError
from sslcli.nn.norm import (
    FusedSyncBatchNorm,
    SplitBatchNorm,
    SyncBatchNorm,
    average_statistics_,
    group_batch_norm,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 4, 5), nn.BatchNorm1d(5, affine=False)),
    ).double()
    nn.init.uniform_(net[1].weight)
    nn.init.uniform_(net[1].bias)
    return net


def images(count: int) -> Tensor:
    rows = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return rows * 3 + torch.arange(count).view(-1, 1, 1, 1)  # neighbours differ, so that groups matter


def outcome(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of a loss that weighs rows differently, and buffers after one training step."""
    x = x.clone().requires_grad_()
    y = net(x)
    weights = torch.linspace(-1, 1, y.numel() * dist.world(), dtype=y.dtype).chunk(dist.world())[dist.rank()]
    (y.flatten() * weights).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **{f"buffer {k}": v for k, v in net.named_buffers()}}


def one_device(count: int, group: int) -> dict[str, Tensor]:
    net = network()
    group_batch_norm(net, local=count, group=group)
    return outcome(net, images(count))


def on_ranks(count: int, group: int) -> dict[str, Tensor]:
    """The same on several ranks, put together again as DDP and the gather of a loss would."""
    net = network()
    local = count // dist.world()
    group_batch_norm(net, local=local, group=group)
    found = outcome(net, images(count).chunk(dist.world())[dist.rank()])
    average_statistics_(net)
    whole = {"y": dist.gather(found["y"]), "x.grad": dist.gather(found["x.grad"])}
    weights = {name: dist.sum_(value) for name, value in found.items() if name in dict(net.named_parameters())}
    return {**whole, **weights, **{f"buffer {k}": v for k, v in net.named_buffers()}}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("group", [2, 4])
def test_split_equals_separate_devices(group):
    net = network()
    shares = images(8).split(group)
    weights = torch.linspace(-1, 1, 8 * 5, dtype=torch.float64).split(group * 5)
    copies = [copy.deepcopy(net) for _ in shares]
    ys = [each(share) for each, share in zip(copies, shares, strict=True)]
    sum((y.flatten() * w).sum() for y, w in zip(ys, weights, strict=True)).backward()

    found = one_device(8, group)
    torch.testing.assert_close(found["y"], torch.cat(ys).detach())
    for name, _ in net.named_parameters():
        torch.testing.assert_close(found[name], sum(dict(each.named_parameters())[name].grad for each in copies))
    for name, buffer in net.named_buffers():
        mean = torch.stack([dict(each.named_buffers())[name].double() for each in copies]).mean(0).to(buffer.dtype)
        torch.testing.assert_close(found[f"buffer {name}"], mean)


@pytest.mark.dist
@pytest.mark.parametrize(("group", "kind"), [(8, SyncBatchNorm), (4, nn.BatchNorm2d), (2, SplitBatchNorm)])
def test_two_ranks_equal_one(two_ranks, group, kind):
    for found in two_ranks(on_ranks, 8, group):
        assert_same(found, one_device(8, group))
    assert two_ranks(kind_of_layer, 4, group) == [kind.__name__] * 2


def kind_of_layer(local: int, group: int) -> str:
    net = network()
    group_batch_norm(net, local=local, group=group)
    return type(net[1]).__name__


@pytest.mark.dist
def test_four_ranks_in_groups_of_two_equal_one(four_ranks):
    for found in four_ranks(on_ranks, 8, 4):
        assert_same(found, one_device(8, 4))


def half_precision() -> tuple[Tensor, Tensor]:
    net = nn.Sequential(nn.BatchNorm2d(3))
    group_batch_norm(net, local=2, group="global")
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images(4).bfloat16().chunk(2)[dist.rank()])
    return y, net[0].running_var


@pytest.mark.dist
def test_statistics_of_half_precision_rows_are_taken_in_32_bits(two_ranks):
    wanted = nn.BatchNorm2d(3)
    y = wanted(images(4).bfloat16().float())
    for (found, variance), rows in zip(two_ranks(half_precision), y.chunk(2), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, rows.bfloat16(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(variance, wanted.running_var)


@pytest.mark.parametrize("group", ["global", 8])
def test_alone_and_whole_stays_plain(group):
    net = network()
    group_batch_norm(net, local=8, group=group)
    assert type(net[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("world", "cuda", "kind"),
    [(1, False, SplitBatchNorm), (2, False, SyncBatchNorm), (2, True, FusedSyncBatchNorm)],
)
def test_evaluation_and_names_stay_plain(monkeypatch, world, cuda, kind):
    monkeypatch.setattr(dist, "world", lambda: world)
    monkeypatch.setattr(dist, "device", lambda: torch.device("cuda" if cuda else "cpu"))
    net = network()
    plain = copy.deepcopy(net).eval()
    group_batch_norm(net, local=4, group=2 if world == 1 else "global")
    assert type(net[1]) is type(net[3][2]) is kind
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(net.eval()(images(4)), plain(images(4)))


def test_a_layer_used_twice_stays_one_layer():
    norm = nn.BatchNorm1d(3)
    net = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    group_batch_norm(net, local=4, group=2)
    assert net["a"][0] is net["b"][0]
    assert isinstance(net["a"][0], SplitBatchNorm)


def test_rows_of_several_views_are_split_by_images():
    net = nn.Sequential(nn.BatchNorm1d(3))
    group_batch_norm(net, local=4, group=2)
    rows = torch.randn(8, 3)  # two views of each of four images
    plain = nn.BatchNorm1d(3)
    torch.testing.assert_close(net(rows), torch.cat([plain(rows[:4]), plain(rows[4:])]))


def test_an_incomplete_batch_gives_smaller_groups_and_then_fewer():
    net = nn.Sequential(nn.BatchNorm1d(3))
    group_batch_norm(net, local=16, group=4)
    plain, rows = nn.BatchNorm1d(3), torch.randn(10, 3)
    torch.testing.assert_close(net(rows), torch.cat([plain(share) for share in rows.split([3, 3, 2, 2])]))
    torch.testing.assert_close(net(rows[:5]), torch.cat([plain(share) for share in rows[:5].split([3, 2])]))


def test_timms_fused_activation_is_kept():
    from timm.layers import BatchNormAct2d

    net = nn.Sequential(BatchNormAct2d(3)).double()
    plain = copy.deepcopy(net)
    group_batch_norm(net, local=4, group=2)
    x = images(4)
    torch.testing.assert_close(net(x), torch.cat([plain(x[:2]), plain(x[2:])]))
    assert (net(x) >= 0).all()


def test_sizes_that_cannot_be_formed_are_refused():
    with pytest.raises(UserError, match=r"`run.batch_norm`: groups of 5 images") as error:
        group_batch_norm(network(), local=12, group=5)
    assert error.value.hint == "set `run.batch_norm` to `global` or one of 2, 3, 4, 6, 12"


def test_sizes_over_ranks(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 4)
    with pytest.raises(UserError, match="4 ranks with 6 images each") as error:
        group_batch_norm(network(), local=6, group=18)
    assert error.value.hint == "set `run.batch_norm` to `global` or one of 2, 3, 6, 12, 24"


def test_layers_that_cannot_be_grouped_are_refused():
    with pytest.raises(UserError, match=r"cannot group the statistics of a `BatchNorm1d` layer"):
        group_batch_norm(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), local=4, group=2)


def test_networks_without_batch_norm_take_any_group():
    group_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), local=7, group=5)
