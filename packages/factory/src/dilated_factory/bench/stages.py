"""The "Phase 1 Comprehensive Performance Analysis": one attention a stage, from 1,024 to 32,768 tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dilated_core import kernels
from dilated_factory.bench import claims, subjects
from dilated_factory.bench.cases import Case, Report, Said, compared, not_run, row, too_long, whole
from dilated_factory.bench.measuring import Candidate, Measured, measured
from dilated_factory.bench.results import Row, Table
from dilated_factory.bench.subjects import Bench

NAME = "stages"
LENGTHS = (1024, 4096, 8192, 16384, 32768)
ABOUT = (
    "Speed against the baseline, and *memory left*: the peak over the baseline's. Rows marked *another function* are "
    "right by their own definition, and no speed-up of them is one of dilated attention."
)
NOTES = {
    1024: "The baseline is a correct composition of PyTorch's operations and not the code that the specification "
    "repaired, which attended across heads, mixed no tokens, and was timed without a check: its ratios cannot be ours.",
    4096: "As at 1,024 tokens. Improved attention gains by needing no partial results at full size, pools add little "
    "to it on a CPU; peaks of 0.0 MB in the specification were not measured, so that no reduction can be claimed.",
    8192: "As at 4,096 tokens. A ring of one rank does the work of improved attention; the one described attended "
    "inside each chunk only, which is less.",
    16384: "As at 8,192 tokens. The dense ring attends to all keys and so grows with the square of the length.",
    32768: "The specification's stages with pools end in errors at this length and ours run; its other ratio is to "
    "another baseline, as at 1,024 tokens.",
}
TABLES = tuple(Table(f"{n:,} tokens", f"{n:,} Tokens", ABOUT, NOTES[n]) for n in LENGTHS)


@dataclass(frozen=True)
class Stage:
    """One row of a table.

    Attributes:
        name: the specification's, and what it is here.
        type_name: of the attention.
        pool: options.
        said: length -> speed-up, or a word.
        other: the function that it computes, where that is another.
        kernel: its name, where it is not left to the type.
    """

    name: str
    type_name: str
    pool: dict[str, Any]
    said: dict[int, float | str]
    other: str = ""
    kernel: str = ""


ERROR = "error"
BASELINE = "Baseline: standard"
STAGES = (
    Stage(BASELINE, "standard", subjects.OFF, {}),
    Stage(
        "Phase 1.1 (Bug Fixes): improved",
        "improved",
        subjects.OFF,
        {1024: 1.10, 4096: 2.14, 8192: 2.25, 16384: 2.28, 32768: 2.71},
    ),
    Stage(
        "Phase 1.4 (Memory Pools): improved with pools",
        "improved",
        {"enable_memory_pool": True},
        {1024: 0.93, 4096: 4.41, 8192: 4.26, 16384: 1.84, 32768: ERROR},
    ),
    Stage(
        "Ring Attention + Phase 1: ring of one rank with pools",
        "ring",
        subjects.POLICY,
        {4096: 4.80, 8192: 2.22, 16384: 0.99, 32768: ERROR},
    ),
    Stage(
        "Block Sparse + Phase 1: blocks of 128 with pools",
        "block_sparse",
        subjects.POLICY,
        {4096: 5.62, 8192: 3.68, 16384: 2.49, 32768: ERROR},
        other="one softmax over whole blocks",
    ),
)
FA3 = "cuda_flash3"
FA3_STAGES = (
    Stage("Phase 1.3 (FA3)", "improved", subjects.OFF, dict.fromkeys(LENGTHS, ERROR), kernel=FA3),
    Stage(
        "Full Phase 1 (with FA3)", "improved", {"enable_memory_pool": True}, dict.fromkeys(LENGTHS, ERROR), kernel=FA3
    ),
)
DENSE_RING = "Ring Attention + Phase 1: dense ring in 4 chunks"
CHUNKS = 4


def cases(bench: Bench) -> list[Case]:
    """All of the report."""
    return [Case(f"{n:,} tokens", partial(_stages, n), n / 1024) for n in LENGTHS]


def _stages(length: int, bench: Bench, seconds: float) -> list[Row]:
    table = f"{length:,} tokens"
    listed = partial(not_run, NAME, table, table)
    refusal = too_long(bench, length)
    if refusal:
        return whole([listed(stage.name, refusal) for stage in (*STAGES, *FA3_STAGES)])
    tensors = subjects.inputs(bench, length)
    candidates: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    right = subjects.expected(bench, tensors)
    for stage in (*STAGES, *FA3_STAGES):
        why = subjects.lacks(stage.type_name) or _lack_of_kernel(stage, bench)
        if not why:
            kernel = {"kernel": stage.kernel} if stage.kernel else {}
            try:
                subject = subjects.attention(bench, stage.type_name, **stage.pool, **kernel)
            except ValueError as error:
                why = str(error)
            else:
                own = subjects.expected(bench, tensors, subject) if stage.other else right
                candidates[stage.name] = subject.candidate(tensors, own)
        if why:
            refused[stage.name] = why
    dense, why = _dense_ring(bench, tensors)
    if dense is None:
        refused[DENSE_RING] = why
    else:
        candidates[DENSE_RING] = Candidate(dense, subjects.dense_expected(bench, tensors).check)
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell)

    def row_of(stage: Stage) -> Row:
        if stage.name in refused:
            said = stage.said.get(length)
            return listed(stage.name, refused[stage.name], said if isinstance(said, str) else "")
        return _row(table, stage, length, found[stage.name], found[BASELINE])

    ring = Stage(DENSE_RING, "ring", subjects.OFF, {}, other="every row attends to every key")
    return whole([row_of(stage) for stage in (*STAGES, ring, *FA3_STAGES)])


def _row(table: str, stage: Stage, length: int, one: Measured, baseline: Measured) -> Row:
    facts = {"function": f"another: {stage.other}" if stage.other else "the baseline's"}
    comparisons = []
    if stage.name != BASELINE:
        said = stage.said.get(length)
        words = said if isinstance(said, str) else ""
        number = said if isinstance(said, float) else None
        comparisons = [
            comparison
            for comparison in compared(one, baseline, Said(number, None, words))
            if comparison.what == "speed"
        ]
        if one.peak_bytes is not None and baseline.peak_bytes:
            comparisons.append(claims.no_claim("memory left", f"{one.peak_bytes / baseline.peak_bytes:.0%}"))
    return row(NAME, table, table, stage.name, one, facts=facts, comparisons=comparisons)


def _dense_ring(bench: Bench, tensors: tuple[Any, ...]) -> tuple[Callable[[], Any] | None, str]:
    length, most = tensors[0].shape[1], bench.settings.longest_dense
    lacking = subjects.lacks_module("dilated_ring", "ring")
    if lacking:
        return None, lacking
    if length > most:
        return None, f"not run: dense attention of more than {most:,} tokens is left out by this run's settings"
    from dilated_ring import ring_attention

    return partial(ring_attention, *tensors, ring_size=CHUNKS), ""


def _lack_of_kernel(stage: Stage, bench: Bench) -> str:
    """Why the stage's kernel cannot run here; "" where it can."""
    if not stage.kernel:
        return ""
    refusals = kernels.survey(bench.device, bench.dtype, bench.settings.head_dim)
    refusal = refusals.get(stage.kernel, "this dilated_core has no such kernel")
    return "" if refusal is None else f"not run: {stage.kernel}: {refusal}"


REPORT = Report(NAME, "Phase 1 Comprehensive Performance Analysis", TABLES, cases)
