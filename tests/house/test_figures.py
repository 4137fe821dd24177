"""Every picture in the documentation is what its drawing makes, and shows what it says it shows."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
sys.path.insert(0, str(FIGURES))

import backward  # noqa: E402  docs/figures is no package
import branches  # noqa: E402
import drawings  # noqa: E402
import layout_algebra  # noqa: E402
import layout_rectangles  # noqa: E402
import merging  # noqa: E402
import pool_life  # noqa: E402
import pool_streams  # noqa: E402
import ring_rows  # noqa: E402
import ring_traffic  # noqa: E402
import three_steps  # noqa: E402

from dilated_core import attention_map, reference  # noqa: E402

# ------------------------------------------------------------------------------------------------ the files


def test_docs_have_the_pictures_that_are_drawn_and_no_others() -> None:
    assert drawings.differences(list(drawings.drawings())) == []


def test_drawing_twice_writes_the_same_bytes_whatever_the_users_settings(tmp_path: Path) -> None:
    (path,) = drawings.drawings()["merging"](tmp_path)
    first = path.read_bytes()
    with matplotlib.rc_context({"font.family": "monospace", "lines.linewidth": 5.0, "axes.grid": True}):
        drawings.drawings()["merging"](tmp_path)
    assert path.read_bytes() == first


@pytest.fixture
def lone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose only drawing is "merging", with that picture in its docs."""
    monkeypatch.setattr(drawings, "ROOT", tmp_path)
    monkeypatch.setattr(drawings, "COMPUTED", ("merging",))
    monkeypatch.setattr(drawings, "RECORDS", ())
    (path,) = drawings.drawings()["merging"](tmp_path)
    assert drawings.differences(["merging"]) == []
    return path


def test_check_names_a_picture_that_is_not_in_docs(lone: Path) -> None:
    lone.unlink()
    assert drawings.differences(["merging"]) == ["docs/how-it-works/pictures/merging.svg: not in docs; draw it"]


def test_check_names_a_picture_that_nothing_draws(lone: Path) -> None:
    lone.with_name("stray.png").write_bytes(b"")
    assert drawings.differences(["merging"]) == ["docs/how-it-works/pictures/stray.png: nothing draws it"]


def test_check_names_a_picture_of_another_size(lone: Path) -> None:
    width, _ = drawings.size(lone)
    lone.write_text(lone.read_text().replace(f'width="{width}"', 'width="12pt"', 1))
    (found,) = drawings.differences(["merging"])
    assert "12pt" in found
    assert width in found


def test_check_names_a_picture_that_was_touched(lone: Path) -> None:
    lone.write_text(lone.read_text() + "<!-- -->")
    assert drawings.differences(["merging"]) == [
        "docs/how-it-works/pictures/merging.svg: not what is drawn now; draw it again"
    ]


def test_check_does_not_compare_bytes_of_another_matplotlib(lone: Path) -> None:
    lone.write_text(lone.read_text().replace(drawings.maker(lone), "Matplotlib v0.1") + "<!-- -->")
    assert drawings.differences(["merging"]) == []


# ------------------------------------------------------------------------------------------------ what they show


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_branches_are_those_of_the_definition(is_causal: bool) -> None:
    pattern, sizes = branches.PATTERN, (branches.TOKENS, branches.HEADS)
    drawn = branches.by_branch(is_causal=is_causal)
    for table, length, rate in zip(drawn, pattern.segment_lengths, pattern.dilation_rates, strict=True):
        assert torch.equal(table, reference.multiplicity(*sizes, [length], [rate], is_causal=is_causal))
    together = reference.multiplicity(*sizes, pattern.segment_lengths, pattern.dilation_rates, is_causal=is_causal)
    assert torch.equal(torch.stack(drawn).sum(0), together)
    assert together.unique().tolist() == [0, 1, 2, 3]


