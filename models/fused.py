"""A decode step's blocks on a GPU: for a few rows five or six kernels a block, where there would be some twenty.

A guided step at batch 1 is two rows. It has to read every weight once and has next to nothing to compute, so the time is
that of reading and of everything that keeps from reading: norms, residuals, and products that are tiled for many rows. Here
a product reads its weight in rows as they lie, for all rows of x at once; the norm before it, the gate and the residual
after it happen on the way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Block

# of a product that reads its weight by rows; with more, one that is tiled for matrix units is faster
MOST_ROWS = 4

# measured on an H100 at width 1280: 6.3 us a product with one warp to a program, 6.9 with 2 to 8; attention 4.8 us with 64
# places, 5.1 with 128, 5.8 with 256
_WARPS = 1  # of a program, one output to each
_CHUNK = 64  # places of the cache that one program looks at

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the kernels compute in float32

_given_up = False


def give_up() -> bool:
    """Fuse nothing from now on; whether anything was before. Triton may be there and lack a compiler of C, say."""
    global _given_up
    before, _given_up = _given_up, True
    return not before and _has_triton()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(blocks: Iterable[nn.Module]) -> bool:
    """Whether :func:`run_blocks` computes what these blocks do: nobody has put anything else into them."""
    return (
        not _given_up
        and _has_triton()
        and not torch.is_autocast_enabled("cuda")
        and all(map(_is_plain, blocks))
    )


def _is_plain(block: nn.Module) -> bool:
    if type(block) is not Block:
        return False
    changed = (
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        for part in block.modules()
    )
    norms = type(block.norm1) is type(block.norm2) is nn.RMSNorm
    return (
        norms
        and not any(changed)
        and all(
            type(layer) is nn.Linear
            and type(layer.weight.data) is Tensor  # not of 8-bit integers, say
            and layer.weight.dtype in _DTYPES
            and layer.weight.is_contiguous()
            and layer.bias is None
            for layer in (block.qkv, block.out, block.gate_up, block.down)
        )
    )


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    place: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    prefix: int,
) -> Tensor:
    """One new token through all blocks.

    Args:
        blocks: see :func:`can_fuse`.
        x: embedded, with its position (R, D).
        place: of the token, 0 to L - 1, int64 ().
        keys: of each layer (R, heads, T + L, D / heads); place T + ``place`` is filled in.
        values: the same.
        prefix: T.

    Returns:
        (R, D), before the last norm.
    """
    for block, key, value in zip(blocks, keys, values, strict=True):
        assert isinstance(block, Block)
        qkv = product(x, block.qkv.weight, norm=block.norm1)
        mixed = attend(qkv, key, value, place, prefix)
        x = product(mixed, block.out.weight, residual=x)
        fed = product(x, block.gate_up.weight, norm=block.norm2, gated=True)
        x = product(fed, block.down.weight, residual=x)
    return x


def product(
    x: Tensor,
    weight: Tensor,
    norm: nn.RMSNorm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """``residual + weight @ norm(x)`` of x (R, D); where ``gated`` the first half of its outputs is SiLU, times the second.

    Args:
        x: (R, D), contiguous.
        weight: (N, D), contiguous.
        norm: of x.
        residual: (R, N).
        gated: (R, N / 2) is returned.
    """
    if len(x) > MOST_ROWS:
        x = x if norm is None else norm(x)
        out = F.linear(x, weight) if residual is None else torch.addmm(residual, x, weight.t())
        if not gated:
            return out
        gate, up = out.chunk(2, dim=-1)
        return F.silu(gate) * up
    from models import kernels

    rows, width = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = x.new_empty(rows, outputs)
    # one output to a warp, whose lanes read 16 bytes each; fixed, for an image depends on the order of its sums
    block_n, block_k = _WARPS, 512 // x.element_size()
    kernels.product[(-(-outputs // block_n),)](
        x,
        weight,
        x if norm is None else norm.weight,
        x if residual is None else residual,
        out,
        0.0 if norm is None else norm.eps,
        width=width,
        outputs=outputs,
        ROWS=rows,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=_WARPS,
    )
    return out


def attend(qkv: Tensor, keys: Tensor, values: Tensor, place: Tensor, prefix: int) -> Tensor:
    """Attention of one new token to itself and to those in the cache, which it joins.

    Args:
        qkv: (R, 3 * D).
        keys: (R, heads, T + L, D / heads).
        values: the same.
        place: of the token, int64 ().
        prefix: T.

    Returns:
        (R, D).
    """
    from models import kernels

    rows, heads, places, dim = keys.shape
    out = qkv.new_empty(rows, heads * dim)
    chunk = min(_CHUNK, _power_of_2(places))
    splits = -(-places // chunk)
    size = {"DIM": dim, "BLOCK_DIM": _power_of_2(dim), "SPLITS": splits}
    parts, peaks, sums = out, out, out
    if splits > 1:
        parts = qkv.new_empty(rows * heads * splits, dim, dtype=torch.float32)
        peaks, sums = parts.new_empty(2, rows * heads * splits)
    strides = (keys.stride(0), keys.stride(1))
    grid = (rows * heads, splits)
    kernels.attend[grid](
        qkv,
        keys,
        values,
        place,
        parts,
        peaks,
        sums,
        prefix,
        heads,
        *strides,
        dim**-0.5,
        CHUNK=chunk,
        **size,
    )
    if splits > 1:
        kernels.join[(rows * heads,)](
            parts, peaks, sums, out, BLOCK_SPLITS=_power_of_2(splits), **size
        )
    return out


def _power_of_2(count: int) -> int:
    """The smallest that is not below a count."""
    return 1 << (count - 1).bit_length()
