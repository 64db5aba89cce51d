"""The output layer and the cross-entropy as one operation, some hundred positions at a time.

Logits are the largest tensor of a small model's training step, and are needed only for their softmax. Here a tile of
them is made, turned into its loss and its gradient, and forgotten; the gradients wait for the backward pass, which only
scales them. (As in Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3.2.)

Shapes: n positions, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.model.linear import product

TILE = 8 * 1024 * 1024  # logits in a tile on a CPU
FEWEST = 256  # positions in a tile, so that the products stay large


class _SumOfLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, learning):
        (n, _), V = h.shape, len(weight)
        size = max(FEWEST, TILE // V) if h.device.type == "cpu" else 4096
        exact = torch.promote_types(h.dtype, torch.float32)
        total = h.new_zeros((), dtype=exact)
        dh = torch.empty_like(h) if learning else None
        dweight = weight.new_zeros(weight.shape, dtype=exact) if learning else None
        for start in range(0, n, size):
            tile, answers = h[start : start + size], targets[start : start + size, None]
            logits = product(tile, weight).to(exact)
            log_probabilities = logits.log_softmax(-1)
            total -= log_probabilities.gather(-1, answers).sum()
            if learning:
                dlogits = log_probabilities.exp_()  # the softmax, less one at the answer
                dlogits.scatter_add_(-1, answers, dlogits.new_full(answers.shape, -1.0))
                dlogits = dlogits.to(h.dtype)
                dh[start : start + size] = product(dlogits, weight.t())
                if h.dtype == exact:
                    dweight.addmm_(dlogits.t(), tile)
                else:
                    dweight += dlogits.t() @ tile
        if learning:
            ctx.save_for_backward(dh, dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, given):
        dh, dweight = ctx.saved_tensors
        return dh * given.to(dh.dtype), dweight * given.to(dweight.dtype), None, None


def sum_of_losses(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log softmax(weight h)[target]: h (n, D), weight (V, D), targets (n,) -> scalar in fp32 at
    least. Under autocast the products run in its type. Can be differentiated once."""
    kind = h.device.type
    learning = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        h, weight = h.to(low), weight.to(low)
    with torch.autocast(kind, enabled=False):
        return _SumOfLosses.apply(h, weight, targets, learning)
