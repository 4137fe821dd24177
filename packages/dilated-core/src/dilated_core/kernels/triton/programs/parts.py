"""What the programs share: matrix products, rows, tiles, grids of branches, and who meets whom."""

# Annotations are evaluated: Triton reads constexpr among them, so no ``from __future__ import annotations`` here.
import triton
import triton.language as tl

# Arguments that change with the data. Triton would compile anew for a number that is 1 or a multiple of 16; for the
# strides of rows it should, as they say how wide the loads may be.
COUNTS = ("rows", "others", "num_tiles", "num_branches", "batch_size", "heads", "group")
FLAT = tuple(f"{of}_{dim}" for of in ("real", "lse", "grad_lse") for dim in ("batch", "head", "row"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Beyond every position, and less than int32 can hold.
FAR = tl.constexpr(1 << 30)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product in float32. UPCAST is for Triton's interpreter, whose bfloat16 product is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(pointer, rows, stride, keep, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, (rows, BLOCK_DIM); 0 in columns past HEAD_DIM and, if MASKED, in rows not to ``keep``."""
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
def store_rows(pointer, rows, stride, keep, values, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write rows of a matrix in the precision of the place."""
    columns = tl.arange(0, BLOCK_DIM)
    mask = keep[:, None]
    if HEAD_DIM < BLOCK_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def find_lane(num_tiles, heads, batch_size):
    """Which tile, head, batch row and split this program is; all but the tile int64, as they multiply strides."""
    program = tl.program_id(0)
    lane = program // num_tiles
    head = (lane % heads).to(tl.int64)
    batch = (lane // heads % batch_size).to(tl.int64)
    split = (lane // (heads * batch_size)).to(tl.int64)
    return program % num_tiles, head, batch, split


@triton.jit
def read_tile(
    order, head_class, tiles, tile, head, rows, others, ORDERED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile: positions in its sequence (clamped to valid ones), which are valid; the sequence's start and lengths."""
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
def read_branch(branches, phases, branch, head, heads, length, met):
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
def find_members(rows, valid, segment_length, rate, phase):
    """Which rows lie on the branch's grid, and in which segment."""
    segment = rows // segment_length
    member = valid & ((rows - segment * segment_length) % rate == phase)
    return member, segment


@triton.jit
def plan_walk(rows, valid, member, segment, segment_length, rate, phase, whole, total):
    """What a tile meets of a branch, as numbers along its grid: the rows on it, counted from 0 over all segments, so
    that ``whole`` of them are a segment. With segments of 8, rate 3 and phase 1:

        positions  1 4 7 | 9 12 15 | 17 20 23        numbers  0 1 2 | 3 4 5 | 6 7 8        whole = 3

    It meets those from ``low`` up to ``high``; its own rows lie from ``first`` to ``last``. ``same``: all valid rows
    are members, and in one segment, where number n is position ``base + n * rate``.
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
def find_others(
    number, high, base, segment_length, rate, phase, whole, real, real_stride,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """A block of a branch's grid, from ``number`` on: where it begins, positions less that, their segments, and which
    are to be met at all.

    If not MASKED the block lies in the one segment of the tile; ``positions`` are then the same for each block of the
    branch, so that a loop over blocks need not compute their addresses again. With HAS_MASK, padding is not to be met.
    """
    numbers = number + tl.arange(0, BLOCK)
    if MASKED:
        begin = tl.full([], 0, tl.int64)
        inside = numbers < high
        segment = numbers // whole
        positions = segment * segment_length + phase + (numbers - segment * whole) * rate
    else:
        begin = (base + number * rate).to(tl.int64)
        inside = numbers >= 0
        segment = numbers
        positions = tl.arange(0, BLOCK) * rate
    if HAS_MASK:
        real += begin * real_stride
        inside = inside & (tl.load(real + positions.to(tl.int64) * real_stride, mask=inside, other=0) != 0)
    return begin, positions, segment, inside


@triton.jit
def count_zero_keys(segment, member, segment_length, rate, phase, met):
    """torchscale's padding, counted: keys of score 0 and value 0 that each row meets beside those of its segment."""
    left = tl.minimum(met - segment * segment_length, segment_length)
    there = tl.maximum((left - phase + rate - 1) // rate, 0)
    return tl.where(member, (segment_length + rate - 1) // rate - there, 0)
