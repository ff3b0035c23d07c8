"""ssl inspect: what is this file?"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sslcli.cli.options import Json, Layout


def inspect(
    what: Annotated[Path, typer.Argument(metavar="FILE|RUN", help="Any tool's checkpoint or weights; a run folder.")],
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor with its shape.")] = False,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint or file of weights is; no code in it is run."""
    from sslcli.features.about import about

    found = about(what, layout=layout)
    facts: dict[str, Any] = {**asdict(found), "path": str(found.path)}
    names = facts.pop("keys")
    if as_json:
        print(json.dumps({**facts, "keys": names} if keys else facts, indent=2))
        return
    rows = {
        "file": f"{found.path}, {found.size / 1e6:.1f} MB, {found.container}",
        "sha256": found.sha256,
        "layout": f"{found.layout}: {found.title}" if found.layout != found.title else found.layout,
        "method": found.method,
        "progress": _listed(found.progress),
        "networks": "; ".join(
            f"{one['is']} (`--part {one['part']}`, {one['names']}"
            + (f", behind `{one['prefix']}`)" if one["prefix"] else ")")
            for one in found.networks
        ),
        "backbone": _listed(found.backbone),
        "training state": ", ".join(found.training) or "none",
        "tensors": f"{found.tensors}, {found.numbers:,} numbers, {_listed(found.types)}",
        "names in pickle": f"{', '.join(found.things)} (left alone)" if found.things else "",
    }
    for name, value in rows.items():
        if value:
            print(f"{name:<15} {value}")
    for note in found.notes:
        print(f"{'note':<15} {note}")
    if keys:
        for name, shape in names.items():
            print(f"{name}  {tuple(shape)}")
    if found.layout not in ("ssl", "unknown") and found.backbone:
        print(f"next: ssl eval knn {found.path} --data DIR", file=sys.stderr)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
