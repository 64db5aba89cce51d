"""The chunked scan against the recurrence it stands for, one step at a time."""

from __future__ import annotations

import pytest
import torch

from nanochat.model.ssd import ssd_scan, ssd_step


def sequential(x, dt, A, Bm, Cm, h0, seq):
    """The recurrence as written in the paper, step by step."""
    B, L, H, _ = x.shape
    K = H // Bm.shape[2]
    h, ys = h0, []
    for t in range(L):
        if seq is not None and t > 0:
            h = h * (seq[:, t] == seq[:, t - 1]).to(x.dtype).view(B, 1, 1, 1)
        b, c = Bm[:, t].repeat_interleave(K, 1), Cm[:, t].repeat_interleave(K, 1)
        decay = (dt[:, t] * A).exp().view(B, H, 1, 1)
        h = decay * h + (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * b.unsqueeze(2)
        ys.append((h * c.unsqueeze(2)).sum(-1))
    return torch.stack(ys, 1), h


def inputs(L, dtype, with_seq, with_state, seed=0, B=2, H=4, P=5, G=2, N=6):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    values = [
        rand(B, L, H, P),
        torch.nn.functional.softplus(rand(B, L, H) - 1),
        -torch.rand(H, generator=g, dtype=torch.float64) * 8 - 0.1,
        rand(B, L, G, N),
        rand(B, L, G, N),
        rand(B, H, P, N) if with_state else torch.zeros(B, H, P, N, dtype=torch.float64),
    ]
    seq = (torch.rand(B, L, generator=g) < 0.05).long().cumsum(1) if with_seq else None
    return [v.to(dtype).requires_grad_() for v in values], seq


def relative(a, b):
    assert a.isfinite().all()  # max() of several errors would pass over a nan
    return ((a - b).norm() / b.norm().clamp_min(1e-3)).item()


def compare(L, dtype, with_seq, with_state, **sizes):
    """Relative errors of outputs and of gradients, fast scan in dtype against the recurrence in float64."""
    fast, seq = inputs(L, dtype, with_seq, with_state, **sizes)
    slow = [v.detach().double().requires_grad_() for v in fast]
    g = torch.Generator().manual_seed(1)
    y_s, h_s = sequential(*slow, seq)
    wy, wh = torch.randn(y_s.shape, generator=g).double(), torch.randn(h_s.shape, generator=g).double()
    ((y_s * wy).sum() + (h_s * wh).sum()).backward()
    y_f, h_f = ssd_scan(*fast[:5], initial_state=fast[5] if with_state else None, seq_idx=seq)
    ((y_f * wy.to(dtype)).sum() + (h_f * wh.to(dtype)).sum()).backward()
    forward = max(relative(y_f.double(), y_s), relative(h_f.double(), h_s))
    leaves = range(6) if with_state else range(5)
    return forward, max(relative(fast[i].grad.double(), slow[i].grad) for i in leaves)


CASES = [(seq, state) for seq in (False, True) for state in (False, True)]


@pytest.mark.parametrize(("with_seq", "with_state"), CASES)
@pytest.mark.parametrize("L", [1, 37, 64, 200, 256])
def test_scan_equals_recurrence_float64(L, with_seq, with_state):
    forward, gradients = compare(L, torch.float64, with_seq, with_state)
    assert forward < 1e-10 and gradients < 1e-10, (forward, gradients)


@pytest.mark.parametrize(("with_seq", "with_state"), CASES)
def test_scan_equals_recurrence_float32(with_seq, with_state):
    forward, gradients = compare(512, torch.float32, with_seq, with_state, H=4, P=32, G=1, N=64)
    assert forward < 1e-4 and gradients < 5e-4, (forward, gradients)


def test_one_group_per_head_and_one_group_for_all():
    for G in (1, 4):
        forward, gradients = compare(100, torch.float64, True, True, G=G)
        assert forward < 1e-10 and gradients < 1e-10


def test_gradcheck():
    values, seq = inputs(7, torch.float64, True, True, B=1, H=2, P=2, G=1, N=3)
    assert torch.autograd.gradcheck(lambda *v: ssd_scan(*v[:5], initial_state=v[5], seq_idx=seq, chunk=4), values)


def test_steps_equal_scan():
    (x, dt, A, Bm, Cm, h0), _ = inputs(50, torch.float64, False, True)
    y, final = ssd_scan(x, dt, A, Bm, Cm, h0)
    h = h0
    for t in range(50):
        y_t, h = ssd_step(h, x[:, t], dt[:, t], A, Bm[:, t], Cm[:, t])
        assert torch.allclose(y_t, y[:, t], atol=1e-12)
    assert torch.allclose(h, final, atol=1e-12)


def test_strong_decay_neither_overflows_nor_makes_nan():
    x = torch.randn(1, 130, 2, 4, requires_grad=True)
    dt = torch.full((1, 130, 2), 30.0)
    y, h = ssd_scan(x, dt, torch.tensor([-16.0, -1.0]), torch.randn(1, 130, 1, 8), torch.randn(1, 130, 1, 8))
    (y.sum() + h.sum()).backward()
    assert y.isfinite().all() and h.isfinite().all() and x.grad.isfinite().all()
