"""Barlow Twins equal to four implementations, to a training trajectory of the authors' code, and over ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.config import load
from sslcli.config.optim import Lars as LarsConfig
from sslcli.config.optim import ParamRule
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.engine.optim import make_optimizer, param_groups
from sslcli.errors import UserError
from sslcli.methods import barlowtwins
from sslcli.methods.barlowtwins import cross_correlation, redundancy

AT = Progress(step=0, total=10, steps_per_epoch=5, seed=0)
NAMES = {"backbone.trunk.": "backbone.", "projector.": "projector.", "norm.": "bn."}


class Tiny(Backbone):
    """The reference's encoder: (B, 12) to (B, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU())
        self.dim = 9

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def taps(self, images: Tensor, names: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


def build(**settings: object) -> barlowtwins.BarlowTwins:
    torch.manual_seed(0)
    cfg = barlowtwins.Config(**{"dim": 7, "hidden": 8, **settings})
    return barlowtwins.build(cfg, Tiny(), RunFacts(100, 8, 8, 5, 10))


def loss_of(z1: Tensor, z2: Tensor, off_diagonal: float) -> Tensor:
    """From projections to the loss, as the method does it."""
    norm = nn.BatchNorm1d(z1.shape[1], affine=False, dtype=z1.dtype)
    return redundancy(cross_correlation(norm(z1), norm(z2)), off_diagonal)


def official(method: barlowtwins.BarlowTwins) -> dict[str, Tensor]:
    """The method's tensors under the names of the authors' checkpoints."""
    found: dict[str, Tensor] = {}
    for key, value in method.state_dict().items():
        ours = next(ours for ours in NAMES if key.startswith(ours))
        found[NAMES[ours] + key.removeprefix(ours)] = value
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", ["basic", "lambda1", "shifted_scaled", "constant_feature"])
def test_loss_and_gradient(golden, name):
    case = np.load(golden / "barlowtwins" / f"loss_{name}.npz")
    z1, z2 = (torch.from_numpy(case[key]).requires_grad_() for key in ("in_z1", "in_z2"))
    loss = loss_of(z1, z2, float(case["param_lambd"]))
    loss.backward()
    for other in ("out", "alt_mmselfsup0x", "alt_lightly", "alt_sololearn_scale1"):
        np.testing.assert_allclose(loss.item(), case[f"{other}_loss"], rtol=1e-9)
    np.testing.assert_allclose(z1.grad.numpy(), case["grad_z1"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(z2.grad.numpy(), case["grad_z2"], rtol=1e-9, atol=1e-9)


@pytest.mark.golden
def test_training_trajectory(golden):
    case = np.load(golden / "barlowtwins" / "train_traj_lars.npz")
    method = build(off_diagonal=float(case["param_lambd"])).double()
    start = official(method)
    assert {f"init/{key}" for key in start} == {key for key in case if key.startswith("init/")}
    for key, value in start.items():
        value.copy_(torch.as_tensor(case[f"init/{key}"]))
    cfg = LarsConfig(lr=1.0, eta=float(case["param_eta"]), weight_decay=float(case["param_weight_decay"]))
    scale = float(case["param_learning_rate_biases"] / case["param_learning_rate_weights"])
    rules = [ParamRule(one_dim=True, weight_decay=0, adapt=False, lr_scale=scale)]
    groups = param_groups(method.named_parameters(), cfg, rules)
    optimizer = make_optimizer(groups, cfg, 1.0, torch.device("cpu"))
    for step, (weights, biases) in enumerate(case["out_lrs"]):
        for group in optimizer.param_groups:
            group["lr"] = float(weights) * group["lr_scale"]
        np.testing.assert_allclose(min(g["lr"] for g in optimizer.param_groups), biases, rtol=1e-12)
        views = torch.from_numpy(case["in_images"][step])
        result = method(Batch(views=list(views), index=torch.arange(len(views[0]))), AT)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        np.testing.assert_allclose(result.loss.item(), case["out_losses"][step], rtol=1e-7)
    for key, value in official(method).items():
        np.testing.assert_allclose(value.numpy(), case[f"final/{key}"], rtol=1e-6, atol=1e-8, err_msg=key)


def on_ranks(path: Path) -> tuple[float, Tensor, Tensor]:
    case = np.load(path)
    z1, z2 = (
        torch.from_numpy(case[key]).chunk(dist.world())[dist.rank()].clone().requires_grad_()
        for key in ("in_z1", "in_z2")
    )
    loss = loss_of(z1, z2, float(case["param_lambd"]))  # batch norm of this rank's rows alone, as in the recording
    loss.backward()
    assert z1.grad is not None
    assert z2.grad is not None
    return loss.item(), z1.grad, z2.grad


@pytest.mark.golden
@pytest.mark.dist
def test_two_ranks(golden, two_ranks):
    path = golden / "barlowtwins" / "dist2_localbn.npz"
    case = np.load(path)
    for rank, (loss, grad1, grad2) in enumerate(two_ranks(on_ranks, path)):
        np.testing.assert_allclose(loss, case["out_loss"][rank], rtol=1e-9)
        # each rank contributes twice what the undifferentiated sum of the reference lets through; DDP halves it
        np.testing.assert_allclose(grad1 / 2, case["grad_z1"][rank], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(grad2 / 2, case["grad_z2"][rank], rtol=1e-9, atol=1e-10)


def test_equal_and_uncorrelated_features_cost_nothing():
    rows = torch.linalg.qr(torch.randn(16, 5, dtype=torch.float64))[0] * 4  # orthogonal columns of mean square 1
    torch.testing.assert_close(redundancy(cross_correlation(rows, rows), 1.0), rows.new_zeros(()))
    strangers = torch.linalg.qr(torch.randn(16, 10, dtype=torch.float64))[0] * 4
    torch.testing.assert_close(
        redundancy(cross_correlation(strangers[:, :5], strangers[:, 5:]), 1.0), rows.new_full((), 5.0)
    )


def test_stays_in_32_bits_under_autocast():
    z1, z2 = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cross_correlation(z1, z2)
    assert torch.equal(inside, cross_correlation(z1, z2))


def test_heads():
    method = build(layers=2)
    shapes = [layer.weight.shape for layer in method.projector if isinstance(layer, nn.Linear)]
    assert shapes == [(8, 9), (7, 8)]
    assert all(layer.bias is None for layer in method.projector if isinstance(layer, nn.Linear))
    assert isinstance(method.projector[-1], nn.Linear)


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="`barlowtwins` compares the images of a forward pass"):
        barlowtwins.build(barlowtwins.Config(dim=8, hidden=8), Tiny(), RunFacts(100, 1, 1, 5, 10))


@pytest.mark.parametrize(
    ("name", "parts", "epochs", "gpus"),
    [
        ("barlowtwins-r50-100e", 8, 100, 8),
        ("barlowtwins-r50-300e", 1, 300, 8),
        ("barlowtwins-r50-1000e", 1, 1000, 16),
    ],
)
def test_recipes(name, parts, epochs, gpus):
    preset = load.load("pretrain", name).preset
    assert (preset.data.batch_size, preset.run.accumulate, preset.run.epochs) == (2048, parts, epochs)
    assert preset.method == barlowtwins.Config()
    assert preset.optim.effective_lr(2048) == pytest.approx(1.6)
    assert preset.optim.weight_decay == 1e-6
    official = gpus == 16
    assert preset.optim.variant == ("lr_outside" if official else "lr_inside")
    (rule,) = preset.optim.rules
    assert rule.lr_scale == pytest.approx(0.024 / gpus)  # their gradient is the true one over the number of GPUs
    assert (rule.one_dim, rule.weight_decay, rule.adapt) == (True, 0, False)
    schedule = preset.schedule
    assert (schedule.name, schedule.by, schedule.end, schedule.warmup.epochs) == ("cosine", "step", 0.001, 10)
    assert (schedule.warmup.start, schedule.warmup.subtract) == ((0, True) if official else (1.6e-4, False))
    assert preset.run.batch_norm == "global"
    assert preset.backbone.zero_init_residual
    assert preset.views == load.load("pretrain", "byol-r50-200e").preset.views
