"""Who else is here? The only user of `torch.distributed`; every function also works alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    """This process's number among all, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """How many processes work on this job."""
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def backends() -> tuple[str, ...]:
    """The ways of talking to other ranks that torch was built with."""
    if not td.is_available():
        return ()
    there = {"gloo": td.is_gloo_available(), "nccl": td.is_nccl_available()}
    return tuple(name for name, available in there.items() if available)


def device() -> torch.device:
    """Where this process computes: its own GPU where there is one, the CPU otherwise."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group that the launcher's environment describes, and leave it at the end; alone, do nothing."""
    if "RANK" not in os.environ or td.is_initialized():
        yield
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    td.init_process_group(
        "nccl" if where.type == "cuda" else "gloo",
        timeout=TIMEOUT,
        device_id=where if where.type == "cuda" else None,
    )
    try:
        yield
    finally:
        _hosts.cache_clear()
        td.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Whether any rank says yes; travels over the hosts, so that no device is waited for."""
    if world() == 1:
        return flag
    vote = torch.tensor(int(flag))
    td.all_reduce(vote, td.ReduceOp.MAX, group=_hosts())
    return bool(vote)


@cache
def _hosts() -> Any:
    return td.new_group(backend="gloo", timeout=TIMEOUT)


def barrier() -> None:
    """Wait until every rank is here."""
    if td.is_initialized():
        td.barrier()


def wrap(module: nn.Module) -> nn.Module:
    """The module in DDP if there is anyone else; buffers stay the module's own affair, equal on all ranks."""
    if world() == 1:
        return module
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_if(wrapped: nn.Module, sync: bool) -> AbstractContextManager[Any]:
    """Context in which gradients are averaged over ranks only if `sync`."""
    if sync or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order (W*B, ...), without gradient; every rank gives equally many."""
    if world() == 1:
        return x.detach()
    out = x.new_empty((world() * x.shape[0], *x.shape[1:]))
    td.all_gather_into_tensor(out, x.detach().contiguous())
    return out


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        grad = torch.clone(grads[0], memory_format=torch.contiguous_format)  # the engine may still use its own
        td.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; backward sums the gradient that every rank's loss sends to the local rows.

    With losses averaged over local rows and DDP's averaging of gradients, the result is the gradient of the full batch.
    """
    return _GatherWithGrad.apply(x) if world() > 1 else x


def sum_(x: Tensor, group: Any = None) -> Tensor:
    """Sum over ranks (or over those of a `group_of`), in place, without gradient."""
    if world() > 1:
        td.all_reduce(x, group=group)
    return x


class _SumWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return sum_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return sum_(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None


def sum_with_grad(x: Tensor, group: Any = None) -> Tensor:
    """Sum over ranks; backward sums the gradient that every rank's loss sends to the sum."""
    summed: Tensor = _SumWithGrad.apply(x, group) if world() > 1 else x
    return summed


def mean(x: Tensor) -> Tensor:
    """Mean over ranks of a detached copy."""
    return sum_(x.detach().clone()) / world()


def mean_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type by their mean over ranks, all in one exchange, without gradient."""
    if world() == 1 or not tensors:
        return
    flat = sum_(torch.cat([x.detach().flatten() for x in tensors])) / world()
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.detach().copy_(part.view_as(x))


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's values, in place."""
    if world() > 1:
        td.broadcast(x, 0)
    return x


def broadcast_object(value: Any) -> Any:
    """Rank 0's plain Python value."""
    if world() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, 0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's plain Python value, in rank order, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    td.all_gather_object(box, value)
    return box


def shuffle(x: Tensor, order: Tensor) -> Tensor:
    """This rank's share of the global batch after `order`, a permutation of its W*B rows that all ranks know.

    The exchange of MoCo's shuffled batch normalisation (He et al. 2020, section 3.3); no gradient.
    """
    share = order.to(x.device).chunk(world())[rank()]
    return gather(x)[share]


def unshuffle(x: Tensor, order: Tensor) -> Tensor:
    """Undo `shuffle`: the rows (B, ...) that belong to this rank, in their old order; no gradient."""
    inverse = torch.argsort(order.to(x.device)).chunk(world())[rank()]
    return gather(x)[inverse]


def group_of(size: int) -> Any:
    """The process group of `size` neighbouring ranks that this rank belongs to; every rank must call this."""
    mine = None
    for first in range(0, world(), size):
        made = td.new_group(list(range(first, first + size)))
        if first <= rank() < first + size:
            mine = made
    return mine
