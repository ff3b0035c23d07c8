import pytest
import torch
from torch.nn import functional as F

from sslcli.nn.clusters import use_and_certainty


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
