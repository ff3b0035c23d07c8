"""What the parts promise each other: abstract types, nothing that runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from sslcli.config.base import MethodConfig
from sslcli.config.data import Data
from sslcli.config.optim import AnyOptim, ParamRule
from sslcli.config.presets import Run
from sslcli.config.schedule import AnySchedule
from sslcli.errors import UserError

C = TypeVar("C", bound=MethodConfig)


class Recipe(Protocol):
    """What the loop needs to know of an experiment, pretraining or not; a `PretrainPreset` is one."""

    @property
    def seed(self) -> int:
        """Seed of order, views and every draw inside a step."""
        ...

    @property
    def data(self) -> Data:
        """Which images, how many at a time."""
        ...

    @property
    def optim(self) -> AnyOptim:
        """The optimiser."""
        ...

    @property
    def schedule(self) -> AnySchedule:
        """Learning rate over time."""
        ...

    @property
    def run(self) -> Run:
        """Length, arithmetic, checkpoints."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: the only clock. One step is one optimiser update over the global batch."""

    step: int
    """Steps done."""
    total: int
    """Steps of the whole run."""
    steps_per_epoch: int
    """Steps in one pass over the images."""
    seed: int
    """The run's seed: every draw inside a step is a function of it and of `step`."""
    part: int = 0
    """Which slice of the batch, when gradients are accumulated."""

    @property
    def epoch(self) -> int:
        """Epochs completed, counted from 0."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Steps done in the current epoch."""
        return self.step % self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / self.total

    @property
    def starts_epoch(self) -> bool:
        """Whether the next step is the first of an epoch."""
        return self.step_in_epoch == 0

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.total

    def next(self) -> "Progress":
        """One step later."""
        return replace(self, step=self.step + 1, part=0)

    def at_part(self, part: int) -> "Progress":
        """The same step, at one slice of its batch."""
        return replace(self, part=part)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a step, on its device."""

    views: list[Tensor]
    """Each (B, 3, H, W), normalised; all views of the first group first."""
    index: Tensor
    """(B,) int64: which image of the source each row is."""
    labels: Tensor | None = None
    """(B,) int64, where the source has labels."""
    masks: Tensor | None = None
    """(B, N) bool, True where a patch is masked; for masked views."""
    masked: int | None = None
    """How many patches are masked of every image, where the host knows that it is the same number."""
    blocks: Tensor | None = None
    """(B, T, M) int64, numbers of the patches of T target blocks in row-major order; for masks that have such."""
    targets: list[Tensor] = field(default_factory=list)
    """Further renderings of the images for target networks; for masked views."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one forward pass of a method gives back."""

    loss: Tensor
    """Scalar to minimise."""
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars worth logging, left on the device."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Sizes a method may need to build itself, known only once the data is."""

    images: int
    """Images in the source."""
    batch_size: int
    """Images per step over all ranks."""
    part_size: int
    """Images per forward pass over all ranks: the batch size, over the accumulation."""
    steps_per_epoch: int
    """Steps in one pass."""
    total_steps: int
    """Steps of the whole run."""


