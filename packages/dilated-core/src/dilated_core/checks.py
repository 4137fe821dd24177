"""Argument checks: every public function calls these before any work starts.

Each check either returns the normalised value or raises, naming the argument, what was expected and what came.
Imports torch, and from here the names that arguments take.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dilated_core.auxiliary import AuxRequest
from dilated_core.kernels import table
from dilated_core.plan import SEMANTICS
from dilated_core.resources import NO_RESOURCES, Resources

# The methods of an Allocator and of a PatternStore.
_EMPTY, _GET = "empty(size, *, dtype, device)", "get_or_create(key, create)"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer (bool is not one: ``True`` as a length is a mistake)."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive_integer(name: str, value: object) -> int:
    """Return ``value`` as an int of at least 1. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a positive int, got {value!r} of type {type(value).__name__}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name}: expected a positive int, got {number}")
    return number


def length(name: str, value: object) -> int:
    """Return ``value`` as an int of at least 0. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int of at least 0, got {value!r} of type {type(value).__name__}")
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{name}: expected an int of at least 0, got {number}")
    return number


def positive_number(name: str, value: object) -> float:
    """Return ``value`` as a finite float above 0. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a positive float, got {value!r} of type {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite float, got {value}")
    return float(value)


def probability(name: str, value: object) -> float:
    """Return ``value`` as a float in [0, 1). Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a probability in [0, 1), got {value!r} of type {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")
    return float(value)


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is a bool. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r} of type {type(value).__name__}")
    return value


def _integers(name: str, values: object) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a sequence of positive ints, got {values!r} of type {type(values).__name__}")
    numbers: list[int] = []
    for index, value in enumerate(values):
        # The plain-int case first: it is the one torch.compile traces.
        if is_integer(value) and value > 0:
            numbers.append(value)
        else:
            numbers.append(positive_integer(f"{name}[{index}]", value))
    if not numbers:
        raise ValueError(f"{name}: expected at least one branch, got an empty sequence")
    return tuple(numbers)


def branches(segment_lengths: object, dilation_rates: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the two lists as tuples of ints, one entry a branch.

    Raises:
        TypeError: not sequences of ints.
        ValueError: empty, not positive, of unequal length, or a rate above its segment length.
    """
    lengths = _integers("segment_lengths", segment_lengths)
    rates = _integers("dilation_rates", dilation_rates)
    if len(lengths) != len(rates):
        raise ValueError(
            f"segment_lengths and dilation_rates: expected one rate a segment length, "
            f"got {len(lengths)} lengths {list(lengths)} and {len(rates)} rates {list(rates)}"
        )
    for index, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
        if rate > length:
            raise ValueError(
                f"dilation_rates[{index}]: expected at most segment_lengths[{index}] = {length}, got {rate} "
                f"(a segment would keep no second position; were the two lists swapped?)"
            )
    return lengths, rates


def semantics(value: object) -> str:
    """Return the name of one of the three semantics. Raises TypeError or ValueError."""
    return choice("semantics", value, SEMANTICS)


def choice(name: str, value: object, accepted: Sequence[str]) -> str:
    """Return ``value`` if it is one of the accepted strings. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {list(accepted)}, got {value!r} of type {type(value).__name__}")
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {list(accepted)}, got {value!r}")
    return value


def kernel(value: object) -> str:
    """Return the name of a kernel in the table, or "auto". Whether it can run is asked when tensors come."""
    return choice("kernel", value, ("auto", *(engine.name for engine in table())))


def softmax_scale(scale: object, head_dim: int, name: str = "scale") -> float:
    """Return the factor on the scores: ``scale``, or ``1 / sqrt(head_dim)`` where it is None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name}: expected a float or None, got {scale!r} of type {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"{name}: expected a finite float, got {scale}")
    return float(scale)


def query_and_scale(query: Tensor, scale: object) -> tuple[Tensor, float]:
    """Return ``softmax_scale`` above 0, and the query with its sign: the stock kernels, which mask causal scores with
    -inf before they scale them, give NaN for 0 or less (found on the CPU, torch 2.11 and 2.13).
    """
    factor = softmax_scale(scale, query.shape[-1])
    if factor > 0.0:
        return query, factor
    return (-query, -factor) if factor < 0.0 else (query * 0.0, 1.0)


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions (batch, seq, heads, head_dim), got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}")
    if forward_ad.unpack_dual(value).tangent is not None:  # operators would drop it without a word
        raise NotImplementedError(f"{name}: forward-mode derivatives (jvp, jacfwd, hessian) are not defined")
    if value.shape[3] == 0:
        raise ValueError(f"{name}: expected a head_dim of at least 1, got shape {tuple(value.shape)}")
    return value


