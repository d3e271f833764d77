"""Which process of a job this is, from what torchrun, Slurm, Kubernetes or our own launcher put into the environment."""

import pytest

from job.errors import ConfigError
from job.runtime.ranks import ALONE, Ranks, ranks_of

SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}


def found(environ: dict[str, str], *, nproc_per_node: int = 1, nnodes: int = 1) -> tuple[Ranks, bool]:
    return ranks_of(environ, nproc_per_node=nproc_per_node, nnodes=nnodes)


def test_without_any_sign_a_process_is_alone() -> None:
    assert found({}) == (ALONE, False)
    assert found({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == (ALONE, False)


def test_ranks_given_by_another_launcher() -> None:
    assert found(TORCHRUN) == (Ranks(3, 4, 1, 2, "a", 1234), False)
    assert found(TORCHRUN)[0].node == 1


def test_a_slurm_task_is_a_rank() -> None:
    assert found(SLURM) == (Ranks(5, 8, 1, 4, "gpu07", 20000 + 70123 % 20000), False)
    assert found({**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "9"})[0] == Ranks(5, 8, 1, 4, "here", 9)
    assert found({**SLURM, "SLURM_STEP_NUM_NODES": "1"})[0].address == "127.0.0.1"


@pytest.mark.parametrize(
    ("hosts", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("rack[3,5-7]-ib", "rack3-ib"), ("a[01-04],b[1-2]", "a01")]
)
def test_the_first_node_of_slurms_list_is_met(hosts: str, first: str) -> None:
    assert found({**SLURM, "SLURM_STEP_NODELIST": hosts})[0].address == first


def test_our_launcher_starts_ranks_that_find_themselves() -> None:
    launcher, starts = found({"MASTER_PORT": "77"}, nproc_per_node=4)
    assert (launcher, starts) == (Ranks(0, 4, 0, 4, "127.0.0.1", 77), True)
    assert found(launcher.environment(2)) == (Ranks(2, 4, 2, 4, "127.0.0.1", 77), False)


@pytest.mark.parametrize("variable", ["NODE_RANK", "JOB_COMPLETION_INDEX", "SLURM_NODEID"])
def test_nodes_are_numbered_by_whoever_starts_them(variable: str) -> None:
    environ = {variable: "1", "MASTER_ADDR": "job-0.job"}
    assert found(environ, nproc_per_node=8, nnodes=2) == (Ranks(8, 16, 0, 8, "job-0.job"), True)
    assert found(environ, nnodes=2) == (Ranks(1, 2, 0, 1, "job-0.job"), False)


@pytest.mark.parametrize(
    ("environ", "nnodes", "words"),
    [
        ({}, 2, "NODE_RANK"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "a"}, 2, "nodes 0 … 1"),
        ({"NODE_RANK": "1"}, 2, "MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "4"}, 1, "don't fit together"),
        ({**TORCHRUN, "RANK": "first"}, 1, "RANK must be a whole number"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, 1, "MASTER_ADDR"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "7"}, 1, "--ntasks-per-node"),
    ],
)
def test_what_does_not_add_up_is_told(environ: dict[str, str], nnodes: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        found(environ, nnodes=nnodes)
