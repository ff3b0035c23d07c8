"""ssl pretrain, ssl resume: from a folder of images to a run folder with a backbone in it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sslcli.cli.options import DataDir, Gpus, Override, PartOf, Preset, Procs
from sslcli.cli.terminal import Terminal
from sslcli.errors import UserError

if TYPE_CHECKING:
    from sslcli.config.presets import PretrainPreset
    from sslcli.contracts import Method

    Start = Callable[[Method[Any]], str]

Rendezvous = Annotated[str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Where several machines meet.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines; start the same command on each.")]
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", min=0, help="How often all ranks start again after a process died.")
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm", metavar="KEY=VALUE,…", help="Submit to SLURM, e.g. `partition=gpu,nodes=2,gpus=8,time=24:00:00`."
    ),
]


@dataclass(frozen=True, slots=True)
class Machines:
    """Where a job runs, as asked for."""

    gpus: int | None
    procs: int | None
    nodes: int
    rdzv: str | None
    max_restarts: int
    slurm: Sequence[str]
    dry_run: bool = False


def pretrain(
    preset: Preset,
    data: DataDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; `runs/<preset>` when absent.")] = None,
    gpus: Gpus = None,
    procs: Procs = None,
    nodes: Nodes = 1,
    rdzv: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    slurm: Slurm = None,
    override: Override = None,
    resume: Annotated[
        str, typer.Option("--resume", metavar="auto|never|PATH", help="Continue what `--out` holds, or not.")
    ] = "auto",
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            metavar="FILE|RUN",
            help="Weights to begin with, of any tool: of a run of the same method all, otherwise the backbone's.",
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="With `--init-from`: take what fits, leave the rest as it starts.")
    ] = False,
    part: PartOf = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every draw of the run.")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Refuse non-deterministic kernels.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check preset, data and machine with two real steps, or show the SLURM script; write nothing.",
        ),
    ] = False,
) -> None:
    """Pretrain a backbone on images; labels are not needed.

    The same command continues an interrupted run.
    """
    from sslcli.config.load import load

    _quiet()
    flags = image_flags(data)
    if seed is not None:
        flags["seed"] = (seed, "--seed")
    if deterministic:
        flags["run.deterministic"] = (True, "--deterministic")
    loaded = load("pretrain", preset, override or (), flags)
    folder = out or Path("runs") / Path(preset).stem
    if dry_run and not slurm:
        _dry_run(loaded.preset, gpus)
        return
    how: Literal["auto", "never"] | Path = (
        "auto" if resume == "auto" else "never" if resume == "never" else Path(resume)
    )
    start = None if init_from is None else _begins_with(init_from, allow_partial, part)
    _run(loaded.preset, folder, how, start, Machines(gpus, procs, nodes, rdzv, max_restarts, slurm or (), dry_run))


def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    gpus: Gpus = None,
    procs: Procs = None,
    nodes: Nodes = 1,
    rdzv: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    slurm: Slurm = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With `--slurm`: show the script; write nothing.")] = False,
) -> None:
    """Continue a run from its newest checkpoint, with the preset it was started with."""
    _quiet()
    from sslcli.config.load import from_data
    from sslcli.engine.checkpoint import newest_whole

    found = newest_whole(run)
    if found is None:
        raise UserError(f"no checkpoint in `{run}`", hint="start the run with `ssl pretrain --preset … --out …`")
    preset: Any = from_data("pretrain", found[1]["preset"])
    if dry_run and not slurm:
        _dry_run(preset, gpus)
        return
    _run(preset, run, "auto", None, Machines(gpus, procs, nodes, rdzv, max_restarts, slurm or (), dry_run))


def _quiet() -> None:
    """Keep torch's C++ side from commenting on every lost connection; it asks only once, when it is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


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
    start: "Start | None",
    at: Machines,
) -> None:
    from sslcli.engine.launch import last_words, launch, launched, restarted
    from sslcli.engine.machine import check_devices

    processes = _processes(at)
    if restarted():
        from sslcli.engine.resume import after_restart

        resume = after_restart(folder, resume)
    if not launched():
        if at.slurm:
            _submit(preset, folder, resume, at)
            return
        check_devices(at.gpus)
        if processes * at.nodes > 1 or at.max_restarts:
            _check_before_launch(preset, folder, resume, processes * at.nodes)
            sys.exit(launch(sys.argv[1:], processes, nodes=at.nodes, rendezvous=at.rdzv, max_restarts=at.max_restarts))

    from sslcli import dist
    from sslcli.engine import pretrain as job
    from sslcli.runs.curves import draw

    with dist.joined(), last_words(), Terminal() as terminal:
        outcome = job.pretrain(preset, folder, resume=resume, start=start, watcher=terminal, draw=draw)
        if dist.is_main():
            _finish(outcome.folder, outcome.fresh, terminal)


