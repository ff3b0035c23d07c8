"""Share samples out among prototypes, equally many to each."""

import torch
from torch import Tensor

from sslcli import dist
from sslcli.nn.precision import widen


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Soft assignment (B, K) of this rank's samples to prototypes; rows sum to 1, in at least float32.

    With Q = exp(scores / epsilon), in turn divide every column by its sum over the samples of all ranks, and every
    row by its sum (Cuturi 2013; Caron et al. 2020, section 3.1). The columns are summed over the ranks in every
    iteration, so the result is that of one device holding all samples. A smaller epsilon gives harder assignments.

    A factor on a column cancels in the first division: with the column's maximum as that factor, no exponential
    overflows and no prototype that is far from everything loses all its weight.
    """
    logits = widen(scores) / epsilon
    highest = dist.gather(logits.amax(dim=0)).view(-1, logits.shape[1]).amax(dim=0)  # (K,)
    q = (logits - highest).exp()
    for _ in range(iterations):
        q /= dist.sum_(q.sum(dim=0))
        q /= q.sum(dim=1, keepdim=True)
    return q
