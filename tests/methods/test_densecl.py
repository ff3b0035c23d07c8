"""DenseCL equal to the authors' code: head, matching, both losses and both queues."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.backbones import resnet
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import densecl
from sslcli.nn.norm import group_batch_norm


class Maps(Backbone):
    """Images as their own feature maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.trunk, self.dim = nn.Identity(), dim

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def maps(self, images: Tensor) -> Tensor:
        return images

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


def facts(batch: int) -> RunFacts:
    return RunFacts(images=100, batch_size=batch, part_size=batch, steps_per_epoch=10, total_steps=5000)


def at(step: int) -> Progress:
    return Progress(step=step, total=5000, steps_per_epoch=10, seed=5)


def batch_of(*views: Tensor) -> Batch:
    return Batch(views=list(views), index=torch.arange(len(views[0])))


@pytest.mark.golden
@pytest.mark.parametrize(("name", "grid"), [("neck", None), ("neck_grid2", 2)])
def test_head(golden, name, grid):
    case = np.load(golden / "densecl" / f"{name}.npz")
    head = densecl.Head(9, 8, 6, grid).double()
    theirs = {key.replace("whole", "mlp").replace("places", "mlp2"): value for key, value in head.state_dict().items()}
    for key, value in theirs.items():
        value.copy_(torch.from_numpy(case[f"state/{key}"]))
    x = torch.from_numpy(case["in_x0"]).requires_grad_()
    whole, places, coarse = head.raw(x)
    assert coarse.shape == (len(x), places.shape[1], 9)
    outputs = [whole, places.mT, places.mean(dim=1)]
    sum((y * torch.from_numpy(case[f"in_cotangent{i}"])).sum() for i, y in enumerate(outputs)).backward()
    for i, y in enumerate(outputs):
        np.testing.assert_allclose(y.detach().numpy(), case[f"out_y{i}"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), case["grad_x0"], rtol=1e-9, atol=1e-9)
    for key, p in head.named_parameters():
        key = key.replace("whole", "mlp").replace("places", "mlp2")
        np.testing.assert_allclose(p.grad.numpy(), case[f"gradparam/{key}"], rtol=1e-9, atol=1e-9, err_msg=key)


class Stored(nn.Module):
    """What was recorded for the images whose numbers come in."""

    def __init__(self, found: densecl.Found) -> None:
        super().__init__()
        self.found = found

    def forward(self, numbers: Tensor) -> densecl.Found:
        rows = numbers.flatten().long()
        return densecl.Found(*(each[rows] for each in self.found))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["loss_3x5", "loss_7x7", "loss_lambda0.3_T0.07", "loss_warmup_lambda0"])
def test_losses_gradients_and_queues(golden, name):
    case = np.load(golden / "densecl" / f"{name}.npz")
    share = float(case["param_loss_lambda"])
    cfg = densecl.Config(
        dim=int(case["param_C"]),
        queue=int(case["param_K"]),
        temperature=float(case["param_T"]),
        dense=share or 0.5,
        warmup_steps=0 if share else 1000,
    )
    count = int(case["param_N"])
    method = densecl.build(cfg, Maps(1), facts(count)).double()
    for queue, key in ((method.queue, "in_queue"), (method.dense_queue, "in_queue2")):
        queue.rows.copy_(torch.from_numpy(case[key].T))
        queue.pointer.fill_(int(case["in_ptr"]))
    own = {key: torch.from_numpy(case[f"in_{key}"]).requires_grad_() for key in ("q", "q_grid")}

    def found(side: str) -> densecl.Found:
        raw = {key: own.get(key, torch.from_numpy(case[f"in_{key}"])) for key in (f"{side}{x}" for x in KEYS)}
        return densecl.Found(
            F.normalize(raw[side], dim=1),
            F.normalize(raw[f"{side}_grid"], dim=1).mT,
            F.normalize(raw[f"{side}2"], dim=1),
            F.normalize(raw[f"{side}_b"].flatten(2), dim=1).mT,
        )

    method.head, method.slow_head = Stored(found("q")), Stored(found("k"))
    numbers = torch.arange(count, dtype=torch.float64).view(-1, 1, 1, 1)
    result = method(batch_of(numbers, numbers), at(999))
    result.loss.backward()
    np.testing.assert_allclose(result.loss.item(), case["out_loss"], rtol=1e-9)
    single = (1 - share) * result.scalars["loss_whole"].item()
    np.testing.assert_allclose(single, case["out_loss_single"], rtol=1e-9)
    np.testing.assert_allclose(share * result.scalars["loss_dense"].item(), case["out_loss_dense"], rtol=1e-9)
    for key, x in own.items():
        np.testing.assert_allclose(x.grad.numpy(), case[f"grad_{key}"], rtol=1e-9, atol=1e-9)
    for queue, key in ((method.queue, ""), (method.dense_queue, "2")):
        np.testing.assert_allclose(queue.rows.numpy().T, case[f"out_queue{key}_after"], rtol=1e-12)
        assert queue.pointer.item() == case[f"out_ptr{key}_after"]