def _processes(at: Machines) -> int:
    """How many processes to start on this machine; where srun has started them, this one takes its place among them."""
    from sslcli.engine.srun import srun_environment, srun_tasks

    if at.gpus is not None and at.procs is not None:
        raise UserError("`--gpus` and `--procs` exclude each other", hint="one process is started for each GPU")
    if at.slurm and at.rdzv:
        raise UserError("`--slurm` finds a meeting place by itself", hint="leave out `--rdzv`")
    if at.nodes > 1 and not at.rdzv and not at.slurm:
        raise UserError(
            f"`--nodes {at.nodes}` needs a place to meet", hint="add `--rdzv HOST:PORT`, the same on every machine"
        )
    processes = at.gpus or at.procs or 1
    tasks = srun_tasks(os.environ)
    if tasks > 1 and at.nodes == 1 and not at.slurm:
        if processes > 1:
            raise UserError(
                f"srun has started {tasks} processes, and each would start {processes} more",
                hint="leave out `--gpus` and `--procs`; or start one task per machine with `--nodes --rdzv HOST:PORT`",
            )
        os.environ.update(srun_environment(os.environ))
    return processes


def _submit(preset: "PretrainPreset", folder: Path, resume: Literal["auto", "never"] | Path, at: Machines) -> None:
    from sslcli.engine import slurm

    wanted = slurm.parse(at.slurm, gpus=at.gpus, nodes=at.nodes)
    words = slurm.command(sys.argv[1:], wanted)
    if at.dry_run:
        print(slurm.script(words, wanted, folder), end="")
        print("nothing was submitted; leave out `--dry-run` to do so", file=sys.stderr)
        return
    slurm.check_here()
    _check_before_launch(preset, folder, resume, (wanted.gpus or at.procs or 1) * wanted.nodes)
    job = slurm.submit(words, wanted, folder)
    print(f"submitted: job {job.id}", file=sys.stderr)
    print(f"  script    {job.script}\n  output    {job.output}", file=sys.stderr)
    print(f"next: squeue -j {job.id}    ssl runs watch {folder}    scancel {job.id}", file=sys.stderr)


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


def _begins_with(what: str, allow_partial: bool, part: str | None) -> "Start":
    def start(method: "Method[Any]") -> str:
        from sslcli.features.weights import begin_with

        return begin_with(method, what, allow_partial=allow_partial, part=part)

    return start


def _dry_run(preset: "PretrainPreset", gpus: int | None) -> None:
    from sslcli.engine.machine import check_devices
    from sslcli.engine.plan import dry_run

    check_devices(gpus)
    for name, value in dry_run(preset):
        print(f"{name:<14} {value}" if name else value)
    print("nothing was written; leave out `--dry-run` to start", file=sys.stderr)


def _finish(folder: Path, fresh: bool, terminal: Terminal) -> None:
    from sslcli.features import weights
    from sslcli.runs.folder import Run

    target = folder / "backbone.safetensors"
    if fresh or not target.exists():
        weights.extract(folder, target)
    state = "finished" if fresh else "already finished"
    terminal.say(f"{state}: {folder}")
    terminal.say(f"  backbone  {target}\n  curves    {folder / 'curves.png'}\n  views     {folder / 'views.png'}")
    terminal.say(f"next: {Run(folder).evaluation}")
