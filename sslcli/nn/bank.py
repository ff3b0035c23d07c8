"""One remembered feature for every image of the source, and a loss against very many of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.nn.contrast import Contrast
from sslcli.nn.precision import no_autocast, widen
from sslcli.seeds import seed_of

AT_ONCE = 256 * 2**20
"""Bytes of bank rows that are laid side by side at one time."""
BLOCK = 4096
"""How many images share a generator of their first rows."""


@final
class Bank(dist.Apart):
    """A unit row for every image, at first random directions.

    Either every rank holds all of it, images x dim x 4 bytes (656 MB for the 1.28 million images of ImageNet and rows
    of 128 numbers), or (`shard`) each rank the rows of its share of the images (`dist.share`). Results are the same but
    for rounding; all ranks must then make the same calls, and `state_dict` holds the rows as one tensor in shares.
    """

    rows: Tensor

    def __init__(self, images: int, dim: int, *, shard: bool = False) -> None:
        super().__init__()
        self.images = images
        self.shard = shard and dist.world() > 1
        if self.shard:
            dist.prepare_shares()
        self.held = dist.share(images) if self.shard else range(images)
        rows = directions(self.held, dim, int(torch.randint(2**62, ())))
        spare = -(-images // dist.world()) - len(rows) if self.shard else 0  # the last share may be shorter
        self.register_buffer("rows", F.pad(rows, (0, 0, 0, spare)))  # (n, D)

    @property
    def own(self) -> Tensor:
        """The rows that this rank holds, in order (n, D): a view."""
        return self.rows[: len(self.held)]

    def asked(self, x: Tensor) -> Tensor:
        """What all ranks ask for: of a bank in shares the rows (W*B, ...) of all, otherwise one's own (B, ...)."""
        return dist.gather(x) if self.shard else x

    def here(self, index: Tensor) -> Tensor:
        """Rows (..., D) of images `index` (...) that this rank holds, zeros in place of others."""
        if not self.shard:
            return self.rows[index]
        place = index - self.held.start
        mine = (place >= 0) & (place < len(self.held))
        return self.rows[place.clamp(0, len(self.rows) - 1)] * mine[..., None]

    def summed(self, x: Tensor) -> Tensor:
        """The sum of what the ranks found in the rows they hold, in place."""
        return dist.sum_(x) if self.shard else x

    def fetch(self, index: Tensor) -> Tensor:
        """Rows (M, D) of images `index` (M,), the same on all ranks."""
        return self.summed(self.here(index))

    @torch.no_grad()
    def put(self, index: Tensor, rows: Tensor) -> None:
        """Replace the rows of images `index` (M,), different ones, the same on all ranks, by `rows` (M, D)."""
        if self.shard:
            place = index - self.held.start
            mine = (place >= 0) & (place < len(self.held))
            index, rows = place[mine], rows[mine]
        self.rows.index_copy_(0, index, rows)

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
        """Move the rows of images `index` (B,) of all ranks to unit(momentum * row + (1 - momentum) * feature (B, D)).

        If a batch holds an image twice, its last feature counts. Returns the images of all ranks (W*B,) and their rows.
        """
        index, features = dist.gather(index), dist.gather(features.to(self.rows.dtype))
        order = torch.argsort(index, stable=True)
        last = order[torch.searchsorted(index[order], index, right=True) - 1]  # where each image occurs last
        moved = F.normalize(torch.lerp(features[last], self.fetch(index), momentum), dim=1)
        self.put(index, moved)
        return index, moved

    @torch.no_grad()
    def similarity(self, queries: Tensor) -> Tensor:
        """Products (B, N) of this rank's queries (B, D) with the rows of all images; in shares, 4 B N bytes travel."""
        with no_autocast(queries):
            found = self.asked(queries) @ self.rows.T
        if not self.shard:
            return found
        swapped = dist.swap(found.view(dist.world(), len(queries), -1))  # (W, B, n): from every rank, for our queries
        return swapped.transpose(0, 1).flatten(1)[:, : self.images]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard:
            destination[f"{prefix}rows"] = dist.as_share(self.own, self.images)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}rows"
        if self.shard and key in state_dict:
            mine = dist.own(state_dict[key])
            state_dict = {**state_dict, key: F.pad(mine, (0, 0, 0, len(self.rows) - len(mine)))}
        super()._load_from_state_dict(state_dict, prefix, *args)


