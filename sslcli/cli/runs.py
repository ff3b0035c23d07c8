"""ssl runs: what happened so far?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslcli.cli.options import Json

if TYPE_CHECKING:
    from sslcli.runs.folder import Run

app = typer.Typer(help="List runs, show one, watch one, compare several.", no_args_is_help=True)

ENDS = {"interrupted": "was interrupted", "lost": "is lost"}
HEAD = ("run", "method", "step", "state", "loss", "knn", "updated")


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below a folder."""
    from sslcli.errors import UserError
    from sslcli.runs.folder import find_runs

    if not folder.is_dir():
        raise UserError(f"no folder `{folder}`", hint="`ssl runs list DIR` lists the runs below DIR")
    runs = find_runs(folder)
    if as_json:
        print(strict_json([summary(run) for run in runs]))
    elif runs:
        print(table([HEAD, *(_cells(run, folder) for run in runs)]))
    else:
        typer.echo(f"no runs in `{folder}`; start one with `ssl pretrain --preset … --data DIR`", err=True)


@app.command("show")
def show_run(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: Json = False) -> None:
    """Show one run: where it stands, what it measured, what to type next."""
    from sslcli.runs.folder import open_run

    found = open_run(run)
    if as_json:
        print(strict_json(details(found)))
        return
    print(table(_lines(found)))
    typer.echo(f"next: {next_command(found)}", err=True)


@app.command("watch")
def watch_run(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between looks.")] = 2.0,
) -> None:
    """Follow a run from another terminal until it ends."""
    from sslcli.cli.watch import condition, follow
    from sslcli.errors import SslError, StoppedOnRequest
    from sslcli.runs.folder import open_run

    open_run(run)
    status = follow(run, every)
    if status is None:
        raise SslError(f"`{run}` has no readable `status.json`", hint=f"`ssl runs show {run}` shows what there is")
    state, remark = condition(status)
    if state == "finished":
        typer.echo(f"next: {next_command(open_run(run))}", err=True)
        return
    kind = StoppedOnRequest if state == "stopped" else SslError
    raise kind(
        f"the run {ENDS.get(state, state)} at step {status.step}" + (f": {remark}" if remark else ""),
        hint=f"`ssl resume {run}` continues it" + (f"; but first: {status.advice}" if status.advice else ""),
    )


@app.command("compare")
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders with `reports` on weights.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Every metric, not only the one that stands for all.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Set the reports of runs side by side: a row for what was measured alike, a column for each run."""
    from sslcli.errors import UserError
    from sslcli.runs import compare

    found = compare.folders(runs)
    rows = compare.compared(found)
    if as_json:
        print(strict_json(compare.as_data(rows)))
        return
    if not rows:
        raise UserError("there is no report on any of these runs", hint=f"`ssl eval knn {runs[0]}` makes one")
    lines: list[Sequence[str]] = [("protocol", "metric", *found)]
    notes: list[str] = []
    for row in rows:
        name = row.kind.protocol
        if row.differs:
            notes.append(f"({len(notes) + 1}) not comparable with {name} above: other {', other '.join(row.differs)}")
            name = f"{name} ({len(notes)})"
        lines += [
            (name, metric, *(compare.cell(row.entries.get(run), metric) for run in found))
            for metric in (row.metrics if everything else (row.metric,))
        ]
    print(table(lines))
    for note in notes:
        print(note)


def summary(run: "Run") -> dict[str, Any]:
    """One run in a few plain values."""
    status = run.status
    return {
        "path": str(run.path),
        "preset": run.preset_name,
        "method": run.named("method"),
        "backbone": run.named("backbone"),
        "state": status.now if status else "unknown",
        "step": status.step if status else None,
        "total": status.total if status else None,
        "loss": status.loss if status else None,
        "health": status.health if status else None,
        "knn": knn(run),
        "updated": status.updated.isoformat() if status else None,
    }


def details(run: "Run") -> dict[str, Any]:
    """One run in full."""
    return {
        **summary(run),
        "status": run.status.model_dump(mode="json") if run.status else None,
        "last": run.metrics[-1] if run.metrics else None,
        "reports": [entry.model_dump(mode="json") for entry in run.reports],
        "checkpoints": [str(path) for path in run.checkpoints],
        "files": {name: str(path) for name, path in run.files.items()},
        "commands": run.commands,
        "environment": run.environment,
        "settings": run.preset,
    }


def knn(run: "Run") -> float | None:
    """Top-1 in percent of the run's kNN report at k = 20, or at its first k."""
    for entry in run.reports:
        if entry.protocol.startswith("knn") and entry.metrics:
            return entry.metrics.get("top1_k20", next(iter(entry.metrics.values())))
    return None


