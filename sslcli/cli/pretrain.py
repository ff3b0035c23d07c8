"""ssl pretrain, ssl resume: from a folder of images to a run folder with a backbone in it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sslcli.cli.options import DataDir, Gpus, Override, Preset, Procs
from sslcli.cli.watch import Terminal
from sslcli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sslcli.config.presets import PretrainPreset

Rendezvous = Annotated[str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Where several machines meet.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines; start the same command on each.")]


def pretrain(
    preset: Preset,
    data: DataDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; `runs/<preset>` when absent.")] = None,
    gpus: Gpus = None,
    procs: Procs = None,
    nodes: Nodes = 1,
    rdzv: Rendezvous = None,
    override: Override = None,
    resume: Annotated[
        str, typer.Option("--resume", metavar="auto|never|PATH", help="Continue what `--out` holds, or not.")
    ] = "auto",
    init_from: Annotated[
        str | None, typer.Option("--init-from", metavar="FILE|RUN", help="Weights the backbone begins with.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every draw of the run.")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Refuse non-deterministic kernels.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check preset, data and machine with two real steps; write nothing.")
    ] = False,
) -> None:
    """Pretrain a backbone on images; labels are not needed.

    The same command continues an interrupted run.
    """
    from sslcli.config.load import load

    flags = image_flags(data)
    if seed is not None:
        flags["seed"] = (seed, "--seed")
    if deterministic:
        flags["run.deterministic"] = (True, "--deterministic")
    loaded = load("pretrain", preset, override or (), flags)
    folder = out or Path("runs") / Path(preset).stem
    if dry_run:
        _dry_run(loaded.preset, gpus)
        return
    how: Literal["auto", "never"] | Path = (
        "auto" if resume == "auto" else "never" if resume == "never" else Path(resume)
    )
    _run(loaded.preset, folder, how, init_from, gpus, procs, nodes, rdzv)


def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    gpus: Gpus = None,
    procs: Procs = None,
    nodes: Nodes = 1,
    rdzv: Rendezvous = None,
) -> None:
    """Continue a run from its newest checkpoint, with the preset it was started with."""
    from sslcli.config.load import from_data
    from sslcli.engine.checkpoint import newest_whole

    found = newest_whole(run)
    if found is None:
        raise UserError(f"no checkpoint in `{run}`", hint="start the run with `ssl pretrain --preset … --out …`")
    preset: Any = from_data("pretrain", found[1]["preset"])
    _run(preset, run, "auto", None, gpus, procs, nodes, rdzv)


def image_flags(data: Path | None) -> dict[str, tuple[Any, str]]:
    """What `--data` says about the preset: key, value, and where it was said."""
    if data is None:
        return {}
    from sslcli.data import guess_source

    return {"data.source": (guess_source(data).model_dump(mode="json"), "--data")}


def _run(
    preset: "PretrainPreset",
    folder: Path,
    resume: Literal["auto", "never"] | Path,
    init_from: str | None,
    gpus: int | None,
    procs: int | None,
    nodes: int,
    rdzv: str | None,
) -> None:
    from sslcli.engine.launch import launch, launched
    from sslcli.engine.machine import check_devices

    processes = _processes(gpus, procs, nodes, rdzv)
    if not launched():
        check_devices(gpus)
        if processes * nodes > 1:
            _check_before_launch(preset, folder, resume, processes * nodes)
            sys.exit(launch(sys.argv[1:], processes, nodes=nodes, rendezvous=rdzv))

    from sslcli import dist
    from sslcli.engine import pretrain as job
    from sslcli.runs.curves import draw

    with dist.joined(), Terminal() as terminal:
        start = _start_weights(init_from)
        outcome = job.pretrain(preset, folder, resume=resume, start=start, watcher=terminal, draw=draw)
        if dist.is_main():
            _finish(outcome.folder, outcome.fresh, terminal)


def _processes(gpus: int | None, procs: int | None, nodes: int, rdzv: str | None) -> int:
    if gpus is not None and procs is not None:
        raise UserError("`--gpus` and `--procs` exclude each other", hint="one process is started for each GPU")
    if nodes > 1 and rdzv is None:
        raise UserError(
            f"`--nodes {nodes}` needs a place to meet", hint="add `--rdzv HOST:PORT`, the same on every machine"
        )
    return gpus or procs or 1


def _check_before_launch(
    preset: "PretrainPreset", folder: Path, resume: Literal["auto", "never"] | Path, ranks: int
) -> None:
    """Find a user's mistake before many processes do."""
    from sslcli.data import open_source
    from sslcli.engine.plan import check_batch
    from sslcli.engine.resume import found_in, same_experiment, writable

    found = found_in(folder, resume)
    source = open_source(preset.data.source)
    writable(folder)
    if found is not None:
        same_experiment(found[1], preset, source, folder)
    check_batch(preset, len(source), ranks)


def _start_weights(init_from: str | None) -> "dict[str, Tensor] | None":
    if init_from is None:
        return None
    from sslcli.features import weights

    loaded = weights.load(init_from)
    return dict(loaded.backbone.trunk.state_dict())


def _dry_run(preset: "PretrainPreset", gpus: int | None) -> None:
    from sslcli.engine.machine import check_devices
    from sslcli.engine.plan import dry_run

    check_devices(gpus)
    for name, value in dry_run(preset):
        print(f"{name:<14} {value}")
    print("nothing was written; leave out `--dry-run` to start", file=sys.stderr)


def _finish(folder: Path, fresh: bool, terminal: Terminal) -> None:
    from sslcli.features import weights

    target = folder / "backbone.safetensors"
    if fresh or not target.exists():
        weights.extract(folder, target)
    state = "finished" if fresh else "already finished"
    terminal.say(f"{state}: {folder}")
    terminal.say(f"  backbone  {target}\n  curves    {folder / 'curves.png'}\n  views     {folder / 'views.png'}")
    terminal.say(f"next: ssl eval knn {folder}")
