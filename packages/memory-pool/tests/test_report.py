"""Reports: a pool as text, pictures and plain data."""

from __future__ import annotations

import builtins
import json
import sys
from dataclasses import replace

import pytest

from dilated_memory_pool import ArenaSnapshot, MemoryPool, PoolSnapshot, PoolStatistics, SpanSnapshot
from dilated_memory_pool.observers import JsonLinesLog
from dilated_memory_pool.report import picture, table, timeline, to_json

MIB = 2**20

NUMBERS = PoolStatistics(
    requested_bytes=31 * MIB,
    allocated_bytes=40 * MIB,
    reserved_bytes=80 * MIB,
    waiting_bytes=8 * MIB,
    largest_free_bytes=32 * MIB,
    peak_requested_bytes=50 * MIB,
    peak_allocated_bytes=56 * MIB,
    peak_reserved_bytes=96 * MIB,
    hits=7,
    misses=3,
    bypasses=5,
    trims=1,
    ooms=2,
    limit_bytes=2 * 1024 * MIB,
)
SNAPSHOT = PoolSnapshot(
    backend="cupy",
    device="cuda:0",
    mode="full",
    reasons=("backend: cupy, as asked", "NUMA: off, arenas belong to streams of a device"),
    statistics=NUMBERS,
    arenas=(
        ArenaSnapshot(
            0x7F0000000000,
            48 * MIB,
            "0",
            (
                SpanSnapshot(0, 24 * MIB, 18 * MIB, "used"),
                SpanSnapshot(24 * MIB, 8 * MIB, 6 * MIB, "waiting"),
                SpanSnapshot(32 * MIB, 7 * MIB, 0, "free"),
                SpanSnapshot(39 * MIB, MIB // 4, MIB // 4, "used"),
                SpanSnapshot(39 * MIB + MIB // 4, 8 * MIB + 3 * MIB // 4, 0, "free"),
            ),
        ),
        ArenaSnapshot(0x7F0010000000, 32 * MIB, "94023", (SpanSnapshot(0, 32 * MIB, 0, "free"),)),
    ),
)

TABLE = """\
memory pool: cupy on cuda:0, full mode
  backend: cupy, as asked
  NUMA: off, arenas belong to streams of a device

bytes              now        peak
requested       31 MiB      50 MiB
allocated       40 MiB      56 MiB  waste 22.5%
reserved        80 MiB      96 MiB  limit 2 GiB
waiting          8 MiB
free            40 MiB              largest 32 MiB, fragmentation 20.0%

requests: 10 served, 70.0% of them from memory at hand; 5 left to PyTorch; 2 refused; 1 arenas given back

arena                bytes  locality  # used  + in part  ~ waiting  . free               used
0x7f0000000000      48 MiB  0         |########################~~~~~~~~.......+........|  67%
0x7f0010000000      32 MiB  94023     |................................................|   0%"""


def test_a_table_has_the_numbers_the_reasons_and_a_line_for_every_arena():
    assert table(SNAPSHOT) == TABLE


def test_a_pool_without_arenas_has_a_table_that_says_so():
    lines = table(MemoryPool("host", mode="lightweight")).splitlines()
    assert lines[0] == "memory pool: host on cpu, lightweight mode"
    assert lines[-1] == "no arenas"
    assert "reserved           0 B         0 B  no limit" in lines


def test_a_table_of_a_pool_is_that_of_its_snapshot():
    pool = MemoryPool("host", mode="full")
    blocks = [pool.allocate(n * MIB) for n in range(1, 9)]
    del blocks[::2]
    snapshot = pool.snapshot()
    assert table(pool) == table(snapshot)
    assert "locality" not in table(snapshot) or snapshot.arenas[0].locality is not None


@pytest.mark.parametrize("count", [1, 3, 47, 48, 49, 1000])
def test_bars_share_out_any_number_of_spans(count):
    spans = tuple(
        SpanSnapshot(index * 4096, 4096, 4096 * (index % 2), ("free", "used")[index % 2]) for index in range(count)
    )
    snapshot = replace(SNAPSHOT, arenas=(ArenaSnapshot(0, count * 4096, None, spans),))
    bar = table(snapshot).splitlines()[-1].split("|")[1]
    assert len(bar) == 48
    assert ("+" in bar or "#" in bar) == (count > 1)


def test_plain_data_goes_through_json_unchanged():
    plain = to_json(SNAPSHOT)
    assert json.loads(json.dumps(plain)) == plain
    assert sorted(plain) == ["arenas", "backend", "device", "mode", "reasons", "statistics"]
    assert plain["statistics"]["limit_bytes"] == 2**31
    assert plain["arenas"][1] == {
        "address": "0x7f0010000000",
        "nbytes": 32 * MIB,
        "locality": "94023",
        "spans": [{"offset": 0, "nbytes": 32 * MIB, "requested": 0, "state": "free"}],
    }


@pytest.mark.parametrize("report", [table, to_json, lambda pool: picture(pool, "never.png")])
def test_what_is_no_pool_is_refused(report):
    with pytest.raises(TypeError, match="pool: expected a MemoryPool or a PoolSnapshot, got dict"):
        report({})


# -------------------------------------------------------------------------------------------------- pictures

USED, WAITING, WASTED, FREE = "#0072b2", "#e69f00", "#9ecae8", "#ececec"


def pixels(path):
    """A PNG as an array of (height, width, 3) bytes."""
    image = pytest.importorskip("matplotlib.image").imread(path)
    return (image[..., :3] * 255).round().astype("uint8")


def has(image, colour):
    """How many pixels are exactly of a colour."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((image == wanted).all(axis=-1).sum())


def test_a_picture_shows_every_state_in_its_colour_and_share(tmp_path):
    pytest.importorskip("matplotlib")
    picture(SNAPSHOT, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = pixels(tmp_path / "map.png")
    assert image.shape == (220, 1200, 3)
    used, waiting, wasted, free = (has(image, colour) for colour in (USED, WAITING, WASTED, FREE))
    assert 18 / 6.3 < used / waiting * 8 / 6 < 18 / 5.7
    assert wasted > 500
    assert 47.75 / 18.25 * 0.9 < free / used < 47.75 / 18.25 * 1.1


def test_a_state_that_is_not_there_is_in_the_legend_alone(tmp_path):
    pytest.importorskip("matplotlib")
    picture(SNAPSHOT, tmp_path / "with.png")
    without = replace(SNAPSHOT, arenas=SNAPSHOT.arenas[1:])
    picture(without, tmp_path / "without.png")
    for colour in (USED, WAITING):
        assert 0 < has(pixels(tmp_path / "without.png"), colour) < 300 < has(pixels(tmp_path / "with.png"), colour)


@pytest.mark.parametrize(("arenas", "height"), [(0, 220), (1, 220), (10, 460), (200, 1560)])
def test_a_picture_grows_with_its_arenas_up_to_a_limit(tmp_path, arenas, height):
    pytest.importorskip("matplotlib")
    many = tuple(replace(SNAPSHOT.arenas[0], address=0x7F0000000000 + index * 2**30) for index in range(arenas))
    picture(replace(SNAPSHOT, arenas=many), tmp_path / "map.png")
    found, width, _ = pixels(tmp_path / "map.png").shape
    assert width == 1200
    assert found in (height - 1, height)  # older releases of matplotlib round down


def test_pictures_leave_matplotlibs_global_state_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    settings = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    picture(SNAPSHOT, tmp_path / "map.png")
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_a_picture_of_a_pool(tmp_path):
    pytest.importorskip("matplotlib")
    pool = MemoryPool("host", mode="full", size_classes=["4MiB"])
    block = pool.allocate("2MiB")
    picture(pool, tmp_path / "map.png")
    assert has(pixels(tmp_path / "map.png"), USED) > 300
    assert block.nbytes == 2 * MIB


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    import_ = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "dilated-memory-pool\[report\]"'):
        picture(SNAPSHOT, tmp_path / "map.png")
    assert table(SNAPSHOT) == TABLE


def test_a_timeline_shows_what_was_allocated_reserved_and_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with JsonLinesLog(tmp_path / "log") as log:
        pool = MemoryPool("host", mode="full", observers=[log], limit="4MiB", arena_bytes="1MiB")
        kept = pool.allocate("2MiB")
        for _ in range(10):
            pool.allocate("1MiB")
        with pytest.raises(MemoryError):
            pool.allocate("8MiB")
    timeline(tmp_path / "log", tmp_path / "time.png")
    image = pixels(tmp_path / "time.png")
    assert image.shape == (450, 1200, 3)
    assert has(image, USED) > 100_000
    assert has(image, "#d55e00") > 20
    assert kept.nbytes == 2 * MIB


def test_a_timeline_of_nothing_is_empty(tmp_path):
    pytest.importorskip("matplotlib")
    JsonLinesLog(tmp_path / "log").close()
    timeline(tmp_path / "log", tmp_path / "time.png")
    assert pixels(tmp_path / "time.png").shape == (450, 1200, 3)
