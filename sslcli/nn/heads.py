"""What sits between features and loss: small perceptrons."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(
    dims: Sequence[int],
    *,
    norm: bool = False,
    bias: bool = True,
    last_norm: bool = False,
    last_affine: bool = True,
    last_bias: bool = True,
) -> nn.Sequential:
    """Linear layers of widths `dims` (input, hidden, ..., output) with ReLU between them; (B, in) to (B, out).

    `norm` and `bias` are for the hidden layers, `last_*` for the output: batch norm, with gain and offset if
    `last_affine`. Weights start as PyTorch draws them, uniform in +-1/sqrt(inputs).
    """
    layers: list[nn.Module] = []
    *hidden, last = pairwise(dims)
    for wide_in, wide_out in hidden:
        layers.append(nn.Linear(wide_in, wide_out, bias=bias))
        if norm:
            layers.append(nn.BatchNorm1d(wide_out))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(*last, bias=last_bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(last[1], affine=last_affine))
    return nn.Sequential(*layers)
