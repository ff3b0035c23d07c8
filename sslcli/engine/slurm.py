"""Submitting the same command to a SLURM cluster: one launcher per machine, back in the queue before time runs out.

A job has one task per machine, which runs the command as it was typed with `--gpus` and a place to meet added, so that
`--max-restarts` works inside the job. SLURM warns of the time limit by SIGUSR1; the task hands that on, the ranks write
a checkpoint and end with exit code 75, and submitit puts the job back into the queue, where it continues.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from sslcli.config.spelling import nearest
from sslcli.engine.srun import first_host, port_of
from sslcli.errors import EXIT_RESUMABLE, UserError

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission
    from submitit.slurm.slurm import SlurmExecutor

HANDED_ON = ("partition", "account", "qos", "constraint", "reservation", "exclude", "mem")
"""Keys that mean to sbatch what they mean here."""
KEYS = ("nodes", "gpus", "cpus", "time", "name", "lead", *HANDED_ON)
REQUEUES = 10_000
"""How often a job may run into its time limit: as often as it takes."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job asks of the cluster."""

    minutes: int
    """Time limit of one go."""
    nodes: int = 1
    gpus: int | None = None
    """GPUs of each machine."""
    gpu_type: str | None = None
    cpus: int | None = None
    """Processors of each machine."""
    name: str | None = None
    lead: int = 120
    """Seconds between the warning and the time limit: for one step and the checkpoint."""
    more: dict[str, str] = field(default_factory=dict)
    """What is handed on to sbatch as it is."""


def parse(said: Sequence[str], *, gpus: int | None = None, nodes: int = 1) -> Wanted:
    """Read `partition=gpu,nodes=2,gpus=8,time=24:00:00`; `gpus` and `nodes` are what the command's own options say.

    Raises:
        UserError: a key is unknown, given twice or misses its value; a value is malformed; there is no `time`.
    """
    pairs: dict[str, str] = {}
    for part in ",".join(said).split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in KEYS:
            close = nearest(key, KEYS)
            advice = f"; did you mean `{close}`?" if close else ""
            raise UserError(f"`--slurm {part}`: no key `{key}`{advice}", hint=f"keys are {', '.join(KEYS)}")
        if not equals or not value:
            raise UserError(f"`--slurm {part}`: `{key}` has no value", hint=f"write `{key}=…`")
        if key in pairs:
            raise UserError(f"`--slurm`: `{key}` is given twice", hint="leave one of them out")
        pairs[key] = value
    if "time" not in pairs:
        raise UserError("`--slurm` needs a time limit", hint="add e.g. `time=24:00:00`; the job continues after it")
    kind, _, count = pairs.get("gpus", str(gpus or "")).rpartition(":")
    wanted = Wanted(
        minutes=minutes(pairs["time"]),
        nodes=_number("nodes", pairs.get("nodes", str(nodes))),
        gpus=_number("gpus", count) if count else None,
        gpu_type=kind or None,
        cpus=_number("cpus", pairs["cpus"]) if "cpus" in pairs else None,
        name=pairs.get("name"),
        lead=_number("lead", pairs.get("lead", "120")),
        more={key: value for key, value in pairs.items() if key in HANDED_ON},
    )
    if gpus not in (None, wanted.gpus):
        raise UserError(f"`--gpus {gpus}`, but `--slurm` has `gpus={wanted.gpus}`", hint="leave one of them out")
    if nodes not in (1, wanted.nodes):
        raise UserError(f"`--nodes {nodes}`, but `--slurm` has `nodes={wanted.nodes}`", hint="leave one of them out")
    if wanted.lead >= wanted.minutes * 60:
        raise UserError(f"`--slurm`: a warning `lead={wanted.lead}` seconds ahead leaves no time to train",
                        hint="ask for more `time`, or a shorter `lead`")  # fmt: skip
    return wanted


def minutes(text: str) -> int:
    """A time limit in SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; seconds count as a begun minute.

    Raises:
        UserError: it is none of these, or nothing.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise UserError(f"`--slurm time={text}`: no time limit", hint="write e.g. `time=24:00:00` or `time=2-12`")
    numbers = [int(part) for part in parts]
    if dash:
        hours, mins, secs = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, mins, secs = numbers
    else:
        hours, mins, secs = 0, *(*numbers, 0)[:2]
    found = int(days or 0) * 1440 + hours * 60 + mins + (secs > 0)
    if found == 0:
        raise UserError(f"`--slurm time={text}` is no time at all", hint="write e.g. `time=24:00:00`")
    return found


def _number(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"`--slurm {key}={text}`: must be a whole number above 0", hint=f"write e.g. `{key}=8`")
    return int(text)


def command(arguments: Sequence[str], wanted: Wanted) -> list[str]:
    """What follows `ssl` on each machine: the same without `--slurm`, with `--gpus`."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word == "--slurm":
            next(rest, None)
        elif not word.startswith("--slurm=") and word != "--dry-run":
            words.append(word)
    return words if wanted.gpus is None else [*words, "--gpus", str(wanted.gpus)]


