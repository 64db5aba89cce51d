"""Closed facts against rows without them, gradients of gates against finite differences, and the mistake of leaving
closed facts out before their gates are multiplied."""

from __future__ import annotations

import pytest
import torch

from nanochat.model.gates import GatedFacts, gated_attention

PATTERNS = ["TT", "MM", "MTMT", "TM"]
# of each token: text (-2) before, facts 0 to 3 of different length, text (-1) between and behind
LAYOUT = [-2] * 3 + [0] * 4 + [1] * 2 + [2] * 6 + [-1] * 2 + [3] * 3 + [-3] * 9
TEXT = torch.tensor(LAYOUT) < 0


@pytest.fixture(params=PATTERNS)
def model(request, make_model):
    return make_model(40, request.param, noise=0.3).eval()


def rows(count: int, length: int = len(LAYOUT)) -> torch.Tensor:
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(1))


def facts_of(gate: torch.Tensor | None, count: int) -> GatedFacts:
    return GatedFacts(torch.tensor([LAYOUT] * count), gate)


def without(tokens: torch.Tensor, closed: set[int]) -> tuple[torch.Tensor, GatedFacts, torch.Tensor]:
    """One row as if the closed facts had never been there, and the places of what is left."""
    left = torch.tensor([at for at, fact in enumerate(LAYOUT) if fact not in closed])
    return tokens[left][None], GatedFacts(torch.tensor(LAYOUT)[left][None]), left


def test_a_closed_fact_was_never_there(model):
    choices = [set(), {0}, {3}, {1, 2}, {0, 1, 2, 3}, {0, 3}]
    tokens = rows(len(choices))
    gate = torch.tensor([[float(fact not in closed) for fact in range(4)] for closed in choices])
    with torch.no_grad():
        logits = model(tokens, facts=facts_of(gate, len(choices)))
        for row, closed in enumerate(choices):
            short, facts, left = without(tokens[row], closed)
            assert torch.allclose(logits[row, left], model(short, facts=facts)[0], atol=1e-5), closed
            if closed:  # the facts do matter
                assert (logits[row, -1] - model(tokens[row][None], facts=facts_of(None, 1))[0, -1]).abs().max() > 1e-3


def test_weights_learn_from_what_is_there_alone(model):
    tokens, closed = rows(1), {1, 3}
    targets = torch.where(TEXT, tokens[0].roll(-1), -1)[None]
    loss = model(tokens, targets, facts=facts_of(torch.tensor([[1.0, 0, 1, 0]]), 1))
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    short, facts, left = without(tokens[0], closed)
    wanted = torch.autograd.grad(
        model(short, targets[:, left], facts=facts), list(model.parameters()), allow_unused=True
    )
    for one, other in zip(found, wanted, strict=True):
        assert one is None or torch.allclose(one, other, atol=1e-5)


def test_what_a_closed_fact_says_is_what_it_would_say_alone(model):
    """Its tokens see each other, and what stands before; their positions count on."""
    tokens = rows(1)
    with torch.no_grad():
        closed = model(tokens, facts=facts_of(torch.tensor([[0.0, 1, 1, 1]]), 1))
        if model.config.block_pattern == "TT":
            opened = model(tokens, facts=facts_of(None, 1))
            assert torch.allclose(closed[0, 3:7], opened[0, 3:7], atol=1e-5)
        other = tokens.clone()
        other[0, 3] += 1
        changed = model(other % 40, facts=facts_of(torch.tensor([[0.0, 1, 1, 1]]), 1))
    assert (closed[0, 4:7] - changed[0, 4:7]).abs().max() > 1e-4
    assert torch.allclose(closed[0, 7:], changed[0, 7:], atol=1e-6)


