"""Which of the processes of a job this one is, found in its environment. No torch here: the launcher asks as well.

Whoever starts the ranks says so in one of these ways, looked for in this order:

1. RANK and WORLD_SIZE, with LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT: our own launcher, torchrun, MPI wrappers
2. a Slurm step of several tasks: SLURM_PROCID and its kin; the first node and a port made from the job's number meet the others
3. several nodes with one launcher each (`--nnodes`): the node's number is NODE_RANK, JOB_COMPLETION_INDEX (a Kubernetes Indexed
   Job) or SLURM_NODEID; node 0 must be named in MASTER_ADDR
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from job.errors import ConfigError

PORT = 29400
"""Where rank 0 is met, unless MASTER_PORT says otherwise."""
FIRST_SLURM_PORT, SLURM_PORTS = 20000, 20000
_NODE_RANKS = ("NODE_RANK", "JOB_COMPLETION_INDEX", "SLURM_NODEID")


@dataclass(frozen=True)
class Ranks:
    """One process of a job, or one launcher that is to start `local_size` of them."""

    rank: int = 0
    """Of the first process, for a launcher."""
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = PORT

    @property
    def node(self) -> int:
        return (self.rank - self.local_rank) // self.local_size

    def environment(self, local_rank: int) -> dict[str, str]:
        """The variables that tell a process that it is this one of a launcher's ranks."""
        return {
            "RANK": str(self.rank + local_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


ALONE = Ranks()


def ranks_of(environ: Mapping[str, str], *, nproc_per_node: int, nnodes: int) -> tuple[Ranks, bool]:
    """(who we are, whether we are the launcher of ranks that are to be started). Raises: ConfigError."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _given(environ), False
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1 and nproc_per_node == 1:
        return _of_slurm(environ), False
    if nproc_per_node * nnodes == 1:
        return ALONE, False
    if nnodes == 1:
        return Ranks(size=nproc_per_node, local_size=nproc_per_node, port=_number(environ, "MASTER_PORT", _free_port())), True
    variable = next((name for name in _NODE_RANKS if name in environ), None)
    if variable is None:
        raise ConfigError(f"--nnodes {nnodes} needs to know which node this is. Set NODE_RANK to 0 … {nnodes - 1}.")
    node = _number(environ, variable, 0)
    if node >= nnodes:
        raise ConfigError(f"{variable} is {node}, but --nnodes {nnodes} has nodes 0 … {nnodes - 1}. Make them agree.")
    address = environ.get("MASTER_ADDR", "")
    if not address:
        raise ConfigError(f"--nnodes {nnodes} needs MASTER_ADDR, the name or address of node 0, the same on every node.")
    first, size = node * nproc_per_node, nnodes * nproc_per_node
    port = _number(environ, "MASTER_PORT", PORT)
    return Ranks(first, size, 0, nproc_per_node, address, port), nproc_per_node > 1


def _given(environ: Mapping[str, str]) -> Ranks:
    rank, size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1 if "LOCAL_RANK" not in environ else size)
    local_rank = _number(environ, "LOCAL_RANK", rank % local_size)
    if rank >= size or local_rank >= local_size or size % local_size:
        raise ConfigError(
            f"RANK {rank} of WORLD_SIZE {size} and LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size} don't fit together: "
            "ranks are counted from 0, and each node must have equally many."
        )
    address = environ.get("MASTER_ADDR", "")
    if size > local_size and not address:
        raise ConfigError("RANK and WORLD_SIZE are set, but MASTER_ADDR, the name or address of rank 0's node, is missing.")
    return Ranks(rank, size, local_rank, local_size, address or "127.0.0.1", _number(environ, "MASTER_PORT", PORT))


def _of_slurm(environ: Mapping[str, str]) -> Ranks:
    """One task of a step. Source: srun's manual, section "Output Environment Variables"."""
    size, nodes = _number(environ, "SLURM_STEP_NUM_TASKS", 1), _number(environ, "SLURM_STEP_NUM_NODES", 1)
    if size % nodes:
        raise ConfigError(f"{size} tasks on {nodes} nodes are not equally many each. Use --ntasks-per-node.")
    address = environ.get("MASTER_ADDR") or _first_host(environ.get("SLURM_STEP_NODELIST", ""))
    port = FIRST_SLURM_PORT + _number(environ, "SLURM_JOB_ID", 0) % SLURM_PORTS
    return Ranks(
        _number(environ, "SLURM_PROCID", 0),
        size,
        _number(environ, "SLURM_LOCALID", 0),
        size // nodes,
        address if nodes > 1 or "MASTER_ADDR" in environ else "127.0.0.1",
        _number(environ, "MASTER_PORT", port),
    )


def _first_host(hosts: str) -> str:
    """node[07-12,20],other3 -> node07"""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", hosts)
    if match is None:
        raise ConfigError("Slurm names no nodes in SLURM_STEP_NODELIST. Set MASTER_ADDR to the node of task 0.")
    return match[1] + (match[2] or "") + (match[3] or "")


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise ConfigError(f"{name} must be a whole number; found {text!r}.")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
