"""ssl eval: what is it worth?"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslcli.cli.features import Partial, Passes, Target
from sslcli.cli.methods import title
from sslcli.cli.options import Json, Override
from sslcli.config.choice import members
from sslcli.errors import PresetError, SslError, UserError

if TYPE_CHECKING:
    from sslcli.evaluate._job import Outcome, Protocol

app = typer.Typer(
    name="eval", help="Judge a backbone by a versioned protocol.", no_args_is_help=True, rich_markup_mode=None
)


def command(evaluator: str) -> Callable[..., None]:
    """The command that judges with one evaluator, by its protocol of the highest version unless another is named."""

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
            str | None, typer.Option("--preset", "-p", help="Protocol, e.g. `knn-v1`, or a YAML file.")
        ] = None,
        override: Override = None,
        seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every draw.")] = None,
        floors: Annotated[
            bool, typer.Option("--floors", help="Judge raw pixels and the untrained network too.")
        ] = False,
        allow_partial: Partial = False,
        as_json: Json = False,
    ) -> None:
        from sslcli import dist
        from sslcli.features import weights as stored

        name = preset or newest_protocol(evaluator)
        if data is not None and train is not None:
            raise UserError("`--data` and `--train` exclude each other", hint="use `--train` together with `--test`")
        with dist.joined(), Passes() as passes:
            weights = stored.load(target, allow_partial=allow_partial)
            tables = [path for path in (train, test) if path is not None and _is_table(path)]
            if tables:
                outcome = _of_tables(evaluator, name, override or [], seed, weights, train, test, floors)
            else:
                protocol = protocol_of(evaluator, name, override or [], seed, data or train, test)
                outcome = _of_images(weights, protocol, floors, passes)
        if outcome is None:
            return
        report = keep(outcome)
        if as_json:
            print(json.dumps(asdict(outcome.report), indent=2))
        else:
            print(table(outcome))
        for warning in outcome.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"report: {report}", file=sys.stderr)
        print(f"next: {_next(target, evaluator)}", file=sys.stderr)

    judge.__doc__ = title(_folder() / f"{evaluator}.py")
    return judge
