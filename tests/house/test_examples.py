"""The examples that need more than one package, or that no package's own tests start, as a reader runs them."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from dilated_factory import LongNetLM
from dilated_factory.demo.training import Precision, Windows
from dilated_pattern_cache import PatternCache
from dilated_pattern_cache.persistence import CacheFileError, load

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "packages" / "pattern-cache" / "examples" / "web_service.py"
SECONDS = 300  # for any answer of another process, on a slow and busy machine
sys.path.insert(0, str(ROOT / "examples"))

import train_64k  # noqa: E402
import train_64k_measures  # noqa: E402

SMALL = ("--context", "512", "--embed-dim", "32", "--layers", "2", "--sample", "20")
FLOAT32 = Precision("float32", {}, "cpu")


def small(*command: str) -> argparse.Namespace:
    return train_64k.parse([*SMALL, *command])


# ------------------------------------------------------------------------------------------------ train_64k.py


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and on a busy machine threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run over this machine's Python sources, as long as a test can wait: its folder and its record."""
    folder = tmp_path_factory.mktemp("train-64k")
    return folder, train_64k.run(small("--steps", "40", "--output", str(folder)))


def test_the_default_is_65536_bytes_of_context_and_ten_minutes() -> None:
    arguments = train_64k.parse([])
    settings = train_64k.make_settings(arguments)
    assert (arguments.minutes, arguments.steps) == (10.0, None)
    assert settings.segment_lengths == (1024, 4096, 16384, 65536)
    assert settings.dilation_rates == (1, 4, 16, 64)
    model = train_64k.make_model(settings, torch.device("cpu"), seed=0, recompute=False)
    assert model.layers[0].self_attn.rotary.longest(torch.float32) >= 65536


def test_a_short_training_predicts_unseen_text_better_than_before(trained: tuple[Path, dict[str, Any]]) -> None:
    _, record = trained
    first, *_, last = [bits for _, _, bits in record["curve"]]
    assert last < first - 1.0
    assert record["held_out"] < 8.0
    assert [length for length, _, _ in record["steps"]] == sorted(length for length, _, _ in record["steps"])


def test_the_record_holds_what_was_checked_and_what_it_cost(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, record = trained
    assert len(record["checks"]) == 2
    assert all(check["deviation"] <= check["tolerance"] for check in record["checks"])
    assert record["activations"]["recomputed"]["peak_bytes"] < record["activations"]["kept"]["peak_bytes"]
    assert [given for given, _ in record["by_context"]] == [8, 32, 128, 512]
    assert json.loads((folder / "train_64k.json").read_text())["environment"]["torch"] == torch.__version__
    page = (folder / "train_64k.md").read_text()
    assert f"**{record['held_out']:.3f}**" in page
    assert f"{record['parameters']:,} parameters" in page
    assert page.splitlines()[-1].startswith(
        "Raw data: [train_64k.json](train_64k.json). Command, from the repository's"
    )


def test_the_saved_model_is_the_trained_one(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    model = LongNetLM.from_pretrained(folder / "model")
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_run_is_not_written_over(trained: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="--output: expected a folder without a run"):
        train_64k.run(small("--steps", "1", "--output", str(trained[0])))


def test_stopped_and_resumed_it_takes_the_steps_of_a_run_in_one_piece(tmp_path: Path) -> None:
    settings = train_64k.make_settings(small())
    text = Windows(Path(train_64k.__file__).read_bytes(), settings.context, torch.device("cpu"))

    def fresh(seed: int) -> Any:
        model = train_64k.make_model(settings, torch.device("cpu"), seed=seed, recompute=False)
        return train_64k.Training(model, settings, seed)

    whole, first, second = fresh(0), fresh(0), fresh(1)
    for step in range(6):
        whole.step(text, FLOAT32, step / 6)
    for step in range(3):
        first.step(text, FLOAT32, step / 6)
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    for step in range(3, 6):
        second.step(text, FLOAT32, step / 6)
    assert [bits for _, _, bits in second.steps] == [bits for _, _, bits in whole.steps]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_another_model_than_the_checkpoints_is_refused(trained: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"embed_dim: saved with 32, asked for 64"):
        train_64k.run(small("--embed-dim", "64", "--resume", "--steps", "50", "--output", str(trained[0])))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--context", "1000", "--context: expected a multiple of 64, got 1000"),
        ("--steps", "0", "--steps: expected a positive number, got 0"),
        ("--minutes", "0", "--minutes: expected a positive number, got 0.0"),
    ],
)
def test_sizes_that_make_no_run_are_refused(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_64k.parse([option, value])
    assert message in capsys.readouterr().err


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--resume: expected a checkpoint, found no "):
        train_64k.run(small("--resume", "--output", str(tmp_path)))


def test_attention_that_deviates_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(train_64k_measures.TOLERANCE, dtype, 1e-12)
    with pytest.raises(SystemExit, match="the attention deviates"):
        train_64k.run(small("--steps", "1", "--output", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_of_a_text_file_the_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(150) + b"the last ten")
    corpus = train_64k.read_text(path)
    assert corpus.training + corpus.held_out == path.read_bytes()
    assert len(corpus.held_out) == 162 // 16


# ------------------------------------------------------------------------------------------------ web_service.py


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The service in a process of its own, and its port."""
    command = [sys.executable, str(SERVICE), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = Timer(SECONDS, process.kill)  # after which nobody waits for it in vain
    watchdog.start()
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        yield process, int(first.split(",")[0].rpartition(":")[2])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        watchdog.cancel()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_fifty_clients_of_the_service_cost_one_computation_which_outlives_it(tmp_path: Path) -> None:
    warm = tmp_path / "answers.safetensors"
    with served("--warm", str(warm)) as (process, port):
        with ThreadPoolExecutor(50) as clients:
            answers = set(clients.map(lambda _: get(port, "/layout?blocks=2048&window=3"), range(50)))
        [(status, body)] = answers
        assert status == 200
        assert json.loads(body)[9] == [1, 5, 6, 7, 8, 9]
        assert get(port, "/layout?blocks=0")[0] == get(port, "/layout?blocks=many")[0] == 400
        assert get(port, "/")[0] == 404
        numbers = json.loads(get(port, "/cache")[1])
        assert (numbers["creations"], numbers["waits"] + numbers["hits"], numbers["entries"]) == (1, 49, 1)
        assert numbers["nbytes"] == len(body)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0

    kept: PatternCache[Any, bytes] = PatternCache()
    with pytest.raises(CacheFileError, match="tag"):
        load(kept, warm, tag="layout 2")
    load(kept, warm, tag="layout 1")
    assert kept["layout", 2048, 3] == body
