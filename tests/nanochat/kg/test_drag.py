"""Prompts of facts, their gates' way to the retriever, answers against a slow loop, and how answers are scored."""

from __future__ import annotations

import copy

import pytest
import torch

from nanochat.kg.drag import BEFORE, BEHIND, DRAG, DRAGConfig, Pool, best_facts
from nanochat.kg.drag_data import Asked, QuestionBatches, ScaleGradient, evaluate_drag, score_answers
from nanochat.kg.generator import LMGenerator
from nanochat.kg.gnn import FactRetriever, RetrieverConfig
from nanochat.kg.projector import Projector
from nanochat.kg.question_encoder import build_vocabulary
from nanochat.model.gates import GatedFacts

QUESTIONS = [0, 5, 40, 120]


@pytest.fixture
def asked(films) -> Asked:
    texts = [one.question.text.replace("[", "").replace("]", "") for one in films.grounded]
    return Asked(films.graph, films.grounded, texts, films.subgraphs)


@pytest.fixture
def make_drag(films, make_model, small_tokenizer):
    def make(**settings) -> DRAG:
        torch.manual_seed(0)
        model = make_model(small_tokenizer.vocab_size, "MTMT", noise=0.2).eval()
        retriever = FactRetriever(RetrieverConfig(width=16), build_vocabulary(films.subgraphs.texts)).eval()
        generator = LMGenerator(model, small_tokenizer)
        projector = Projector(16, generator.width)
        return DRAG(retriever, projector, generator, films.graph, DRAGConfig(**{"pool": 6, "k_facts": 4, **settings}))

    return make


def test_a_prompt_is_facts_then_the_question_then_the_answer(asked, make_drag, small_tokenizer):
    drag = make_drag()
    batch = asked.batch(QUESTIONS)
    scored = drag.score(batch)
    pool = best_facts(scored, batch, 6)
    texts = [asked.texts[question] for question in QUESTIONS]
    answers = [drag.known(batch, pool.places[row].tolist()) for row in range(4)]
    embeds, fact, valid, goal = drag.prompts(batch, scored, pool, texts, answers)
    special = small_tokenizer.special_id
    for row, text in enumerate(texts):
        order = pool.places[row].tolist()
        assert order == sorted(order, key=lambda place: -scored.facts[place])
        wanted, numbers = [special("<|bos|>"), special("<|retrieval_start|>")], [BEFORE] * 2
        for at in reversed(range(6)):
            head, relation, tail = asked.graph.text(int(batch.facts[order[at]])).split("|")
            words = spelled(small_tokenizer, [f" {head}", f" {relation.replace('_', ' ')}", f" {tail}"])
            piece = [special("<|doc_start|>"), None, *words, special("<|doc_end|>")]
            wanted, numbers = wanted + piece, numbers + [at] * len(piece)
        asking = [special("<|retrieval_end|>"), special("<|user_start|>"), *small_tokenizer.encode(text)]
        asking += [special("<|user_end|>"), special("<|assistant_start|>")]
        names = [asked.graph.name(entity) for entity in answers[row]]
        written = spelled(small_tokenizer, [" " + name for name in names])
        wanted += asking + written
        numbers += [BEHIND] * len(asking + written)
        assert valid[row] == len(wanted) and fact[row, : valid[row]].tolist() == numbers
        vectors = iter(drag.projector(scored.vectors[order[::-1]]))
        for place, token in enumerate(wanted):
            expected = drag.generator.embed(torch.tensor(token)) if token is not None else next(vectors)
            assert torch.allclose(embeds[row, place], expected, atol=1e-6)
        learned = goal[row][goal[row] >= 0].tolist()
        assert learned == ([*written, drag.generator.end] if answers[row] else [])
        assert set(names) <= set(asked.grounded[QUESTIONS[row]].question.answers)


def spelled(tokenizer, parts: list[str]) -> list[int]:
    """Each for itself: the tokens of a name do not hang on what stands beside it."""
    bar = tokenizer.encode("|")
    return [token for at, part in enumerate(parts) for token in [*(bar if at else []), *tokenizer.encode(part)]]


