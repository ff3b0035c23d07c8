"""The variables of srun in torchrun's words, for the shapes that its manual gives them."""

import pytest

from sslcli.engine.srun import first_host, port_of, srun_environment, srun_tasks, tasks_per_node

SIXTH_OF_SEVEN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
    "SLURM_STEP_NODELIST": "gpu[008-009]",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_every_task_becomes_a_rank():
    assert srun_environment(SIXTH_OF_SEVEN) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu008",
        "MASTER_PORT": str(10000 + 12345670 % 20000),
    }


def test_a_meeting_place_that_is_set_is_kept():
    found = srun_environment({**SIXTH_OF_SEVEN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4000")


def test_torchrun_in_srun_knows_better():
    assert srun_environment({**SIXTH_OF_SEVEN, "RANK": "0"}) == {}


def test_a_batch_script_is_no_task_although_it_has_their_variables():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert srun_tasks(batch) == 1
    assert srun_environment(batch) == {}
    assert srun_environment({**SIXTH_OF_SEVEN, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert srun_environment({}) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("gpu[7,9]", "gpu7"),
        ("rack[3-4]n[01-12]-ib,other", "rack3n01-ib"),
        ("a.b.example,c", "a.b.example"),
    ],
)
def test_the_first_machine_of_a_list(nodes: str, host: str):
    assert first_host(nodes) == host


def test_tasks_per_machine():
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    assert tasks_per_node("2,3(x3)") == [2, 3, 3, 3]


def test_jobs_and_steps_of_near_numbers_have_different_ports():
    ports = {port_of({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in range(50) for step in range(10)}
    assert len(ports) == 500
    assert all(10000 <= port < 30000 for port in ports)
