"""Many processes from one command: torchrun's elastic launcher, called so that exit codes keep their meaning.

Others may have started the processes instead: torchrun, or srun (`sslcli.engine.srun`).
"""

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from sslcli import dist
from sslcli.engine.machine import cores
from sslcli.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_RESUMABLE, EXIT_USER, SslError, StoppedOnRequest

GRACE = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120"))
"""Seconds that ranks have for their checkpoint after the launcher was asked to stop; then they are killed."""
MEETING = 1800
"""Seconds that machines wait for each other at the start."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the launcher hands on to its ranks instead of dying of it."""
_WORDS = "SSL_WORDS"
_RESTARTED = "SSL_RESTARTED"


def launched() -> bool:
    """Whether a launcher (ours, torchrun, srun after `srun_environment`) has already started this process."""
    return "RANK" in os.environ


def restarted() -> str | None:
    """Why this process goes on with what its own command began, in a few words; None at a first start."""
    if _RESTARTED in os.environ:
        return f"restarted {os.environ[_RESTARTED]}"
    times = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if times != "0":
        return f"restarted ({times} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS', '?')}) after a process died"
    times = os.environ.get("SLURM_RESTART_COUNT", "0")
    return None if times == "0" else f"SLURM started this job again (restart {times})"


def launch(
    arguments: Sequence[str],
    processes: int,
    *,
    nodes: int = 1,
    rendezvous: str | None = None,
    max_restarts: int = 0,
) -> int:
    """Run this same command in `processes` processes per machine and return its exit code.

    Args:
        arguments: what follows `ssl` on the command line.
        processes: how many per machine.
        nodes: how many machines.
        rendezvous: HOST:PORT where machines meet; one machine finds a free port by itself.
        max_restarts: how often all ranks are started again after one died. A rank that ended by decision (the user's
            mistake, diverged, collapsed, stopped on request) is not started again.

    Raises:
        SslError: a rank other than the first, which speaks for itself, ended with an error of ours, or one was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SIGNALS
    logging.disable(logging.CRITICAL)  # the agent's own account of what happens; ours is shorter
    try:
        with tempfile.TemporaryDirectory(prefix="ssl-") as words:
            os.environ[_WORDS] = words
            try:
                result = _run(arguments, processes, nodes, rendezvous, max_restarts, Path(words))
            except RendezvousError as error:
                if said := words_in(Path(words)):  # the machine of the meeting place was the first to end
                    return _spoken(said)
                raise SslError(
                    f"no connection to the other machines through `{rendezvous}`: {error}",
                    hint="start the same command on all machines within half an hour; HOST is the name of one of them, "
                    "and the others must reach its PORT. A run that was under way continues by the same command",
                ) from error
            return _exit_code(result, words_in(Path(words)), max_restarts) if result.is_failed() else 0
    except (SignalException, KeyboardInterrupt) as stop:
        by_hand = isinstance(stop, KeyboardInterrupt) or stop.sigval == signal.SIGINT
        return EXIT_INTERRUPTED if by_hand else EXIT_RESUMABLE
    finally:
        logging.disable(logging.NOTSET)
        for name in (_WORDS, _RESTARTED, dist.ROUND):
            os.environ.pop(name, None)


def _run(
    arguments: Sequence[str], processes: int, nodes: int, rendezvous: str | None, max_restarts: int, words: Path
) -> RunResult:
    handler = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=rendezvous or "localhost:0",
            run_id=rendezvous or uuid.uuid4().hex,
            min_nodes=nodes,
            max_nodes=nodes,
            join_timeout=MEETING,
            read_timeout=MEETING if nodes > 1 else 60,
        )
    )
    spec = WorkerSpec(
        role="ssl",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-m", "sslcli", *arguments),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.5,
    )
    try:
        result: RunResult = _Agent(spec, words).run()
    except SignalException:  # the meeting place stays open: the agents of other machines end by a signal of their own
        raise
    except BaseException:
        handler.shutdown()
        raise
    handler.shutdown()
    return result


@final
class _Agent(LocalElasticAgent):
    """Torchrun's agent, which starts all ranks again when one has died; what a rank decided itself is final."""

    def __init__(self, spec: WorkerSpec, words: Path) -> None:
        super().__init__(spec, DefaultLogsSpecs())
        self._words = words
        self._why: str | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        store = worker_group.store  # of all machines, and of this round alone
        assert store is not None, "agents have met"
        if worker_group.group_rank == 0:
            store.set(dist.ROUND, uuid.uuid4().hex)
        os.environ[dist.ROUND] = store.get(dist.ROUND).decode()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            words = words_in(self._words)
            if any(word.final for word in words.values()):
                self._remaining_restarts = 0
            most = worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            self._why = f"({number} of {most}) after a process died ({reason(result, words)})"
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        os.environ[_RESTARTED] = self._why or "after a process on another machine died"
        self._why = None
        for file in self._words.iterdir():
            file.unlink()
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = GRACE) -> None:
        """End the ranks; a second Ctrl-C kills them, any other signal on the way is not news."""
        while self._pcontext is not None:
            try:
                self._pcontext.close(death_sig, GRACE)
                return
            except SignalException as again:
                if again.sigval == signal.SIGINT:
                    death_sig = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Word:
    """What a rank says before it ends with an error of ours."""

    message: str
    hint: str | None
    code: int
    final: bool
    """Whether starting again would change nothing."""


