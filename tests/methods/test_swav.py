"""SwAV equal to the authors' code: loss, queue, and a training trajectory with frozen prototypes."""

from typing import Any

import numpy as np
import pytest
import torch
from parts import Still
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.engine.optim import Lars
from sslcli.errors import UserError
from sslcli.methods import swav
from sslcli.nn.crops import head_over
from sslcli.nn.norm import group_batch_norm


def facts(batch: int, part: int | None = None) -> RunFacts:
    return RunFacts(images=100, batch_size=batch, part_size=part or batch, steps_per_epoch=10, total_steps=100)


def at(step: int, part: int = 0) -> Progress:
    return Progress(step=step, total=100, steps_per_epoch=10, seed=5, part=part)


def batch_of(views: Tensor) -> Batch:
    return Batch(views=list(views), index=torch.arange(views.shape[1]))


def official(method: swav.SwAV) -> dict[str, Tensor]:
    """The method's tensors under the names of the authors' checkpoints."""
    state = method.state_dict()
    return {
        key.replace("head.", "projection_head."): state[key]
        for key in state
        if key.startswith(("head.", "prototypes."))
    }


@pytest.mark.golden
def test_training_trajectory(golden):
    case = np.load(golden / "swav" / "train_traj_queue_freeze.npz")
    batch = int(case["param_bs"])
    cfg = swav.Config(
        dim=int(case["param_dim"]),
        hidden=8,
        prototypes=int(case["param_K"]),
        temperature=float(case["param_temperature"]),
        epsilon=float(case["param_epsilon"]),
        iterations=int(case["param_iterations"]),
        queue=int(case["param_queue_len"]),
        queue_from_epoch=0,
        freeze_steps=int(case["param_freeze_prototypes_niters"]),
    )
    method = swav.build(cfg, Still(9), facts(batch)).double()
    start = official(method)
    assert {f"init/{key}" for key in start} == {key for key in case if key.startswith("init/")}
    for key, value in start.items():
        value.copy_(torch.as_tensor(case[f"init/{key}"]))
    method.copy_student()
    optimizer = Lars(
        method.parameters(),
        lr=1.0,
        momentum=float(case["param_momentum"]),
        weight_decay=float(case["param_weight_decay"]),
        eta=float(case["param_larc_trust_coefficient"]),
        variant="larc",
    )
    for step, rate in enumerate(case["in_lr_schedule"]):
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        result = method(batch_of(torch.from_numpy(case["in_features"][step])), at(step))
        result.loss.backward()
        method.before_update(at(step))
        optimizer.step()
        if step < len(case["in_features"]) - 1:  # the authors bring prototypes to unit length before the next pass
            method.after_step(at(step))
        np.testing.assert_allclose(result.loss.item(), case["out_losses"][step], rtol=1e-7)
    for key, value in official(method).items():
        np.testing.assert_allclose(value.numpy(), case[f"final/{key}"], rtol=1e-7, atol=1e-9, err_msg=key)
    np.testing.assert_allclose(method.queue.numpy(), case["out_queue_final"], rtol=1e-7, atol=1e-9)


