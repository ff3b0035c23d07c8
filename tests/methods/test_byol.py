"""BYOL equal to four implementations of the loss, to the momentum schedule, and to whole training trajectories."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslcli.config import load
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.engine.optim import Lars
from sslcli.errors import UserError
from sslcli.methods import byol
from sslcli.methods.byol import regression
from sslcli.nn.slow import cosine_momentum

NAMES = {
    "backbone.trunk.": "online_net.0.",
    "projector.": "online_net.1.",
    "slow_backbone.trunk.": "target_net.0.",
    "slow_projector.": "target_net.1.",
    "predictor.": "head.predictor.",
}
LAYERS = {"0": "fc0", "1": "bn0", "3": "fc1"}


class Tiny(Backbone):
    """The reference's encoder: (B, 3, 5, 5) to (B, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential()
        self.trunk.add_module("conv", nn.Conv2d(3, 9, 3, stride=2, padding=1, bias=False))
        self.trunk.add_module("bn", nn.BatchNorm2d(9))
        self.trunk.add_module("relu", nn.ReLU())
        self.dim = 9

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images).mean((2, 3))

    def maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def taps(self, images: Tensor, names: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


def facts(batch: int) -> RunFacts:
    return RunFacts(images=100, batch_size=batch, part_size=batch, steps_per_epoch=10, total_steps=100)


def build(**settings: object) -> byol.BYOL:
    torch.manual_seed(0)
    cfg = byol.Config(**{"dim": 6, "hidden": 8, **settings})
    return byol.build(cfg, Tiny(), facts(6))


def at(step: int, total: int) -> Progress:
    return Progress(step=step, total=total, steps_per_epoch=10, seed=0)


def official(method: byol.BYOL) -> dict[str, Tensor]:
    """The method's tensors under the names of MMSelfSup's checkpoints."""
    found: dict[str, Tensor] = {}
    for key, value in method.state_dict().items():
        ours = next(ours for ours in NAMES if key.startswith(ours))
        rest = key.removeprefix(ours)
        if "trunk" not in ours:
            number, name = rest.split(".")
            rest = f"{LAYERS[number]}.{name}"
        found[NAMES[ours] + rest] = value
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", ["basic", "scaled", "aligned_and_opposite"])
def test_loss_and_gradient(golden, name):
    case = np.load(golden / "byol" / f"loss_{name}.npz")
    p1, p2 = (torch.from_numpy(case[key]).requires_grad_() for key in ("in_p1", "in_p2"))
    z1, z2 = (torch.from_numpy(case[key]) for key in ("in_z1", "in_z2"))
    loss = regression(p1, z2) + regression(p2, z1)
    loss.backward()
    for other in ("out", "alt_lucidrains", "alt_sololearn"):
        np.testing.assert_allclose(loss.item(), case[f"{other}_loss"], rtol=1e-9, atol=1e-9)
    for other in ("alt_mmselfsup0x", "alt_openselfsup"):
        np.testing.assert_allclose(loss.item() - 4, case[f"{other}_loss"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(p1.grad.numpy(), case["grad_p1"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(p2.grad.numpy(), case["grad_p2"], rtol=1e-9, atol=1e-9)


@pytest.mark.golden
def test_tiny_inputs_are_normalised_as_mmselfsup_does(golden):
    case = np.load(golden / "byol" / "loss_tiny_inputs.npz")
    p1, p2, z1, z2 = (torch.from_numpy(case[f"in_{key}"]).requires_grad_() for key in ("p1", "p2", "z1", "z2"))
    loss = regression(p1, z2) + regression(p2, z1)
    loss.backward()
    np.testing.assert_allclose(loss.item() - 4, case["alt_mmselfsup0x_loss"], rtol=1e-9)
    np.testing.assert_allclose(p1.grad.numpy(), case["alt_mmselfsup0x_grad_p1"], rtol=1e-9)


@pytest.mark.golden
def test_loss_of_mmselfsup_1x(golden):
    case = np.load(golden / "byol" / "cosine_loss_mmselfsup1x.npz")
    prediction = torch.from_numpy(case["in_pred"]).requires_grad_()
    loss = (regression(prediction, torch.from_numpy(case["in_target"])) - 2) / 2
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["out_loss"], rtol=1e-9)
    np.testing.assert_allclose(prediction.grad.numpy(), case["grad_pred"], rtol=1e-9, atol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["0.99", "0.996"])
def test_momentum(golden, name):
    case = np.load(golden / "byol" / f"tau_schedule_{name}.npz")
    total = int(case["param_max_iters"])
    found = [cosine_momentum(float(case["param_base"]), 1.0, step / total) for step in case["in_steps"]]
    for other in ("deepmind_tau", "sololearn_tau", "mmselfsup_m"):
        np.testing.assert_allclose(found, case[f"out_{other}"], rtol=1e-12)


@pytest.mark.golden
def test_momentum_with_accumulated_gradients(golden):
    """MMSelfSup's is that of the pass which ends the step: (n - 1) / (n K) further on than ours."""
    case = np.load(golden / "byol" / "tau_schedule_interval16.npz")
    every, passes = int(case["param_update_interval"]), int(case["param_max_iters"])
    ends = np.flatnonzero(case["out_mmselfsup_updated"])
    assert list(ends) == [every * (step + 1) - 1 for step in range(passes // every)]
    for step, end in enumerate(ends):
        theirs = cosine_momentum(0.996, 1.0, step * every / passes + (every - 1) / passes)
        np.testing.assert_allclose(theirs, case["out_mmselfsup_m"][end], rtol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["train_traj_mmselfsup", "train_traj_mmselfsup_accum2"])
def test_training_trajectory(golden, name):
    case = np.load(golden / "byol" / f"{name}.npz")
    method = build(momentum=float(case["param_base_momentum"])).double()
    start = official(method)
    names = {key.removeprefix("init/") for key in case if key.startswith("init/")}
    assert start.keys() == {key for key in names if not key.startswith(("backbone.", "neck."))}  # the rest are aliases
    for key, value in start.items():
        value.copy_(torch.as_tensor(case[f"init/{key}"]))
    trained = [p for p in method.parameters() if p.requires_grad]
    decay = float(case["param_weight_decay"])
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "adapt": False},
    ]
    optimizer = Lars(groups, float(case["param_lr"]), 0.9, variant="lr_inside")
    every, total = int(case["param_update_interval"]), int(case["param_max_iters"])
    for turn in range(int(case["param_iters"])):
        views = torch.from_numpy(case["in_images"][turn])
        result = method(Batch(views=list(views), index=torch.arange(len(views[0]))), at(turn, total))
        (result.loss / every).backward()
        np.testing.assert_allclose(result.loss.item() - 4, case["out_losses"][turn], rtol=1e-7)
        if (turn + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(at(turn, total))  # the reference's clock counts passes
    for key, value in official(method).items():
        np.testing.assert_allclose(value.numpy(), case[f"final/{key}"], rtol=1e-7, atol=1e-9, err_msg=key)


def test_the_twin_starts_where_the_student_starts_and_follows_its_parameters():
    method = build(momentum=0.9)
    for p in [*method.backbone.parameters(), *method.projector.parameters()]:
        p.data.add_(1)
    method.copy_student()
    twin, student = method.slow_backbone.trunk.conv.weight, method.backbone.trunk.conv.weight
    assert torch.equal(twin, student)
    before = twin.clone()
    student.data.add_(1)
    method.after_step(at(5, 10))  # half way: momentum 0.95
    torch.testing.assert_close(twin, before + 0.05)
    method.after_step(at(10, 10))
    torch.testing.assert_close(twin, before + 0.05)  # momentum 1: it stands still


def test_last_bias():
    assert build().projector[3].bias is None
    assert build(last_bias=True).predictor[3].bias is not None


def test_collapse_shows():
    method = build()
    method.backbone.trunk.conv.weight.data.zero_()
    batch = Batch(views=[torch.randn(6, 3, 5, 5), torch.randn(6, 3, 5, 5)], index=torch.arange(6))
    assert method(batch, at(0, 10)).scalars["spread"] == 0
    assert build()(batch, at(0, 10)).scalars["spread"] > 0.1


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="`byol` compares the images of a forward pass, which here holds only 1"):
        byol.build(byol.Config(), Tiny(), facts(1))


@pytest.mark.parametrize(
    ("name", "batch", "parts", "epochs", "lr", "momentum"),
    [
        ("byol-r50-100e", 4096, 16, 100, 7.2, 0.99),
        ("byol-r50-200e", 4096, 16, 200, 4.8, 0.99),
        ("byol-r50-300e", 4096, 16, 300, 4.8, 0.99),
        ("byol-r50-accum2-100e", 4096, 2, 100, 7.2, 0.99),
        ("byol-r50-accum2-200e", 4096, 2, 200, 4.8, 0.99),
        ("byol-r50-accum2-300e", 4096, 2, 300, 4.8, 0.99),
        ("byol-r50-4096-200e", 4096, 1, 200, 4.8, 0.99),
        ("byol-r50-256-200e", 256, 1, 200, 0.2, 0.996),
        ("byol-r50-1000e", 4096, 1, 1000, 3.2, 0.996),
    ],
)
def test_recipes(name, batch, parts, epochs, lr, momentum):
    preset = load.load("pretrain", name).preset
    assert (preset.data.batch_size, preset.run.accumulate, preset.run.epochs) == (batch, parts, epochs)
    assert preset.optim.effective_lr(batch) == pytest.approx(lr)
    assert preset.method == byol.Config(momentum=momentum, last_bias=name == "byol-r50-256-200e")
    assert preset.run.batch_norm == (32 if name == "byol-r50-256-200e" else "global")
    official = name == "byol-r50-1000e"
    assert preset.optim.variant == ("lr_outside" if official else "lr_inside")
    assert preset.optim.weight_decay == (1.5e-6 if momentum == 0.996 else 1e-6)
    assert preset.schedule.by == ("step" if official else "epoch")
    assert preset.schedule.warmup.subtract == official
    assert preset.schedule.warmup.epochs == (2 if batch == 256 else 10)
    (rule,) = preset.optim.rules
    assert (rule.one_dim, rule.weight_decay, rule.adapt) == (True, 0, False)
    one, two = preset.views.groups
    for group in (one, two):
        assert (group.size, group.scale, group.interpolation, group.grey) == (224, (0.08, 1.0), "bicubic", 0.2)
        jitter = group.jitter
        assert (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
            0.8,
            0.4,
            0.4,
            0.2,
            0.1,
        )
    assert (one.blur.p, one.solarize, two.blur.p, two.solarize.p) == (1.0, None, 0.1, 0.2)
    assert preset.backbone.zero_init_residual is False