def query_key_value(
    query: object, key: object, value: object, *, same_length: bool, enable_gqa: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three tensors if their shapes, dtypes and devices fit together.

    Args:
        query: (batch, seq, heads, head_dim).
        key: (batch, kv_seq, kv_heads, head_dim); value: like key.
        same_length: whether kv_seq must equal seq (self-attention).
        enable_gqa: whether heads may be a multiple of kv_heads.

    Raises:
        TypeError: not tensors, or not floating point, or of different dtypes.
        ValueError: shapes or devices that do not fit.
    """
    query, key, value = _tensor("query", query), _tensor("key", key), _tensor("value", value)
    for name, other in (("key", key), ("value", value)):
        if other.dtype != query.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {other.dtype}")
        if other.device != query.device:
            raise ValueError(f"{name}: expected the device of query, {query.device}, got {other.device}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key: expected the batch of query, {query.shape[0]}, got {key.shape[0]}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key: expected the head_dim of query, {query.shape[3]}, got {key.shape[3]}")
    if same_length and key.shape[1] != query.shape[1]:
        raise ValueError(f"key: expected the seq of query, {query.shape[1]}, got {key.shape[1]}")
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads != kv_heads:
        if not enable_gqa:
            raise ValueError(
                f"key: expected the heads of query, {heads}, got {kv_heads} (grouped heads need enable_gqa=True)"
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"key: expected kv_heads that divide the {heads} heads of query, got {kv_heads}")
    return query, key, value


def asks_for_lse(return_aux: object) -> bool:
    """Whether the lse is to be returned beside the output. Raises TypeError where it is no AuxRequest, nor None."""
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"return_aux: expected an AuxRequest or None, got {type(return_aux).__name__}")
    return return_aux is not None and return_aux.lse


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 and half precision inputs in autocast's dtype, as SDPA does; else as they came."""
    device = next((tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)), None)
    if device in (None, "meta") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def key_padding_mask(mask: object, key: Tensor, *, true: str = "real") -> Tensor | None:
    """Return the mask if it is None or fits ``key``, (batch, kv_seq, ...); ``true`` says what True stands for.

    Raises:
        TypeError: not a bool tensor.
        ValueError: another shape or device.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask: expected a bool tensor, True where the key is {true}, got {found}")
    if mask.shape != key.shape[:2]:
        raise ValueError(
            f"key_padding_mask: expected shape (batch, seq) = {tuple(key.shape[:2])}, got {tuple(mask.shape)}"
        )
    if mask.device != key.device:
        raise ValueError(f"key_padding_mask: expected the device of key, {key.device}, got {mask.device}")
    return mask


def cu_seqlens(offsets: object, query: Tensor) -> Tensor | None:
    """Return the offsets of packed sequences if they are None or may fit ``query``; their values are checked later.

    Raises:
        TypeError: not an int32 or int64 tensor.
        ValueError: not one-dimensional, or a batch other than 1.
    """
    if offsets is None:
        return None
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        found = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor of offsets, got {found}")
    if offsets.ndim != 1 or offsets.shape[0] < 1:  # len() would fix the number of sequences in an export
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(offsets.shape)}")
    if query.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected packed sequences in a batch of 1, got a batch of {query.shape[0]}")
    return offsets


def resources(allocator: object, patterns: object) -> Resources:
    """Return the two as Resources. Raises TypeError where one lacks the method it is to be asked for."""
    if allocator is None and patterns is None:
        return NO_RESOURCES
    # Looks at attributes: isinstance takes microseconds for a protocol, at every call.
    if allocator is not None and not callable(getattr(allocator, "empty", None)):
        raise TypeError(f"allocator: expected an object with {_EMPTY}, or None, got {type(allocator).__name__}")
    if patterns is not None and not callable(getattr(patterns, "get_or_create", None)):
        raise TypeError(f"patterns: expected an object with {_GET}, or None, got {type(patterns).__name__}")
    return Resources.of(allocator, patterns)  # type: ignore[arg-type]
