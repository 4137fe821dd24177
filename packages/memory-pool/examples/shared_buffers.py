"""Check many files with few buffers: one thread reads chunks into blocks of a pool, others hash them.

    python shared_buffers.py FILE...

Nothing but the standard library and the pool is imported. Nobody returns a block: the memory is used again when the
last thread has let go of it, however large the files are.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dilated_memory_pool import MemoryPool

CHUNK_BYTES = 2**20
THREADS = 4


def read_chunks(pool: MemoryPool, path: Path) -> Iterator[memoryview]:
    """The file's chunks, each in a block of its own that lives as long as the view."""
    with path.open("rb", buffering=0) as file:
        while True:
            view = memoryview(pool.allocate(CHUNK_BYTES)).cast("B")
            count = file.readinto(view)
            if not count:
                return
            yield view[:count]


def digest(chunk: memoryview) -> bytes:
    """Its SHA-256. Python lets go of the GIL meanwhile."""
    return hashlib.sha256(chunk).digest()


def check(pool: MemoryPool, path: Path, threads: ThreadPoolExecutor) -> str:
    """SHA-256 of the SHA-256s of the file's chunks, in hexadecimal digits."""
    whole = hashlib.sha256()
    pending: deque[Future[bytes]] = deque()
    for chunk in read_chunks(pool, path):
        pending.append(threads.submit(digest, chunk))
        if len(pending) == THREADS:  # so that the reader does not run ahead
            whole.update(pending.popleft().result())
    for future in pending:
        whole.update(future.result())
    return whole.hexdigest()


def main(paths: Iterable[str]) -> None:
    """Print a line for every file, and what the pool did."""
    pool = MemoryPool("host")
    with ThreadPoolExecutor(THREADS) as threads:
        for path in paths:
            print(check(pool, Path(path), threads), path)
    numbers = pool.statistics()
    print(f"{numbers.hits + numbers.misses} blocks were the memory of {numbers.misses}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
