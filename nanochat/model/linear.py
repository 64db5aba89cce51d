"""A linear layer whose fp32 products on a CPU run in oneDNN: 210 to 220 GFLOP/s where PyTorch's default, MKL, reaches
170 to 195 (two cores of an AMD EPYC, docs/lab_notes.md). The gradient of the weight stays with MKL, faster at that.

Shapes: T rows of all batches, K inputs, M outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST = 256  # rows; below, setting up the product takes longer than it saves
FEW = 32


def _available() -> bool:
    """Whether this PyTorch has the operation (one that its compiler uses, not a public one), and it is right."""
    try:
        x, w = torch.randn(8, 16), torch.randn(4, 16)
        return torch.allclose(_onednn(x, w), x @ w.t(), atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


ONEDNN = _available()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K), weight (M, K) -> (T, M), as fast as it goes. Without gradients, outside of autocast."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        if ONEDNN and len(x) >= FEWEST:
            return _onednn(x, weight)
        if 1 < len(x) <= FEW:  # rows that are decoded together: MKL is a quarter faster the other way round
            return (weight @ x.t()).t().contiguous()
    return x @ weight.t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        return dx, dy.t() @ x if ctx.needs_input_grad[1] else None


class Linear(nn.Linear):
    """x (..., K) -> (..., M), without bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if plain or self.weight.dtype != torch.float32 or torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        multiply = _Product.apply if torch.is_grad_enabled() else product
        return multiply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], len(self.weight))
