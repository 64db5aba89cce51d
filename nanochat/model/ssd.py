"""The state-space scan of Mamba-2 (SSD) in plain PyTorch: chunked for training, one step for decoding.

Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6. For one head, with a_t = dt_t * A:

    h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T        h: (P, N)
    y_t = h_t C_t

Within a chunk of Q steps the recurrence is a masked matrix product; between chunks only the state h travels. With cum_i
the sum of a up to step i of the chunk, the decay from step j to step i is exp(cum_i - cum_j). As a product of two
factors it needs no matrix (`ssd_factored.py`); a head that forgets too steeply for that gets its matrix of decays
(`_PairwiseSSD`). Both backward passes are written by hand.

Shapes: B batch, L length, H heads, P head width, N state width, G groups of heads that share B and C,
K = H / G heads in a group, c chunks, Q chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.model.kernels import kernel_scan, ssm_kernel
from nanochat.model.ssd_factored import FactoredSSD

CHUNK = 64


def _chunks(t: Tensor, Q: int) -> Tensor:
    """(B, L, ...) -> (B, c, Q, ...); L must be a multiple of Q."""
    return t.reshape(t.shape[0], t.shape[1] // Q, Q, *t.shape[2:])


def _decays(cum: Tensor, seq: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay factors of a chunk from cum (B, c, Q, H), the running sum of dt * A inside it.

    Returns within (B, c, H, Q, Q): from step j to step i >= j; into (B, c, Q, H): from the state before the chunk to
    step i; out (B, c, Q, H): from step j to the end; through (B, c, H): the whole chunk. Where `seq` (B, c, Q) changes,
    a new document starts and the factor across the border is 0.
    """
    Q = cum.shape[2]
    byhead = cum.transpose(2, 3)  # B c H Q
    causal = torch.ones(Q, Q, dtype=torch.bool, device=cum.device).tril()
    last = cum[:, :, -1:]
    into, out, through = cum.exp(), (last - cum).exp(), last[:, :, 0].exp()
    # exp() of the upper triangle could overflow, and inf * 0 is nan: mask before it
    if seq is None:
        within = (byhead.unsqueeze(-1) - byhead.unsqueeze(-2)).masked_fill_(~causal, -torch.inf).exp_()
    else:
        same = (seq.unsqueeze(-1) == seq.unsqueeze(-2)) & causal  # B c Q Q
        within = (byhead.unsqueeze(-1) - byhead.unsqueeze(-2)).masked_fill_(~same.unsqueeze(2), -torch.inf).exp_()
        before = torch.cat([seq[:, :1, 0], seq[:, :-1, -1]], dim=1).unsqueeze(-1)  # document of the incoming state
        end = seq[:, :, -1:]
        into = into * (seq == before).unsqueeze(-1)
        out = out * (seq == end).unsqueeze(-1)
        through = through * (end == before)
    return within, into, out, through