def test_the_three_steps_end_in_the_weights_of_the_whole_pattern() -> None:
    found, pattern, tokens = three_steps.steps(), three_steps.PATTERN, three_steps.TOKENS
    query, key = three_steps.query_and_key()
    whole = attention_map(query, key, pattern.segment_lengths, pattern.dilation_rates, rows=[three_steps.ROW])
    torch.testing.assert_close(found.merged.out[0, 0, 0], whole.per_head.to_dense()[0, 0, 0], rtol=0, atol=1e-15)
    counts = reference.multiplicity(tokens, 1, pattern.segment_lengths, pattern.dilation_rates)[0]
    assert torch.equal(torch.stack(found.tiles).sum(0), counts)


def test_merged_weights_are_one_softmax() -> None:
    found = merging.weights()
    scores = torch.tensor(merging.SCORES, dtype=torch.float64)
    torch.testing.assert_close(found.merged.out[0, 0, 0], torch.softmax(scores, 0), rtol=0, atol=1e-15)
    torch.testing.assert_close(found.joint.out, found.merged.out, rtol=0, atol=1e-15)
    assert found.merged.lse.item() == pytest.approx(torch.logsumexp(scores, 0).item(), abs=1e-14)
    factors = [math.exp(partial.lse.item() - found.merged.lse.item()) for partial in found.partials]
    assert sum(factors) == pytest.approx(1.0, abs=1e-14)


def test_only_the_merged_out_and_lse_give_the_exact_gradient() -> None:
    merged, constant, own = backward.run().errors.values()
    assert max(merged) < backward.EXACT
    dq, dk, dv = constant
    assert min(dq, dk) > 0.1
    assert dv < backward.EXACT
    assert min(own) > 0.1


