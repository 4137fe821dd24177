"""Compiles the kernel "triton" for CUDA cards without one, and says what came of it: registers, memory, instructions.

The launches are the package's own, of tensors without storage, under a stand-in driver that names the card. What a
launch asks Triton for is noted instead of run, and then compiled: so it is what a card would be given, specialised on
the same strides. Nothing is timed, and nothing runs. The test and the benchmark of the same name share this file.

    python triton_compile.py PROCESSES < cases.json

reads a list of cases, one list of fields each, and prints a line of JSON for every case. It must run where
TRITON_INTERPRET is not set, so ``compile_cases`` starts it as a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from dilated_core.kernels.triton import launch
from dilated_core.kernels.triton.blocks import Blocks
from dilated_core.kernels.triton.launch import Work
from dilated_core.kernels.triton.schedule import Tables

# What a card has, from "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide:
# shared memory in bytes, 32-bit registers and threads of a multiprocessor, and the most that one block or thread takes.
REGISTERS_PER_PROCESSOR = 65_536
REGISTERS_PER_THREAD = 255
THREADS_PER_PROCESSOR = 2_048
BLOCKS_PER_PROCESSOR = 32
SHARED_PER_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024}
SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024}
# The driver keeps this much of it for every block (CUDA C++ Programming Guide, "Shared Memory" of 8.x and 9.0), and
# gives registers to a warp 256 at a time (NVIDIA's occupancy calculator).
SHARED_RESERVED = 1024
REGISTER_UNIT = 256

# Shapes of the launches. Their sizes do not matter to the compiler but for what divides them.
BATCH, ROWS, HEADS, BRANCHES, CLASSES = 2, 4096, 12, 5, 3

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync\.aligned\.m16n8k16",
    "tf32": r"\.tf32",
    "cp_async": r"cp\.async\.c[ag]\.shared",
}


class Case(NamedTuple):
    """A program and what it is compiled for.

    Attributes:
        program: its name in ``programs``.
        arch: compute capability times ten.
        dtype: a name in torch.
        blocks: rows, others, warps and stages; those of ``blocks.py`` where None.
        tf32: whether float32 products may be rounded to tf32.
    """

    program: str
    arch: int
    head_dim: int
    dtype: str
    is_causal: bool = False
    masked: bool = False
    ordered: bool = True
    packed: bool = False
    grouped: bool = False
    torchscale: bool = False
    tf32: bool = False
    blocks: tuple[int, int, int, int] | None = None

    def __str__(self) -> str:
        options = [name for name in self._fields[4:-1] if getattr(self, name)]
        blocks = [] if self.blocks is None else ["x".join(map(str, self.blocks))]
        return "-".join([self.program, f"sm{self.arch}", f"D{self.head_dim}", self.dtype, *options, *blocks])


class Compiled(NamedTuple):
    """What the compiler made of a case.

    Attributes:
        blocks: rows, others (0 for row_stats, which walks none), warps and stages that it was compiled for.
        registers: of a thread.
        stack: bytes of local memory of a thread: the programs have no arrays, so this is what registers spill to.
        loops: how many innermost loops, those over blocks.
        loop_spills: instructions that read or write local memory in these loops. What is spilled outside of them
            costs a few cycles a branch.
        shared: bytes of shared memory of a block.
        instructions: how many of each of ``INSTRUCTIONS`` the PTX has.
    """

    blocks: tuple[int, int, int, int]
    registers: int
    stack: int
    loops: int
    loop_spills: int
    shared: int
    instructions: dict[str, int]

    def blocks_per_processor(self, arch: int) -> int:
        """How many blocks a multiprocessor holds at once, by registers, shared memory and threads; 0: it fits none."""
        warps = self.blocks[2]
        per_warp = -(-32 * self.registers // REGISTER_UNIT) * REGISTER_UNIT
        if self.shared > SHARED_PER_BLOCK[arch]:
            return 0
        return min(
            REGISTERS_PER_PROCESSOR // per_warp // warps,
            SHARED_PER_PROCESSOR[arch] // (self.shared + SHARED_RESERVED),
            THREADS_PER_PROCESSOR // (32 * warps),
            BLOCKS_PER_PROCESSOR,
        )


def compile_cases(
    cases: Sequence[Case], cache: Path, *, processes: int = 2, timeout: float = 600.0
) -> Iterator[tuple[Case, Compiled]]:
    """Compile all, in ``processes`` processes, with Triton's cache at ``cache``; yields them in their order.

    One process costs the least, as each more imports torch and Triton anew; several end sooner on a free machine.

    Raises RuntimeError with what the compiler says where one does not compile, subprocess.TimeoutExpired past
    ``timeout`` seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, __file__, str(processes)]
    process = subprocess.Popen(
        command, env=environment, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said, complaints = process.communicate(json.dumps(cases), timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would keep the pipes open
        process.communicate()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"the kernels do not compile:\n{said[-2000:]}\n{complaints[-6000:]}")
    for case, line in zip(cases, said.splitlines(), strict=True):
        fields = json.loads(line)
        yield case, Compiled(**{**fields, "blocks": tuple(fields["blocks"])})


# ------------------------------------------------------------------------------------- in the process that compiles


class _NamedCard:
    """Triton's driver as far as compiling asks for it; the device's number is the capability."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def _asked(case: Case, batch: int, rows: int) -> tuple[Any, dict[str, Any]]:
    """The program of the case, and what a launch of so many rows asks the compiler for."""
    import triton

    triton.runtime.driver.set_active(_NamedCard(case.arch))
    for program in vars(launch.programs()).values():
        if isinstance(program, triton.JITFunction):
            program.device_caches.clear()  # else it launches what an earlier case has compiled
    asked: dict[str, Any] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        asked[fn.jit_function.__name__] = fn.jit_function, compile
        return True  # Triton then neither compiles nor launches

    triton.knobs.runtime.jit_cache_hook = note
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(case.arch, 10)):
        _launch(case, batch, rows)
    triton.knobs.runtime.jit_cache_hook = None
    found: tuple[Any, dict[str, Any]] = asked[case.program]
    return found


def variants(case: Case, sizes: Sequence[tuple[int, int]]) -> int:
    """How many programs launches of these (batch, rows) compile: 1 where none depends on them."""
    return len({_asked(case, batch, rows)[1]["specialization_data"] for batch, rows in sizes})


def compile_case(case: Case) -> Compiled:
    """Compile one, here."""
    program, request = _asked(case, BATCH, ROWS)
    constants = {program.arg_names[place[0]]: value for place, value in request["constants"].items()}
    compiled = program.preload(request["specialization_data"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        blocks=(
            constants["BLOCK_ROWS"], constants.get("BLOCK_OTHERS", 0), request["num_warps"], request["num_stages"]
        ),
        **_resources(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
    )  # fmt: skip


def _launch(case: Case, batch: int, rows: int) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    dtype = getattr(torch, case.dtype)
    kv_heads = HEADS // 4 if case.grouped else HEADS
    query, out, grad_out = (_tensor(batch, rows, HEADS, case.head_dim, dtype=dtype) for _ in range(3))
    key, value = (_tensor(batch, rows, kv_heads, case.head_dim, dtype=dtype) for _ in range(2))
    grad_dtype = torch.float32 if case.grouped else dtype  # as fused.py gives it
    lse = _tensor(batch, HEADS, rows, dtype=torch.float32)
    real = _tensor(batch, rows, dtype=torch.bool).unsqueeze(1).expand(-1, kv_heads, -1) if case.masked else None
    tables = Tables(_tensor(BRANCHES, 2, dtype=torch.int32), _tensor(BRANCHES, HEADS, dtype=torch.int32))
    if case.ordered:
        tables = tables._replace(
            order=_tensor(CLASSES, rows, dtype=torch.int32), head_class=_tensor(HEADS, dtype=torch.int32)
        )
    bounds = ((0, rows // 2), (rows // 2, rows)) if case.packed else None
    blocks = None if case.blocks is None else {case.program: Blocks(*case.blocks)}
    work = Work(query, key, value, real, tables, case.is_causal, 0.125, bounds, case.torchscale, blocks)
    if case.program == "forward":
        launch.forward(work, out, lse)
        return
    cotangents = launch.Cotangents(grad_out, launch.row_stats(work, grad_out, None, out, lse))
    if case.program == "grad_query":
        launch.grad_query(work, cotangents, _tensor(*query.shape, dtype=dtype))
    elif case.program == "grad_key_value":
        grads = (_tensor(*key.shape, dtype=grad_dtype) for _ in range(2))
        launch.grad_key_value(work, cotangents, *grads)


def _tensor(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, loops and loop_spills, by the cuobjdump that comes with Triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", said)
    instructions = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", said)]
    if used is None or not instructions:
        raise RuntimeError(f"cuobjdump names no registers or no instructions:\n{said[:2000]}")
    # A branch to an address before its own closes a loop.
    jumps = [(at, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", what.strip())) for at, what in instructions]
    loops = [(int(target[1], 16), at) for at, target in jumps if target is not None and int(target[1], 16) < at]
    innermost = [(first, last) for first, last in loops if not any(first <= start < end < last for start, end in loops)]
    spills = [at for at, what in instructions if re.search(r"\b(LDL|STL)\b", what)]
    in_loops = sum(any(first <= at <= last for first, last in innermost) for at in spills)
    return {"registers": int(used[1]), "stack": int(used[2]), "loops": len(innermost), "loop_spills": in_loops}


def main() -> None:
    """Compile the cases from standard input."""
    cases, processes = [Case(*fields) for fields in json.load(sys.stdin)], int(sys.argv[1])
    with ExitStack() as stack:
        each: Callable[..., Iterator[Compiled]] = map
        if processes > 1:
            each = stack.enter_context(ProcessPoolExecutor(processes, mp_context=get_context("spawn"))).map
        for compiled in each(compile_case, cases):
            sys.stdout.write(json.dumps(compiled._asdict()) + "\n")


if __name__ == "__main__":
    main()