def test_gradients_of_gates_are_finite_differences(model):
    model = model.double()
    tokens = rows(2)
    targets = torch.where(TEXT, tokens.roll(-1, 1), -1)
    # at 0 and 1 attention has another gradient (see its own test), and positions jump: both are left to Mamba alone
    gate = torch.tensor([[0.3, 0.9, 0.99, 0.5], [0.7, 0.8, 0.2, 0.1]], dtype=torch.double)
    if "T" not in model.config.block_pattern:
        gate[0, 1], gate[1, 0], gate[0, 3] = 0, 0, 1

    def loss(gate):
        return model(tokens, targets, facts=facts_of(gate, 2))

    wanted = torch.zeros_like(gate)
    for at in range(gate.numel()):
        step = torch.zeros_like(gate)
        step.view(-1)[at] = 1e-6
        low = gate if gate.view(-1)[at] == 0 else gate - step
        with torch.no_grad():
            wanted.view(-1)[at] = (loss(gate + step) - loss(low)) / (gate + step - low).sum()
    gate.requires_grad_()
    (found,) = torch.autograd.grad(loss(gate), gate)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_closed_fact_gets_a_gradient(model, checkpointing):
    model.train().gradient_checkpointing = checkpointing
    tokens = rows(2)
    targets = torch.where(TEXT, tokens.roll(-1, 1), -1)
    gate = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]], requires_grad=True)

    def gathered():
        """The mistake: only chosen facts are read."""
        losses = []
        for row in range(2):
            closed = {fact for fact in range(4) if gate[row, fact] == 0}
            short, facts, left = without(tokens[row], closed)
            embeds = model.embed(short)
            tokenwise = GatedFacts(facts.fact, gate[row][None]).tokens()
            losses.append(model(embeds=embeds * tokenwise.unsqueeze(-1), targets=targets[row, left][None], facts=facts))
        return sum(losses)

    (found,) = torch.autograd.grad(model(tokens, targets, facts=facts_of(gate, 2)), gate)
    assert found.isfinite().all() and (found.abs() > 1e-7).all()
    (cut,) = torch.autograd.grad(gathered(), gate)
    assert (cut[gate.detach() == 0] == 0).all()  # what the test above would see