@contextmanager
def last_words() -> Iterator[None]:
    """Tell our launcher of an error before the other ranks can notice that this one is gone.

    A rank that only lost the others says so in a line; what happened is for the one that it happened to.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DistError) or "gloo/transport" in str(error):
            sys.stderr.write(f"rank {os.environ['RANK']} has lost another rank\n")
            raise SystemExit(EXIT_FAILURE) from error
        raise
    except SslError as error:
        if _WORDS in os.environ:
            said = {
                "message": error.message,
                "hint": error.hint,
                "code": error.exit_code,
                # Plain failures (a full disk, a dead loader process) may pass; its kinds are decisions
                "final": type(error) is not SslError,
            }
            file = Path(os.environ[_WORDS]) / os.environ["RANK"]
            file.with_suffix(".tmp").write_text(json.dumps(said), encoding="utf-8")
            file.with_suffix(".tmp").replace(file)
        raise


def words_in(folder: Path) -> dict[int, Word]:
    """The last words of this machine's ranks, by rank."""
    files = sorted((file for file in folder.iterdir() if not file.suffix), key=lambda file: int(file.name))
    return {int(file.name): Word(**json.loads(file.read_text(encoding="utf-8"))) for file in files}


def reason(result: RunResult, words: Mapping[int, Word]) -> str:
    """What went wrong first, as far as it can be known, e.g. `rank 1: SIGKILL`."""
    # Those that the agent then ended itself come later, or by its SIGTERM
    first = min(failure.timestamp for failure in result.failures.values())
    for rank, failure in sorted(result.failures.items()):
        if failure.timestamp == first and failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            return f"rank {rank}: {signal.Signals(-failure.exitcode).name}"
    for rank, word in words.items():
        return f"rank {rank}: {word.message}"
    return f"exit code {max(failure.exitcode for failure in result.failures.values())}"


def _spoken(words: Mapping[int, Word]) -> int:
    """The exit code that a rank's last words ask for; raises what the first rank does not say itself."""
    rank, word = next(iter(words.items()))
    if rank == 0:
        return word.code
    if word.code == EXIT_RESUMABLE:
        raise StoppedOnRequest(word.message, hint=word.hint)
    error = SslError(f"rank {rank}: {word.message}", hint=word.hint)
    error.exit_code = word.code
    raise error


def _exit_code(result: RunResult, words: Mapping[int, Word], max_restarts: int) -> int:
    if words:
        return _spoken(words)
    codes = {failure.exitcode for failure in result.failures.values()}
    decided = next((code for code in (EXIT_USER, EXIT_RESUMABLE) if code in codes), None)
    if decided is not None:
        return decided
    why = reason(result, words)
    if "SIG" in why:
        used = f", and {max_restarts} restart(s) are used up" if max_restarts else ""
        raise SslError(
            f"a process died ({why}){used}",
            hint="run the same command again; pretraining continues from its last checkpoint, and by itself with "
            "`--max-restarts 3`. SIGKILL often means that memory ran out",
        )
    return EXIT_FAILURE  # the rank's traceback stands above
