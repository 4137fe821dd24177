"""The agreement before the first transfer: all ranks compare what they were called with, and who differs is named.

A message that is shorter, longer or of another dtype than expected is not noticed by the network: it leaves stale data,
aborts the process or is read as other numbers. So the ranks first exchange a few numbers, a digest of everything that
must be equal among them, and only ranks that agree go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch

from dilated_ring.comm.protocol import Comm, Purpose
from dilated_ring.errors import DisagreementError

_DIGEST_WORDS = 4  # of 8 bytes: SHA-256
_AGREEMENT = Purpose("what they were called with", "agreement")


class _Call(NamedTuple):
    """How a rank was called: the fields that must be equal, and the one that may differ."""

    text: str
    length: int
    refused: bool

    def digest(self) -> list[int]:
        words = hashlib.sha256(self.text.encode()).digest()
        return [int.from_bytes(words[at : at + 8], "big", signed=True) for at in range(0, len(words), 8)]


def agree(comm: Comm, call: Mapping[str, object], length: int) -> list[int]:
    """Make sure that all ranks were called alike.

    Args:
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
    return _compare(comm, _Call("\n".join(f"{name}={value}" for name, value in call.items()), length, refused=False))


def refuse(comm: Comm, error: Exception) -> None:
    """Tell the others, who are about to agree, that this rank will not go on because of ``error``, which it raises.

    The others raise a DisagreementError that says so, instead of waiting for this rank.
    """
    try:
        _compare(comm, _Call(f"{type(error).__name__}: {error}", 0, refused=True))
    except DisagreementError:
        return


def _compare(comm: Comm, own: _Call) -> list[int]:
    if comm.size == 1:
        return [own.length]
    encoded = own.text.encode()
    header = [own.refused, own.length, len(encoded), *own.digest()]
    headers = _from_all(comm, header)
    lengths = [length for _, length, *_ in headers]
    digests = [digest for _, _, _, *digest in headers]
    if all(digest == digests[0] for digest in digests) and not any(refused for refused, *_ in headers):
        return lengths
    longest = max(size for _, _, size, *_ in headers)
    texts = [
        bytes(text[:size]).decode()
        for text, (_, _, size, *_) in zip(_from_all(comm, [*encoded.ljust(longest)]), headers, strict=True)
    ]
    raise DisagreementError(_difference(texts, [bool(refused) for refused, *_ in headers]))


def _from_all(comm: Comm, numbers: list[int]) -> list[list[int]]:
    """The same amount of numbers from every rank."""
    own = torch.tensor(numbers, dtype=torch.int64, device=comm.device)
    counts = [len(numbers)] * comm.size
    all_of_them = torch.empty(comm.size * len(numbers), dtype=torch.int64, device=comm.device)
    comm.exchange(all_of_them, own.repeat(comm.size), counts, counts, _AGREEMENT).wait()
    return [part.tolist() for part in all_of_them.split(len(numbers))]


def _difference(texts: list[str], refused: list[bool]) -> str:
    """What the ranks differ in, told the same on every rank."""
    if any(refused):
        reasons = [f"rank {rank} refused its arguments: {text}" for rank, text in enumerate(texts) if refused[rank]]
        return "; ".join(reasons)
    calls = [dict(line.split("=", 1) for line in text.split("\n")) for text in texts]
    names = list(dict.fromkeys(name for call in calls for name in call))
    found = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks_of.setdefault(call.get(name, "nothing"), []).append(rank)
        if len(ranks_of) > 1:
            # The value of most ranks first: the last ones are who differs.
            values = sorted(ranks_of.items(), key=lambda item: (-len(item[1]), item[1]))
            shown = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values)
            found.append(f"{name} is {shown}")
    return f"the ranks were called with different arguments: {'; '.join(found)}"


def _ranks(ranks: list[int]) -> str:
    """``rank 2``, ``ranks 0, 1 and 3``, ``ranks 0-5 and 7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    if len(ranks) == 1:
        return f"rank {words[0]}"
    return f"ranks {words[0]}" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]}"
