"""Sets of facts drawn from a retriever's logits, so that the loss of what reads them tells every logit which way to go.

Gates are 0 or 1; a reader multiplies what it makes of each fact by the fact's gate, for all facts, and only then leaves
out those of gate 0. Leaving out first and multiplying after is the mistake to avoid: then a fact that was not drawn has
no gradient from what it would have changed, and what is learned is not what helps.

    binary   each fact for itself, present with probability sigmoid(logit). Concrete relaxation, straight-through: Jang,
             Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax"; Maddison, Mnih and Teh, "The Concrete
             Distribution" (both ICLR 2017). This is D-RAG's sampler, at temperature .5.
    top_k    k facts, drawn one after the other without replacement, by adding Gumbel noise to the logits and taking the
             k largest (Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them", ICML 2019). Backward, the
             relaxation of Plötz and Roth, "Neural Nearest Neighbors Networks" (NeurIPS 2018), and Xie and Ermon,
             "Reparameterizable Subset Sampling via Continuous Relaxations" (IJCAI 2019).

The log-probabilities of both are for REINFORCE, whose gradient has no bias and much more noise.

    S samples of a question, B questions, F facts of the largest; mask (B, F): which facts there are
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.5  # D-RAG's
TOP_K_TEMPERATURE = (
    1.0  # cosine with the exact gradient, mean of ten functions of 3 of 10: .957 at .5, .972 here, .963 at 2
)
_TINY = torch.finfo(torch.float32).tiny


def pad(values: Tensor, starts: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Ragged values (X, ...), those of b at starts[b] : starts[b + 1], as (B, F, ...) and mask (B, F)."""
    counts = starts.diff()
    places = torch.arange(int(counts.max()) if len(counts) else 0, device=values.device)
    mask = places < counts[:, None]
    padded = values.new_full((*mask.shape, *values.shape[1:]), fill)
    padded[mask] = values
    return padded, mask


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of this shape."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return -(-(uniform.clamp_min(_TINY)).log()).clamp_min(_TINY).log()


# --- facts for themselves


def binary_gates(
    logits: Tensor, mask: Tensor, temperature: float = TEMPERATURE, generator: torch.Generator | None = None
) -> Tensor:
    """logits, mask (B, F) -> gates (B, F)."""
    noise = gumbel(logits, generator) - gumbel(logits, generator)  # logistic: the difference of two Gumbels
    soft = ((logits + noise) / temperature).sigmoid() * mask
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def binary_log_prob(logits: Tensor, gates: Tensor, mask: Tensor) -> Tensor:
    """Of 0/1 gates (..., B, F) under binary_gates -> (..., B)."""
    each = -F.binary_cross_entropy_with_logits(logits.expand_as(gates), gates, reduction="none")
    return (each * mask).sum(-1)


# --- k facts


def top_k_gates(
    logits: Tensor,
    mask: Tensor,
    k: int,
    temperature: float = TOP_K_TEMPERATURE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits, mask (B, F) -> gates (B, F), k of each row 1; all facts, where there are fewer."""
    perturbed = (logits + gumbel(logits, generator)).masked_fill(~mask, -torch.inf)
    hard = torch.zeros_like(logits).scatter(-1, draw_order(perturbed, k), 1.0) * mask
    return straight_through(hard, relaxed_top_k(perturbed, mask, k, temperature))


def draw_order(perturbed: Tensor, k: int) -> Tensor:
    """(B, min(k, F)): the facts in the order in which they are drawn."""
    return perturbed.topk(min(k, perturbed.shape[-1]), dim=-1).indices


def relaxed_top_k(perturbed: Tensor, mask: Tensor, k: int, temperature: float) -> Tensor:
    """k softmaxes, each without what those before it have taken -> (B, F), each row's sum min(k, facts). As the
    temperature goes to 0 it is the k largest."""
    nothing = -torch.finfo(perturbed.dtype).max
    scores = perturbed / temperature
    count = mask.sum(-1, keepdim=True)
    total = torch.zeros_like(perturbed)
    for step in range(min(k, perturbed.shape[-1])):
        left = (step < count) & mask  # rows with fewer facts are through
        one_hot = scores.masked_fill(~left, nothing).softmax(-1) * left
        total = total + one_hot
        taken = one_hot > 1 - 1e-6  # the logarithm of what is left of it would not be low enough at low temperatures
        scores = scores + (1 - one_hot).clamp_min(_TINY).log()
        scores = scores.masked_fill(taken, nothing)
    return total


def top_k_log_prob(logits: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Of facts drawn in this order (..., B, k) under top_k_gates, Plackett-Luce -> (..., B). Places of order behind a
    row's last fact count nothing."""
    nothing = torch.finfo(logits.dtype).min / 4  # finite: the gradient of a sum of nothing is no number
    logits = logits.masked_fill(~mask, nothing).expand(*order.shape[:-1], -1)
    drawn = logits.gather(-1, order)
    # what was left before each draw, summed from behind: taking from the whole what was drawn would cancel
    rest = logits.scatter(-1, order, nothing).logsumexp(-1, keepdim=True)
    left = torch.cat([rest, drawn.flip(-1)], dim=-1).logcumsumexp(-1)[..., 1:].flip(-1)
    return torch.where(mask.expand_as(logits).gather(-1, order), drawn - left, 0.0).sum(-1)


# --- both


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """hard, with soft's gradient; exactly 0 and 1."""
    return hard + (soft - soft.detach())


def leave_one_out(losses: Tensor, log_probs: Tensor) -> Tensor:
    """losses, log_probs (S, B) of S >= 2 samples -> a number whose gradient is REINFORCE's of the mean loss. What the
    other samples of the same question lost is the baseline (Kool, van Hoof and Welling, 2019)."""
    S = len(losses)
    losses = losses.detach()
    baseline = (losses.sum(0) - losses) / (S - 1)
    return ((losses - baseline) * log_probs).mean(0).sum()


def choose(logits: Tensor, mask: Tensor, k: int, min_probability: float = 0.01) -> Tensor:
    """Without chance, for inference: the k best facts of more than this probability -> gates (B, F)."""
    best = draw_order(logits.masked_fill(~mask, -torch.inf), k)
    gates = torch.zeros_like(logits).scatter(-1, best, 1.0)
    return gates * (mask & (logits.sigmoid() > min_probability))
