"""What is this file? Everything that can be said of a checkpoint or file of weights without running or training it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sslcli.convert._file import Opened, open_file
from sslcli.convert._find import convert, digest_of_file, inside, recognise, unwrapped
from sslcli.engine import checkpoint
from sslcli.errors import WeightsError
from sslcli.features.weights import FILE, is_foreign, manifest_in

SSL = "ssl"
"""Layout of our own files."""


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a file."""

    path: Path
    container: str
    """How the tensors are stored."""
    size: int
    """Bytes."""
    sha256: str
    """Digest of the file, 64 hexadecimal digits."""
    layout: str
    """Whose layout it is: `ssl`, a name of `docs/reference/layouts.md`, or `unknown`."""
    title: str
    """The same in words."""
    method: str
    networks: tuple[dict[str, str], ...] = ()
    """Role, prefix, names and title of every network in it; the first is the one that is taken."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """The network that is taken, as a preset describes it."""
    training: tuple[str, ...] = ()
    """Keys with the state of training: it can be trained on with the tool that wrote it."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Epoch or step, where the file tells."""
    tensors: int = 0
    """All in the file but those of the training state."""
    numbers: int = 0
    """Their elements."""
    types: dict[str, int] = field(default_factory=dict)
    """Element type to number of tensors."""
    things: tuple[str, ...] = ()
    """Classes and functions that the file names; none was imported or called."""
    notes: tuple[str, ...] = ()
    keys: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name and shape of every tensor."""


def about(what: Path, *, layout: str | None = None) -> About:
    """What a run folder's newest checkpoint, a checkpoint or a file of weights is.

    Args:
        what: folder or file.
        layout: whose file it is, where it fits several.

    Raises:
        WeightsError: it is missing, damaged, or no file of weights.
    """
    path = _file(what)
    opened = open_file(path)
    if not is_foreign(path):
        return _ours(opened)
    try:
        known = recognise(path, layout=layout)
    except WeightsError as error:
        if not opened.tensors:
            raise
        return _of(opened, "unknown", "unknown", "unknown", unwrapped(opened), notes=(error.message,))
    networks = tuple(
        {"part": one.part.role, "prefix": one.prefix, "is": one.part.said, "names": one.dialect.name}
        for one in known.networks
    )
    backbone: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    try:
        converted = convert(path, layout=layout)
        backbone, notes = converted.network.backbone, converted.notes
    except WeightsError as error:
        notes = (error.message,)
    strange = known.unexplained
    if strange:
        notes = (*notes, f"{len(strange)} tensors do not belong to this layout, e.g. `{strange[0]}`")
    return _of(
        opened, known.layout.name, known.layout.title, known.method, dict(known.tensors), networks=networks,
        backbone=backbone, notes=notes,
    )  # fmt: skip


def _file(what: Path) -> Path:
    """The one file that a folder stands for."""
    if not what.is_dir():
        return what
    if what.resolve().suffix == checkpoint.FOLDER:
        raise WeightsError(
            f"`{what}` is the checkpoint folder of a sharded run, not one file",
            hint="`ssl extract-backbone` writes its backbone as one",
        )
    if checkpoint.all_in(what):
        return _file(checkpoint.newest(what))
    return what / FILE if (what / FILE).is_file() else inside(what)


def _ours(opened: Opened) -> About:
    manifest = manifest_in(opened.path) if opened.container == "safetensors" else None
    if manifest is not None:
        came = "" if manifest.origin is None else f", from `{manifest.origin.file}` of {manifest.origin.layout}"
        progress = {} if manifest.preset is None else {"step": manifest.step, "epoch": manifest.epoch}
        return _of(
            opened, SSL, f"a backbone extracted by ssl {manifest.version}{came}", manifest.method, opened.tensors,
            backbone=manifest.backbone, progress=progress,
        )  # fmt: skip
    facts = opened.facts
    version, form = facts.get("version"), facts.get("format")
    notes: tuple[str, ...] = ()
    if form != checkpoint.FORMAT:
        notes = (f"this version of ssl reads format {checkpoint.FORMAT}, not {form}: install ssl {version}",)
    backbone = {
        key.removeprefix("preset.backbone."): value
        for key, value in facts.values.items()
        if key.startswith("preset.backbone.")
    }
    return _of(
        opened, SSL, f"a checkpoint of ssl {version}", str(facts.get("preset.method.name")), opened.tensors,
        backbone=backbone, progress={"step": facts.get("progress.step")}, notes=notes,
    )  # fmt: skip


def _of(
    opened: Opened,
    layout: str,
    title: str,
    method: str,
    tensors: dict[str, Tensor],
    *,
    networks: tuple[dict[str, str], ...] = (),
    backbone: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> About:
    told = {name: opened.facts.get(name) for name in ("epoch", "arch", "meta.epoch", "meta.iter", "global_step")}
    return About(
        path=opened.path,
        container=opened.container,
        size=opened.path.stat().st_size,
        sha256=digest_of_file(opened.path),
        layout=layout,
        title=title,
        method=method,
        networks=networks,
        backbone=backbone or {},
        training=opened.training,
        progress=progress or {name: value for name, value in told.items() if value is not None},
        tensors=len(opened.tensors),
        numbers=sum(x.numel() for x in opened.tensors.values()),
        types=dict(Counter(str(x.dtype).removeprefix("torch.") for x in opened.tensors.values())),
        things=opened.things,
        notes=notes,
        keys={name: tuple(x.shape) for name, x in tensors.items()},
    )