@pytest.mark.parametrize("neural, text", [(True, True), (True, False), (False, True)])
def test_closed_facts_are_as_if_they_were_not_shown(asked, make_drag, neural, text):
    drag = make_drag(neural=neural, text=text)
    batch = asked.batch(QUESTIONS)
    scored = drag.score(batch)
    pool = best_facts(scored, batch, 6)
    texts, answers = [asked.texts[question] for question in QUESTIONS], [[3]] * 4
    gates = (torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    embeds, fact, valid, goal = drag.prompts(batch, scored, pool, texts, answers)
    found = drag.generator.losses(embeds, fact, gates, goal, valid)
    shown = Pool(pool.places, pool.logits, pool.mask & (gates > 0))
    embeds, fact, valid, goal = drag.prompts(batch, scored, shown, texts, answers)
    assert torch.allclose(found, drag.generator.losses(embeds, fact, None, goal, valid), atol=1e-5)


@pytest.mark.parametrize("sampler", ["binary", "top_k"])
def test_the_answers_loss_alone_moves_the_retriever_through_every_fact_of_the_pool(asked, make_drag, sampler):
    drag = make_drag(sampler=sampler, pool=40, k_facts=2)
    batch = asked.batch(QUESTIONS)
    before = copy.deepcopy(drag.retriever.state_dict())
    optimizer = torch.optim.SGD([*drag.retriever.parameters(), *drag.projector.parameters()], lr=1.0)
    scored = drag.score(batch)
    # vectors carry a gradient of their own: the gates alone must tell the logits
    scored.vectors = scored.vectors.detach()
    scored.facts.retain_grad()
    losses, kept = drag.losses(batch, scored, [asked.texts[question] for question in QUESTIONS])
    losses.sum().backward()
    pool = best_facts(scored, batch, 40)
    answered = torch.tensor([bool(drag.known(batch, places)) for places in pool.places.tolist()])
    assert answered.any() and kept.shape == (4,)
    told = scored.facts.grad[pool.places[answered][pool.mask[answered]]]
    assert (told != 0).all() and told.isfinite().all()
    elsewhere = torch.ones(len(scored.facts), dtype=torch.bool)
    elsewhere[pool.places.flatten()] = False
    assert (scored.facts.grad[elsewhere] == 0).all()
    optimizer.step()
    after = drag.retriever.state_dict()
    assert not torch.equal(before["says.weight"], after["says.weight"])
    assert not torch.equal(before["layers.0.message.weight"], after["layers.0.message.weight"])


def test_a_batch_without_an_answer_in_its_facts_has_loss_0(asked, make_drag):
    drag = make_drag()
    batch = asked.batch(QUESTIONS)
    batch.is_answer[:] = False
    losses, _ = drag.losses(batch, drag.score(batch), [asked.texts[question] for question in QUESTIONS])
    losses.sum().backward()
    assert losses.tolist() == [0] * 4


def test_a_cascade_tells_the_retriever_nothing(asked, make_drag):
    drag = make_drag(sampler="none", neural=False)
    batch = asked.batch(QUESTIONS)
    losses, _ = drag.losses(batch, drag.score(batch), [asked.texts[question] for question in QUESTIONS])
    losses.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in drag.retriever.parameters())


