"""Between ranks: one kind of transfer, three transports of it, and the agreement that comes before the first."""

from dilated_ring.comm.agreement import agree, agree_with_ticket, asked_bounds, refuse
from dilated_ring.comm.group import Group, HeldGroup
from dilated_ring.comm.process_group import ProcessGroupComm, comm_of
from dilated_ring.comm.protocol import Comm, Purpose, Transfer, together
from dilated_ring.comm.recording import Record, RecordingComm
from dilated_ring.comm.virtual import VirtualComm, run_ranks

__all__ = [
    "Comm",
    "Group",
    "HeldGroup",
    "ProcessGroupComm",
    "Purpose",
    "Record",
    "RecordingComm",
    "Transfer",
    "VirtualComm",
    "agree",
    "agree_with_ticket",
    "asked_bounds",
    "comm_of",
    "refuse",
    "run_ranks",
    "together",
]
