"""The types by their names, and the examples: on many processes, by torchrun, and with a rank that is killed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO

import processes
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from dilated_factory import LongNetLM, create_dilated_attention, create_multihead_dilated_attention
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.modules import RingDilatedAttention, RingMultiheadDilatedAttention

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAIN, SLIDE = EXAMPLES / "train_longnet.py", EXAMPLES / "encode_slide.py"
SECONDS = 480  # for a run, on a slow and busy machine; then it is killed

# As the last line of a traceback; torch puts the rank before it.
PEER_ERROR = r"^(\[rank\d\]: )?dilated_ring\.errors\.PeerError: rank \d of [24], exchanging"

# Segments that cross shards, of a length that no number of ranks divides.
SMALL = (
    *("--context", "97", "--embed-dim", "16", "--layers", "2", "--dtype", "float64", "--timeout", "400"),
    *("--segment-lengths", "16", "40", "128", "--dilation-rates", "1", "3", "4"),
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path: with the metadata that a source tree lacks, empty where it is installed."""
    folder = tmp_path_factory.mktemp("site")
    if not importlib.metadata.entry_points(group="dilated.attention", name="ring"):
        pyproject = (EXAMPLES.parent / "pyproject.toml").read_text()
        found = re.search(
            r'^\[project\.entry-points\."(dilated\.attention)"\]\n((?:\w+ = ".+"\n)+)', pyproject, re.MULTILINE
        )
        assert found is not None
        info = folder / "dilated_ring-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dilated-ring\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[{found[1]}]\n{found[2]}".replace('"', ""))
    return folder


@pytest.fixture(scope="session")
def environment(site: Path) -> dict[str, str]:
    """Of the processes."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(site)]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------- types by name


@pytest.mark.parametrize("name", ["ring", "distributed"])
def test_the_factory_finds_the_types(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))

    def work(comm: Comm) -> None:
        bounds = (0, 11, 20, 33)
        attention = create_dilated_attention(name, [8, 32], [1, 3], group=comm, verify=False, bounds=bounds)
        assert type(attention) is RingDilatedAttention
        assert attention.decision.attention_type == name
        assert attention.bounds == bounds
        multihead = create_multihead_dilated_attention(name, 16, 4, [8, 32], [1, 3], group=comm, kv_heads=2)
        assert type(multihead) is RingMultiheadDilatedAttention
        shard = torch.randn(2, bounds[comm.rank + 1] - bounds[comm.rank], 16)
        assert multihead(shard)[0].shape == shard.shape

    run_ranks(3, work)


def test_a_misspelt_option_is_told_with_those_that_there_are(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(TypeError, match=r"grop: .* no such option, only .*group, bounds, exchange, refetch, verify"):
        create_dilated_attention("ring", [8], [1], grop=None)


@pytest.mark.parametrize("positions", ["xpos", "rotary", "none"])
def test_a_language_model_over_shards_is_the_whole_one(
    positions: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, and the gradient of every parameter, summed over the ranks."""
    monkeypatch.syspath_prepend(str(site))

    def make(**options: object) -> LongNetLM:
        sizes = (50, 16, 4, 2, [8, 24, 64], [1, 3, 4])
        return LongNetLM(*sizes, positions=positions, dtype=torch.float64, **options)

    whole = make()
    tokens = torch.randint(50, (2, 53))
    cotangent = torch.randn(2, 53, 50, dtype=torch.float64)

    def differentiate(model: LongNetLM, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(tokens[:, rows])
        names, parameters = zip(*model.named_parameters(), strict=True)
        return logits.detach(), dict(
            zip(names, torch.autograd.grad(logits, parameters, cotangent[:, rows]), strict=True)
        )

    def work(comm: Comm) -> tuple[Tensor, dict[str, Tensor]]:
        model = make(attention_type="ring", group=comm)
        model.load_state_dict(whole.state_dict())
        return differentiate(model, slice(*(0, 20, 31, 53)[comm.rank :][:2]))

    expected, gradients = differentiate(whole, slice(None))
    logits, shares = zip(*run_ranks(3, work), strict=True)
    # XPOS scales rows by where they lie in the longest sequence there can be, powers that round as they grow.
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-11)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(share[name] for share in shares), gradient, rtol=0, atol=1e-10, msg=name)


# ------------------------------------------------------------------------------------------- commands


def run(*command: str, environment: dict[str, str]) -> str:
    """What a command prints; it and all it starts are killed when it does not end in time."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=SECONDS)
    finally:
        # Also what a launcher left behind.
        if process.poll() is None or process.returncode:
            kill_session(process)
    assert process.returncode == 0, f"{printed}\n{errors}"
    return printed


def kill_session(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def torchrun(size: int, *command: str, environment: dict[str, str]) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
    return run(*launcher, *command, environment=environment)


@contextmanager
def group_of(size: int) -> Iterator[dict[str, str]]:
    """Where so many processes meet, by the environment: a store as torchrun has it, at a free port."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
    }


def steps(printed: str) -> dict[int, list[float]]:
    """Of each step, the loss and the norm of the gradients; with --compare, the single process's too."""
    lines = re.findall(
        r"^step (\d+): loss (\S+), gradient norm (\S+?)(?:; in one process (\S+), (\S+))?$", printed, re.MULTILINE
    )
    return {int(step): [float(number) for number in numbers if number] for step, *numbers in lines}


