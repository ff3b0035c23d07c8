"""ssl convert: in whose dialect?"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslcli.cli.features import Partial
from sslcli.cli.methods import title
from sslcli.cli.options import Json, Layout, PartOf
from sslcli.config.spelling import nearest
from sslcli.errors import UserError

if TYPE_CHECKING:
    from sslcli.convert._layout import Writer, Written
    from sslcli.features.weights import Weights

OURS = "ssl"
"""The target that takes another tool's file in."""
DIALECTS = Path(__file__).parents[1] / "convert"


_WRITES = re.compile(r"^def write\(", re.MULTILINE)


def targets() -> list[str]:
    """Tools that files can be written for: the modules that define `write`; none is imported for it."""
    return [p.stem for p in sorted(DIALECTS.glob("[!_]*.py")) if _WRITES.search(p.read_text(encoding="utf-8"))]


def _complete(start: str) -> list[str]:
    return [name for name in (OURS, *targets()) if name.startswith(start)]


def convert(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help=f"One of: {', '.join((OURS, *targets()))}.", autocompletion=_complete),
    ],
    what: Annotated[Path, typer.Argument(metavar="RUN|WEIGHTS", help="Run folder, checkpoint or file of weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; for huggingface, a folder.")],
    part: PartOf = None,
    layout: Layout = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-o", "--set", metavar="KEY=VALUE", help="What another tool's file does not tell, e.g. heads=12."),
    ] = None,
    allow_partial: Partial = False,
    as_json: Json = False,
) -> None:
    """Write a backbone for another tool, or another tool's for ssl, and prove that it is the same network."""
    changes = _changes(overrides or [])
    if target == OURS:
        _take_in(what, out, part, layout, changes, allow_partial=allow_partial, as_json=as_json)
        return
    write = _writer(target)
    from sslcli.features.weights import load

    weights = load(what, allow_partial=allow_partial, part=part, layout=layout, changes=changes)
    done = write(_network(weights), out)
    if as_json:
        print(json.dumps({**asdict(done), "path": str(done.path)}, indent=2))
        return
    _tell(done, len(weights.backbone.trunk.state_dict()))


def _take_in(
    what: Path,
    out: Path,
    part: str | None,
    layout: str | None,
    changes: dict[str, Any],
    *,
    allow_partial: bool,
    as_json: bool,
) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"`{out}` does not end in `.safetensors`", hint=f"use `{out}.safetensors`")
    from sslcli.features.weights import Match, take_in, whose

    done = take_in(what, out, part=part, layout=layout, changes=changes, allow_partial=allow_partial)
    weights, converted = done.weights, done.weights.converted
    match: Match = weights.match
    if as_json:
        facts = {
            "path": str(done.extracted.path),
            "matched": match.matched,
            "missing": match.missing,
            "unexpected": match.unexpected,
            "misshapen": match.misshapen,
            "dropped": {} if converted is None else converted.dropped,
            "difference": done.proof,
            "manifest": weights.manifest.model_dump(mode="json"),
        }
        print(json.dumps(facts, indent=2))
        return
    lines = []
    if converted is not None:
        others = [found.part for found in converted.recognised.networks if found.part is not converted.found.part]
        also = "".join(f"; `--part {other.role}` takes the {other.said}" for other in others)
        lines.append(f"{whose(converted)}, names as in {converted.found.dialect.name}{also}")
    lines.append(
        f"{match.matched} tensors matched, {len(match.missing)} missing, {len(match.unexpected)} unexpected, "
        f"{len(match.misshapen)} of another shape"
    )
    if converted is not None:
        reasons = sorted(set(converted.dropped.values()))
        lines += [f"left out: {sum(why == x for x in converted.dropped.values())} tensors, {why}" for why in reasons]
        lines += (
            [f"beside it: {converted.beside} tensors of heads, queues and other networks"] if converted.beside else []
        )
        lines.append(
            f"their own network gives the same features of two images, in double precision: largest difference "
            f"{done.proof:.2g}"
            if done.proof is not None
            else f"their own network is not to be had here for comparison: the names of {converted.found.dialect.name} "
            "are held against recordings in ssl's tests"
        )
    origin = weights.manifest.origin
    lines += [f"note: {note}" for note in (() if origin is None else origin.notes)]
    print("\n".join(lines), file=sys.stderr)
    print(done.extracted.path, flush=True)
    print(f"next: ssl eval knn {done.extracted.path} --data DIR", file=sys.stderr)


def _changes(overrides: list[str]) -> dict[str, Any]:
    """Keys of the backbone from `KEY=VALUE`.

    Raises:
        UserError: one has no `=`.
    """
    from sslcli.config.yaml_file import parse_value

    found: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"`{override}` is not KEY=VALUE", hint="for example `-o heads=12`")
        found[key.removeprefix("backbone.")] = parse_value(text)
    return found


def _writer(target: str) -> "Writer":
    """What writes for a tool.

    Raises:
        UserError: nothing does.
    """
    from sslcli.config import choice

    known = targets()
    if target not in known:
        close = nearest(target, (OURS, *known))
        titles = {OURS: "ssl itself, from another tool's file."}
        titles |= {name: title(DIALECTS / f"{name}.py") for name in known}
        raise UserError(
            f"no `{target}`; did you mean `{close}`?" if close else f"`{target}` is no tool that files are written for",
            hint="\n".join(["choose one of", *(f"  {name}: {said}" for name, said in titles.items())]),
        )
    made: Any = vars(choice.module("sslcli.convert", target))["write"]
    writer: Writer = made
    return writer


def _network(weights: "Weights") -> Any:
    from sslcli.convert._layout import Network

    manifest = weights.manifest
    return Network(dict(weights.backbone.trunk.state_dict()), dict(manifest.backbone), manifest.view, manifest.method)


def _tell(done: "Written", ours: int) -> None:
    gap = "" if done.difference is None else f"; largest relative difference {done.difference:.2g}"
    lines = [f"{ours} tensors matched, {len(done.missing)} missing, {len(done.dropped)} unexpected: {done.proof}{gap}"]
    lines += [f"missing there: {name}" for name in done.missing]
    lines += [f"left out: `{name}`, {why}" for name, why in done.dropped.items()]
    lines += [f"note: {note}" for note in done.notes]
    print("\n".join(lines), file=sys.stderr)
    print(done.path, flush=True)
    print("next:\n" + "\n".join(f"    {line}" for line in done.use), file=sys.stderr)
