"""The transport of real processes: torch.distributed's all_to_all_single, on gloo, NCCL or any other backend."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_ring.comm.closing import (
    CLOSED_HERE,
    closed_by_peers,
    hang_up,
    hang_up_unless_complete,
    on_gloo,
    open_sockets,
)
from dilated_ring.comm.group import Group
from dilated_ring.comm.protocol import Comm, Purpose, Transfer, check_message
from dilated_ring.errors import PeerError, named

_SLICE = timedelta(seconds=0.1)  # of a wait; so long an interrupt may take to get through
_LAST_SLICE = timedelta(seconds=0.4)  # for what is on its way when a peer is gone
_LARGE = 1 << 16  # bytes from which on a message comes in several parts, between which its sender may die


class ProcessGroupComm:
    """Comm over a ``torch.distributed.ProcessGroup``. Ranks are numbered within the group.

    Args:
        group: this process is one of its ranks.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)

    @property
    def device(self) -> torch.device:
        """The CPU where the group has a backend for it, else the current CUDA device."""
        # A group of one backend reports its name alone, one of several "cpu:gloo,cuda:nccl".
        config = distributed.get_backend_config(self.group)
        on_cpu = "cpu:" in config or config in ("gloo", "mpi")
        return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def exchange(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
        purpose: Purpose,
    ) -> Transfer:
        """Start an uneven all-to-all, see Comm."""
        check_message(self, received, sent, received_counts, sent_counts)
        # A group may have gloo for the CPU and NCCL for GPUs.
        by_gloo = sent.device.type == "cpu" and on_gloo(self.group)
        large = max(received.nbytes, sent.nbytes) >= _LARGE
        sockets = open_sockets() if large and by_gloo else frozenset()
        try:
            work = distributed.all_to_all_single(
                received, sent, list(received_counts), list(sent_counts), group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise self.failure(error, purpose) from error
        return _Work(self, work, sent, sockets, purpose, by_gloo=by_gloo)

    def give_up(self) -> None:
        """Close this rank's connections, see Comm. On NCCL nothing: its watchdog sees to failures."""
        hang_up(self.group)

    def failure(self, error: RuntimeError, purpose: Purpose, work: distributed.Work | None = None) -> PeerError:
        """What to raise for an error of the backend; gives up the group, so that the others hear of it."""
        gone = hang_up(self.group, work)
        timed_out = re.search(r"Timed out waiting (\d+)ms", str(error))
        reason: object = error
        if timed_out:
            reason = f"a peer stalled for {int(timed_out[1]) / 1000:g} s, the group's timeout"
        elif gone:
            reason = f"{named(gone)} died, or gave up the group after an error"
        elif CLOSED_HERE in str(error):
            reason = "this rank gave up the group after an earlier error"
        return PeerError(self.rank, self.size, purpose, reason, gone)


class _Work:
    """A transfer of a process group; keeps what is being sent alive. If it is dropped, the group is given up."""

    def __init__(
        self,
        comm: ProcessGroupComm,
        work: distributed.Work,
        sent: Tensor,
        sockets: frozenset[int],
        purpose: Purpose,
        *,
        by_gloo: bool,
    ) -> None:
        self._comm, self._work, self._sockets, self._purpose = comm, work, sockets, purpose
        self._by_gloo = by_gloo
        self._sent: Tensor | None = sent
        # Also called at the end of the process, for what is then still on its way.
        self._dropped = weakref.finalize(self, hang_up_unless_complete, comm.group, work, os.getpid())

    def wait(self) -> None:
        """See Transfer."""
        try:
            # NCCL takes the end of a slice for its timeout and aborts the communicator; its wait without one does not
            # even hold up the CPU.
            if self._by_gloo:
                self._wait_in_slices()
            self._work.wait()
        except RuntimeError as error:
            raise self._comm.failure(error, self._purpose, self._work) from error
        except BaseException:
            # Interrupted: what comes next from this rank is not what its peers expect.
            hang_up(self._comm.group, self._work)
            raise
        finally:
            self._dropped.detach()
        self._sent = None

    def _wait_in_slices(self) -> None:
        """Return when the work is complete, well or not; handle signals meanwhile, and look out for closed sockets."""
        while not self._work.is_completed():
            with suppress(RuntimeError):  # the slice is over, or else the work failed and is complete
                self._work.wait(_SLICE)
            if self._work.is_completed() or self._sockets <= open_sockets():
                continue
            # A rank that has all it needs may leave while others still exchange: what comes from those is waited for.
            if closed_by_peers(self._comm.group):
                with suppress(RuntimeError):
                    self._work.wait(_LAST_SLICE)
                if not self._work.is_completed():
                    raise RuntimeError("a connection was closed in the middle of a message")
            self._sockets &= open_sockets()


def comm_of(group: Group) -> Comm:
    """The Comm of a process group, of a one-dimensional device mesh, of the default group (None), or itself.

    Args:
        group: any of these.

    Raises:
        TypeError: none of these.
        ValueError: a mesh of several dimensions, or a group this process is not in.
        RuntimeError: None, and torch.distributed is not initialised.
    """
    outside = "group: expected a group that this process belongs to"
    if isinstance(group, DeviceMesh):
        if group.get_coordinate() is None:
            raise ValueError(f"{outside}, got a mesh of ranks {group.mesh.tolist()}")
        if group.ndim != 1:
            raise ValueError(
                f"group: expected one dimension of a mesh, got {group.ndim}: {group.mesh_dim_names} "
                f'(take one by its name, mesh["name"])'
            )
        group = group.get_group()
    elif group is None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                "group: expected a process group where torch.distributed is not initialised "
                "(start the processes with torchrun and call torch.distributed.init_process_group)"
            )
        group = distributed.group.WORLD
    nobody: object = distributed.GroupMember.NON_GROUP_MEMBER  # what new_group returns to ranks outside the new group
    if group is nobody:
        raise ValueError(outside)
    if isinstance(group, ProcessGroup):
        return ProcessGroupComm(group)
    if isinstance(group, Comm):
        return group
    raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh, a Comm or None, got {type(group).__name__}")
