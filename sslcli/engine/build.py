"""From words to things: the method and its backbone that a preset describes."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.config import choice
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Backbone, Look, Method, Recipe, RunFacts
from sslcli.data.loader import Loader, LookAt
from sslcli.data.source import U8, Source, UnreadableImage
from sslcli.engine import loop, optim
from sslcli.engine.feed import Feed
from sslcli.engine.look import share_of
from sslcli.errors import DataError, PresetError
from sslcli.nn.norm import group_batch_norm
from sslcli.seeds import seed_here, seed_of
from sslcli.views import Views, build_eval


def facts_of(preset: Recipe, *, images: int, steps_per_epoch: int) -> RunFacts:
    """The sizes of a run over so many images."""
    run, batch = preset.run, preset.data.batch_size
    steps = run.steps if run.steps is not None else round((run.epochs or 0) * steps_per_epoch)
    return RunFacts(
        images=images,
        batch_size=batch,
        part_size=batch // run.accumulate,
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, steps),
    )


def method_of(preset: PretrainPreset, facts: RunFacts) -> Method[Any]:
    """The method with freshly initialised weights: equal on all ranks, a function of the preset's seed alone."""
    seed_here(preset.seed, "init")
    backbone: Backbone = choice.build("sslcli.backbones", preset.backbone)(preset.backbone)
    method: Method[Any] = choice.build("sslcli.methods", preset.method)(preset.method, backbone, facts)
    method.copy_student()
    return method


def images_per_rank(preset: Recipe) -> int:
    """Images in one forward pass of one rank."""
    return preset.data.batch_size // (dist.world() * preset.run.accumulate)


def faster_reading(source: Source, views: Views, batch_size: int) -> Literal["fast", "reference"]:
    """Which reading of the views costs less here, measured on a small batch; rank 0 decides for all ranks.

    Raises:
        DataError: no image can be read.
    """
    if dist.device().type == "cuda":  # there the device part leaves the CPU
        return "fast"
    images = first_readable(source, min(batch_size, 64))
    numbers = np.arange(len(images))

    def fast() -> None:
        if source.resident() is not None:
            crops = views.crop_batch(torch.from_numpy(np.stack(images)), numbers, 0)
        else:
            each = [views.crop(image, index, 0) for index, image in enumerate(images)]
            crops = [torch.from_numpy(np.stack(view)) for view in zip(*each, strict=True)]
        views.finish(crops, numbers, 0)

    def reference() -> None:
        for index, image in enumerate(images):
            views.reference(image, index, 0)

    fast()  # the first call pays for allocations
    chosen: Literal["fast", "reference"] = "fast" if seconds_of(fast) <= seconds_of(reference) else "reference"
    answer: Literal["fast", "reference"] = dist.broadcast_object(chosen)
    return answer


def first_readable(source: Source, count: int) -> list[U8]:
    """Up to so many images from the beginning of a source.

    Raises:
        DataError: none of the first thousand can be read.
    """
    found: list[U8] = []
    for index in range(min(len(source), 1000 + count)):
        with suppress(UnreadableImage):
            found.append(source.read(index))
        if len(found) == count:
            break
    if not found:
        raise DataError(
            f"none of the first {min(len(source), 1000)} images can be read; the first is `{source.name(0)}`",
            hint="point `--data` at readable images",
        )
    return found


def seconds_of(work: Callable[[], None]) -> float:
    """Processor time of the cheapest of three calls on one thread (idle threads of a busy machine spin)."""
    threads, spent = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(3):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    torch.set_num_threads(threads)
    return min(spent)


def loader_of(preset: Recipe, source: Source, views: Views) -> Loader:
    """The loader that a resolved preset describes."""
    look: LookAt = views.reference if preset.run.views == "reference" else views.crop
    resident = source.resident() is not None and preset.run.views == "fast"
    return Loader(
        source,
        batch_size=preset.data.batch_size,
        seed=seed_of(preset.seed, "data"),
        look=None if resident else look,
        workers=preset.data.workers or 0,
        drop_last=preset.data.drop_last,
        fraction=preset.data.fraction,
        rank=dist.rank(),
        world=dist.world(),
        pin=dist.device().type == "cuda",
    )


def feed_of(loader: Loader, views: Views, preset: Recipe) -> Feed:
    """Device batches of a resolved preset."""
    return Feed(
        loader,
        views,
        reading=preset.run.views or "fast",
        device=dist.device(),
        channels_last=preset.run.channels_last,
    )


