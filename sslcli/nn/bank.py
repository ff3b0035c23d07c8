"""One remembered feature for every image of the source, and a loss against very many of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.nn.contrast import Contrast
from sslcli.nn.precision import no_autocast, widen

AT_ONCE = 256 * 2**20
"""Bytes of bank rows that are laid side by side at one time."""


@final
class Bank(nn.Module):
    """A unit row for every image, at first random directions; equal on all ranks.

    Every rank holds all of it, and so does every checkpoint: images x dim x 4 bytes, 656 MB for the 1.28 million
    images of ImageNet and rows of 128 numbers.
    """

    rows: Tensor

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(images, dim), dim=1))  # (N, D)

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor, momentum: float) -> None:
        """Move the rows of images `index` (B,) of all ranks to unit(momentum * row + (1 - momentum) * feature (B, D)).

        If a batch holds an image twice, its last feature counts.
        """
        index, features = dist.gather(index), dist.gather(features.to(self.rows.dtype))
        order = torch.argsort(index, stable=True)
        last = order[torch.searchsorted(index[order], index, right=True) - 1]  # where each image occurs last
        moved = torch.lerp(features[last], self.rows[index], momentum)
        self.rows.index_copy_(0, index, F.normalize(moved, dim=1))


class Slice(NamedTuple):
    """Some queries of a batch and what they are compared with."""

    part: slice
    """Which rows of the batch."""
    compared: Tensor
    """(b, 1 + K, D): the row of the query's own image, then its negatives."""
    logits: Tensor
    """(b, 1 + K): similarities over temperature."""


def slices(
    bank: Tensor, features: Tensor, index: Tensor, negatives: Callable[[slice], Tensor], temperature: float
) -> Iterator[Slice]:
    """The comparisons of features (B, D) of images `index` (B,) with bank rows (N, D), few enough at a time.

    `negatives` says which bank rows (b, K) the queries of a slice are compared with besides their own.
    """
    first = negatives(slice(0, 1))
    each = (1 + first.shape[1]) * bank.shape[1] * bank.element_size()
    step = max(1, AT_ONCE // each)
    for start in range(0, len(features), step):
        part = slice(start, start + step)
        chosen = torch.cat([index[part, None], negatives(part)], dim=1)  # (b, 1 + K)
        compared = bank[chosen]
        logits = torch.bmm(compared, features[part, :, None]).squeeze(2) / temperature
        yield Slice(part, compared, logits)


def contrast_with_bank(
    bank: Tensor,
    features: Tensor,
    index: Tensor,
    negatives: Callable[[slice], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    temperature: float,
) -> Contrast:
    """Mean over queries of `loss_of` their logits (b, 1 + K) -> (b,); arguments as in `slices`, fp32 under autocast.

    B x K x D numbers are never in memory at once: each slice gives its loss and its share of the gradient before the
    next one is fetched. The bank may change between forward and backward pass.
    """
    with no_autocast(features), torch.no_grad():
        queries = widen(features)
        losses, right = queries.new_empty(len(queries)), queries.new_empty(len(queries))
        gradient = torch.empty_like(queries)
        for part, compared, logits in slices(bank, queries, index, negatives, temperature):
            with torch.enable_grad():
                loss = loss_of(logits.requires_grad_())
                (slope,) = torch.autograd.grad(loss.sum(), logits)
            losses[part] = loss.detach()
            right[part] = (logits.argmax(dim=1) == 0).to(right.dtype)
            gradient[part] = torch.bmm(slope[:, None], compared).squeeze(1) / temperature
    loss = _WithGradient.apply(widen(features), losses.mean(), gradient / len(queries))
    return Contrast(loss, right.mean() * 100)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None