KEYS = ("", "2", "_grid", "_b")


@pytest.mark.golden
def test_the_dense_loss_waits(golden):
    case = np.load(golden / "densecl" / "lambda_warmup.npz")
    cfg = densecl.Config(
        dim=6, queue=16, dense=float(case["param_loss_lambda"]), warmup_steps=int(case["param_start_iters"])
    )
    torch.manual_seed(0)
    method = densecl.build(cfg, Maps(4), facts(8))
    views = torch.randn(2, 8, 4, 3, 3)
    for step, share in zip(case["in_iters"], case["out_loss_lambda"], strict=True):
        result = method(batch_of(*views), at(int(step)))
        expected = (1 - share) * result.scalars["loss_whole"] + share * result.scalars["loss_dense"]
        torch.testing.assert_close(result.loss.detach(), expected.float())


def test_places_are_matched_by_the_backbones_features():
    features = F.normalize(torch.randn(2, 5, 7), dim=2)
    order = torch.tensor([[3, 0, 4, 1, 2], [1, 2, 3, 4, 0]])
    theirs = torch.stack([row[perm] for row, perm in zip(features, order, strict=True)])
    keys = torch.arange(10.0).view(2, 5, 1)
    found = densecl.counterparts(features, theirs, keys)
    assert found.flatten().tolist() == [1, 3, 4, 0, 2, 9, 5, 6, 7, 8]


def loss_and_queues() -> tuple[Tensor, Tensor, Tensor]:
    """One step of a network with batch norm in groups of four, over however many ranks there are."""
    torch.manual_seed(0)
    network = resnet.build(resnet.Config(depth=10, width=8, stem="small"))
    method = densecl.build(densecl.Config(dim=6, queue=32), network, facts(8)).double()
    method.copy_student()
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, 8, 3, 64, 64, generator=generator, dtype=torch.float64)
    group_batch_norm(method, local=8 // dist.world(), group=4)
    loss = method(batch_of(*views.chunk(dist.world(), dim=1)[dist.rank()]), at(3)).loss
    return dist.mean(loss), method.queue.rows, method.dense_queue.rows


@pytest.mark.dist
def test_one_device_with_split_batch_norm_equals_two(two_ranks):
    for found in two_ranks(loss_and_queues):
        torch.testing.assert_close(found, tuple(x.detach() for x in loss_and_queues()))


def three_steps(world: int) -> dict[str, Tensor]:
    """State after three steps without batch norm, over `world` ranks or one."""
    torch.manual_seed(0)
    method = densecl.build(densecl.Config(dim=6, hidden=5, queue=16), Maps(4), facts(8)).double()
    method.copy_student()
    optimizer = torch.optim.SGD(method.head.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, 8, 4, 3, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        method(batch_of(*views.chunk(world, dim=1)[dist.rank()]), at(step)).loss.backward()
        dist.mean_([p.grad for p in method.head.parameters() if p.grad is not None])
        optimizer.step()
        method.slow_head.load_state_dict(method.head.state_dict())
    return dict(method.state_dict())


@pytest.mark.dist
def test_two_ranks_equal_one(two_ranks):
    for found in two_ranks(three_steps, 2):
        torch.testing.assert_close(found, three_steps(1))


def test_keys_follow_slowly_from_where_queries_start():
    network = resnet.build(resnet.Config(depth=10, width=8, stem="small"))
    method = densecl.build(densecl.Config(dim=6, queue=32, momentum=0.9), network, facts(8))
    for p in (*method.backbone.parameters(), *method.head.parameters()):
        p.data.add_(1)
    method.copy_student()
    assert torch.equal(method.slow_head.places[2].weight, method.head.places[2].weight)
    method.head.places[2].weight.data.add_(1)
    method.after_step(at(0))
    moved = method.head.places[2].weight - method.slow_head.places[2].weight
    torch.testing.assert_close(moved, torch.full_like(moved, 0.9))


def test_a_queue_shorter_than_a_batch_is_refused():
    with pytest.raises(UserError, match=r"`method.queue` 15 is shorter than the 16 keys"):
        densecl.build(densecl.Config(queue=15), Maps(4), facts(16))
