"""ssl doctor: is this machine ready, and if not, what would make it so?"""

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from sslcli.cli.options import Json
from sslcli.errors import EXIT_FAILURE

OLDEST_PYTHON = (3, 11)
CORE = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors", "matplotlib")
IMPORTED = ("torch", "torchvision", "timm", "sklearn")
"""Packages with compiled parts: that they are installed does not mean that they load."""
EXTRAS = ("wandb", "detectron2")
GB = 1e9


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""
    """What to do about it, where it is not ok."""


def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, devices, memory, disk; exit code 1 when something essential is broken."""
    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(listing(checks))
    broken = [check.name for check in checks if check.state == "fail"]
    print(f"broken: {', '.join(broken)}" if broken else "ready: try `ssl demo`", file=sys.stderr)
    if broken:
        raise typer.Exit(EXIT_FAILURE)


def examine() -> list[Check]:
    """Everything looked at, in the order in which a later check needs an earlier one."""
    checks = [python(sys.version_info[:3]), *(installed(name) for name in CORE)]
    loads = [loadable(name) for name in IMPORTED]
    checks += loads
    if all(check.state == "ok" for check in loads):
        checks += [device(), precision(), computes(), ranks()]
    return [
        *checks,
        cpu(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1),
        memory(_memory()),
        disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free),
        *([shared_memory(shutil.disk_usage("/dev/shm").free)] if Path("/dev/shm").is_dir() else []),
        writable(Path.cwd()),
        presets(),
        *(extra(name) for name in EXTRAS),
    ]


def listing(checks: list[Check]) -> str:
    """One line for each check, and a second for what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<4}  {'':<{width}}  fix: {check.fix}")
    return "\n".join(lines)


def python(version: tuple[int, ...]) -> Check:
    """Whether Python is new enough."""
    text = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        return Check("python", "fail", text, f"ssl needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return Check("python", "ok", f"{text} on {platform.platform()}")


def installed(package: str) -> Check:
    """Whether a package that ssl cannot do without is there."""
    from importlib import metadata

    try:
        return Check(package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Check(package, "fail", "not installed", f"`pip install {package}`")


def loadable(module: str) -> Check:
    """Whether a package with compiled parts loads."""
    name = f"import {module}"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken build raises whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Check(name, "fail", reason, "install torch and torchvision again, of versions that belong together")
    return Check(name, "ok", "loads")


def device() -> Check:
    """The GPUs that torch can use."""
    import torch

    count = torch.cuda.device_count()
    if count:
        facts = [torch.cuda.get_device_properties(number) for number in range(count)]
        return Check("gpu", "ok", ", ".join(f"{fact.name} ({fact.total_memory / GB:.0f} GB)" for fact in facts))
    if torch.version.cuda is None:
        return Check("gpu", "warn", "torch is built without CUDA: everything runs on the CPU", _torch_fix())
    return Check("gpu", "warn", f"none found (torch is built for CUDA {torch.version.cuda})", _torch_fix())


def _torch_fix() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nothing, if the machine has no GPU; otherwise install its driver"
    return "`nvidia-smi` shows the driver; install a torch build that it supports (https://pytorch.org)"


def precision() -> Check:
    """What pretraining computes in by default."""
    from sslcli.engine.machine import default_precision

    chosen = default_precision()
    return Check("precision", "ok", f"{chosen} by default" + ("" if chosen == "bf16" else "; no GPU with bf16"))


def computes() -> Check:
    """Whether a convolution can be computed and differentiated on the device that would be used."""
    import torch

    from sslcli import dist

    where = dist.device()
    try:
        images = torch.ones(2, 3, 8, 8, device=where, requires_grad=True)
        loss = torch.nn.Conv2d(3, 4, 3).to(where)(images).square().mean()
        torch.autograd.backward(loss)
        loss.item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Check("compute", "fail", f"{where}: {reason}", "install a torch build for this GPU and driver")
    return Check("compute", "ok", f"a convolution runs on {where}, {torch.get_num_threads()} CPU threads")


def ranks() -> Check:
    """Whether several processes can work together."""
    import torch

    from sslcli import dist

    there = dist.backends()
    missing = [name for name in ("gloo", *(["nccl"] if torch.cuda.is_available() else [])) if name not in there]
    if missing:
        fix = "one process still works; install another build of torch for more"
        return Check("ranks", "warn", f"torch lacks {' and '.join(missing)}", fix)
    return Check("ranks", "ok", ", ".join(there))


def cpu(cores: int) -> Check:
    """Processors this process may use."""
    return Check("cpu", "ok", f"{cores} core{'s' if cores > 1 else ''}")


def memory(bytes_free: float | None) -> Check:
    """Main memory that is free."""
    if bytes_free is None:
        return Check("memory", "ok", "size unknown")
    found = f"{bytes_free / GB:.1f} GB free"
    if bytes_free < 2 * GB:
        return Check("memory", "warn", found, "close other programs: even small images need about 2 GB")
    return Check("memory", "ok", found)


def _memory() -> float | None:
    """Bytes of memory that can still be had, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def disk(folder: Path, bytes_free: float) -> Check:
    """Room for checkpoints: a ResNet-50 run keeps about 1 GB."""
    found = f"{bytes_free / GB:.1f} GB free in `{folder}`"
    if bytes_free < 5 * GB:
        return Check("disk", "warn", found, "free some space, or put runs elsewhere with `--out DIR`")
    return Check("disk", "ok", found)


def shared_memory(bytes_free: float) -> Check:
    """Room for images on their way from loader processes: containers often have 64 MB."""
    found = f"{bytes_free / GB:.1f} GB free in `/dev/shm`"
    if bytes_free < GB:
        fix = "start the container with `--shm-size=8g` or `--ipc=host`, or use `-o data.workers=0`"
        return Check("shared memory", "warn", found, fix)
    return Check("shared memory", "ok", found)


def writable(folder: Path) -> Check:
    """Whether runs can be written where one stands."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "go to another folder, or use `--out DIR`"
        return Check("folder", "warn", f"cannot write to `{folder}`: {error.strerror}", fix)
    return Check("folder", "ok", f"`{folder}` can be written")


def presets() -> Check:
    """Whether the presets came along."""
    from sslcli.config.load import names

    count = len(names("pretrain"))
    if count == 0:
        return Check("presets", "fail", "none found", "install ssl again: its presets are missing")
    return Check("presets", "ok", f"{count} for pretraining, {len(names('eval'))} protocols")


def extra(package: str) -> Check:
    """Whether an optional package is there."""
    from importlib import metadata

    try:
        return Check(package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Check(package, "ok", "not installed (optional)")
