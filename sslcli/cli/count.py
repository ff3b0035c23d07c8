"""ssl count: what will it cost?"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslcli.cli.options import Json, Override
from sslcli.errors import DataError, UserError

if TYPE_CHECKING:
    from sslcli.config.presets import PretrainPreset
    from sslcli.engine.count import Cost, Part, View

IMAGENET = 1_281_167
"""Training images of ImageNet-1k: what is counted with where neither the source nor `--images` says."""
_STORED = (".pt", ".dcp", ".safetensors")


def count(
    what: Annotated[
        str, typer.Argument(metavar="PRESET|FILE|RUN", help="Preset, YAML file, run folder, checkpoint or weights.")
    ],
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Images in the source; when absent, as many as it has.")
    ] = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Count parameters, arithmetic and memory of a run or backbone, without running it."""
    from sslcli.engine.count import backbone_cost, cost_of

    path = Path(what)
    if not (path.is_dir() or path.suffix in _STORED):
        from sslcli.config.load import load

        cost = cost_of(*_sized(load("pretrain", what, override or ()).preset, images))
        _tell(cost, as_json)
        if not as_json:
            print(f"next: ssl pretrain --preset {what} --data DIR --dry-run", file=sys.stderr)
        return
    if override:
        raise UserError(
            f"`{what}` is what it is: `-o` changes presets only", hint="name the preset, or `RUN/preset.yaml`"
        )
    from sslcli.features.weights import load as load_weights

    weights = load_weights(path)
    manifest = weights.manifest
    if manifest.preset is not None:
        known = IMAGENET if manifest.source is None else manifest.source.images
        _tell(cost_of(weights.preset(), images or known), as_json)
        return
    part, view = backbone_cost(manifest.backbone, manifest.view.size)
    if as_json:
        print(json.dumps({"parts": [asdict(part)], "views": [asdict(view)]}, indent=2))
    else:
        print(_table(("part", "parameters"), [(part.name, _grouped(part.parameters))]) + "\n" + _view(view))


def _sized(preset: "PretrainPreset", images: int | None) -> tuple["PretrainPreset", int]:
    """The preset and how many images it is about."""
    from sslcli.data import open_source

    if images is not None:
        return preset, images
    try:
        return preset, len(open_source(preset.data.source))
    except DataError as error:
        print(
            f"counted for the {_grouped(IMAGENET)} images of ImageNet; `--images N` says otherwise ({error.message})",
            file=sys.stderr,
        )
        return preset, IMAGENET


def _tell(cost: "Cost", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(cost), indent=2))
        return
    memory, epochs = cost.memory, cost.steps * cost.batch_size / cost.images
    total = {
        "parameters": sum(part.parameters for part in cost.parts),
        "trainable": sum(part.trainable for part in cost.parts),
    }
    rows = [
        *map(_row, cost.parts),
        ("total", *map(_grouped, total.values()), _bytes(memory["buffers"]), _flop(cost.forward)),
    ]
    print(_table(("part", "parameters", "trained", "buffers", "forward per image"), rows))
    print()
    for view in cost.views:
        print(_view(view))
    print(f"one step        {_flop(cost.step)} per image, forward and backward, in a batch of {cost.counted_on}")
    print(
        f"the run         {cost.run:.2e} FLOP: {_grouped(cost.steps)} steps of {cost.batch_size}, {epochs:.4g} epochs"
    )
    print(
        f"memory          {_bytes(sum(memory.values()))} before activations: "
        + ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items())
    )


def _row(part: "Part") -> tuple[str, ...]:
    return (
        part.name,
        _grouped(part.parameters),
        _grouped(part.trainable),
        _bytes(part.buffers) if part.buffers else "-",
        _flop(part.flops) if part.flops else "-",
    )


def _view(view: "View") -> str:
    seen = f"{view.count} view{'s' if view.count > 1 else ''} per image" if view.count else "evaluation"
    return f"backbone        {_flop(view.flops)} ({view.flops / 2e9:.2f} GMAC) at {view.height} x {view.width}, {seen}"


def _flop(flops: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.4g} {unit}FLOP"
    return f"{flops:.0f} FLOP"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} B"


def _grouped(number: int) -> str:
    """The number with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns to the right but for the first."""
    every: list[Any] = [head, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )
