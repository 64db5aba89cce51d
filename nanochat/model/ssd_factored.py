"""The chunked scan without a matrix of decays, in tiles that stay in the processor's cache.

The decay from step j to step i of a chunk, exp(cum_i - cum_j), is exp(cum_i - r) exp(r - cum_j): inputs are scaled by
one factor, outputs by the other, and what is left of the Q x Q matrix, C B^T, is the same for all heads of a group,
which become columns of one large product. r is half of the chunk's decay, so that neither factor overflows.

With u_j = exp(r - cum_j) dt_j x_j, g = exp(r) h for the state h before the chunk, and T = C B^T below the diagonal:

    y_i = exp(cum_i - r) ([T | C] [u; g])_i        h' = exp(r) (g + B^T u)        (states as N x KP)

so that with the r' of the next chunk g' = exp(r + r') (g + B^T u), and g is what travels.

The backward pass is written by hand: it makes T, u and g again, and gets the decay's gradient from inner products.

Shapes: B batch, L length, H heads, P head width, N state width, G groups of heads that share B and C, K = H / G heads
in a group, c chunks, Q chunk length; b rows and J chunks in a tile, n = b * J * G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 2048 * 1024  # elements of u and g in a tile on a CPU


@dataclass
class _Scan:
    """What is small enough to be made for the whole sequence at once."""

    dt: Tensor  # (B, c, Q, H)
    grow: Tensor  # (B, c, Q, H): exp(r - cum)
    shrink: Tensor  # (B, c, Q, H): exp(cum - r)
    half: Tensor  # (B, c, H): exp(r)
    links: Tensor  # (B, c + 1, H): exp(r + r') of the chunks on both sides of a border, where outside r = 0
    passes: Tensor  # (B, c, H): 1, or 0 where a document ends inside the chunk
    pairs: Tensor  # (Q, Q) or (B, c, 1, Q, Q): in order, and of one document
    of_before: Tensor | None  # (B, c, 1, Q, 1): steps of the document of the state before the chunk
    of_end: Tensor | None  # (B, c, 1, Q, 1): and of the one after it

    @classmethod
    def of(cls, dt: Tensor, A: Tensor, seq: Tensor | None, Q: int) -> _Scan:
        dt = dt.unflatten(1, (-1, Q))
        cum = (dt * A).cumsum(dim=2)
        r = cum[:, :, -1] / 2
        middle, outside = r.unsqueeze(2), torch.zeros_like(r[:, :1])
        links = (torch.cat([outside, r], dim=1) + torch.cat([r, outside], dim=1)).exp()
        passes = torch.ones_like(r)
        pairs = torch.ones(Q, Q, dtype=torch.bool, device=dt.device).tril()
        of_before = of_end = None
        if seq is not None:
            seq = seq.unflatten(1, (-1, Q))
            end = seq[:, :, -1:]
            before = torch.cat([seq[:, :1, :1], end[:, :-1]], dim=1)
            pairs = ((seq.unsqueeze(-1) == seq.unsqueeze(-2)) & pairs).unsqueeze(2)
            of_before, of_end = ((seq == which)[:, :, None, :, None] for which in (before, end))
            passes = passes * (end == before)
        grow, shrink = (middle - cum).exp(), (cum - middle).exp()
        return cls(dt, grow, shrink, r.exp(), links, passes, pairs, of_before, of_end)


class _Tile:
    """A few rows and chunks: the inputs by groups, their factors, T and u."""

    def __init__(self, scan: _Scan, rows: slice, chunks: slice, x: Tensor, Bm: Tensor, Cm: Tensor):
        self.rows, self.chunks, self.Q, self.G = rows, chunks, scan.dt.shape[2], Bm.shape[2]
        here = lambda t: t if t is None or t.ndim == 2 else t[rows, chunks]  # noqa: E731
        self.x, low = self.by_group(x), x.dtype  # b J G Q K P
        self.into = self.factors(scan.dt[rows, chunks] * scan.grow[rows, chunks]).to(low)  # b J G Q K 1
        self.shrink = self.factors(scan.shrink[rows, chunks]).to(low)
        before, after = scan.links[rows, chunks], scan.links[rows, chunks.start + 1 : chunks.stop + 1]
        self.before, self.after, self.passes = (
            self.factors(t.unsqueeze(2)) for t in (before, after, scan.passes[rows, chunks])
        )
        self.Bm, self.Cm = (self.by_group(t).flatten(-2).contiguous() for t in (Bm, Cm))  # b J G Q N
        self.of_before, self.of_end, self.pairs = here(scan.of_before), here(scan.of_end), here(scan.pairs)
        self.B_end = self.Bm if self.of_end is None else self.Bm * self.of_end
        self.C_before = self.Cm if self.of_before is None else self.Cm * self.of_before
        self.T = (self.Cm @ self.Bm.transpose(-1, -2)).mul_(self.pairs)  # b J G Q Q
        self.u = (self.x * self.into).flatten(-2).contiguous()  # b J G Q KP

    def by_group(self, t: Tensor) -> Tensor:
        """(B, L, heads, ...) -> (b, J, G, Q, heads of a group, ...), a view of the tile's part."""
        steps = slice(self.chunks.start * self.Q, self.chunks.stop * self.Q)
        return t[self.rows, steps].unflatten(2, (self.G, -1)).unflatten(1, (-1, self.Q)).transpose(2, 3)

    def factors(self, t: Tensor) -> Tensor:
        """(b, J, Q, H) -> (b, J, G, Q, K, 1)"""
        return t.unflatten(-1, (self.G, -1)).transpose(2, 3).unsqueeze(-1)

    def by_head(self, t: Tensor) -> Tensor:
        """(..., KP) -> (..., K, P)"""
        return t.unflatten(-1, self.x.shape[-2:])