def training_of(method: Method[Any], preset: Recipe) -> tuple[loop.Training, str]:
    """Method, optimiser and scaler on this rank's device, and the printed table of parameter groups.

    Raises:
        PresetError: the preset asks for something that its backbone cannot do, or for rules that select nothing.
    """
    device, run = dist.device(), preset.run
    shared = run.shard and dist.world() > 1
    if shared:
        check_shard(preset)
    set_arithmetic(preset)
    group_batch_norm(method, local=images_per_rank(preset), group=run.batch_norm)
    method.to(device)
    if run.channels_last and not shared:  # shares are cut from rows in their plain order
        method.to(memory_format=torch.channels_last)
    if run.checkpoint_activations:
        recompute(method.backbone)
    blocks = list(blocks_of(method))
    if run.compile:
        compile_(backbones_of(method), blocks if shared else None)
    lr = preset.optim.effective_lr(preset.data.batch_size)
    decay = preset.optim.layer_decay
    scales = {} if decay is None else optim.layer_scales(method.backbone.trunk, decay, "backbone.trunk.")
    wrapped = dist.share_out(method, blocks) if shared else dist.wrap(method)
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    groups = optim.param_groups(named, preset.optim, [*method.param_rules(), *preset.optim.rules], scales)
    text = optim.table(groups)
    optimizer = optim.make_optimizer(groups, preset.optim, lr, device)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    return loop.Training(method, wrapped, optimizer, scaler, lr), text


def check_shard(preset: Recipe) -> None:
    """Refuse what does not work on shares.

    Raises:
        PresetError: LAMB, whose norms are timm's affair.
    """
    if preset.optim.name == "lamb":
        raise PresetError("`run.shard` does not go with `optim.name: lamb`", hint="use adamw, sgd or lars")


def set_arithmetic(preset: Recipe) -> None:
    """Say how this process multiplies fp32 numbers on a GPU: in TF32 where the whole network is fp32 and may be."""
    if dist.device().type == "cuda":
        faster = preset.run.tf32 and preset.run.precision == "fp32"
        torch.set_float32_matmul_precision("high" if faster else "highest")
        torch.backends.cudnn.allow_tf32 = faster


def compile_(backbones: Iterable[Backbone], blocks: Iterable[nn.Module] | None) -> None:
    """Have torch.compile make kernels, at first use, for whole backbones; or, if given, for each block by itself.

    Modules keep their names. A shared block fetches its parameters when it is called, which no kernel can contain.
    """
    if blocks is not None:
        for block in blocks:
            block.compile()
        return
    for backbone in backbones:
        backbone.compile()
        for way in ("maps", "visible_tokens", "masked_maps"):
            setattr(backbone, way, torch.compile(getattr(backbone, way)))


def recompute(backbone: Backbone) -> None:
    """Let the trunk keep only the inputs of its blocks.

    Raises:
        PresetError: it is not a network that can.
    """
    try:
        backbone.trunk.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise PresetError(
            f"`run.checkpoint_activations`: a `{type(backbone.trunk).__name__}` cannot compute its activations again",
            hint="leave it out; a smaller `data.batch_size` or a larger `run.accumulate` saves memory too",
        ) from None


def backbones_of(method: Method[Any]) -> Iterator[Backbone]:
    """The backbone and its slow twins."""
    return (part for part in method.modules() if isinstance(part, Backbone))


def blocks_of(method: Method[Any]) -> Iterator[nn.Module]:
    """The repeated parts of all backbones, lowest first: transformer blocks, residual blocks, or stages."""
    for backbone in backbones_of(method):
        yield from listed(backbone.trunk)


def listed(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the outermost lists of modules below a module, and has parameters."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from listed(child)


def look_of(training: loop.Training, source: Source, preset: PretrainPreset) -> Look:
    """One un-augmented pass over this rank's share of the images, as clustering methods want it.

    Unreadable images get a row of zeros.
    """
    method, view = training.method, build_eval(preset.views.eval_view)

    def look(features: Callable[[Tensor], Tensor]) -> Tensor:
        method.eval()
        pass_over = partial(
            share_of,
            features,
            source,
            view,
            batch_size=images_per_rank(preset),
            workers=preset.data.workers or 0,
            device=dist.device(),
            network=method,
        )
        rows = dist.lent(training.wrapped, pass_over)
        method.train()
        return torch.from_numpy(rows)

    return look
