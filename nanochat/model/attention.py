"""Causal self-attention: grouped-query heads, rotary positions.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864, half-split form); grouped queries, Ainslie et al. 2023 (2305.13245).
Shapes: B batch, L length, D model width, H query heads, Hkv key/value heads, Dh head width, S keys held.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.cache import KeyValues
from nanochat.model.gates import Pairs, gated_attention
from nanochat.model.linear import Linear
from nanochat.model.packed import Packing, causal_attention, packed_attention


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin (..., L, Dh/2) in fp32 for integer positions (..., L)."""
    inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.unsqueeze(-1).float() * inverse_frequency
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """Turns the pairs (x_i, x_{i + Dh/2}); backward turns them back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        return _rotated(dy, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    out = torch.empty_like(x)
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=sign)
    return out


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, L, Dh); cos, sin (B or 1, 1, L, Dh/2) in x's type."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin, 1)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q (B, H, L, Dh), k and v (B, Hkv, S, Dh), visible (B, L, S) bool -> (B, H, L, Dh).

    One query on a CPU is bound by reading k and v once. PyTorch's fused attention takes 1.7 times as long in fp32 and
    up to 3 times in bf16 as products of k with the queries of its group."""
    B, H, L, Dh = q.shape
    if L > 1 or q.device.type != "cpu":
        grouped = k.shape[1] != H
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1), enable_gqa=grouped)
    queries = (q * Dh**-0.5).view(B, k.shape[1], -1, Dh)
    scores = queries @ k.transpose(-1, -2)  # B Hkv H/Hkv S; k @ queries takes twice as long
    bias = scores.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf).unsqueeze(1)  # B 1 1 S: one for all heads
    return ((scores + bias).softmax(-1) @ v).view(B, H, 1, Dh)


class Attention(nn.Module):
    def __init__(self, d_model: int, n_head: int, n_kv_head: int, head_dim: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        self.q_proj = Linear(d_model, n_head * head_dim)
        self.k_proj = Linear(d_model, n_kv_head * head_dim)
        self.v_proj = Linear(d_model, n_kv_head * head_dim)
        self.o_proj = Linear(n_head * head_dim, d_model)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        packing: Packing | None = None,
        cache: KeyValues | None = None,
        positions: Tensor | None = None,
        needed: int = 0,
        pairs: Pairs | None = None,
    ) -> Tensor:
        """x (B, L, D). packing: where the documents of packed rows lie; none looks into another. pairs: gates of
        facts (gates.py).
        With a cache: positions (B, L) of x's tokens and `needed`, the number of cached positions in use after them."""
        B, L, _ = x.shape
        q = self.q_proj(x).view(B, L, self.n_head, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, L, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, L, self.n_kv_head, self.head_dim).transpose(1, 2)
        if rotary is not None:
            cos, sin = (t.to(q.dtype).unsqueeze(1) for t in rotary)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            # on a CPU in the weights' type, for single tokens are read in it (engine.py)
            k_all, v_all = cache.write(k, v, positions, needed, x.dtype if x.device.type == "cpu" else v.dtype)
            if needed == L:  # nothing before: plain causal attention; right padding cannot be seen by real tokens
                y = causal_attention(q, k, v)
            else:
                visible = torch.arange(needed, device=x.device) <= positions.unsqueeze(-1)  # B L S
                with torch.autocast(x.device.type, enabled=False):
                    y = cached_attention(q.to(k_all.dtype), k_all, v_all, visible).to(q.dtype)
        elif pairs is not None:
            y = gated_attention(q, k, v, pairs)
        else:
            y = causal_attention(q, k, v) if packing is None else packed_attention(q, k, v, packing)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, -1))
