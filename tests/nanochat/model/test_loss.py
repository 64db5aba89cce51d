"""The output layer and cross-entropy in tiles, against PyTorch's own over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import loss
from nanochat.model.loss import sum_of_losses


@pytest.mark.parametrize("tile", [7, 1000])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients(dtype, bar, tile, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "FEWEST", tile)  # the last tile is shorter
    monkeypatch.setattr(loss, "TILE", 1)
    h, weight = torch.randn(30, 16, dtype=dtype) * 3, torch.randn(50, 16, dtype=dtype)
    targets = torch.randint(0, 50, (30,))
    results = []
    for total in (
        lambda h, w: sum_of_losses(h, w, targets),
        lambda h, w: F.cross_entropy(h @ w.t(), targets, reduction="sum"),
    ):
        leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
        value = total(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value / 30, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and torch.allclose(ours, theirs, rtol=bar, atol=bar)


def test_under_autocast_products_are_in_bf16_and_gradients_keep_their_types():
    torch.manual_seed(0)
    h, weight = torch.randn(300, 64, requires_grad=True), torch.randn(40, 64, requires_grad=True)
    targets = torch.randint(0, 40, (300,))
    exact = torch.autograd.grad(F.cross_entropy(h @ weight.t(), targets, reduction="sum"), (h, weight))
    with torch.autocast("cpu", torch.bfloat16):
        total = sum_of_losses(h, weight, targets)
    for ours, theirs in zip(torch.autograd.grad(total, (h, weight)), exact, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


def test_without_gradients_nothing_is_kept_and_no_position_is_no_loss():
    h, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.randint(0, 5, (9,))
    with torch.no_grad():
        value = sum_of_losses(h, weight, targets)
    assert not value.requires_grad
    assert torch.allclose(value, F.cross_entropy(h @ weight.t(), targets, reduction="sum"))
    assert sum_of_losses(h[:0], weight, targets[:0]) == 0
