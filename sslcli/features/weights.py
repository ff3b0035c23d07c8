"""A backbone as a file: written so that other tools can read it, read so that nothing but weights is trusted."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sslcli import __version__
from sslcli.config import choice
from sslcli.config.base import Settings
from sslcli.config.presets import PretrainPreset
from sslcli.config.types import Count, Index
from sslcli.config.views import EvalView
from sslcli.contracts import Backbone, Method, RunFacts
from sslcli.convert._file import open_file
from sslcli.convert._find import HUB, Converted, convert, digest_of_file
from sslcli.convert._resample import fitted
from sslcli.convert._write import replacing
from sslcli.engine import checkpoint
from sslcli.engine.build import method_of
from sslcli.errors import PresetError, SslError, WeightsError
from sslcli.seeds import seed_here

FILE = "backbone.safetensors"
"""Name of the extracted backbone in a run folder."""
LAYOUTS = {"resnet": "torchvision"}
"""Whose parameter names a family of backbones carries, where they are not timm's alone."""

_KEY = "ssl"  # of the manifest among a safetensors file's metadata
_CONVERT = "`ssl inspect FILE` says what a file is; other tools' files are read when their layout is known"


class TrainedOn(Settings):
    """The images that weights were trained on."""

    fingerprint: str
    """Digest of the images."""
    images: Index
    """How many."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where there were labels."""


class Origin(Settings):
    """The foreign file that weights were taken from."""

    file: str
    """Its name."""
    sha256: str
    """Its digest, 64 hexadecimal digits."""
    layout: str
    """Whose layout it has, e.g. `moco`."""
    part: str
    """Which network was taken: `student` or `teacher`."""
    prefix: str
    """What stands before its names there."""
    notes: tuple[str, ...] = ()
    """What the file does not say and was taken for granted."""


class Manifest(Settings):
    """What a weights file says about itself."""

    format: Literal[1] = 1
    """Version of this description."""
    version: str
    """Version of ssl that trained the weights, or took them in."""
    layout: str
    """Whose parameter names these are: `torchvision` or `timm`."""
    tensors: Count
    """How many tensors the network has."""
    digest: str
    """SHA-256 over names, shapes, types and values of the tensors."""
    method: str
    """How the backbone was trained."""
    step: Index
    """Optimiser steps taken."""
    epoch: float
    """Passes over the images."""
    view: EvalView
    """How to show the network an image: size and normalisation."""
    backbone: dict[str, Any]
    """The network, as the preset describes it."""
    source: TrainedOn | None = None
    """The images it learned from, where they are known."""
    preset: dict[str, Any] | None = None
    """The whole experiment, where it is known."""
    origin: Origin | None = None
    """The foreign file, where the weights are from one."""


@dataclass(frozen=True, slots=True)
class Match:
    """How the tensors of a file fitted the network."""

    matched: int
    missing: tuple[str, ...] = ()
    """The network has them, the file does not."""
    unexpected: tuple[str, ...] = ()
    """The file has them, the network does not."""
    misshapen: tuple[str, ...] = ()
    """Both have them, in different shapes."""

    @property
    def whole(self) -> bool:
        """Whether every tensor found its place and every place its tensor."""
        return not (self.missing or self.unexpected or self.misshapen)


