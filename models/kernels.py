"""The kernels of :mod:`models.fused`, in Triton: imported only where they run, for a GPU's torch brings Triton and others do not."""

import triton
import triton.language as tl


@triton.jit
def product(
    x,
    weight,
    norm,
    residual,
    out,
    eps,
    width: tl.constexpr,
    outputs: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some outputs of every row: x (ROWS, width), weight (outputs, width), twice as many outputs where GATED."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # a variable for each row: a loop in here carries no lists
    sum0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    up0, up1, up2, up3 = sum0, sum0, sum0, sum0
    square0, square1, square2, square3 = sum0, sum0, sum0, sum0
    for start in tl.static_range(0, width, BLOCK_K):  # unrolled, to have all on its way at once
        k = start + tl.arange(0, BLOCK_K)
        inside = k < width
        read = (n < outputs)[:, None] & inside[None, :]
        w = tl.load(weight + n.to(tl.int64)[:, None] * width + k[None, :], mask=read, other=0.0)
        w = w.to(tl.float32)
        u = w
        if GATED:
            further = (n + outputs).to(tl.int64)
            u = tl.load(weight + further[:, None] * width + k[None, :], mask=read, other=0.0)
            u = u.to(tl.float32)
        # what all outputs share is read for each of them: to hand it around would be to wait for each other
        shared = (n * 0)[:, None] + k[None, :]
        factor = tl.full((BLOCK_N, BLOCK_K), 1.0, tl.float32)
        if NORM:
            factor = tl.load(norm + shared, mask=inside[None, :], other=0.0).to(tl.float32)
        own = x + shared
        sum0, up0, square0 = _row(own, inside, factor, w, u, sum0, up0, square0, NORM, GATED)
        if ROWS > 1:
            own += width
            sum1, up1, square1 = _row(own, inside, factor, w, u, sum1, up1, square1, NORM, GATED)
        if ROWS > 2:
            own += width
            sum2, up2, square2 = _row(own, inside, factor, w, u, sum2, up2, square2, NORM, GATED)
        if ROWS > 3:
            own += width
            sum3, up3, square3 = _row(own, inside, factor, w, u, sum3, up3, square3, NORM, GATED)
    there = n < outputs
    result = _result(sum0, up0, square0, width, eps, NORM, GATED)
    _store(out + n, result, residual + n, there, RESIDUAL)
    if ROWS > 1:
        result = _result(sum1, up1, square1, width, eps, NORM, GATED)
        _store(out + outputs + n, result, residual + outputs + n, there, RESIDUAL)
    if ROWS > 2:
        result = _result(sum2, up2, square2, width, eps, NORM, GATED)
        _store(out + 2 * outputs + n, result, residual + 2 * outputs + n, there, RESIDUAL)
    if ROWS > 3:
        result = _result(sum3, up3, square3, width, eps, NORM, GATED)
        _store(out + 3 * outputs + n, result, residual + 3 * outputs + n, there, RESIDUAL)


@triton.jit
def _row(places, inside, factor, w, u, sums, ups, squares, NORM: tl.constexpr, GATED: tl.constexpr):
    """What some columns of one row add to its sums."""
    x = tl.load(places, mask=inside[None, :], other=0.0).to(tl.float32)
    if NORM:
        squares += x * x
        x *= factor
    sums += w * x
    if GATED:
        ups += u * x
    return sums, ups, squares


@triton.jit
def _result(sums, ups, squares, width: tl.constexpr, eps, NORM: tl.constexpr, GATED: tl.constexpr):
    """Outputs (BLOCK_N,) of one row."""
    result = tl.sum(sums, 1)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / width + eps)
        result *= factor
    if GATED:
        result = result * tl.sigmoid(result) * (tl.sum(ups, 1) * factor)
    return result


@triton.jit
def _store(out, result, residual, there, RESIDUAL: tl.constexpr):
    if RESIDUAL:
        result += tl.load(residual, mask=there, other=0.0).to(tl.float32)
    tl.store(out, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def attend(
    qkv,
    keys,
    values,
    place,
    out,
    peaks,
    sums,
    prefix,
    heads,
    row_stride,
    head_stride,
    scale,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head of one row over one chunk of its cache, into which the new key and value are written."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    split = tl.program_id(1)
    slot = prefix + tl.load(place).to(tl.int32)
    d = tl.arange(0, BLOCK_DIM)
    in_head = d < DIM
    new = qkv + (row * 3 * heads + head) * DIM + d
    q = tl.load(new, mask=in_head, other=0.0).to(tl.float32) * scale
    new_key = tl.load(new + heads * DIM, mask=in_head, other=0.0)
    new_value = tl.load(new + 2 * heads * DIM, mask=in_head, other=0.0)
    p = split * CHUNK + tl.arange(0, CHUNK)
    held = (p < slot)[:, None] & in_head[None, :]
    is_new, seen = (p == slot)[:, None], p <= slot
    own = row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    places = own + p[:, None] * DIM + d[None, :]
    key = tl.load(keys + places, mask=held, other=0.0)
    key = tl.where(is_new, new_key[None, :], key).to(tl.float32)
    value = tl.load(values + places, mask=held, other=0.0)
    value = tl.where(is_new, new_value[None, :], value).to(tl.float32)
    scores = tl.where(seen, tl.sum(key * q[None, :], 1), -float("inf"))
    peak = tl.max(scores, 0)  # -inf in a chunk of which nothing is filled yet
    weights = tl.where(seen, tl.exp(scores - peak), 0.0)
    total = tl.sum(weights, 0)
    mixed = tl.sum(weights[:, None] * value, 0)
    if (slot >= split * CHUNK) & (slot < split * CHUNK + CHUNK):
        tl.store(keys + own + slot * DIM + d, new_key, mask=in_head)
        tl.store(values + own + slot * DIM + d, new_value, mask=in_head)
    if SPLITS == 1:
        result = (mixed / total).to(out.dtype.element_ty)
        tl.store(out + (row * heads + head) * DIM + d, result, mask=in_head)
    else:
        part = (row * heads + head) * SPLITS + split
        tl.store(out + part * DIM + d, mixed, mask=in_head)
        tl.store(peaks + part, peak)
        tl.store(sums + part, total)


@triton.jit
def join(
    parts,
    peaks,
    sums,
    out,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One head of one row from its chunks, each of which is relative to the peak of its own scores."""
    own = tl.program_id(0)
    s, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    there, in_head = s < SPLITS, d < DIM
    peak = tl.load(peaks + own * SPLITS + s, mask=there, other=-float("inf"))
    weights = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(weights * tl.load(sums + own * SPLITS + s, mask=there, other=0.0), 0)
    places = (own * SPLITS + s)[:, None] * DIM + d[None, :]
    read = there[:, None] & in_head[None, :]
    mixed = tl.sum(weights[:, None] * tl.load(parts + places, mask=read, other=0.0), 0)
    tl.store(out + own * DIM + d, (mixed / total).to(out.dtype.element_ty), mask=in_head)
