"""Gradients of sampled gates against the exact ones, from all subsets; and whether a loss finds the facts it needs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kg.sampler import (
    binary_gates,
    binary_log_prob,
    choose,
    draw_order,
    gumbel,
    leave_one_out,
    pad,
    relaxed_top_k,
    top_k_gates,
    top_k_log_prob,
)

N, K = 10, 3


def draw(kind: str, logits: Tensor, k: int = K) -> Tensor:
    mask = torch.ones_like(logits, dtype=torch.bool)
    return binary_gates(logits, mask) if kind == "binary" else top_k_gates(logits, mask, k)


def set_function(seed: int = 0, size: int = N):
    """Of gates (..., N), not additive: what a fact is worth hangs on the others."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, 16, generator=generator, dtype=torch.float64)
    second = torch.randn(16, generator=generator, dtype=torch.float64)
    return lambda gates: F.softplus(gates @ first) @ second


def exact_gradient(kind: str, logits: Tensor, loss) -> Tensor:
    """Of the expected loss, over all 2^N subsets, or all orders of K of N facts by Plackett and Luce."""
    logits = logits.clone().requires_grad_()
    expected = logits.new_zeros(())
    if kind == "binary":
        for bits in itertools.product([0.0, 1.0], repeat=N):
            gates = torch.tensor(bits, dtype=logits.dtype)
            p = logits.sigmoid()
            expected = expected + torch.where(gates > 0, p, 1 - p).prod() * loss(gates)
    else:
        weight = logits.exp()
        for order in itertools.permutations(range(N), K):
            p, left = 1.0, weight.sum()
            for fact in order:
                p, left = p * weight[fact] / left, left - weight[fact]
            gates = torch.zeros(N, dtype=logits.dtype)
            gates[list(order)] = 1
            expected = expected + p * loss(gates)
    return torch.autograd.grad(expected, logits)[0]


def mean_gradient(kind: str, logits: Tensor, loss, samples: int = 40_000, reader=lambda gates: gates) -> Tensor:
    logits = logits.clone().requires_grad_()
    gates = draw(kind, logits.expand(samples, -1))
    return torch.autograd.grad(loss(reader(gates)).mean(), logits)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["binary", "top_k"])
def test_straight_through_points_where_the_exact_gradient_does(kind, logits):
    right, wrong = [], []
    for seed in range(6):
        loss = set_function(seed)
        exact = exact_gradient(kind, logits, loss)
        right.append(cosine(mean_gradient(kind, logits, loss), exact))
        wrong.append(cosine(mean_gradient(kind, logits, loss, reader=gathered), exact))
    assert sum(right) / 6 > (0.99 if kind == "binary" else 0.96) and min(right) > 0.9
    assert all(a > b for a, b in zip(right, wrong, strict=True)) and sum(wrong) / 6 < sum(right) / 6 - 0.03


def gathered(gates: Tensor) -> Tensor:
    """The mistake: only facts that were drawn are multiplied by their gates; what the others would do has no say."""
    return torch.where(gates > 0.5, gates, 0.0)


@pytest.mark.parametrize("kind", ["binary", "top_k"])
def test_reinforce_has_no_bias(kind, logits):
    loss = set_function()
    S, B = 8, 40_000
    logits = logits.requires_grad_()
    mask = torch.ones(B, N, dtype=torch.bool)
    losses, log_probs = [], []
    for _ in range(S):
        if kind == "binary":
            gates = binary_gates(logits.expand(B, -1), mask).detach()
            log_probs.append(binary_log_prob(logits.expand(B, -1), gates, mask))
        else:
            order = draw_order(logits.expand(B, -1) + gumbel(mask.double()), K)
            gates = torch.zeros(B, N, dtype=torch.float64).scatter(-1, order, 1.0)
            log_probs.append(top_k_log_prob(logits.expand(B, -1), order, mask))
        losses.append(loss(gates))
    surrogate = leave_one_out(torch.stack(losses), torch.stack(log_probs)) / B
    found = torch.autograd.grad(surrogate, logits)[0]
    exact = exact_gradient(kind, logits.detach(), loss)
    assert cosine(found, exact) > 0.998
    assert (found - exact).norm() < 0.06 * exact.norm()


def test_log_probabilities_are_those_of_what_is_drawn(logits):
    orders = torch.tensor(list(itertools.permutations(range(N), K)))
    mask = torch.ones(len(orders), N, dtype=torch.bool)
    log_probs = top_k_log_prob(logits.expand(len(orders), -1), orders, mask)
    assert log_probs.exp().sum().item() == pytest.approx(1)
    drawn = draw_order(logits + gumbel(torch.zeros(200_000, N, dtype=torch.float64)), K)
    key = torch.tensor([N * N, N, 1])
    seen = torch.bincount(drawn @ key, minlength=N**K)[orders @ key] / len(drawn)
    assert (seen - log_probs.exp()).abs().max() < 4 * math.sqrt(0.05 / len(drawn))
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N)), dtype=torch.float64)
    mask = torch.ones(N, dtype=torch.bool)
    assert binary_log_prob(logits, subsets, mask).exp().sum().item() == pytest.approx(1)


