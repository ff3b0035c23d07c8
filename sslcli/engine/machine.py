"""What a preset leaves to the machine: decided once, printed, and written into the run."""

import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from sslcli import __version__, dist
from sslcli.config.presets import PretrainPreset
from sslcli.errors import UserError

SMALL_SIDE = 96
"""Images up to this side are augmented in whole batches even when they are cropped on the CPU."""


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def default_precision() -> Literal["fp32", "bf16"]:
    """bf16 on a GPU that computes in it, fp32 elsewhere."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def default_workers(resident: bool) -> int:
    """Loader processes per rank: none for images in memory, otherwise the machine's cores shared among its ranks."""
    if resident:
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(1, cores() // here))


def check_devices(gpus: int | None) -> None:
    """Refuse more GPUs than there are.

    Raises:
        UserError: the machine has fewer GPUs than asked for.
    """
    if gpus is None:
        return
    have = torch.cuda.device_count()
    if have < gpus:
        here = "no GPU" if have == 0 else f"{have} GPU{'s' if have > 1 else ''}"
        raise UserError(
            f"`--gpus {gpus}`: this machine has {here}",
            hint="leave `--gpus` out to train on the CPU, or use `--procs N` for N CPU processes"
            if have == 0
            else f"use `--gpus {have}`",
        )


def resolved(preset: PretrainPreset, *, resident: bool, reading: Literal["fast", "reference"]) -> PretrainPreset:
    """The preset with everything decided: nothing is left to the machine."""
    run = preset.run.model_copy(
        update={"precision": preset.run.precision or default_precision(), "views": preset.run.views or reading}
    )
    workers = default_workers(resident) if preset.data.workers is None else preset.data.workers
    return preset.model_copy(update={"run": run, "data": preset.data.model_copy(update={"workers": workers})})


def environment() -> dict[str, Any]:
    """Versions, devices and place of a run, for `env.json`."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow", "pydantic", "scikit-learn")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ssl": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "ranks": dist.world(),
        "git": _git_commit(),
    }


def command() -> str:
    """The command line as typed."""
    return shlex.join(["ssl", *sys.argv[1:]])


def _git_commit() -> str | None:
    """Commit of the folder the job was started from, if it is a git checkout."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path.cwd(), check=False)
    return found.stdout.strip() or None
