"""NPID equal to MMSelfSup's (softmax) and to the authors' (noise-contrastive estimation), step after step."""

from functools import partial

import numpy as np
import pytest
import torch
from parts import Still
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import npid
from sslcli.nn.bank import Bank, contrast_with_bank
from sslcli.seeds import seed_of


def facts(batch: int, images: int = 50) -> RunFacts:
    return RunFacts(images=images, batch_size=batch, part_size=batch, steps_per_epoch=10, total_steps=100)


def at(step: int, part: int = 0) -> Progress:
    return Progress(step=step, total=100, steps_per_epoch=10, seed=5, part=part)


def bare(cfg: npid.Config, batch: int = 8, images: int = 50) -> npid.NPID:
    """The method around a network that changes nothing, in float64."""
    method = npid.build(cfg, Still(cfg.dim), facts(batch, images)).double()
    method.head[0].weight.data.copy_(torch.eye(cfg.dim))
    method.head[0].bias.data.zero_()
    return method


@pytest.mark.golden
@pytest.mark.parametrize("name", ["mm_infonce_m0.5", "mm_infonce_m0.2_ensure"])
def test_three_steps_of_the_softmax_loss(golden, name):
    case = np.load(golden / "npid" / f"{name}.npz")
    bank = Bank(*case["in_memory"].shape).double()
    bank.rows.copy_(torch.from_numpy(case["in_memory"]))
    for step in range(3):
        x = torch.from_numpy(case["in_x"][step]).requires_grad_()
        index, drawn = torch.from_numpy(case["in_y"][step]), torch.from_numpy(case["in_neg_idx"][step])
        z = F.normalize(x, dim=1)
        found = contrast_with_bank(
            bank.rows, z, index, partial(chosen, drawn), npid.softmax_loss, float(case["param_T"])
        )
        found.loss.backward()
        bank.update(index, z, momentum=1 - float(case["param_momentum"]))  # theirs is the share of the new
        np.testing.assert_allclose(found.loss.item(), case["out_losses"][step], rtol=1e-9)
        np.testing.assert_allclose(x.grad.numpy(), case["grad_x"][step], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(bank.rows.numpy(), case["out_memory_final"], rtol=1e-7, atol=1e-9)


def chosen(drawn: Tensor, part: slice) -> Tensor:
    return drawn[part]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["nce_3steps", "nce_fixedZ", "nce_momentum0.9_dup"])
def test_steps_of_noise_contrastive_estimation(golden, name):
    case = np.load(golden / "npid" / f"{name}.npz")
    temperature, images = float(case["param_T"]), int(case["param_ndata"])
    bank = Bank(*case["in_memory"].shape).double()
    bank.rows.copy_(torch.from_numpy(case["in_memory"]))
    z = torch.tensor(float(case["param_Z0"]), dtype=torch.float64)
    for step in range(len(case["in_x"])):
        x = torch.from_numpy(case["in_x"][step]).requires_grad_()
        index, drawn = torch.from_numpy(case["in_y"][step]), torch.from_numpy(case["in_idx"][step][:, 1:])
        features, negatives = F.normalize(x, dim=1), partial(chosen, drawn)
        if z < 0:
            z = npid.partition(bank.rows, features.detach(), index, negatives, temperature)
        np.testing.assert_allclose(z.item(), case["out_Z"][step], rtol=1e-9)
        loss_of = partial(npid.nce_loss, z=z, images=images)
        found = contrast_with_bank(bank.rows, features, index, negatives, loss_of, temperature)
        found.loss.backward()
        bank.update(index, features, momentum=float(case["param_momentum"]))
        np.testing.assert_allclose(found.loss.item(), case["out_losses"][step], rtol=1e-9)
        np.testing.assert_allclose(x.grad.numpy(), case["grad_x"][step], rtol=1e-9, atol=1e-9)
        if step == 0:
            np.testing.assert_allclose(bank.rows.numpy(), case["out_memory_step0"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bank.rows.numpy(), case["out_memory_final"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", ["softmax", "nce"])
def test_the_method_is_its_parts(loss):
    cfg = npid.Config(dim=6, negatives=20, momentum=0.7, temperature=0.2, ensure_negative=True, loss=loss)
    method = bare(cfg)
    bank = Bank(50, 6).double()
    bank.load_state_dict(method.bank.state_dict())
    z: Tensor | None = None
    for step in range(3):
        x, index = torch.randn(8, 6, dtype=torch.float64), torch.randperm(50)[:8]
        result = method(Batch(views=[x], index=index), at(step))
        features, key = F.normalize(x, dim=1), seed_of(5, "npid", step)
        negatives = partial(npid.others, index, 50, 20, key, True)
        if z is None:  # Z stays what the first step makes it
            z = npid.partition(bank.rows, features, index, negatives, 0.2)
        loss_of = npid.softmax_loss if loss == "softmax" else partial(npid.nce_loss, z=z, images=50)
        expected = contrast_with_bank(bank.rows, features, index, negatives, loss_of, 0.2)
        bank.update(index, features, momentum=0.7)
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(method.bank.rows, bank.rows)


def drawn(images: int, count: int, *, never_itself: bool, key: int = 3) -> Tensor:
    return npid.others(torch.arange(images), images, count, key, never_itself, slice(None))


def test_negatives_are_drawn_evenly_from_all_images():
    seen = torch.bincount(drawn(10, 4000, never_itself=False).flatten(), minlength=10)
    assert (seen / 4000 - 1).abs().max() < 0.06


def test_an_image_is_no_negative_of_itself_if_so_wished():
    found = drawn(10, 4000, never_itself=True)
    assert (found != torch.arange(10)[:, None]).all()
    for image, row in enumerate(found):
        share = torch.bincount(row, minlength=10) / 4000 * 9
        assert (share[torch.arange(10) != image] - 1).abs().max() < 0.2
    assert (drawn(10, 4000, never_itself=False) == torch.arange(10)[:, None]).any(dim=1).all()


def test_negatives_depend_on_image_and_step_alone():
    index = torch.tensor([8, 3, 5])
    whole = npid.others(index, 100, 50, 7, False, slice(None))
    assert torch.equal(npid.others(index, 100, 50, 7, False, slice(1, 2)), whole[1:2])
    assert torch.equal(npid.others(index.flip(0), 100, 50, 7, False, slice(None)), whole.flip(0))
    assert not torch.equal(npid.others(index, 100, 50, 8, False, slice(None)), whole)
    assert not torch.equal(whole[0], whole[1])


def two_steps(loss: str, shard: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, gradient and bank after two steps of eight images, over however many ranks there are."""
    torch.manual_seed(0)
    method = npid.build(npid.Config(dim=6, negatives=20, loss=loss, shard_memory=shard), Still(10), facts(8)).double()
    rank, world = dist.rank(), dist.world()
    for step in range(2):
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        index = torch.arange(8) * 3 + step
        method.zero_grad()
        batch = Batch(views=[x.chunk(world)[rank]], index=index.chunk(world)[rank])
        result = method(batch, at(step))
        result.loss.backward()
    return dist.mean(result.loss), dist.mean(method.head[0].weight.grad), method.bank.fetch(torch.arange(50))


@pytest.mark.dist
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "nce"])
def test_two_ranks_equal_one(two_ranks, loss, shard):
    for found in two_ranks(two_steps, loss, shard):
        torch.testing.assert_close(found, two_steps(loss))


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="the source has only one"):
        npid.build(npid.Config(), Still(4), facts(1, images=1))
