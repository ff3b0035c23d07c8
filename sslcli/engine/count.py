"""What an experiment costs, counted without running it: parameters, arithmetic, memory.

The forward and backward pass of a whole batch is carried out on tensors that have a shape and no content. One
multiplication with its addition counts as two floating-point operations; only products are counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

from sslcli.config import choice
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts
from sslcli.data.arrays import Arrays
from sslcli.engine.build import facts_of, feed_of, loader_of, method_of
from sslcli.seeds import seed_of
from sslcli.views import build as build_views

OWN = "(loss)"
"""The part that is the method itself: what it keeps and computes outside its modules."""
MOMENTS = {"sgd": 1, "lars": 1, "adamw": 2, "lamb": 2}
"""Numbers that an optimiser remembers for every parameter."""
FEW = 2
"""Images that are really computed where shapes alone do not suffice."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module of the method, such as its backbone, a head, a slow twin, a queue."""

    name: str
    parameters: int
    trainable: int
    buffers: int
    """Bytes of what it remembers beside parameters."""
    flops: float
    """Floating-point operations of its forward passes in one step, per image."""


@dataclass(frozen=True, slots=True)
class View:
    """The backbone on one image of one size."""

    height: int
    width: int
    count: int
    """How many views of this size each image gives; 0 for the size of the evaluation alone."""
    flops: int
    """Floating-point operations of one forward pass."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a pretraining run costs."""

    parts: tuple[Part, ...]
    views: tuple[View, ...]
    """Largest first."""
    forward: float
    """Floating-point operations of a step's forward passes, per image."""
    step: float
    """The same with the backward passes."""
    run: float
    """Floating-point operations of the whole run."""
    images: int
    """Images in the source that the run was counted for."""
    steps: int
    """Steps of the whole run."""
    batch_size: int
    """Images in a step."""
    counted_on: int
    """Images in the pass that was counted: the losses of some methods grow with the square of it."""
    memory: dict[str, int]
    """Bytes of `weights`, `gradients`, `optimizer`, `buffers`: what does not depend on the batch."""


def cost_of(preset: PretrainPreset, images: int) -> Cost:
    """The cost of a preset on a source of so many images, on one rank in fp32.

    Raises:
        UserError: the method refuses such sizes.
    """
    batch = preset.data.batch_size
    full, rest = divmod(int(images * preset.data.fraction), batch)
    steps = max(1, full + (rest > 0 and not preset.data.drop_last))
    facts = facts_of(preset, images=images, steps_per_epoch=steps)
    at = Progress(step=0, total=facts.total_steps, steps_per_epoch=steps, seed=preset.seed)
    method = _shaped(preset, facts)
    example = example_of(preset)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            hollow(method)
            forward, backward = _counted(method, _enlarged(example, facts.part_size), at)
        counted_on = facts.part_size
    except RuntimeError:  # the method looks at values, such as which patches are masked
        with_content = method_of(preset, facts)
        forward, backward = _counted(with_content, example, at)
        counted_on = len(example.index)
    per_image = {name: flops / counted_on for name, flops in forward.items()}
    parts = tuple(_parts(method, per_image))
    trained = sum(part.trainable for part in parts)
    total = sum(per_image.values())
    step = total + backward / counted_on
    return Cost(
        parts=parts,
        views=views_of(method.backbone, example, preset),
        forward=total,
        step=step,
        run=step * batch * facts.total_steps,
        images=images,
        steps=facts.total_steps,
        batch_size=batch,
        counted_on=counted_on,
        memory={
            "weights": sum(p.numel() * p.element_size() for p in method.parameters()),
            "gradients": 4 * trained,
            "optimizer": 4 * trained * MOMENTS[preset.optim.name],
            "buffers": sum(part.buffers for part in parts),
        },
    )


def backbone_cost(config: Mapping[str, Any], side: int) -> tuple[Part, View]:
    """Size of the backbone that a part of a preset describes, and its arithmetic on a square image."""
    cfg = choice.config_of("sslcli.backbones", str(config.get("name"))).model_validate(dict(config))
    with torch.device("meta"):
        backbone: Backbone = choice.build("sslcli.backbones", cfg)(cfg)
    flops = _flops_of(backbone, side, side)
    return _part("backbone", backbone, flops, set()), View(side, side, 0, flops)


