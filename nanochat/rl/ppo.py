"""What PPO has beyond GRPO's loss: a critic's value for every written token, and advantages from it.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = sum_k (gamma lambda)^k delta_{t+k}        Schulman et al. 2015, arXiv 1506.02438, eq. 16
    target  = A_t + V_t

The steps are the tokens that the model wrote; between two of them may lie documents that it was given. The reward comes
with the last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, targets) of one answer, each (T,), from rewards (T,) and values (T,); it ends after the last."""
    advantages = torch.zeros_like(values)
    following, ahead = 0.0, 0.0  # advantage and value of the next step
    for t in range(len(values) - 1, -1, -1):
        delta = rewards[t] + gamma * ahead - values[t]
        following = delta + gamma * lam * following
        advantages[t] = following
        ahead = values[t]
    return advantages, advantages + values


def value_loss(values: Tensor, old: Tensor, targets: Tensor, clip: float) -> Tensor:
    """(T,): squared error, the worse of the value and the value held near the old one."""
    error = (values - targets).square()
    if clip <= 0:
        return 0.5 * error
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (held - targets).square())
