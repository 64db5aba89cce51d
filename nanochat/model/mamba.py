"""The Mamba-2 mixer: projection, short causal convolution, state-space scan, gated norm, projection.

Source: Dao & Gu 2024 (arXiv 2405.21060), figure 6. Weight names and the order z | x | B | C | dt of in_proj are those
of state-spaces/mamba, so that weights copy one to one.

Shapes: B batch, L length, D model width, I inner width (expand * D), H heads, P head width (H * P = I), N state width,
G groups, W convolution width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.cache import MambaState
from nanochat.model.gates import GatedFacts
from nanochat.model.linear import Linear
from nanochat.model.ssd import CHUNK, ssd_scan, ssd_step, steep_heads
from nanochat.model.ssd_factored import scan_backward, scan_forward
from nanochat.model.tiled import (
    conv_silu,
    conv_silu_backward,
    conv_silu_forward,
    gated_norm_backward,
    gated_norm_forward,
    gated_rms_norm,
)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """silu(depthwise causal convolution). x (B, L, C), weight (C, W), bias (C,), past (B, W-1, C) inputs before x
    (None: zeros), seq_idx (B, L): taps never reach into another document. Not both past and seq_idx."""
    W = weight.shape[1]
    weight, bias = weight.to(x.dtype).t().contiguous(), bias.to(x.dtype)
    if past is not None:
        x = torch.cat([past.to(x.dtype), x], dim=1)
        if x.shape[1] == W:  # one new token
            return F.silu((x * weight).sum(1, keepdim=True) + bias)
    B, L, C = x.shape
    out = conv_silu(x.reshape(B * L, C), weight, bias, document_starts(B, L, seq_idx, x.device)).view(B, L, C)
    return out if past is None else out[:, W - 1 :]


def document_starts(B: int, L: int, seq_idx: Tensor | None, device: torch.device) -> Tensor:
    """(B * L,) bool: at the first position of each row, and where seq_idx (B, L) changes."""
    starts = torch.zeros(B, L, dtype=torch.bool, device=device)
    if seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts[:, 0] = True
    return starts.flatten()


class _BetweenProjections(torch.autograd.Function):
    """Convolution, scan and gated norm as one operation: the same passes as one by one, but the gradients of z, x, B,
    C and dt are written side by side, as in_proj's gradient needs them, where autograd would join them afterwards."""

    @staticmethod
    def forward(ctx, joined, conv_weight, conv_bias, dt_bias, dt, A, D, norm_weight, starts, seq, G, N, Q, eps):
        (B, L, _), H, I = joined.shape, len(A), len(norm_weight)
        z, xBC, _ = joined.flatten(0, 1).split([I, len(conv_bias), H], dim=-1)
        ctx.borders = starts.nonzero().flatten().tolist()
        mixed = conv_silu_forward(xBC, conv_weight, conv_bias, starts, ctx.borders).view(B, L, -1)
        x, Bm, Cm = split_mixed(mixed, H, G, N)
        y, state, gs = scan_forward(x, dt, A, Bm, Cm, dt.new_zeros(B, H, I // H, N), D, seq, Q)
        saved = joined, conv_weight, conv_bias, dt_bias, dt, A, D, norm_weight, starts, seq, mixed, y, state
        ctx.save_for_backward(*saved, *gs)
        ctx.sizes, ctx.Q = (G, N, eps), Q
        return gated_norm_forward(y.view(B * L, I), z, norm_weight, G, eps).view(B, L, I)

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        joined, conv_weight, conv_bias, dt_bias, dt, A, D, norm_weight, starts, seq, mixed, y, state, *gs = saved
        (B, L, _), H, I, (G, N, eps) = joined.shape, len(A), len(norm_weight), ctx.sizes
        parts = lambda t: t.flatten(0, 1).split([I, len(conv_bias), H], dim=-1)  # noqa: E731
        djoined, dmixed = torch.empty_like(joined), torch.empty_like(mixed)
        (z, xBC, raw), (dz, dxBC, draw) = parts(joined), parts(djoined)
        dy, dnorm = gated_norm_backward(dout.flatten(0, 1), y.view(B * L, I), z, norm_weight, G, eps, dz)
        x, Bm, Cm = split_mixed(mixed, H, G, N)
        into = split_mixed(dmixed, H, G, N)
        ddt, dA, dD, _ = scan_backward(dy.view(y.shape), None, (x, dt, A, Bm, Cm, D), seq, ctx.Q, y, state, gs, *into)
        ddt = ddt.flatten(0, 1) * (raw + dt_bias).sigmoid()  # softplus
        draw.copy_(ddt)
        flat = dmixed.flatten(0, 1)
        dconv, dconv_bias = conv_silu_backward(flat, xBC, conv_weight, conv_bias, starts, ctx.borders, dxBC)
        return djoined, dconv, dconv_bias, ddt.sum(0), None, dA, dD, dnorm, *[None] * 6


def split_mixed(t: Tensor, H: int, G: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """x|B|C (B, L, I + 2 G N) -> x (B, L, H, P), B and C (B, L, G, N), views."""
    x, Bm, Cm = t.split([t.shape[-1] - 2 * G * N, G * N, G * N], dim=-1)
    return x.unflatten(-1, (H, -1)), Bm.unflatten(-1, (G, N)), Cm.unflatten(-1, (G, N))


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)) * weight: the gate before the norm, as in Mamba-2 (norm_before_gate=False), and each group
    of heads normed by itself, as in mamba-ssm."""

    def __init__(self, width: int, n_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_groups, self.eps = n_groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        weight = self.weight.to(y.dtype)
        if not torch.is_grad_enabled():  # fewer, larger operations: what a decoded token waits for
            gated = (y * F.silu(z)).unflatten(-1, (self.n_groups, -1))
            return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2) * weight
        flat = gated_rms_norm(y.flatten(0, -2), z.flatten(0, -2), weight, self.n_groups, self.eps)
        return flat.view(y.shape)


class Mamba2(nn.Module):
    def __init__(self, d_model: int, d_state: int, expand: int, head_dim: int, n_groups: int, d_conv: int, eps: float):
        super().__init__()
        self.d_inner = expand * d_model
        self.n_head, self.head_dim, self.d_state, self.n_groups = self.d_inner // head_dim, head_dim, d_state, n_groups
        channels = self.d_inner + 2 * n_groups * d_state
        self.in_proj = Linear(d_model, self.d_inner + channels + self.n_head)
        self.conv_weight = nn.Parameter(torch.empty(channels, d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.dt_bias = nn.Parameter(torch.empty(self.n_head))
        self.A_log = nn.Parameter(torch.empty(self.n_head))
        self.D = nn.Parameter(torch.ones(self.n_head))
        self.norm = GatedRMSNorm(self.d_inner, n_groups, eps)
        self.out_proj = Linear(self.d_inner, d_model)

    @torch.no_grad()
    def init_states(self, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        """A in [-16, -1] and softplus(dt_bias) log-uniform in [dt_min, dt_max], as in the paper's code."""
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.conv_weight.uniform_(-1, 1).mul_(self.conv_weight.shape[1] ** -0.5)
        self.conv_bias.zero_()
        self.D.fill_(1)

    def forward(
        self,
        x: Tensor,
        seq_idx: Tensor | None = None,
        cache: MambaState | None = None,
        valid: Tensor | None = None,
        facts: GatedFacts | None = None,
    ) -> Tensor:
        """x (B, L, D). With a cache, continues from its states and updates them; valid (B,) counts the real tokens of
        each row, the padding after them leaves the states untouched. facts: see gates.py; not with seq_idx."""
        B, L, _ = x.shape
        G, N, H = self.n_groups, self.d_state, self.n_head
        joined = self.in_proj(x)
        # decays and states are in fp32 (or float64) whatever the rest runs in: a state is a long product of decays
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        low, gates = joined.dtype, facts.tokens() if facts is not None else None
        if gates is not None:  # a step's gradient is a small difference of large sums, of which bf16 leaves noise
            joined = joined.to(exact)
        z, xBC, dt = joined.split([self.d_inner, self.d_inner + 2 * G * N, H], dim=-1)
        dt = F.softplus(dt.to(exact) + self.dt_bias.to(exact))
        A, D = -self.A_log.to(exact).exp(), self.D.to(exact)
        conv_idx = seq_idx if facts is None else facts.fact  # where the convolution starts anew
        if (
            cache is None
            and gates is None
            and x.device.type == "cpu"
            and L % CHUNK == 0
            and not steep_heads(dt, A, CHUNK, xBC.dtype).any()
        ):
            weights = (
                self.conv_weight.to(xBC.dtype).t().contiguous(),
                self.conv_bias.to(xBC.dtype),
                self.dt_bias.to(exact),
            )
            starts = document_starts(B, L, conv_idx, x.device)
            rest = self.norm.weight.to(xBC.dtype), starts, seq_idx, G, N, CHUNK, self.norm.eps
            with torch.autocast(x.device.type, enabled=False):  # products run in the types they are given
                y = _BetweenProjections.apply(joined, *weights, dt.detach(), A, D, *rest)
            return self.out_proj(y)
        past = cache.conv if cache is not None else None
        last = None
        if cache is not None:
            seen = xBC if facts is None else xBC * facts.after_borders(valid).unsqueeze(-1)
            last = self._last_inputs(seen, past, valid)
        xBC = causal_conv_silu(xBC, self.conv_weight, self.conv_bias, past, conv_idx)
        one_step = cache is not None and L == 1 and cache.ssm is not None
        xs, Bm, Cm = split_mixed(xBC.to(exact) if one_step else xBC, H, G, N)
        if gates is not None:
            dt = dt * gates.to(exact).unsqueeze(-1)
        if valid is not None:
            dt = dt * (torch.arange(L, device=x.device) < valid.unsqueeze(-1)).unsqueeze(-1)
        if one_step:
            y, state = ssd_step(cache.ssm, xs[:, 0], dt[:, 0], A, Bm[:, 0], Cm[:, 0])
            y = torch.addcmul(y, xs[:, 0], D.unsqueeze(-1)).unsqueeze(1)
        else:
            y, state = ssd_scan(xs, dt, A, Bm, Cm, cache.ssm if cache is not None else None, seq_idx, D)
        if cache is not None:
            cache.write(last, state)
        return self.out_proj(self.norm(y.reshape(B, L, self.d_inner).to(z.dtype), z).to(low))

    def _last_inputs(self, xBC: Tensor, past: Tensor | None, valid: Tensor | None) -> Tensor:
        """The convolution's last W - 1 real inputs of each row."""
        B, L, C = xBC.shape
        keep = self.conv_weight.shape[1] - 1
        joined = torch.cat([xBC.new_zeros(B, keep, C) if past is None else past.to(xBC.dtype), xBC], dim=1)
        if valid is None:
            return joined[:, L:].clone()
        index = valid.unsqueeze(-1) + torch.arange(keep, device=xBC.device)
        return joined.gather(1, index.unsqueeze(-1).expand(B, keep, C))
