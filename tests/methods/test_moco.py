"""MoCo equal to the authors' code: whole training trajectories, and the exchange between ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import moco
from sslcli.nn.norm import group_batch_norm
from sslcli.seeds import seed_of


class Tiny(Backbone):
    """The reference's encoder without its last layer: (B, 12) to (B, 10)."""

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk, self.dim = trunk, dim

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def taps(self, images: Tensor, names: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


def encoder() -> Tiny:
    layers = {"l1": nn.Linear(12, 10), "bn": nn.BatchNorm1d(10), "relu": nn.ReLU()}
    trunk = nn.Sequential()
    for name, layer in layers.items():
        trunk.add_module(name, layer)
    return Tiny(trunk, 10)


def facts(batch: int) -> RunFacts:
    return RunFacts(images=1000, batch_size=batch, part_size=batch, steps_per_epoch=10, total_steps=100)


def batch_of(*views: Tensor) -> Batch:
    return Batch(views=list(views), index=torch.arange(len(views[0])))


def at(step: int) -> Progress:
    return Progress(step=step, total=100, steps_per_epoch=10, seed=5)


def official(method: moco.MoCo) -> dict[str, Tensor]:
    """The method's tensors under the names of the authors' checkpoints."""
    names = {"backbone.trunk.": "encoder_q.", "slow_backbone.trunk.": "encoder_k."}
    last = {"head.": "encoder_q.fc.", "slow_head.": "encoder_k.fc."}
    found: dict[str, Tensor] = {}
    for key, value in method.state_dict().items():
        for ours, theirs in {**names, **last}.items():
            if key.startswith(ours):
                rest = key.removeprefix(ours)
                found[theirs + (rest if method.cfg.mlp or "fc" not in theirs else rest.removeprefix("0."))] = value
    found["queue"] = method.queue.rows.T
    found["queue_ptr"] = method.queue.pointer.view(1)
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", ["train_traj_v1", "train_traj_v2_mlp"])
def test_training_trajectory(golden, name):
    case = np.load(golden / "moco" / f"{name}.npz")
    cfg = moco.Config(
        dim=int(case["param_dim"]),
        queue=int(case["param_K"]),
        momentum=float(case["param_m"]),
        temperature=float(case["param_T"]),
        mlp=bool(case["param_mlp"]),
    )
    method = moco.build(cfg, encoder(), facts(8)).double()
    start = official(method)
    assert {f"init/{key}" for key in start} == {key for key in case if key.startswith("init/")}
    for key, value in start.items():
        value.copy_(torch.as_tensor(case[f"init/{key}"]))
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad],
        lr=float(case["param_lr"]),
        momentum=float(case["param_sgd_momentum"]),
        weight_decay=float(case["param_weight_decay"]),
    )
    steps = int(case["param_steps"])
    for step in range(steps):
        query, key = torch.from_numpy(case["in_images"][step])
        optimizer.zero_grad()
        result = method(batch_of(query, key), at(step))
        result.loss.backward()
        optimizer.step()
        np.testing.assert_allclose(result.loss.item(), case["out_losses"][step], rtol=1e-7)
        assert method.queue.pointer.item() == case["out_ptrs"][step]
        if step < steps - 1:  # the reference moves the key encoder in the next forward pass
            method.after_step(at(step))
    for key, value in official(method).items():
        np.testing.assert_allclose(value.numpy(), case[f"final/{key}"], rtol=1e-7, atol=1e-9, err_msg=key)


@pytest.mark.golden
def test_queue_wraps_around(golden):
    case = np.load(golden / "moco" / "queue_wraparound.npz")
    cfg = moco.Config(dim=16, queue=int(case["param_K"]), temperature=float(case["param_T"]), mlp=False)
    method = bare(cfg, 16, 8)
    method.queue.rows.copy_(torch.from_numpy(case["in_queue"].T))
    for step in range(int(case["param_steps"])):
        q, k = torch.from_numpy(case["in_q"][step]), torch.from_numpy(case["in_k"][step])
        result = method(batch_of(q, k), at(step))
        np.testing.assert_allclose(result.loss.item(), case["out_losses"][step], rtol=1e-9)
        assert method.queue.pointer.item() == case["out_ptrs"][step]
        if step == 3:
            np.testing.assert_allclose(method.queue.rows.numpy().T, case["out_queue_mid"], rtol=1e-12)
    np.testing.assert_allclose(method.queue.rows.numpy().T, case["out_queue_final"], rtol=1e-12)


