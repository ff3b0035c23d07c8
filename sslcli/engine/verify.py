"""Proof of exact resume: the same small run once straight and once with kills, compared bit by bit.

Every run is the real command in real processes; a kill is SIGKILL of one rank or SIGTERM to the whole job. With
`elastic`, all kills are SIGKILL, and the one command starts its ranks again by itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli import seeds
from sslcli.config.load import from_data
from sslcli.config.presets import PretrainPreset, as_data
from sslcli.config.views import Masked
from sslcli.config.yaml_file import dump
from sslcli.engine import checkpoint
from sslcli.errors import EXIT_RESUMABLE, SslError

SIDE = 32
"""Size of the images and views of a small copy, in pixels."""

_OF_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the two runs have in common."""

    kills: tuple[str, ...]
    """What was done to the second run."""
    images: bool
    """Whether every global batch held the same images in the same order."""
    views: bool
    """Whether every row showed the same pixels."""
    differing: tuple[str, ...] | None
    """Names of tensors that are not bit-equal at the end; None where the number of ranks changed in between."""

    @property
    def exact(self) -> bool:
        """Whether nothing was lost."""
        return self.images and self.views and not self.differing


def small_copy(preset: PretrainPreset, *, steps: int, ranks: int) -> PretrainPreset:
    """The same method, backbone, optimiser and schedule on small drawn pictures, for a few steps.

    What cannot stay: images and views become 32 px, or the most below that whole patches fill, the batch 16 per rank
    and slice; groups of batch norm, numbers of negatives and of clusters are cut down to fit.
    """
    data, side = as_data(preset), _side(preset)
    share = 16
    accumulate = data["run"]["accumulate"]
    batch = share * ranks * accumulate
    data["data"] = {
        "source": {"name": "coloured_digits", "count": 6 * batch, "size": side},
        "batch_size": batch,
        "workers": 0,
    }
    data["views"] = preset.views.shrunk(side).model_dump(mode="json")
    limits = {"negatives": share, "clusters": share, "components": share, "pool": 2 * share, "min_cluster": 2}
    for size, limit in limits.items():
        if isinstance(data["method"].get(size), int):
            data["method"][size] = min(data["method"][size], limit)
    if "image_size" in data["backbone"]:
        data["backbone"]["image_size"] = side
    run = data["run"]
    norm = run["batch_norm"]
    run.update(
        epochs=None,
        steps=steps,
        precision="fp32",
        views="fast",
        log_every=1,
        tensorboard=False,
        batch_norm=norm if norm == "global" else min(norm, share),
        checkpoints={"every_steps": 3},
    )
    made: PretrainPreset = from_data("pretrain", data)
    return made


