"""Process groups by their names, as a compiled graph holds them."""

from __future__ import annotations

from torch.distributed import distributed_c10d

from dilated_ring.comm.process_group import ProcessGroupComm


def comm_named(name: str) -> ProcessGroupComm:
    """The Comm of the process group of that name (``group.group_name``)."""
    return ProcessGroupComm(distributed_c10d._resolve_process_group(name))  # type: ignore[attr-defined, arg-type, unused-ignore]
