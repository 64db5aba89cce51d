"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): an answer is judged by the others to the
same question, so no critic is needed.

    A_i  = (r_i - mean r) / (std r + eps)       over the G answers of a group
    loss = - sum_t min(rho_t A, clip(rho_t, 1 - e, 1 + e) A) + beta KL_t,   rho_t = pi(t) / pi_old(t)

The sum runs over the tokens that the model wrote; those that its searches found are no actions. It is divided by the
number of answers and a constant, not by each answer's length, which would favour long wrong ones (Liu et al. 2025, "Dr.
GRPO", arXiv 2503.20783).

    T written tokens of all answers of a batch
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(groups, G) from rewards (groups, G). A group whose rewards are all equal teaches nothing: 0. scale: divide by
    the group's standard deviation, so that questions with small differences count as much."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True, unbiased=False) + eps)


def clipped_loss(logp: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """(T,) losses; PPO's clipped objective (Schulman et al. 2017, arXiv 1707.06347, eq. 7). Without clip: 0, the plain
    policy gradient's ratio."""
    ratio = (logp - old).exp()
    if clip <= 0:
        return -ratio * advantages
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl_estimate(logp: Tensor, reference: Tensor) -> Tensor:
    """(T,) estimates of KL(pi || reference) from tokens of pi: never negative, and unbiased in value (Schulman 2020,
    "Approximating KL divergence", k3)."""
    difference = reference - logp
    return difference.exp() - difference - 1
