"""VICReg equal to the authors' code, term by term, and over ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parts import Still
from torch import Tensor, nn

from sslcli import dist
from sslcli.config import load
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import vicreg
from sslcli.methods.vicreg import Terms, vic_terms


def coefficients(case: np.lib.npyio.NpzFile) -> tuple[float, float, float]:
    return float(case["param_sim_coeff"]), float(case["param_std_coeff"]), float(case["param_cov_coeff"])


def weighted(terms: Terms, weights: tuple[float, float, float]) -> Tensor:
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["basic", "coeffs", "scaled"])
def test_loss_and_gradient(golden, name):
    case = np.load(golden / "vicreg" / f"loss_{name}.npz")
    z1, z2 = (torch.from_numpy(case[key]).requires_grad_() for key in ("in_z1", "in_z2"))
    terms = vic_terms(z1, z2, z1, z2)
    for term, key in zip(terms, ("sim", "std", "cov"), strict=True):
        np.testing.assert_allclose(term.item(), case[f"out_{key}_term"], rtol=1e-9, atol=1e-12)
    loss = weighted(terms, coefficients(case))
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["out_loss"], rtol=1e-9)
    np.testing.assert_allclose(z1.grad.numpy(), case["grad_z1"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(z2.grad.numpy(), case["grad_z2"], rtol=1e-9, atol=1e-9)
    # solo-learn adds the variance terms of the views, as the paper's formula does
    added = loss.item() + coefficients(case)[1] * terms.variance.item()
    np.testing.assert_allclose(added, case["alt_sololearn_loss"], rtol=1e-9)


def on_ranks(path: Path) -> tuple[float, Tensor, Tensor]:
    case = np.load(path)
    z1, z2 = (
        torch.from_numpy(case[key]).chunk(dist.world())[dist.rank()].clone().requires_grad_()
        for key in ("in_z1", "in_z2")
    )
    loss = weighted(vic_terms(z1, z2, dist.gather_with_grad(z1), dist.gather_with_grad(z2)), coefficients(case))
    loss.backward()
    assert z1.grad is not None
    assert z2.grad is not None
    return loss.item(), z1.grad, z2.grad


@pytest.mark.golden
@pytest.mark.dist
def test_two_ranks_give_the_gradient_of_the_full_batch(golden, two_ranks):
    path = golden / "vicreg" / "dist2.npz"
    case = np.load(path)
    found = two_ranks(on_ranks, path)
    for rank, (loss, grad1, grad2) in enumerate(found):
        np.testing.assert_allclose(loss, case["out_loss"][rank], rtol=1e-9)
        np.testing.assert_allclose(grad1, case["grad_z1"][rank], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(grad2, case["grad_z2"][rank], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(np.mean([loss for loss, _, _ in found]), case["ref_full_batch_loss"], rtol=1e-9)
    whole = torch.cat([grad1 for _, grad1, _ in found]) / 2  # DDP averages what each rank contributes
    np.testing.assert_allclose(whole, case["ref_full_batch_grad_z1"], rtol=1e-9, atol=1e-10)


def test_spread_out_and_uncorrelated_rows_cost_nothing():
    rows = 2 * torch.linalg.qr(torch.randn(16, 4, dtype=torch.float64) + 3)[0]
    centred = torch.linalg.qr(rows - rows.mean(0))[0] * 4
    assert max(vic_terms(centred, centred, centred, centred)) < 1e-12
    still = torch.ones(8, 4)
    assert vic_terms(still, still, still, still).variance.item() == pytest.approx(0.99)


def test_stays_in_32_bits_under_autocast():
    z1, z2 = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vic_terms(z1, z2, z1, z2)
    assert all(torch.equal(a, b) for a, b in zip(inside, vic_terms(z1, z2, z1, z2), strict=True))


def test_method_weighs_the_terms():
    cfg = vicreg.Config(dim=5, hidden=8, layers=2, invariance=2, variance=3, covariance=4)
    method = vicreg.build(cfg, Still(6), RunFacts(100, 8, 8, 5, 10))
    batch = Batch(views=list(torch.randn(2, 8, 6)), index=torch.arange(8))
    result = method(batch, Progress(step=0, total=10, steps_per_epoch=5, seed=0))
    parts = result.scalars
    torch.testing.assert_close(result.loss, 2 * parts["invariance"] + 3 * parts["variance"] + 4 * parts["covariance"])
    assert method.expander[0].bias is not None
    assert method.expander[-1].bias is None
    assert [layer.weight.shape for layer in method.expander if isinstance(layer, nn.Linear)] == [(8, 6), (5, 8)]


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="`vicreg` compares the images of a forward pass"):
        vicreg.build(vicreg.Config(dim=8, hidden=8), Still(6), RunFacts(100, 1, 1, 5, 10))


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "lr"), [("vicreg-r50-100e", 512, 100, 0.6), ("vicreg-r50-1000e", 2048, 1000, 1.6)]
)
def test_recipes(name, batch, epochs, lr):
    preset = load.load("pretrain", name).preset
    assert (preset.data.batch_size, preset.run.epochs, preset.run.batch_norm) == (batch, epochs, "global")
    assert preset.method == vicreg.Config()
    assert preset.optim.effective_lr(batch) == pytest.approx(lr)
    assert (preset.optim.variant, preset.optim.weight_decay) == ("lr_outside", 1e-6)
    schedule = preset.schedule
    assert (schedule.name, schedule.by, schedule.end, schedule.warmup.epochs) == ("cosine", "step", 0.001, 10)
    assert schedule.warmup.subtract
    assert preset.backbone.zero_init_residual
    assert preset.views == load.load("pretrain", "byol-r50-200e").preset.views