def test_answers_are_those_of_a_slow_loop(asked, make_drag):
    drag = make_drag(max_tokens=7, closed=False)
    batch = asked.batch(QUESTIONS)
    texts = [asked.texts[question] for question in QUESTIONS]
    found = drag.answer(batch, texts)
    with torch.no_grad():
        scored = drag.score(batch)
        pool = drag.chosen(scored, batch)
        for row, answer in enumerate(found):
            own = Pool(*(of[row : row + 1] for of in (pool.places, pool.logits, pool.mask)))
            embeds, fact, _, _ = drag.prompts(batch, scored, own, [texts[row]], None)
            written: list[int] = []
            for _ in range(7):
                logits = drag.generator.model(embeds=embeds, facts=GatedFacts(fact))[0, -1]
                if (token := int(logits.argmax())) == drag.generator.end:
                    break
                written.append(token)
                embeds = torch.cat([embeds, drag.generator.embed(torch.tensor([[token]]))], 1)
                fact = torch.cat([fact, torch.tensor([[BEHIND]])], 1)
            names = [name.strip() for name in drag.generator.decode(written).split("|")]
            assert answer.answers == list(dict.fromkeys(name for name in names if name))
            assert answer.probabilities == sorted(answer.probabilities, reverse=True)
            logits = {int(fact): float(scored.facts[at]) for at, fact in enumerate(batch.facts)}
            assert len(answer.facts) <= 4 and all(logits[fact] > -5 for fact in answer.facts)


def test_a_closed_answer_names_ends_of_shown_facts_the_likeliest_first(asked, make_drag):
    drag = make_drag(max_tokens=200)
    batch = asked.batch(QUESTIONS)
    texts = [asked.texts[question] for question in QUESTIONS]
    with torch.no_grad():
        scored = drag.score(batch)
        pool = drag.chosen(scored, batch)
        for row, answer in enumerate(drag.answer(batch, texts)):
            ends = {int(end) for at in answer.facts for end in (asked.graph.heads[at], asked.graph.tails[at])}
            names = {asked.graph.name(end): drag.generator.encode(" " + asked.graph.name(end)) for end in ends}
            assert answer.answers and set(answer.answers) <= set(names)
            own = Pool(*(of[row : row + 1] for of in (pool.places, pool.logits, pool.mask)))
            embeds, fact, _, _ = drag.prompts(batch, scored, own, [texts[row]], None)
            written: list[int] = []
            for token in names[answer.answers[0]]:
                logits = drag.generator.model(embeds=embeds, facts=GatedFacts(fact))[0, -1]
                could = {ids[len(written)] for ids in names.values() if ids[: len(written)] == written}
                assert token == max(could, key=lambda i: float(logits[i]))
                written.append(token)
                embeds = torch.cat([embeds, drag.generator.embed(torch.tensor([[token]]))], 1)
                fact = torch.cat([fact, torch.tensor([[BEHIND]])], 1)


def test_answers_are_scored_as_whole_names_and_as_sets():
    assert score_answers(["The Matrix", "Speed"], ["Matrix", "Speed"]) == {"hits1": 1, "hit": 1, "f1": 1, "em": 1}
    assert score_answers(["Matrix Reloaded"], ["Matrix"]) == {"hits1": 0, "hit": 0, "f1": 0, "em": 0}
    assert score_answers(["Speed", "Matrix"], ["Matrix"]) == {"hits1": 0, "hit": 1, "f1": pytest.approx(2 / 3), "em": 0}
    assert score_answers(["Matrix", "matrix"], ["Matrix", "Speed"])["f1"] == pytest.approx(2 / 3)
    assert score_answers([], ["Matrix"]) == {"hits1": 0, "hit": 0, "f1": 0, "em": 0}


def test_figures_are_means_over_questions(asked, make_drag):
    figures = evaluate_drag(make_drag(max_tokens=3), asked, QUESTIONS)
    assert 0 < figures["facts_kept"] <= 4 and set(figures) >= {"hits1", "hit", "f1", "em", "recall"}


def test_a_steps_questions_depend_on_its_number_alone(asked):
    batches = QuestionBatches(asked, range(10), 4, 64, seed=3)
    texts = [text for step in range(5) for text in batches.get(step).texts]
    assert sorted(texts[:10]) == sorted(texts[10:20]) == sorted(asked.texts[:10]) and texts[:10] != texts[10:20]
    assert batches.get(1, range(2, 4)).texts == texts[6:8]


def test_a_gradients_norm_is_given():
    x = torch.randn(5, requires_grad=True)
    direction = torch.randn(5)
    (ScaleGradient.apply(x, torch.tensor(0.25)) * direction).sum().backward()
    assert torch.allclose(x.grad, direction / direction.norm() * 0.25)
