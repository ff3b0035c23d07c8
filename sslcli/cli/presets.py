"""ssl presets: what can be run, what exactly it does, and whether it is right."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sslcli.cli.options import Json, Override
from sslcli.errors import EXIT_USER, PresetError, UserError

app = typer.Typer(
    name="presets", help="List, show, compare, check and copy presets.", no_args_is_help=True, rich_markup_mode=None
)


def _known_job(job: str | None) -> str | None:
    from sslcli.config.presets import JOBS

    if job is not None and job not in JOBS:
        raise typer.BadParameter(f"must be {' or '.join(JOBS)}")
    return job


def _complete(start: str) -> list[str]:
    from sslcli.config.load import names
    from sslcli.config.presets import JOBS

    return [name for job in JOBS for name in names(job) if name.startswith(start)]


Job = Annotated[
    str | None, typer.Option("--job", metavar="pretrain|eval", callback=_known_job, help="What the preset is for.")
]
Name = Annotated[str, typer.Argument(help="Name of a preset or a YAML file.", autocompletion=_complete)]


@app.command("list")
def list_presets(job: Job = None, as_json: Json = False) -> None:
    """List the presets that come with ssl."""
    from sslcli.config import load

    rows: list[dict[str, str]] = []
    for kind, name in _shipped(job):
        path = load.find(kind, name)
        rows.append({"job": kind, "name": name, "title": _title(kind, path), "path": str(path)})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['job']:<8}  {row['name']:<{width}}  {row['title']}".rstrip())


@app.command()
def show(
    name: Name,
    override: Override = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say of every value which file and line, override or default it is from.")
    ] = False,
    job: Job = None,
    as_json: Json = False,
) -> None:
    """Print a preset with every value written out."""
    from sslcli.config import load, yaml_file

    loaded = load.load(job or load.job_of(name), name, override or ())
    if as_json:
        shown = {"preset": loaded.resolved, "origin": loaded.origin} if origin else loaded.resolved
        print(json.dumps(shown, indent=2))
        return
    print(yaml_file.dump(loaded.resolved, _leaf_origins(loaded.resolved, loaded.origin) if origin else {}), end="")


@app.command()
def diff(first: Name, second: Name, job: Job = None, as_json: Json = False) -> None:
    """Compare two presets, every value written out."""
    from sslcli.config import load

    sides = [load.load(job or load.job_of(name), name).resolved for name in (first, second)]
    left, right = (dict(_leaves(side)) for side in sides)
    changed = [key for key in dict.fromkeys([*left, *right]) if left.get(key, _ABSENT) != right.get(key, _ABSENT)]
    if as_json:
        only = {key: {name: side[key] for name, side in (("a", left), ("b", right)) if key in side} for key in changed}
        print(json.dumps({"a": first, "b": second, "differences": only}, indent=2))
        return
    if not changed:
        typer.echo("no difference", err=True)
        return
    rows = [("", first, second), *((key, _text(left, key), _text(right, key)) for key in changed)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, a, b in rows:
        print(f"{key:<{widths[0]}}  {a:<{widths[1]}}  {b}".rstrip())


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Presets or YAML files; all that come with ssl when absent.", autocompletion=_complete),
    ] = None,
    job: Job = None,
    as_json: Json = False,
) -> None:
    """Validate presets and list every problem with its file and line."""
    from sslcli.config import load

    rows: list[dict[str, Any]] = []
    for kind, name in [(job, name) for name in names] if names else _shipped(job):
        try:
            load.load(kind or load.job_of(name), name)
            problems: list[str] = []
        except PresetError as error:
            problems = error.message.splitlines()
            if not as_json:
                typer.echo(f"error: {error.message}", err=True)
        rows.append({"name": name, "problems": [problem.strip() for problem in problems[1:] or problems]})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{'bad' if row['problems'] else 'ok':<4}{row['name']}")
    if any(row["problems"] for row in rows):
        raise typer.Exit(EXIT_USER)


@app.command()
def schema(job: Job = None) -> None:
    """Print the JSON Schema of a job's presets (of pretraining when no job is given), for editors."""
    from sslcli.config import schema as schemas

    print(json.dumps(schemas.schema(job or "pretrain"), indent=2))


@app.command("copy")
def copy_preset(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    override: Override = None,
    job: Job = None,
) -> None:
    """Write a preset to a file of your own: every value, each with what it means."""
    from sslcli.config import load, yaml_file
    from sslcli.config.place import described
    from sslcli.config.presets import JOBS

    kind = job or load.job_of(name)
    loaded = load.load(kind, name, override or ())
    target = file / f"{loaded.path.stem}.yaml" if file.is_dir() else file
    command = "pretrain --preset" if kind == "pretrain" else f"{kind} … --preset"
    text = (
        f"# Every value of `{name}`, written out by `ssl presets copy`. Use it: ssl {command} {target}\n"
        f"{yaml_file.dump(loaded.resolved, dict(described(JOBS[kind], loaded.resolved)))}"
    )
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"`{target}` exists already", hint="name another file, or remove this one") from None
    except OSError as error:
        raise UserError(f"cannot write `{target}`: {(error.strerror or str(error)).lower()}") from None
    typer.echo(f"wrote {target}\nnext: edit it, then `ssl presets check {target}`", err=True)


def _shipped(job: str | None) -> list[tuple[str, str]]:
    """Job and name of every shipped preset."""
    from sslcli.config import load
    from sslcli.config.presets import JOBS

    return [(kind, name) for kind in ([job] if job else JOBS) for name in load.names(kind)]


def _title(job: str, path: Path) -> str:
    """What a preset says of itself, read without validating it: that would import its method."""
    from sslcli.config import load

    try:
        about = load.merge_files(job, path).data.get("about")
    except PresetError as error:
        return f"(cannot be read: {error.message})"
    return str(about.get("title", "")) if isinstance(about, dict) else ""


_ABSENT = object()


def _leaves(data: Any) -> list[tuple[str, Any]]:
    """Dotted key and value of every value; a list of plain values is one value."""
    from sslcli.config.load import every_key

    flat = {key: value for key, value in every_key(data) if not _has_keys(value)}
    return [(key, value) for key, value in flat.items() if key.rpartition(".")[0] not in flat]


def _has_keys(value: Any) -> bool:
    """Whether a value is a mapping, or a list of some."""
    inside = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict | list) and item for item in inside)


def _leaf_origins(data: Any, origin: dict[str, str]) -> dict[str, str]:
    """Who said each value; of a list of plain values, everyone who said a part of it."""
    from sslcli.config.load import every_key

    notes: dict[str, str] = {}
    for key, value in _leaves(data):
        inside = [f"{key}.{part}" for part, _ in every_key(value)]
        notes[key] = ", ".join(dict.fromkeys(origin[part] for part in (inside or [key])))
    return notes


def _text(side: dict[str, Any], key: str) -> str:
    if key not in side:
        return "-"
    value = side[key]
    return value if isinstance(value, str) else json.dumps(value)