class Backbone(nn.Module, ABC):
    """Pixels to features. The parameters of `trunk` carry torchvision's or timm's names."""

    trunk: nn.Module
    dim: int
    """Length of the pooled feature."""
    patch: int = 0
    """Side in pixels of the patches that a method may hide; 0 where the network has none."""
    patch_dim: int = 0
    """Length of the embedding of a patch."""
    grid: int = 0
    """Rows, and columns, of patches in the images that the network is made for."""
    prefix: int = 1
    """How many tokens stand before those of patches: 1 where there is a class token."""
    stride: int = 0
    """Side in pixels of what one place of the last maps stands for."""

    @abstractmethod
    def maps(self, images: Tensor) -> Tensor:
        """Last feature maps (B, C, h, w) of images (B, 3, H, W)."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, dim) of images (B, 3, H, W)."""

    @abstractmethod
    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Features at named places: `pooled`, or a stage of the network as (B, C, h, w)."""

    @abstractmethod
    def tap_names(self) -> tuple[str, ...]:
        """The names `taps` understands."""

    def visible_tokens(self, images: Tensor, patches: Tensor) -> Tensor:
        """Last tokens (B, prefix + K, dim), any class token first, when only some patches of the images are shown.

        Args:
            images: (B, 3, H, W).
            patches: (B, K) int64, numbers of the patches in row-major order; the tokens keep their order.

        Raises:
            UserError: the network cannot be shown some patches only.
        """
        raise UserError(
            f"`{type(self).__name__}` cannot leave patches out",
            hint="use `backbone: {name: vit}` with this method",
        )

    def masked_maps(self, images: Tensor, masks: Tensor, token: Tensor) -> Tensor:
        """Last feature maps (B, C, h, w) when a token takes the place of masked patches before positions are added.

        Args:
            images: (B, 3, H, W).
            masks: (B, N) bool, True where a patch is masked.
            token: (patch_dim,) what stands there instead.

        Raises:
            UserError: the network cannot have patches replaced.
        """
        raise UserError(
            f"`{type(self).__name__}` cannot have patches replaced",
            hint="use `backbone: {name: vit}`, `beit` or `swin` with this method",
        )


class Look(Protocol):
    """One un-augmented pass over all images, offered to `Method.before_epoch`; all ranks must take it together."""

    def __call__(self, features: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `features` to every image in evaluation mode, without gradient.

        Returns rows (n, D), float32 on the CPU, of this rank's share of the images in index order (`dist.share`; alone,
        all of them). An image that cannot be read has a row of zeros.
        """
        ...


class Method(nn.Module, ABC, Generic[C]):
    """One idea. All it remembers is parameters and buffers, equal on all ranks: `state_dict()` is the whole truth."""

    cfg: C
    backbone: Backbone

    def __init__(self, cfg: C, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone

    @abstractmethod
    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of one rank's share of the batch; runs inside DDP, once per slice when accumulating."""

    def before_epoch(self, at: Progress, look: Look) -> None:
        """At the start of an epoch; what it finds goes into buffers. Skipped when an epoch is resumed half-way."""

    def sample_weights(self) -> np.ndarray | None:
        """(N,) weights for drawing images in the coming epoch, or None for one pass over all.

        A function of the state alone, equal on all ranks: an epoch that is resumed half-way asks again. Each draw is
        by itself, with replacement, unless there are `sample_groups`.
        """
        return None

    def sample_groups(self) -> np.ndarray | None:
        """(N,) numbers of groups; then every group and image is drawn as often as its weight says, but for rounding."""
        return None

    def before_update(self, at: Progress) -> None:
        """After the backward pass, before clipping and the optimiser step."""

    def after_step(self, at: Progress) -> None:
        """After the optimiser step; `at` still counts the step just taken as not done."""

    def param_rules(self) -> Sequence[ParamRule]:
        """How the method itself wants parameters treated; the preset's own rules come after and win."""
        return ()

    def copy_student(self) -> None:
        """Copy the student into its slow twin: called once, after all initialisation and loading."""

    def vitals(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the method itself knows of its health: detached scalars, from two views of a few training images.

        Called now and then in evaluation mode, without gradient; nothing may change. The names that are judged:
        `spread` of what the loss compares (`sslcli.nn.spread`), `cluster_use` and `cluster_certainty` of assignments
        (`sslcli.nn.clusters`). Others, such as the `agreement` of teacher and student, are recorded.
        """
        return {}

    def reconstruction(self, images: Tensor, masks: Tensor) -> Tensor | None:
        """The images (B, 3, H, W) as the method paints them, in the units it gets them; None if it does not paint.

        Called in evaluation mode, without gradient; masks (B, N) bool are True where it has not seen a patch.
        """
        return None

    def exported(self) -> Backbone:
        """The network worth keeping."""
        return self.backbone


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation found, with everything needed to compare it with another."""

    protocol: str
    """Name of the protocol, e.g. `knn-v1`."""
    metrics: dict[str, float]
    """Values, percentages in [0, 100]."""
    details: dict[str, Any]
    """Protocol settings and hash, seed, data fingerprints, weights digest, versions, command."""