def example_of(preset: PretrainPreset) -> Batch:
    """A batch of two images of noise, made by the views of the preset."""
    few = preset.model_copy(
        update={
            "data": preset.data.model_copy(update={"batch_size": FEW, "workers": 0, "fraction": 1.0}),
            "run": preset.run.model_copy(update={"accumulate": 1, "views": "fast", "channels_last": False}),
        }
    )
    side = max(256, preset.views.eval_view.resize or 0)
    noise = np.random.default_rng(0).integers(0, 256, (FEW, side, side, 3), dtype=np.uint8)
    views = build_views(preset.views, seed_of(preset.seed, "views"))
    with closing(loader_of(few, Arrays(noise), views)) as loader:
        return next(iter(feed_of(loader, views, few).epoch(Progress(0, 1, 1, preset.seed), None)))


def views_of(backbone: Backbone, example: Batch, preset: PretrainPreset) -> tuple[View, ...]:
    """The backbone's forward pass for each size of view, and for the size of the evaluation."""
    sizes = Counter((view.shape[2], view.shape[3]) for view in example.views if view.ndim == 4)
    side = preset.views.eval_view.size
    sizes.setdefault((side, side), 0)
    return tuple(
        View(height, width, count, _flops_of(backbone, height, width))
        for (height, width), count in sorted(sizes.items(), reverse=True)
    )


def hollow(module: nn.Module) -> None:
    """Replace the tensors of a module by ones of the current mode and device, with the same shapes; ties stay."""
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            trained = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            part._parameters[name] = like(parameter)  # type: ignore[assignment]
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            part._buffers[name] = like(buffer)


def _shaped(preset: PretrainPreset, facts: RunFacts) -> Method[Any]:
    """The method without content in its tensors, or with it where the constructor looks at values."""
    try:
        with torch.device("meta"):
            return method_of(preset, facts)
    except RuntimeError:
        return method_of(preset, facts)


def _counted(method: Method[Any], batch: Batch, at: Progress) -> tuple[Counter[str], int]:
    """Operations of the forward pass by part of the method, and of the backward pass."""
    method.train()
    with sdpa_kernel(SDPBackend.MATH), _PerPart(type(method).__name__) as forward:
        loss = method(batch, at).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.flops, backward.get_total_flops()


def _flops_of(backbone: Backbone, height: int, width: int) -> int:
    """Operations of one forward pass of a backbone on one image."""
    backbone.eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow(backbone)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, height, width))
    return int(counter.get_total_flops())


def _parts(method: Method[Any], flops: Mapping[str, float]) -> Iterator[Part]:
    """The method's modules in their order, and what is its own; a tensor counts where it is first met."""
    seen: set[int] = set()
    for name, child in method.named_children():
        yield _part(name, child, flops.get(name, 0.0), seen)
    yield _part(OWN, method, flops.get(OWN, 0.0), seen)


def _part(name: str, module: nn.Module, flops: float, seen: set[int]) -> Part:
    def unseen(tensors: Iterator[Tensor]) -> list[Tensor]:
        found = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update(map(id, found))
        return found

    parameters = unseen(module.parameters())
    return Part(
        name=name,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in unseen(module.buffers())),
        flops=flops,
    )


def _enlarged(example: Batch, size: int) -> Batch:
    """A batch of so many images, shaped like the example; its tensors are of the current mode."""

    def like(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty((value.shape[0] * size // len(example.index), *value.shape[1:]), dtype=value.dtype)
        return [like(item) for item in value] if isinstance(value, list) else value

    return replace(example, **{field.name: like(getattr(example, field.name)) for field in fields(example)})


@final
class _PerPart(TorchDispatchMode):
    """Counts the operations of a forward pass by the child of the root module in which they happen."""

    def __init__(self, root: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self._inside: Any = ModuleTracker()
        self._root = f"{root}."

    def __enter__(self) -> "_PerPart":
        self._inside.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._inside.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[self._part()] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _part(self) -> str:
        below = (name.removeprefix(self._root) for name in self._inside.parents if name.startswith(self._root))
        return next((name.partition(".")[0] for name in below), OWN)
