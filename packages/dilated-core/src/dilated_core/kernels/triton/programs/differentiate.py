"""The programs of the backward.

With P = exp(S - lse) and D = rowsum(grad_out * out) - grad_lse, where out and lse may be those of a larger softmax:
dV = P^T grad_out, dS = P (grad_out V^T - D), dQ = scale dS K, dK = scale dS^T Q.
"""

# Annotations are evaluated: Triton reads constexpr among them, so no ``from __future__ import annotations`` here.
import triton
import triton.language as tl

from dilated_core.kernels.triton.programs.parts import (
    COUNTS,
    FLAT,
    LOG2_E,
    count_zero_keys,
    find_lane,
    find_members,
    find_others,
    load_rows,
    plan_walk,
    product,
    read_branch,
    read_tile,
    store_rows,
)


@triton.jit(do_not_specialize=[*COUNTS, *FLAT])
def row_stats(
    out, grad_out, lse, grad_lse, stats,
    out_strides, grad_out_strides, lse_batch, lse_head, lse_row, grad_lse_batch, grad_lse_head, grad_lse_row,
    rows, num_tiles, batch_size, heads,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Of each row two numbers, side by side in ``stats``: lse in base 2, +inf where no key is met, so that all weights
    are 0; and rowsum(grad_out * out) - grad_lse. One program a block of rows, head and batch row.
    """
    tile, head, batch, _ = find_lane(num_tiles, heads, batch_size)
    at = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = at < rows
    out += batch * out_strides[0] + head * out_strides[2]
    grad_out += batch * grad_out_strides[0] + head * grad_out_strides[2]
    products = load_rows(out, at, out_strides[1], valid, HEAD_DIM, BLOCK_DIM, True).to(tl.float32)
    products *= load_rows(grad_out, at, grad_out_strides[1], valid, HEAD_DIM, BLOCK_DIM, True).to(tl.float32)
    sums = tl.sum(products, 1)
    row_lse = tl.load(lse + batch * lse_batch + head * lse_head + at.to(tl.int64) * lse_row, mask=valid, other=0.0)
    finite = tl.abs(row_lse) < float("inf")
    if HAS_GRAD_LSE:
        grad = grad_lse + batch * grad_lse_batch + head * grad_lse_head
        # The lse of a row with no key is no number: nothing arrives through it.
        sums -= tl.load(grad + at.to(tl.int64) * grad_lse_row, mask=valid & finite, other=0.0)
    stats += 2 * ((batch * heads + head) * rows + at)
    tl.store(stats, tl.where(finite, row_lse * LOG2_E, float("inf")), mask=valid)
    tl.store(stats + 1, sums, mask=valid)


@triton.jit
def _score_keys(
    query, grad, lse, at, member, segment, k, v, k_stride, v_stride, real, real_stride,
    number, high, base, segment_length, rate, phase, whole, factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys, the weights that the rows give them, and the gradients of these weights, (rows, keys)."""
    begin, positions, met_segment, keep = find_others(
        number, high, base, segment_length, rate, phase, whole, real, real_stride, BLOCK_OTHERS, MASKED, HAS_MASK
    )
    key = load_rows(k + begin * k_stride, positions, k_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    value = load_rows(v + begin * v_stride, positions, v_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    weights = tl.exp2(product(query, tl.trans(key), PRECISION, UPCAST) * factor - lse[:, None])
    if MASKED:
        meets = tl.where(member, segment, -1)[:, None] == tl.where(keep, met_segment, -2)[None, :]
        if IS_CAUSAL:
            meets = meets & (positions[None, :] <= at[:, None])
        weights = tl.where(meets, weights, 0.0)
    elif HAS_MASK:
        weights = tl.where(keep[None, :], weights, 0.0)
    return key, weights, product(grad, tl.trans(value), PRECISION, UPCAST)


@triton.jit(do_not_specialize=[*COUNTS, *FLAT, "stats_branch"])
def grad_query(
    q, k, v, real, grad_out, stats, grad_q, order, head_class, tiles, branches, phases,
    q_strides, k_strides, v_strides, real_batch, real_head, real_row, grad_out_strides,
    grad_q_strides,
    stats_branch, rows, others, num_tiles, num_branches, batch_size, heads, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr,
    OWN_SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of query rows. One program a tile, head and batch row.

    OWN_SUMS is for torchscale, whose mixing weights take no gradient: D is then each branch's own, rowsum(grad_out *
    the branch's out) - grad_lse. On entry ``stats`` holds -grad_lse for every branch, ``stats_branch`` elements apart;
    the program adds the row sum, which it finds in a walk of its own, for ``grad_key_value`` to read.
    """
    tile, head, batch, _ = find_lane(num_tiles, heads, batch_size)
    at, valid, start, length, met = read_tile(
        order, head_class, tiles, tile, head, rows, others, ORDERED, PACKED, BLOCK_ROWS
    )
    start = start.to(tl.int64)
    q += batch * q_strides[0] + start * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + start * k_strides[1] + head // group * k_strides[2]
    v += batch * v_strides[0] + start * v_strides[1] + head // group * v_strides[2]
    real += batch * real_batch + head // group * real_head + start * real_row
    grad_out += batch * grad_out_strides[0] + start * grad_out_strides[1] + head * grad_out_strides[2]
    grad_q += batch * grad_q_strides[0] + start * grad_q_strides[1] + head * grad_q_strides[2]
    stats += 2 * ((batch * heads + head) * rows + start + at)
    query = load_rows(q, at, q_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    grad = load_rows(grad_out, at, grad_out_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    row_lse = tl.load(stats, mask=valid, other=float("inf"))
    row_sum = tl.load(stats + 1, mask=valid, other=0.0)
    factor = scale * LOG2_E
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    for branch in range(num_branches):
        segment_length, rate, phase, whole, walked = read_branch(branches, phases, branch, head, heads, length, met)
        member, segment = find_members(at, valid, segment_length, rate, phase)
        low, high, base, first, last, same = plan_walk(
            at, valid, member, segment, segment_length, rate, phase, whole, walked
        )
        common = high
        if IS_CAUSAL:
            high = tl.minimum(high, last + 1)
            common = tl.minimum(high, first + 1)
        common = tl.where(same, common, low)
        unmasked = low + (common - low) // BLOCK_OTHERS * BLOCK_OTHERS
        if OWN_SUMS:
            own = tl.zeros([BLOCK_ROWS], tl.float32)
            share = tl.zeros([BLOCK_ROWS], tl.float32)
            for number in range(low, high, BLOCK_OTHERS):
                key, weights, grad_weights = _score_keys(
                    query, grad, row_lse, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_row,
                    number, high, base, segment_length, rate, phase, whole, factor,
                    HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
                )  # fmt: skip
                own += tl.sum(weights * grad_weights, 1)
                share += tl.sum(weights, 1)
            if not IS_CAUSAL:
                zero_keys = count_zero_keys(segment, member, segment_length, rate, phase, met)
                share += zero_keys * tl.exp2(-row_lse)
            # A branch whose weights are all too small for float32 has no gradient either.
            own = tl.where(share > 0.0, own / tl.where(share > 0.0, share, 1.0), 0.0)
            row_sum = own + tl.load(stats + 1, mask=valid, other=0.0)
            tl.debug_barrier()  # several threads may read the same place: all of them, before one writes it
            tl.store(stats + 1, row_sum, mask=valid)
            stats += stats_branch
        for number in range(low, unmasked, BLOCK_OTHERS):
            key, weights, grad_weights = _score_keys(
                query, grad, row_lse, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_row,
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, False, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
            acc += product((weights * (grad_weights - row_sum[:, None])).to(key.dtype), key, PRECISION, UPCAST)
        for number in range(unmasked, high, BLOCK_OTHERS):
            key, weights, grad_weights = _score_keys(
                query, grad, row_lse, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_row,
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
            acc += product((weights * (grad_weights - row_sum[:, None])).to(key.dtype), key, PRECISION, UPCAST)

    store_rows(grad_q, at, grad_q_strides[1], valid, acc * scale, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _collect(
    grad_key, grad_value, key, value, at, member, segment, real_row,
    q, grad_out, stats, q_stride, grad_out_stride,
    number, high, base, segment_length, rate, phase, whole, factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of query rows adds to the gradients of the tile's keys and values; scores are (keys, queries)."""
    begin, positions, met_segment, keep = find_others(
        number, high, base, segment_length, rate, phase, whole, stats, 0, BLOCK_OTHERS, MASKED, False
    )
    query = load_rows(q + begin * q_stride, positions, q_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED)
    grad = load_rows(grad_out + begin * grad_out_stride, positions, grad_out_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED)
    # Both numbers of a row in one load: where a load has fewer numbers than threads, each thread loads all it needs.
    places = stats + 2 * begin + 2 * positions.to(tl.int64)[:, None] + tl.arange(0, 2)[None, :]
    pairs = tl.load(places, mask=keep[:, None], other=0.0) if MASKED else tl.load(places)
    row_lse, row_sum = tl.split(pairs)
    weights = tl.exp2(product(key, tl.trans(query), PRECISION, UPCAST) * factor - row_lse[None, :])
    if MASKED:
        meets = tl.where(member, segment, -1)[:, None] == tl.where(keep, met_segment, -2)[None, :]
        if IS_CAUSAL:
            meets = meets & (at[:, None] <= positions[None, :])
        weights = tl.where(meets, weights, 0.0)
    if HAS_MASK:
        weights = tl.where(real_row[:, None], weights, 0.0)
    grad_value += product(weights.to(grad.dtype), grad, PRECISION, UPCAST)
    grad_weights = product(value, tl.trans(grad), PRECISION, UPCAST)
    grad_key += product((weights * (grad_weights - row_sum[None, :])).to(query.dtype), query, PRECISION, UPCAST)
    return grad_key, grad_value


@triton.jit(do_not_specialize=[*COUNTS, *FLAT, "stats_branch", "shift"])
def grad_key_value(
    q, k, v, real, grad_out, stats, grad_k, grad_v, order, head_class, tiles, branches, phases,
    q_strides, k_strides, v_strides, real_batch, real_head, real_row, grad_out_strides,
    grad_k_strides, grad_v_strides,
    stats_branch, rows, others, num_tiles, num_branches, batch_size, heads, group, shift, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of key and value rows. One program a tile, key head and batch row.

    A key head meets one query head of its group in a launch, number ``shift``, along whose grid its rows are
    cut into tiles. With ADD the program adds to what the launch before it wrote: the sums have one order, always.
    """
    tile, kv_head, batch, _ = find_lane(num_tiles, heads // group, batch_size)
    head = kv_head * group + shift
    at, valid, start, length, met = read_tile(
        order, head_class, tiles, tile, head, rows, others, ORDERED, PACKED, BLOCK_ROWS
    )
    start = start.to(tl.int64)
    q += batch * q_strides[0] + start * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + start * k_strides[1] + kv_head * k_strides[2]
    v += batch * v_strides[0] + start * v_strides[1] + kv_head * v_strides[2]
    grad_out += batch * grad_out_strides[0] + start * grad_out_strides[1] + head * grad_out_strides[2]
    grad_k += batch * grad_k_strides[0] + start * grad_k_strides[1] + kv_head * grad_k_strides[2]
    grad_v += batch * grad_v_strides[0] + start * grad_v_strides[1] + kv_head * grad_v_strides[2]
    stats += 2 * ((batch * heads + head) * others + start)
    real_row = valid
    if HAS_MASK:
        real += batch * real_batch + kv_head * real_head + (start + at) * real_row
        real_row = valid & (tl.load(real, mask=valid, other=0) != 0)
    key = load_rows(k, at, k_strides[1], real_row, HEAD_DIM, BLOCK_DIM, True)
    value = load_rows(v, at, v_strides[1], real_row, HEAD_DIM, BLOCK_DIM, True)
    factor = scale * LOG2_E
    grad_key = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    for branch in range(num_branches):
        segment_length, rate, phase, whole, walked = read_branch(branches, phases, branch, head, heads, length, met)
        member, segment = find_members(at, valid, segment_length, rate, phase)
        low, high, base, first, last, same = plan_walk(
            at, valid, member, segment, segment_length, rate, phase, whole, walked
        )
        common = low
        if IS_CAUSAL:  # queries from the tile's first row on; all rows are seen from the tile's last row on
            low = tl.minimum(first, high)
            common = tl.minimum(high, low + tl.cdiv(tl.maximum(last - low, 0), BLOCK_OTHERS) * BLOCK_OTHERS)
        common = tl.where(same, common, high)
        end = common + (high - common) // BLOCK_OTHERS * BLOCK_OTHERS
        for number in range(common, end, BLOCK_OTHERS):
            grad_key, grad_value = _collect(
                grad_key, grad_value, key, value, at, member, segment, real_row,
                q, grad_out, stats, q_strides[1], grad_out_strides[1],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, False, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        # The blocks before and after those.
        before = tl.cdiv(common - low, BLOCK_OTHERS)
        for block in range(0, before + tl.cdiv(high - end, BLOCK_OTHERS)):
            number = tl.where(block < before, low + block * BLOCK_OTHERS, end + (block - before) * BLOCK_OTHERS)
            grad_key, grad_value = _collect(
                grad_key, grad_value, key, value, at, member, segment, real_row,
                q, grad_out, stats, q_strides[1], grad_out_strides[1],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        stats += stats_branch

    grad_key *= scale
    if ADD:
        grad_key += load_rows(grad_k, at, grad_k_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
        grad_value += load_rows(grad_v, at, grad_v_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    store_rows(grad_k, at, grad_k_strides[1], valid, grad_key, HEAD_DIM, BLOCK_DIM)
    store_rows(grad_v, at, grad_v_strides[1], valid, grad_value, HEAD_DIM, BLOCK_DIM)
