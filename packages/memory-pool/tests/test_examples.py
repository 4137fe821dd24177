"""The examples do what they say, each in an interpreter of its own."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
CHUNK_BYTES = 2**20
THREADS = 4
SIZES = (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 20 * CHUNK_BYTES + 12345)

# Blocks the optional packages before it runs the script as a program.
RUN_ALONE = """
import runpy, sys
for name in ("torch", "numpy", "cupy", "matplotlib"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def expected(content: bytes) -> str:
    chunks = (content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES))
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


def test_shared_buffers_hashes_files_with_the_standard_library_alone(tmp_path: Path) -> None:
    source = random.Random(0)
    files = {tmp_path / f"{size}.bin": source.randbytes(size) for size in SIZES}
    for path, content in files.items():
        path.write_bytes(content)
    arguments = [EXAMPLES / "shared_buffers.py", *files]
    result = subprocess.run([sys.executable, "-c", RUN_ALONE, *arguments], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{expected(content)} {path}" for path, content in files.items()]
    blocks, *_, arenas = result.stderr.split()
    assert int(blocks) == sum(-(-size // CHUNK_BYTES) + 1 for size in SIZES)  # one finds the end of the file
    assert int(arenas) <= 2 * THREADS + 1  # at work, waiting for a thread to forget them, and being read
