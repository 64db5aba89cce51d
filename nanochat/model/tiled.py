"""Chains of elementwise operations done tile by tile, with backward passes by hand.

On a CPU such a chain is bound by memory: every operation over a whole batch reads and writes megabytes. Done for a few
hundred tokens at a time, all but the chain's ends stay in the processor's cache. What is needed again in the backward
pass is made again there, from the inputs. On a GPU the tile is the whole batch.

Shapes: T tokens of all rows, C channels, W convolution width.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 256 * 1024  # elements of one tensor in a tile on a CPU


def tiles(x: Tensor) -> Iterator[slice]:
    """Of the rows of x (T, C)."""
    T, C = x.shape
    size = max(1, TILE // C) if x.device.type == "cpu" else T
    for start in range(0, T, size):
        yield slice(start, min(start + size, T))


def _wide(x: Tensor) -> torch.dtype:
    """The type sums are taken in."""
    return torch.promote_types(x.dtype, torch.float32)


class _Window:
    """What a tile of the convolution reads: its tokens and W - 1 before them, in backward also W - 1 after, with W - 1
    zeros where a document starts. `first` and `last` are the tile's first and last output among `count` of the window;
    where no document starts inside it is x itself, and places, of the outputs from `first` on, is None."""

    def __init__(self, x: Tensor, tile: slice, W: int, starts: Tensor, borders: list[int], after: bool = False):
        T, C = x.shape
        low, high = max(0, tile.start - W + 1), min(T, tile.stop + (W - 1) * after)
        self.tokens, self.places = slice(tile.start, high), None
        inside = bisect.bisect_left(borders, high) - bisect.bisect_right(borders, low)
        if not inside and high - low == tile.stop - tile.start + (W - 1) * (1 + after):
            self.x, self.first, self.last = x[low:high], 0, tile.stop - tile.start - 1
            return
        moved = starts[low:high].long()
        moved[0] = 0
        places = moved.cumsum(0).mul_(W - 1).add_(torch.arange(high - low, device=x.device))  # of outputs
        self.x = x.new_zeros(high - low + (W - 1) * (inside + 1 + after), C).index_copy_(0, places + W - 1, x[low:high])
        self.places = places[tile.start - low :]
        self.first, self.last = int(self.places[0]), int(self.places[tile.stop - tile.start - 1])

    def sums(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(count, C): the convolution at every place of the window."""
        W = len(weight)
        count = len(self.x) - W + 1
        out = torch.addcmul(bias, self.x[:count], weight[0])
        for k in range(1, W):
            out.addcmul_(self.x[k : k + count], weight[k])
        return out


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, borders: list[int]) -> Tensor:
    """x (T, C), weight (W, C), bias (C,); starts (T,) bool, true at `borders`: taps do not reach behind a start.

    out[t] = silu(bias + sum over k < W of weight[k] * x[t - W + 1 + k]): shifts and adds on whole rows of memory.
    """
    out = x.new_empty(x.shape)
    for tile in tiles(x):
        window = _Window(x, tile, len(weight), starts, borders)
        sums = window.sums(weight, bias)
        torch.ops.aten.silu.out(sums if window.places is None else sums[window.places], out=out[tile])
    return out


def conv_silu_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, borders: list[int], dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills dx; returns dweight and dbias."""
    W = len(weight)
    dweight, dbias = weight.new_zeros(weight.shape, dtype=_wide(x)), weight.new_zeros(bias.shape, dtype=_wide(x))
    for tile in tiles(x):
        window = _Window(x, tile, W, starts, borders, after=True)
        sums, given = window.sums(weight, bias), dout[window.tokens]
        if window.places is not None:
            given = torch.zeros_like(sums).index_copy_(0, window.places, given)
        dsums = torch.ops.aten.silu_backward(given, sums)
        first, size = window.first, window.last - window.first + 1
        spread = dx[tile] if window.places is None else x.new_empty(size, x.shape[1])
        torch.mul(dsums[first : first + size], weight[-1], out=spread)
        for k in range(W - 1):
            spread.addcmul_(dsums[first + W - 1 - k : first + W - 1 - k + size], weight[k])
        if window.places is not None:
            dx[tile] = spread[window.places[: tile.stop - tile.start] - first]
        dsums = dsums[first : first + size]
        for k in range(W):
            dweight[k] += (dsums * window.x[first + k : first + k + size]).sum(0)
        dbias += dsums.sum(0)
    return dweight.to(weight.dtype), dbias.to(bias.dtype)


class _ConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, starts):
        ctx.borders = starts.nonzero().flatten().tolist()
        ctx.save_for_backward(x, weight, bias, starts)
        return conv_silu_forward(x, weight, bias, starts, ctx.borders)

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias, starts = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        return dx, *conv_silu_backward(dout, x, weight, bias, starts, ctx.borders, dx), None


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> Tensor:
    """silu of a depthwise causal convolution: x (T, C), weight (W, C), bias (C,), starts (T,) bool, true where taps
    must not reach further back -> (T, C)."""
    return _ConvSiLU.apply(x, weight, bias, starts)


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y, z (T, C), weight (C,) -> (T, C): RMSNorm(y * silu(z)) * weight, each of the groups of channels by itself."""
    out = y.new_empty(y.shape)
    for tile in tiles(y):
        gated = (y[tile] * F.silu(z[tile])).unflatten(-1, (groups, -1))
        torch.mul((gated * _inverse_rms(gated, eps)).flatten(1), weight, out=out[tile])
    return out


def gated_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills dz; returns dy and dweight."""
    dy, dweight = y.new_empty(y.shape), weight.new_zeros(weight.shape, dtype=_wide(y))
    by_group = lambda t: t.unflatten(-1, (groups, -1))  # noqa: E731
    for tile in tiles(y):
        gate = F.silu(z[tile])
        gated = by_group(y[tile] * gate)
        scale = _inverse_rms(gated, eps)
        normed = gated.mul_(scale)
        product = dout[tile] * normed.flatten(1)
        dweight += product.sum(0)
        given = by_group(dout[tile] * weight)
        along = torch.einsum("tgc,gc->tg", by_group(product), by_group(weight)).unsqueeze(-1) / given.shape[-1]
        dgated = given.addcmul_(normed, along, value=-1).mul_(scale).flatten(1)
        torch.mul(dgated, gate, out=dy[tile])
        torch.ops.aten.silu_backward.grad_input(dgated.mul_(y[tile]), z[tile], grad_input=dz[tile])
    return dy, dweight.to(weight.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """x (..., width) -> (..., 1), the sum in fp32 at least."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    return (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        ctx.save_for_backward(y, z, weight)
        ctx.rest = groups, eps
        return gated_norm_forward(y, z, weight, groups, eps)

    @staticmethod
    def backward(ctx, dout):
        y, z, weight = ctx.saved_tensors
        dz = z.new_empty(z.shape)
        dy, dweight = gated_norm_backward(dout, y, z, weight, *ctx.rest, dz)
        return dy, dz, dweight, None, None


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`gated_norm_forward`, with gradients."""
    return _GatedRMSNorm.apply(y, z, weight, groups, eps)