@dataclass(frozen=True, slots=True)
class Weights:
    """A backbone with where it comes from."""

    backbone: Backbone
    """In evaluation mode, on the CPU, without gradients."""
    manifest: Manifest
    file: Path
    """The file it was read from."""
    run: Path | None
    """The run folder the file lies in, if it does."""
    match: Match
    converted: Converted | None = None
    """How it was taken in, where the file is another tool's."""

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, types and values of the tensors."""
        return self.manifest.digest

    def preset(self) -> PretrainPreset:
        """The experiment the weights come from.

        Raises:
            WeightsError: this version of ssl does not understand it, or the weights are another tool's.
        """
        if self.manifest.preset is None:
            raise WeightsError(
                f"`{self.file}` does not say which images it was trained on: it was not trained by ssl",
                hint="name images with `--data DIR`, or with `--train DIR --test DIR`",
            )
        return _understood(self.manifest.preset, self.file)


@dataclass(frozen=True, slots=True)
class Extracted:
    """A backbone that has been written, read back, and found to be the same."""

    path: Path
    manifest: Manifest
    matched: int
    """Tensors read back."""
    difference: float
    """Largest difference of features between the network before and after, on random images."""
    already: bool
    """Whether `what` was an extracted backbone to begin with."""


@dataclass(frozen=True, slots=True)
class TakenIn:
    """A foreign file that has become one of ours."""

    extracted: Extracted
    weights: Weights
    proof: float | None
    """Largest difference of features between their network and ours; None where theirs is not installed."""


def load(
    what: str | Path,
    *,
    allow_partial: bool = False,
    part: str | None = None,
    layout: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Weights:
    """The backbone that a path means: ours, or another tool's.

    Args:
        what: a run folder (its newest step), a checkpoint, a file of `ssl extract-backbone`, another tool's file.
        allow_partial: accept a file whose tensors fit the network only in part; the rest keeps its initial values.
        part: which network of a run, checkpoint or another tool's file: `student` or `teacher` (its slow twin); when
            None, the one that the method or layout takes.
        layout: whose file it is, where that cannot be told.
        changes: keys of the backbone that another tool's file does not tell.

    Raises:
        WeightsError: it is missing, damaged, of no known layout, or does not fit the network.
    """
    path = Path(what)
    if is_foreign(path):
        return _of_foreign(path, allow_partial=allow_partial, part=part, layout=layout, changes=changes or {})
    if path.resolve().suffix == checkpoint.FOLDER:
        return _of_checkpoint(path, part)
    if path.is_dir():
        return (
            _of_run(path, allow_partial=allow_partial)
            if part is None
            else _of_checkpoint(checkpoint.newest(path), part)
        )
    if not _begins_like_safetensors(path):
        return _of_checkpoint(path, part)
    if part is not None:
        raise WeightsError(f"`{path}` holds one network only", hint="`--part` needs the run or one of its checkpoints")
    return _of_safetensors(path, allow_partial=allow_partial)


def is_foreign(path: Path) -> bool:
    """Whether this is another tool's file, or a folder of Hugging Face's; no code from it is run.

    Raises:
        WeightsError: there is nothing, or nothing that is a file of weights.
    """
    if path.is_dir():
        ours = path.resolve().suffix == checkpoint.FOLDER or checkpoint.all_in(path) or (path / FILE).is_file()
        return not ours and any((path / name).is_file() for name in HUB)
    if not path.is_file():
        raise WeightsError(f"no run folder or weights file `{path}`", hint="`ssl runs list` shows the runs there are")
    if _begins_like_safetensors(path):
        return manifest_in(path) is None
    return not {"format", "version"} <= set(open_file(path).tops)


def begin_with(method: Method[Any], what: str | Path, *, allow_partial: bool = False, part: str | None = None) -> str:
    """Put weights into a method that has just been built, and say in one line what was done.

    From a run or checkpoint of the same method it takes everything: heads, slow twins, queues, centres. From any other,
    from a file of `ssl extract-backbone` and from another tool's file, it takes the backbone; positions made for images
    of another size are resampled. Optimiser, schedule and step begin anew.

    Args:
        method: not yet trained.
        what: run folder, checkpoint, backbone file or another tool's file.
        allow_partial: take what fits by name and shape, and leave the rest as it is.
        part: which network of another tool's file: `student` or `teacher`.

    Raises:
        WeightsError: the weights are missing, damaged, not ours, or do not fit.
    """
    state, told = _state_in(Path(what)), ""
    if state is not None and state["preset"]["method"]["name"] == method.cfg.name:
        taken = f"all of `{method.cfg.name}` at step {state['progress']['step']}"
        _check_finite(state["method"], Path(what))
        match = _fill(method, state["method"])
    else:
        weights = load(what, allow_partial=allow_partial, part=part)
        taken = "the backbone" if weights.converted is None else whose(weights.converted)
        tensors, notes = fitted(_tensors(weights.backbone), method.backbone.trunk.state_dict())
        told = "".join(f"; {note}" for note in notes)
        match = _fill(method.backbone.trunk, tensors)
        method.copy_student()
    if not match.whole and (not allow_partial or match.matched == 0):
        raise WeightsError(
            f"{taken} in `{what}` does not fit: {_told(match)}",
            hint="`--allow-partial` takes what fits and leaves the rest as it starts" if match.matched else None,
        )
    return f"begins with `{what}`, {taken}: {_told(match)}{told}"


def whose(converted: Converted) -> str:
    """Which network of which layout was taken, in words."""
    role = "" if converted.found.part.role in converted.found.part.said else f", `--part {converted.found.part.role}`"
    return f"the {converted.found.part.said} of {converted.recognised.layout.title}{role}"


def _state_in(path: Path) -> checkpoint.State | None:
    """The newest checkpoint of a run folder, or this one; None where there is no checkpoint."""
    if path.is_dir() and path.resolve().suffix != checkpoint.FOLDER and not checkpoint.all_in(path):
        return None
    if path.is_file() and (is_foreign(path) or _begins_like_safetensors(path)):
        return None
    return checkpoint.read(checkpoint.meant(path))


def save(backbone: Backbone, manifest: Manifest, path: Path) -> None:
    """Write the tensors of a backbone's trunk, under canonical names, and the manifest beside them as JSON too.

    Raises:
        SslError: a file cannot be written; what was there before is untouched.
    """
    _check_finite(backbone.trunk.state_dict(), path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(backbone).items()}
    text = manifest.model_dump_json()
    pretty = json.dumps(json.loads(text), indent=2) + "\n"
    sidecar = path.with_name(f"{path.stem}.manifest.json")
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _KEY: text})
    with replacing(sidecar) as temporary:
        temporary.write_text(pretty, encoding="utf-8")


def extract(what: str | Path, out: Path | None = None, *, layout: str | None = None) -> Extracted:
    """Write the backbone of a run (after its newest step) or of a checkpoint as a file, and prove that it is the same.

    Args:
        what: run folder or checkpoint; of an already extracted file nothing is left to do but to copy it to `out`.
        out: the file; when absent, `backbone.safetensors` in the run folder, with the step in its name where a single
            checkpoint is given.
        layout: whose parameter names are wanted; an error if these are others'.

    Raises:
        WeightsError: the checkpoint cannot be used, or has names of another layout.
        SslError: the file cannot be written, or what it gives back differs.
    """
    given = Path(what)
    if given.is_dir() and checkpoint.all_in(given):
        weights = _of_checkpoint(checkpoint.newest(given))
        target = out or given / FILE
    else:
        weights = load(given)
        target = out or _beside(given)
    if layout not in (None, "timm", weights.manifest.layout):  # torchvision's names are timm's too
        raise WeightsError(
            f"the backbone has the parameter names of {weights.manifest.layout}, not of `{layout}`",
            hint=f"leave `--format` out, or use `--format {weights.manifest.layout}`",
        )
    already = weights.file.suffix == ".safetensors" and weights.converted is None
    if already and (out is None or (out.exists() and out.samefile(weights.file))):
        return Extracted(weights.file, weights.manifest, weights.match.matched, 0.0, already=True)
    return replace(extract_loaded(weights, target), already=already)


def extract_loaded(weights: Weights, target: Path) -> Extracted:
    """Write a backbone as a file, read it back, and compare.

    Raises:
        SslError: the file cannot be written, or what it gives back differs.
    """
    save(weights.backbone, weights.manifest, target)
    again = load(target)
    side = weights.manifest.view.size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (weights.backbone(images) - again.backbone(images)).abs().max().item()
    if difference != 0 or again.digest != weights.digest:
        raise SslError(f"`{target}` gives back features that differ by {difference:g}", hint="the disk may be failing")
    return Extracted(target, again.manifest, again.match.matched, difference, already=False)


def take_in(
    what: str | Path,
    out: Path,
    *,
    part: str | None = None,
    layout: str | None = None,
    changes: Mapping[str, Any] | None = None,
    allow_partial: bool = False,
) -> TakenIn:
    """Write a network of another tool's file as one of ours, and prove that it is the same.

    Args:
        what: the file.
        out: the file to write, `.safetensors`.
        part: `student` or `teacher`; when None, what the layout takes.
        layout: whose file it is, where that cannot be told.
        changes: keys of the backbone that the file does not tell, e.g. `heads`.
        allow_partial: accept a file whose tensors fit the network only in part.

    Raises:
        WeightsError: the file cannot be used.
        SslError: the file cannot be written, or the network says something else than theirs.
    """
    weights = load(what, allow_partial=allow_partial, part=part, layout=layout, changes=changes)
    proof = None if weights.converted is None or not weights.match.whole else _proof(weights, weights.converted)
    return TakenIn(extract_loaded(weights, out), weights, proof)


def _proof(weights: Weights, converted: Converted) -> float | None:
    """Largest difference of features between ours and theirs on random images, in double precision."""
    theirs = converted.source()
    if not isinstance(theirs, nn.Module):
        return None
    ours = copy.deepcopy(weights.backbone).double()
    side = weights.manifest.view.size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(images)
        difference = float((ours(images) - expected).abs().max())
    if not difference <= 1e-8 * max(1.0, expected.abs().max().item()):
        raise SslError(
            f"`{weights.file}`: features differ by {difference:g} from those of {converted.found.dialect.name}",
            hint="this is a defect of ssl: please report it with the name of the file",
        )
    return difference


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def network(config: Mapping[str, Any], *, seed: int = 0) -> Backbone:
    """The backbone that this part of a preset describes, with fresh weights; a function of the seed.

    Raises:
        WeightsError: there is no such backbone here.
    """
    try:
        cfg = choice.config_of("sslcli.backbones", str(config.get("name"))).model_validate(dict(config))
        seed_here(seed, "init")
        built: Backbone = choice.build("sslcli.backbones", cfg)(cfg)
    except PresetError as error:
        raise WeightsError(f"the weights belong to a network that cannot be built here: {error.message}") from error
    except ValidationError as error:
        raise WeightsError(f"the weights belong to a network that cannot be built here: {_first(error)}") from None
    return built


def _of_run(run: Path, *, allow_partial: bool) -> Weights:
    extracted, steps = run / FILE, checkpoint.all_in(run)
    if extracted.is_file():
        found = manifest_in(extracted)
        if not steps or (found is not None and found.step == checkpoint.step_of(steps[-1])):
            return _of_safetensors(extracted, allow_partial=allow_partial)
    return _of_checkpoint(checkpoint.newest(run))


def method_at(path: Path) -> tuple[Method[Any], PretrainPreset, checkpoint.State]:
    """The whole method of a checkpoint, its preset, and what else the checkpoint holds.

    Raises:
        WeightsError: the file is missing, damaged or not ours.
    """
    if path.is_file() and not _begins_like_zip(path):
        raise WeightsError(
            f"`{path}` is neither a checkpoint of ssl nor a safetensors file: it is empty, damaged or another tool's",
            hint=_CONVERT,
        )
    try:
        state = checkpoint.read(path)
    except WeightsError as error:
        raise WeightsError(error.message, hint=error.hint or _CONVERT) from error
    lacking = [key for key in ("preset", "facts", "method", "progress", "source", "version") if key not in state]
    if lacking:
        raise WeightsError(f"`{path}` lacks `{lacking[0]}`, which every checkpoint of ssl has", hint=_CONVERT)
    preset = _understood(state["preset"], path)
    try:
        method = method_of(preset, RunFacts(**state["facts"]))
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise WeightsError(f"`{path}` does not fit the network its preset describes: {_first(error)}") from error
    return method, preset, state


def _of_checkpoint(path: Path, part: str | None = None) -> Weights:
    method, preset, state = method_at(path)
    backbone = _at_rest(_part_of(method, part))
    tensors = _tensors(backbone)
    _check_finite(tensors, path)
    step = state["progress"]["step"]
    manifest = Manifest(
        version=state["version"],
        layout=LAYOUTS.get(preset.backbone.name, "timm"),
        tensors=len(tensors),
        digest=digest_of(tensors),
        method=preset.method.name,
        step=step,
        epoch=round(step / state["progress"]["steps_per_epoch"], 4),
        view=preset.views.eval_view,
        backbone=preset.backbone.model_dump(mode="json"),
        source=TrainedOn.model_validate(state["source"]),
        preset=state["preset"],
    )
    return Weights(backbone, manifest, path, _run_of(path), Match(len(tensors)))


def _part_of(method: Method[Any], part: str | None) -> Backbone:
    """The network worth keeping, or the one that is asked for."""
    if part is None:
        return method.exported()
    slow = [child for child in method.children() if isinstance(child, Backbone) and child is not method.backbone]
    networks = {"student": method.backbone, **({"teacher": slow[0]} if slow else {})}
    if part not in networks:
        raise WeightsError(
            f"`{method.cfg.name}` has no network `{part}`", hint=f"there is {' and '.join(f'`{n}`' for n in networks)}"
        )
    return networks[part]


def _of_foreign(
    path: Path, *, allow_partial: bool, part: str | None, layout: str | None, changes: Mapping[str, Any]
) -> Weights:
    converted = convert(path, part=part, layout=layout, changes=changes)
    found = converted.network
    _check_finite(found.tensors, path)
    backbone = network(found.backbone)
    tensors, notes = fitted(found.tensors, backbone.trunk.state_dict())
    match = _fill(backbone.trunk, tensors)
    match = replace(match, unexpected=(*match.unexpected, *converted.unexpected))
    if not match.whole and (not allow_partial or match.matched == 0):
        raise WeightsError(
            f"{whose(converted)} in `{path}` does not fit the network that its shapes tell of: {_told(match)}",
            hint="`--allow-partial` accepts it as it is" if match.matched else None,
        )
    _at_rest(backbone)
    file = converted.recognised.opened.path
    ours = _tensors(backbone)
    manifest = Manifest(
        version=__version__,
        layout=LAYOUTS.get(str(found.backbone["name"]), "timm"),
        tensors=len(ours),
        digest=digest_of(ours),
        method=found.method,
        step=0,
        epoch=0,
        view=found.view,
        backbone=dict(found.backbone),
        origin=Origin(
            file=file.name,
            sha256=digest_of_file(file),
            layout=converted.recognised.layout.name,
            part=converted.found.part.role,
            prefix=converted.found.prefix,
            notes=(*converted.notes, *notes),
        ),
    )
    return Weights(backbone, manifest, file, None, match, converted)


def _of_safetensors(path: Path, *, allow_partial: bool) -> Weights:
    manifest = manifest_in(path)
    if manifest is None:
        raise WeightsError(
            f"`{path}` is a safetensors file without a manifest: `ssl extract-backbone` did not make it", hint=_CONVERT
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot read `{path}`: {error}", hint="extract it again") from error
    _check_finite(tensors, path)
    if digest_of(tensors) != manifest.digest and not allow_partial:
        raise WeightsError(
            f"the tensors in `{path}` are not the ones its manifest describes", hint="extract or download it again"
        )
    backbone = network(manifest.backbone)
    match = _fill(backbone.trunk, tensors)
    if not match.whole and (not allow_partial or match.matched == 0):
        raise WeightsError(
            f"`{path}` does not fit its network: {_told(match)}",
            hint="`--allow-partial` accepts it as it is" if match.matched else None,
        )
    _at_rest(backbone)
    manifest = manifest.model_copy(update={"digest": digest_of(_tensors(backbone))})
    return Weights(backbone, manifest, path, _run_of(path), match)


def manifest_in(path: Path) -> Manifest | None:
    """The manifest in a safetensors file, None where it has none."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"`{path}` is not a whole safetensors file: {error}", hint="extract or download it again"
        ) from error
    if text is None:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise WeightsError(f"`{path}` has a manifest this version does not understand: {_first(error)}") from None


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> Match:
    """Copy the tensors that fit into a module."""
    wanted = module.state_dict()
    both = wanted.keys() & tensors.keys()
    fitting = {name: tensors[name] for name in both if tensors[name].shape == wanted[name].shape}
    module.load_state_dict(fitting, strict=False)
    return Match(
        matched=len(fitting),
        missing=tuple(sorted(wanted.keys() - both)),
        unexpected=tuple(sorted(tensors.keys() - both)),
        misshapen=tuple(sorted(both - fitting.keys())),
    )


