"""Learning from answers: gradients against finite differences and enumeration, and whether it finds what helps."""

from __future__ import annotations

import pytest
import torch

from nanochat.dsi.index import SearchIndex
from nanochat.dsi.joint import Asked, JointConfig, Reader, joint_losses, marginal_loss, policy_loss
from nanochat.dsi.model import T5Index
from nanochat.dsi.training import Pairs
from nanochat.retrieval.document import Document
from tasks.example_world import generate_world

QUESTIONS = ["who was born in the old town?", "which bridge?", "the company that the baker works for"]
ANSWERS = ["Ada", "the old one", "Smith & Co"]


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return {one["id"]: Document.from_dict(one) for one in generate_world(40, seed=3).documents[:12]}


@pytest.fixture
def index(documents, small_tokenizer) -> SearchIndex:
    torch.manual_seed(0)
    model = T5Index.new(small_tokenizer.vocab_size, 32, layers=1, heads=2)
    made = SearchIndex.new(list(documents.values()), small_tokenizer, model, "semantic", branches=3)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made


@pytest.fixture
def reader(make_model, small_tokenizer) -> Reader:
    return Reader(make_model(small_tokenizer.vocab_size, "MT", noise=0.2).eval(), small_tokenizer, cite=False)


def asked(count: int = 3) -> Asked:
    return Asked(QUESTIONS[:count], ANSWERS[:count], Pairs(["bridge"] * count, [""] * count))


def test_likelihoods_are_those_of_each_alone(documents, reader):
    some = list(documents.values())[:3]
    together, counts = reader.log_likelihoods(some, QUESTIONS, ANSWERS)
    for at in range(3):
        alone, count = reader.log_likelihoods(some[at : at + 1], QUESTIONS[at : at + 1], ANSWERS[at : at + 1])
        assert torch.allclose(alone[0], together[at], atol=1e-4) and count[0] == counts[at]
        assert counts[at] == len(reader.tokenizer.encode(" " + ANSWERS[at])) + 1  # and the end


def test_the_marginal_loss_is_its_formula_and_its_gradient_finite_differences(documents, index, reader):
    index.model.double()
    found = [[id for id, _ in ranked] for ranked in index.search(QUESTIONS, 4)]
    loss = marginal_loss(index, reader, documents.__getitem__, asked(), found)
    with torch.no_grad():
        for at, ids in enumerate(found):
            of_index = index.log_probs([QUESTIONS[at]] * 4, ids).exp()
            of_reader = reader.log_likelihoods([documents[id] for id in ids], [QUESTIONS[at]] * 4, [ANSWERS[at]] * 4)[0]
            expected = -(of_index / of_index.sum() * of_reader.exp()).sum().log()
            assert torch.allclose(loss[at].double(), expected.double(), atol=1e-4)
    weights = [p for p in index.model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss.sum(), weights, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    for p, g in list(zip(weights, gradient, strict=True))[::5]:
        if g is None:
            continue
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                p.add_(step * direction)
                values.append(marginal_loss(index, reader, documents.__getitem__, asked(), found).sum().item())
                p.sub_(step * direction)
        # T5 has float32 inside whatever its weights are: no closer than this
        wanted = (values[0] - values[1]) / 2e-3
        assert (g * direction).sum().item() == pytest.approx(wanted, rel=5e-3, abs=1e-3)


def test_draws_follow_the_probabilities(documents, index):
    drawn = index.sample(QUESTIONS[:1], 4000)[0]
    ids = list(documents)
    with torch.no_grad():
        expected = index.log_probs(QUESTIONS[:1] * len(ids), ids).exp()
    found = torch.tensor([drawn.count(id) for id in ids]) / len(drawn)
    assert (found - expected).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5


def test_the_policy_gradient_is_that_of_the_mean_reward(documents, index, reader):
    ids = list(documents)
    log_probs = index.log_probs(QUESTIONS[:1] * len(ids), ids)
    with torch.no_grad():
        likelihood, tokens = reader.log_likelihoods(
            list(documents.values()), QUESTIONS[:1] * len(ids), ANSWERS[:1] * len(ids)
        )
        rewards = (likelihood / tokens).exp()
    weight = index.model.t5.encoder.block[0].layer[0].SelfAttention.q.weight
    (exact,) = torch.autograd.grad(-(log_probs.exp() * rewards).sum(), weight)
    total = torch.zeros_like(weight)
    torch.manual_seed(1)
    for _ in range(60):
        loss = policy_loss(index, reader, documents.__getitem__, asked(1), draws=64)
        total += torch.autograd.grad(loss, weight)[0]
    assert torch.cosine_similarity(total.flatten(), exact.flatten(), dim=0) > 0.9


class Oracle:
    """Likes one document for each question."""

    def __init__(self, right: dict[str, str]):
        self.right = right

    def log_likelihoods(self, documents, questions, answers):
        scores = [0.0 if self.right[q] == d.id else -8.0 for d, q in zip(documents, questions, strict=True)]
        return torch.tensor(scores), torch.ones(len(scores))


@pytest.mark.parametrize("kind", ["marginal", "policy"])
def test_what_makes_the_answer_likely_is_found(documents, index, kind):
    ids = list(documents)
    right = dict(zip(QUESTIONS, (ids[2], ids[7], ids[11]), strict=True))
    config = JointConfig(
        top_k=12, draws=12, marginal=float(kind == "marginal"), policy=float(kind == "policy"), anchor=0
    )
    optimizer = torch.optim.Adam(index.model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for _ in range(80):
        loss = sum(joint_losses(index, Oracle(right), documents.__getitem__, asked(), config).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = index.search(QUESTIONS, 1)
    assert [ranked[0][0] for ranked in found] == list(right.values())
