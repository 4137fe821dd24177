"""The Triton programs: dilated attention of one tile of rows over all branches, and its gradients. Imports Triton.

A tile is ``BLOCK_ROWS`` rows of one head in one sequence, whichever ``order`` names (see ``schedule``). For each branch
a program finds the segments its rows lie in, walks the rows of the same grid there, in place, a stride apart, and lets
one online softmax run on over all branches: there are no partial results to merge. Blocks that every row of the tile
meets as a whole need no mask; where tiles are cut well, most are such. What is computed never depends on the order:
membership, segments and causality are checked row by row wherever a block is not whole.

Numbers that change from call to call (lengths, branches, phases) are data: no new length or pattern compiles anything.

Arguments that all programs share:
    q, k, v, ...: tensors (batch, seq, heads, head_dim), last stride 1; ``*_strides``: of batch, seq and head.
    lse, delta, ...: float32 (batch, heads, seq); ``*_strides``: of batch, head and seq.
    real: (batch, kv_heads, seq), bool, True where a key is attended, and its strides; read only with HAS_MASK.
    order: (classes, rows), int32, positions; head_class: (heads,), int32. Read only with ORDERED.
    tiles: (tiles, 3), int32: where a tile's rows begin in the order, where its sequence starts and stops. Read only
        with PACKED.
    branches: (branches, 2), int32: segment lengths and rates; phases: (branches, heads), int32, where each head's grid
        starts in a segment, -1 where it has none.
    rows, others: how many rows the side has that is cut into tiles, and how many the side that is walked.
"""

# Annotations are evaluated: Triton reads constexpr among them, so no ``from __future__ import annotations`` here.
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Beyond every position, and less than int32 can hold.
FAR = tl.constexpr(1 << 30)


