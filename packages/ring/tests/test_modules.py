"""The modules: equal to dilated_core's over the whole sequence, weights in both directions; living in PyTorch."""

from __future__ import annotations

import copy
import pickle
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from dilated_core import DilatedAttention, MultiheadDilatedAttention
from dilated_factory.models import RotaryPositions, XPOSPositions
from dilated_ring import DisagreementError
from dilated_ring.comm import Comm, RecordingComm, VirtualComm, run_ranks
from dilated_ring.modules import RingDilatedAttention, RingMultiheadDilatedAttention

PATTERN = ([8, 20, 64], [1, 3, 4])
BOUNDS = (0, 17, 17, 40, 53)  # uneven, and one rank has nothing
THREE_BOUNDS = (0, 19, 37, 53)
WIDTH, HEADS = 24, 4
KINDS = (MultiheadDilatedAttention, RingMultiheadDilatedAttention)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "shared-heads": {"kv_heads": 2, "is_causal": True},
    "torchscale": {"semantics": "torchscale"},
    "grouped": {"semantics": "grouped", "is_causal": True},
    "rotary": {"rotary": RotaryPositions(WIDTH // HEADS), "kv_heads": 1},
    "xpos": {"rotary": XPOSPositions(WIDTH // HEADS), "is_causal": True},
    "plain-projections": {"bias": False, "layer_norm": False, "softmax_scale": 0.3},
}
RING_ONLY: dict[str, dict[str, Any]] = {
    "as-it-comes": {},
    "bounds": {"bounds": BOUNDS},
    "unverified": {"bounds": BOUNDS, "verify": False, "refetch": True},
    "heads": {"exchange": "heads"},
}


def pattern_of(options: dict[str, Any]) -> tuple[list[int], list[int]]:
    lengths, rates = PATTERN
    if options.get("semantics") == "torchscale":  # which wants segments that are multiples of their rate
        lengths = [rate * -(-length // rate) for length, rate in zip(*PATTERN, strict=True)]
    return lengths, rates


def make(kind: type[MultiheadDilatedAttention], **options: Any) -> MultiheadDilatedAttention:
    return kind(WIDTH, HEADS, *pattern_of(options), dtype=torch.float64, **options)


def whole_module(**options: Any) -> MultiheadDilatedAttention:
    """dilated_core's, with biases and norms that are not what they start from."""
    module = make(MultiheadDilatedAttention, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def differentiate(
    module: nn.Module, tokens: Tensor, cotangent: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the tokens, and the gradients of the parameters by their names."""
    leaf = tokens.detach().clone().requires_grad_()
    out, weights = module(leaf, key_padding_mask=padding)
    assert weights is None
    names, parameters = zip(*module.named_parameters(), strict=True)
    grad, *grads = torch.autograd.grad(out, [leaf, *parameters], cotangent)
    return out.detach(), grad, dict(zip(names, grads, strict=True))


def assert_same(results: list[Any], expected: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    """Rows side by side, gradients of parameters summed: forward and every gradient within 1e-12."""
    outs, grads, of_parameters = zip(*results, strict=True)
    pairs = {"out": (torch.cat(outs, 1), expected[0]), "tokens": (torch.cat(grads, 1), expected[1])}
    for name, gradient in expected[2].items():
        pairs[name] = sum(each[name] for each in of_parameters), gradient
    # A constant added to all keys changes nothing: the gradient of k_proj.bias is all rounding.
    floor = 0.1 * max(gradient.abs().max().item() for gradient in expected[2].values())
    for name, (found, wanted) in pairs.items():
        scale = wanted.abs().max().item() if name == "out" else max(floor, wanted.abs().max().item())
        assert (found - wanted).abs().max().item() <= 1e-12 * scale, name


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a cotangent, and a mask that pads a batch row's end and is random in the other."""
    tokens, cotangent = torch.randn(2, 2, BOUNDS[-1], WIDTH, dtype=torch.float64).unbind()
    padding = torch.stack([torch.rand(BOUNDS[-1]) < 0.3, torch.arange(BOUNDS[-1]) >= 35])
    return tokens, cotangent, padding


def cut(tensor: Tensor | None, rank: int, bounds: tuple[int, ...] = BOUNDS) -> Any:
    return None if tensor is None else tensor[:, bounds[rank] : bounds[rank + 1]]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("ring_only", RING_ONLY.values(), ids=RING_ONLY)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shards_are_the_whole(options: dict[str, Any], ring_only: dict[str, Any], masked: bool) -> None:
    tokens, cotangent, padding = problem()
    mask = padding if masked else None
    whole = whole_module(**options)

    def work(comm: Comm) -> Any:
        module = make(RingMultiheadDilatedAttention, group=comm, **options, **ring_only)
        module.load_state_dict(whole.state_dict())
        return differentiate(module, *(cut(each, comm.rank) for each in (tokens, cotangent, mask)))

    assert_same(run_ranks(4, work), differentiate(whole, tokens, cotangent, mask))


def test_more_ranks_than_positions() -> None:
    tokens, cotangent, bounds = *(each[:, :3] for each in problem()[:2]), (0, 1, 2, 3, 3, 3)
    whole = whole_module(rotary=RotaryPositions(WIDTH // HEADS))

    def work(comm: Comm) -> Any:
        module = make(RingMultiheadDilatedAttention, group=comm, rotary=RotaryPositions(WIDTH // HEADS))
        module.load_state_dict(whole.state_dict())
        return differentiate(module, *(cut(each, comm.rank, bounds) for each in (tokens, cotangent)), None)

    assert_same(run_ranks(5, work), differentiate(whole, tokens, cotangent, None))


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_apart(is_causal: bool) -> None:
    """The module without weights, with everything that a call can say."""
    query, key, value = torch.randn(3, 2, 53, 4, 6, dtype=torch.float64).unbind()
    key, value = key[:, :, :2], value[:, :, :2]
    real = ~problem()[2]
    expected = DilatedAttention(*PATTERN, 0.3, enable_gqa=True)(
        query, key, value, is_causal=is_causal, key_padding_mask=real
    )

    def work(comm: Comm) -> Tensor:
        module = RingDilatedAttention(*PATTERN, 0.3, enable_gqa=True, group=comm)
        shard = [cut(each, comm.rank) for each in (query, key, value)]
        mask = cut(real, comm.rank)
        asked = module(*shard, is_causal=is_causal, key_padding_mask=mask)
        told = module(*shard, is_causal=is_causal, key_padding_mask=mask, bounds=BOUNDS)
        assert torch.equal(asked, told)
        return told

    torch.testing.assert_close(torch.cat(run_ranks(4, work), 1), expected, rtol=0, atol=1e-12)


def test_dropout_only_while_training() -> None:
    tokens = torch.randn(1, 53, WIDTH, dtype=torch.float64)
    whole = whole_module().eval()

    def work(comm: Comm) -> tuple[Tensor, Tensor]:
        module = make(RingMultiheadDilatedAttention, group=comm, dropout=0.5)
        module.load_state_dict(whole.state_dict())
        shard = cut(tokens, comm.rank)
        return module(shard)[0], module.eval()(shard)[0]

    dropped, kept = (torch.cat(each, 1) for each in zip(*run_ranks(4, work), strict=True))
    torch.testing.assert_close(kept, whole(tokens)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(dropped, kept)


# ------------------------------------------------------------------------------------------- what travels


def agreements(comm: RecordingComm) -> int:
    """How often the rank asked the others for numbers, each time one exchange."""
    return sum(record.purpose.phase == "agreement" for record in comm.records)


@pytest.mark.parametrize(
    ("rotary", "told", "expected"), [(False, False, 1), (False, True, 1), (True, True, 1), (True, False, 2)]
)
def test_lengths_are_asked_for_once(rotary: bool, told: bool, expected: int) -> None:
    """A comparison a call, and one more question only where positions are needed that nobody told."""

    def work(comm: Comm) -> int:
        recording = RecordingComm(comm)
        positions = RotaryPositions(WIDTH // HEADS) if rotary else None
        module = make(RingMultiheadDilatedAttention, group=recording, rotary=positions, bounds=BOUNDS if told else None)
        module(torch.randn(1, BOUNDS[comm.rank + 1] - BOUNDS[comm.rank], WIDTH, dtype=torch.float64))
        return agreements(recording)

    assert run_ranks(4, work) == [expected] * 4


def test_bounds_of_a_call_win() -> None:
    """Without a verification nobody is asked, so what comes out is by the bounds of the call."""
    tokens = torch.randn(1, 53, WIDTH, dtype=torch.float64)
    options = {"rotary": RotaryPositions(WIDTH // HEADS)}
    whole = whole_module(**options)

    def work(comm: Comm) -> Tensor:
        recording = RecordingComm(comm)
        module = make(
            RingMultiheadDilatedAttention, group=recording, bounds=[0, 10, 20, 30, 40], verify=False, **options
        )
        module.load_state_dict(whole.state_dict())
        out: Tensor = module(cut(tokens, comm.rank), bounds=BOUNDS)[0]
        assert agreements(recording) == 0
        return out

    torch.testing.assert_close(torch.cat(run_ranks(4, work), 1), whole(tokens)[0], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("rotary", [None, RotaryPositions(WIDTH // HEADS)], ids=["", "rotary"])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["", "bounds"])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: expected None"),
        ((), {"cache": object()}, "cache: expected None"),
        ((), {"need_weights": True}, "need_weights: expected False"),
        ((), {"attn_mask": torch.zeros(5, 5)}, "attn_mask: expected None"),
        ((), {"bounds": [0, 3]}, "bounds: expected world_size"),
        ((torch.zeros(1, 5, WIDTH + 1),), {}, "key: expected shape"),
        ((None,) * 2, {"key_padding_mask": torch.zeros(1, 5)}, "key_padding_mask: expected a bool tensor"),
    ],
)
def test_a_refusal_of_one_rank_is_told_to_all(
    rotary: nn.Module | None,
    bounds: tuple[int, ...] | None,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    def work(comm: Comm) -> str:
        module = make(RingMultiheadDilatedAttention, group=comm, bounds=bounds, rotary=rotary)
        shard = torch.randn(1, BOUNDS[comm.rank + 1] - BOUNDS[comm.rank], WIDTH, dtype=torch.float64)
        given = (arguments, options) if comm.rank == 2 else ((), {})
        if comm.rank == 2 and message.startswith("key_"):
            options["key_padding_mask"] = torch.zeros(shard.shape[:2])
        with pytest.raises((TypeError, ValueError)) as error:
            module(shard, *given[0], **given[1])
        assert isinstance(error.value, DisagreementError) == (comm.rank != 2)
        return str(error.value)

    told = run_ranks(4, work)
    assert message in told[2]
    assert all(f"rank 2 refused its arguments: {type_of(told[2])}" in other for other in told[:2] + told[3:])


def type_of(message: str) -> str:
    """How a refusal is told: the type of the error, and its message."""
    kind = "TypeError" if "a bool tensor" in message else "ValueError"
    return f"{kind}: {message}"


def test_packed_sequences_are_refused_with_heads_apart_too() -> None:
    def work(comm: Comm) -> str:
        query = torch.randn(1, 10, 4, 6)
        module = RingDilatedAttention(*PATTERN, group=comm)
        with pytest.raises(ValueError, match="cu_seqlens") as error:
            module(query, query, query, cu_seqlens=torch.tensor([0, 10]) if comm.rank else None)
        return type(error.value).__name__

    assert run_ranks(2, work) == ["DisagreementError", "ValueError"]


def test_a_rank_without_rotary_is_named() -> None:
    def work(comm: Comm) -> str:
        rotary = None if comm.rank == 1 else RotaryPositions(WIDTH // HEADS)
        module = make(RingMultiheadDilatedAttention, group=comm, rotary=rotary)
        with pytest.raises(DisagreementError) as error:
            module(torch.randn(1, 9, WIDTH, dtype=torch.float64))
        return str(error.value)

    first, *others = run_ranks(3, work)
    assert "function is RingMultiheadDilatedAttention on ranks 0 and 2, dilated_ring_attention on rank 1" in first
    assert others == [first] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": "ranks"}, TypeError, "group: expected a ProcessGroup"),
        ({"bounds": [0, 5, 3]}, ValueError, "bounds: expected positions that rise"),
        ({"bounds": 5}, TypeError, "bounds: expected a sequence"),
        ({"exchange": "ring"}, ValueError, "exchange: expected one of"),
        ({"refetch": 1}, TypeError, "refetch: expected a bool"),
        ({"verify": None}, TypeError, "verify: expected a bool"),
        ({"semantics": "torch"}, ValueError, "semantics: expected one of"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for make_one in (
        lambda: RingDilatedAttention(*PATTERN, **options),
        lambda: RingMultiheadDilatedAttention(WIDTH, HEADS, *PATTERN, **options),
    ):
        with pytest.raises(error, match=message):
            make_one()


def test_bounds_that_are_not_the_groups() -> None:
    def work(comm: Comm) -> None:
        with pytest.raises(ValueError, match="world_size \\+ 1 = 2 positions, got 5"):
            RingDilatedAttention(*PATTERN, group=comm, bounds=BOUNDS)

    run_ranks(1, work)


def test_decoding_is_left_to_the_core() -> None:
    assert not hasattr(make(RingMultiheadDilatedAttention), "new_cache")


# ------------------------------------------------------------------------------------------- living in PyTorch


@pytest.mark.parametrize("kinds", [KINDS, KINDS[::-1]], ids=["to-ring", "from-ring"])
def test_weights_load_in_both_directions(kinds: tuple[type[MultiheadDilatedAttention], ...]) -> None:
    options = {"kv_heads": 2, "rotary": RotaryPositions(WIDTH // HEADS)}
    source, target = (make(kind, **options) for kind in kinds)
    assert list(source.state_dict()) == list(target.state_dict())
    target.load_state_dict(source.state_dict(), strict=True)
    for name, parameter in source.named_parameters():
        assert torch.equal(target.get_parameter(name), parameter), name


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = []
    for kind in KINDS:
        torch.manual_seed(3)
        weights.append(make(kind, gamma_init=2.0).state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_copies_share_the_group() -> None:
    def work(comm: Comm) -> None:
        module = make(RingMultiheadDilatedAttention, group=comm, kv_heads=2)
        twin = copy.deepcopy(module)
        assert twin.attention.group is comm
        assert {*twin.parameters()}.isdisjoint(module.parameters())
        shard = torch.randn(1, 5 + comm.rank, WIDTH, dtype=torch.float64)
        assert torch.equal(twin(shard)[0], module(shard)[0])

    run_ranks(3, work)


def test_the_default_group_can_be_pickled_and_another_cannot() -> None:
    module = make(RingMultiheadDilatedAttention)
    twin = pickle.loads(pickle.dumps(module))
    assert repr(twin) == repr(module)
    assert twin.attention.group is None

    def work(comm: Comm) -> None:
        with pytest.raises(TypeError, match=r"group: expected None, .* got a VirtualComm"):
            pickle.dumps(make(RingMultiheadDilatedAttention, group=comm))

    run_ranks(1, work)


def test_repr_says_who_and_how() -> None:
    shown = repr(make(RingMultiheadDilatedAttention, bounds=[0, 5, 9], refetch=True, exchange="heads"))
    assert "embed_dim=24, num_heads=4, kv_heads=4" in shown
    assert "group=default, bounds=[0, 5, 9], exchange='heads', refetch=True, verify=True" in shown
    assert "segment_lengths=[8, 20, 64], dilation_rates=[1, 3, 4]" in shown

    def work(comm: VirtualComm) -> str:
        return repr(RingDilatedAttention(*PATTERN, group=comm))

    assert "group=VirtualComm, bounds=None" in run_ranks(1, work)[0]  # type: ignore[arg-type]


def test_without_a_group_a_call_says_how_to_start() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        make(RingMultiheadDilatedAttention)(torch.randn(1, 9, WIDTH, dtype=torch.float64))


# ------------------------------------------------------------------------------------------- attention types


@pytest.mark.parametrize("name", ["ring", "distributed"])
def test_types_have_both_builders(name: str) -> None:
    loaded = EntryPoint(name, f"dilated_ring.types:{name}", "dilated.attention").load()
    assert loaded.attention is RingDilatedAttention
    assert loaded.multihead is RingMultiheadDilatedAttention


# ------------------------------------------------------------------------------------------- real processes


def in_processes(rank: int, state: dict[str, Tensor], tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    module = make(RingMultiheadDilatedAttention, **options)  # the default group
    module.load_state_dict(state)
    eager = differentiate(module, *(cut(each, rank, THREE_BOUNDS) for each in tensors))
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("sequence",))
    on_mesh = make(RingMultiheadDilatedAttention, group=mesh["sequence"], **options)
    on_mesh.load_state_dict(state)
    shard = cut(tensors[0], rank, THREE_BOUNDS)
    assert torch.equal(copy.deepcopy(on_mesh)(shard)[0], on_mesh(shard)[0])
    with pytest.raises(TypeError, match="DeviceMesh"):
        pickle.dumps(on_mesh)
    return eager


@pytest.mark.slow
def test_real_processes(tmp_path: Path) -> None:
    tensors = problem()
    options = {"rotary": RotaryPositions(WIDTH // HEADS), "kv_heads": 2, "is_causal": True}
    whole = whole_module(**options)
    results = run_processes(3, in_processes, whole.state_dict(), tensors, options, tmp_path=tmp_path)
    assert_same(results, differentiate(whole, *tensors))
