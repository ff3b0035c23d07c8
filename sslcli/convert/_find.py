"""Whose file is this? All layouts are held against the names in it, and exactly one must explain them best."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli.config import choice
from sslcli.config.spelling import none_such
from sslcli.config.views import EvalView, Interpolation, Normalize
from sslcli.convert._families import FAMILIES, slopes
from sslcli.convert._file import Opened, open_file
from sslcli.convert._layout import Dialect, Facts, Layout, Network, Part, Tensors
from sslcli.convert._rules import to_ours, unknown
from sslcli.errors import WeightsError

PACKAGE = "sslcli.convert"
HUB = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a folder of Hugging Face's."""
_WRAPPED = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CONTAINERS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "classy_state_dict",
    "net",
    "network",
    "params",
)


@dataclass(frozen=True, slots=True)
class Found:
    """One network of a file."""

    part: Part
    prefix: str
    dialect: Dialect


@dataclass(frozen=True, slots=True)
class Recognised:
    """A file, and whose it is."""

    opened: Opened
    layout: Layout
    tensors: Tensors
    """By name, without containers and wrappers."""
    networks: tuple[Found, ...]
    """The networks in it; the first is the one the layout takes."""
    unexplained: tuple[str, ...] = ()
    """Names that the layout does not know."""

    @property
    def method(self) -> str:
        """How it was trained, as `ssl methods` calls it; `unknown` where the file does not tell."""
        told = self.layout.method
        return told if isinstance(told, str) else told(self.tensors, self.opened.facts)


@dataclass(frozen=True, slots=True)
class Converted:
    """A network of a foreign file under our names."""

    network: Network
    recognised: Recognised
    found: Found
    dropped: dict[str, str]
    """Names of theirs that we have no use for, with the reason."""
    unexpected: tuple[str, ...]
    """Names of theirs, inside the network, that no rule knows."""
    beside: int
    """Tensors that stand beside the network: heads, queues, other networks."""
    notes: tuple[str, ...]
    """What the file does not say and was taken for granted, and what else its reader should know."""
    source: Callable[[], Callable[[Tensor], Tensor] | None]
    """Builds their own network, images to pooled features; None where it is not installed."""


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout of the folder."""
    found: list[Layout] = []
    for name in choice.members(PACKAGE):
        found.extend(vars(choice.module(PACKAGE, name)).get("LAYOUTS", ()))
    return tuple(found)


def recognise(path: Path, *, layout: str | None = None) -> Recognised:
    """Whose file this is.

    Args:
        path: the file, or a folder of Hugging Face's with one in it.
        layout: name of the layout, where the file fits several.

    Raises:
        WeightsError: it is no file of weights, or fits no layout or several equally well.
    """
    opened = open_file(inside(path))
    if not opened.tensors:
        told = ", ".join(f"`{name}`" for name in opened.things[:3]) or "only numbers and words"
        raise WeightsError(f"`{path}` holds no tensors, but {told}")
    tensors = unwrapped(opened)
    names = list(tensors)
    known = [one for one in layouts() if layout in (None, one.name)]
    if not known:
        raise WeightsError(none_such(str(layout), sorted({one.name for one in layouts()})))
    fitting = [found for one in known if (found := _fit(one, opened, tensors)) is not None]
    if not fitting:
        shown = ", ".join(f"`{name}`" for name in names[:3])
        if {"features.0.weight", "top_layer.weight"} <= {name.replace("module.", "") for name in names}:
            raise WeightsError(
                f"`{path}` holds an AlexNet or VGG of DeepCluster (facebookresearch/deepcluster), and ssl has no such "
                "backbone: of DeepCluster's networks it builds ResNets alone",
                hint="the preset `deepcluster-sobel-r50-200e` trains such a ResNet",
            )
        raise WeightsError(
            f"`{path}` holds {len(names)} tensors in no layout that ssl knows: {shown}, …",
            hint=f"`ssl inspect {path} --keys` lists them; docs/reference/layouts.md says what is recognised",
        )
    least = min(map(_rank, fitting))
    best = [found for found in fitting if _rank(found) == least]
    titles = sorted({found.layout.name for found in best})
    if len(titles) > 1:
        raise WeightsError(
            f"`{path}` fits {' and '.join(f'`{title}`' for title in titles)} equally well",
            hint="say which with `--layout NAME`",
        )
    return best[0]


def inside(path: Path) -> Path:
    """The file of weights in a folder of Hugging Face's; a file itself."""
    if path.is_dir():
        for name in HUB:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"no run, and no `model.safetensors`, in the folder `{path}`", hint="give the file itself")
    return path


