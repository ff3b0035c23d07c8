"""DINO equal to the authors' code: head, loss, centre, teacher temperature and momentum."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import Still
from timm.layers.drop import DropPath
from torch import Tensor, nn

from sslcli import dist
from sslcli.backbones import vit
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.methods import dino
from sslcli.nn.norm import group_batch_norm
from sslcli.nn.slow import cosine_momentum
from sslcli.nn.views import interleave


def facts(batch: int) -> RunFacts:
    return RunFacts(images=100, batch_size=batch, part_size=batch, steps_per_epoch=10, total_steps=100)


def at(step: int) -> Progress:
    return Progress(step=step, total=100, steps_per_epoch=10, seed=5)


def batch_of(views: Sequence[Tensor]) -> Batch:
    return Batch(views=list(views), index=torch.arange(len(views[0])))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["head_gelu", "head_bn_trainable_g"])
def test_head(golden, name):
    case = np.load(golden / "dino" / f"{name}.npz")
    head = dino.Head(
        [case["param_in_dim"], *[case["param_hidden_dim"]] * (case["param_nlayers"] - 1), case["param_bottleneck_dim"]],
        case["param_out_dim"],
        batch_norm=bool(case["param_use_bn"]),
        fixed_gain=bool(case["param_norm_last_layer"]),
    ).double()
    state = {key.removeprefix("state/"): torch.as_tensor(case[key]) for key in case if key.startswith("state/")}
    head.load_state_dict(state)
    x = torch.from_numpy(case["in_x"]).requires_grad_()
    y = head(x)
    (y * torch.from_numpy(case["in_cotangent"])).sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), case["out_y"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), case["grad_x"], rtol=1e-9, atol=1e-9)
    grads = {f"gradparam/{key}": p.grad for key, p in head.named_parameters() if p.grad is not None}
    assert grads.keys() == {key for key in case if key.startswith("gradparam/")}
    for key, grad in grads.items():
        np.testing.assert_allclose(grad.numpy(), case[key], rtol=1e-9, atol=1e-9, err_msg=key)


def filled(name: str, shape: Sequence[int]) -> Tensor:
    """The numbers that the recordings below give to a tensor of this name (golden/dino/README.md)."""
    i = np.arange(np.prod(shape), dtype=np.uint64)
    x = (zlib.crc32(name.encode()) + i * 2654435769) & 0xFFFFFFFF
    for shift, factor in ((16, 2146121005), (15, 2221713035), (16, 1)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    scale = 0.1 if len(shape) < 2 else np.sqrt(3 / np.prod(shape[1:]))
    return torch.from_numpy((x / 2**31 - 1) * scale).reshape(tuple(shape))


@pytest.mark.golden
@pytest.mark.parametrize(("name", "dims"), [("head_n1layer", [5, 4]), ("head_deep", [4, 8, 8, 8, 8, 3])])
def test_head_of_any_depth(golden, name, dims):
    case = np.load(golden / "dino" / f"{name}.npz")
    layout = json.loads(str(case["meta"]))["layout"]
    head = dino.Head(dims, layout["last_layer.weight_g"][0], batch_norm=False, fixed_gain=True).double()

    def theirs(key: str) -> str:  # a perceptron of one layer is no sequence there
        return key.replace("mlp.0.", "mlp.") if len(dims) == 2 else key

    head.load_state_dict({key: filled(theirs(key), layout[theirs(key)]) for key in head.state_dict()})
    y = head(torch.from_numpy(case["x"]))
    y.square().sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), case["out"], rtol=1e-9, atol=1e-9)
    for key, p in head.named_parameters():
        if p.requires_grad:
            np.testing.assert_allclose(p.grad.numpy(), case[f"grad/{theirs(key)}"], rtol=1e-9, atol=1e-9, err_msg=key)


class Stored(nn.Module):
    """Says what it was told to say."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows


