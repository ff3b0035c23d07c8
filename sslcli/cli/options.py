"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[str, typer.Option("--preset", "-p", help="Name of a preset (`ssl presets list`) or a YAML file.")]
Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--set", metavar="KEY=VALUE", help="Override one key of the preset; may be repeated."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data", help="Images: a folder (labels not needed), a list file or an .npz.")
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs per machine: one process each.")]
Procs = Annotated[int | None, typer.Option("--procs", min=1, help="CPU processes per machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout.")]
PartOf = Annotated[
    str | None,
    typer.Option("--part", metavar="student|teacher", help="Which network, where there are two; else the usual one."),
]
Layout = Annotated[
    str | None, typer.Option("--layout", metavar="NAME", help="Whose file it is, where that cannot be told.")
]
