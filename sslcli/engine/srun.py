"""What srun tells its tasks, in torchrun's words, so that any number of them are the ranks of one job."""

import re
from collections.abc import Mapping


def srun_tasks(environ: Mapping[str, str]) -> int:
    """How many processes srun has started for this command, as far as nobody has translated that yet; 1 without srun.

    `SLURM_NTASKS` would not do: it is also set in the batch script, where only one process runs.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return 1
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1"))


def srun_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Torchrun's variables, translated from those that srun gives to each of its tasks.

    `MASTER_ADDR` and `MASTER_PORT` are kept where they are set. Empty where srun has started no other process.
    """
    if srun_tasks(environ) == 1:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    per_node = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port_of(environ)),
    }


def port_of(environ: Mapping[str, str]) -> int:
    """A port for all tasks of a SLURM job step: other steps of the job, and jobs of near numbers, have others.

    It lies below those that Linux hands out by itself.
    """
    return 10000 + (int(environ["SLURM_JOB_ID"]) * 10 + int(environ.get("SLURM_STEP_ID", "0"))) % 20000


def first_host(nodes: str) -> str:
    """The first name in SLURM's list of machines, e.g. `gpu[007-010,12],login1` begins with `gpu007`."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", re.match(r"(?:[^,[]|\[[^]]*])*", nodes)[0])  # type: ignore[index]


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of how many tasks each machine has, e.g. `4(x2),1` is 4, 4, 1."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts
