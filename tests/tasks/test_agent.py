"""Promises of tasks/agent.py: where the oracle searches, what its examples hold, how decisions are measured."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
from nanochat.conversation import render_prompt, validate
from nanochat.engine import Engine, Generation
from nanochat.metrics import ABSTENTION
from nanochat.retrieval import RetrievalManager
from nanochat.rl.rewards import Rewards
from nanochat.searching import Hop
from tasks.agent import AgentTask, closed_book, oracle_decisions, policy_figures, search_needed
from tasks.example_world import generate_world
from tasks.refrag import MultiHopRAGTask

WORLD = generate_world(60, seed=2)
QUERIES = [*WORLD.questions["train"][:4], WORLD.multihop["train"][0], WORLD.unanswerable["train"][0]]


@pytest.fixture(scope="module")
def make_searching():
    return partial(MultiHopRAGTask, manager=RetrievalManager("bm25", documents=WORLD.documents), top_k_per_hop=2)


def test_it_searches_where_the_closed_book_answer_is_wrong():
    town, nobody = {"answers": ["Old Town"]}, {"answers": []}
    said = ["The old town.", "[1] Old Town", "town", "", ABSTENTION, ABSTENTION, "Old Town", ""]
    queries = [town, town, town, town, town, nobody, nobody, nobody]
    assert search_needed(queries, said) == [False, False, True, True, True, False, True, True]


def test_examples_are_direct_where_that_is_right_and_searches_where_it_is_not(make_searching):
    said = ["wrong", QUERIES[1]["answers"][0], "wrong", QUERIES[3]["answers"][0], "wrong", "wrong"]
    needed = search_needed(QUERIES, said)
    task = AgentTask(QUERIES, needed, make_searching)
    made = {talk["metadata"]["query"]: talk for talk in map(task.conversation, range(len(task)))}
    assert len(made) == len(task) == len(QUERIES)
    for query, need in zip(QUERIES, needed, strict=True):
        validate(made[query["id"]])
        asked, answered = made[query["id"]]["messages"]
        assert asked == {"role": "user", "content": query["query"]}
        if not need:
            assert answered["content"] == query["answers"][0]
            continue
        *searches, answer = answered["content"]
        wanted = [hop["query"] for hop in query.get("hops", [query])]  # the question itself, or its own hops
        assert [part["query"] for part in searches[::2]] == wanted
        shown = [document["id"] for part in searches[1::2] for document in part["documents"]]
        assert set(query["doc_ids"]) <= set(shown) and len(shown) > len(query["doc_ids"])
        expected = query["answers"][0] if query["answers"] else ABSTENTION
        assert answer["text"].split("] ")[-1] == expected
    assert any(task.conversation(i, epoch=1) != task[i] for i in range(2, len(task)))  # documents in another order
    assert task.conversation(0, epoch=1) == task[0]


def test_all_may_be_known_and_what_no_document_answers_cannot_be_searched_for(make_searching):
    assert len(AgentTask(QUERIES[:2], [False, False], make_searching)) == 2
    without = {**QUERIES[0], "doc_ids": []}
    assert len(AgentTask([without, QUERIES[1]], [True, True], make_searching)) == 1
    assert len(AgentTask([without, QUERIES[1]], [False, True], make_searching)) == 2  # known: no document needed


def test_closed_book_is_without_documents_and_searches(make_model, small_tokenizer):
    model = make_model(small_tokenizer.vocab_size)
    talk = {"messages": [{"role": "user", "content": QUERIES[1]["query"]}]}
    prompt = render_prompt(talk, small_tokenizer)
    start = small_tokenizer.special_id("<|search_start|>")
    with torch.no_grad():  # it would begin with a search
        model.lm_head.weight[start] = 10 * model(torch.tensor([prompt]), states=True)[0, -1]
    engine = Engine(model, small_tokenizer)
    assert engine.generate_from_conversation(talk, max_tokens=5)[1].ids[0] == start
    said = closed_book(engine, [QUERIES[0], QUERIES[1], QUERIES[0]], max_tokens=5)
    assert len(said) == 3 and said[0] == said[2]
    allowed = engine.generate_batch([prompt], max_tokens=5)[0]
    assert said[1] and said[1] != small_tokenizer.decode(allowed).strip() and "search" not in said[1]


def test_the_oracle_of_a_checkpoint_that_is_gone_is_the_questions_own(
    tmp_path, monkeypatch, make_model, small_tokenizer
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    settings = torch.device("cpu"), torch.float32
    start = {"source": "rag", "model_tag": "x", "step": 3}
    flagged = [{**query, "search": at == 1} for at, query in enumerate(QUERIES[:3])]
    assert oracle_decisions(flagged, start, *settings) == [False, True, False]
    assert oracle_decisions(flagged, None, *settings) == [False, True, False]
    assert oracle_decisions(QUERIES[:3], start, *settings) is None
    save_checkpoint(checkpoint_root("rag", "x"), 3, make_model(small_tokenizer.vocab_size), small_tokenizer, {})
    assert oracle_decisions(flagged, start, *settings) == [True, True, True]  # it knows nothing


def answer(*queries, reason="stop"):
    return Generation(finish_reason=reason, hops=[Hop(query, 0) for query in queries])


def test_decisions_are_measured_against_the_oracle():
    answers = [("x", answer("q")), ("x", answer("q", "q")), ("x", answer()), ("x", answer())]
    figures = policy_figures(answers, [True, False, True, False])
    assert figures == {
        "search_rate": 0.5,
        "search_precision": 0.5,
        "search_recall": 0.5,
        "needless_searches": 0.5,
    }
    assert policy_figures(answers, None) == {"search_rate": 0.5}


def test_the_price_decides_whether_searching_pays():
    query = {"query": "?", "answers": ["Old Town"], "doc_ids": ["a"]}
    for price in (0.0, 0.3, 1.2):
        rewards = Rewards(answer=1.0, evidence=0.0, economy=0.0, price=price, metric="em")
        right, wrong = rewards(query, "[1] Old Town", answer("q")), rewards(query, "Town", answer())
        assert right["reward"] == pytest.approx(1 - price) and wrong["reward"] == 0
        assert (right["reward"] > wrong["reward"]) == (price < 1)
        assert rewards(query, "Old Town", answer())["reward"] == 1  # to know is better, or as good
        assert rewards(query, "Town", answer("q", "q"))["reward"] == pytest.approx(-2 * price)