def test_log_probability_of_a_row_of_fewer_facts(logits):
    """What is not there changes nothing, and has no gradient."""
    short = logits[:2].clone().requires_grad_()
    padded = torch.cat([short, logits[2:]])[None]
    mask = torch.arange(N)[None] < 2
    order = draw_order(padded.masked_fill(~mask, -torch.inf), 4)
    found = top_k_log_prob(padded, order, mask)
    alone = top_k_log_prob(short[None], order[:, :2], mask[:, :2])
    assert found.item() == pytest.approx(alone.item())
    gradient = torch.autograd.grad(found.sum(), short)[0]
    assert torch.allclose(gradient, torch.autograd.grad(alone.sum(), short)[0])
    gates = (torch.rand(5, 1, N) < 0.5).double()
    assert torch.allclose(
        binary_log_prob(padded, gates, mask), binary_log_prob(padded[:, :2], gates[..., :2], mask[:, :2])
    )


@pytest.mark.parametrize("kind", ["binary", "top_k"])
def test_gates_are_0_and_1_and_every_logit_has_a_gradient(kind):
    torch.manual_seed(0)
    logits = torch.randn(64, 30, requires_grad=True)
    gates = draw(kind, logits)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    if kind == "top_k":
        assert (gates.sum(-1) == K).all()
    weights = torch.randn(30)
    gradient = torch.autograd.grad((gates @ weights - 1).square().sum(), logits, retain_graph=True)[0]
    assert (gradient[gates < 0.5] != 0).all()  # of those drawn, some are so sure that float32 has none
    if kind == "binary":  # with the mistake, facts that were not drawn have none
        lost = torch.autograd.grad((gathered(gates) @ weights - 1).square().sum(), logits)[0]
        assert (lost[gates < 0.5] == 0).all()


@pytest.mark.parametrize("kind", ["binary", "top_k"])
def test_a_constant_loss_teaches_nothing(kind, logits):
    assert (mean_gradient(kind, logits, lambda gates: gates.sum() * 0 + 3.0) == 0).all()
    # and REINFORCE has it without noise: every sample's loss is the others' mean
    log_probs = torch.randn(4, 2, requires_grad=True)
    assert (torch.autograd.grad(leave_one_out(torch.full((4, 2), 3.0), log_probs), log_probs)[0] == 0).all()


def test_frequency_of_each_fact(logits):
    gates = draw("binary", logits.expand(50_000, -1))
    assert (gates.mean(0) - logits.sigmoid()).abs().max() < 0.01


def test_relaxed_top_k_goes_to_the_k_largest():
    torch.manual_seed(0)
    scores, mask = torch.randn(20, N, dtype=torch.float64), torch.rand(20, N) < 0.7
    mask[0, 2:] = False
    count = mask.sum(-1).clamp(max=K)
    masked = scores.masked_fill(~mask, -torch.inf)
    for temperature in (2.0, 0.5):
        soft = relaxed_top_k(masked, mask, K, temperature)
        assert torch.allclose(soft.sum(-1), count.double())
        assert (soft >= 0).all() and (soft[~mask] == 0).all()
    hard = relaxed_top_k(masked, mask, K, 1e-4)
    for row, (values, there) in enumerate(zip(scores.tolist(), mask.tolist(), strict=True)):
        best = sorted((at for at in range(N) if there[at]), key=lambda at: -values[at])[:K]
        assert set(hard[row].round().nonzero().flatten().tolist()) == set(best)


def test_ragged_rows_and_rows_without_facts():
    logits, mask = pad(torch.tensor([5.0, -9.0, 1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 5]), fill=7.0)
    assert logits.tolist() == [[5, -9, 7], [7, 7, 7], [1, 2, 3]]
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    logits.requires_grad_()
    for gates, counts in ((top_k_gates(logits, mask, 2), [2, 0, 2]), (binary_gates(logits, mask), None)):
        assert (gates[~mask] == 0).all()
        assert counts is None or gates.sum(-1).tolist() == counts
        gradient = torch.autograd.grad(gates.square().sum(), logits)[0]
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    assert top_k_gates(logits, mask, 9).sum(-1).tolist() == [2, 0, 3]
    assert choose(logits, mask, 2).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]


def recall_of_planted_facts(kind: str, reader) -> float:
    """Logits of 50 facts, of which 4 hold what a target is made of, learned from the reader's loss alone."""
    recalls = []
    for seed in range(5):
        torch.manual_seed(seed)
        facts, useful = torch.randn(50, 32) / 32**0.5, torch.randperm(50)[:4]
        target = facts[useful].sum(0)
        logits = torch.full((50,), -2.5, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(100):
            gates = reader(draw(kind, logits.expand(2, -1), 4))
            loss = (F.tanh(gates @ facts) - F.tanh(target)).square().sum(-1).mean()
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        best = (logits + 1e-6 * torch.rand(50)).topk(4).indices
        recalls.append(torch.isin(best, useful).float().mean().item())
    return sum(recalls) / len(recalls)


@pytest.mark.parametrize("kind", ["binary", "top_k"])
def test_the_loss_alone_finds_the_facts_it_needs(kind):
    assert recall_of_planted_facts(kind, lambda gates: gates) >= 0.9
    assert recall_of_planted_facts(kind, Tensor.detach) <= 0.25
    assert recall_of_planted_facts(kind, gathered) < 0.9
