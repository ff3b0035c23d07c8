"""MoCo v3 equal to the authors' code: loss, ViT and ResNet modules, schedule, a training trajectory, and over ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.backbones import vit
from sslcli.config import load
from sslcli.config.optim import AdamW, ParamRule
from sslcli.config.optim import Lars as LarsConfig
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.engine.optim import make_optimizer, param_groups
from sslcli.errors import UserError
from sslcli.methods import mocov3
from sslcli.methods.mocov3 import contrast
from sslcli.nn.slow import cosine_momentum


class Tiny(Backbone):
    """The reference's encoder without its last layer: (B, 12) to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential()
        self.trunk.add_module("l1", nn.Linear(12, 10))
        self.trunk.add_module("bn", nn.BatchNorm1d(10))
        self.trunk.add_module("relu", nn.ReLU())
        self.dim = 10

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def taps(self, images: Tensor, names: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


FACTS = RunFacts(images=100, batch_size=8, part_size=8, steps_per_epoch=2, total_steps=6)


def build(backbone: Backbone, **settings: object) -> mocov3.MoCoV3:
    torch.manual_seed(0)
    return mocov3.build(mocov3.Config(**settings), backbone, FACTS)


def batch_of(*views: Tensor) -> Batch:
    return Batch(views=list(views), index=torch.arange(len(views[0])))


def at(step: int, total: int = 6) -> Progress:
    return Progress(step=step, total=total, steps_per_epoch=2, seed=0)


def official(tensors: dict[str, Any], head: str) -> dict[str, Any]:
    """Tensors of the method under the names of the authors' checkpoints, where the projector is called `head`."""
    names = {
        "backbone.trunk.": "base_encoder.",
        "projector.": f"base_encoder.{head}.",
        "slow_backbone.trunk.": "momentum_encoder.",
        "slow_projector.": f"momentum_encoder.{head}.",
        "predictor.": "predictor.",
    }
    found: dict[str, Any] = {}
    for key, value in tensors.items():
        ours = next(ours for ours in names if key.startswith(ours))
        found[names[ours] + key.removeprefix(ours)] = value
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", ["T0.07", "T0.2", "T1"])
def test_loss_and_gradient(golden, name):
    case = np.load(golden / "mocov3" / f"loss_{name}.npz")
    q1, q2 = (torch.from_numpy(case[key]).requires_grad_() for key in ("in_q1", "in_q2"))
    k1, k2 = (torch.from_numpy(case[key]) for key in ("in_k1", "in_k2"))
    one, two = (contrast(q, k, 0, float(case["param_T"])).loss for q, k in ((q1, k2), (q2, k1)))
    (one + two).backward()
    np.testing.assert_allclose(one.item(), case["out_loss_q1k2"], rtol=1e-9)
    np.testing.assert_allclose(two.item(), case["out_loss_q2k1"], rtol=1e-9)
    for other in ("out", "alt_sololearn"):
        np.testing.assert_allclose((one + two).item(), case[f"{other}_loss"], rtol=1e-9)
    np.testing.assert_allclose(q1.grad.numpy(), case["grad_q1"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(q2.grad.numpy(), case["grad_q2"], rtol=1e-9, atol=1e-10)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["n1", "n4_t10", "n8_t02", "same_n6"])
def test_one_direction(golden, name):
    case = np.load(golden / "mocov3" / f"contrastive_loss_{name}.npz")
    q = torch.from_numpy(case["q"]).requires_grad_()
    loss = contrast(q, torch.from_numpy(case["k"]), 0, float(case["T"])).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(q.grad.numpy(), case["grad_q"], rtol=1e-9, atol=1e-10)


def on_ranks(path: Path) -> tuple[float, Tensor]:
    case = np.load(path)
    q, k = (torch.from_numpy(case[key]).chunk(dist.world())[dist.rank()].clone() for key in ("in_q", "in_k"))
    q.requires_grad_()
    loss = contrast(q, dist.gather(k), dist.rank() * len(q), float(case["param_T"])).loss
    loss.backward()
    assert q.grad is not None
    return loss.item(), q.grad


@pytest.mark.golden
@pytest.mark.dist
def test_two_ranks(golden, two_ranks):
    path = golden / "mocov3" / "dist2.npz"
    case = np.load(path)
    for rank, (loss, grad) in enumerate(two_ranks(on_ranks, path)):
        np.testing.assert_allclose(loss, case["out_loss"][rank], rtol=1e-9)
        np.testing.assert_allclose(grad, case["grad_q"][rank], rtol=1e-9, atol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["short", "vits300", "r50_100"])
def test_momentum(golden, name):
    case = np.load(golden / "mocov3" / f"schedule_{name}.npz")
    found = [cosine_momentum(float(case["moco_m"]), 1.0, epoch / float(case["epochs"])) for epoch in case["epoch"]]
    np.testing.assert_allclose(found, case["momentum"], rtol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["d16", "d12_t10"])
def test_whole_vit_module(golden, filled, name):
    """Loss, every gradient, and the twin after its update, which the reference makes before computing keys."""
    case = np.load(golden / "mocov3" / f"forward_moco_vit_{name}.npz")
    grads = np.load(golden / "mocov3" / f"forward_moco_vit_{name}.grads.npz")
    meta = json.loads(str(case["meta"]))
    cfg = vit.Config(
        width=meta["embed_dim"],
        depth=meta["depth"],
        heads=meta["heads"],
        patch=meta["patch"],
        image_size=meta["img"],
        positions="sincos",
        freeze_patch_embed=meta["stop_grad_conv1"],
    )
    momentum = float(case["momentum"])
    settings = {"dim": meta["dim"], "hidden": meta["mlp_dim"], "temperature": float(case["T"])}
    method = build(vit.build(cfg), **settings, momentum=momentum, end_momentum=momentum).double()
    tensors = official(method.state_dict(), "head")
    assert {key: list(value.shape) for key, value in tensors.items()} == meta["layout"]
    for key, value in tensors.items():
        if key in meta["kept"]:  # fixed positions, computed in float32 there and in float64 here
            np.testing.assert_allclose(value, case["after_m/pos_embed"], rtol=0, atol=1e-6)
            value.copy_(torch.from_numpy(case["after_m/pos_embed"]))
        else:
            value.copy_(torch.as_tensor(filled(key, value.shape)))
    method.after_step(at(0))
    for key in case:
        if key.startswith("after_m/"):
            found = tensors[f"momentum_encoder.{key.removeprefix('after_m/')}"]
            np.testing.assert_allclose(found, case[key], rtol=1e-12, atol=1e-12)
    loss = method(batch_of(torch.from_numpy(case["x1"]), torch.from_numpy(case["x2"])), at(0)).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-8)
    found = {key: p.grad for key, p in official(dict(method.named_parameters()), "head").items() if p.requires_grad}
    assert {f"grad/{key}" for key in found} == set(grads)
    for key, value in found.items():
        np.testing.assert_allclose(value, grads[f"grad/{key}"], rtol=1e-8, atol=1e-8, err_msg=key)


@pytest.mark.golden
def test_training_trajectory_of_the_resnet_recipe(golden):
    case = np.load(golden / "mocov3" / "train_traj_lars.npz")
    settings = {"dim": int(case["param_dim"]), "hidden": int(case["param_mlp_dim"]), "layers": 2}
    momentum = float(case["param_moco_m"])
    method = build(
        Tiny(), **settings, predictor_norm=False, temperature=float(case["param_T"]), momentum=momentum
    ).double()
    tensors = official(method.state_dict(), "fc")
    assert {f"init/{key}" for key in tensors} == {key for key in case if key.startswith("init/")}
    for key, value in tensors.items():
        value.copy_(torch.as_tensor(case[f"init/{key}"]))
    cfg = LarsConfig(lr=1.0, eta=float(case["param_trust_coefficient"]), weight_decay=float(case["param_weight_decay"]))
    rules = [ParamRule(one_dim=True, weight_decay=0, adapt=False)]
    optimizer = make_optimizer(param_groups(method.named_parameters(), cfg, rules), cfg, 1.0, torch.device("cpu"))
    steps = len(case["out_losses"])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(case["out_lrs"][step])
        result = method(batch_of(*torch.from_numpy(case["in_images"][step])), at(step, steps))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        np.testing.assert_allclose(result.loss.item(), case["out_losses"][step], rtol=1e-7)
        if step < steps - 1:  # the reference moves the twin in the next forward pass
            method.after_step(at(step, steps))
    for key, value in tensors.items():
        np.testing.assert_allclose(value.numpy(), case[f"final/{key}"], rtol=1e-7, atol=1e-9, err_msg=key)


def test_the_twin_ends_still():
    method = build(Tiny(), dim=4, hidden=8, momentum=0.9)
    before = method.slow_backbone.trunk.l1.weight.clone()
    method.backbone.trunk.l1.weight.data.add_(1)
    method.after_step(at(5))  # the last of six steps: momentum 1
    torch.testing.assert_close(method.slow_backbone.trunk.l1.weight, before)
    method.after_step(at(2))  # half of the run is done after it: momentum 0.95
    torch.testing.assert_close(method.slow_backbone.trunk.l1.weight, before + 0.05)


def test_heads_of_both_recipes():
    for_vit = build(Tiny(), dim=4, hidden=8)
    assert [type(layer).__name__ for layer in for_vit.projector] == [
        *("Linear", "BatchNorm1d", "ReLU") * 2,
        *("Linear", "BatchNorm1d"),
    ]
    assert not for_vit.projector[-1].affine
    assert not for_vit.predictor[-1].affine
    for_resnet = build(Tiny(), dim=4, hidden=8, layers=2, predictor_norm=False)
    assert isinstance(for_resnet.predictor[-1], nn.Linear)
    linear = [layer for layer in [*for_vit.modules(), *for_resnet.projector] if isinstance(layer, nn.Linear)]
    assert all(layer.bias is None for layer in linear if layer.in_features != 12)


def test_loss_of_strangers():
    found = contrast(torch.eye(8), torch.roll(torch.eye(8), 1, 1), 0, 0.5)
    assert found.top1 == 0
    apart = contrast(torch.eye(32)[:8], torch.eye(32)[16:], 8, 0.5).loss  # 16 keys, none like any query
    torch.testing.assert_close(apart, torch.tensor(16.0).log())


def test_stays_in_32_bits_under_autocast():
    q, k = torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrast(q, k, 0, 0.1).loss
    assert torch.equal(inside, contrast(q, k, 0, 0.1).loss)


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="`mocov3` compares the images of a forward pass"):
        mocov3.build(mocov3.Config(dim=4, hidden=8), Tiny(), RunFacts(100, 1, 1, 5, 10))


