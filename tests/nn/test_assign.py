"""Assignments equal to those of SwAV's code, alone and over two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli import dist
from sslcli.nn.assign import sinkhorn

CASES = ["sinkhorn_8x6", "sinkhorn_16x30_it10", "sinkhorn_eps0.03_it1", "sinkhorn_identical_rows", "sinkhorn_f32"]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors(golden, name):
    case = np.load(golden / "swav" / f"{name}.npz")
    q = sinkhorn(torch.from_numpy(case["in_scores"]), float(case["param_epsilon"]), int(case["param_iterations"]))
    tolerance = 1e-5 if name.endswith("f32") else 1e-9
    np.testing.assert_allclose(q.numpy(), case["out_q"], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(q.sum(1).numpy(), case["out_row_sums"], rtol=tolerance)


@pytest.mark.golden
def test_a_prototype_far_from_everything_gets_its_share(golden):
    # The authors' code divides 0 by 0 here. MMSelfSup's adds 1e-12 everywhere first, which is as good as exact.
    case = np.load(golden / "swav" / "sinkhorn_dead_prototype.npz")
    assert np.isnan(case["out_q"]).all()
    q = sinkhorn(torch.from_numpy(case["in_scores"]), 0.05, 3)
    np.testing.assert_allclose(q.numpy(), case["alt_mmselfsup_q"], rtol=0, atol=1e-7)


def exact(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The same in logarithms, which neither overflow nor vanish."""
    logits = scores.double() / epsilon
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=0)
        logits = logits - logits.logsumexp(dim=1, keepdim=True)
    return logits.exp()


@pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.01])
def test_a_small_epsilon_does_not_overflow(epsilon):
    z = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = z @ z[:12].T  # cosines up to 1: exp(1 / 0.01) has no float32
    torch.testing.assert_close(sinkhorn(scores, epsilon, 3).double(), exact(scores, epsilon, 3), rtol=1e-4, atol=1e-5)


def test_prototypes_are_shared_out_equally():
    q = sinkhorn(torch.randn(60, 5), 0.5, 100)
    torch.testing.assert_close(q.sum(dim=0), torch.full((5,), 12.0))


def test_half_precision_scores_are_balanced_in_single():
    assert sinkhorn(torch.randn(4, 3).bfloat16(), 0.05, 3).dtype == torch.float32


def balanced(path: Path) -> np.ndarray:
    scores = torch.from_numpy(np.load(path)["in_scores"])
    return sinkhorn(scores.chunk(dist.world())[dist.rank()], 0.05, 3).numpy()


@pytest.mark.golden
@pytest.mark.dist
def test_two_ranks_balance_together(golden, two_ranks):
    path = golden / "swav" / "sinkhorn_dist2.npz"
    case, found = np.load(path), two_ranks(balanced, path)
    np.testing.assert_allclose(np.stack(found), case["out_q"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.concatenate(found), case["ref_single_process_full_q"], rtol=1e-9, atol=1e-9)
    assert np.abs(np.stack(found) - case["alt_mmselfsup_q"]).max() > 0.1  # sums per rank, as in MMSelfSup, would not do