def check_here() -> None:
    """Make sure that jobs can be submitted from here.

    Raises:
        UserError: there is no `sbatch`.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no `sbatch` on PATH: this machine submits no SLURM jobs",
            hint="run this on a login node of the cluster; `--dry-run` shows anywhere what would be submitted",
        )


def script(words: Sequence[str], wanted: Wanted, folder: Path) -> str:
    """The sbatch script that would be submitted.

    Raises:
        UserError: submitit is not installed.
    """
    executor = _executor(words, wanted, folder)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job in the queue."""

    id: str
    script: Path
    output: Path
    """What the first machine's task prints."""


def submit(words: Sequence[str], wanted: Wanted, folder: Path) -> Submitted:
    """Put a job into the queue that runs `ssl` with these words; script and output go to `slurm/` in the run folder.

    Raises:
        UserError: submitit is not installed, or sbatch refuses the job.
    """
    executor = _executor(words, wanted, folder)
    from submitit.core.utils import FailedJobError
    from submitit.helpers import clean_env

    try:
        with clean_env():  # or a job submitted from inside another would take itself for a part of it
            job = executor.submit(Job(tuple(words), wanted.nodes, wanted.lead))
    except FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
        raise UserError(
            f"sbatch refuses the job: {lines[-1].removeprefix('sbatch: error: ') if lines else error}",
            hint="`sinfo` lists partitions and limits; `--dry-run` shows the script",
        ) from error
    return Submitted(job.job_id, job.paths.submission_file, job.paths.stdout)


def _executor(words: Sequence[str], wanted: Wanted, folder: Path) -> "SlurmExecutor":
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise UserError("`--slurm` needs submitit, which is not here", hint="pip install 'sslcli[slurm]'") from error

    @final
    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # scripts can be shown without a cluster
            return 2

    gpus = wanted.gpus if wanted.gpu_type is None else f"{wanted.gpu_type}:{wanted.gpus}"
    executor = Executor(folder / "slurm", max_num_timeout=REQUEUES)
    executor.update_parameters(
        job_name=wanted.name or f"ssl-{folder.name}",
        time=wanted.minutes,
        nodes=wanted.nodes,
        ntasks_per_node=1,
        gpus_per_node=gpus,
        cpus_per_task=wanted.cpus,
        # A task may use all that the job has of its machine; from sbatch, srun does not inherit how much that is
        srun_args=["--cpu-bind=none", *([f"--cpus-per-task={wanted.cpus}"] if wanted.cpus else [])],
        wckey=None,
        stderr_to_stdout=True,
        additional_parameters={**wanted.more, "requeue": True, "signal": f"USR1@{wanted.lead}"},
        setup=[f"# on every machine: ssl {shlex.join(words)}", "export SUBMITIT_PREEMPT_SIGNAL=USR1"],
    )
    return executor


@final
@dataclass
class Job:
    """One machine's task, as submitit stores it and runs it."""

    words: tuple[str, ...]
    nodes: int
    lead: int
    child: int | None = None
    """Process id of the command while it runs."""

    def __call__(self) -> None:
        """Run the command; the task ends with its exit code."""
        words = list(self.words)
        if self.nodes > 1:
            host = first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])
            words += ["--nodes", str(self.nodes), "--rdzv", f"{host}:{port_of(os.environ)}"]
        environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.lead)}
        process = subprocess.Popen([sys.executable, "-m", "sslcli", *words], env=environment)
        self.child = process.pid
        signal.signal(signal.SIGTERM, lambda number, frame: self._tell(number))
        code = process.wait()
        if code == EXIT_RESUMABLE and os.environ.get("SLURM_PROCID", "0") != "0":
            return  # the first machine's task speaks for all; a failure here might make srun end it too early
        if code:
            sys.exit(code)

    def checkpoint(self) -> "DelayedSubmission":
        """Have the run stopped, and say what is next: submitit's question before it puts the job back into the queue.

        A run that does not stop is given up in time, so that at least its last checkpoint is continued.
        """
        from submitit.helpers import DelayedSubmission

        self._tell(signal.SIGUSR1)
        deadline = time.monotonic() + max(self.lead - 15, self.lead / 2)
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.2)
        return DelayedSubmission(Job(self.words, self.nodes, self.lead))

    def _tell(self, number: int) -> None:
        """Hand a signal on: clusters differ in whether they give it to the processes below a task."""
        if self.child is not None:
            with suppress(ProcessLookupError):
                os.kill(self.child, number)

    def _running(self) -> bool:
        """Whether the command still runs; its exit code is left to `wait`, which this may have interrupted."""
        if self.child is None:
            return False
        try:
            return os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        except ChildProcessError:
            return False
