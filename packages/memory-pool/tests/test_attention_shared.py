"""Shared tensors: one for each key while anybody holds it, made once, never a deadlock."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_device import FakeBackend, FakeDevice
from pool_checks import PATIENCE, in_threads, until

from dilated_memory_pool.attention import AttentionBufferManager, BufferKind, BufferPolicy

torch = pytest.importorskip("torch")

THREADS = 10
SIZE = 16


def causal(empty: Any) -> Any:
    return torch.ones(SIZE, SIZE, dtype=torch.bool).tril()


def never(empty: Any) -> Any:
    raise AssertionError("there is a tensor already")


def all_others_wait(manager: AttentionBufferManager) -> bool:
    return len(manager._shared._awaited) == THREADS - 1


@pytest.fixture
def manager() -> AttentionBufferManager:
    return AttentionBufferManager("host")


def test_the_result_is_copied_into_the_pool_of_masks_exactly(manager: AttentionBufferManager) -> None:
    mask = manager.shared("causal", causal)
    assert manager.kind_of(mask) is BufferKind.MASK
    assert torch.equal(mask, causal(None))


def test_what_is_allocated_by_empty_is_shared_as_it_is(manager: AttentionBufferManager) -> None:
    made = []

    def create(empty: Any) -> Any:
        made.append(empty((SIZE, SIZE), dtype=torch.float32).fill_(2))
        return made[0]

    assert manager.shared("twos", create) is made[0]
    assert manager.statistics("mask").misses == 1


def test_all_get_one_tensor_while_somebody_holds_it_and_a_new_one_afterwards(manager: AttentionBufferManager) -> None:
    mask = manager.shared("causal", causal)
    assert manager.shared("causal", never) is mask
    del mask
    assert manager.statistics("mask").allocated_bytes == 0
    manager.shared("causal", causal)
    assert manager.statistics("mask").hits + manager.statistics("mask").misses == 2


def test_a_view_or_a_graph_that_holds_the_tensor_is_somebody(manager: AttentionBufferManager) -> None:
    view = manager.shared("row", causal)[0]
    assert manager.shared("row", never).data_ptr() == view.data_ptr()
    x = torch.ones(SIZE, SIZE, requires_grad=True)
    product = x * manager.shared("factor", lambda empty: torch.full((SIZE, SIZE), 3.0))
    factor = manager.shared("factor", never)
    cotangent = torch.randn(SIZE, SIZE)
    product.backward(cotangent)
    assert torch.equal(x.grad, cotangent * factor)


def test_keys_are_apart_and_so_are_kinds() -> None:
    policy = BufferPolicy(shared=True, min_bytes=0)
    manager = AttentionBufferManager("host", policies={"temp": policy})
    kept = [manager.shared(key, causal) for key in (1, 2, (1, 2))]
    kept.append(manager.shared(1, causal, kind="temp"))
    assert len({id(tensor) for tensor in kept}) == 4
    assert manager.kind_of(kept[-1]) is BufferKind.TEMP


def test_ten_threads_make_a_mask_once_and_share_it(manager: AttentionBufferManager) -> None:
    calls: list[int] = []
    masks: list[Any] = []

    def create(empty: Any) -> Any:
        calls.append(1)
        until(lambda: all_others_wait(manager))
        return causal(empty)

    in_threads(lambda _: masks.append(manager.shared("causal", create)), THREADS)
    assert calls == [1]
    assert len(masks) == THREADS
    assert {id(mask) for mask in masks} == {id(masks[0])}


class Interrupting:
    """A key equal to 0, at whose ``turn``-th look-up something else happens first."""

    def __init__(self, turn: int, action: Any) -> None:
        self.turn, self.action = turn, action

    def __eq__(self, other: object) -> bool:
        return other == 0

    def __hash__(self) -> int:
        self.turn -= 1
        if not self.turn:
            self.action()
        return hash(0)


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_tensor_that_appears_between_two_steps_of_a_look_up_is_shared(
    manager: AttentionBufferManager, turn: int
) -> None:
    appeared: list[Any] = []
    key = Interrupting(turn, lambda: appeared.append(manager.shared(0, causal)))
    assert manager.shared(key, causal) is appeared[0]


def test_a_failure_reaches_its_own_caller_and_those_who_waited_try_in_turn(manager: AttentionBufferManager) -> None:
    calls: list[int] = []
    answers: list[Any] = []

    def create(empty: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            until(lambda: all_others_wait(manager))
            raise OSError("the first one fails")
        return causal(empty)

    def ask(_: int) -> None:
        try:
            answers.append(manager.shared("causal", create))
        except OSError as error:
            answers.append(error)

    in_threads(ask, THREADS)
    assert len(answers) == THREADS
    failed = [answer for answer in answers if isinstance(answer, OSError)]
    assert len(failed) == 1
    assert len({id(answer) for answer in answers} - {id(failed[0])}) == 1
    assert len(calls) == 2


def test_a_tensor_that_needs_itself_is_refused(manager: AttentionBufferManager) -> None:
    def inner(empty: Any) -> Any:
        return manager.shared("outer", never)

    with pytest.raises(RuntimeError, match=r"'outer'.* is needed to make itself"):
        manager.shared("outer", lambda empty: manager.shared("inner", inner))
    assert manager.shared("outer", causal).shape == (SIZE, SIZE)


def test_two_threads_that_need_one_another_do_not_hang(manager: AttentionBufferManager) -> None:
    both_inside = threading.Barrier(2)
    answers: list[Any] = []

    def ask(number: int) -> None:
        own, other = ("a", "b")[number], ("b", "a")[number]

        def create(empty: Any) -> Any:
            both_inside.wait(PATIENCE)
            try:
                return manager.shared(other, causal).clone()
            except RuntimeError:
                return causal(empty)

        answers.append(manager.shared(own, create))

    in_threads(ask, 2)
    assert len(answers) == 2
    assert all(torch.equal(answer, causal(None)) for answer in answers)


@pytest.mark.parametrize("addressable", [True, False], ids=["pinned-like", "gpu-like"])
def test_all_streams_see_the_tensor_finished_and_the_last_one_keeps_it(addressable: bool) -> None:
    device = FakeDevice()
    manager = AttentionBufferManager(FakeBackend(device, addressable))

    def create(empty: Any) -> Any:
        mask = empty((SIZE, SIZE), dtype=torch.float32).zero_()
        device.enqueue(lambda: mask.fill_(1))
        return mask

    with device.stream(1):
        mask = manager.shared("ones", create)
    assert bool((mask == 1).all()), "no stream needs to wait for the one that made it"
    with device.stream(2):
        again = manager.shared("ones", never)
    device.enqueue(lambda: None, 2)
    del mask, again
    with device.stream(1):
        assert manager.statistics("mask").waiting_bytes > 0
        device.run()
        assert manager.statistics("mask").waiting_bytes == 0


def test_a_tensor_made_in_inference_mode_serves_training(manager: AttentionBufferManager) -> None:
    with torch.inference_mode():
        scale = manager.shared("scale", lambda empty: torch.full((SIZE,), 2.0))
    x = torch.ones(SIZE, requires_grad=True)
    cotangent = torch.randn(SIZE)
    (x * scale).backward(cotangent)
    assert torch.equal(x.grad, 2 * cotangent)


def test_under_fake_tensors_nothing_is_kept(manager: AttentionBufferManager) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        fake = manager.shared("causal", causal)
    assert isinstance(fake, FakeTensor)
    assert torch.equal(manager.shared("causal", causal), causal(None))


def test_under_compile_it_is_made_within_the_graph(manager: AttentionBufferManager) -> None:
    manager.allocator("mask")
    compiled = torch.compile(lambda x: x * manager.shared("causal", causal), backend="eager", fullgraph=True)
    x = torch.randn(SIZE, SIZE)
    assert torch.equal(compiled(x), x * causal(None))


@pytest.mark.parametrize(
    ("create", "error", "message"),
    [
        (lambda empty: [1, 2], TypeError, "a dense tensor, got one that returns \\[1, 2\\]"),
        (lambda empty: torch.eye(3).to_sparse(), TypeError, "create: expected a function that returns a dense tensor"),
        (lambda empty: torch.nn.Parameter(torch.ones(3)), ValueError, "return tensor.detach()"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    manager: AttentionBufferManager, create: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        manager.shared("key", create)


def test_a_key_must_be_hashable_and_a_kind_must_share(manager: AttentionBufferManager) -> None:
    with pytest.raises(TypeError, match="key: expected a hashable one, got \\[1\\]"):
        manager.shared([1], causal)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shared=True, \['mask'\] here, got 'query'"):
        manager.shared("key", causal, kind="query")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_a_tensor_is_made_makes_its_own(manager: AttentionBufferManager) -> None:
    begun, forked = threading.Event(), threading.Event()

    def slow(empty: Any) -> Any:
        begun.set()
        forked.wait(PATIENCE)
        return causal(empty)

    with ThreadPoolExecutor(1) as workers:
        mask = workers.submit(manager.shared, "causal", slow)
        assert begun.wait(PATIENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what this is about
            child = os.fork()
        if not child:
            signal.alarm(PATIENCE)  # a child that hangs has failed
            made = manager.shared("causal", lambda empty: empty(3, dtype=torch.uint8).fill_(1))
            os._exit(int(made.tolist() != [1, 1, 1]))
        _, status = os.waitpid(child, 0)
        forked.set()
        assert torch.equal(mask.result(PATIENCE), causal(None))
    assert status == 0
