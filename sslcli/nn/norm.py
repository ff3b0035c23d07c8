"""How many images share batch-norm statistics, whatever the number of devices.

A paper that trained with 32 images per GPU and plain batch norm normalised every image with the statistics of 32.
`group_batch_norm` gives that on one device (the batch is split), on as many as the paper had (plain), and on more
(neighbouring ranks pool theirs). Modules keep their names, parameters and buffers; in evaluation mode all are plain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli import dist
from sslcli.errors import UserError
from sslcli.nn.precision import widen

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def group_batch_norm(module: nn.Module, local: int, group: int | Literal["global"]) -> None:
    """Make every `group` images share statistics in all batch norms below `module`, in place; all ranks must call it.

    `local` is the number of images in one forward pass of one rank. A pass may hold several rows per image (views)
    if the rows of an image lie together: groups are equal shares of the rows.

    Raises:
        UserError: groups of that size cannot be formed, or a layer is of a kind that cannot be grouped.
    """
    layers = {id(old): old for old in module.modules() if isinstance(old, _BatchNorm)}
    if not layers:
        return
    splits, ranks = _shares(local, dist.world(), group)
    if splits == ranks == 1:
        return
    pool = None if ranks in (1, dist.world()) else dist.group_of(ranks)
    new = {key: _grouped(old, splits, ranks, pool) for key, old in layers.items()}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def average_statistics_(module: nn.Module) -> None:
    """Average running statistics over ranks, in place: to be called after every step.

    Ranks that do not pool their statistics each track those of their own images. The update is linear, so the
    average over ranks is what one device tracks over all groups; and buffers become equal on all ranks.
    """
    if dist.world() > 1:
        dist.mean_([buffer for layer in _local(module) for buffer in _statistics(layer)])


def _local(module: nn.Module) -> Iterator[_BatchNorm]:
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            everyone = isinstance(layer, SyncBatchNorm | FusedSyncBatchNorm) and layer.process_group is None
            if not everyone:
                yield layer


def _statistics(layer: _BatchNorm) -> tuple[Tensor, ...]:
    return tuple(x for x in (layer.running_mean, layer.running_var) if x is not None)


def _shares(local: int, world: int, group: int | Literal["global"]) -> tuple[int, int]:
    """Into how many groups a rank's images are split, and how many neighbouring ranks form one group."""
    if group == "global":
        return 1, world
    if local % group == 0:
        return local // group, 1
    if group % local == 0 and world % (group // local) == 0:
        return 1, group // local
    sizes = [n for n in range(2, local + 1) if local % n == 0] + [
        local * n for n in range(2, world + 1) if world % n == 0
    ]
    where = f"{world} ranks with {local} images each" if world > 1 else f"the {local} images of a forward pass"
    raise UserError(
        f"`run.batch_norm`: groups of {group} images cannot be formed from {where}",
        hint=f"set `run.batch_norm` to `global` or one of {', '.join(map(str, sizes))}",
    )


def _grouped(old: _BatchNorm, splits: int, ranks: int, pool: Any) -> nn.Module:
    drop, act = _tail(old)
    sizes: tuple[int, float, float | None, bool] = (old.num_features, old.eps, old.momentum, old.affine)
    new: SplitBatchNorm | SyncBatchNorm | FusedSyncBatchNorm
    if ranks == 1:
        new = SplitBatchNorm(*sizes)
        new.splits = splits
    else:
        new = FusedSyncBatchNorm(*sizes) if dist.device().type == "cuda" else SyncBatchNorm(*sizes)
        new.process_group = pool
    new.drop, new.act = drop, act
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    return new.train(old.training)


def _tail(old: _BatchNorm) -> tuple[nn.Module, nn.Module]:
    """What the layer does after normalising: nothing, or timm's fused dropout and activation."""
    if old.track_running_stats and old.momentum is not None:
        if type(old) in PLAIN:
            return nn.Identity(), nn.Identity()
        from timm.layers.norm_act import BatchNormAct2d

        if type(old) is BatchNormAct2d:
            return old.drop, old.act
    raise UserError(
        f"`run.batch_norm` cannot group the statistics of a `{type(old).__name__}` layer",
        hint="set `run.batch_norm` to the number of images of one forward pass of one rank",
    )


def _equal_parts(rows: int, parts: int) -> list[int]:
    """Lengths of the parts, longer first: the cut of `Tensor.tensor_split`, whose gradient fills a tensor for each."""
    return [rows // parts + (part < rows % parts) for part in range(parts)]


@final
class SplitBatchNorm(_BatchNorm):
    """Batch norm that treats equal shares of the rows, in order, as if each were on a device of its own.

    Running statistics follow the mean over the shares.
    """

    splits: int
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Rows (N, C, ...), normalised share by share when training."""
        if not self.training:
            return _finished(self, _plain(self, x))
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        splits = min(self.splits, max(1, len(x) // 2))  # an incomplete last batch may be short; one row has no variance
        means = self.running_mean.repeat(splits, 1)  # (S, C)
        variances = self.running_var.repeat(splits, 1)
        y = torch.cat(
            [
                F.batch_norm(share, mean, variance, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
                for share, mean, variance in zip(x.split(_equal_parts(len(x), splits)), means, variances, strict=True)
            ]
        )
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked.add_(1)
        return _finished(self, y)

    def _check_input_dim(self, input: Tensor) -> None: ...


@final
class SyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of several ranks, in plain operations: for devices that torch's own refuses."""

    process_group: Any
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Rows (N, C, ...), normalised together with those of the other ranks when training."""
        if not self.training:
            return _finished(self, _plain(self, x))
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        wide = widen(x)
        channels = (1, -1, *[1] * (x.dim() - 2))
        others = [0, *range(2, x.dim())]
        count = wide.new_tensor([wide.numel() / wide.shape[1]])
        sums = dist.sum_with_grad(torch.cat([wide.sum(others), count]), self.process_group)  # (C + 1,)
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean.view(channels)  # second pass: a difference of large sums would lose the variance
        variance = dist.sum_with_grad(centred.square().sum(others), self.process_group) / total
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
            unbiased = (variance * total / (total - 1)).to(self.running_var.dtype)
            self.running_var.lerp_(unbiased, self.momentum or 0.0)
            self.num_batches_tracked.add_(1)
        gain = torch.rsqrt(variance + self.eps)
        y = centred * (gain if self.weight is None else gain * self.weight).view(channels)
        if self.bias is not None:
            y = y + self.bias.view(channels)
        return _finished(self, y.to(x.dtype))

    def _check_input_dim(self, input: Tensor) -> None: ...


@final
class FusedSyncBatchNorm(nn.SyncBatchNorm):
    """torch's own batch norm over several ranks, with its fused kernels."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Rows (N, C, ...), normalised together with those of the other ranks when training."""
        return _finished(self, super().forward(x))


def _plain(layer: _BatchNorm, x: Tensor) -> Tensor:
    mean, variance = layer.running_mean, layer.running_var
    y: Tensor = F.batch_norm(x, mean, variance, layer.weight, layer.bias, mean is None, 0.0, layer.eps)
    return y


@contextmanager
def statistics_of_the_batch(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in evaluation mode use the statistics of their input; running ones stay as they are.

    No rank waits for another.
    """
    held = [
        (layer, layer.running_mean, layer.running_var) for layer in module.modules() if isinstance(layer, _BatchNorm)
    ]
    try:
        for layer, _, _ in held:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, mean, variance in held:
            layer.running_mean, layer.running_var = mean, variance


@contextmanager
def counted_once(module: nn.Module) -> Iterator[None]:
    """Inside, passes in training mode leave no trace in running statistics.

    For backward passes that compute activations again: the batch has been counted when they were computed first.
    """
    held = [
        (layer, layer.running_mean, layer.running_var, layer.num_batches_tracked)
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    ]
    try:
        for layer, mean, variance, count in held:  # copies, not None: the first pass has saved them
            layer.running_mean, layer.running_var = _copy(mean), _copy(variance)
            layer.num_batches_tracked = _copy(count)
        yield
    finally:
        for layer, mean, variance, count in held:
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, variance, count


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _finished(layer: "SplitBatchNorm | SyncBatchNorm | FusedSyncBatchNorm", y: Tensor) -> Tensor:
    done: Tensor = layer.act(layer.drop(y))
    return done
