"""The chunked scan against the recurrence it stands for, one step at a time."""

from __future__ import annotations

import pytest
import torch

from nanochat.model import ssd, ssd_factored
from nanochat.model.ssd import ssd_scan, ssd_step


def sequential(x, dt, A, Bm, Cm, h0, D, seq):
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
        ys.append((h * c.unsqueeze(2)).sum(-1) + D.unsqueeze(-1) * x[:, t])
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
        rand(H),
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
    y_f, h_f = ssd_scan(*fast[:5], initial_state=fast[5] if with_state else None, seq_idx=seq, D=fast[6])
    ((y_f * wy.to(dtype)).sum() + (h_f * wh.to(dtype)).sum()).backward()
    forward = max(relative(y_f.double(), y_s), relative(h_f.double(), h_s))
    leaves = [i for i in range(7) if with_state or i != 5]
    return forward, max(relative(fast[i].grad.double(), slow[i].grad) for i in leaves)


CASES = [(seq, state) for seq in (False, True) for state in (False, True)]


@pytest.mark.parametrize(("with_seq", "with_state"), CASES)
@pytest.mark.parametrize("L", [1, 37, 64, 200, 256])
@pytest.mark.parametrize("tile", [1, 2 * 64 * 20, 1 << 17])  # a chunk of a row; two of a row; everything
def test_scan_equals_recurrence_float64(L, with_seq, with_state, tile, monkeypatch):
    monkeypatch.setattr(ssd_factored, "TILE", tile)
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
    assert torch.autograd.gradcheck(lambda *v: ssd_scan(*v[:6], seq, v[6], chunk=4), values)


def test_steps_equal_scan():
    (x, dt, A, Bm, Cm, h0, _), _ = inputs(50, torch.float64, False, True)
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


def steepness(A, dt=0.05, L=130, H=4, G=1):
    """Errors with these decays: forward, gradients."""
    torch.manual_seed(0)
    given = [torch.randn(2, L, H, 5), torch.full((2, L, H), dt) * torch.rand(2, L, H), torch.tensor(A)]
    given += [torch.randn(2, L, G, 6), torch.randn(2, L, G, 6), torch.randn(2, H, 5, 6), torch.ones(H)]
    seq = (torch.rand(2, L) < 0.05).long().cumsum(1)
    fast = [t.requires_grad_() for t in given]
    slow = [t.detach().double().requires_grad_() for t in given]
    (y_f, h_f), (y_s, h_s) = ssd_scan(*fast[:6], seq, fast[6]), sequential(*slow, seq)
    wy, wh = torch.randn_like(y_s), torch.randn_like(h_s)
    ((y_f * wy).sum() + (h_f * wh).sum()).backward()
    ((y_s * wy).sum() + (h_s * wh).sum()).backward()
    pairs = zip(fast, slow, strict=True)
    return max(relative(y_f.double(), y_s), relative(h_f.double(), h_s)), max(
        relative(a.grad, b.grad) for a, b in pairs
    )


def test_heads_that_forget_too_steeply_for_factors_are_taken_apart(monkeypatch):
    called = []
    for name in ("FactoredSSD", "_PairwiseSSD"):
        scan = getattr(ssd, name)
        monkeypatch.setattr(
            scan, "apply", lambda x, *rest, n=name, f=scan.apply: called.append((n, x.shape[2])) or f(x, *rest)
        )
    mild, steep, at_the_edge = -2.0, -400.0, -40.0  # 64 steps of .025 on average: -3, -640, -64
    for A, expected in [
        ([mild] * 4, [("FactoredSSD", 4)]),
        ([mild, steep, mild, at_the_edge], [("FactoredSSD", 3), ("_PairwiseSSD", 1)]),
        ([steep] * 4, [("_PairwiseSSD", 4)]),
    ]:
        called.clear()
        forward, gradients = steepness(A)
        assert called == expected
        assert forward < 1e-4 and gradients < 5e-4, (A, forward, gradients)
    called.clear()
    assert max(steepness([mild, steep, mild, mild], G=2)) < 5e-4
    assert called == [("_PairwiseSSD", 4)]


@pytest.mark.parametrize("with_seq", [False, True])
def test_bf16_inputs_lose_no_more_than_their_rounding(with_seq):
    (x, dt, A, Bm, Cm, h0, _), seq = inputs(300, torch.float32, with_seq, True, P=32, N=32, G=1)
    dt = dt.detach() / 10  # the factored form
    low = [t.detach().bfloat16() for t in (x, Bm, Cm)]
    y, h = ssd_scan(low[0], dt, A, low[1], low[2], h0, seq)
    expected_y, expected_h = ssd_scan(low[0].float(), dt, A, low[1].float(), low[2].float(), h0, seq)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert relative(y.float(), expected_y) < 0.02 and relative(h, expected_h) < 0.02
