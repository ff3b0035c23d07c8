"""Many processes from one command: torchrun's elastic launcher, called so that exit codes keep their meaning."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from sslcli.errors import EXIT_FAILURE, EXIT_RESUMABLE, EXIT_USER


def launched() -> bool:
    """Whether a launcher (ours, torchrun, srun with torchrun's variables) has already started this process."""
    return "RANK" in os.environ


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
        max_restarts: how often the job is started again after a process died.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from sslcli.engine.machine import cores

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=rendezvous or uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sslcli", *arguments)
    except SignalException:
        return EXIT_RESUMABLE
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (EXIT_USER, EXIT_RESUMABLE) if code in codes), EXIT_FAILURE)
    return 0
