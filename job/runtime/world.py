"""All ranks of a job together: which part of the work is whose, and how results meet. Alone, all of it is free."""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from job.errors import JobError, PeerFailed, exit_code_of
from job.runtime.peers import Peers
from job.runtime.ranks import ALONE as ONE_RANK
from job.runtime.ranks import Ranks

log = logging.getLogger(__name__)

STUCK_SECONDS = 1800.0
"""A transfer that takes longer will never end: some rank is alive, but does something else."""


class Agreement:
    """What all ranks decide together, once per step. Alone, one is asked at the moment of the answer.

    Several ranks vote while a step is under way and act on the outcome after it, so nobody waits.

    Args: mine: this rank's votes now.
    """

    def __init__(self, world: "World", mine: Callable[[], list[bool]]) -> None:
        self._world = world
        self._mine = mine
        self._answer: Callable[[], list[bool]] | None = None

    def vote(self) -> None:
        if self._world.size > 1:
            self._answer = self._world.ask(self._mine())

    def outcome(self) -> list[bool]:
        """Which of the votes any rank has cast."""
        if self._world.size == 1:
            return self._mine()
        answer, self._answer = self._answer or self._world.ask(self._mine()), None
        return answer()


class World:
    """One rank's view of the whole job. Close it with `leave`.

    `gather`, `total` and `agree` are transfers: all ranks must call them, in the same order.
    """

    def __init__(self, ranks: Ranks = ONE_RANK, *, peers: Peers | None = None) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self.ranks = ranks
        self.peers = peers
        self._host: Any = None
        """The group for decisions, on the CPU: they wait for no GPU."""

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: it logs, claims, commits and exports."""
        return self.rank == 0

    def connect(self, device: torch.device, *, waiting: Callable[[], None] = lambda: None) -> None:
        """Opens the transfers between devices. From here on ranks stop together, so a signal no longer ends what one waits for.

        Args: waiting: called while this rank waits for another. Raises: PeerFailed.
        """
        if self.peers is None:
            return
        self.peers.check = waiting
        options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("transfers", self.peers.connect()),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=STUCK_SECONDS),
            **options,
        )
        self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=STUCK_SECONDS))

    def part(self, count: int, *, start: int = 0) -> range:
        """This rank's share of `count` things in a row, numbered from start."""
        return range(start + self.rank * count // self.size, start + (self.rank + 1) * count // self.size)

    def largest_part(self, count: int) -> int:
        return -(-count // self.size)

    def gather(self, rows_bX: Tensor) -> Tensor:
        """(W * b, …): the rows of all ranks, in their order. Every rank gives equally many."""
        if self.peers is None:
            return rows_bX
        out = rows_bX.new_empty(self.size * len(rows_bX), *rows_bX.shape[1:])
        dist.all_gather_into_tensor(out, rows_bX.contiguous())
        return out

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.peers is not None:
            dist.all_reduce(values)
        return values

    def at_step(self, step: int) -> None:
        """Lets the other ranks know how far this one is."""
        if self.peers is not None:
            self.peers.step = step

    def any(self, mine: bool) -> bool:
        """Whether it is true on any rank. The host waits for the slowest."""
        return self.ask([mine])()[0]

    def ask(self, mine: list[bool]) -> Callable[[], list[bool]]:
        """Starts to find out which of these are true on any rank. Returns: a call that waits for the answer."""
        if self.peers is None:
            return lambda: mine
        votes = torch.tensor(mine, dtype=torch.int32)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._host, async_op=True)

        def answer() -> list[bool]:
            work.wait()
            return [bool(vote) for vote in votes.tolist()]

        return answer

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank: JSON values. The others wait. Raises: PeerFailed."""
        return make() if self.peers is None else self.peers.share(name, make)

    def share_on_node(self, name: str, make: Callable[[], Any]) -> Any:
        """The same from the first rank of each node to that node's others."""
        if self.peers is None:
            return make()
        first = self.rank - self.ranks.local_rank
        return self.peers.share(f"{name}/{first}", make, source=first)

    def meet(self) -> None:
        """Returns when all ranks have called it."""
        self.any(False)

    def explained(self, error: Exception) -> Exception:
        """The error that this rank ends with: a rank's that failed before and pulled this one along, or its own, told to others."""
        if self.peers is None:
            return error
        if isinstance(error, PeerFailed):
            return error
        if (failure := self.peers.explain(error)) is not None:
            return failure
        self.peers.fail(exit_code_of(error), str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}")
        return error

    def tell_failure(self, reason: str) -> None:
        """Before this process ends without any of its clean-up."""
        if self.peers is not None:
            self.peers.fail(JobError.exit_code, reason)

    def leave(self) -> None:
        if self.peers is not None:
            self.peers.close()


ALONE = World()
