"""Functions of test files run by several processes that form a gloo group: `two_ranks(function, ...)`.

The processes live as long as the test session, since importing torch costs more than most tests. Run as a script,
this file is one of them.
"""

import importlib.util
import inspect
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120
"""How long one call may take, starting the processes included."""


class RankError(AssertionError):
    """A function failed in one of the processes; the message is that process's traceback."""


class Pool:
    """`pool(function, *args)` calls a module-level function of a test file on every rank and lists the results."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned, in rank order. Arguments and results are pickled; keep them small.

        A failure on any rank, or a rank that does not answer, ends all processes; the next call starts new ones.
        """
        if not self._processes:
            self._start()
        order = pickle.dumps((inspect.getfile(function), function.__name__, args))
        try:
            for line in self._lines:
                line.send_bytes(order)
            return [self._answer(rank) for rank in range(self.world)]
        except BaseException:
            self.stop()
            raise

    def _answer(self, rank: int) -> Any:
        if not self._lines[rank].poll(SECONDS):
            raise RankError(f"rank {rank} of {self.world} did not answer within {SECONDS} s")
        try:
            worked, value = pickle.loads(self._lines[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            raise RankError(f"rank {rank} of {self.world} died") from None
        if not worked:
            raise RankError(f"rank {rank} of {self.world}:\n{value}")
        return value

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}  # fmt: skip
            mine, theirs = Pipe()
            self._lines.append(mine)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    env={**os.environ, **{key: str(value) for key, value in place.items()}},
                    pass_fds=[theirs.fileno()],
                    cwd=ROOT,
                )
            )
            theirs.close()

    def stop(self) -> None:
        """End the processes."""
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._lines, self._processes = [], []


def serve(line: Connection) -> None:
    """Answer calls until the other end hangs up."""
    from sslcli import dist

    known: dict[str, ModuleType] = {}
    with dist.joined():
        while True:
            try:
                file, name, args = pickle.loads(line.recv_bytes())
            except EOFError:
                return
            try:
                if file not in known:
                    known[file] = load(Path(file))
                answer = (True, getattr(known[file], name)(*args))
            except Exception:
                answer = (False, traceback.format_exc())
            try:
                line.send_bytes(pickle.dumps(answer))
            except BrokenPipeError:  # another rank failed and the pool is being taken down
                return


def load(file: Path) -> ModuleType:
    """Import a file by its path, wherever it lies."""
    name = "_".join(file.relative_to(ROOT).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(f"on_ranks_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "common"))  # as pytest does
    serve(Connection(int(sys.argv[1])))
