"""ssl eval: what is it worth?"""

import json
import shlex
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslcli.cli.features import Partial, Target, share, weights_of
from sslcli.cli.methods import title
from sslcli.cli.options import Gpus, Json, Override, PartOf, Procs
from sslcli.cli.terminal import Passes, Terminal
from sslcli.errors import SslError, UserError

if TYPE_CHECKING:
    from sslcli.evaluate._job import Outcome, Protocol
    from sslcli.features.table import Scores
    from sslcli.features.weights import Weights

EVALUATORS = Path(__file__).parents[1] / "evaluate"

app = typer.Typer(
    name="eval", help="Judge a backbone by a versioned protocol.", no_args_is_help=True, rich_markup_mode=None
)


def command(evaluator: str) -> Callable[..., None]:
    """The command that judges with the evaluator of this name."""

    def judge(
        target: Target,
        data: Annotated[
            Path | None, typer.Option("--data", help="Images: a folder with `train` and `val` or `test` in it.")
        ] = None,
        train: Annotated[
            Path | None, typer.Option("--train", help="Training images, or their table made by `ssl features`.")
        ] = None,
        test: Annotated[
            Path | None, typer.Option("--test", help="Test images, or their table made by `ssl features`.")
        ] = None,
        preset: Annotated[
            str | None,
            typer.Option("--preset", "-p", help="Protocol or YAML file; the evaluator's newest when absent."),
        ] = None,
        override: Override = None,
        seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every draw.")] = None,
        seeds: Annotated[
            int,
            typer.Option("--seeds", min=1, help="Draw so often, with seeds that follow each other; mean ± deviation."),
        ] = 1,
        floors: Annotated[
            bool, typer.Option("--floors", help="Judge raw pixels and the untrained network too.")
        ] = False,
        gpus: Gpus = None,
        procs: Procs = None,
        no_cache: Annotated[
            bool, typer.Option("--no-cache", help="Neither use features that are kept nor keep any.")
        ] = False,
        allow_partial: Partial = False,
        part: PartOf = None,
        as_json: Json = False,
    ) -> None:
        from sslcli import dist

        if data is not None and train is not None:
            raise UserError("`--data` and `--train` exclude each other", hint="use `--train` together with `--test`")
        tables = _tables(train, test, floors)
        images = {} if tables else {"train": data or train, "test": test}
        protocol = protocol_of(evaluator, preset or newest(evaluator), override or (), seed, images, target)
        share(gpus, procs)
        with dist.joined(), Passes() as passes:
            weights = weights_of(target, allow_partial=allow_partial, part=part)
            how = How(floors=floors, seeds=seeds, cached=not no_cache)
            outcome = _judge(weights, protocol, tables, how, passes)
        if outcome is None:
            return
        print(json.dumps(asdict(outcome.report), indent=2) if as_json else table(outcome), flush=True)
        report = keep(outcome)
        for note in outcome.notes:
            print(note, file=sys.stderr)
        for warning in outcome.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        said = {"data": data, "train": train, "test": test, "part": part}
        print(f"report: {report}\nnext: {_next(evaluator, target, said)}", file=sys.stderr)

    judge.__doc__ = title(EVALUATORS / f"{evaluator}.py")
    return judge


COMMANDS = {file.stem.replace("_", "-"): command(file.stem) for file in sorted(EVALUATORS.glob("[!_]*.py"))}
"""The command of every evaluator there is."""
SHORT = ("knn", "linear", "svm", "semi")
"""Those that may be called without `eval`."""

for _name, _judge_with in COMMANDS.items():
    app.command(_name)(_judge_with)


def newest(evaluator: str) -> str:
    """The shipped protocol that is meant where an evaluator alone is named: of its family, the highest version."""
    from sslcli.config.choice import config_of, members
    from sslcli.config.load import names

    known = evaluator in members("sslcli.evaluate")
    family = vars(config_of("sslcli.evaluate", evaluator)).get("protocol", "") if known else ""
    family = family or evaluator.replace("_", "-")
    start = f"{family}-v"
    versions = [name.removeprefix(start) for name in names("eval") if name.startswith(start)]
    numbers = [int(version) for version in versions if version.isdecimal()]
    longer = [
        f"{other.replace('_', '-')}-" for other in members("sslcli.evaluate") if other.startswith(f"{evaluator}_")
    ]
    several = [name for name in names("eval") if name.startswith(f"{family}-") and not name.startswith(tuple(longer))]
    if not numbers and several:
        raise UserError(
            f"there are several protocols for `{family}`, whose numbers cannot be compared",
            hint=f"choose one with `--preset`: {', '.join(several)}",
        )
    if not numbers:
        raise UserError(f"no protocol for `{evaluator}` comes with ssl", hint="name a file with `--preset FILE`")
    return f"{start}{max(numbers)}"


