"""How is it handed on? A file that nobody can confuse with another, what is known about it, and a card for people.

What goes out is read back first. The file's name ends in the first 8 digits of its SHA-256, which torch.hub checks.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from sslcli.config.base import Settings
from sslcli.convert import _to_timm
from sslcli.convert._layout import Network
from sslcli.convert._write import standard_resnet
from sslcli.engine import checkpoint, machine
from sslcli.errors import SslError, UserError, WeightsError
from sslcli.features import weights as stored
from sslcli.features.weights import Manifest, Weights

CARD = "README.md"
"""Where hubs look for a card."""
CLOSE = 0.1
"""Percentage points by which a repeated evaluation may differ, on another machine, and still agree."""
_VERSIONS = ("ssl", "python", "torch", "torchvision", "timm", "numpy")
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


class Result(Settings):
    """A report of an evaluation, in short."""

    protocol: str
    """Its name, with a mark where settings, step or images differ from what the protocol fixes."""
    metrics: dict[str, float]
    """Percentages in [0, 100]."""
    details: dict[str, Any]
    """Protocol hash, settings, seed, data fingerprints, floors, versions."""


class Published(Settings):
    """What is known about a published file: the JSON beside it."""

    format: Literal[1] = 1
    """Version of this description."""
    name: str
    """Of the model."""
    file: str
    """Of the weights, beside this file."""
    sha256: str
    """Of that file."""
    size: int
    """Its bytes."""
    full: str | None = None
    """File with heads and slow twins too, for `ssl pretrain --init-from`."""
    full_sha256: str | None = None
    """Of that file."""
    licence: str | None
    """SPDX identifier, e.g. `Apache-2.0`."""
    finished: bool
    """Whether the run was at its end."""
    manifest: Manifest
    """What the weights file says of itself: network, view, images it learned from, preset."""
    results: tuple[Result, ...]
    """Newest report of each protocol on these very weights."""
    versions: dict[str, str]
    """Of the software that wrote this."""
    date: str
    """When this was written (UTC)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What lies in the folder now."""

    weights: Path
    full: Path | None
    description: Path
    card: Path
    published: Published
    left_out: tuple[str, ...]
    """Protocols whose reports are about other weights."""


def publish(
    weights: Weights,
    out: Path,
    results: Sequence[Result],
    *,
    name: str,
    licence: str | None,
    full: bool = False,
    allow_unfinished: bool = False,
) -> Outcome:
    """Write weights, description and card into a folder.

    Args:
        weights: as loaded; finite, and fitting their network.
        out: the folder.
        results: reports found beside the weights; those on other weights are left out.
        name: of the model: letters, digits, `.`, `_`, `-`.
        licence: SPDX identifier; None says that there is none.
        full: write what the whole method remembers, without its optimiser, beside the backbone.
        allow_unfinished: publish weights of a run that is not at its end.

    Raises:
        UserError: the name or licence is no such word, or the run is not at its end.
        WeightsError: `full` is asked of a file that holds a backbone only, or there are values that are not finite.
        SslError: a file cannot be written, or what it gives back differs.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"`{name}` cannot name a file", hint="use letters, digits, `.`, `_` and `-`")
    if licence is not None and not _SPDX.fullmatch(licence):
        raise UserError(
            f"`{licence}` is no licence identifier", hint="https://spdx.org/licenses lists them: Apache-2.0"
        )
    finished = at_its_end(weights)
    if not finished and not allow_unfinished:
        raise UserError(
            f"`{weights.file}` is of step {weights.manifest.step}, and its run is not at its end",
            hint="`ssl resume RUN` finishes it; `--allow-unfinished` publishes it as it is",
        )
    state = _whole(weights) if full else None
    preset = weights.manifest.preset
    manifest = weights.manifest.model_copy(update={"preset": None if preset is None else without_paths(preset)})
    plain = out / f"{name}.safetensors"
    try:
        stored.save(weights.backbone, manifest, plain)
        plain.with_name(f"{name}.manifest.json").unlink()  # the description below holds it
        path, digest = _named(plain, name, ".safetensors")
        if stored.load(path).digest != weights.digest:
            raise SslError(f"`{path}` gives back other tensors", hint="the disk may be failing")
        whole, whole_digest = None, None
        if state is not None:
            checkpoint.write(out / f"{name}-full.pt", state)
            whole, whole_digest = _named(out / f"{name}-full.pt", f"{name}-full", ".pt")
        own = [result for result in results if _about(result) == weights.digest]
        environment = machine.environment()
        published = Published(
            name=name,
            file=path.name,
            sha256=digest,
            size=path.stat().st_size,
            full=None if whole is None else whole.name,
            full_sha256=whole_digest,
            licence=licence,
            finished=finished,
            manifest=manifest,
            results=tuple(result.model_copy(update={"details": without_paths(result.details)}) for result in own),
            versions={key: str(environment[key]) for key in _VERSIONS},
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        description, written = path.with_suffix(".json"), out / CARD
        _put(description, published.model_dump_json(indent=2) + "\n")
        _put(written, card(published, _network(weights), weights.backbone.trunk))
    except OSError as error:
        raise SslError(f"cannot write to `{out}`: {error.strerror or error}", hint="choose another `--out`") from error
    others = tuple(result.protocol for result in results if result not in own)
    return Outcome(path, whole, description, written, published, others)


def at_its_end(weights: Weights) -> bool:
    """Whether the run that the weights are from has taken all its steps; other tools' weights count as they are."""
    manifest = weights.manifest
    if manifest.preset is None:
        return True
    run = manifest.preset["run"]
    if run.get("steps") is not None:
        return bool(manifest.step >= run["steps"])
    if not manifest.step:
        return False
    half_a_step = 0.5 * manifest.epoch / manifest.step  # the number of steps is rounded
    return bool(manifest.epoch + half_a_step + 1e-4 >= run["epochs"])


def without_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with absolute paths cut to their last part: where images lie says who you are, not what was done."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [cut(item) for item in value]
        return Path(value).name if isinstance(value, str) and value.startswith(os.sep) else value

    return {key: cut(value) for key, value in data.items() if key != "command"}


def agreement(known: Mapping[str, float], again: Mapping[str, float]) -> float:
    """Largest difference in percentage points between two results of one protocol.

    Raises:
        SslError: they have other metrics, or differ by more than `CLOSE`.
    """
    if known.keys() != again.keys():
        raise SslError(f"the protocol measures something else now: `{min(known.keys() ^ again.keys())}`")
    metric = max(known, key=lambda key: abs(known[key] - again[key]))
    gap = abs(known[metric] - again[metric])
    if not gap <= CLOSE:
        raise SslError(
            f"`{metric}` is {again[metric]:.2f} % with the published file and {known[metric]:.2f} % in the report",
            hint="the images may have changed since, or the report is of another version of ssl",
        )
    return gap


def card(published: Published, network: Network, trunk: nn.Module) -> str:
    """The card in Markdown, with the front matter that Hugging Face's hub reads."""
    manifest = published.manifest
    about = (manifest.preset or {}).get("about") or {}
    lines = [
        "---",
        yaml.safe_dump(_front_matter(published), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {published.name}",
        "",
        _origin(manifest),
    ]
    if not published.finished:
        lines += ["", "The run was not at its end."]
    lines += [f"\n{what.capitalize()}: {about[what]}" for what in ("paper", "follows") if about.get(what)]
    lines += ["", "## Results", "", *_results(published)]
    lines += ["", "## Load it", "", *_block("ssl", _with_ssl(published))]
    lines += _block("timm", _with_timm(published, network, trunk))
    lines += _block("torchvision", _with_torchvision(published, network))
    view = manifest.view
    lines += [
        f"Images: shorter side resized to {view.resize} px ({view.interpolation}), the central {view.size} px of it, "
        f"RGB, (x / 255 - {list(view.normalize.mean)}) / {list(view.normalize.std)}.",
        "",
        "## The files",
        "",
        "| file | SHA-256 |",
        "| --- | --- |",
        f"| `{published.file}` | `{published.sha256}` |",
    ]
    if published.full is not None:
        lines.append(f"| `{published.full}` | `{published.full_sha256}` |")
    versions = ", ".join(f"{name} {version}" for name, version in published.versions.items())
    return "\n".join(
        [
            *lines,
            "",
            f"`{Path(published.file).stem}.json` holds the whole preset, the images' fingerprint and every setting of "
            f"the evaluations. Trained with ssl {manifest.version}; published with {versions}.",
            "",
        ]
    )


def _origin(manifest: Manifest) -> str:
    """What the network is and where its weights come from, in a sentence."""
    network, source = _backbone_words(manifest), manifest.source
    if manifest.origin is not None:
        return (
            f"{network}, method `{manifest.method}`, from `{manifest.origin.file}` (layout `{manifest.origin.layout}`, "
            f"SHA-256 `{manifest.origin.sha256}`)."
        )
    images = "" if source is None else f" on {source.images} images (fingerprint `{source.fingerprint}`)"
    return (
        f"{network}, trained with `{manifest.method}` for {manifest.epoch:g} epochs ({manifest.step} steps){images}, "
        "without labels."
    )


def _front_matter(published: Published) -> dict[str, Any]:
    manifest = published.manifest
    kind = str(manifest.backbone.get("name"))
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": _dataset(result.details.get("test") or {}),
            "metrics": [
                {"type": "accuracy" if metric.startswith("top") else metric, "name": f"{result.protocol} {metric}",
                 "value": round(value, 4)}
                for metric, value in result.metrics.items()
            ],
        }
        for result in published.results
    ]  # fmt: skip
    return {
        **({"license": published.licence.lower()} if published.licence else {}),
        "library_name": "timm" if manifest.layout in ("timm", "torchvision") else "sslcli",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", "image-feature-extraction", manifest.method, kind],
        **({"model-index": [{"name": published.name, "results": results}]} if results else {}),
    }


