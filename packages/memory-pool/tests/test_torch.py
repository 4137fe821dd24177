"""Tensors of a pool are PyTorch's own tensors in all that can be seen of them: compared with torch.empty, exactly."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_memory_pool import MemoryPool


def is_accepted(dtype: torch.dtype) -> bool:
    """Whether it is a type of ordinary tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that complex32 is experimental, once
        return not torch.empty(2, dtype=dtype).is_quantized


def is_filled(dtype: torch.dtype) -> bool:
    """Whether torch.empty can fill it under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        torch.empty(1, dtype=dtype)
    except NotImplementedError:
        return False
    finally:
        torch.use_deterministic_algorithms(False)
    return True


def named(dtypes: list[torch.dtype]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=str)


ALL = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
DTYPES = [dtype for dtype in ALL if is_accepted(dtype)]
QUANTIZED = [dtype for dtype in ALL if str(dtype).startswith(("torch.q", "torch.quint"))]
FILLED = [dtype for dtype in DTYPES if is_filled(dtype)]


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of its storage."""
    return bytes(tensor.cpu().untyped_storage())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------ types


def test_the_list_of_types_is_not_empty_by_accident() -> None:
    expected = {torch.float32, torch.bool, torch.complex128, torch.float8_e4m3fn, torch.uint16, torch.bfloat16}
    assert expected <= set(FILLED)
    assert len(QUANTIZED) == 5


@named(DTYPES)
def test_every_type_holds_its_bits(pool: MemoryPool, dtype: torch.dtype) -> None:
    tensor = pool.empty((3, 5), dtype=dtype)
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (dtype, (3, 5), (5, 1))
    assert tensor.untyped_storage().nbytes() == 15 * dtype.itemsize
    assert pool.owns(tensor)
    pattern = torch.arange(15 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype is torch.bool else 251)
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    storage.copy_(pattern)
    assert raw(tensor) == raw(pattern)


@named(QUANTIZED)
def test_quantized_types_are_refused(pool: MemoryPool, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r": expected one that is not quantized, got torch\.q"):
        pool.empty(3, dtype=dtype)
    assert pool.statistics().allocated_bytes == 0