def protocol_of(
    evaluator: str,
    name: str,
    overrides: Sequence[str],
    seed: int | None,
    images: dict[str, Path | None],
    target: Path,
) -> "Protocol":
    """A protocol with what the command line changes about it; an error names the command for the same target."""
    from sslcli.config.load import load
    from sslcli.data import guess_source
    from sslcli.evaluate._job import Protocol

    flags: dict[str, tuple[Any, str]] = {
        part: (guess_source(path).model_dump(mode="json"), f"--{part}")
        for part, path in images.items()
        if path is not None
    }
    if seed is not None:
        flags["seed"] = (seed, "--seed")
    frozen, loaded = load("eval", name), load("eval", name, overrides, flags)
    if loaded.preset.evaluator.name != evaluator:
        wanted = loaded.preset.evaluator.name.replace("_", "-")
        command = shlex.join(["ssl", "eval", wanted, str(target), "--preset", name])
        raise UserError(f"protocol `{name}` is not for this evaluator", hint=f"use `{command}`")
    return Protocol(Path(name).stem if name.endswith((".yaml", ".yml")) else name, frozen.preset, loaded.preset)


def keep(outcome: "Outcome") -> Path:
    """Write the report into the run folder, or beside the weights; the file is returned."""
    from sslcli.runs import ledger

    try:
        return ledger.append(outcome.folder, outcome.report)
    except OSError as error:
        raise SslError(
            f"cannot write a report to `{outcome.folder}`: {error.strerror or error}",
            hint="make the folder writeable, or copy the weights to one that is",
        ) from error


def table(outcome: "Outcome") -> str:
    """Metrics as rows, what was judged as columns."""
    columns = dict(reversed(outcome.columns.items()))
    protocol = outcome.report.protocol
    width = max(map(len, (protocol, *outcome.report.metrics)))
    lines = [f"{protocol:<{width}}" + "".join(f"  {name:>12}" for name in columns)]
    for metric in outcome.report.metrics:
        cells = "".join(f"  {_cell(scores, metric):>12}" for scores in columns.values())
        lines.append(f"{metric:<{width}}{cells}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class How:
    """How an evaluation is carried out, beside its protocol."""

    floors: bool = False
    seeds: int = 1
    cached: bool = True


def _cell(scores: "Scores", metric: str) -> str:
    spread = f" ± {scores.spread[metric]:.2f}" if metric in scores.spread else ""
    return f"{scores.metrics[metric]:.2f}{spread} %"


def _judge(
    weights: "Weights", protocol: "Protocol", tables: Sequence[Path], how: How, passes: Passes
) -> "Outcome | None":
    from sslcli.config.supervised import TrainedConfig
    from sslcli.evaluate import _job
    from sslcli.features.table import FeatureTable

    if isinstance(protocol.preset.evaluator, TrainedConfig):
        return _train(weights, protocol, tables, how, passes)
    if not tables:
        return _job.evaluate(weights, protocol, floors=how.floors, passes=passes, seeds=how.seeds, cached=how.cached)
    train, test = (FeatureTable.load(path) for path in tables)
    return _job.evaluate_tables(weights, protocol, train, test, passes=passes, seeds=how.seeds)


def _train(
    weights: "Weights", protocol: "Protocol", tables: Sequence[Path], how: How, passes: Passes
) -> "Outcome | None":
    from sslcli.engine.launch import last_words
    from sslcli.evaluate import _trained
    from sslcli.runs.curves import draw

    if tables:
        raise UserError(
            "this evaluation trains on images, not on tables of features",
            hint="give the images, or use `ssl eval linear-cached`",
        )
    if how.floors:
        raise UserError("`--floors` is for evaluations of stored features", hint="use it with knn or linear-cached")

    def after_training(title: str) -> "Callable[[int, int], None] | None":
        terminal.pause()
        return passes(title)

    with last_words(), Terminal() as terminal:
        return _trained.evaluate(weights, protocol, seeds=how.seeds, passes=after_training, watcher=terminal, draw=draw)


def _tables(train: Path | None, test: Path | None, floors: bool) -> list[Path]:
    """The tables of features among what was named for training and test: both, or none."""
    found = [path for path in (train, test) if path is not None and _is_table(path)]
    if len(found) == 1:
        raise UserError(
            f"`{found[0]}` holds features, the other side does not",
            hint="give `--train` and `--test` both as files of `ssl features`, or both as images",
        )
    if found and floors:
        raise UserError("`--floors` needs images, not tables of features", hint="leave it out, or give the images")
    return found


def _is_table(path: Path) -> bool:
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"meta.npy", "index.npy"} <= set(archive.namelist())


def _next(evaluator: str, target: Path, said: Mapping[str, object]) -> str:
    if evaluator == "knn":  # on the same images: the weights may know none, or none with labels
        options = [f"--{name} {shlex.quote(str(value))}" for name, value in said.items() if value is not None]
        return " ".join(["ssl eval linear-cached", shlex.quote(str(target)), *options])
    return f"ssl runs show {target}" if target.is_dir() else f"ssl features {target} --data DIR --out FILE.npz"
