"""ssl bench: how fast is each stage of a preset on this machine, and which one bounds the run?"""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sslcli.cli.options import DataDir, Gpus, Json, Override, Preset
from sslcli.cli.pretrain import image_flags

if TYPE_CHECKING:
    from sslcli.engine.bench import Found

MEANING = {
    "loader": "read, decode, crop",
    "views": "colours, on the device",
    "step": "forward, backward, update",
    "run": "all together",
}


def bench(
    stage: Annotated[
        Literal["loader", "views", "step", "run"],
        typer.Argument(help="What to time; `run` times every stage alone and then all together."),
    ],
    preset: Preset,
    data: DataDir = None,
    gpus: Gpus = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="How long each stage is timed.")] = 5.0,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Time the stages of a preset on this machine; nothing is written."""
    from sslcli.config.load import load
    from sslcli.engine import bench as job
    from sslcli.engine.machine import check_devices

    loaded = load("pretrain", preset, override or (), image_flags(data))
    check_devices(gpus)
    found = job.bench(
        loaded.preset,
        job.Stage(stage),
        seconds=seconds,
        told=lambda each: print(f"timing {each}: {MEANING[each]} …", file=sys.stderr),
    )
    if as_json:
        print(json.dumps(_data(found, preset), indent=2))
        return
    for each, rate in found.rates.items():
        print(f"{each:<7} {rate:>10,.1f} images/s   {MEANING[each]}")
    if found.of_the_floor is not None:
        print(f"the whole run makes {100 * found.of_the_floor:.0f} % of what the step alone makes", file=sys.stderr)
        print(job.advice(found), file=sys.stderr)


def _data(found: "Found", preset: str) -> dict[str, object]:
    from sslcli.engine.bench import advice

    return {
        "preset": preset,
        "device": found.device,
        "batch_size": found.preset.data.batch_size,
        "workers": found.preset.data.workers,
        "views": found.preset.run.views,
        "images_per_second": {stage.value: round(rate, 1) for stage, rate in found.rates.items()},
        "run_over_step": None if found.of_the_floor is None else round(found.of_the_floor, 3),
        "bound": found.bound and found.bound.value,
        "advice": advice(found),
    }
