"""Who takes part: a rank's place in a group, the way to its store, and the ranks that share its memory.

The one file that looks inside ``torch.distributed``.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from dilated_factory.coordination.line import Line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

Scope: TypeAlias = Literal["host", "device", "group"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_POLL_SECONDS = 0.005
_MET = "met"
_CURE = "call torch.distributed.init_process_group first, or give store=, rank= and world_size="


class Seat(NamedTuple):
    """Attributes: line: a client of its own; ranks: of the whole group, by their numbers in the default group."""

    line: Line
    ranks: tuple[int, ...]


def take_seat(group: ProcessGroup | None, store: Store | None, rank: int | None, world_size: int | None) -> Seat:
    """This process's place. No other rank is asked, so that bad arguments raise at once.

    Raises:
        TypeError, ValueError: see ``PoolCoordinator``.
    """
    if store is None and (rank is not None or world_size is not None):
        raise ValueError(f"rank, world_size: expected together with store=, got {rank} and {world_size} without it")
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank, world_size: expected both or neither, got {rank} and {world_size}")
    if group is not None and rank is not None:
        raise ValueError(f"rank: expected the group's own where group= is given, got rank={rank}")
    if store is not None:
        _check_store(store)
    if rank is not None and world_size is not None:
        assert store is not None
        _check_rank(rank, world_size)
        me, ranks = rank, tuple(range(world_size))
    else:
        group = _group(group)
        me, ranks = torch.distributed.get_rank(), tuple(torch.distributed.get_process_group_ranks(group))
        if me not in ranks:
            raise ValueError(f"group: expected a group that rank {me} is in, got one of ranks {list(ranks)}")
        store = _store_of(group) if store is None else store
    line = Line(_own_client(store), me, store)
    # Coordinators made one after another over the same ranks have keys of their own: all ranks count alike.
    name = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    number = line.add(f"dilated_factory/coordination/{name}/made by {me}", 1)
    return Seat(line.below(f"dilated_factory/coordination/{name}/{number}"), ranks)


def meet(seat: Seat, scope: Scope, place: str, limit: int | None, timeout: float) -> tuple[int, ...]:
    """Tell the other ranks where this one is, and hear it of them; the ranks at the same place.

    The first rank that has seen all, or has waited too long, settles for all of them whether they have met. Otherwise a
    late rank would meet the trace of one that gave up, count on it, and wait for its answers.

    Raises:
        TimeoutError: some ranks did not come, or this one came after another had given up.
        ValueError: the ranks ask for different scopes, or those of one place for different limits.
    """
    me = seat.line.rank
    seat.line.set(f"place/{me}", json.dumps([scope, place, limit]))
    keys = [f"place/{rank}" for rank in seat.ranks]
    deadline = time.monotonic() + timeout
    while not seat.line.has(*keys):
        if time.monotonic() > deadline:
            absent = [rank for rank, key in zip(seat.ranks, keys, strict=True) if not seat.line.has(key)]
            if seat.line.exchange("verdict", "", f"rank {me} gave up after {timeout:g} s") == _MET:
                break
            raise TimeoutError(
                f"rank {me}: ranks {absent} made no PoolCoordinator within {timeout:g} s; all ranks of the group must "
                "make one, in the same order where there are several"
            )
        time.sleep(_POLL_SECONDS)
    verdict = seat.line.exchange("verdict", "", _MET)
    if verdict != _MET:
        raise TimeoutError(
            f"rank {me}: too late: {verdict}; make a PoolCoordinator on all ranks again, with a longer timeout= where "
            "they do not begin together"
        )
    told = dict(zip(seat.ranks, (json.loads(text) for text in seat.line.get_all(keys)), strict=True))
    for rank, (its_scope, its_place, its_limit) in told.items():
        if its_scope != scope:
            raise ValueError(
                f"scope: expected the same of all ranks, got {scope!r} of {me} and {its_scope!r} of {rank}"
            )
        if its_place == place and its_limit != limit:
            raise ValueError(
                f"limit: expected the same of all ranks that share a {scope}, got {limit} bytes of rank {me} and "
                f"{its_limit} of rank {rank}"
            )
    return tuple(rank for rank, (_, its_place, _) in told.items() if its_place == place)


def place_of(scope: Scope, device: torch.device | None) -> str:
    """A text that is the same for those who share what ``scope`` names, and for nobody else."""
    if scope == "group":
        return "group"
    host = f"{socket.gethostname()} {_boot_id()}"
    if scope == "host" or device is None or device.type == "cpu":
        return host
    if device.type == "cuda":  # by its identity: ranks may see the same device under different numbers
        return f"{host} {torch.cuda.get_device_properties(device).uuid}"
    return f"{host} {device}"


def _boot_id() -> str:
    """What tells apart two machines of the same name; nothing where the system has no such number."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as identity:
            return identity.read().strip()
    except OSError:
        return ""


def _check_store(store: object) -> None:
    if not torch.distributed.is_available():
        raise ValueError("store: this build of PyTorch has no torch.distributed")
    from torch.distributed.distributed_c10d import Store

    if not isinstance(store, Store):
        raise TypeError(f"store: expected a torch.distributed Store, got {store!r}")


def _check_rank(rank: int, world_size: int) -> None:
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, for world_size={world_size}, got {rank}")


def _group(group: Any) -> ProcessGroup:
    """The group, or the default one."""
    if not torch.distributed.is_available():
        raise ValueError("group: this build of PyTorch has no torch.distributed")
    if not torch.distributed.is_initialized():
        raise ValueError(f"group: expected an initialised process group, got none: {_CURE}")
    if group is None:
        group = torch.distributed.group.WORLD
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group: expected a group that rank {torch.distributed.get_rank()} is in, got another")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or None, got {group!r}")
    return group


def _store_of(group: ProcessGroup) -> Store:
    """The store that the group was made with."""
    ask = getattr(group, "get_group_store", None)
    store: Store | None = ask() if ask is not None else None
    if store is None:
        raise ValueError(
            f"store: this PyTorch ({torch.__version__}) does not tell a group's store; give store= as well"
        )
    return store


def _own_client(store: Store) -> Store:
    """A connection that other users of the store cannot block by waiting for a key."""
    try:
        clone: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    except RuntimeError:  # a store written in Python need not have it
        return store
    return clone