@pytest.mark.parametrize("dtype", ["float32", float, numpy.dtype("f4"), [], 3], ids=repr)
def test_what_is_no_type_is_refused(pool: MemoryPool, dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype"):
        pool.empty(3, dtype=dtype)


def test_the_default_type_is_the_one_of_the_moment(
    pool: MemoryPool, default_dtype: Callable[[torch.dtype], None]
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        default_dtype(dtype)
        assert pool.empty((2, 3)).dtype == pool.empty(6).dtype == pool.zeros(1).dtype == dtype


@named(FILLED)
def test_deterministic_fill_is_torchs_own(pool: MemoryPool, deterministic: None, dtype: torch.dtype) -> None:
    dirty = pool.empty((4, 3), dtype=dtype)
    torch.empty(0, dtype=torch.uint8, device=dirty.device).set_(dirty.untyped_storage()).fill_(7)
    del dirty
    assert raw(pool.empty((4, 3), dtype=dtype)) == raw(torch.empty((4, 3), dtype=dtype))


@named([dtype for dtype in DTYPES if dtype not in FILLED])
def test_a_type_that_torch_cannot_fill_is_torchs_error(
    pool: MemoryPool, deterministic: None, dtype: torch.dtype
) -> None:
    with pytest.raises(NotImplementedError, match="fill_empty_deterministic_"):
        pool.empty((4, 3), dtype=dtype)
    assert pool.statistics().allocated_bytes == 0


def test_deterministic_fill_can_be_switched_off_as_in_torch(
    pool: MemoryPool, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.empty(16, dtype=torch.uint8).fill_(7)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    assert pool.empty(16, dtype=torch.uint8).tolist() == [7] * 16


def test_zeros_are_zeros_in_memory_that_was_used(pool: MemoryPool) -> None:
    for dtype in (torch.float32, torch.int16, torch.bool, torch.complex64, torch.bfloat16, torch.uint64):
        used = pool.empty((5, 7), dtype=dtype)
        address = used.fill_(1).data_ptr()
        del used
        zeros = pool.zeros((5, 7), dtype=dtype)
        assert zeros.data_ptr() == address
        assert torch.equal(zeros.cpu(), torch.zeros((5, 7), dtype=dtype))


# ------------------------------------------------------------------------------------------------ sizes

SIZES = {
    "int": 6,
    "numpy-int": numpy.int64(6),
    "tuple": (2, 3),
    "list": [2, 3],
    "Size": torch.Size([2, 3]),
    "numpy-ints": (numpy.int32(2), numpy.int64(3)),
    "mixed": (2, numpy.uint8(3)),
    "0-dim": (),
    "1-dim": (7,),
    "empty": (2, 0, 3),
    "nothing": 0,
    "ones": (1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("min_bytes", [0, "1MiB"])
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_sizes_mean_what_they_mean_to_torch(make: Callable[..., MemoryPool], size: Any, min_bytes: int | str) -> None:
    pool, wanted = make(min_bytes=min_bytes), torch.empty(size)
    for tensor in (pool.empty(size), pool.empty(size, dtype=torch.float32), pool.zeros(size)):
        assert (tensor.shape, tensor.stride()) == (wanted.shape, wanted.stride())
        assert tensor.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()


def test_numpys_integers_leave_no_trace_in_the_numbers(pool: MemoryPool) -> None:
    kept = pool.empty((numpy.int64(30), numpy.int64(50)))
    assert kept.shape == (30, 50)
    assert type(pool.statistics().requested_bytes) is int
    assert pool.statistics().requested_bytes == 6000


NO_SIZES = {
    "negative": (-1, ValueError, "size: expected no negative length, got (-1,)"),
    "one-negative": ((3, -2), ValueError, "size: expected no negative length, got (3, -2)"),
    "two-negative": ((-3, -2), ValueError, "size: expected no negative length, got (-3, -2)"),
    "two-very-negative": ((-(2**20), -(2**20)), ValueError, "size: expected no negative length"),
    "nothing-negative": ((0, -2), ValueError, "size: expected no negative length, got (0, -2)"),
    "huge": (2**62, ValueError, "size: expected one that memory can have, got (4611686018427387904,) of torch.float32"),
    "huge-product": ((2**40, 2**40), ValueError, "size: expected one that memory can have"),
    "huge-and-nothing": ((2**63, 0), ValueError, "size: expected one that memory can have"),
    "float": (2.0, TypeError, "size: expected an int or a tuple of ints, got 2.0"),
    "floats": ((2.0, 3), TypeError, "size: expected an int or a tuple of ints, got (2.0, 3)"),
    "many-floats": ((2.0e3, 3000), TypeError, "size: expected an int or a tuple of ints"),
    "bool": (True, TypeError, "size: expected an int or a tuple of ints, got True"),
    "text": ("ab", TypeError, "size: expected an int or a tuple of ints, got 'ab'"),
    "nothing": (None, TypeError, "size: expected an int or a tuple of ints, got None"),
    "nested": (((2, 3),), TypeError, "size: expected an int or a tuple of ints, got ((2, 3),)"),
    "array": (numpy.array([2, 3]), TypeError, "size: expected an int or a tuple of ints"),
    "iterator": (iter((2, 3)), TypeError, "size: expected an int or a tuple of ints"),
    "set": ({2000, 3000}, TypeError, "size: expected an int or a tuple of ints"),
    "range": (range(2000, 2002), TypeError, "size: expected an int or a tuple of ints, got range(2000, 2002)"),
}


@pytest.mark.parametrize("min_bytes", [0, "1kB"])
@pytest.mark.parametrize(("size", "kind", "message"), NO_SIZES.values(), ids=list(NO_SIZES))
def test_what_is_no_size_is_an_error_that_says_so(
    make: Callable[..., MemoryPool], size: Any, kind: type[Exception], message: str, min_bytes: int | str
) -> None:
    pool = make(min_bytes=min_bytes)
    pool.empty(1)  # now the type is known, which is the faster way
    with pytest.raises(kind) as caught:
        pool.empty(size, dtype=torch.float32)
    assert message in str(caught.value)
    del caught  # its traceback refers to what was there when it was raised
    assert pool.statistics().requested_bytes == 0


@pytest.mark.parametrize("nbytes", [1, 999, 1000, 1001, 4096])
def test_min_bytes_is_where_the_pool_begins(make: Callable[..., MemoryPool], nbytes: int) -> None:
    pool = make(min_bytes=1000)
    tensor = pool.empty(nbytes, dtype=torch.uint8)
    assert pool.owns(tensor) == (nbytes >= 1000)
    assert pool.statistics().bypasses == (nbytes < 1000)
    assert pool.statistics().requested_bytes == (nbytes if nbytes >= 1000 else 0)


def test_with_no_min_bytes_all_but_empty_tensors_are_pooled(pool: MemoryPool) -> None:
    assert pool.owns(pool.empty(1, dtype=torch.bool))
    assert pool.owns(pool.empty(()))
    assert not pool.owns(pool.empty((0, 3)))


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=str)
def test_the_pools_device_by_any_name(make_on_host: Callable[..., MemoryPool], device: Any) -> None:
    pool = make_on_host()
    tensor = pool.empty((4, 4), device=device)
    assert tensor.device == torch.device("cpu")
    assert pool.owns(tensor)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)], ids=str)
def test_another_device_is_refused(make_on_host: Callable[..., MemoryPool], device: Any) -> None:
    for size in (4, 0):
        with pytest.raises(ValueError, match="device: expected cpu, where this pool's tensors live, got cuda"):
            make_on_host().empty(size, device=device)


def test_meta_tensors_need_no_memory(pool: MemoryPool) -> None:
    for device in ("meta", torch.device("meta")):
        tensor = pool.empty((2, 3), dtype=torch.int8, device=device)
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("meta", torch.int8, (2, 3))
        assert pool.empty_like(tensor.t()).stride() == (1, 3)
        assert pool.zeros(3, device=device).is_meta
    assert pool.statistics().misses == 0
    assert pool.statistics().bypasses == 6


def test_no_device_is_the_pools_whatever_torchs_default_is(pool: MemoryPool) -> None:
    own = torch.device(pool.device)
    with torch.device("meta"):
        for dtype in (torch.float32, torch.float8_e5m2):
            assert pool.empty((2, 3), dtype=dtype).device == own
            assert pool.owns(pool.empty((2, 3), dtype=dtype))
        assert pool.empty_like(torch.ones(2, 3, device=own).t()).device == own
    torch.set_default_device("meta")
    try:
        assert pool.zeros(4).device == own
    finally:
        torch.set_default_device(None)


# ------------------------------------------------------------------------------------------------ empty_like


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """Transposed, sliced, expanded, overlapping and channels_last tensors, with dimensions of 0 and 1."""
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    kind = draw(st.sampled_from(["any strides", "permuted", "sliced", "expanded", "channels_last"]))
    if kind == "any strides":
        strides = [draw(st.integers(0, 9)) for _ in shape]
        return torch.zeros(1000).as_strided(shape, strides)
    if kind == "channels_last":
        return torch.zeros([*shape, 2, 3, 1, 2][:4]).contiguous(memory_format=torch.channels_last)
    if kind == "expanded":
        return torch.zeros([1] * len(shape)).expand(shape)
    tensor = torch.zeros(shape).permute(draw(st.permutations(range(len(shape)))))
    return tensor[tuple(slice(None, None, draw(st.integers(1, 3))) for _ in shape)] if kind == "sliced" else tensor


@given(like=strided(), dtype=st.sampled_from([None, torch.float64, torch.uint8]))
def test_empty_like_has_the_strides_of_torch_empty_like(like: torch.Tensor, dtype: torch.dtype | None) -> None:
    pool = MemoryPool("host", min_bytes=0)
    wanted = torch.empty_like(like, dtype=dtype)
    tensor = pool.empty_like(like, dtype=dtype)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert tensor.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
    tensor.fill_(3)
    assert torch.equal(tensor, wanted.fill_(3))
    assert pool.owns(tensor) == (tensor.numel() > 0)


def test_empty_like_of_a_parameter_is_a_plain_tensor(pool: MemoryPool) -> None:
    tensor = pool.empty_like(torch.nn.Parameter(torch.ones(3, device=pool.device)))
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad


def test_empty_like_of_a_sparse_tensor_is_left_to_torch(make_on_host: Callable[..., MemoryPool]) -> None:
    assert make_on_host().empty_like(torch.eye(3).to_sparse()).layout is torch.sparse_coo


def test_empty_like_refuses_another_device(make_on_host: Callable[..., MemoryPool]) -> None:
    elsewhere = torch.empty(2, 3, device="meta")
    assert make_on_host().empty_like(elsewhere).is_meta
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2, 3, device="cuda")
        with pytest.raises(ValueError, match=r"device: expected cpu, .* got cuda:0"):
            make_on_host().empty_like(fake)


