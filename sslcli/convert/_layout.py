"""What a module of this folder promises: the folder is the registry of other tools' layouts.

A module may export `LAYOUTS`, a tuple of `Layout` that are read, and `write`, a `Writer`. Names that begin with an
underscore are shared parts. `Network` is what passes between: tensors under our names and what is needed to build them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sslcli.config.views import EvalView, Normalize
from sslcli.convert._rules import Rule

Tensors = Mapping[str, Tensor]
IMAGENET = EvalView()
"""Resized to 256 px, 224 px of it, with ImageNet's mean and deviation."""
BICUBIC = EvalView(interpolation="bicubic")
"""The same with bicubic resizing, as transformers are mostly evaluated."""
HALF = EvalView(interpolation="bicubic", normalize=Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
"""The same with colours in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class Network:
    """A backbone between two layouts."""

    tensors: dict[str, Tensor]
    """The trunk, by our names: torchvision's for a ResNet, timm's for the rest."""
    backbone: dict[str, Any]
    """The `backbone` section of a preset that builds it."""
    view: EvalView = IMAGENET
    """How it wants to be shown an image."""
    method: str = "unknown"
    """How it was trained."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says beside its tensors: numbers, words, and settings that were pickled as objects."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """By dotted name, e.g. `arch` or `args.patch_size`."""

    def get(self, *names: str) -> Any:
        """The value of the first of these names that the file has, otherwise None."""
        return next((self.values[name] for name in names if name in self.values), None)


@dataclass(frozen=True, slots=True)
class Inferred:
    """A network that shapes tell of."""

    backbone: dict[str, Any]
    """The `backbone` section of a preset."""
    notes: tuple[str, ...] = ()
    """What shapes do not tell and had to be taken."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Whose names one kind of network carries, below the prefix at which it stands."""

    name: str
    """E.g. `timm ViT`."""
    family: str
    """Who infers the network from shapes: `resnet`, `vit`, `swin` or `beit`."""
    anchors: tuple[str, ...]
    """Names that a network in this dialect has, whatever its size."""
    rules: tuple[Rule, ...]
    """Between it and our names."""
    never: tuple[str, ...] = ()
    """Names that a network in this dialect never has."""
    after: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """What is to be done with several tensors at once, when they have our names."""
    source: Callable[[Mapping[str, Any], Tensors], Callable[[Tensor], Tensor] | None] | None = None
    """Their own network with their tensors, images to pooled features; None where it is not to be had."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the networks in a file."""

    role: str
    """`student` (trained by gradient) or `teacher` (its moving average)."""
    prefixes: tuple[str, ...]
    """What may stand before its names; the first that a network stands behind."""
    said: str
    """What it is called there, e.g. `query encoder`."""
    aliases: tuple[str, ...] = ()
    """Prefixes under which the same tensors are stored again."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tool writes its checkpoints; names without `module.` and without `state_dict` or `model` before them."""

    name: str
    """E.g. `moco`."""
    title: str
    """E.g. `MoCo v1 and v2 (facebookresearch/moco)`."""
    parts: tuple[Part, ...]
    """The networks in it; the first is taken unless another is asked for."""
    dialects: tuple[Dialect, ...]
    """The names they may carry."""
    signs: tuple[str, ...] = ()
    """Regular expressions of which each must match the beginning of some name; `top:KEY` asks for a key at the top."""
    never: tuple[str, ...] = ()
    """Regular expressions that match the beginning of no name."""
    beside: tuple[str, ...] = ()
    """Regular expressions of what else belongs to it: heads, queues, centres."""
    method: str | Callable[[Tensors, Facts], str] = "unknown"
    """How it was trained, as `ssl methods` calls it."""
    view: EvalView = IMAGENET
    """How its networks want to be shown an image."""
    settings: Callable[[Inferred, str], Inferred] | None = None
    """Corrects, for a method, the inferred network where shapes do not tell, as heads of MoCo v3."""


@dataclass(frozen=True, slots=True)
class Written:
    """A file in another layout."""

    path: Path
    """The file, or folder."""
    tensors: int
    """How many of ours are in it."""
    proof: str
    """How it was shown to be the same network."""
    difference: float | None = None
    """Largest difference of features between ours and theirs, relative to the largest feature; None where theirs was
    not run but read back, every tensor the same to the last bit."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Our names that have no place there, with the reason."""
    missing: tuple[str, ...] = ()
    """Their names that we have no tensor for, such as a classifier's."""
    use: tuple[str, ...] = ()
    """Lines to type or to put into a configuration."""
    notes: tuple[str, ...] = ()
    """What the reader must know to use it."""


class Writer(Protocol):
    """`write` of a module here."""

    def __call__(self, network: Network, out: Path) -> Written:
        """Write the file under a temporary name, then rename it; prove the equality where the other tool is installed.

        Raises:
            WeightsError: the layout has no place for this network.
            SslError: the file cannot be written, or the features differ.
        """
        ...