def unwrapped(opened: Opened) -> dict[str, Tensor]:
    """Tensors by name, without the container they lie in and without what DDP, FSDP and compile put before names.

    Raises:
        WeightsError: two names become one.
    """
    names = list(opened.tensors)
    inner = ""
    for container in _CONTAINERS:
        if container in opened.tops and any(name.startswith(f"{container}.") for name in names):
            inner = f"{container}."
            break
    out: dict[str, Tensor] = {}
    for name in names:
        if inner and not name.startswith(inner):
            continue
        short = _WRAPPED.sub("", name.removeprefix(inner))
        if short in out:
            raise WeightsError(f"`{opened.path}` holds `{short}` twice, with and without what wraps it")
        out[short] = opened.tensors[name]
    return out


def convert(
    path: Path, *, part: str | None = None, layout: str | None = None, changes: Mapping[str, Any] | None = None
) -> Converted:
    """A network of a foreign file under our names.

    Args:
        path: the file.
        part: `student` or `teacher`; when None, what the layout takes.
        layout: name of the layout, where the file fits several.
        changes: keys of the backbone that the file does not tell, e.g. `heads`.

    Raises:
        WeightsError: the file cannot be read, is of no known layout, lacks the part, or cannot be built here.
    """
    known = recognise(path, layout=layout)
    found = _chosen(known, part, path)
    raw = _raw(known, found)
    try:
        applied = to_ours(found.dialect.rules, raw)
        if applied.unused:
            raise WeightsError(f"it lacks `{found.prefix}{applied.unused[0]}`")
        tensors = applied.tensors if found.dialect.after is None else found.dialect.after(applied.tensors)
        inferred = FAMILIES[found.dialect.family](tensors, raw, _told(known.opened.facts, changes or {}))
        front = slopes(known.tensors) if inferred.backbone.get("sobel") else ()
    except (WeightsError, KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"`{path}`, {known.layout.title}, holds a network that cannot be built here: {str(error) or repr(error)}"
        ) from error
    if known.layout.settings is not None and "heads" not in (changes or {}):
        inferred = known.layout.settings(inferred, known.method)
    backbone = {**inferred.backbone, **{key: value for key, value in (changes or {}).items() if key != "heads"}}
    sized = "size" in backbone and "heads" not in backbone and bool(known.layout.signs)
    settled = (*(changes or {}), *(("heads",) if sized else ()))  # a project's own sizes have their own heads
    notes = [note for note in (*inferred.notes, *front) if not any(key in note for key in settled)]
    added = _counters(tensors)
    if added:
        tensors = {**tensors, **added}
        notes.append(f"{len(added)} counters of batch norms are not in the file and start at 0")
    notes += _twins(known, found, raw)
    half = sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()} & {"float16", "bfloat16", "float64"})
    if half:
        notes.append(f"stored as {' and '.join(half)}, converted to float32")
    eps = known.opened.facts.get("config.layer_norm_eps")
    ours = 1e-5 if found.dialect.family == "swin" else 1e-6
    if found.dialect.family != "resnet" and isinstance(eps, float) and eps != ours:
        notes.append(f"its layer norms add {eps:g} to the variance, ours {ours:g}: features differ in the last digits")
    view, told = _view(known, backbone)
    notes += told
    network = Network(tensors, backbone, view, known.method)
    return Converted(
        network, known, found, applied.dropped, tuple(f"{found.prefix}{name}" for name in applied.unexpected),
        len(known.opened.tensors) - len(raw), tuple(notes),
        lambda: None if found.dialect.source is None else found.dialect.source(backbone, raw),
    )  # fmt: skip


def _told(facts: Facts, changes: Mapping[str, Any]) -> Facts:
    """Facts with the number of heads that the user gave."""
    return Facts({**facts.values, "config.num_attention_heads": changes["heads"]}) if "heads" in changes else facts


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rank(found: Recognised) -> tuple[int, bool]:
    """The fewer names are left over the better; of two, the one that asked for signs of its own."""
    return len(found.unexplained), not found.layout.signs


def _fit(layout: Layout, opened: Opened, tensors: Tensors) -> Recognised | None:
    """How a layout explains the names; None where it does not."""
    names = list(tensors)
    if not all(_sign(sign, names, opened.tops) for sign in layout.signs):
        return None
    if any(_sign(sign, names, opened.tops) for sign in layout.never):
        return None
    beside = [re.compile(pattern) for pattern in layout.beside]
    found: list[Found] = []
    left = set(names)
    for part in layout.parts:
        for prefix in part.prefixes:
            inner = [
                name[len(prefix) :]
                for name in names
                if name.startswith(prefix) and (prefix or not any(pattern.match(name) for pattern in beside))
            ]
            dialect = _dialect(layout.dialects, inner)
            if dialect is not None:
                found.append(Found(part, prefix, dialect))
                strange = set(unknown(dialect.rules, inner))
                left -= {f"{prefix}{name}" for name in inner if name not in strange}
                for alias in part.aliases:
                    left -= {f"{alias}{name}" for name in inner}
                break
    if not found or (found[0].part is not layout.parts[0] and layout.parts[0].role == "student"):
        return None  # the average without what it averages is no whole file of this layout
    left = {name for name in left if not any(pattern.match(name) for pattern in beside)}
    return Recognised(opened, layout, tensors, tuple(found), tuple(name for name in names if name in left))


