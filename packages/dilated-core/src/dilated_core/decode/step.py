"""decode_step: attend new tokens over what the cache keeps, then keep what later tokens can reach.

A single token takes the path that is made to be short. It is kept first; then each branch that has heads on the token's
grid is one kernel call over the live rows, and one merge joins them all. Prompts are left to ``dilated_attention``, and
chunks that come later to ``chunk``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_core import checks
from dilated_core.decode.cache import DilatedKVCache, integers
from dilated_core.decode.chunk import Engine, attend_chunk, keep_chunk
from dilated_core.decode.store import Store
from dilated_core.functional import dilated_attention
from dilated_core.kernels import choose
from dilated_core.partial import merge_stack
from dilated_core.tiles import last_stride_1


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: DilatedKVCache,
    *,
    scale: float | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attend ``seq`` new tokens a batch row, after all that the cache has seen, and add them to it.

    Each output row is that row of ``dilated_attention(..., is_causal=True)`` over all tokens so far: start with a
    prompt of any length, go on with single tokens or chunks. The cost of a step is that of the rows that its tokens
    reach, whatever came before. Batch rows that have seen equally many tokens are attended together where they are
    neighbours. For inference: it computes no gradients and refuses tensors that ask for them.

    Under autocast nothing is cast: the cache's dtype is the dtype of all. ``torch.compile`` does not trace it: it
    breaks the graph, and runs as it does without compile.

    Args:
        query: (batch, seq, heads, head_dim), dtype and device of the cache; seq may be 0.
        key, value: (batch, seq, kv_heads, head_dim), the same.
        cache: changed in place; not at all where an error is raised for an argument.
        scale: factor on the scores, 1 / sqrt(head_dim) by default; the same at every step.
        lengths: how many of the ``seq`` tokens each batch row really has, from 0 to seq: ints or a 1-D integer tensor
            (on a GPU, reading it waits for the device). The others, at the right, are not kept and their output is 0.
            All are real by default.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.

    Returns:
        Output like query.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or values that do not fit the cache, tensors that require grad, or "torchscale"
            where torchscale itself would be wrong (see ``dilated_attention``).

    >>> q, k, v = torch.randn(3, 1, 20, 2, 16).unbind()
    >>> cache = DilatedKVCache([4, 8], [1, 2], batch_size=1, num_heads=2, head_dim=16)
    >>> prompt = decode_step(q[:, :11], k[:, :11], v[:, :11], cache)
    >>> tokens = [decode_step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], cache) for i in range(11, 20)]
    >>> full = dilated_attention(q, k, v, [4, 8], [1, 2], is_causal=True)
    >>> torch.allclose(torch.cat([prompt, *tokens], 1), full, atol=1e-6), cache.lengths
    (True, (20,))
    """
    if torch.compiler.is_compiling():
        result: Tensor = torch.compiler.disable(decode_step)(
            query, key, value, cache, scale=scale, lengths=lengths, kernel=kernel
        )
        return result
    checks.kernel(kernel)
    query, key, value = _check_tensors(query, key, value, cache)
    batch, seq, _, head_dim = query.shape
    query, factor = checks.query_and_scale(query, scale)
    engine = Engine(choose(kernel, query.device, query.dtype, head_dim), factor)
    counts = [seq] * batch if lengths is None else integers("lengths", lengths, seq, count=batch)
    cache.check_advance(counts)
    groups = cache.groups(counts)
    with torch.no_grad():
        for store in cache.stores:
            store.reserve(max((_rows_needed(store, position, count) for _, position, count in groups), default=0))
        query, key, value = (last_stride_1(tensor) for tensor in (query, key, value))
        if len(groups) == 1 and groups[0].tokens == seq and groups[0].rows == slice(0, batch):
            return _step(engine, query, key, value, cache, *groups[0][:2])
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for rows, position, count in groups:
            q, k, v = (tensor[rows, :count] for tensor in (query, key, value))
            out[rows, :count] = _step(engine, q, k, v, cache, rows, position)
        return out