def _side(preset: PretrainPreset) -> int:
    """Side of a small copy's images: 32 px, or the most below that whole patches fill; one patch, if that is more."""
    patch = getattr(preset.backbone, "patch", preset.views.patch if isinstance(preset.views, Masked) else 1)
    return max(1, SIDE // patch) * patch


def verify_resume(
    preset: PretrainPreset,
    folder: Path,
    *,
    ranks: int = 1,
    ranks_after: int | None = None,
    steps: int = 12,
    kills: int = 2,
    seed: int = 0,
    elastic: bool = False,
    say: Callable[[str], None] = print,
) -> Verdict:
    """Run a small copy of a preset straight, and again with kills at random steps, and compare.

    Args:
        preset: the experiment whose resume is in question.
        folder: where both runs go.
        ranks: processes of the straight run and of the other until its first kill.
        ranks_after: processes of the other from then on; `ranks` when absent.
        steps: length of the runs.
        kills: how often the second run is killed: in turn SIGKILL of one rank, SIGTERM to all.
        seed: which steps are chosen.
        elastic: only SIGKILL, all within one command that has `--max-restarts`.
        say: who is told what happens.

    Raises:
        SslError: a run failed for another reason than the kill.
    """
    after = ranks_after or ranks
    small = small_copy(preset, steps=steps, ranks=max(ranks, after))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.yaml"
    file.write_text(dump(as_data(small)), encoding="utf-8")
    say(f"straight: {steps} steps on {ranks} rank(s)")
    _run(_command(file, folder / "straight", ranks), folder / "straight.trace")
    steps_killed = sorted(1 + int(step) for step in seeds.permutation(steps - 2, seeds.seed_of(seed, "kill"))[:kills])
    victims = [
        int(seeds.permuted(number % count, count, seeds.seed_of(seed, "victim")))
        for number, count in enumerate([ranks, *[after] * (len(steps_killed) - 1)])
    ]
    done = (_killed_within if elastic else _killed_between)(
        file, folder / "killed", (ranks, after), list(zip(steps_killed, victims, strict=True)), say
    )
    straight, killed = _trace(folder / "straight.trace"), _trace(folder / "killed.trace")
    same = after == ranks
    return Verdict(
        kills=tuple(done),
        images={step: note["index"] for step, note in straight.items()}
        == {step: note["index"] for step, note in killed.items()},
        views={step: note["views"] for step, note in straight.items()}
        == {step: note["views"] for step, note in killed.items()},
        differing=tuple(_differing(folder / "straight", folder / "killed")) if same else None,
    )


def _killed_between(
    preset: Path, out: Path, ranks: tuple[int, int], plan: Sequence[tuple[int, int]], say: Callable[[str], None]
) -> list[str]:
    """One command after another, each but the last killed at its step; says what was done."""
    done: list[str] = []
    trace, (first, after) = out.with_suffix(".trace"), ranks
    for number, (step, victim) in enumerate(plan):
        process = _start(_command(preset, out, after if number else first), trace)
        term = number % 2 == 1
        reached = _wait_for(process, trace, step, victim, known=frozenset())
        if reached is not None:
            os.kill(process.pid if term else reached, signal.SIGTERM if term else signal.SIGKILL)
        _, errors = process.communicate()
        if term and process.returncode not in (0, EXIT_RESUMABLE):
            raise SslError(f"after SIGTERM the run ended with exit code {process.returncode}: {_last(errors)}")
        what = f"SIGTERM to the job at step {step}" if term else f"SIGKILL of rank {victim} at step {step}"
        done.append(f"nothing: the run ended before step {step}" if process.returncode == 0 else what)
        say(f"killed:   {done[-1]}")
    _run(_command(preset, out, after), trace)
    return done


def _killed_within(
    preset: Path, out: Path, ranks: tuple[int, int], plan: Sequence[tuple[int, int]], say: Callable[[str], None]
) -> list[str]:
    """One command, whose ranks are killed in turn and start again by themselves; says what was done."""
    done: list[str] = []
    trace = out.with_suffix(".trace")
    process = _start([*_command(preset, out, ranks[0]), "--max-restarts", str(len(plan))], trace)
    known: frozenset[int] = frozenset()
    for step, victim in plan:
        reached = _wait_for(process, trace, step, victim, known)
        if reached is None:
            break
        known |= {note["pid"] for file in trace.parent.glob(f"{trace.name}.*") for note in _lines(file)}
        os.kill(reached, signal.SIGKILL)
        done.append(f"SIGKILL of rank {victim} at step {step}")
        say(f"killed:   {done[-1]}")
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SslError(f"the command ended with exit code {process.returncode}: {_last(errors)}")
    restarts = [line for line in errors.splitlines() if line.startswith("restarted (")]
    for line in restarts:
        say(f"          {line}")
    if len(restarts) != len(done):
        raise SslError(f"{len(done)} kills, but {len(restarts)} restarts in the log")
    return done


def _wait_for(process: "subprocess.Popen[str]", trace: Path, step: int, rank: int, known: frozenset[int]) -> int | None:
    """Process id of a rank once it has reached a step, earlier processes aside; None if the run ends before."""
    while process.poll() is None:
        for note in _lines(Path(f"{trace}.{rank}")):
            if note["step"] >= step and note["pid"] not in known and _alive(note["pid"]):
                return int(note["pid"])
        time.sleep(0.01)
    return None


def _command(preset: Path, out: Path, ranks: int) -> list[str]:
    words = [sys.executable, "-m", "sslcli", "pretrain", "--preset", str(preset), "--out", str(out)]
    return words if ranks == 1 else [*words, "--procs", str(ranks)]


def _start(command: Sequence[str], trace: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "SSL_TRACE": str(trace), "OMP_NUM_THREADS": "1"}
    for name in list(environment):
        if name in _OF_A_LAUNCHER or name.startswith(("TORCHELASTIC_", "SLURM_")):
            del environment[name]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _run(command: Sequence[str], trace: Path) -> None:
    process = _start(command, trace)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SslError(f"a run of the proof failed with exit code {process.returncode}: {_last(errors)}")


def _trace(path: Path) -> dict[int, dict[str, Any]]:
    """By step, the images and views of its global batch, as they went into the run that lasted."""
    ranks = sorted(path.parent.glob(f"{path.name}.*"), key=lambda p: int(p.suffix[1:]))
    whole: dict[int, dict[str, Any]] = {}
    # A rank that only took part for a while left lines that a later, smaller job took again alone: the last writer of
    # a step is the job that kept it, recognised by the order of processes in rank 0's file.
    per_rank = [list(_lines(file)) for file in ranks]
    for note in per_rank[0]:
        whole[note["step"]] = {"index": list(note["index"]), "views": list(note["views"])}
    for notes in per_rank[1:]:
        last = {note["step"]: note for note in notes}
        for step, note in last.items():
            if step in whole and len(whole[step]["index"]) < _batch(per_rank):
                whole[step]["index"] += note["index"]
                whole[step]["views"] += note["views"]
    return whole


def _batch(per_rank: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """Rows of a global batch: what all ranks of the first step held together."""
    return sum(len(notes[0]["index"]) for notes in per_rank if notes and notes[0]["step"] == 0)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # a line that is being written


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _differing(straight: Path, killed: Path) -> Iterator[str]:
    a, b = checkpoint.read(checkpoint.newest(straight)), checkpoint.read(checkpoint.newest(killed))
    for part in ("method", "optimizer", "scaler", "progress"):
        yield from _unequal(a[part], b[part], part)


def _unequal(a: Any, b: Any, name: str) -> Iterator[str]:
    if isinstance(a, Mapping):
        for key in a:
            yield from _unequal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        for key, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(x, y, f"{name}.{key}")
    elif not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
        yield name


def _last(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or ["no output"])[-1]
