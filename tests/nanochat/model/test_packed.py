"""Attention over packed documents against softmax written out, one document at a time."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import packed
from nanochat.model.attention import cached_attention
from nanochat.model.packed import Packing, causal_attention, packed_attention


def slow_attention(q, k, v):
    """q (H, M, Dh), k and v (Hkv, M, Dh)."""
    k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def same_with_gradients(fast, slow, inputs, atol=1e-11):
    assert torch.allclose(fast, slow, rtol=0, atol=atol)
    probe = torch.randn_like(slow)
    ours, theirs = (torch.autograd.grad((y * probe).sum(), inputs) for y in (fast, slow))
    assert all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(ours, theirs, strict=True))


def random_inputs(*shapes):
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("M", [1, 7, packed.BLOCK, packed.BLOCK + 1, 2 * packed.BLOCK + 30])
def test_causal_attention_and_its_gradients(M):
    torch.manual_seed(0)
    q, k, v = random_inputs((2, 4, M, 8), (2, 2, M, 8), (2, 2, M, 8))
    slow = torch.stack([slow_attention(*row) for row in zip(q, k, v, strict=True)])
    same_with_gradients(causal_attention(q, k, v), slow, [q, k, v])


def test_long_documents_take_the_fused_attention(monkeypatch):
    monkeypatch.setattr(packed, "LONGEST", 16)
    monkeypatch.setattr(packed._CausalAttention, "apply", None)
    q, k, v = random_inputs((1, 4, 17, 8), (1, 2, 17, 8), (1, 2, 17, 8))
    same_with_gradients(causal_attention(q, k, v), slow_attention(q[0], k[0], v[0])[None], [q, k, v])


def test_bf16_under_autocast_stays_bf16():
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in random_inputs(*[(2, 2, 50, 16)] * 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_attention(q, k, v)
    slow = torch.stack([slow_attention(*(t.double() for t in row)) for row in zip(q, k, v, strict=True)])
    assert y.dtype == torch.bfloat16
    assert (y - slow).norm() / slow.norm() < 0.01


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_packed_documents_do_not_see_each_other(density):
    torch.manual_seed(0)
    B, L = 3, 90
    seq_idx = (torch.rand(B, L) < density).long().cumsum(1)
    q, k, v = random_inputs((B, 4, L, 8), (B, 2, L, 8), (B, 2, L, 8))
    rows = []
    for b in range(B):
        _, counts = seq_idx[b].unique_consecutive(return_counts=True)
        parts = zip(*(t[b].split(counts.tolist(), dim=1) for t in (q, k, v)), strict=True)
        rows.append(torch.cat([slow_attention(*part) for part in parts], dim=1))
    same_with_gradients(packed_attention(q, k, v, Packing.of(seq_idx)), torch.stack(rows), [q, k, v])


def test_packing_groups_by_length_with_little_padding():
    torch.manual_seed(0)
    sizes = torch.randint(1, 300, (60,))
    seq_idx = torch.arange(60).repeat_interleave(sizes)[None]
    packing = Packing.of(seq_idx)
    slots = sum(S * M for S, M in packing.groups)
    assert sum(S for S, _ in packing.groups) == 60
    assert len(packing.places.unique()) == seq_idx.numel() and packing.places.max() < slots
    assert slots < 1.34 * seq_idx.numel() and len(packing.groups) < 20


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_one_query_against_a_cache_is_like_fused_attention(heads):
    torch.manual_seed(0)
    H, kv = heads
    q, k, v = torch.randn(3, H, 1, 8), torch.randn(3, kv, 20, 8), torch.randn(3, kv, 20, 8)
    visible = torch.arange(20) < torch.tensor([[[20]], [[1]], [[13]]])  # rows of other lengths
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1), enable_gqa=True)
    assert torch.allclose(cached_attention(q, k, v, visible), expected, atol=1e-6)