def run_example(rank: int, script: str, arguments: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    """As a launcher starts it, in a process that has imported torch already."""
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.argv = [script, *arguments]
    with (folder / f"{rank}.stdout").open("w") as stdout, redirect_stdout(stdout):
        runpy.run_path(script, run_name="__main__")


def run_forked(size: int, script: str, *arguments: str, environment: dict[str, str], folder: Path) -> str:
    """What rank 0 prints, of processes that need not import torch first: torchrun's would for seconds each."""
    with group_of(size) as meeting:
        work = (script, arguments, {**environment, **meeting}, folder)
        with processes.started(size, run_example, *work, tmp_path=folder, timeout=SECONDS) as running:
            for ending in running.wait(timeout=SECONDS):
                assert ending.exitcode == 0, ending.told
    return (folder / "0.stdout").read_text()


@pytest.mark.slow
def test_training_over_6_processes_is_training_in_one(environment: dict[str, str], tmp_path: Path) -> None:
    """Sequences over 3, FSDP2 over 2, two sequences a step: the same loss and gradients at every step."""
    arguments = (*SMALL, "--shards", "2", "--steps", "5", "--compare")
    printed = run_forked(6, str(TRAIN), *arguments, environment=environment, folder=tmp_path)
    found = steps(printed)
    assert list(found) == [1, 2, 3, 4, 5]
    for step, numbers in found.items():
        # An optimizer like AdamW forgives gradients that are a multiple of what they should be: their norm does not.
        assert numbers[:2] == pytest.approx(numbers[2:], rel=1e-9), f"step {step}"


@pytest.mark.slow
def test_a_slide_over_3_processes_is_the_slide_in_one(environment: dict[str, str], tmp_path: Path) -> None:
    sizes = ("--tiles", "7001", "--layers", "2", "--embed-dim", "32", "--heads", "4")
    saved = tmp_path / "embedding.pt"
    options = (*sizes, "--compare", "--output", str(saved))
    printed = run_forked(3, str(SLIDE), *options, environment=environment, folder=tmp_path)
    assert "7,001 tiles over 3 processes: 2,334 here" in printed
    difference = re.search(r"differs by (\S+) of", printed)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    assert torch.load(saved, weights_only=True).shape == (1, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shards", "2"), "--shards: expected a divisor of the 1 ranks, got 2"),
        (("--resume",), "--resume: expected --checkpoints"),
        (("--resume", "--compare", "--checkpoints", "runs"), "--compare: expected no --resume"),
    ],
)
def test_options_that_do_not_fit_are_told(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = runpy.run_path(str(TRAIN))["parse"]
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *options])
    with pytest.raises(SystemExit):
        parse()
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- a killed rank


class Ranks:
    """Processes that the test starts itself: a launcher would end the survivors before they tell what they saw."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def wait_for(self, line: str) -> str:
        """Read what rank 0 prints up to a line that starts so."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        read = ""
        while not read.splitlines()[-1:] or not read.splitlines()[-1].startswith(line):
            more = stdout.readline()
            assert more, f"rank 0 ended before {line!r}:\n{read}"
            read += more
        return read

    def read_on(self) -> None:
        """Let rank 0 print what it still has to, up to its end."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        stdout.read()


@contextmanager
def started(size: int, *command: str, environment: dict[str, str], folder: Path) -> Iterator[Ranks]:
    """Start the ranks of one group; after SECONDS, and when the block ends, kill them."""
    files: list[IO[str]] = [(folder / f"{rank}.stderr").open("w") for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=files[rank],
            text=True,
            # They can go no further than what fits in here is read: a test that is held up does not make them train on.
            pipesize=4096,
        )
        for rank in range(size)
    ]

    def kill() -> None:
        for process in ranks:
            process.kill()

    timer = threading.Timer(SECONDS, kill)
    timer.start()
    try:
        yield Ranks(ranks)
    finally:
        timer.cancel()
        kill()
        for process, file in zip(ranks, files, strict=True):
            process.wait()
            file.close()
            if process.stdout is not None:
                process.stdout.close()


@pytest.mark.slow
def test_a_run_with_a_killed_rank_goes_on_from_its_checkpoint(environment: dict[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    keeping = (*SMALL, "--checkpoints", str(kept), "--every", "2")
    endless = (*keeping, "--shards", "2", "--steps", "1000000")
    with (
        group_of(4) as meeting,
        started(4, str(TRAIN), *endless, environment={**environment, **meeting}, folder=tmp_path) as ranks,
    ):
        before = steps(ranks.wait_for("step 3:"))
        ranks.processes[3].kill()
        ranks.read_on()
        for rank in range(3):
            assert ranks.processes[rank].wait(SECONDS) == 1
            told = (tmp_path / f"{rank}.stderr").read_text()
            assert re.search(PEER_ERROR, told, re.MULTILINE), told

    done = max(int(path.parent.name.removeprefix("step-")) for path in kept.glob("*/.metadata"))
    assert done >= 2
    (kept / f"step-{done + 2:08}").mkdir(exist_ok=True)  # as a rank leaves it that is killed while it writes
    more = ("--steps", str(done + 3))
    # On other processes than it was stopped on: over 2 instead of 2 x 2.
    resumed = torchrun(2, str(TRAIN), *keeping, *more, "--resume", environment=environment)
    assert f"{done} steps done" in resumed
    uninterrupted = steps(run_forked(1, str(TRAIN), *SMALL, *more, environment=environment, folder=tmp_path))
    after = steps(resumed)
    assert list(after) == [done + 1, done + 2, done + 3]
    for step, numbers in {**before, **after}.items():
        assert numbers == pytest.approx(uninterrupted[step], rel=1e-9), f"step {step}"