# ------------------------------------------------------------------------------------------------ parts


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product in float32. UPCAST is for Triton's interpreter, whose bfloat16 product is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load(pointer, rows, stride, keep, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, (rows, BLOCK_DIM); 0 in columns past HEAD_DIM and, if MASKED, in rows that ``keep`` leaves out."""
    columns = tl.arange(0, BLOCK_DIM)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED:
        mask = keep[:, None]
        if HEAD_DIM < BLOCK_DIM:
            mask = mask & (columns < HEAD_DIM)[None, :]
        values = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM < BLOCK_DIM:
        values = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _store(pointer, rows, stride, keep, values, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write rows of a matrix in the precision of the place."""
    columns = tl.arange(0, BLOCK_DIM)
    mask = keep[:, None]
    if HEAD_DIM < BLOCK_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _lane(num_tiles, heads, batch_size):
    """Which tile, head, batch row and split this program is."""
    program = tl.program_id(0)
    lane = program // num_tiles
    return program % num_tiles, lane % heads, (lane // heads % batch_size).to(tl.int64), lane // (heads * batch_size)


@triton.jit
def _tile(
    order, head_class, tiles, tile, head, rows, others, ORDERED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile: positions within its sequence (clamped to valid ones), which are valid, the sequence's start and lengths."""
    begin = tile * BLOCK
    start = tl.full([], 0, tl.int32)
    stop = rows
    if PACKED:
        begin = tl.load(tiles + 3 * tile)
        start = tl.load(tiles + 3 * tile + 1)
        stop = tl.load(tiles + 3 * tile + 2)
    places = begin + tl.arange(0, BLOCK)
    valid = places < stop
    if ORDERED:
        line = order + tl.load(head_class + head).to(tl.int64) * rows
        places = tl.load(line + places, mask=valid, other=start)
    length = stop - start
    met = others
    if PACKED:
        met = length
    return tl.where(valid, places - start, 0), valid, start, length, met


@triton.jit
def _grid(branches, phases, branch, head, heads, length, met):
    """A branch in this head: segment length, rate, phase, rows of a whole segment, and of the whole walked sequence."""
    segment_length = tl.minimum(tl.load(branches + 2 * branch), tl.maximum(length, met))
    rate = tl.load(branches + 2 * branch + 1)
    phase = tl.load(phases + branch * heads + head)
    whole = tl.maximum((segment_length - phase + rate - 1) // rate, 1)
    last = (met - 1) // segment_length
    tail = met - last * segment_length
    total = last * whole + tl.maximum((tail - phase + rate - 1) // rate, 0)
    return segment_length, rate, phase, whole, total


@triton.jit
def _members(rows, valid, segment_length, rate, phase):
    """Which rows lie on the branch's grid, and in which segment."""
    segment = rows // segment_length
    member = valid & ((rows - segment * segment_length) % rate == phase)
    return member, segment


@triton.jit
def _walk(rows, valid, member, segment, segment_length, rate, phase, whole, total):
    """What a tile meets of a branch, as numbers along its grid: those from ``low`` up to ``high``; its own rows lie from
    ``first`` to ``last``. ``same``: all valid rows are members, and in one segment, where number n is position
    ``base + n * rate``.
    """
    lowest = tl.min(tl.where(member, segment, FAR))
    highest = tl.max(tl.where(member, segment, -1))
    same = (lowest == highest) & (tl.max((valid & ~member).to(tl.int32)) == 0)
    low = tl.where(highest >= 0, lowest * whole, 0)
    high = tl.where(highest >= 0, tl.minimum((highest + 1) * whole, total), 0)
    number = segment * whole + (rows - segment * segment_length - phase) // rate
    first = tl.min(tl.where(member, number, FAR))
    last = tl.max(tl.where(member, number, -1))
    base = phase + lowest * (segment_length - whole * rate)
    return low, high, base, first, last, same


@triton.jit
def _others(
    numbers, high, base, segment_length, rate, phase, whole, real, real_stride,
    MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Positions of numbers along a branch's grid, their segments, and which are to be met at all.

    If not MASKED the numbers lie in the one segment of the tile. With HAS_MASK, padding is not to be met.
    """
    if MASKED:
        inside = numbers < high
        segment = numbers // whole
        positions = segment * segment_length + phase + (numbers - segment * whole) * rate
    else:
        positions = base + numbers * rate
        segment = numbers // whole
        inside = numbers >= 0
    if HAS_MASK:
        inside = inside & (tl.load(real + positions.to(tl.int64) * real_stride, mask=inside, other=0) != 0)
    return positions, segment, inside


@triton.jit
def _zero_keys(segment, member, segment_length, rate, phase, met):
    """torchscale's padding, counted: keys of score 0 and value 0 that each row meets beside those of its segment."""
    left = tl.minimum(met - segment * segment_length, segment_length)
    there = tl.maximum((left - phase + rate - 1) // rate, 0)
    return tl.where(member, (segment_length + rate - 1) // rate - there, 0)


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def _attend(
    acc, total, peak, query, at, member, segment, k, v, k_stride, v_stride, real, real_stride,
    number, high, base, segment_length, rate, phase, whole, factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax, in base 2, over one block of keys."""
    positions, met_segment, keep = _others(
        number + tl.arange(0, BLOCK_OTHERS), high, base, segment_length, rate, phase, whole, real, real_stride,
        MASKED, HAS_MASK,
    )  # fmt: skip
    key = _load(k, positions, k_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    value = _load(v, positions, v_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    scores = _dot(query, tl.trans(key), PRECISION, UPCAST) * factor
    if MASKED:
        meets = member[:, None] & keep[None, :] & (segment[:, None] == met_segment[None, :])
        if IS_CAUSAL:
            meets = meets & (positions[None, :] <= at[:, None])
        scores = tl.where(meets, scores, -float("inf"))
    elif HAS_MASK:
        scores = tl.where(keep[None, :], scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    shift = higher
    if MASKED or HAS_MASK:  # a row that has met no key yet stays at -inf, and -inf less -inf is no number
        shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(peak - shift)
    acc = acc * kept[:, None] + _dot(weights.to(value.dtype), value, PRECISION, UPCAST)
    return acc, total * kept + tl.sum(weights, 1), higher


@triton.jit(do_not_specialize=["rows", "others", "num_tiles", "num_branches", "batch_size", "heads", "group", "splits"])
def forward(
    q, k, v, real, out, lse, order, head_class, tiles, branches, phases,
    q_strides, k_strides, v_strides, real_strides, out_strides, lse_strides, out_split, lse_split,
    rows, others, num_tiles, num_branches, batch_size, heads, group, splits, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr,
    ZERO_KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of query rows. One program a tile, head, batch row and split.

    With ``splits`` above 1 each program takes its share of every branch's keys, and writes its partial
    ``out_split`` and ``lse_split`` elements further: for a few rows with many keys.
    """
    tile, head, batch, split = _lane(num_tiles, heads, batch_size)
    at, valid, start, length, met = _tile(
        order, head_class, tiles, tile, head, rows, others, ORDERED, PACKED, BLOCK_ROWS
    )
    start = start.to(tl.int64)
    q += batch * q_strides[0] + start * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + start * k_strides[1] + head // group * k_strides[2]
    v += batch * v_strides[0] + start * v_strides[1] + head // group * v_strides[2]
    real += batch * real_strides[0] + head // group * real_strides[1] + start * real_strides[2]
    query = _load(q, at, q_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    factor = scale * LOG2_E
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)

    for branch in range(num_branches):
        segment_length, rate, phase, whole, last_number = _grid(branches, phases, branch, head, heads, length, met)
        member, segment = _members(at, valid, segment_length, rate, phase)
        low, high, base, first, last, same = _walk(
            at, valid, member, segment, segment_length, rate, phase, whole, last_number
        )
        common = high
        if IS_CAUSAL:
            high = tl.minimum(high, last + 1)
            common = tl.minimum(high, first + 1)
        common = tl.where(same, common, low)
        # This split's share, in whole blocks.
        share = tl.cdiv(tl.cdiv(high - low, BLOCK_OTHERS), splits) * BLOCK_OTHERS
        low += split * share
        high = tl.minimum(high, low + share)
        unmasked = low + tl.maximum(tl.minimum(common, high) - low, 0) // BLOCK_OTHERS * BLOCK_OTHERS
        for number in range(low, unmasked, BLOCK_OTHERS):
            acc, total, peak = _attend(
                acc, total, peak, query, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_strides[2],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, False, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        for number in range(unmasked, high, BLOCK_OTHERS):
            acc, total, peak = _attend(
                acc, total, peak, query, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_strides[2],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        if ZERO_KEYS:
            count = _zero_keys(segment, member, segment_length, rate, phase, met)
            higher = tl.where(count > 0, tl.maximum(peak, 0.0), peak)
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            kept = tl.exp2(peak - shift)
            acc = acc * kept[:, None]
            total = total * kept + count * tl.exp2(-shift)
            peak = higher

    met_any = total > 0.0
    out += split * out_split + batch * out_strides[0] + start * out_strides[1] + head * out_strides[2]
    lse += split * lse_split + batch * lse_strides[0] + head * lse_strides[1] + start * lse_strides[2]
    total = tl.where(met_any, total, 1.0)
    _store(out, at, out_strides[1], valid, acc / total[:, None], HEAD_DIM, BLOCK_DIM)
    logarithm = tl.where(met_any, (peak + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(lse + at.to(tl.int64) * lse_strides[2], logarithm, mask=valid)


# ------------------------------------------------------------------------------------------------ backward
# With P = exp(S - lse) and D = rowsum(grad_out * out) - grad_lse, where out and lse may be those of a larger softmax:
# dV = P^T grad_out, dS = P (grad_out V^T - D), dQ = scale dS K, dK = scale dS^T Q.


@triton.jit
def _base_2(lse):
    """lse in base 2; +inf for a row with no key, whose weights are then 0."""
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)


@triton.jit(do_not_specialize=["rows", "num_tiles", "batch_size", "heads"])
def row_sums(
    out, grad_out, lse, grad_lse, delta,
    out_strides, grad_out_strides, lse_strides, grad_lse_strides, delta_strides,
    rows, num_tiles, batch_size, heads,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad_out * out) - grad_lse, float32. One program a block of rows, head and batch row."""
    tile, head, batch, _ = _lane(num_tiles, heads, batch_size)
    at = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = at < rows
    out += batch * out_strides[0] + head * out_strides[2]
    grad_out += batch * grad_out_strides[0] + head * grad_out_strides[2]
    product = _load(out, at, out_strides[1], valid, HEAD_DIM, BLOCK_DIM, True).to(tl.float32)
    product *= _load(grad_out, at, grad_out_strides[1], valid, HEAD_DIM, BLOCK_DIM, True).to(tl.float32)
    sums = tl.sum(product, 1)
    if HAS_GRAD_LSE:
        own = lse + batch * lse_strides[0] + head * lse_strides[1] + at.to(tl.int64) * lse_strides[2]
        finite = tl.abs(tl.load(own, mask=valid, other=0.0)) < float("inf")
        grad = grad_lse + batch * grad_lse_strides[0] + head * grad_lse_strides[1]
        # The lse of a row with no key is no number: nothing arrives through it.
        sums -= tl.load(grad + at.to(tl.int64) * grad_lse_strides[2], mask=valid & finite, other=0.0)
    delta += batch * delta_strides[0] + head * delta_strides[1] + at.to(tl.int64) * delta_strides[2]
    tl.store(delta, sums, mask=valid)


@triton.jit
def _score_keys(
    query, grad, lse, at, member, segment, k, v, k_stride, v_stride, real, real_stride,
    number, high, base, segment_length, rate, phase, whole, factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys, the weights that the rows give them, and the gradients of these weights, (rows, keys)."""
    positions, met_segment, keep = _others(
        number + tl.arange(0, BLOCK_OTHERS), high, base, segment_length, rate, phase, whole, real, real_stride,
        MASKED, HAS_MASK,
    )  # fmt: skip
    key = _load(k, positions, k_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    value = _load(v, positions, v_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED or HAS_MASK)
    weights = tl.exp2(_dot(query, tl.trans(key), PRECISION, UPCAST) * factor - lse[:, None])
    if MASKED:
        meets = member[:, None] & keep[None, :] & (segment[:, None] == met_segment[None, :])
        if IS_CAUSAL:
            meets = meets & (positions[None, :] <= at[:, None])
        weights = tl.where(meets, weights, 0.0)
    elif HAS_MASK:
        weights = tl.where(keep[None, :], weights, 0.0)
    return key, weights, _dot(grad, tl.trans(value), PRECISION, UPCAST)


@triton.jit(do_not_specialize=["rows", "others", "num_tiles", "num_branches", "batch_size", "heads", "group"])
def grad_query(
    q, k, v, real, grad_out, lse, delta, grad_q, order, head_class, tiles, branches, phases,
    q_strides, k_strides, v_strides, real_strides, grad_out_strides, lse_strides, delta_strides, grad_q_strides,
    delta_branch, rows, others, num_tiles, num_branches, batch_size, heads, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr,
    OWN_SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of query rows. One program a tile, head and batch row.

    OWN_SUMS is for torchscale, whose mixing weights take no gradient: D is then each branch's own, rowsum(grad_out *
    the branch's out) - grad_lse. On entry ``delta`` holds -grad_lse for every branch, ``delta_branch`` elements apart;
    the program adds the row sum, which it finds in a walk of its own, for ``grad_key_value`` to read.
    """
    tile, head, batch, _ = _lane(num_tiles, heads, batch_size)
    at, valid, start, length, met = _tile(
        order, head_class, tiles, tile, head, rows, others, ORDERED, PACKED, BLOCK_ROWS
    )
    start = start.to(tl.int64)
    q += batch * q_strides[0] + start * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + start * k_strides[1] + head // group * k_strides[2]
    v += batch * v_strides[0] + start * v_strides[1] + head // group * v_strides[2]
    real += batch * real_strides[0] + head // group * real_strides[1] + start * real_strides[2]
    grad_out += batch * grad_out_strides[0] + start * grad_out_strides[1] + head * grad_out_strides[2]
    grad_q += batch * grad_q_strides[0] + start * grad_q_strides[1] + head * grad_q_strides[2]
    lse += batch * lse_strides[0] + head * lse_strides[1] + (start + at) * lse_strides[2]
    delta += batch * delta_strides[0] + head * delta_strides[1] + (start + at) * delta_strides[2]
    query = _load(q, at, q_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    grad = _load(grad_out, at, grad_out_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    row_lse = _base_2(tl.load(lse, mask=valid, other=float("inf")))
    row_sum = tl.load(delta, mask=valid, other=0.0)
    factor = scale * LOG2_E
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    for branch in range(num_branches):
        segment_length, rate, phase, whole, last_number = _grid(branches, phases, branch, head, heads, length, met)
        member, segment = _members(at, valid, segment_length, rate, phase)
        low, high, base, first, last, same = _walk(
            at, valid, member, segment, segment_length, rate, phase, whole, last_number
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
                    query, grad, row_lse, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_strides[2],
                    number, high, base, segment_length, rate, phase, whole, factor,
                    HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
                )  # fmt: skip
                own += tl.sum(weights * grad_weights, 1)
                share += tl.sum(weights, 1)
            if not IS_CAUSAL:
                zero_keys = _zero_keys(segment, member, segment_length, rate, phase, met)
                share += zero_keys * tl.exp2(-row_lse)
            # A branch whose weights are all too small for float32 has no gradient either.
            own = tl.where(share > 0.0, own / tl.where(share > 0.0, share, 1.0), 0.0)
            row_sum = own + tl.load(delta + branch * delta_branch, mask=valid, other=0.0)
            tl.store(delta + branch * delta_branch, row_sum, mask=valid)
        for number in range(low, unmasked, BLOCK_OTHERS):
            key, weights, grad_weights = _score_keys(
                query, grad, row_lse, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_strides[2],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, False, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
            acc += _dot((weights * (grad_weights - row_sum[:, None])).to(key.dtype), key, PRECISION, UPCAST)
        for number in range(unmasked, high, BLOCK_OTHERS):
            key, weights, grad_weights = _score_keys(
                query, grad, row_lse, at, member, segment, k, v, k_strides[1], v_strides[1], real, real_strides[2],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
            acc += _dot((weights * (grad_weights - row_sum[:, None])).to(key.dtype), key, PRECISION, UPCAST)

    _store(grad_q, at, grad_q_strides[1], valid, acc * scale, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _collect(
    grad_key, grad_value, key, value, at, member, segment, real_row,
    q, grad_out, lse, delta, q_stride, grad_out_stride, lse_stride, delta_stride,
    number, high, base, segment_length, rate, phase, whole, factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of query rows adds to the gradients of the tile's keys and values; scores are (keys, queries)."""
    positions, met_segment, keep = _others(
        number + tl.arange(0, BLOCK_OTHERS), high, base, segment_length, rate, phase, whole, lse, 0, MASKED, False
    )
    query = _load(q, positions, q_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED)
    grad = _load(grad_out, positions, grad_out_stride, keep, HEAD_DIM, BLOCK_DIM, MASKED)
    far = positions.to(tl.int64)
    row_lse = _base_2(tl.load(lse + far * lse_stride, mask=keep, other=float("inf")))
    row_sum = tl.load(delta + far * delta_stride, mask=keep, other=0.0)
    weights = tl.exp2(_dot(key, tl.trans(query), PRECISION, UPCAST) * factor - row_lse[None, :])
    if MASKED:
        meets = member[:, None] & keep[None, :] & (segment[:, None] == met_segment[None, :])
        if IS_CAUSAL:
            meets = meets & (at[:, None] <= positions[None, :])
        weights = tl.where(meets, weights, 0.0)
    if HAS_MASK:
        weights = tl.where(real_row[:, None], weights, 0.0)
    grad_value += _dot(weights.to(grad.dtype), grad, PRECISION, UPCAST)
    grad_weights = _dot(value, tl.trans(grad), PRECISION, UPCAST)
    grad_key += _dot((weights * (grad_weights - row_sum[None, :])).to(query.dtype), query, PRECISION, UPCAST)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["rows", "others", "num_tiles", "num_branches", "batch_size", "heads", "group", "member_of_group"])
def grad_key_value(
    q, k, v, real, grad_out, lse, delta, grad_k, grad_v, order, head_class, tiles, branches, phases,
    q_strides, k_strides, v_strides, real_strides, grad_out_strides, lse_strides, delta_strides,
    grad_k_strides, grad_v_strides,
    delta_branch, rows, others, num_tiles, num_branches, batch_size, heads, group, member_of_group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of key and value rows. One program a tile, key head and batch row.

    A key head meets one query head of its group in a launch, number ``member_of_group``, along whose grid its rows are
    cut into tiles. With ADD the program adds to what the launch before it wrote: the sums have one order, always.
    """
    tile, kv_head, batch, _ = _lane(num_tiles, heads // group, batch_size)
    head = kv_head * group + member_of_group
    at, valid, start, length, met = _tile(
        order, head_class, tiles, tile, head, rows, others, ORDERED, PACKED, BLOCK_ROWS
    )
    start = start.to(tl.int64)
    q += batch * q_strides[0] + start * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + start * k_strides[1] + kv_head * k_strides[2]
    v += batch * v_strides[0] + start * v_strides[1] + kv_head * v_strides[2]
    grad_out += batch * grad_out_strides[0] + start * grad_out_strides[1] + head * grad_out_strides[2]
    grad_k += batch * grad_k_strides[0] + start * grad_k_strides[1] + kv_head * grad_k_strides[2]
    grad_v += batch * grad_v_strides[0] + start * grad_v_strides[1] + kv_head * grad_v_strides[2]
    lse += batch * lse_strides[0] + head * lse_strides[1] + start * lse_strides[2]
    delta += batch * delta_strides[0] + head * delta_strides[1] + start * delta_strides[2]
    real_row = valid
    if HAS_MASK:
        real += batch * real_strides[0] + kv_head * real_strides[1] + (start + at) * real_strides[2]
        real_row = valid & (tl.load(real, mask=valid, other=0) != 0)
    key = _load(k, at, k_strides[1], real_row, HEAD_DIM, BLOCK_DIM, True)
    value = _load(v, at, v_strides[1], real_row, HEAD_DIM, BLOCK_DIM, True)
    factor = scale * LOG2_E
    grad_key = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    for branch in range(num_branches):
        segment_length, rate, phase, whole, last_number = _grid(branches, phases, branch, head, heads, length, met)
        member, segment = _members(at, valid, segment_length, rate, phase)
        low, high, base, first, last, same = _walk(
            at, valid, member, segment, segment_length, rate, phase, whole, last_number
        )
        branch_delta = delta + branch * delta_branch
        common = low
        if IS_CAUSAL:  # queries from the tile's first row on; all rows are seen from the tile's last row on
            low = tl.minimum(first, high)
            common = tl.minimum(high, low + tl.cdiv(tl.maximum(last - low, 0), BLOCK_OTHERS) * BLOCK_OTHERS)
        common = tl.where(same, common, high)
        end = common + (high - common) // BLOCK_OTHERS * BLOCK_OTHERS
        for number in range(common, end, BLOCK_OTHERS):
            grad_key, grad_value = _collect(
                grad_key, grad_value, key, value, at, member, segment, real_row,
                q, grad_out, lse, branch_delta, q_strides[1], grad_out_strides[1], lse_strides[2], delta_strides[2],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, False, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip
        # The blocks before and after those.
        before = tl.cdiv(common - low, BLOCK_OTHERS)
        for block in range(0, before + tl.cdiv(high - end, BLOCK_OTHERS)):
            number = tl.where(block < before, low + block * BLOCK_OTHERS, end + (block - before) * BLOCK_OTHERS)
            grad_key, grad_value = _collect(
                grad_key, grad_value, key, value, at, member, segment, real_row,
                q, grad_out, lse, branch_delta, q_strides[1], grad_out_strides[1], lse_strides[2], delta_strides[2],
                number, high, base, segment_length, rate, phase, whole, factor,
                HEAD_DIM, BLOCK_DIM, BLOCK_OTHERS, IS_CAUSAL, True, HAS_MASK, PRECISION, UPCAST,
            )  # fmt: skip

    grad_key *= scale
    if ADD:
        grad_key += _load(grad_k, at, grad_k_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
        grad_value += _load(grad_v, at, grad_v_strides[1], valid, HEAD_DIM, BLOCK_DIM, True)
    _store(grad_k, at, grad_k_strides[1], valid, grad_key, HEAD_DIM, BLOCK_DIM)
    _store(grad_v, at, grad_v_strides[1], valid, grad_value, HEAD_DIM, BLOCK_DIM)