def around(case: Any) -> swav.SwAV:
    """The recorded case's prototypes and queue, around a head that changes nothing."""
    cfg = swav.Config(
        dim=int(case["param_dim"]),
        prototypes=int(case["param_K"]),
        assign=tuple(case["param_crops_for_assign"].tolist()),
        temperature=float(case["param_temperature"]),
        epsilon=float(case["param_epsilon"]),
        iterations=int(case["param_iterations"]),
        queue=int(case["param_queue_len"]),
        queue_from_epoch=0,
    )
    method = swav.build(cfg, Still(cfg.dim), facts(int(case["param_bs"]))).double()
    method.head = nn.Identity()
    method.prototypes.weight.data.copy_(torch.from_numpy(case["in_prototypes"]))
    method.copy_student()
    if cfg.queue:
        method.queue.copy_(torch.from_numpy(case["in_queue"]))
    return method


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("loss_2crops", 0),
        ("loss_assign3crops", 0),
        ("loss_multicrop_2_6", 0),
        ("loss_multicrop_2_6_queue", 4),  # four pushes of 8 have filled its 32 places
        ("loss_queue_not_full", 2),  # two of three
    ],
)
def test_loss_gradient_and_queue(golden, name, step):
    case = np.load(golden / "swav" / f"{name}.npz")
    method = around(case)
    np.testing.assert_allclose(method.prototypes.weight.detach().numpy(), case["out_prototypes_normalised"], rtol=1e-12)
    features = torch.from_numpy(case["in_features"]).requires_grad_()
    result = method(batch_of(features), at(step))
    result.loss.backward()
    np.testing.assert_allclose(result.loss.item(), case["out_loss"], rtol=1e-9)
    np.testing.assert_allclose(features.grad.numpy(), case["grad_features"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(method.prototypes.weight.grad.numpy(), case["grad_prototypes"], rtol=1e-9, atol=1e-9)
    if method.cfg.queue:
        np.testing.assert_allclose(method.queue.numpy(), case["out_queue_after"], rtol=1e-12)


@pytest.mark.golden
def test_projection_head(golden):
    case = np.load(golden / "swav" / "neck.npz")
    method = swav.build(swav.Config(dim=6, hidden=8, prototypes=3), Still(9), facts(6)).double()
    names = {"0": "projection_neck.0", "1": "bn", "3": "projection_neck.3"}
    for key, value in method.head.state_dict().items():
        place, kind = key.split(".")
        value.copy_(torch.as_tensor(case[f"state/{names[place]}.{kind}"]))
    large = [torch.from_numpy(case["in_x0"]).requires_grad_()]
    small = torch.from_numpy(case["in_x1"]).requires_grad_()
    rows = [x.mean(dim=(2, 3)) for x in (*large, small)]  # 6 rows of large crops, 9 of small ones, one pass
    y = F.normalize(head_over(method.head, [torch.cat(rows)])[0], dim=1)
    (y * torch.from_numpy(case["in_cotangent0"])).sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), case["out_y0"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(large[0].grad.numpy(), case["grad_x0"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(small.grad.numpy(), case["grad_x1"], rtol=1e-9, atol=1e-9)


def random_crops(step: int) -> Tensor:
    return torch.randn(5, 8, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def four_steps(cfg: swav.Config, parts: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Mean loss, gradients and queue after four steps of eight images, over however many ranks there are."""
    torch.manual_seed(0)
    method = swav.build(cfg, Still(10), facts(8, 8 // parts)).double()
    group_batch_norm(method, local=8 // parts // dist.world(), group="global")
    for step in range(4):
        method.zero_grad()
        losses = []
        for part, crops in enumerate(random_crops(step).chunk(parts, dim=1)):
            mine = crops.chunk(dist.world(), dim=1)[dist.rank()]
            losses.append(method(batch_of(mine), at(step, part)).loss / parts)
            losses[-1].backward()
    grads = {key: dist.mean(p.grad) for key, p in method.named_parameters() if p.grad is not None}
    return dist.mean(torch.stack(losses).sum()), grads, method.queue


@pytest.mark.dist
@pytest.mark.parametrize("queue", [0, 16])
@pytest.mark.parametrize("parts", [1, 2])
def test_two_ranks_equal_one(two_ranks, queue, parts):
    cfg = swav.Config(dim=6, hidden=12, prototypes=7, queue=queue, queue_from_epoch=0)
    for found in two_ranks(four_steps, cfg, parts):
        torch.testing.assert_close(found, four_steps(cfg, parts))


def test_the_queue_waits_for_its_epoch_and_for_being_full():
    cfg = swav.Config(dim=6, prototypes=7, queue=16, queue_from_epoch=2)
    method = swav.build(cfg, Still(10), facts(8)).double()
    without = swav.build(swav.Config(dim=6, prototypes=7), Still(10), facts(8)).double()
    method.load_state_dict({**without.state_dict(), "queue": method.queue})

    def same(step: int) -> bool:
        crops = batch_of(random_crops(step))
        return torch.allclose(method(crops, at(step)).loss, without(crops, at(step)).loss, rtol=1e-12)

    assert same(19)
    assert not method.queue.any()
    assert [same(step) for step in (20, 21, 22)] == [True, True, False]  # two pushes fill it
    assert method.queue.any(dim=2).all()


def test_newest_features_come_first_in_the_queue():
    cfg = swav.Config(dim=6, prototypes=7, queue=16, queue_from_epoch=0)
    method = swav.build(cfg, Still(10), facts(8)).double().eval()  # without batch norm's memory
    for step in range(3):
        crops = random_crops(step)
        method(batch_of(crops), at(step))
        z = F.normalize(torch.stack(head_over(method.head, list(crops))), dim=2)
        torch.testing.assert_close(method.queue[:, :8], z[:2])
    assert method.queue.any(dim=2).all()


def test_prototypes_rest_at_first_and_keep_unit_length():
    cfg = swav.Config(dim=6, prototypes=7, freeze_steps=2)
    method = swav.build(cfg, Still(10), facts(8))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    start, moved = method.prototypes.weight.detach().clone(), []
    for step in range(4):
        optimizer.zero_grad()
        method(batch_of(random_crops(step).float()), at(step)).loss.backward()
        method.before_update(at(step))
        optimizer.step()
        method.after_step(at(step))
        moved.append(not torch.allclose(method.prototypes.weight, start, atol=1e-6))
    assert moved == [False, False, True, True]
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(7))


def test_a_queue_that_batches_do_not_fill_is_refused():
    with pytest.raises(UserError, match=r"`method.queue` 3840 is not a multiple of the 200 images") as caught:
        swav.build(swav.Config(queue=3840), Still(4), facts(200))
    assert caught.value.hint == "set it to 3800, or to 0 for no queue"
    swav.build(swav.Config(queue=3840), Still(4), facts(256))


def test_a_crop_that_is_not_there_is_named():
    method = swav.build(swav.Config(assign=(0, 5)), Still(10), facts(8))
    with pytest.raises(UserError, match="names crop 5, but there are only 5 crops"):
        method(batch_of(random_crops(0).float()), at(0))