@pytest.mark.parametrize(("name", "size", "subtract"), [("vits16", "small", False), ("vitb16", "base", True)])
def test_recipes_for_vit(name, size, subtract):
    preset = load.load("pretrain", f"mocov3-{name}-300e").preset
    assert (preset.data.batch_size, preset.run.epochs, preset.run.batch_norm) == (4096, 300, "global")
    assert preset.method == mocov3.Config()
    assert preset.backbone == vit.Config(
        size=size, heads=12, patch=16, image_size=224, positions="sincos", init="mocov3", freeze_patch_embed=True
    )
    assert preset.optim == AdamW(lr=1.5e-4, per=256, weight_decay=0.1)
    assert preset.optim.effective_lr(4096) == pytest.approx(2.4e-3)
    schedule = preset.schedule
    assert (schedule.name, schedule.by, schedule.end, schedule.warmup.epochs) == ("cosine", "step", 0, 40)
    assert schedule.warmup.subtract == subtract
    assert_views(preset, 0.08)


@pytest.mark.parametrize(
    ("epochs", "lr", "decay", "momentum"), [(100, 9.6, 1e-6, 0.99), (300, 4.8, 1e-6, 0.99), (1000, 4.8, 1.5e-6, 0.996)]
)
def test_recipes_for_resnet(epochs, lr, decay, momentum):
    preset = load.load("pretrain", f"mocov3-r50-{epochs}e").preset
    assert (preset.data.batch_size, preset.run.epochs, preset.run.batch_norm) == (4096, epochs, "global")
    assert preset.method == mocov3.Config(layers=2, predictor_norm=False, temperature=1.0, momentum=momentum)
    assert preset.optim.effective_lr(4096) == pytest.approx(lr)
    assert (preset.optim.variant, preset.optim.weight_decay) == ("lr_outside", decay)
    schedule = preset.schedule
    assert (schedule.name, schedule.by, schedule.end, schedule.warmup.epochs) == ("cosine", "step", 0, 10)
    assert schedule.warmup.subtract
    assert preset.backbone.zero_init_residual
    assert_views(preset, 0.2)


def assert_views(preset: Any, smallest: float) -> None:
    byol = load.load("pretrain", "byol-r50-200e").preset.views
    groups = tuple(
        group.model_copy(update={"scale": (smallest, 1.0), "interpolation": "bilinear"}) for group in byol.groups
    )
    assert preset.views == byol.model_copy(update={"groups": groups})