class _PairwiseSSD(torch.autograd.Function):
    """Inputs in one float type: x (B, L, H, P), dt (B, L, H), A (H,), Bm and Cm (B, L, G, N), h0 (B, H, P, N)."""

    @staticmethod
    def forward(ctx, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, seq: Tensor | None, Q: int):
        B, L, H, P = x.shape
        G, N = Bm.shape[2:]
        K, c = H // G, L // Q
        dtc = _chunks(dt, Q)
        cum = (dtc * A).cumsum(dim=2)
        seqc = _chunks(seq, Q) if seq is not None else None
        within, into, out, through = _decays(cum, seqc)
        u = _chunks(x, Q) * dtc.unsqueeze(-1)  # B c Q H P
        Bg, Cg = _chunks(Bm, Q).transpose(2, 3), _chunks(Cm, Q).transpose(2, 3)  # B c G Q N
        # inside the chunks: C B^T once per group, then one product per head
        CB = Cg @ Bg.transpose(-1, -2)  # B c G Q Q
        M = (within.reshape(B, c, G, K, Q, Q) * CB.unsqueeze(3)).reshape(B, c, H, Q, Q)
        y = (M @ u.transpose(2, 3)).transpose(2, 3)  # B c Q H P
        # what each chunk adds to the state, for all heads of a group in one product
        added = (u * out.unsqueeze(-1)).reshape(B, c, Q, G, K * P).permute(0, 1, 3, 4, 2) @ Bg  # B c G KP N
        added = added.reshape(B, c, H, P, N)
        states = torch.empty(B, c + 1, H, P, N, dtype=x.dtype, device=x.device)  # before each chunk, and at the end
        states[:, 0] = h0
        for k in range(c):
            torch.addcmul(added[:, k], states[:, k], through[:, k, :, None, None], out=states[:, k + 1])
        from_state = Cg @ states[:, :-1].reshape(B, c, G, K * P, N).transpose(-1, -2)  # B c G Q KP
        y = y + from_state.transpose(2, 3).reshape(B, c, Q, H, P) * into.unsqueeze(-1)
        ctx.save_for_backward(x, dt, A, Bm, Cm, seq, states, y)
        ctx.Q = Q
        return y.reshape(B, L, H, P), states[:, -1].clone()

    @staticmethod
    def backward(ctx, dy: Tensor, dh: Tensor):
        x, dt, A, Bm, Cm, seq, states, y = ctx.saved_tensors
        Q = ctx.Q
        B, L, H, P = x.shape
        G, N = Bm.shape[2:]
        K, c = H // G, L // Q
        dtc, xc, dyc = _chunks(dt, Q), _chunks(x, Q), _chunks(dy, Q)
        cum = (dtc * A).cumsum(dim=2)
        within, into, out, through = _decays(cum, _chunks(seq, Q) if seq is not None else None)
        u = xc * dtc.unsqueeze(-1)
        Bg, Cg = _chunks(Bm, Q).transpose(2, 3), _chunks(Cm, Q).transpose(2, 3)
        CB = Cg @ Bg.transpose(-1, -2)
        within = within.reshape(B, c, G, K, Q, Q)
        M = (within * CB.unsqueeze(3)).reshape(B, c, H, Q, Q)

        # gradient of the state after each chunk, from the last to the first
        dy_in = (dyc * into.unsqueeze(-1)).reshape(B, c, Q, G, K * P).transpose(2, 3)  # B c G Q KP
        from_y = (dy_in.transpose(-1, -2) @ Cg).reshape(B, c, H, P, N)
        dstates = torch.empty_like(states)
        dstates[:, c] = dh
        for k in reversed(range(c)):
            torch.addcmul(from_y[:, k], dstates[:, k + 1], through[:, k, :, None, None], out=dstates[:, k])
        before, after, dafter = states[:, :-1], states[:, 1:], dstates[:, 1:]

        dy_h, u_h = dyc.transpose(2, 3), u.transpose(2, 3)  # B c H Q P
        dafter_g = dafter.reshape(B, c, G, K * P, N)
        u_out = (u * out.unsqueeze(-1)).reshape(B, c, Q, G, K * P).transpose(2, 3)  # B c G Q KP
        du = (M.transpose(-1, -2) @ dy_h).transpose(2, 3)
        via_state = (Bg @ dafter_g.transpose(-1, -2)).transpose(2, 3).reshape(B, c, Q, H, P)
        du = du + via_state * out.unsqueeze(-1)

        dM = dy_h @ u_h.transpose(-1, -2)  # B c H Q Q
        dCB = (dM.reshape(B, c, G, K, Q, Q) * within).sum(dim=3)  # B c G Q Q
        dC = dCB @ Bg + dy_in @ before.reshape(B, c, G, K * P, N)
        dB = dCB.transpose(-1, -2) @ Cg + u_out @ dafter_g

        # Every use of cum_i is a factor exp(cum_i) in what step i reads, exp(-cum_j) in what step j writes, and
        # exp(cum_Q) in what leaves the chunk, so its gradient is <dy_i, y_i> - <du_i, u_i>, plus <dh, h> at the end.
        dcum = (dyc * y).sum(-1) - (du * u).sum(-1)  # B c Q H
        dcum[:, :, -1] += (dafter * after).sum((-1, -2))
        da = dcum.flip(2).cumsum(2).flip(2)
        ddt = da * A + (du * xc).sum(-1)
        dA = (da * dtc).sum((0, 1, 2))
        dx = du * dtc.unsqueeze(-1)
        back = lambda t: t.transpose(2, 3).reshape(B, L, G, N)  # noqa: E731
        return dx.reshape(B, L, H, P), ddt.reshape(B, L, H), dA, back(dB), back(dC), dstates[:, 0], None, None


