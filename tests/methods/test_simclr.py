"""NT-Xent equal to six implementations, and to the full batch on several ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.backbones import resnet
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.methods import simclr
from sslcli.methods.simclr import nt_xent
from sslcli.nn.views import interleave

AT = Progress(step=0, total=10, steps_per_epoch=5, seed=0)
FACTS = RunFacts(images=100, batch_size=8, part_size=8, steps_per_epoch=5, total_steps=10)


def unit(z1: Tensor, z2: Tensor) -> Tensor:
    return F.normalize(interleave([z1, z2]), dim=1)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["T0.07", "T0.1_uncorrelated", "T0.5_scaled", "T1_N2_normalised_inputs"])
def test_loss_and_gradient(golden, name):
    case = np.load(golden / "simclr" / f"ntxent_{name}.npz")
    z1, z2 = (torch.from_numpy(case[key]).requires_grad_() for key in ("in_z1", "in_z2"))
    rows = unit(z1, z2)
    loss = nt_xent(rows, rows, 0, float(case["param_temperature"])).loss
    loss.backward()
    for other in ("out", "alt_lightly", "alt_sololearn", "alt_mmselfsup", "alt_leftthomas"):
        # MMSelfSup divides by the norm + 1e-10
        np.testing.assert_allclose(loss.item(), case[f"{other}_loss"], rtol=1e-7 if "mm" in other else 1e-9)
    # Google's code adds the two directions instead of averaging them
    np.testing.assert_allclose(2 * loss.item(), case["alt_google_tf2_loss_f32"], rtol=1e-5)
    np.testing.assert_allclose(z1.grad.numpy(), case["grad_z1"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(z2.grad.numpy(), case["grad_z2"], rtol=1e-9, atol=1e-10)


def on_ranks(path: Path) -> tuple[float, Tensor, Tensor]:
    case = np.load(path)
    z1, z2 = (
        torch.from_numpy(case[key]).chunk(dist.world())[dist.rank()].clone().requires_grad_()
        for key in ("in_z1", "in_z2")
    )
    rows = unit(z1, z2)
    loss = nt_xent(rows, dist.gather_with_grad(rows), dist.rank() * len(rows), float(case["param_temperature"])).loss
    loss.backward()
    assert z1.grad is not None
    assert z2.grad is not None
    return loss.item(), z1.grad, z2.grad


@pytest.mark.golden
@pytest.mark.dist
def test_two_ranks_give_the_gradient_of_the_full_batch(golden, two_ranks):
    path = golden / "simclr" / "dist2.npz"
    case = np.load(path)
    found = two_ranks(on_ranks, path)
    np.testing.assert_allclose(np.mean([loss for loss, _, _ in found]), case["ref_full_batch_loss"], rtol=1e-9)
    for rank, (loss, grad1, grad2) in enumerate(found):
        np.testing.assert_allclose(loss, case["out_lightly_loss"][rank], rtol=1e-9)
        np.testing.assert_allclose(grad1, case["out_lightly_grad_z1"][rank], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(grad2, case["out_lightly_grad_z2"][rank], rtol=1e-9, atol=1e-12)
    for number, key in ((1, "ref_full_batch_grad_z1"), (2, "ref_full_batch_grad_z2")):
        whole = torch.cat([answer[number] for answer in found]) / 2  # DDP averages what each rank contributes
        np.testing.assert_allclose(whole, case[key], rtol=1e-9, atol=1e-12)


def test_loss_of_strangers_is_the_log_of_their_number():
    rows = torch.eye(12)  # no view resembles any other
    found = nt_xent(rows, rows, 0, 0.5)
    torch.testing.assert_close(found.loss, torch.tensor(11.0).log())


def test_stays_in_32_bits_under_autocast():
    rows = F.normalize(torch.randn(8, 16), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(rows, rows, 0, 0.1).loss
    assert torch.equal(inside, nt_xent(rows, rows, 0, 0.1).loss)


def method(**settings: object) -> simclr.SimCLR:
    torch.manual_seed(0)
    backbone = resnet.build(resnet.Config(depth=10, width=8, stem="small"))
    return simclr.build(simclr.Config(**settings), backbone, FACTS)


def test_heads():
    kinds = [type(layer) for layer in method(dim=8).head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert all(layer.bias is None for layer in method().head if isinstance(layer, nn.Linear))
    plain = method(batch_norm=False, hidden=48, layers=3).head
    assert [layer.weight.shape for layer in plain if isinstance(layer, nn.Linear)] == [(48, 64), (48, 48), (128, 48)]
    assert all(layer.bias is not None for layer in plain if isinstance(layer, nn.Linear))


def test_views_share_statistics_only_when_joint():
    views = [torch.randn(8, 3, 16, 16), 5 + torch.randn(8, 3, 16, 16)]
    batch = Batch(views=views, index=torch.arange(8))
    joint, apart = method().double(), method(joint=False).double()
    batch = Batch(views=[view.double() for view in views], index=batch.index)
    assert not torch.allclose(joint(batch, AT).loss, apart(batch, AT).loss)
    assert joint.backbone.trunk.bn1.num_batches_tracked == 1
    assert apart.backbone.trunk.bn1.num_batches_tracked == 2
    joint.eval(), apart.eval()
    apart.load_state_dict(joint.state_dict())
    torch.testing.assert_close(joint(batch, AT).loss, apart(batch, AT).loss)


def test_the_order_of_images_and_views_does_not_matter():
    trained = method().double()
    a, b = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    order = torch.randperm(8)
    loss = trained(Batch(views=[a, b], index=torch.arange(8)), AT).loss
    torch.testing.assert_close(trained(Batch(views=[b, a], index=torch.arange(8)), AT).loss, loss)
    torch.testing.assert_close(trained(Batch(views=[a[order], b[order]], index=order), AT).loss, loss)
