"""ssl verify: is what we promise true here?"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sslcli.cli.options import Override, Preset, Procs

app = typer.Typer(help="Prove promises on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Prove promises on this machine."""


@app.command("resume")
def resume(
    preset: Preset,
    procs: Procs = None,
    procs_after: Annotated[
        int | None, typer.Option("--procs-after", min=1, help="Processes after the first kill; as before when absent.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=4, help="Length of the runs in steps.")] = 12,
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often the second run is killed.")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the steps at which it is killed.")] = 0,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Kill by SIGKILL only, inside one command that starts its ranks again.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Keep both runs here.")] = None,
    override: Override = None,
) -> None:
    """Run a small copy of a preset straight and with kills, and compare parameters, optimiser, images and views."""
    from sslcli.config.load import load
    from sslcli.engine.verify import verify_resume
    from sslcli.errors import EXIT_FAILURE, UserError

    if elastic and procs_after is not None:
        raise UserError("`--elastic` keeps the number of processes", hint="leave out `--procs-after`")
    chosen = load("pretrain", preset, override or ()).preset

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory() as scratch:
        verdict = verify_resume(
            chosen,
            out or Path(scratch),
            ranks=procs or 1,
            ranks_after=procs_after,
            steps=steps,
            kills=kills,
            seed=seed,
            elastic=elastic,
            say=say,
        )
    print(f"images of every batch   {'equal' if verdict.images else 'DIFFERENT'}")
    print(f"views of every row      {'equal' if verdict.views else 'DIFFERENT'}")
    print(f"state at the end        {_state(verdict.differing)}")
    print("verdict: " + ("resume is exact" if verdict.exact else "resume is NOT exact"))
    if not verdict.exact:
        raise typer.Exit(EXIT_FAILURE)


def _state(differing: tuple[str, ...] | None) -> str:
    if differing is None:
        return "not compared: the number of ranks changed"
    return f"{len(differing)} tensors DIFFER, e.g. {differing[0]}" if differing else "bit-equal"
