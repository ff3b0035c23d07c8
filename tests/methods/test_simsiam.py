"""SimSiam equal to the authors' loss and to whole training trajectories of their code."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslcli.config import load
from sslcli.config.optim import Sgd
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.engine.optim import make_optimizer, param_groups, set_lr
from sslcli.errors import UserError
from sslcli.methods import simsiam
from sslcli.methods.simsiam import negative_cosine

NAMES = {"backbone.trunk.": "encoder.", "projector.": "encoder.fc.", "predictor.": "predictor."}


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


AT = Progress(step=0, total=10, steps_per_epoch=5, seed=0)
FACTS = RunFacts(images=100, batch_size=8, part_size=8, steps_per_epoch=5, total_steps=10)


def build(**settings: object) -> simsiam.SimSiam:
    torch.manual_seed(0)
    return simsiam.build(simsiam.Config(**{"dim": 7, "bottleneck": 4, **settings}), Tiny(), FACTS)


def batch_of(*views: Tensor) -> Batch:
    return Batch(views=list(views), index=torch.arange(len(views[0])))


def official(method: simsiam.SimSiam) -> dict[str, Tensor]:
    """The method's tensors under the names of the authors' checkpoints."""
    found: dict[str, Tensor] = {}
    for key, value in method.state_dict().items():
        ours = next(ours for ours in NAMES if key.startswith(ours))
        found[NAMES[ours] + key.removeprefix(ours)] = value
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", ["basic", "scaled", "tiny", "zero_row"])
def test_loss_and_gradient(golden, name):
    case = np.load(golden / "simsiam" / f"loss_{name}.npz")
    p1, p2, z1, z2 = (torch.from_numpy(case[f"in_{key}"]).requires_grad_() for key in ("p1", "p2", "z1", "z2"))
    loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
    loss.backward()
    assert z1.grad is None
    assert z2.grad is None
    # Rows shorter than 1e-8 are normalised as MMSelfSup does (1e-12), not as the authors' nn.CosineSimilarity.
    reference = "alt_mmselfsup0x_" if name in ("tiny", "zero_row") else ""
    np.testing.assert_allclose(loss.item(), case[f"{reference or 'out_'}loss"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(p1.grad.numpy(), case[f"{reference}grad_p1"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(p2.grad.numpy(), case[f"{reference}grad_p2"], rtol=1e-9, atol=1e-9)
    if not reference:
        np.testing.assert_allclose(2 * loss.item(), case["alt_sololearn_sum_loss"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["train_traj", "train_traj_nofix"])
def test_training_trajectory(golden, name):
    case = np.load(golden / "simsiam" / f"{name}.npz")
    settings = {"dim": int(case["param_dim"]), "bottleneck": int(case["param_pred_dim"])}
    method = build(**settings, fixed_predictor_lr=bool(case["param_fix_pred_lr"])).double()
    offset = torch.from_numpy(case["init/encoder.fc.6.bias"])  # frozen in the reference; the batch norm takes it out
    start = official(method)
    names = {key.removeprefix("init/") for key in case if key.startswith("init/")}
    assert start.keys() == names - {"encoder.fc.6.bias"}
    for key, value in start.items():
        value.copy_(torch.as_tensor(case[f"init/{key}"]))
    lr, epochs = float(case["param_init_lr"]), int(case["param_epochs"])
    cfg = Sgd(lr=lr, momentum=float(case["param_momentum"]), weight_decay=float(case["param_weight_decay"]))
    groups = param_groups(method.named_parameters(), cfg, method.param_rules())
    optimizer = make_optimizer(groups, cfg, lr, torch.device("cpu"))
    for epoch in range(epochs):
        set_lr(optimizer, lr, (1 + np.cos(np.pi * epoch / epochs)) / 2)
        rates = [group["lr"] for group in optimizer.param_groups]
        np.testing.assert_allclose(rates, case["out_lrs"][epoch], rtol=1e-12)
        for turn in range(int(case["param_iters"])):
            result = method(batch_of(*torch.from_numpy(case["in_images"][epoch, turn])), AT)
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
            np.testing.assert_allclose(result.loss.item(), case["out_losses"][epoch, turn], rtol=1e-7)
    steps = epochs * int(case["param_iters"])
    for key, value in official(method).items():
        wanted = case[f"final/{key}"]
        if key == "encoder.fc.7.running_mean":  # each of the 2 x steps passes took in a share of the offset
            wanted = wanted - offset.numpy() * (1 - 0.9 ** (2 * steps))
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-7, atol=1e-9, err_msg=key)


def test_heads():
    default = simsiam.build(simsiam.Config(), Tiny(), FACTS)
    shapes = [layer.weight.shape for layer in default.projector if isinstance(layer, nn.Linear)]
    assert shapes == [(10, 10), (10, 10), (2048, 10)]
    assert all(layer.bias is None for layer in default.projector if isinstance(layer, nn.Linear))
    assert not default.projector[-1].affine
    assert default.predictor[0].bias is None
    assert default.predictor[-1].bias is not None
    two = build(layers=2, hidden=32)
    assert [layer.weight.shape for layer in two.projector if isinstance(layer, nn.Linear)] == [(32, 10), (7, 32)]


def test_only_the_predictor_keeps_its_rate():
    method = build()
    groups = param_groups(method.named_parameters(), Sgd(lr=1.0), method.param_rules())
    fixed = {name for group in groups if group["fixed_lr"] for name in group["names"]}
    assert fixed == {name for name, _ in method.named_parameters() if name.startswith("predictor.")}
    assert build(fixed_predictor_lr=False).param_rules() == []


def test_the_loss_does_not_care_which_view_comes_first():
    method = build().double()
    a, b = torch.randn(2, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(method(batch_of(a, b), AT).loss, method(batch_of(b, a), AT).loss)


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="`simsiam` compares the images of a forward pass"):
        simsiam.build(simsiam.Config(), Tiny(), RunFacts(100, 16, 1, 5, 10))


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "lr"),
    [
        ("simsiam-r50-100e", 256, 100, 0.05),
        ("simsiam-r50-200e", 256, 200, 0.05),
        ("simsiam-r50-512-100e", 512, 100, 0.1),
    ],
)
def test_recipes(name, batch, epochs, lr):
    preset = load.load("pretrain", name).preset
    assert (preset.data.batch_size, preset.run.epochs, preset.run.batch_norm) == (batch, epochs, "global")
    assert preset.method == simsiam.Config()
    assert preset.optim == Sgd(lr=0.05, per=256, momentum=0.9, weight_decay=1e-4)
    assert preset.optim.effective_lr(batch) == pytest.approx(lr)
    assert (preset.schedule.name, preset.schedule.by, preset.schedule.warmup) == ("cosine", "epoch", None)
    assert preset.backbone.zero_init_residual
    assert preset.views == load.load("pretrain", "mocov2-r50-200e").preset.views  # the authors use MoCo v2's
