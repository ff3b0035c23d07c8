"""Crops of several sizes through one network."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor, nn

from sslcli.nn.views import interleave, separate


def features_of(network: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Features (B, D) of every view (B, 3, H, W), in order; neighbouring views of equal size share one pass."""
    features: list[Tensor] = []
    for _, neighbours in groupby(views, key=lambda view: view.shape[1:]):
        same = list(neighbours)
        features += separate(network(interleave(same)), len(same))
    return features


def head_over(head: nn.Module, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the head makes of the features (B, D) of each view: one pass over all of them, (B, E) for each."""
    return separate(head(interleave(features)), len(features))