def _tiles(scan: _Scan, x: Tensor, Bm: Tensor, Cm: Tensor, backwards: bool = False) -> Iterator[_Tile]:
    """Rows by rows, and in each the chunks in order; or all of them from the last to the first."""
    (B, L, H, P), Q = x.shape, scan.dt.shape[2]
    c, each = L // Q, H * P * (Q + Bm.shape[3])
    most = TILE if x.device.type == "cpu" else B * c * each  # a GPU wants everything at once
    rows = max(1, min(B, most // each))
    chunks = max(1, min(c, most // (rows * each)))
    parts = [(r, k) for r in range(0, B, rows) for k in range(0, c, chunks)]
    for r, k in reversed(parts) if backwards else parts:
        yield _Tile(scan, slice(r, min(r + rows, B)), slice(k, min(k + chunks, c)), x, Bm, Cm)


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, D: Tensor, seq: Tensor | None, Q: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x (B, L, H, P), Bm and Cm (B, L, G, N) in one float type; dt (B, L, H), A (H,), h0 (B, H, P, N) and D (H,) in one
    that may be wider; seq (B, L) or None; L a multiple of Q.

    Returns y (B, L, H, P), with D x added; the last state (B, H, P, N); g of each tile (b, J, G, N, KP)."""
    (B, L, H, P), G = x.shape, Bm.shape[2]
    scan = _Scan.of(dt, A, seq, Q)
    y, gs = x.new_empty(B, L, H, P), []
    carried = _by_group(h0 * scan.half[:, 0, :, None, None], G).contiguous()  # g of the next chunk, B G N K P
    skip = D.to(x.dtype).view(G, 1, -1, 1)
    for tile in _tiles(scan, x, Bm, Cm):
        added = tile.by_head(tile.B_end.transpose(-1, -2) @ tile.u)  # b J G N K P
        g = _recur(carried[tile.rows], added, tile.after * tile.passes, tile.after)[:, :-1].to(x.dtype).flatten(-2)
        gs.append(g)
        read = _sum_of_products(tile.T, tile.u, tile.C_before, g)
        torch.mul(tile.by_head(read), tile.shrink, out=tile.by_group(y)).addcmul_(tile.x, skip)
    return y, _by_head(carried), gs


def scan_backward(
    dy: Tensor,
    dh: Tensor | None,
    inputs: tuple[Tensor, ...],
    seq: Tensor | None,
    Q: int,
    y: Tensor,
    last_state: Tensor,
    gs: list[Tensor],
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inputs: x, dt, A, Bm, Cm, D as they were given; y, last_state, gs: what `scan_forward` made of them. Fills dx, dB
    and dC; returns ddt, dA, dD and dh0."""
    x, dt, A, Bm, Cm, D = inputs
    (B, L, H, P), (G, N), c = x.shape, Bm.shape[2:], x.shape[1] // Q
    scan = _Scan.of(dt, A, seq, Q)
    along, skipped, turned = (dt.new_empty(B, L, H) for _ in range(3))  # <du, x>; <dy, x>; <dy, y>
    ends = dt.new_zeros(B, c + 1, H)  # <dh, h> of the state before each chunk, and of the last one
    carried = dt.new_zeros(B, G, N, H // G, P)  # e, the gradient of g + B^T u, of the chunk before
    if dh is not None:
        ends[:, c] = (dh * last_state).sum((-1, -2))
        carried = _by_group(dh * scan.half[:, -1, :, None, None], G).contiguous()
    skip = D.to(x.dtype).view(G, 1, -1, 1)
    inner = lambda a, b: (a * b).sum(-1)  # noqa: E731
    for tile, g in zip(_tiles(scan, x, Bm, Cm, backwards=True), reversed(gs), strict=True):
        tile_dy = tile.by_group(dy)
        dz = (tile_dy * tile.shrink).flatten(-2).contiguous()  # of outputs before they shrink
        from_y = tile.by_head(tile.C_before.transpose(-1, -2) @ dz)  # b J G N K P
        es = _recur(carried[tile.rows], from_y, tile.before * tile.passes, tile.before, backwards=True).to(x.dtype)
        e = es[:, 1:].flatten(-2)
        du = tile.by_head(_sum_of_products(tile.T.transpose(-1, -2), dz, tile.B_end, e))  # b J G Q K P
        tile_ends = (es[:, :-1] * tile.by_head(g)).sum(3).sum(-1, dtype=dt.dtype)  # <dh, h> times the link
        ends[tile.rows, tile.chunks] = (tile_ends / tile.before[:, :, :, 0, :, 0]).flatten(2)

        # the product itself sums over the heads of a group; for pairs out of order it may overflow
        dT = (dz @ tile.u.transpose(-1, -2)).masked_fill_(~tile.pairs, 0)
        via_h, via_state = dz @ g.transpose(-1, -2), tile.u @ e.transpose(-1, -2)  # b J G Q N
        if seq is not None:
            via_h, via_state = via_h.mul_(tile.of_before), via_state.mul_(tile.of_end)
        torch.add(dT @ tile.Bm, via_h, out=tile.by_group(dC).squeeze(4))
        torch.add(dT.transpose(-1, -2) @ tile.Cm, via_state, out=tile.by_group(dB).squeeze(4))

        tile.by_group(along).copy_(inner(du, tile.x))
        tile.by_group(skipped).copy_(inner(tile_dy, tile.x))
        tile.by_group(turned).copy_(inner(tile_dy, tile.by_group(y)))
        torch.mul(du, tile.into, out=tile.by_group(dx)).addcmul_(tile_dy, skip)

    # Every use of cum_i is a factor exp(cum_i) in what step i reads, exp(-cum_j) in what step j writes, and
    # exp(cum_Q) in what leaves the chunk, so its gradient is <dy_i, y_i> - <du_i, u_i>, plus <dh, h> at the end.
    along = along.unflatten(1, (-1, Q)) * scan.grow
    dcum = (turned - skipped * D).unflatten(1, (-1, Q)) - along * scan.dt
    dcum[:, :, -1] += ends[:, 1:]
    da = dcum.flip(2).cumsum(2).flip(2)
    ddt = (da * A + along).view(B, L, H)
    return ddt, (da * scan.dt).sum((0, 1, 2)), skipped.sum((0, 1)), _by_head(carried)


def _recur(h: Tensor, added: Tensor, keep: Tensor, gain: Tensor, backwards: bool = False) -> Tensor:
    """h (b, G, N, K, P) becomes keep_j h + gain_j added_j for each chunk j of added (b, J, G, N, K, P). Returns what it
    was before each chunk and after the last one (b, J + 1, G, N, K, P), and leaves the last in h. backwards: from the
    last chunk to the first; what is returned is in order all the same."""
    J = added.shape[1]
    hs = h.new_empty(len(h), J + 1, *h.shape[1:])
    states, added = hs.unbind(1), added.to(h.dtype).unbind(1)
    keep, gain = keep.unbind(1), gain.unbind(1)
    states[J if backwards else 0].copy_(h)
    for j in reversed(range(J)) if backwards else range(J):
        old, new = (j + 1, j) if backwards else (j, j + 1)
        torch.mul(states[old], keep[j], out=states[new]).addcmul_(added[j], gain[j])
    h.copy_(states[0 if backwards else J])
    return hs


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a b + c d, of matrices in the last two dimensions."""
    flat = lambda t: t.reshape(-1, *t.shape[-2:])  # noqa: E731
    return torch.bmm(flat(a), flat(b)).baddbmm_(flat(c), flat(d)).view(*a.shape[:-1], b.shape[-1])


def _by_group(h: Tensor, G: int) -> Tensor:
    """(B, H, P, N) -> (B, G, N, K, P)"""
    return h.unflatten(1, (G, -1)).movedim(-1, 2)


def _by_head(h: Tensor) -> Tensor:
    """(B, G, N, K, P) -> (B, H, P, N)"""
    return h.movedim(2, -1).flatten(1, 2).contiguous()


class FactoredSSD(torch.autograd.Function):
    """Arguments of `scan_forward`, no chunk decaying by more than ssd.STEEPEST -> y, the last state (B, H, P, N)."""

    @staticmethod
    def forward(ctx, x, dt, A, Bm, Cm, h0, D, seq, Q):
        y, state, gs = scan_forward(x, dt, A, Bm, Cm, h0, D, seq, Q)
        ctx.save_for_backward(x, dt, A, Bm, Cm, D, seq, y, state, *gs)
        ctx.Q = Q
        return y, state

    @staticmethod
    def backward(ctx, dy, dh):
        x, dt, A, Bm, Cm, D, seq, y, state, *gs = ctx.saved_tensors
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, Bm, Cm))
        ddt, dA, dD, dh0 = scan_backward(dy, dh, (x, dt, A, Bm, Cm, D), seq, ctx.Q, y, state, gs, dx, dB, dC)
        return dx, ddt, dA, dB, dC, dh0, dD, None, None
