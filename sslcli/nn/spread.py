"""Is the output still different for different images?"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli.nn.precision import widen


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """How far the directions of rows (B, D) differ: near 1 when they cover the sphere, 0 when all are the same.

    Standard deviation of the unit vectors' entries, mean over dimensions, times sqrt(D) (Chen & He 2021, section 4.1).
    """
    return F.normalize(widen(z), dim=1).std(dim=0, correction=0).mean() * math.sqrt(z.shape[1])