def _told(match: Match) -> str:
    parts = [
        f"{len(names)} {what} (`{names[0]}`{', …' if len(names) > 1 else ''})"
        for what, names in (
            ("missing", match.missing),
            ("unexpected", match.unexpected),
            ("of another shape", match.misshapen),
        )
        if names
    ]
    return ", ".join([f"{match.matched} tensors match", *parts])


def _tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The tensors of the trunk, by canonical name."""
    outside = [name for name in backbone.state_dict() if not name.startswith("trunk.")]
    if outside:
        raise SslError(
            f"the backbone keeps weights outside its `trunk`: `{outside[0]}`",
            hint="move them below `trunk`, which is what is saved",
        )
    return dict(backbone.trunk.state_dict())


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(
                f"`{path}`: `{name}` holds values that are not finite",
                hint="the run diverged; use an earlier checkpoint",
            )


def _at_rest(backbone: Backbone) -> Backbone:
    backbone.eval().requires_grad_(False)
    return backbone


def _understood(preset: Mapping[str, Any], path: Path) -> PretrainPreset:
    try:
        return PretrainPreset.model_validate(dict(preset))
    except ValidationError as error:
        raise WeightsError(f"`{path}` holds a preset this version does not understand: {_first(error)}") from None


def _run_of(path: Path) -> Path | None:
    """The run folder that a checkpoint or an extracted file belongs to."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "preset.yaml").is_file() or checkpoint.all_in(folder):
            return folder
    return None


def _beside(path: Path) -> Path:
    """Where the backbone of a checkpoint goes: into its run folder, with its step in the name."""
    run = _run_of(path)
    return (run or path.parent) / f"backbone_{path.stem}.safetensors"


def _begins_like_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _begins_like_safetensors(path: Path) -> bool:
    """Whether the file begins with a length and a JSON object, or is called so."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{")


def _first(error: Exception) -> str:
    """The gist of an error in one line."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"`{'.'.join(map(str, problem['loc']))}`: {problem['msg']}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])