def bare(cfg: moco.Config, dim: int, batch: int) -> moco.MoCo:
    """The method around networks that change nothing, in float64."""
    method = moco.build(cfg, Tiny(nn.Identity(), dim), facts(batch)).double()
    for head in (method.head, method.slow_head):
        head[0].weight.data.copy_(torch.eye(dim))
        head[0].bias.data.zero_()
    return method


def shuffled(path: Path) -> None:
    case = np.load(path)
    rank, dim = dist.rank(), int(case["param_dim"])
    cfg = moco.Config(dim=dim, queue=int(case["param_K"]), temperature=float(case["param_T"]), mlp=False)
    method = bare(cfg, dim, len(case["in_q"]))
    method.queue.rows.copy_(torch.from_numpy(case["in_queue"].T))
    method.queue.pointer.fill_(int(case["in_queue_ptr"]))
    q, k = (torch.from_numpy(case[key]).chunk(dist.world())[rank] for key in ("in_q", "in_k"))
    q = q.clone().requires_grad_()
    seen: list[Tensor] = []
    method.slow_backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    order = torch.from_numpy(case["in_shuffle_perm"]).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "permutation", lambda length, key: order)  # the one that the reference drew
        result = method(batch_of(q, k), at(0))
    result.loss.backward()
    np.testing.assert_array_equal(seen[0].numpy(), case["out_key_encoder_input"][rank])
    np.testing.assert_allclose(result.loss.item(), case["out_loss"][rank], rtol=1e-9)
    assert q.grad is not None
    np.testing.assert_allclose(q.grad.numpy(), case["grad_q"][rank], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(method.queue.rows.numpy().T, case["out_queue_after"][rank], rtol=1e-12)
    assert method.queue.pointer.item() == case["out_queue_ptr_after"][rank]


@pytest.mark.golden
@pytest.mark.dist
def test_shuffle_over_two_ranks(golden, two_ranks):
    two_ranks(shuffled, golden / "moco" / "dist2_shuffle.npz")


@pytest.mark.golden
@pytest.mark.dist
def test_shuffle_over_four_ranks(golden, four_ranks):
    four_ranks(shuffled, golden / "moco" / "dist4_shuffle.npz")


def loss_and_queue(symmetric: bool) -> tuple[Tensor, Tensor]:
    """One step of a network with batch norm in groups of four, over however many ranks there are."""
    torch.manual_seed(0)
    method = moco.build(moco.Config(dim=6, queue=32, symmetric=symmetric), encoder(), facts(8)).double()
    method.copy_student()
    views = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    group_batch_norm(method, local=8 // dist.world(), group=4)
    loss = method(batch_of(*views.chunk(dist.world(), dim=1)[dist.rank()]), at(3)).loss
    return dist.mean(loss), method.queue.rows


@pytest.mark.dist
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_device_with_split_batch_norm_equals_two(two_ranks, symmetric):
    loss, rows = loss_and_queue(symmetric)
    for found_loss, found_rows in two_ranks(loss_and_queue, symmetric):
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close(found_rows, rows)


def test_symmetric_loss_is_the_sum_of_both_directions():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 10)
    both = moco.build(moco.Config(dim=6, queue=64, symmetric=True), Tiny(nn.Identity(), 10), facts(8))
    one = moco.build(moco.Config(dim=6, queue=64), Tiny(nn.Identity(), 10), facts(8))
    one.load_state_dict(both.state_dict())
    expected = one(batch_of(a, b), at(0)).loss
    one.load_state_dict(both.state_dict())  # both directions see the same negatives
    expected += one(batch_of(b, a), at(0)).loss
    torch.testing.assert_close(both(batch_of(a, b), at(0)).loss, expected)
    assert both.queue.pointer.item() == 16
    assert one.queue.pointer.item() == 8


def test_keys_are_shuffled_by_seed_step_and_part():
    drawn = {seed_of(5, "shuffle", step, part, turn) for step in range(3) for part in range(2) for turn in range(2)}
    assert len(drawn) == 12


def test_keys_start_where_queries_start():
    method = moco.build(moco.Config(dim=4, queue=16), encoder(), facts(8))
    for p in method.backbone.parameters():
        p.data.add_(1)
    method.copy_student()
    for fast, twin in ((method.backbone, method.slow_backbone), (method.head, method.slow_head)):
        for a, b in zip(fast.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_a_queue_shorter_than_a_batch_is_refused():
    with pytest.raises(UserError, match=r"`method.queue` 15 is shorter than the 16 keys"):
        moco.build(moco.Config(queue=15, symmetric=True), encoder(), facts(8))
    moco.build(moco.Config(queue=15), encoder(), facts(8))
