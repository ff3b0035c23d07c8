"""Classifiers on a pretrained network: linear ones on a frozen network, or one that is trained with all of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, assert_never, cast, final

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers.drop import DropPath
from torch import Tensor, nn

from sslcli import dist
from sslcli.config.base import MethodConfig
from sslcli.config.supervised import Mix
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.data.source import Source
from sslcli.errors import DataError, PresetError, UserError
from sslcli.nn.slow import copy_, ema_, frozen_copy
from sslcli.seeds import seed_of, seeded, uniform_on

TOPS = 5
"""How many of the likeliest classes are looked at."""
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components, by column, of the colours of ImageNet in [0, 1] (Krizhevsky et al. 2012, section 4.1)."""


class Words(MethodConfig):
    """A classifier has no settings of its own: its parts are handed to it."""

    name: Literal["classifier"] = "classifier"


@dataclass(frozen=True, slots=True)
class Read:
    """What one classifier reads of the network."""

    taps: tuple[str, ...]
    """Places in the network, joined in this order."""
    pool: Callable[[Tensor], Tensor]
    """From maps (B, C, h, w) to (B, C, cells)."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Before the classifier: nothing, batch norm over channels without gain and bias, or layer norm."""
    eps: float = 1e-5
    """Added to the variance in `norm`."""

    def of(self, found: Mapping[str, Tensor]) -> Tensor:
        """The pooled features (B, D), or (B, C, cells) of a single map."""
        parts = [self.pool(x) if x.ndim == 4 else x for x in (found[tap] for tap in self.taps)]
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1)


@dataclass(frozen=True, slots=True)
class Training:
    """What happens to images and targets on their way to the loss."""

    std: tuple[float, float, float]
    """What pixels in [0, 1] were divided by."""
    lighting: float = 0.0
    erase: float = 0.0
    mix: Mix | None = None
    smoothing: float = 0.0
    ema: float | None = None


def average(maps: Tensor) -> Tensor:
    """The mean of maps (B, C, h, w) over space: (B, C, 1)."""
    return maps.mean((2, 3))[:, :, None]


