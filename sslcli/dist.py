"""Who else is here? The only user of `torch.distributed`; every function also works alone."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, final

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
ROUND = "SSL_ROUND"
"""Variable in which our launcher gives all ranks a word that is another one after each restart."""
_gather_single: Any = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor  # its name before torch 2.15


def rank() -> int:
    """This process's number among all, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """How many processes work on this job."""
    return td.get_world_size() if td.is_initialized() else 1


def share(total: int) -> range:
    """Which of `total` things in a row are this rank's: as many as on every rank before, or what is left."""
    each = -(-total // world())
    return range(min(rank() * each, total), min((rank() + 1) * each, total))


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
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())  # srun may show each task its own GPU alone


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
        **_meeting(),
    )
    try:
        yield
    finally:
        _hosts.cache_clear()
        _writers.cache_clear()
        _mesh.cache_clear()
        td.destroy_process_group()


def _meeting() -> dict[str, Any]:
    """Where ranks find each other when a launcher starts them again: not among the addresses of those that died."""
    word = os.environ.get(ROUND)
    if word is None and os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun; machines of several count for themselves
        word = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if word is None:
        return {}
    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    return {"store": td.distributed_c10d.PrefixStore(word, store), "rank": rank, "world_size": world}


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


@cache
def _writers() -> Any:
    """A group for the threads that write checkpoints, so that their messages never mix with the loop's."""
    return td.new_group(backend="gloo", timeout=TIMEOUT)


def writers_meet() -> None:
    """Wait until every rank's writing thread is here."""
    if world() > 1:
        td.barrier(group=_writers())


def barrier() -> None:
    """Wait until every rank is here."""
    if td.is_initialized():
        td.barrier()


class Apart(nn.Module):
    """A module whose buffers may differ from rank to rank."""


def wrap(module: nn.Module) -> nn.Module:
    """The module in DDP if there is anyone else; buffers stay its own affair, equal on all ranks or `Apart`."""
    if world() == 1:
        return module
    apart = [
        f"{name}.{buffer}"
        for name, part in module.named_modules()
        if isinstance(part, Apart)
        for buffer, _ in part.named_buffers(recurse=False)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, apart)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`broadcast_buffers` is deprecated", FutureWarning
        )  # its successor is too new
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_if(wrapped: nn.Module, sync: bool) -> AbstractContextManager[Any]:
    """Context in which gradients are averaged over ranks only if `sync`."""
    if isinstance(wrapped, Shared):
        wrapped.synchronise(sync)
        return nullcontext()
    if sync or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order (W*B, ...), without gradient; every rank gives equally many."""
    if world() == 1:
        return x.detach()
    out = x.new_empty((world() * x.shape[0], *x.shape[1:]))
    _gather_single(out, x.detach().contiguous())
    return out


def gather_shares(x: Tensor, total: int) -> Tensor:
    """All (total, ...) rows, of which every rank gives its `share`, without gradient."""
    if world() == 1:
        return x.detach()
    padded = x.new_zeros((-(-total // world()), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    return gather(padded)[:total]


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


def swap(x: Tensor) -> Tensor:
    """Part r of (W, ...) goes to rank r; part r of the result came from rank r; without gradient."""
    if world() == 1:
        return x.detach()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    td.all_to_all_single(out, x.detach().contiguous())
    return out


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


@final
class Shared(nn.Module):
    """A module of whose parameters every rank holds a share (FSDP2): what DDP is to whole copies.

    A rank fetches the rest when it is needed: of each block while that block computes, of everything else for the
    length of a forward and backward pass. The module's parameters become `DTensor`s under their old names.
    """

    def __init__(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        self.module = module
        prepare_shares()
        mesh = _mesh()
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        register_fsdp_forward_method(self, "lend")

    def forward(self, *args: Any) -> Any:
        """What the module gives."""
        return self.module(*args)

    def lend(self, work: Callable[[], T]) -> T:
        """What `work` gives, with every parameter there."""
        return work()

    def parts(self) -> list[Any]:
        """The blocks, and what is left without them."""
        from torch.distributed.fsdp import FSDPModule

        return [part for part in self.modules() if isinstance(part, FSDPModule)]

    def synchronise(self, sync: bool) -> None:
        """Whether the coming backward pass averages gradients over ranks."""
        self.parts()[0].set_requires_gradient_sync(sync)


def share_out(module: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """The module in `Shared` if there is anyone else; its parameters are replaced, its buffers are not."""
    return module if world() == 1 else Shared(module, blocks)


def lent(wrapped: nn.Module, work: Callable[[], T]) -> T:
    """What `work` gives, which may use any part of a wrapped module, without gradient; all ranks must call this.

    Ranks need not do the same work: everything is fetched first, and given back at the end.
    """
    if not isinstance(wrapped, Shared):
        return work()
    whole, *blocks = wrapped.parts()
    for part in (whole, *blocks):
        part.unshard()
    whole.set_reshard_after_forward(False)
    found = wrapped.lend(work)
    for part in (whole, *blocks):
        part.reshard()
    for block in blocks:
        block.set_reshard_after_forward(True)
    return found


@cache
def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device().type, (world(),))


def prepare_shares() -> None:
    """Make the groups that shares and their checkpoints need: by all ranks at the same time."""
    _mesh()
    _hosts()
    _writers()


def as_share(part: Tensor, total: int) -> Tensor:
    """This rank's `share` of the rows of a tensor (total, ...) as what it is; all ranks must have one."""
    from torch.distributed.tensor import DTensor, Shard

    part = part.detach().contiguous()
    shape = torch.Size((total, *part.shape[1:]))
    return DTensor.from_local(part, _mesh(), [Shard(0)], run_check=False, shape=shape, stride=part.stride())


def is_share(x: Tensor) -> bool:
    """Whether this is one rank's share of a larger tensor."""
    if world() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def own(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: a view of it."""
    if not is_share(x):
        return x
    part: Tensor = x.to_local()  # type: ignore[attr-defined]
    return part


def share_of(x: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, cut as `like` is; the tensor itself where `like` is whole."""
    if not is_share(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(x.to(like.device), mesh, placements, src_data_rank=None)


def on_host(x: Tensor) -> Tensor:
    """A copy on the CPU, of a share the same share."""
    if not is_share(x):
        return x.detach().to("cpu", copy=True)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    part = own(x.detach()).to("cpu", copy=True)
    mesh = DeviceMesh.from_group(_writers(), "cpu")
    placements = x.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def norms(parts: Sequence[Tensor], *, shared: bool) -> Tensor:
    """Euclidean norm of every tensor (N,); if `shared`, of the whole tensor of which this is one rank's part."""
    found = torch.stack(torch._foreach_norm(list(parts)))
    return sum_(found.square()).sqrt() if shared else found


def write_shares(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of all ranks, each rank its shares, into a folder that all see; all must call this, in any thread.

    Raises:
        OSError: some rank could not.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        packed = {name: x if is_share(x) else x.contiguous() for name, x in tensors.items()}  # safetensors asks for it
        save(packed, storage_writer=writer, process_group=_writers())
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise OSError(str(reason)) from error


def read_shares(folder: Path) -> dict[str, Tensor]:
    """The whole tensors that `write_shares` has written, whatever the number of ranks; no code from a file is run.

    Raises:
        OSError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        reader = HuggingFaceStorageReader(str(folder))
        tensors = {
            name: torch.empty(kept.size, dtype=kept.properties.dtype)
            for name, kept in reader.read_metadata().state_dict_metadata.items()
            if isinstance(kept, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is what is wanted
            load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise OSError(str(reason)) from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise OSError(str(error)) from error
    return tensors