def _sign(sign: str, names: Iterable[str], tops: Sequence[str]) -> bool:
    if sign.startswith("top:"):
        return sign.removeprefix("top:") in tops
    pattern = re.compile(sign)
    return any(pattern.match(name) for name in names)


def _dialect(dialects: Iterable[Dialect], names: Sequence[str]) -> Dialect | None:
    there = set(names)
    fitting = [one for one in dialects if there.issuperset(one.anchors) and not there.intersection(one.never)]
    return min(fitting, key=lambda one: len(unknown(one.rules, names)), default=None)


def _chosen(known: Recognised, part: str | None, path: Path) -> Found:
    if part is None:
        return known.networks[0]
    for found in known.networks:
        if found.part.role == part:
            return found
    there = " and ".join(f"`{found.part.role}` (the {found.part.said})" for found in known.networks)
    raise WeightsError(f"`{path}`, {known.layout.title}, has no `{part}`; it has {there}")


def _raw(known: Recognised, found: Found) -> dict[str, Tensor]:
    """The tensors of one network, by names without its prefix."""
    beside = [re.compile(pattern) for pattern in known.layout.beside] if not found.prefix else []
    return {
        name[len(found.prefix) :]: tensor
        for name, tensor in known.tensors.items()
        if name.startswith(found.prefix) and not any(pattern.match(name) for pattern in beside)
    }


def _twins(known: Recognised, found: Found, raw: Tensors) -> list[str]:
    """What to say of copies of the same network that differ from it."""
    notes = []
    for alias in found.part.aliases:
        differing = [
            name
            for name, tensor in raw.items()
            if (twin := known.tensors.get(f"{alias}{name}")) is not None and not torch.equal(twin, tensor)
        ]
        if differing:
            notes.append(
                f"the copy under `{alias}` differs in {len(differing)} tensors (`{differing[0]}`); "
                f"the one under `{found.prefix}` is taken"
            )
    return notes


def _counters(tensors: Tensors) -> dict[str, Tensor]:
    """Counters of batch norms that files before PyTorch 0.4.1 lack."""
    wanted = (name.replace("running_var", "num_batches_tracked") for name in tensors if name.endswith("running_var"))
    return {name: torch.tensor(0) for name in wanted if name not in tensors}


def _view(known: Recognised, backbone: Mapping[str, Any]) -> tuple[EvalView, list[str]]:
    """How the network wants to be shown an image, and what had to be taken for granted."""
    facts, notes = known.opened.facts, []
    mean, std, told = _colours(facts)
    if told:
        normalize = Normalize(mean=mean, std=std)
    else:
        normalize = known.layout.view.normalize
        notes.append(f"colours are shown with mean {_listed(normalize.mean)} and deviation {_listed(normalize.std)}")
    size = backbone.get("image_size") if backbone.get("stem") not in ("cifar", "padded") else 32
    if not isinstance(size, int) or known.method == "dinov2":
        size = known.layout.view.size
    resize = round(size * 8 / 7) if size >= 160 else size
    interpolation: Interpolation = known.layout.view.interpolation
    if known.networks[0].dialect.family != "resnet":
        interpolation = "bicubic"
    return EvalView(resize=resize, size=size, interpolation=interpolation, normalize=normalize), notes


def _colours(facts: Facts) -> tuple[tuple[float, float, float], tuple[float, float, float], bool]:
    """Mean and deviation that a file says it was trained with, and whether it does."""
    pretrained = facts.get("config.pretrained_cfg", "config.pretrained_config")
    given = pretrained if isinstance(pretrained, dict) else {}
    mean = facts.get("preprocessor.image_mean") or given.get("mean")
    std = facts.get("preprocessor.image_std") or given.get("std")
    if mean is not None and std is not None and _three(mean) and _three(std):
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), True
    plain = facts.get("args.imagenet_default_mean_and_std")
    if isinstance(plain, bool):
        default = Normalize() if plain else Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        return default.mean, default.std, True
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False


def _three(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
    )


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