class Head(nn.Module):
    """A linear layer on what is read of the network, perhaps normalised."""

    def __init__(self, read: Read, features: Tensor, classes: int, std: float) -> None:
        super().__init__()
        channels, length = features.shape[1], features[0].numel()
        match read.norm:
            case "none":
                self.norm: nn.Module = nn.Identity()
            case "batch":
                self.norm = nn.BatchNorm1d(channels, eps=read.eps, affine=False)
            case "layer":
                self.norm = nn.LayerNorm(length, eps=read.eps)
            case _:
                assert_never(read.norm)
        self.flat = read.norm == "layer"
        self.linear = nn.Linear(length, classes)
        nn.init.trunc_normal_(self.linear.weight, std=std) if std else nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, classes) of features (B, D) or (B, C, cells)."""
        normed = self.norm(features.flatten(1) if self.flat else features)
        scores: Tensor = self.linear(normed.flatten(1))
        return scores


@final
class Classifier(Method[Words]):
    """One linear classifier for each of `reads`, all trained at once by the sum of their cross entropies.

    A `frozen` network stays in evaluation mode: no weight and no statistic of it moves.

    Args:
        backbone: the pretrained network.
        facts: sizes of the run.
        reads: what each classifier reads, by name.
        classes: how many classes there are.
        side: side of the images in pixels.
        training: what happens to images and targets.
        std: deviation of the classifiers' initial weights.
        frozen: whether the network stays as it is.
        at_once: images that pass a frozen network together.
    """

    def __init__(
        self,
        backbone: Backbone,
        facts: RunFacts,
        *,
        reads: Mapping[str, Read],
        classes: int,
        side: int,
        training: Training,
        std: float,
        frozen: bool,
        at_once: int,
    ) -> None:
        super().__init__(Words(), backbone, facts)
        self.reads, self.classes, self.frozen, self.at_once = dict(reads), classes, frozen, at_once
        self.treatment = training
        backbone.requires_grad_(not frozen)
        with torch.set_grad_enabled(not frozen):
            found = self.seen(backbone.eval(), torch.zeros(2, 3, side, side))
        if not frozen:
            leave_out_unread_(backbone, found.values())
        self.heads = nn.ModuleDict({name: Head(reads[name], found[name], classes, std) for name in reads})
        self.slow = (
            None
            if training.ema is None
            else nn.ModuleDict({"backbone": frozen_copy(backbone), "heads": frozen_copy(self.heads)})
        )
        mix, make = training.mix, cast(Any, Mixup)
        self.mixed = (
            None
            if mix is None
            else make(mix.mixup, mix.cutmix, None, mix.p, mix.switch, "batch", True, training.smoothing, classes)
        )

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Sum over classifiers of the cross entropy; scalars: share of a batch's images that are classified right."""
        assert batch.labels is not None, "a source without labels is refused before"
        images, targets = self.prepared(batch, batch.labels, at)
        scores = self.scores(images)
        losses = [F.cross_entropy(s.float(), targets, label_smoothing=self.smoothing) for s in scores.values()]
        right = {f"top1_{name}": (s.detach().argmax(1) == batch.labels).float().mean() for name, s in scores.items()}
        named = {"top1": next(iter(right.values()))} if len(right) == 1 else right
        return StepResult(torch.stack(losses).sum(), {} if self.mixed is not None else named)

    @property
    def smoothing(self) -> float:
        """Label smoothing of the loss: mixing smooths by itself."""
        return 0.0 if self.mixed is not None else self.treatment.smoothing

    def prepared(self, batch: Batch, labels: Tensor, at: Progress) -> tuple[Tensor, Tensor]:
        """Images (B, 3, s, s) with noise, holes and mixtures, and targets (B,) or (B, classes).

        Colour noise is a function of (seed, epoch, image); holes and mixtures are a rank's own, of (seed, step).

        Raises:
            DataError: an odd number of images is to be mixed.
        """
        images, treatment = batch.views[0], self.treatment
        with torch.no_grad(), seeded(at.seed, "classifier", at.step, at.part, dist.rank()):
            if treatment.lighting:
                alpha = normal(seed_of(at.seed, "lighting", at.epoch), batch.index) * treatment.lighting
                images = lit(images, alpha, treatment.std)
            if treatment.erase:
                erase: Any = RandomErasing
                images = erase(treatment.erase, mode="pixel", max_count=1, device=str(images.device))(images)
            if self.mixed is None:
                return images, labels
            if len(images) % 2:
                raise DataError(
                    f"`evaluator.mix` needs an even number of images in each forward pass (now {len(images)})",
                    hint="choose an even `evaluator.batch_size` per rank and slice",
                )
            mixed: tuple[Tensor, Tensor] = self.mixed(images, labels)
            return mixed

    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """Scores (B, classes) of images by each classifier."""
        if not self.frozen:
            return {name: self.heads[name](x) for name, x in self.seen(self.backbone, images).items()}
        with torch.no_grad():
            parts = [self.seen(self.backbone, part) for part in images.split(self.at_once)]
        with torch.autocast(images.device.type, enabled=False):
            return {name: head(torch.cat([part[name] for part in parts]).float()) for name, head in self.heads.items()}

    def seen(self, backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
        """What each classifier reads of a network for images."""
        taps = list(dict.fromkeys(tap for read in self.reads.values() for tap in read.taps))
        found = {"pooled": backbone(images)} if taps == ["pooled"] else backbone.taps(images, taps)
        return {name: read.of(found) for name, read in self.reads.items()}

    def likeliest(self, images: Tensor, *, slow: bool = False) -> dict[str, Tensor]:
        """The likeliest classes (B, min(5, classes)), best first, by each classifier; `slow`: of the following copy."""
        if slow:
            assert self.slow is not None
            seen = self.seen(self.slow["backbone"], images)  # type: ignore[arg-type]
            scores = {name: head(seen[name]) for name, head in self.slow["heads"].items()}  # type: ignore[operator]
        else:
            scores = self.scores(images)
        return {name: s.float().topk(min(TOPS, self.classes), dim=1).indices for name, s in scores.items()}

    def copy_student(self) -> None:
        """Begin the following copy where the network begins."""
        if self.slow is not None:
            copy_(self.slow["backbone"], self.backbone)
            copy_(self.slow["heads"], self.heads)

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Move the following copy, statistics included (as timm's ModelEma does)."""
        if self.slow is None or self.treatment.ema is None:
            return
        for slow, fast in ((self.slow["backbone"], self.backbone), (self.slow["heads"], self.heads)):
            ema_(slow, fast, self.treatment.ema)
            for old, new in zip(slow.buffers(), fast.buffers(), strict=True):
                old.lerp_(new, 1 - self.treatment.ema) if old.is_floating_point() else old.copy_(new)

    def train(self, mode: bool = True) -> "Classifier":
        """Training or evaluation mode of all that learns; what does not learn stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        if self.slow is not None:
            self.slow.eval()
        return self


def leave_out_unread_(backbone: Backbone, found: Iterable[Tensor]) -> None:
    """Leave parameters out of training that do not reach any of `found`: ranks would wait for their gradients."""
    named = [p for p in backbone.parameters() if p.requires_grad]
    total = torch.stack([x.float().sum() for x in found]).sum()
    for p, gradient in zip(named, torch.autograd.grad(total, named, allow_unused=True), strict=True):
        p.requires_grad_(gradient is not None)


def normal(key: int, index: Tensor) -> Tensor:
    """Three standard normal numbers for each of `index` (B,): (B, 3), on its device (Box & Muller 1958)."""
    slots = torch.arange(3, device=index.device)
    radius = (-2 * torch.log1p(-uniform_on(key, index[:, None], slots))).sqrt()
    return radius * torch.cos(2 * torch.pi * uniform_on(key, index[:, None], slots + 3))


def lit(images: Tensor, alpha: Tensor, std: Sequence[float]) -> Tensor:
    """Standardised images (B, 3, h, w) with the same noise added to all pixels of an image, before standardisation.

    The noise is EIGENVECTORS (alpha * EIGENVALUES), alpha (B, 3) (Krizhevsky et al. 2012, section 4.1).
    """
    noise = (alpha * alpha.new_tensor(EIGENVALUES)) @ alpha.new_tensor(EIGENVECTORS).T / alpha.new_tensor(std)  # (B, 3)
    return images + noise[:, :, None, None].to(images)


def set_drop_path(trunk: nn.Module, rate: float) -> None:
    """Let blocks be skipped while training: the last with probability `rate`, earlier ones linearly less.

    Raises:
        PresetError: the network has no blocks with two branches, as transformers have.
    """
    blocks = [module for module in trunk.modules() if "drop_path1" in module._modules]
    if not blocks:
        if rate:
            raise PresetError(
                f"`evaluator.drop_path`: a `{type(trunk).__name__}` has no blocks that can be skipped",
                hint="set it to 0",
            )
        return
    for block, p in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for branch in ("drop_path1", "drop_path2"):
            setattr(block, branch, DropPath(p) if p else nn.Identity())


def mean_read(backbone: Backbone) -> Read:
    """The mean of a vision transformer's patch tokens after its last block, through a layer norm (He et al. 2022).

    Raises:
        PresetError: the network is none.
    """
    blocks = [name for name in backbone.tap_names() if name.startswith("blocks.")]
    if not blocks:
        raise PresetError(
            f"`evaluator.feature: mean` needs a vision transformer, not a `{type(backbone.trunk).__name__}`",
            hint="use `-o evaluator.feature=pooled`",
        )
    return Read((blocks[-1],), average, norm="layer", eps=1e-6)


def tuned_reads(feature: Literal["pooled", "mean"], backbone: Backbone) -> Mapping[str, Read]:
    """What the classifier of a network that is trained with it reads: `TunedConfig.feature`.

    Raises:
        PresetError: the network does not have it.
    """
    return {"class": mean_read(backbone) if feature == "mean" else Read(("pooled",), average)}


def whole(source: Source) -> Source:
    """All images."""
    return source


@dataclass(frozen=True, slots=True)
class TrainedEvaluator:
    """What an evaluator that trains gives to its caller: `build` of such a module makes one."""

    reads: Callable[[Backbone], Mapping[str, Read]]
    """What each of its classifiers reads of a network."""
    headline: str
    """The metric that stands for all when one number is wanted."""
    frozen: bool
    """Whether the network stays as it is."""
    part: Callable[[Source], Source] = whole
    """The training images that are used, of all there are."""
    same_images: bool = False
    """Never the same images for training and test."""
    many_classes: bool = False
    """Never several classes in an image."""
    new_classes: bool = False
    """Never test images of classes that were not trained on."""


@contextmanager
def in_words_of_an_evaluation() -> Iterator[None]:
    """Inside, errors that speak of a pretraining preset's keys speak of an evaluator's."""
    keys = {"data.batch_size": "evaluator.batch_size", "data.drop_last": "evaluator.drop_last",
            "run.accumulate": "evaluator.accumulate", "run.batch_norm": "evaluator.batch_norm",
            "optim.": "evaluator.optim."}  # fmt: skip
    try:
        yield
    except UserError as error:
        message, hint = error.message, error.hint or ""
        for old, new in keys.items():
            message, hint = message.replace(f"`{old}", f"`{new}"), hint.replace(f"-o {old}", f"-o {new}")
            hint = hint.replace(f"`{old}", f"`{new}")
        raise type(error)(message, hint=hint or None) from error