# ------------------------------------------------------------------------------------------------ as tensors are


def fused(x: torch.Tensor, weight: torch.Tensor, empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Buffers written in place, views, and reuse of memory that autograd may have saved."""
    buffer = empty((6, 5), dtype=torch.float64)
    buffer.copy_(x).mul_(2).add_(1)
    halves = empty((2, 3, 5), dtype=torch.float64)
    halves[0], halves[1] = buffer[:3].sin(), buffer[3:].exp()
    halves.requires_grad_(halves.requires_grad)
    return halves.view(6, 5).t() @ weight


def gradients(empty: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(6, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    output = fused(x, weight, empty)
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    return [output.detach(), *torch.autograd.grad(output, (x, weight), cotangent)]


def test_gradients_through_pooled_tensors_are_those_through_plain_ones(make_on_host: Callable[..., MemoryPool]) -> None:
    pool = make_on_host()
    for _ in range(3):  # the second time on used memory
        for pooled, plain in zip(gradients(pool.empty), gradients(torch.empty), strict=True):
            assert torch.equal(pooled, plain)


def test_what_autograd_saved_is_not_used_again(pool: MemoryPool) -> None:
    leaf = torch.ones(64, device=pool.device, requires_grad=True)
    saved = pool.empty(64).fill_(3)
    product = leaf * saved
    address = saved.data_ptr()
    del saved
    other = pool.empty(64).fill_(5)
    assert other.data_ptr() != address
    (gradient,) = torch.autograd.grad(product, leaf, torch.full((64,), 2.0, device=pool.device))
    assert gradient.tolist() == [6.0] * 64
    del product
    assert pool.empty(64).data_ptr() == address


def test_a_tensor_is_new_each_time(pool: MemoryPool) -> None:
    first = pool.empty(64)
    at_birth = first._version
    address = first.add_(1).data_ptr()
    assert first._version == at_birth + 1
    del first
    with torch.inference_mode():
        inside = pool.empty(64)
        assert (inside.data_ptr(), inside.is_inference()) == (address, True)
    del inside
    second = pool.empty(64)
    assert (second.data_ptr(), second._version, second.is_inference()) == (address, at_birth, False)
    assert second.is_leaf
    assert not second._is_view()
    assert not pool.empty((8, 8))._is_view()
    second.requires_grad_().mul(2).backward(torch.ones(64, device=pool.device))
    assert second.grad is not None


def test_checkpointing_recomputes_the_same_gradients(make_on_host: Callable[..., MemoryPool]) -> None:
    from torch.utils.checkpoint import checkpoint

    pool = make_on_host()

    def gradient(empty: Callable[..., torch.Tensor], recompute: bool) -> torch.Tensor:
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5).requires_grad_()
        weight = torch.linspace(0, 1, 42, dtype=torch.float64).view(6, 7)
        output = checkpoint(fused, x, weight, empty, use_reentrant=False) if recompute else fused(x, weight, empty)
        return torch.autograd.grad(output, x, torch.linspace(0, 1, 35, dtype=torch.float64).view(5, 7))[0]

    assert torch.equal(gradient(pool.empty, True), gradient(torch.empty, False))


def test_smaller_is_possible_in_place_and_larger_is_not(pool: MemoryPool) -> None:
    tensor = pool.empty((4, 8))
    assert tensor.resize_(3, 5).shape == (3, 5)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(5, 8)


def test_set_lets_go_of_the_memory(pool: MemoryPool) -> None:
    tensor = pool.empty(64)
    tensor.set_(torch.ones(3, device=tensor.device).untyped_storage())
    assert pool.statistics().allocated_bytes == 0
    tensor.set_(pool.zeros(5).untyped_storage())
    assert pool.owns(tensor)
    assert tensor.tolist() == [0.0] * 5


def test_detached_and_shallow_copies_keep_the_memory(pool: MemoryPool) -> None:
    tensor = pool.empty(64).fill_(2).requires_grad_()
    other = tensor.detach()
    assert (tensor * 1).detach_().tolist() == [2.0] * 64
    del tensor
    assert pool.statistics().requested_bytes == 256
    assert copy.copy(other).data_ptr() == other.data_ptr()


def test_deep_copies_and_saved_tensors_are_plain(pool: MemoryPool) -> None:
    tensor = pool.empty((3, 5), dtype=torch.int64)
    tensor.copy_(torch.arange(15).view(3, 5))
    stream = io.BytesIO()
    torch.save(tensor, stream)
    stream.seek(0)
    for other in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.load(stream)):
        assert torch.equal(other, tensor)
        assert not pool.owns(other)
        assert other.untyped_storage().nbytes() == 120


def test_share_memory_moves_a_tensor_out_of_the_pool(make_on_host: Callable[..., MemoryPool]) -> None:
    pool = make_on_host()
    tensor = pool.empty(64).fill_(2)
    assert tensor.share_memory_().is_shared()
    assert tensor.tolist() == [2.0] * 64
    assert pool.statistics().allocated_bytes == 0


def test_numpy_views_keep_the_memory(make_on_host: Callable[..., MemoryPool]) -> None:
    pool = make_on_host()
    array = pool.empty((8, 8)).fill_(2).numpy()[1:, 1:]
    assert pool.statistics().requested_bytes == 256
    array += 1
    assert array.sum() == 147
    del array
    assert pool.statistics().allocated_bytes == 0


def test_memory_of_the_host_is_not_pinned(make_on_host: Callable[..., MemoryPool]) -> None:
    assert not make_on_host().empty(64).is_pinned()


@runtime_checkable
class Allocator(Protocol):
    """As the packages that take a pool ask for one: they do not know this package."""

    def empty(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor: ...


def test_a_pool_is_an_allocator(pool: MemoryPool) -> None:
    assert isinstance(pool, Allocator)
    allocator: Allocator = pool
    assert allocator.empty((2, 3), dtype=torch.float16, device=torch.device(pool.device)).shape == (2, 3)


def test_without_torch_the_error_names_the_extra() -> None:
    script = """if True:
        import sys
        sys.modules["torch"] = None
        from dilated_memory_pool import MemoryPool
        pool = MemoryPool("host")
        try:
            pool.empty(3)
        except ImportError as error:
            assert 'pip install "dilated-memory-pool[torch]"' in str(error)
        else:
            raise SystemExit("no error")
    """
    subprocess.run([sys.executable, "-c", script], check=True)