def _dataset(test: Mapping[str, Any]) -> dict[str, str]:
    source = test.get("source") or {}
    named = source.get("path") or source.get("root") or source.get("name") or "images"
    return {"type": str(test.get("fingerprint")), "name": f"{test.get('images')} test images ({Path(str(named)).name})"}


def _backbone_words(manifest: Manifest) -> str:
    said = manifest.backbone
    match said.get("name"):
        case "resnet":
            return f"A ResNet-{said.get('depth', 50)}"
        case "vit":
            return f"A ViT ({said.get('size', 'small')}, patches of {said.get('patch', 16)} px)"
        case name:
            return f"A `{said.get('model') or name}`"


def _results(published: Published) -> list[str]:
    if not published.results:
        return ["None were measured."]
    rows = ["| protocol | metric | value |", "| --- | --- | --- |"]
    rows += [
        f"| {result.protocol} | {metric} | {value:.2f} % |"
        for result in published.results
        for metric, value in result.metrics.items()
    ]
    floors = [
        f"{result.protocol}: {name} {metrics.get(head):.2f} %"
        for result in published.results
        for name, metrics in (result.details.get("floors") or {}).items()
        if (head := result.details.get("headline")) in metrics
    ]
    return [*rows, *(["", f"For comparison, by the headline metric: {'; '.join(floors)}."] if floors else [])]


