"""ssl features: what a network says of images, as a table for NumPy."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sslcli.cli.options import Gpus, PartOf, Procs
from sslcli.cli.terminal import Passes
from sslcli.errors import DataError, UserError

if TYPE_CHECKING:
    from sslcli.features.weights import Weights

Target = Annotated[
    Path,
    typer.Argument(metavar="RUN|WEIGHTS", help="Run folder, checkpoint, or file of weights of ssl or another tool."),
]
Partial = Annotated[bool, typer.Option("--allow-partial", help="Accept weights that fit the network only in part.")]


def features(
    target: Target,
    data: Annotated[Path, typer.Option("--data", help="Images: a folder, a list file or an .npz.")],
    out: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    taps: Annotated[str, typer.Option("--taps", help="Places in the network, e.g. `pooled,layer3`.")] = "pooled",
    split: Annotated[
        str, typer.Option("--split", metavar="train|test", help="Which part, where `--data` has several.")
    ] = "train",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 256,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Loader processes per rank.")] = None,
    gpus: Gpus = None,
    procs: Procs = None,
    allow_partial: Partial = False,
    part: PartOf = None,
) -> None:
    """Write the features of images, their labels and numbers to an .npz file that NumPy reads."""
    from sslcli import dist
    from sslcli.data import guess_source, open_source, other_split
    from sslcli.features.compute import of_network

    wanted = [tap.strip() for tap in taps.split(",") if tap.strip()]
    if not wanted:
        raise UserError("`--taps` names no place in the network", hint="leave it out for `pooled`")
    if out.suffix != ".npz":
        raise UserError(f"`--out {out}` does not end in `.npz`", hint=f"use `--out {out.with_suffix('.npz')}`")
    config = guess_source(data)
    if _split(split) == "test":
        found = other_split(config)
        if found is None:
            raise DataError(f"no test images are known to belong to `{data}`", hint="point `--data` to them")
        config = found
    share(gpus, procs)
    with dist.joined(), Passes() as passes:
        weights = weights_of(target, allow_partial=allow_partial, part=part)
        table = of_network(
            weights.backbone, open_source(config), weights.manifest.view, wanted, what="weights", digest=weights.digest,
            batch_size=batch_size, workers=workers, progress=passes(f"{split} images"), named=True,
        )  # fmt: skip
        if table is not None:
            table.save(out)
    if table is None:
        return
    shapes = ", ".join(f"features_{tap} {table.features[tap].shape}" for tap in wanted)
    skipped = f"; {table.meta.skipped} unreadable images left out" if table.meta.skipped else ""
    print(f"{shapes}{'' if table.labels is None else ', labels'}{skipped}", file=sys.stderr)
    print(out)
    print(f"next: numpy.load({str(out)!r})['features_{wanted[0]}']", file=sys.stderr)


def share(gpus: int | None, procs: int | None) -> None:
    """Where many processes are asked for, run this command in all of them and end with its exit code."""
    from sslcli.engine.launch import launch, launched
    from sslcli.engine.machine import check_devices

    if launched():
        return
    if gpus is not None and procs is not None:
        raise UserError("`--gpus` and `--procs` exclude each other", hint="one process is started for each GPU")
    check_devices(gpus)
    if (processes := gpus or procs or 1) > 1:
        sys.exit(launch(sys.argv[1:], processes))


def _split(word: str) -> Literal["train", "test"]:
    if word not in ("train", "test"):
        raise UserError(f"`--split {word}`: there is `train` and `test`")
    return "train" if word == "train" else "test"


def weights_of(target: Path, *, allow_partial: bool, part: str | None) -> "Weights":
    """The weights that a command is pointed at; what is taken of another tool's file, and how, is said once."""
    from sslcli import dist
    from sslcli.features.weights import load, whose

    weights = load(target, allow_partial=allow_partial, part=part)
    if weights.converted is not None and dist.is_main():
        print(f"{target}: {whose(weights.converted)}, {weights.match.matched} tensors matched", file=sys.stderr)
        for note in weights.converted.notes:
            print(f"note: {note}", file=sys.stderr)
    return weights
