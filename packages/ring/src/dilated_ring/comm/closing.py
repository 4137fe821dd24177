"""Giving up a group: close this rank's connections, so that no peer waits for a rank that will not answer.

gloo notices a dead peer on the connection to it, and nowhere else. A rank that already has what the dead peer sent
waits for the others alone; those have raised and send nothing, so it would wait until the group's timeout. Therefore
who raises closes its connections first, and the news goes from rank to rank in milliseconds.

gloo has no call for it: its ``abort`` and ``shutdown`` close nothing (torch 2.11 to 2.13), and destroying a group first
waits for whatever is pending. But an operation that times out closes every connection of its group, so one is started
that is sure to.

Nor does gloo tell an operation that a connection was closed in the middle of the operation's message: that one waits
until the timeout, and keeps its thread. So who waits looks for connections that are closed, and a group with such an
operation is never taken down: its destructor would wait for the thread.

Other backends see to their failures themselves: NCCL by its watchdog.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import ProcessGroup

_TAG = 1_819_042_925  # of messages that nobody receives; any number that others are unlikely to choose
_SOON = timedelta(milliseconds=1)
_PATIENCE = 1.0  # seconds to try to close connections
_SETTLED = timedelta(milliseconds=100)  # in which an operation ends whose connections were closed, if it ever does
CLOSED_HERE = "Application timeout"  # how gloo's message begins on a connection that this rank closed


def on_gloo(group: ProcessGroup) -> bool:
    """Whether the group's CPU tensors travel by gloo."""
    config = distributed.get_backend_config(group)
    return config == "gloo" or "cpu:gloo" in config


def open_sockets() -> frozenset[int]:
    """The sockets of this process, by a number that is never used again; none where the system does not tell."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # closed meanwhile
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:["):
                    found.add(int(target[8:-1]))
    return frozenset(found)


def closed_by_peers(group: ProcessGroup) -> list[int]:
    """The peers that closed their connection to this rank: they died, or gave up the group.

    Peers that did not are left a message that they will not read, so this is for when something is amiss.
    """
    return [peer for peer, (_, by_this_rank) in _knock(group, _peers(group)).items() if by_this_rank is False]


def hang_up(group: ProcessGroup, work: distributed.Work | None = None) -> list[int]:
    """Close this rank's connections to all peers; the group can then only be destroyed.

    Args:
        work: an operation that was on its way.

    Returns:
        The peers that had closed theirs: they died, or gave up the group before.
    """
    if not on_gloo(group):
        return []
    connected = _peers(group)
    gone: list[int] | None = None
    deadline = time.monotonic() + _PATIENCE
    # A connection may be closed by its peer meanwhile, and then nothing times out: so this may take several attempts.
    while connected:
        found = _knock(group, connected)
        if gone is None:
            gone = [peer for peer, (_, by_this_rank) in found.items() if by_this_rank is False]
        connected = [peer for peer, (message, _) in found.items() if message is not None]
        for message, _ in found.values():
            if message is not None:
                with suppress(RuntimeError):
                    message.wait(_SOON)
        if time.monotonic() > deadline:  # asked after an attempt: a process that is held up makes one all the same
            break
    if work is not None and not work.is_completed():
        with suppress(RuntimeError):
            work.wait(_SETTLED)
        if not work.is_completed():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return gone or []


def hang_up_unless_complete(group: ProcessGroup, work: distributed.Work, process: int) -> None:
    """Give up a group with an operation that will never be waited for; in a process forked since, do nothing.

    Where a peer does not take part in it, the operation would otherwise hold up the end of this process, and this
    process every other rank, until the group's timeout.
    """
    if os.getpid() == process and not work.is_completed():
        with suppress(RuntimeError, ValueError):  # the group may be destroyed already
            hang_up(group, work)


def _peers(group: ProcessGroup) -> list[int]:
    own = distributed.get_rank(group)
    return [peer for peer in range(distributed.get_world_size(group)) if peer != own]


def _knock(group: ProcessGroup, peers: list[int]) -> dict[int, tuple[distributed.Work | None, bool | None]]:
    """Of each peer: a message to it that is on its way, or else None and whether this rank closed the connection."""
    found: dict[int, tuple[distributed.Work | None, bool | None]] = {}
    nothing = torch.zeros(1, dtype=torch.uint8)
    for peer in peers:
        try:
            found[peer] = distributed.isend(nothing, group=group, group_dst=peer, tag=_TAG), None
        except RuntimeError as error:
            found[peer] = None, CLOSED_HERE in str(error)
    return found
