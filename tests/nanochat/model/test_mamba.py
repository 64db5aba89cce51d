"""The mixer's convolution and gated norm, tile by tile, against PyTorch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import mamba, tiled
from nanochat.model.mamba import Mamba2, causal_conv_silu


def slow_conv(x, weight, bias, past, seq_idx):
    """F.conv1d on each document of each row by itself, after zeros or after `past`."""
    W = weight.shape[1]
    rows = []
    for b in range(len(x)):
        cuts = [0, *(i for i in range(1, x.shape[1]) if seq_idx[b, i] != seq_idx[b, i - 1]), x.shape[1]]
        parts = []
        for s, e in itertools.pairwise(cuts):
            before = past[b] if past is not None and s == 0 else x.new_zeros(W - 1, x.shape[2])
            padded = torch.cat([before, x[b, s:e]]).t()
            parts.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2]).t())
        rows.append(torch.cat(parts))
    return F.silu(torch.stack(rows))


@pytest.mark.parametrize("W", [1, 4, 8])
@pytest.mark.parametrize("case", ["plain", "past", "one new token", "packed", "long documents"])
@pytest.mark.parametrize("tile", [3, 11, 1000])
def test_convolution_and_its_gradients(W, case, tile, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiled, "TILE", 5 * tile)  # tokens of 5 channels
    B, L, C = 3, 1 if case == "one new token" else 29, 5
    x, weight, bias = torch.randn(B, L, C), torch.randn(C, W), torch.randn(C)
    past = torch.randn(B, W - 1, C) if case in ("past", "one new token") else None
    seq_idx = torch.zeros(B, L, dtype=torch.long)
    if case == "packed":  # documents shorter than the convolution among them
        seq_idx = (torch.rand(B, L) < 0.3).long().cumsum(1)
    if case == "long documents":  # tiles with and without a border
        seq_idx = (torch.arange(L) >= 17).long().expand(B, L)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias, *([past] if past is not None else []))]
    given = inputs if past is not None else [*inputs, None]
    fast = causal_conv_silu(*given, seq_idx if case in ("packed", "long documents") else None)
    slow = slow_conv(*given, seq_idx)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-12)
    probe = torch.randn_like(slow)
    if past is not None and W == 1:
        inputs = inputs[:3]  # no past to have a gradient
    for ours, theirs in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_and_its_gradients(groups, dtype, bar, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiled, "TILE", 40)  # tiles of 3 rows, and a shorter one
    y, z, weight, probe = torch.randn(10, 12), torch.randn(10, 12), torch.rand(12) + 0.5, torch.randn(10, 12)
    low = [t.to(dtype).requires_grad_() for t in (y, z, weight)]
    exact = [t.detach().double().requires_grad_() for t in low]
    ours = tiled.gated_rms_norm(*low, groups, 1e-5)
    gated = (exact[0] * F.silu(exact[1])).view(10, groups, -1)
    plain = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(10, 12) * exact[2]
    pairs = [(ours, plain)]
    pairs += zip(
        torch.autograd.grad(ours, low, probe.to(dtype)),
        torch.autograd.grad(plain, exact, probe.to(dtype).double()),
        strict=True,
    )
    for a, b in pairs:
        assert a.dtype == dtype and (a.double() - b).norm() <= bar * b.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_operation_between_the_projections_equals_its_parts(groups, packed, monkeypatch):
    torch.manual_seed(0)
    mixer = Mamba2(16, d_state=8, expand=2, head_dim=8, n_groups=groups, d_conv=4, eps=1e-5).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    x = torch.randn(2, 2 * mamba.CHUNK, 16, dtype=torch.float64, requires_grad=True)
    seq_idx = (torch.rand(x.shape[:2]) < 0.05).long().cumsum(1) if packed else None
    leaves, probe = [x, *mixer.parameters()], torch.randn_like(x)
    called, apply = [], mamba._BetweenProjections.apply
    monkeypatch.setattr(mamba._BetweenProjections, "apply", lambda *args: called.append(1) or apply(*args))
    joined = mixer(x, seq_idx)
    one = [joined, *torch.autograd.grad(joined, leaves, probe)]
    monkeypatch.setattr(mamba, "CHUNK", 1000)  # no length is a multiple of it
    apart = mixer(x, seq_idx)
    assert len(called) == 1
    for a, b in zip(one, [apart, *torch.autograd.grad(apart, leaves, probe)], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
