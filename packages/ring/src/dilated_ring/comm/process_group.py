"""The transport of real processes: torch.distributed's all_to_all_single, on gloo, NCCL or any other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_ring.comm.protocol import Comm, Purpose, Transfer
from dilated_ring.errors import PeerError


class ProcessGroupComm:
    """Comm over a ``torch.distributed.ProcessGroup``. Ranks are numbered within the group."""

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
        try:
            work = distributed.all_to_all_single(
                received, sent, list(received_counts), list(sent_counts), group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise PeerError(self.rank, self.size, purpose, error) from error
        return _Work(self, work, sent, purpose)


class _Work:
    """A transfer of a process group; keeps what is being sent alive."""

    def __init__(self, comm: ProcessGroupComm, work: distributed.Work, sent: Tensor, purpose: Purpose) -> None:
        self._comm, self._work, self._purpose = comm, work, purpose
        self._sent: Tensor | None = sent

    def wait(self) -> None:
        """See Transfer."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise PeerError(self._comm.rank, self._comm.size, self._purpose, error) from error
        self._sent = None


def comm_of(group: ProcessGroup | DeviceMesh | Comm | None) -> Comm:
    """The Comm of a process group, of a one-dimensional device mesh, of the default group (None), or itself.

    Raises:
        TypeError: none of these.
        ValueError: a mesh of several dimensions, or a group this process is not in.
        RuntimeError: None, and torch.distributed is not initialised.
    """
    if isinstance(group, DeviceMesh):
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
    if isinstance(group, ProcessGroup):
        if distributed.get_rank(group) < 0:
            raise ValueError("group: expected a group this process belongs to")
        return ProcessGroupComm(group)
    if isinstance(group, Comm):
        return group
    raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh, a Comm or None, got {type(group).__name__}")
