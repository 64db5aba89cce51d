"""The linear layer against PyTorch's own, however many rows it is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat.model.linear import Linear


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 40), (2, 300)])  # each of the ways it multiplies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients(shape, dtype):
    torch.manual_seed(0)
    layer = Linear(24, 10).to(dtype)
    x = torch.randn(*shape, 24, dtype=dtype, requires_grad=True)
    expected = F.linear(x, layer.weight)
    probe = torch.randn_like(expected)
    pairs = [(layer(x), expected)]
    with torch.no_grad():
        pairs.append((layer(x), expected))
    leaves = (x, layer.weight)
    pairs += zip(
        torch.autograd.grad(pairs[0][0], leaves, probe), torch.autograd.grad(expected, leaves, probe), strict=True
    )
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.is_contiguous()
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_under_autocast_it_is_a_linear_layer_like_any_other():
    layer, x = Linear(24, 10), torch.randn(300, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight)) and layer(x).dtype == torch.bfloat16
