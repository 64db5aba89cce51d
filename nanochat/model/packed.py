"""Causal attention over many documents at once: packed rows become batches of documents of similar length.

Rows of training hold several documents, and none may look into another. Instead of an L x L mask, or of one call for
each document, the documents are laid out anew, padded to the longest of their group, and attended to together.

On a CPU the products are written out in blocks of queries, with the backward pass by hand: the softmax and its gradient
are then few passes over memory, and torch's fused attention takes two to three times as long for documents of up to
a few hundred tokens (bench/attention.py). It keeps the probabilities, though, so long ones go to the fused one.

Shapes: B batch, L length, S documents of a group, M their padded length, H query heads, Hkv key/value heads, Dh head
width, P slots of all groups together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 192  # queries at a time; keys after the last of them are never touched
LONGEST = 2048  # tokens; from here on the probabilities would take more memory than they save time


@dataclass
class Packing:
    """groups: (S, M) of each; places (B * L,): the slot of each position, counting through all groups."""

    groups: list[tuple[int, int]]
    places: Tensor

    @classmethod
    def of(cls, seq_idx: Tensor) -> Packing:
        """seq_idx (B, L): a document is a run of equal values within a row."""
        B, L = seq_idx.shape
        ids = seq_idx.cpu()
        starting = torch.ones(B, L, dtype=torch.bool)
        starting[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = starting.flatten().nonzero().flatten()
        sizes = torch.diff(starts, append=torch.tensor([B * L]))
        sizes, order = sizes.sort(descending=True)
        # a group ends where padding would be more than a quarter, but very short documents stay together
        groups, ranked = [], sizes.tolist()
        for size in ranked:
            if groups and (size > 0.75 * groups[-1][1] or groups[-1][1] <= 32):
                groups[-1][0] += 1
            else:
                groups.append([1, size])
        first_slots = torch.empty(len(ranked), dtype=torch.long)
        document = slot = 0
        for S, M in groups:
            first_slots[order[document : document + S]] = slot + M * torch.arange(S)
            document, slot = document + S, slot + S * M
        number = starting.flatten().cumsum(0) - 1  # of each position's document
        places = first_slots[number] + torch.arange(B * L) - starts[number]
        return cls([tuple(group) for group in groups], places.to(seq_idx.device))


class _Collect(torch.autograd.Function):
    """x[places], where no place occurs twice (so that the backward pass can copy instead of add)."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor):
        ctx.size, ctx.places = len(x), places
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy.new_zeros(ctx.size, *dy.shape[1:]).index_copy_(0, ctx.places, dy), None


class _CausalAttention(torch.autograd.Function):
    """q, k, v (S, H, M, Dh) -> softmax(q k^T / sqrt(Dh), causal) v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor):
        M = q.shape[2]
        y, probabilities = torch.empty_like(v), []
        with torch.autocast(q.device.type, enabled=False):  # softmax keeps bf16 outside and computes in fp32
            q = q * q.shape[-1] ** -0.5
            for s in range(0, M, BLOCK):
                e = min(s + BLOCK, M)
                p = q[:, :, s:e] @ k[:, :, :e].transpose(-1, -2)
                later = torch.ones(e - s, e - s, dtype=torch.bool, device=q.device).triu_(1)
                p[..., s:].masked_fill_(later, -torch.inf)
                p = p.softmax(-1)
                y[:, :, s:e] = p @ v[:, :, :e]
                probabilities.append(p)
        ctx.save_for_backward(q, k, v, y, *probabilities)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, y, *probabilities = ctx.saved_tensors
        # softmax's gradient: ds = p (dp - <dy, y>), for <dy, y> is the sum of p dp over the keys
        along = (dy.float() * y.float() if dy.dtype == torch.bfloat16 else dy * y).sum(-1, keepdim=True).to(dy.dtype)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        s = 0
        for p in probabilities:
            e = s + p.shape[2]
            dv[:, :, :e] += p.transpose(-1, -2) @ dy[:, :, s:e]
            ds = dy[:, :, s:e] @ v[:, :, :e].transpose(-1, -2)
            ds.sub_(along[:, :, s:e]).mul_(p)
            dq[:, :, s:e] = ds @ k[:, :, :e]
            dk[:, :, :e] += ds.transpose(-1, -2) @ q[:, :, s:e]
            s = e
        return dq * q.shape[-1] ** -0.5, dk, dv


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (S, H, M, Dh), k and v (S, Hkv, M, Dh) with Hkv dividing H -> (S, H, M, Dh)."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cpu" or q.shape[2] > LONGEST:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return _CausalAttention.apply(q, k, v)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Causal attention inside each document. q (B, H, L, Dh), k and v (B, Hkv, L, Dh) -> (B, H, L, Dh)."""
    B, H, L, Dh = q.shape
    slots = sum(S * M for S, M in packing.groups)

    def spread(t: Tensor) -> Tensor:
        tokens = t.transpose(1, 2).reshape(B * L, -1)
        return tokens.new_zeros(slots, tokens.shape[1]).index_copy(0, packing.places, tokens)

    flat = [spread(t) for t in (q, k, v)]
    parts, first = [], 0
    for S, M in packing.groups:
        views = [t[first : first + S * M].view(S, M, -1, Dh).transpose(1, 2) for t in flat]
        parts.append(causal_attention(*views).transpose(1, 2).reshape(S * M, H * Dh))
        first += S * M
    return _Collect.apply(torch.cat(parts), packing.places).view(B, L, H, Dh).transpose(1, 2)