def settings(case: Any, meta: dict[str, Any]) -> dino.Config:
    """A recorded case's numbers; the two sets of recordings name some of them differently."""
    values = {key.removeprefix("param_"): case[key].item() for key in case if key.startswith("param_")} | meta
    return dino.Config(
        prototypes=values["out_dim"],
        temperature=values["student_temp"],
        teacher_temperature=values["teacher_temp"],
        warmup_teacher_temperature=values["warmup_teacher_temp"],
        warmup_epochs=values.get("warmup_teacher_temp_epochs", values.get("warmup_epochs")),
        centre_momentum=values["center_momentum"],
    )


def told(cfg: dino.Config) -> tuple[dino.DINO, Stored]:
    """The method around networks that change nothing, but for a teacher that is told its output."""
    method = dino.build(cfg, Still(cfg.prototypes), facts(8)).double()
    method.head, method.slow_head = nn.Identity(), Stored()
    return method, method.slow_head


@pytest.mark.golden
@pytest.mark.parametrize("name", ["loss_2crops", "loss_multicrop_2_6", "loss_multicrop_2_8_temps"])
def test_loss_and_centre_step_after_step(golden, name):
    case = np.load(golden / "dino" / f"{name}.npz")
    cfg = settings(case, {})
    method, teacher = told(cfg)
    method.centre.copy_(torch.from_numpy(case["in_center"])[0])
    schedule = case["out_teacher_temp_schedule"]
    ramp = [
        dino.ramp(cfg.warmup_teacher_temperature, cfg.teacher_temperature, cfg.warmup_epochs, epoch)
        for epoch in range(len(schedule))
    ]
    np.testing.assert_allclose(ramp, schedule, rtol=1e-12)
    for step, epoch in enumerate(case["in_epochs"]):
        student = torch.from_numpy(case["in_student"][step]).requires_grad_()
        teacher.rows = interleave(torch.from_numpy(case["in_teacher"][step]).chunk(2))
        result = method(batch_of(student.chunk(2 + int(case["param_nlocal"]))), at(10 * int(epoch)))
        result.loss.backward()
        np.testing.assert_allclose(result.loss.item(), case["out_losses"][step], rtol=1e-9)
        np.testing.assert_allclose(student.grad.numpy(), case["grad_student"][step], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(method.centre.numpy(), case["out_centers"][step][0], rtol=1e-9, atol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["loss_b1_2crops", "loss_b2_k16_c10", "loss_b3_k7_c4"])
def test_loss_and_centre_in_the_second_set(golden, name):
    case = np.load(golden / "dino" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method, teacher = told(settings(case, meta))
    for step, epoch in enumerate(case["epochs"]):
        student = torch.from_numpy(case[f"student{step}"]).requires_grad_()
        teacher.rows = interleave(torch.from_numpy(case[f"teacher{step}"]).chunk(2))
        result = method(batch_of(student.chunk(meta["ncrops"])), at(10 * int(epoch)))
        result.loss.backward()
        np.testing.assert_allclose(result.loss.item(), case["losses"][step], rtol=1e-9)
        np.testing.assert_allclose(student.grad.numpy(), case[f"grad_student{step}"], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(method.centre.numpy(), case[f"center_after{step}"][0], rtol=1e-9, atol=1e-12)


def centred(path: Path) -> None:
    case, rank = np.load(path), dist.rank()
    method, teacher = told(settings(case, {}))
    method.centre.copy_(torch.from_numpy(case["in_center"])[0])
    student = torch.from_numpy(case["in_student"][rank]).requires_grad_()
    teacher.rows = interleave(torch.from_numpy(case["in_teacher"][rank]).chunk(2))
    result = method(batch_of(student.chunk(2 + int(case["param_nlocal"]))), at(10 * int(case["param_epoch"])))
    result.loss.backward()
    np.testing.assert_allclose(result.loss.item(), case["out_loss"][rank], rtol=1e-9)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), case["grad_student"][rank], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(method.centre.numpy(), case["out_center"][rank][0], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.dist
def test_the_centre_is_that_of_all_ranks(golden, two_ranks):
    two_ranks(centred, golden / "dino" / "center_dist2.npz")


@pytest.mark.golden
def test_momentum_of_the_teacher(golden):
    case = np.load(golden / "dino" / "cosine_scheduler_momentum.npz")
    steps = len(case["out_schedule"])
    ours = [cosine_momentum(float(case["param_base_value"]), 1.0, step / steps) for step in range(steps)]
    np.testing.assert_allclose(ours, case["out_schedule"], rtol=1e-9)


SMALL = dino.Config(prototypes=9, hidden=12, bottleneck=6, batch_norm=True, fixed_gain=False)


def trained(steps: int, cfg: dino.Config = SMALL) -> dino.DINO:
    """Some steps of eight images in five crops, over however many ranks there are."""
    torch.manual_seed(0)
    method = dino.build(cfg, Still(10, nn.Linear(10, 10)), facts(8)).double()
    group_batch_norm(method, local=8 // dist.world(), group="global")
    method.copy_student()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        views = torch.randn(5, 8, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        method(batch_of(views.chunk(dist.world(), dim=1)[dist.rank()]), at(step)).loss.backward()
        dist.mean_([p.grad for p in method.parameters() if p.grad is not None])
        method.before_update(at(step))
        optimizer.step()
        method.after_step(at(step))
    return method


def trained_state(steps: int) -> dict[str, Tensor]:
    return dict(trained(steps).state_dict())


@pytest.mark.dist
def test_two_ranks_equal_one(two_ranks):
    for found in two_ranks(trained_state, 12):  # beyond the epoch in which prototypes rest
        torch.testing.assert_close(found, trained_state(12))


def test_prototypes_rest_in_the_first_epoch():
    start, first, second = (trained(steps).head.last_layer.weight_v for steps in (0, 10, 11))
    assert torch.equal(start, first)
    assert not torch.equal(first, second)


def test_the_teacher_follows_and_is_exported():
    method = trained(3)
    assert method.exported() is method.slow_backbone
    before, fast = method.slow_head.mlp[0].weight.clone(), method.head.mlp[0].weight
    method.after_step(at(50))
    momentum = cosine_momentum(0.996, 1.0, 0.5)
    torch.testing.assert_close(method.slow_head.mlp[0].weight, momentum * before + (1 - momentum) * fast.detach())


def test_the_teacher_answers_with_all_of_itself():
    network = vit.build(vit.Config(size="tiny", depth=3, patch=8, image_size=16, drop_path=0.5))
    method = dino.build(SMALL, network, facts(8)).train()
    rates = [m.drop_prob for m in method.slow_backbone.modules() if isinstance(m, DropPath)]
    assert rates
    assert not any(rates)
    assert [m.drop_prob for m in method.backbone.modules() if isinstance(m, DropPath)] == [0.25, 0.25, 0.5, 0.5]
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(method.slow_backbone(images), method.slow_backbone(images))


def test_a_vision_transformer_takes_crops_of_two_sizes():
    network = vit.build(vit.Config(size="tiny", depth=1, patch=8, image_size=32))
    method = dino.build(SMALL, network, facts(2))
    crops = [torch.randn(2, 3, side, side) for side in (32, 32, 16, 16, 16)]
    result = method(batch_of(crops), at(0))
    result.loss.backward()
    assert network.trunk.pos_embed.grad is not None
    assert 0 < result.scalars["teacher_entropy"] <= np.log(9) + 1e-5


def test_only_the_first_two_crops_reach_the_teacher():
    method, _ = told(dino.Config(prototypes=4))
    seen: list[Tensor] = []
    method.slow_head = nn.Identity()
    method.slow_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    views = torch.randn(5, 3, 4, dtype=torch.float64)
    method(batch_of(views), at(0))
    torch.testing.assert_close(seen[0], interleave(list(views[:2])))
