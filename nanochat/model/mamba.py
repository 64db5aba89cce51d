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
from nanochat.model.ssd import ssd_scan, ssd_step


class _PaddedConv(torch.autograd.Function):
    """x (T, C), weight (W, C), bias (C,); place (T,) says where each input lies among `total` positions, the others
    being zeros. out[t] = bias + sum over k of weight[k] * padded[place[t] - (W - 1) + k].

    As shifts and adds in place, on whole rows that lie in order in memory. Its own backward keeps the padded input
    alone, where autograd would keep W products.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, place: Tensor, total: int):
        W = len(weight)
        padded = x.new_zeros(total, x.shape[1]).index_copy_(0, place, x)
        size = total - W + 1
        out = torch.addcmul(bias, padded[:size], weight[0])
        for k in range(1, W):
            out.addcmul_(padded[k : k + size], weight[k])
        ctx.save_for_backward(padded, weight, place)
        return out.index_select(0, place - (W - 1))

    @staticmethod
    def backward(ctx, dy: Tensor):
        padded, weight, place = ctx.saved_tensors
        (W, C), total = weight.shape, len(padded)
        size = total - W + 1
        spread = dy.new_zeros(total + W - 1, C).index_copy_(0, place, dy)
        dx = spread[W - 1 :] * weight[0]
        for k in range(1, W):
            dx.addcmul_(spread[W - 1 - k : W - 1 - k + total], weight[k])
        at_out = spread[W - 1 : total]
        dweight = torch.stack([(at_out * padded[k : k + size]).sum(0) for k in range(W)])
        return dx.index_select(0, place), dweight, dy.sum(0), None, None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Depthwise causal convolution. x (B, L, C), weight (C, W), bias (C,), past (B, W-1, C) inputs before x (None:
    zeros), seq_idx (B, L): taps never reach into another document. Not both past and seq_idx."""
    W = weight.shape[1]
    weight, bias = weight.to(x.dtype).t().contiguous(), bias.to(x.dtype)
    if past is not None:
        x = torch.cat([past.to(x.dtype), x], dim=1)
        if x.shape[1] == W:  # one new token
            return (x * weight).sum(1, keepdim=True) + bias
    B, L, C = x.shape
    starts = torch.zeros(B, L, dtype=torch.bool, device=x.device)
    if seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts[:, 0] = True
    place = torch.arange(B * L, device=x.device) + (W - 1) * starts.flatten().cumsum(0)  # W - 1 zeros before each start
    out = _PaddedConv.apply(x.reshape(B * L, C), weight, bias, place, int(place[-1]) + 1).view(B, L, C)
    return out if past is None else out[:, W - 1 :]


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)) * weight: the gate before the norm, as in Mamba-2 (norm_before_gate=False), and each group
    of heads normed by itself, as in mamba-ssm."""

    def __init__(self, width: int, n_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_groups, self.eps = n_groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(y.dtype)


class Mamba2(nn.Module):
    def __init__(self, d_model: int, d_state: int, expand: int, head_dim: int, n_groups: int, d_conv: int, eps: float):
        super().__init__()
        self.d_inner = expand * d_model
        self.n_head, self.head_dim, self.d_state, self.n_groups = self.d_inner // head_dim, head_dim, d_state, n_groups
        channels = self.d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.n_head, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.dt_bias = nn.Parameter(torch.empty(self.n_head))
        self.A_log = nn.Parameter(torch.empty(self.n_head))
        self.D = nn.Parameter(torch.ones(self.n_head))
        self.norm = GatedRMSNorm(self.d_inner, n_groups, eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

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
    ) -> Tensor:
        """x (B, L, D). With a cache, continues from its states and updates them; valid (B,) counts the real tokens of
        each row, the padding after them leaves the states untouched."""
        B, L, _ = x.shape
        GN = self.n_groups * self.d_state
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * GN, self.n_head], dim=-1)
        past = cache.conv if cache is not None else None
        if cache is not None:
            cache.conv = self._last_inputs(xBC, past, valid)
        xBC = F.silu(causal_conv(xBC, self.conv_weight, self.conv_bias, past, seq_idx))
        # decays and states are in fp32 (or float64) whatever the rest runs in: a state is a long product of decays
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        one_step = cache is not None and L == 1 and cache.ssm is not None
        if one_step:
            xBC = xBC.to(exact)
        xs, Bm, Cm = xBC.split([self.d_inner, GN, GN], dim=-1)
        xs = xs.reshape(B, L, self.n_head, self.head_dim)
        Bm, Cm = Bm.reshape(B, L, self.n_groups, -1), Cm.reshape(B, L, self.n_groups, -1)
        dt = F.softplus(dt.to(exact) + self.dt_bias.to(exact))
        A = -self.A_log.to(exact).exp()
        if valid is not None:
            dt = dt * (torch.arange(L, device=x.device) < valid.unsqueeze(-1)).unsqueeze(-1)
        if one_step:
            y, cache.ssm = ssd_step(cache.ssm, xs[:, 0], dt[:, 0], A, Bm[:, 0], Cm[:, 0])
            y = y.unsqueeze(1)
        else:
            y, state = ssd_scan(xs, dt, A, Bm, Cm, cache.ssm if cache is not None else None, seq_idx)
            if cache is not None:
                cache.ssm = state
        y = torch.addcmul(y, xs, self.D.to(y.dtype).unsqueeze(-1)).reshape(B, L, self.d_inner)
        return self.out_proj(self.norm(y.to(z.dtype), z))

    def _last_inputs(self, xBC: Tensor, past: Tensor | None, valid: Tensor | None) -> Tensor:
        """The convolution's last W - 1 real inputs of each row."""
        B, L, C = xBC.shape
        keep = self.conv_weight.shape[1] - 1
        joined = torch.cat([xBC.new_zeros(B, keep, C) if past is None else past.to(xBC.dtype), xBC], dim=1)
        if valid is None:
            return joined[:, L:].clone()
        index = valid.unsqueeze(-1) + torch.arange(keep, device=xBC.device)
        return joined.gather(1, index.unsqueeze(-1).expand(B, keep, C))