# In a chunk, the largest -sum(a) for the factored form: exp of half of it, times what it scales, must stay finite, and
# exp(-it), which links two such chunks, must not underflow.
STEEPEST = {torch.float32: 80.0, torch.bfloat16: 80.0, torch.float64: 600.0}


@torch.no_grad()
def steep_heads(dt: Tensor, A: Tensor, Q: int, dtype: torch.dtype) -> Tensor:
    """dt (B, L, H), A (H,) -> (H,) bool: heads with a chunk that decays too much for the factored form in that type."""
    return -(_chunks(dt, Q).sum(2) * A).amin((0, 1)) > STEEPEST[dtype]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    D: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The scan over a whole sequence.

    x (B, L, H, P); dt (B, L, H), already positive; A (H,), negative; Bm, Cm (B, L, G, N) with G dividing H;
    initial_state (B, H, P, N) or None for zeros; seq_idx (B, L) integers that change where a new document starts
    (the initial state belongs to the first position's document); D (H,) or None: D x is added to y. Any length; x, Bm
    and Cm of one float type, dt, A, D and the state of the same or a wider one.
    Returns y (B, L, H, P) and the state after the last step (B, H, P, N). A step with dt = 0 leaves the state as it is.
    """
    B, L, H, P = x.shape
    if D is None:
        D = A.new_zeros(H)
    if (kernel := ssm_kernel(x.device)) != "torch":
        y, state = kernel_scan(kernel, x, dt, A, Bm, Cm, initial_state, seq_idx)
        return torch.addcmul(y, x, D.to(x.dtype).unsqueeze(-1)), state
    if initial_state is None:
        initial_state = dt.new_zeros(B, H, P, Bm.shape[-1])
    Q = -(-L // -(-L // chunk))  # as many chunks as it takes, of the same length
    pad = -L % Q
    if pad:  # steps of dt = 0 change nothing
        grow = lambda t: torch.cat([t, t.new_zeros(B, pad, *t.shape[2:])], dim=1)  # noqa: E731
        x, dt, Bm, Cm = grow(x), grow(dt), grow(Bm), grow(Cm)
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(B, pad)], dim=1)
    steep = steep_heads(dt, A, Q, x.dtype)
    number = int(steep.sum())
    with torch.autocast(x.device.type, enabled=False):  # products run in the types they are given
        if number == 0:
            y, state = FactoredSSD.apply(x, dt, A, Bm, Cm, initial_state, D, seq_idx, Q)
        elif number == H or Bm.shape[2] > 1:
            y, state = _pairwise(x, dt, A, Bm, Cm, initial_state, D, seq_idx, Q)
        else:
            order = steep.int().argsort(stable=True)
            parts = []
            for scan, heads in ((FactoredSSD.apply, order[: H - number]), (_pairwise, order[H - number :])):
                per_head = initial_state[:, heads], D[heads]
                parts.append(scan(x[:, :, heads], dt[:, :, heads], A[heads], Bm, Cm, *per_head, seq_idx, Q))
            back = order.argsort()
            y, state = torch.cat([p[0] for p in parts], 2)[:, :, back], torch.cat([p[1] for p in parts], 1)[:, back]
    return y[:, :L], state


def _pairwise(x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, D: Tensor, seq, Q: int):
    wide = x.to(dt.dtype)
    y, state = _PairwiseSSD.apply(wide, dt, A, Bm.to(dt.dtype), Cm.to(dt.dtype), h0, seq, Q)
    return torch.addcmul(y, wide, D.unsqueeze(-1)).to(x.dtype), state


def ssd_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor) -> tuple[Tensor, Tensor]:
    """One step: state (B, H, P, N), x (B, H, P), dt (B, H), A (H,), Bm, Cm (B, G, N) -> y (B, H, P), new state. Without
    gradients the state is changed in place: it is most of what a step reads and writes."""
    B, H, P, N = state.shape
    G = Bm.shape[1]
    u = (x * dt.unsqueeze(-1)).view(B, G, -1, 1)  # B G KP 1
    decay = (dt * A).exp()[..., None, None]
    if torch.is_grad_enabled():
        state = state * decay + (u * Bm.unsqueeze(2)).view(B, H, P, N)
    else:
        state.mul_(decay).view(B, G, -1, N).addcmul_(u, Bm.unsqueeze(2))
    y = (Cm.unsqueeze(2) @ state.view(B, G, -1, N).transpose(-1, -2)).view(B, H, P)  # ten times as fast as state @ C
    return y, state
