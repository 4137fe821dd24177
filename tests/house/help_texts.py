"""Ask many scripts and modules for their --help at once: torch is imported one time, and each answer is a fork's.

    python help_texts.py '[["script", "packages/ring/benchmarks/bench_ranks.py"], ["module", "pytest"]]'

prints a JSON list of the same length: what each one printed, from the repository's root.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import tempfile
import warnings
from pathlib import Path

SECONDS = 120  # for one answer, on a slow and busy machine; a program that takes longer does more than to answer


def answer(kind: str, target: str, *arguments: str) -> str:
    """What `python TARGET ARGUMENTS --help` (or `python -m TARGET ...`) prints, run inside this process."""
    printed = io.StringIO()
    sys.argv = [target, *arguments, "--help"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            if kind == "module":
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                folder = target if Path(target).is_dir() else str(Path(target).parent)
                sys.path.insert(0, str(Path(folder).resolve()))
                runpy.run_path(target, run_name="__main__")
        except SystemExit as end:
            if end.code not in (0, None):
                raise RuntimeError(f"{sys.argv} ended with {end.code}: {printed.getvalue()}") from end
    return printed.getvalue()


def main(questions: list[list[str]]) -> list[str]:
    """Answer each question in a fork, so that none sees what another imported."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  what nearly every script imports first

    answers = []
    for question in questions:
        with tempfile.TemporaryFile("w+") as paper:
            sys.stdout.flush()
            if (child := os.fork()) == 0:
                signal.alarm(SECONDS)
                status = 1
                with contextlib.suppress(BaseException):
                    try:
                        paper.write(answer(*question))
                    except BaseException as error:
                        paper.write(f"NO ANSWER: {error!r}")
                    paper.flush()
                    status = 0
                os._exit(status)
            _, status = os.waitpid(child, 0)
            paper.seek(0)
            answers.append(f"NO ANSWER: wait status {status}" if status else paper.read())
    return answers


if __name__ == "__main__":
    # Nothing here uses torch's threads before or after the fork.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    json.dump(main(json.loads(sys.argv[1])), sys.stdout)
