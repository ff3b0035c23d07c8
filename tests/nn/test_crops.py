import torch
from torch import Tensor, nn

from sslcli.nn.crops import features_of, head_over


class Pool(nn.Module):
    """Mean over pixels; remembers what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


def test_one_pass_for_each_size_and_views_in_order():
    views = [torch.randn(5, 3, side, side) for side in (8, 8, 4, 4, 4)]
    network = Pool()
    features = features_of(network, views)
    assert network.seen == [(10, 3, 8, 8), (15, 3, 4, 4)]
    for found, view in zip(features, views, strict=True):
        torch.testing.assert_close(found, view.mean(dim=(2, 3)))


def test_images_stay_together_for_grouped_batch_norm():
    views = [torch.full((2, 1, 4, 4), float(number)) + torch.arange(2).view(2, 1, 1, 1) * 10 for number in range(3)]
    rows: list[Tensor] = []
    features_of(nn.Sequential(Pool(), nn.Identity()), views)
    head_over(lambda x: rows.append(x) or x, [view.mean(dim=(2, 3)) for view in views])  # type: ignore[arg-type]
    assert rows[0].flatten().tolist() == [0, 1, 2, 10, 11, 12]


def test_the_head_sees_all_views_at_once():
    head = nn.BatchNorm1d(2, affine=False)
    features = [torch.randn(6, 2) * scale for scale in (1.0, 5.0, 9.0)]
    found = torch.stack(head_over(head, features)).flatten(0, 1)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.var(dim=0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