def test_attention_between_and_at_the_ends():
    """In between the gradient is the derivative; a gate of 0 or 1 is told where the output would be at the other side,
    whatever the scores."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.double).unbind()
    fact = torch.tensor([[-2, 0, 0, 1, 2, 2, 2, 3, -1]])
    k[0, :, 5] = 3 * q[0, :, -1]  # of fact 2, closed: it would take nearly all
    k[0, :, 3] = 2 * q[0, :, -1]  # of fact 1, open: it has nearly all
    gates = torch.tensor([[0.4, 1.0, 0.0, 0.0]], dtype=torch.double)

    def last(gates, k=k):
        return gated_attention(q, k, v, GatedFacts(fact, gates).pairs())[0, :, -1]

    def slow(gates):
        share = (q[0, :, -1:] * k[0]).sum(-1) * 8**-0.5
        share = share.exp() * torch.cat([gates[0], torch.ones(2)])[fact[0]]
        return ((share / share.sum(-1, keepdim=True)).unsqueeze(1) @ v[0]).squeeze(1)

    assert torch.allclose(last(gates), slow(gates))
    dout = torch.randn(2, 8, dtype=torch.double)
    given = gates.clone().requires_grad_()
    (found,) = torch.autograd.grad((last(given) * dout).sum(), given)
    step = torch.tensor([[1e-6, 0, 0, 0]])
    assert torch.allclose(found[0, 0], ((slow(gates + step) - slow(gates - step)) * dout).sum() / 2e-6, rtol=1e-6)
    for at in (1, 2, 3):
        there, gone = gates.clone(), gates.clone()
        there[0, at], gone[0, at] = 1, 0
        assert torch.allclose(found[0, at], ((slow(there) - slow(gone)) * dout).sum()), at
    k = k.clone()
    k[0, :, 5] = 1e4 * q[0, :, -1]
    (found,) = torch.autograd.grad((last(given, k) * dout).sum(), given)
    assert torch.allclose(last(gates, k), last(gates)) and found.isfinite().all() and found.abs().max() < 100


@pytest.mark.parametrize("end", [len(LAYOUT), len(LAYOUT) - 8, 20])  # much text behind the facts, little, none
def test_decoding_goes_on_from_facts(model, end):
    tokens, fact = rows(2), torch.tensor([LAYOUT] * 2)
    tail = rows(2, 8)
    cache = model.new_cache(2)
    whole = torch.cat([tokens[:, :end], tail], 1)
    numbers = torch.cat([fact[:, :end], torch.full((2, 8), -3)], 1)
    with torch.no_grad():
        wanted = model(whole, facts=GatedFacts(numbers))
        found = [model(tokens[:, :end], facts=GatedFacts(fact[:, :end]), cache=cache, last_only=True)]
        found += [model(token[:, None], cache=cache, last_only=True) for token in tail.unbind(1)]
    assert torch.allclose(torch.stack(found, 1), wanted[:, end - 1 :], atol=1e-4)


def test_rows_of_different_length_are_read_into_a_cache(model):
    tokens, fact = rows(2), torch.tensor([LAYOUT] * 2)
    valid = torch.tensor([len(LAYOUT), len(LAYOUT) - 4])
    cache = model.new_cache(2)
    with torch.no_grad():
        together = model(tokens, facts=GatedFacts(fact), cache=cache, valid=valid, last_only=True)
        after = model(torch.tensor([[1], [2]]), cache=cache, last_only=True)
        for row, length in enumerate(valid.tolist()):
            whole = torch.cat([tokens[row, :length], torch.tensor([row + 1])])[None]
            numbers = torch.cat([fact[row, :length], torch.tensor([-3])])[None]
            alone = model(whole, facts=GatedFacts(numbers))[0]
            assert torch.allclose(together[row], alone[-2], atol=1e-4)
            assert torch.allclose(after[row], alone[-1], atol=1e-4)


def test_decoding_after_text_in_pieces_shorter_than_the_convolution(model):
    tokens, tail = rows(1, 7), rows(1, 4)
    fact = torch.tensor([[-1] * 5 + [-2] * 2])  # as where all facts between were dropped
    cache = model.new_cache(1)
    with torch.no_grad():
        wanted = model(torch.cat([tokens, tail], 1), facts=GatedFacts(torch.cat([fact, fact[:, -1:].expand(1, 4)], 1)))
        model(tokens, facts=GatedFacts(fact), cache=cache)
        found = torch.cat([model(token[:, None], cache=cache) for token in tail.unbind(1)], 1)
    assert torch.allclose(found, wanted[:, 7:], atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_gates_in_bf16(pattern, make_model):
    model = make_model(40, pattern, noise=0.1)
    tokens = rows(2)
    targets = torch.where(TEXT, tokens.roll(-1, 1), -1)
    gate = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 1]], requires_grad=True)
    (exact,) = torch.autograd.grad(model(tokens, targets, facts=facts_of(gate, 2)), gate)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets, facts=facts_of(gate, 2))
    (found,) = torch.autograd.grad(loss, gate)
    assert (found - exact).norm() < 0.1 * exact.norm(), (found, exact)


def test_rows_without_any_fact(model):
    tokens, fact = rows(2, 9), torch.full((2, 9), -1)
    with torch.no_grad():
        assert torch.allclose(model(tokens, facts=GatedFacts(fact, torch.zeros(2, 0))), model(tokens), atol=1e-5)


def test_what_cannot_be_combined_says_so(model):
    tokens, facts = rows(1), facts_of(torch.ones(1, 4), 1)
    with pytest.raises(ValueError, match="without gates"):
        model(tokens, facts=facts, cache=model.new_cache(1))
    with pytest.raises(ValueError, match="packed documents"):
        model(tokens, facts=facts, seq_idx=torch.zeros_like(tokens))