def _block(title: str, lines: Sequence[str]) -> list[str]:
    return [f"With {title}:", "", "```python", *lines, "```", ""] if lines else []


def _with_ssl(published: Published) -> list[str]:
    return [
        "from sslcli.features.weights import load",
        f'backbone = load("{published.file}").backbone  # in evaluation mode, without gradients',
        "features = backbone(images)  # (B, 3, H, W) to (B, dim)",
    ]


def _with_timm(published: Published, network: Network, trunk: nn.Module) -> list[str]:
    with suppress(WeightsError):
        return list(_to_timm.lines(network, trunk, Path(published.file)))
    return []


def _with_torchvision(published: Published, network: Network) -> list[str]:
    if network.backbone.get("name") != "resnet":
        return []
    with suppress(WeightsError):
        depth = standard_resnet(network, "torchvision")
        return [
            "import torchvision, safetensors.torch",
            f"network = torchvision.models.resnet{depth}()",
            f'network.load_state_dict(safetensors.torch.load_file("{published.file}"), strict=False)  # but for fc',
        ]
    return []


def _network(weights: Weights) -> Network:
    manifest = weights.manifest
    return Network(dict(weights.backbone.trunk.state_dict()), dict(manifest.backbone), manifest.view, manifest.method)


def _about(result: Result) -> str | None:
    """Digest of the weights that a report is about."""
    found = (result.details.get("weights") or {}).get("digest")
    return None if found is None else str(found)


def _whole(weights: Weights) -> dict[str, Any]:
    """What a checkpoint holds, without optimiser and paths."""
    if weights.file.suffix not in (checkpoint.FILE, checkpoint.FOLDER):
        raise WeightsError(
            f"`{weights.file}` holds a backbone only", hint="`--full` needs a run or one of its checkpoints"
        )
    state = checkpoint.read(weights.file)
    for name, tensor in state["method"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"`{weights.file}`: `{name}` holds values that are not finite")
    kept = {key: state[key] for key in ("progress", "facts", "source", "method")}
    return {**kept, "preset": without_paths(state["preset"])}


def _named(plain: Path, name: str, suffix: str) -> tuple[Path, str]:
    """Give a file the name that its content asks for; the name and the digest."""
    with plain.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return plain.replace(plain.with_name(f"{name}-{digest[:8]}{suffix}")), digest


def _put(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
