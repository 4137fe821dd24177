"""One command, for so long at most, with all that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Seconds for what was interrupted to write what it has.
LAST_WORDS = 20.0


def run_for(
    seconds: float, command: Sequence[str], folder: Path, environment: Mapping[str, str], last_words: float = LAST_WORDS
) -> int | None:
    """The command's exit status; None where its time was up: it was interrupted as by Ctrl-C, and could still write."""
    print(f"\n==> {' '.join(command)}    (at most {seconds:.0f} s)", flush=True)
    # A session of its own, so that what it starts ends with it.
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(last_words)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # whatever it left running
                os.killpg(process.pid, signal.SIGKILL)