def next_command(run: "Run") -> str:
    """The useful thing to type next."""
    state = run.status.now if run.status else "unknown"
    if state == "running":
        return f"ssl runs watch {run.path}"
    if state != "finished":
        return f"ssl resume {run.path}"
    return run.evaluation if knn(run) is None else f"ssl features {run.path} --data DIR --out FILE.npz"


def strict_json(data: Any) -> str:
    """JSON by the book: what is no number, such as the loss of a run gone wrong, becomes null."""
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None), indent=2)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with two spaces between them."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def ago(seconds: float) -> str:
    """A duration in its largest whole unit: `40 s`, `5 min`, `3 h`, `12 d`."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds // 86400:.0f} d"


def _cells(run: "Run", root: Path) -> tuple[str, ...]:
    status, found = run.status, knn(run)
    name = str(run.path.relative_to(root)) if run.path != root else str(run.path)
    return (
        name,
        f"{run.named('method')} {run.named('backbone')}",
        f"{status.step}/{status.total}" if status else "-",
        status.now if status else "unknown",
        "-" if status is None or status.loss is None else f"{status.loss:.4g}",
        "-" if found is None else f"{found:.2f}",
        f"{ago(status.age)} ago" if status else "-",
    )


def _lines(run: "Run") -> list[tuple[str, str]]:
    status, last = run.status, run.metrics[-1] if run.metrics else {}
    about, source = run.preset.get("about") or {}, (run.preset.get("data") or {}).get("source") or {}
    rows = [
        ("run", str(run.path)),
        ("preset", " - ".join(word for word in (run.preset_name, about.get("title")) if word)),
        ("method", f"{run.named('method')} on {run.named('backbone')}"),
        ("data", " ".join(str(source[key]) for key in ("name", "path", "root") if source.get(key) is not None)),
    ]
    if status is not None:
        rows += [
            ("state", f"{status.now}, {ago(status.age)} ago" + (f": {status.message}" if status.message else "")),
            ("progress", f"step {status.step}/{status.total}, epoch {status.epoch:.2f}/{status.epochs:g}"),
        ]
        if status.now == "running":
            rows.append(("process", f"{status.pid} on {status.host}"))
            if status.eta_seconds is not None:
                rows.append(("left", ago(status.eta_seconds)))
        if status.health is not None:
            rows.append(("health", f"{status.health}: {status.advice}" if status.advice else status.health))
    if last:
        known = {key: value for key, value in last.items() if isinstance(value, float) and key != "epoch"}
        rows.append(("metrics", "  ".join(f"{key} {value:.4g}" for key, value in known.items())))
    for entry in run.reports:
        rows.append((entry.protocol, "  ".join(f"{key} {value:.2f}" for key, value in entry.metrics.items())))
    if run.checkpoints:
        rows.append(("checkpoints", f"{len(run.checkpoints)}, newest {run.checkpoints[-1]}"))
    rows += [(path.stem, str(path)) for path in run.files.values()]
    rows += [("command", command) for command in run.commands]
    return [(name, value) for name, value in rows if value]