def _check_tensors(query: object, key: object, value: object, cache: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three tensors if they fit together and the cache. Raises TypeError or ValueError."""
    if not isinstance(cache, DilatedKVCache):
        raise TypeError(f"cache: expected a DilatedKVCache, got {type(cache).__name__}")
    query, key, value = checks.query_key_value(query, key, value, same_length=True, enable_gqa=True)
    if query.dtype != cache.dtype:
        raise TypeError(f"query: expected the dtype of the cache, {cache.dtype}, got {query.dtype}")
    if query.device != cache.device:
        raise ValueError(f"query: expected the device of the cache, {cache.device}, got {query.device}")
    for name, tensor, heads in (("query", query, cache.num_heads), ("key", key, cache.kv_heads)):
        if (tensor.shape[0], *tensor.shape[2:]) != (cache.batch_size, heads, cache.head_dim):
            raise ValueError(
                f"{name}: expected the cache's (batch, seq, heads, head_dim) = "
                f"({cache.batch_size}, seq, {heads}, {cache.head_dim}), got {tuple(tensor.shape)}"
            )
    if torch.is_grad_enabled():
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that does not require grad, decoding computes no gradients "
                    f"(call it under torch.no_grad() or torch.inference_mode())"
                )
    return query, key, value


def _rows_needed(store: Store, position: int, count: int) -> int:
    """Rows a lane must have room for: those of the segment open after these tokens, or with the one token in it."""
    segment_length, rate = store.plan.segment_length, store.plan.rate
    if count == 1:  # kept before it is attended, even where it closes its segment
        return position % segment_length // rate + 1
    return -(-((position + count) % segment_length) // rate)


def _step(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, cache: DilatedKVCache, rows: slice, position: int
) -> Tensor:
    """Attend at least one token of these batch rows, which have all seen ``position``, and keep them.

    ``query``, ``key`` and ``value`` hold these rows only.
    """
    count = query.shape[1]
    if count > 1 and position == 0:
        out = _prompt(engine, query, key, value, cache)
    else:
        attend = _one_token if count == 1 else attend_chunk
        out = attend(engine, query, key, value, cache, rows, position)
        if cache.semantics == "grouped":
            out /= len(cache.dilation_rates)
    if count > 1:
        for store in cache.stores:
            keep_chunk(store, key, value, rows, position)
    cache.advance(rows, count)
    return out.to(cache.dtype)


def _prompt(engine: Engine, query: Tensor, key: Tensor, value: Tensor, cache: DilatedKVCache) -> Tensor:
    """Several tokens after none: there is nothing kept to attend, so this is the whole attention."""
    with torch.autocast(query.device.type, enabled=False):
        return dilated_attention(
            query,
            key,
            value,
            cache.segment_lengths,
            cache.dilation_rates,
            is_causal=True,
            scale=engine.scale,
            enable_gqa=True,
            semantics=cache.semantics,
            kernel=engine.kernel.name,
            allocator=cache.resources.allocator,
        )


def _one_token(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, cache: DilatedKVCache, rows: slice, position: int
) -> Tensor:
    """One token a row: kept first, in a place that no row still in use has, then attended with the rows before it."""
    query = query[:, 0]
    pair = torch.stack((key[:, 0], value[:, 0]))
    outs, lses = cache.outs[:, rows], cache.lses[:, rows]
    outs.zero_()
    # Of no weight beside any lse, and finite: where no branch has a head on its grid, the zeros are averaged.
    lses.fill_(torch.finfo(lses.dtype).min)
    for store in cache.stores:
        row, phase = divmod(position % store.plan.segment_length, store.plan.rate)
        for shelf in store.shelves.get(phase, ()):
            shelf = shelf.of(rows)
            shelf.pair.select(3, row).copy_(pair[:, :, shelf.kv_heads])
            lanes = query[:, shelf.heads].view(shelf.out.shape)
            live = shelf.key.narrow(2, 0, row + 1), shelf.value.narrow(2, 0, row + 1)
            out, lse = engine.attend(lanes, *live, is_causal=False)
            shelf.out.copy_(out)
            shelf.lse.copy_(lse)
    return merge_stack(outs, lses).unsqueeze(1)
