"""The forward program: out and lse of a tile of query rows."""

# Annotations are evaluated: Triton reads constexpr among them, so no ``from __future__ import annotations`` here.
import triton
import triton.language as tl

from dilated_core.kernels.triton.programs.parts import (
    COUNTS,
    FLAT,
    LN_2,
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


@triton.jit
def _attend(
    acc, total, peak, query, at, member, segment, k, v, k_stride, v_stride, real, real_stride,
    number, high, base, segment_length, rate, phase, whole, factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax over one block of keys. ``peak`` is of scores before ``factor``, which is > 0."""
    begin, positions, met_segment, keep = find_others(
        number, high, base, segment_length, rate, phase, whole, real, real_stride, BLOCK_OTHERS, MASKED, HAS_MASK
    )
    key = load_rows(k + begin * k_stride, positions, k_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    value = load_rows(v + begin * v_stride, positions, v_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    scores = product(query, tl.trans(key), PRECISION, UPCAST)
    if MASKED:
        meets = tl.where(member, segment, -1)[:, None] == tl.where(keep, met_segment, -2)[None, :]
        if IS_CAUSAL:
            meets = meets & (positions[None, :] <= at[:, None])
        scores = tl.where(meets, scores, -float("inf"))
    elif HAS_MASK:
        scores = tl.where(keep[None, :], scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    shift = higher * factor
    if MASKED or HAS_MASK:  # a row that has met no key yet stays at -inf, and -inf less -inf is no number
        shift = tl.where(higher == -float("inf"), 0.0, shift)
    weights = tl.exp2(scores * factor - shift[:, None])  # one instruction each, a multiplication and a subtraction
    kept = tl.exp2(peak * factor - shift)
    acc = acc * kept[:, None] + product(weights.to(value.dtype), value, PRECISION, UPCAST)
    return acc, total * kept + tl.sum(weights, 1), higher


@triton.jit(do_not_specialize=[*COUNTS, *FLAT, "splits", "lse_split"])
def forward(
    q, k, v, real, out, lse, order, head_class, tiles, branches, phases,
    q_strides, k_strides, v_strides, real_batch, real_head, real_row, out_strides, lse_batch, lse_head, lse_row,
    out_split, lse_split,
    rows, others, num_tiles, num_branches, batch_size, heads, group, splits, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr,
    ZERO_KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of query rows. One program a tile, head, batch row and split.

    With ``splits`` above 1 each program takes its share of every branch's keys, and writes its partial
    ``out_split`` and ``lse_split`` elements further: for a few rows with many keys.
    """
    tile, head, batch, split = find_lane(num_tiles, heads, batch_size)
    at, valid, start, length, met = read_tile(
        order, head_class, tiles, tile, head, rows, others, ORDERED, PACKED, BLOCK_ROWS
    )
    start = start.to(tl.int64)
    q += batch * q_strides[0] + start * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + start * k_strides[1] + head // group * k_strides[2]
    v += batch * v_strides[0] + start * v_strides[1] + head // group * v_strides[2]
    real += batch * real_batch + head // group * real_head + start * real_row
    query = load_rows(q, at, q_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    factor = scale * LOG2_E
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)

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
        # This split's share, in whole blocks.
        share = tl.cdiv(tl.cdiv(high - low, BLOCK_OTHERS), splits) * BLOCK_OTHERS
        low += split.to(tl.int32) * share
        high = tl.minimum(high, low + share)
        unmasked = low + tl.maximum(tl.minimum(common, high) - low, 0) // BLOCK_OTHERS * BLOCK_OTHERS
        for number in range(low, unmasked, BLOCK_OTHERS):
            acc, total, peak = _attend(
                acc, total, peak, query, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_row,
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, False, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        for number in range(unmasked, high, BLOCK_OTHERS):
            acc, total, peak = _attend(
                acc, total, peak, query, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_row,
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        if ZERO_KEYS:
            count = count_zero_keys(segment, member, segment_length, rate, phase, met)
            higher = tl.where(count > 0, tl.maximum(peak, 0.0), peak)
            shift = tl.where(higher == -float("inf"), 0.0, higher * factor)
            kept = tl.exp2(peak * factor - shift)
            acc = acc * kept[:, None]
            total = total * kept + count * tl.exp2(-shift)
            peak = higher

    met_any = total > 0.0
    out += split * out_split + batch * out_strides[0] + start * out_strides[1] + head * out_strides[2]
    lse += split * lse_split + batch * lse_batch + head * lse_head + start * lse_row
    total = tl.where(met_any, total, 1.0)
    store_rows(out, at, out_strides[1], valid, acc / total[:, None], HEAD_DIM, BLOCK_DIM)
    logarithm = tl.where(met_any, (peak * factor + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(lse + at.to(tl.int64) * lse_row, logarithm, mask=valid)
