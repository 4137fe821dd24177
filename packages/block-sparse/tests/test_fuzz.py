"""Thousands of random configurations, every option at once, against the oracle: `nox -s fuzz`.

A failure is shrunk, shown, and remembered under .hypothesis for the next run. Once it is understood, it joins KEPT,
which the default tests run. FUZZ_EXAMPLES says how many configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import KINDS, MASKS, SHARES, STORAGES, THROUGH, Case, assert_close, oracle, run

from dilated_block_sparse import engine, operators
from dilated_core import kernels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Configuration:
    """A problem and how it is run.

    Attributes:
        gathered: elements gathered at a time; rows, keys: at most in a rectangle; bits: looked at together by the
            planner. None for as many as usual.
        traced: whether the operator runs, as where PyTorch traces.
    """

    case: Case
    dtype: torch.dtype
    kernel: str = "auto"
    gathered: int | None = None
    rows: int | None = None
    keys: int | None = None
    bits: int | None = None
    traced: bool = False

    def __str__(self) -> str:
        words = [str(self.case), str(self.dtype).removeprefix("torch."), self.kernel, "traced" * self.traced]
        limits = {"gathered": self.gathered, "rows": self.rows, "keys": self.keys, "bits": self.bits}
        return "-".join(filter(None, words + [f"{name}{limit}" for name, limit in limits.items() if limit]))

    def check(self) -> None:
        """Forward and gradients against the oracle."""
        with pytest.MonkeyPatch.context() as patch:
            if self.gathered is not None:
                patch.setitem(engine.GATHER_ELEMENTS, "cpu", self.gathered)
            for name, limit in (("MOST_ROWS", self.rows), ("MOST_KEYS", self.keys), ("MOST_BITS", self.bits)):
                if limit is not None:
                    patch.setattr(f"dilated_block_sparse.plan.stacks.{name}", limit)
            if self.traced:
                patch.setattr(operators, "PLAIN", ())
            ours = run(self.case, self.dtype, kernel=self.kernel)
        assert_close(self.case, self.dtype, ours, oracle(self.case, self.dtype))


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Any problem of moderate size, run in any way."""
    is_causal = draw(st.booleans())
    kv_heads = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 40))
    columns = rows if draw(st.booleans()) else draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        batch=draw(st.integers(0, 3)),
        q_len=draw(st.integers(0, 160)),
        heads=kv_heads * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 33, 64])),
        block_size=(rows, columns),
        kinds=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))),
        density=draw(st.sampled_from([0.05, 0.2, 0.5, 0.9])),
        kv_len=None if is_causal or draw(st.booleans()) else draw(st.integers(0, 160)),
        kv_heads=kv_heads,
        share=draw(st.sampled_from(SHARES)),
        is_causal=is_causal,
        mask=draw(st.sampled_from(MASKS)),
        has_bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.0, 0.1, -0.3])),
        storage=draw(st.sampled_from(STORAGES)),
        through=draw(st.sampled_from(THROUGH)),
        seed=draw(st.integers(0, 2**20)),
    )
    able = [name for name, reason in kernels.survey(CPU, dtype, case.head_dim + 16).items() if reason is None]
    able = [name for name in able if kernels.survey(CPU, dtype, case.head_dim)[name] is None]
    return Configuration(
        case,
        dtype,
        kernel=draw(st.sampled_from(["auto", *able])),
        gathered=draw(st.sampled_from([None, None, 1, 500, 5000])),
        rows=draw(st.sampled_from([None, None, 1, 8, 40])),
        keys=draw(st.sampled_from([None, None, 1, 8, 40])),
        bits=draw(st.sampled_from([None, None, 1])),
        traced=draw(st.booleans()),
    )


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(configuration=configurations())
def test_any_configuration(configuration: Configuration) -> None:
    configuration.check()


# Every failure that was ever found, as small as it was found; and one of each way to run, so that they keep running.
KEPT = [
    Configuration(
        Case(2, 70, 4, 8, (7, 5), ("random", "global"), kv_heads=2, is_causal=True, has_bias=True, mask="right"),
        torch.float64,
        gathered=500,
        rows=8,
        keys=8,
        bits=1,
        traced=True,
    ),
    # The gradient of a bias is a long sum that cancels out: in float32 it is measured against what is summed.
    Configuration(
        Case(1, 127, 1, 5, (39, 39), ("full",), is_causal=True, mask="right", has_bias=True, through="out", seed=235),
        torch.float32,
    ),
]


@pytest.mark.parametrize("configuration", KEPT, ids=str)
def test_kept(configuration: Configuration) -> None:
    configuration.check()
