"""How clusters are used, how they agree, what they weigh."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslcli import dist
from sslcli.nn.clusters import nmi, use_and_certainty, weighted_cross_entropy, weights_of


@pytest.mark.parametrize(
    ("p", "use", "certainty"),
    [
        (F.one_hot(torch.arange(8) % 4, 4).double(), 1.0, 1.0),
        (F.one_hot(torch.zeros(8, dtype=torch.int64), 4).double(), 0.0, 1.0),
        (torch.full((8, 4), 0.25), 1.0, 0.0),
        (torch.eye(3, 9), 1.0, 1.0),  # three images cannot use nine clusters
    ],
    ids=["healthy", "one-cluster", "no-preference", "few-images"],
)
def test_what_the_extremes_give(p: torch.Tensor, use: float, certainty: float):
    found = use_and_certainty(p)
    assert float(found["cluster_use"]) == pytest.approx(use, abs=1e-6)
    assert float(found["cluster_certainty"]) == pytest.approx(certainty, abs=1e-6)


def test_half_of_the_images_in_doubt():
    p = torch.cat([torch.eye(4), torch.full((4, 4), 0.25)])
    assert float(use_and_certainty(p)["cluster_certainty"]) == pytest.approx(0.5)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["identical", "independent", "noisy", "permuted", "single"])
def test_agreement_is_scikit_learns(golden, name):
    case = np.load(golden / "clusters" / f"nmi_{name}.npz")
    found = nmi(*(torch.from_numpy(case[f"labels_{side}"]) for side in "ab"))
    assert float(found) == pytest.approx(float(case["arithmetic"]), abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["clusters/reweight_pow0.5", "odc/reweight_pow0.5", "odc/reweight_empty_class"])
def test_weights_and_loss_are_openmmlabs(golden, name):
    case = {key: torch.from_numpy(value) for key, value in np.load(golden / f"{name}.npz").items() if key != "meta"}
    counts = torch.bincount(case["in_labels"], minlength=int(case["param_num_classes"]))
    weights = weights_of(counts, float(case["param_reweight_pow"]))
    scores = case["in_scores"].requires_grad_()
    loss = weighted_cross_entropy(scores, case["in_targets"], weights)
    loss.backward()
    for found, expected in ((weights, "out_loss_weight"), (loss, "out_loss"), (scores.grad, "grad_scores")):
        torch.testing.assert_close(found.detach(), case[expected], rtol=1e-5, atol=1e-5 * float(weights.min()))


def weighted() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 4, 3, 3, 3, 2])
    mine = scores.chunk(dist.world())[dist.rank()].clone().requires_grad_()
    weights = weights_of(torch.bincount(labels), 0.5)
    loss = weighted_cross_entropy(mine, labels.chunk(dist.world())[dist.rank()], weights)
    loss.backward()
    return dist.mean(loss), dist.gather(mine.grad) / dist.world()


@pytest.mark.dist
def test_the_weighted_mean_is_that_of_all_ranks(two_ranks):
    for found in two_ranks(weighted):
        torch.testing.assert_close(found, weighted())
