"""What the reports measure: attentions of every type with a pool or without, their inputs, and what is right.

Imports torch, dilated_core, and the factory; dilated_ring and dilated_block_sparse where they are needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dilated_core import reference
from dilated_factory import registry
from dilated_factory.bench.measuring import TOLERANCE, Candidate, Expected
from dilated_factory.bench.settings import DILATION_RATES, SEGMENT_LENGTHS, BenchSettings
from dilated_factory.create import DecidedModule, create_dilated_attention
from dilated_factory.resources import SharedResources

DEFINITION = "LongNet's definition in float64"
DENSE_DEFINITION = "softmax attention in float64"
BLOCK_DEFINITION = "block-sparse attention's own definition in float64"

OFF: dict[str, Any] = {"enable_memory_pool": False}
LIGHTWEIGHT: dict[str, Any] = {"enable_memory_pool": True, "lightweight_pool": True}
FULL: dict[str, Any] = {"enable_memory_pool": True, "lightweight_pool": False}
POLICY: dict[str, Any] = {}


@dataclass(frozen=True)
class Bench:
    """What all cases share.

    Attributes:
        settings, device: of the run.
        tell: a few words on what is being done.
    """

    settings: BenchSettings
    device: torch.device
    tell: Callable[[str], None] = field(default=lambda words: None)

    @property
    def dtype(self) -> torch.dtype:
        """A CPU computes in float32, a GPU in bfloat16, which is what its flash kernels take."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tolerance(self) -> float:
        """Of outputs, relative."""
        return TOLERANCE[self.dtype]

    def rows(self, length: int) -> Tensor:
        """The checked rows: the first, the last, and others spread between."""
        spread = torch.linspace(0, length - 1, min(self.settings.checked_rows, length))
        rows: Tensor = spread.round().long().unique()
        return rows


@dataclass(frozen=True)
class Subject:
    """A created attention.

    Attributes:
        module: with its decision.
        resources: of its own, so that nothing is left from another.
    """

    module: DecidedModule
    resources: SharedResources

    def pool_bytes(self) -> int:
        """What its pools have reserved at most."""
        return sum(one.peak_reserved_bytes for one in self.resources.statistics().values())

    def candidate(self, tensors: tuple[Tensor, ...], right: Expected) -> Candidate:
        """A call on these."""
        return Candidate(lambda: self.module(*tensors), right.check, self.pool_bytes)


def attention(bench: Bench, name: str, **options: Any) -> Subject:
    """An attention of that type, decided without a tuned profile and without anything that others left.

    Raises:
        NotInstalledError: its package is missing; ValueError: an option that does not fit.
    """
    resources = SharedResources()
    if name == "ring":
        options["group"] = _one_rank()
    module = create_dilated_attention(
        name, SEGMENT_LENGTHS, DILATION_RATES, profile=None, resources=resources, **options
    )
    return Subject(module, resources)


def inputs(bench: Bench, length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of that length, the same in every run."""
    generator = torch.Generator().manual_seed(length)
    shape = (3, batch, length, bench.settings.heads, bench.settings.head_dim)
    query, key, value = torch.randn(shape, generator=generator).to(bench.device, bench.dtype).unbind()
    return query, key, value


def expected(bench: Bench, tensors: tuple[Tensor, ...], subject: Subject | None = None) -> Expected:
    """What dilated attention of these must give in some rows; or block-sparse attention, where that is the subject."""
    if subject is not None and subject.module.decision.attention_type.startswith("block_sparse"):
        return _block_sparse_expected(bench, tensors, subject)
    rows = bench.rows(tensors[0].shape[1])
    query, key, value = _exact(tensors)
    exact, _ = reference.dilated_attention(query, key, value, SEGMENT_LENGTHS, DILATION_RATES, rows=rows)
    return Expected(exact, DEFINITION, bench.tolerance, rows)


def dense_expected(bench: Bench, tensors: tuple[Tensor, ...]) -> Expected:
    """What attention of every row to every key must give in some rows."""
    length = tensors[0].shape[1]
    rows = bench.rows(length)
    query, key, value = _exact(tensors)
    exact, _ = reference.dilated_attention(query, key, value, [length], [1], rows=rows)
    return Expected(exact, DENSE_DEFINITION, bench.tolerance, rows)


def lacks(name: str) -> str:
    """Why rows of a known type cannot be run here, with what to install; "" where they can.

    >>> lacks("improved")
    ''
    """
    try:
        registry.check_name(name, registry.installed())
    except registry.NotInstalledError as error:
        return str(error)
    return ""


def lacks_module(module: str, name: str) -> str:
    """The same for functions of the package that provides a known type.

    >>> lacks_module("dilated_nothing", "ring")
    'needs dilated_nothing, which is not installed: pip install "dilated-factory[ring]"'
    """
    if importlib.util.find_spec(module) is not None:
        return ""
    return f"needs {module}, which is not installed: {registry.install_command(name)}"


def _exact(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.cpu().double() for tensor in tensors]


def _block_sparse_expected(bench: Bench, tensors: tuple[Tensor, ...], subject: Subject) -> Expected:
    from dilated_block_sparse import reference as block_reference

    length = tensors[0].shape[1]
    module: Any = subject.module
    layout = module.layout_for(length)
    block = layout.block_size[0]
    # One block of rows, the last but one: it has keys on both sides.
    start = max(0, -(-length // block) - 2) * block
    rows = slice(start, min(start + block, length))
    query, key, value = _exact(tensors)
    exact = block_reference.block_sparse_attention(query, key, value, layout, rows=rows).out
    return Expected(exact, BLOCK_DEFINITION, bench.tolerance, rows)


def _one_rank() -> Any:
    """A group of this process alone: nothing travels, so that a ring is exact on one device, whichever that is."""
    from dilated_ring.comm import run_ranks

    [comm] = run_ranks(1, lambda comm: comm)
    return comm
