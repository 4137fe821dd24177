"""The agreement before the first transfer: all ranks compare what they were called with, and who differs is named.

A message that is shorter, longer or of another dtype than expected is not noticed by the network: it leaves stale data,
aborts the process or is read as other numbers. So the ranks first exchange a few numbers, a digest of everything that
must be equal among them, and only ranks that agree go on.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_ring.comm.protocol import Comm, Purpose
from dilated_ring.errors import DisagreementError, RingError, named

_AGREEMENT = Purpose("what they were called with", "agreement")


class _Call(NamedTuple):
    """How a rank was called: the fields that must be equal, or why it refuses, and what may differ."""

    fields: Mapping[str, str]
    length: int
    refused: bool

    def digest(self) -> list[int]:
        """SHA-256 of the fields, whatever their order, as four numbers of 8 bytes."""
        digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).digest()
        return [int.from_bytes(digest[at : at + 8], "big", signed=True) for at in range(0, len(digest), 8)]


def agree(comm: Comm, call: Mapping[str, object], length: int) -> list[int]:
    """Make sure that all ranks were called alike.

    Args:
        comm: to the ranks.
        call: name -> value of everything that must be equal on all ranks; compared by ``str(value)``.
        length: what may differ: positions in this rank's shard.

    Returns:
        Every rank's length.

    Raises:
        DisagreementError: on every rank, naming what differs and on which.

    >>> from dilated_ring.comm import run_ranks
    >>> run_ranks(2, lambda comm: agree(comm, {"heads": 4}, length=10 + comm.rank))
    [[10, 11], [10, 11]]
    """
    return agree_with_ticket(comm, call, length)[0]


def asked_bounds(comm: Comm, function: str, length: int) -> tuple[int, ...]:
    """Where the shards of a sequence start and end, as the ranks tell each other, each its shard's length.

    Args:
        comm: to the ranks.
        function: what is called, the same on all ranks.
        length: positions in this rank's shard.

    Returns:
        world_size + 1 positions.

    Raises:
        DisagreementError: on every rank, where they call different things.
    """
    return 0, *accumulate(agree(comm, {"function": function, "phase": "positions"}, length))


def agree_with_ticket(comm: Comm, call: Mapping[str, object], length: int) -> tuple[list[int], int]:
    """As ``agree``, and a number that all ranks draw together, which no other agreement has.

    A backward that names its forward's ticket in ``call`` meets that of no other call, however alike the two are.

    Args:
        comm, call, length: as of ``agree``.

    Returns:
        Every rank's length, and the number.

    Raises:
        DisagreementError: on every rank, naming what differs and on which.
    """
    try:
        fields = {name: str(value) for name, value in call.items()}
    except Exception as error:
        refuse(comm, error)
        raise
    return _compare(comm, _Call(fields, length, refused=False))


def refuse(comm: Comm, error: Exception) -> None:
    """Tell the others, who are about to agree, that this rank will not go on because of ``error``, which it raises.

    The others raise a DisagreementError that says so, instead of waiting for this rank. If they cannot be told, then
    they fail by themselves; ``error`` is what this rank has to say either way.

    Args:
        comm: to the others.
        error: quoted in theirs.
    """
    with suppress(RingError):
        _compare(comm, _Call({"error": f"{type(error).__name__}: {error}"}, 0, refused=True))


def _compare(comm: Comm, own: _Call) -> tuple[list[int], int]:
    ticket = secrets.randbits(62)
    if comm.size == 1:
        return [own.length], ticket
    text = json.dumps(own.fields).encode()  # ASCII; newlines and lone surrogates are escaped
    header = torch.tensor([own.refused, own.length, len(text), ticket, *own.digest()], dtype=torch.int64, device="cpu")
    headers = [part.tolist() for part in _from_all(comm, header)]
    digests = [digest for _, _, _, _, *digest in headers]
    refused = [bool(refused) for refused, *_ in headers]
    if all(digest == digests[0] for digest in digests) and not any(refused):
        return [length for _, length, *_ in headers], headers[0][3]  # rank 0's number is everyone's
    sizes = [size for _, _, size, *_ in headers]
    padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
    texts = [bytes(part.tolist()[:size]) for part, size in zip(_from_all(comm, padded), sizes, strict=True)]
    raise DisagreementError(_difference([json.loads(text) for text in texts], refused))


def _from_all(comm: Comm, own: Tensor) -> list[Tensor]:
    """One equally long tensor from every rank."""
    counts = [len(own)] * comm.size
    sent = own.repeat(comm.size).to(comm.device)
    received = torch.empty_like(sent)
    comm.exchange(received, sent, counts, counts, _AGREEMENT).wait()
    return list(received.cpu().split(len(own)))


def _difference(calls: list[dict[str, str]], refused: list[bool]) -> str:
    """What the ranks differ in, told the same on every rank."""
    if any(refused):
        return "; ".join(
            f"rank {rank} refused its arguments: {call['error']}" for rank, call in enumerate(calls) if refused[rank]
        )
    names = list(dict.fromkeys(name for call in calls for name in call))
    found = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks_of.setdefault(call.get(name, "nothing"), []).append(rank)
        if len(ranks_of) > 1:
            # The value of most ranks first: the last ones are who differs.
            values = sorted(ranks_of.items(), key=lambda item: (-len(item[1]), item[1]))
            shown = ", ".join(f"{value} on {named(ranks)}" for value, ranks in values)
            found.append(f"{name} is {shown}")
    return f"the ranks were called with different arguments: {'; '.join(found)}"