def directions(images: range, dim: int, key: int) -> Tensor:
    """Random unit rows (n, D) of images: a function of the number of the image and of the key."""
    found = [torch.empty(0, dim)]
    for block in range(images.start // BLOCK, -(-images.stop // BLOCK)):
        drawn = torch.randn(BLOCK, dim, generator=torch.Generator().manual_seed(seed_of(key, block) >> 1))
        first = block * BLOCK
        found.append(drawn[max(images.start - first, 0) : images.stop - first])
    return F.normalize(torch.cat(found), dim=1)


class Slice(NamedTuple):
    """Some queries of a batch and what they are compared with."""

    part: slice
    """Which rows of the batch."""
    compared: Tensor
    """(b, 1 + K, D): the row of the query's own image, then its negatives."""
    logits: Tensor
    """(b, 1 + K): similarities over temperature."""


def slices(
    bank: Tensor | Bank, features: Tensor, index: Tensor, negatives: Callable[[slice], Tensor], temperature: float
) -> Iterator[Slice]:
    """The comparisons of features (B, D) of images `index` (B,) with bank rows (N, D), few enough at a time.

    `negatives` says which bank rows (b, K) the queries of a slice are compared with besides their own. Of a bank in
    shares, features and index are those of all ranks (`Bank.asked`), `compared` has zeros for rows of other ranks.
    """
    rows = bank if isinstance(bank, Tensor) else bank.rows
    first = negatives(slice(0, 1))
    each = (1 + first.shape[1]) * rows.shape[1] * rows.element_size()
    step = max(1, AT_ONCE // each)
    for start in range(0, len(features), step):
        part = slice(start, start + step)
        chosen = torch.cat([index[part, None], negatives(part)], dim=1)  # (b, 1 + K)
        compared = bank[chosen] if isinstance(bank, Tensor) else bank.here(chosen)
        logits = torch.bmm(compared, features[part, :, None]).squeeze(2) / temperature
        if isinstance(bank, Bank):
            logits = bank.summed(logits)
        yield Slice(part, compared, logits)


def contrast_with_bank(
    bank: Tensor | Bank,
    features: Tensor,
    index: Tensor,
    negatives: Callable[[slice], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    temperature: float,
) -> Contrast:
    """Mean over queries of `loss_of` their logits (b, 1 + K) -> (b,); arguments as in `slices`, fp32 under autocast.

    `features` are this rank's (B, D); of a bank in shares, `index` and `negatives` are those of all ranks.
    B x K x D numbers are never in memory at once: each slice gives its loss and its share of the gradient before the
    next one is fetched. The bank may change between forward and backward pass.
    """
    with no_autocast(features), torch.no_grad():
        queries = widen(features) if isinstance(bank, Tensor) else bank.asked(widen(features))
        losses, right = queries.new_empty(len(queries)), queries.new_empty(len(queries))
        gradient = torch.empty_like(queries)
        for part, compared, logits in slices(bank, queries, index, negatives, temperature):
            with torch.enable_grad():
                loss = loss_of(logits.requires_grad_())
                (slope,) = torch.autograd.grad(loss.sum(), logits)
            losses[part] = loss.detach()
            right[part] = (logits.argmax(dim=1) == 0).to(right.dtype)
            gradient[part] = torch.bmm(slope[:, None], compared).squeeze(1) / temperature
        if isinstance(bank, Bank) and bank.shard:
            gradient = bank.summed(gradient)
            losses, right, gradient = (x.chunk(dist.world())[dist.rank()] for x in (losses, right, gradient))
    loss = _WithGradient.apply(widen(features), losses.mean(), gradient / len(features))
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