def test_gathered_rows_are_the_keys_that_the_ranks_queries_meet() -> None:
    low, high = ring_rows.plan("gather").bounds[ring_rows.RANK : ring_rows.RANK + 2]
    grid = ring_rows.grid()
    queries = {(head, position // ring_rows.SEGMENT) for head, position in grid if low <= position < high}
    needed = {
        (head, position)
        for head, position in grid
        if not low <= position < high and (head, position // ring_rows.SEGMENT) in queries
    }
    assert ring_rows.travelling("gather") == needed


def test_by_heads_rows_of_some_heads_come_and_all_are_attended_somewhere() -> None:
    come = ring_rows.travelling("heads")
    assert come < ring_rows.travelling("gather")
    assert all(row in ring_rows.grid() for row in come)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_traffic_adds_up_to_what_the_plan_says_of_each_rank(exchange: str) -> None:
    columns = [sum(column) for column in zip(*ring_traffic.planned(exchange), strict=True)]
    received = ring_traffic.plan(exchange).bytes(ring_traffic.DTYPE, ring_traffic.HEAD_DIM)
    assert columns == [received.of(rank) for rank in range(ring_traffic.RANKS)]


def test_a_dense_ring_sends_every_key_and_value_past_every_rank() -> None:
    shard = ring_traffic.TOKENS // ring_traffic.RANKS * ring_traffic.HEADS * ring_traffic.HEAD_DIM
    nbytes = (ring_traffic.RANKS - 1) * 2 * shard * ring_traffic.DTYPE.itemsize
    sent = ring_traffic.dense_ring()
    for rank, line in enumerate(sent):
        assert {peer: size for peer, size in enumerate(line) if size} == {(rank + 1) % ring_traffic.RANKS: nbytes}


def test_a_span_is_queued_when_its_last_owner_dies_and_free_at_the_next_call() -> None:
    moments = {moment.code: moment for moment in pool_life.moments()}
    for moment in moments.values():
        assert sum(span.size for span in moment.spans) in (0, pool_life.ARENA)
    states = {code: [span.state for span in moment.spans] for code, moment in moments.items()}
    assert states["view = b[:10]; del b"] == ["used", "used", "used", "free"]
    assert states["del view"] == ["used", "queued", "used", "free"]
    assert moments["del view"].events == ()
    assert moments["d = empty(2)"].events == ("free", "allocate")
    assert states["d = empty(2)"] == ["used", "used", "free", "used", "free"]
    assert states["del a, d; any call"] == ["free", "used", "free"]
    assert states["del c; any call"] == ["free"]
    assert states["pool.trim()"] == []


def test_memory_read_on_another_stream_waits_for_that_read() -> None:
    found = pool_streams.timeline()
    read = next(work for work in found.work if work.name == "read x")
    states, owners = found.memory[0], found.owners[0]
    died = found.calls.index("del x")
    assert states[died : read.done] == ["waiting"] * (read.done - died)
    assert owners[died : read.done] == [""] * (read.done - died)
    assert owners[-1] == "z"
    assert found.owners[1][died + 1] == "y"


def test_layouts_are_the_sets_that_their_operators_say() -> None:
    panels = {panel.name: panel.layout for panel in layout_algebra.panels()}
    a, b, c = (panels[name].to_dense()[0] for name in "ABC")
    blocks = torch.arange(layout_algebra.TOKENS) // layout_algebra.BLOCK
    assert torch.equal(panels["A | B"].to_dense()[0], a | b)
    assert torch.equal(c, (a | b) & (blocks[:, None] >= blocks))
    assert panels["C"] == panels["A | B"].causal()
    assert torch.equal(panels["C − A"].to_dense()[0], c & ~a)
    assert torch.equal(panels["(C − A).T"].to_dense()[0], (c & ~a).T)
    for layout in panels.values():
        assert layout.density == pytest.approx(layout.to_dense().double().mean().item())


@pytest.mark.parametrize("panel", layout_rectangles.panels(), ids=lambda panel: panel.title.replace(" ", "-"))
def test_rectangles_join_each_pair_of_the_layout_once(panel: layout_rectangles.Panel) -> None:
    wanted = panel.layout.to_dense()[0].int()
    assert torch.equal(layout_rectangles.attended(panel), wanted.tril() if panel.is_causal else wanted)


# ------------------------------------------------------------------------------------------------ what is said of them


def page(name: str) -> str:
    """The text of a page of how-it-works, on one line: alternative texts are folded."""
    return " ".join((FIGURES.parent / "how-it-works" / f"{name}.md").read_text(encoding="utf-8").split())


def test_alternative_texts_give_the_numbers_of_merging() -> None:
    found = merging.weights()
    first, second = (partial.lse.item() for partial in found.partials)
    shares = [math.exp(lse - found.merged.lse.item()) for lse in (first, second)]
    text = page("attention")
    assert f"over keys 0 to 4 with lse {first:.3f} and over keys 5 to 7 with lse {second:.3f}" in text
    assert "times {:.3f} and times {:.3f}".format(*shares) in text


def test_alternative_texts_give_the_errors_of_backwards() -> None:
    _, constant, own = backward.run().errors.values()
    text = page("backward")
    assert f"constant mixing weights {constant[0]:.2f} and {constant[1]:.2f} for dq and dk" in text
    assert f"own out and lse {min(own):.2f} to {max(own):.2f}" in text


def test_alternative_texts_give_the_bytes_between_ranks() -> None:
    gather, heads = (round(ring_traffic.planned(exchange)[0][1] / 1024) for exchange in ("gather", "heads"))
    ring = ring_traffic.dense_ring()[0][1] // 1024
    text = page("ring")
    assert f"by gather, {gather} KiB between any two" in text
    assert f"by heads, {heads} KiB between any two" in text
    assert f"A dense ring, {ring} KiB from each rank" in text


def test_alternative_texts_give_densities_and_rectangles() -> None:
    text = page("layouts")
    for panel in layout_algebra.panels():
        assert f"{panel.layout.density:.2f}" in text
    for panel in layout_rectangles.panels():
        live = (panel.layout.causal() if panel.is_causal else panel.layout).live
        pieces = panel.pieces()
        calls = 1 + max(piece.call for piece in pieces)
        assert f"{live} blocks in {len(pieces)} rectangles and {calls} call" in text
