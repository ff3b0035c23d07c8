import torch

from sslcli.nn.views import interleave, separate


def test_views_of_an_image_lie_together():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])
    rows = interleave([a, b])
    assert rows.flatten().tolist() == [1, 10, 2, 20]
    assert [view.flatten().tolist() for view in separate(rows, 2)] == [[1, 2], [10, 20]]
