"""Promises of tasks/rag.py: what a context holds, what is asked of it, and what the answers cite."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from nanochat.common import UserError
from nanochat.metrics import ABSTENTION, normalize_answer, stated_answer
from nanochat.retrieval import RetrievalManager
from tasks.example_world import generate_world
from tasks.rag import PlainTask, RAGTask, RetrievalTask, find_quote

WORLD = generate_world(120, seed=3)
QUERIES = WORLD.questions["train"]
OWNER = {q["query"]: q["doc_ids"][0] for q in QUERIES}
ANSWER = {(q["query"], q["doc_ids"][0]): q["answers"][0] for q in QUERIES}


@pytest.fixture(scope="module")
def manager() -> RetrievalManager:
    return RetrievalManager("bm25", documents=WORLD.documents)


def turns(conversation: dict) -> list[tuple[str, str]]:
    talk = conversation["messages"][1:]
    assert [m["role"] for m in talk] == ["user", "assistant"] * (len(talk) // 2)
    return [(talk[i]["content"], talk[i + 1]["content"]) for i in range(0, len(talk), 2)]


def shown(conversation: dict) -> list[str]:
    assert conversation["messages"][0]["role"] == "retrieval"
    return [d["id"] for d in conversation["messages"][0]["documents"]]


def test_a_context_is_the_gold_document_among_the_best_others_in_any_order(manager):
    task = RAGTask(QUERIES, manager, top_k=4, questions_per_document=0)
    places = Counter()
    for i, query in enumerate(QUERIES):
        conversation = task.conversation(i)
        ids = shown(conversation)
        found = [d.id for d in manager.retrieve(query["query"], 5) if d.id not in query["doc_ids"]]
        assert sorted(ids) == sorted([*query["doc_ids"], *found[:3]])
        assert turns(conversation) == [(query["query"], query["answers"][0])]
        places[ids.index(query["doc_ids"][0])] += 1
    assert min(places[k] for k in range(4)) > len(QUERIES) / 6, "gold has no favourite place"
    assert task.conversation(0) == task.conversation(0)
    assert any(task.conversation(i) != task.conversation(i, epoch=1) for i in range(20))
    assert len(shown(task.conversation(0, top_k=2))) == 2


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_every_document_shown_is_asked_its_own_questions(manager, wanted):
    task = RAGTask(QUERIES, manager, top_k=3, questions_per_document=wanted)
    for i in range(0, len(QUERIES), 7):
        conversation = task.conversation(i)
        asked = turns(conversation)
        assert len(set(asked)) == len(asked)
        assert QUERIES[i]["query"] in [question for question, _ in asked]
        # val and test documents are shown as distractors too, but have no question among these queries
        counts = Counter(OWNER[question] for question, _ in asked)
        expected = {doc: wanted for doc in shown(conversation) if doc in OWNER.values()}
        assert counts == expected
        for question, answer in asked:
            assert ANSWER[question, OWNER[question]] == answer
    firsts = [turns(task.conversation(i))[0][0] == QUERIES[i]["query"] for i in range(100)]
    assert 0 < sum(firsts) < 100, "the question itself stands anywhere among the others"


def test_citations_name_the_gold_documents(manager):
    task = RAGTask(QUERIES, manager, top_k=5, questions_per_document=2, cite=True)
    cited = Counter()
    for i in range(0, len(QUERIES), 5):
        conversation = task.conversation(i)
        for question, answer in turns(conversation):
            number, text = re.fullmatch(r"\[(\d)\] (.+)", answer).groups()
            assert shown(conversation)[int(number) - 1] == OWNER[question]
            assert text == ANSWER[question, OWNER[question]]
            cited[number] += 1
    assert set(cited) == set("12345")


def test_a_question_with_several_gold_documents_cites_them_all(manager):
    chain = next(q for q in WORLD.multihop["train"] if len(q["doc_ids"]) == 3)
    task = RAGTask([chain], manager, top_k=5, questions_per_document=0, cite=True)
    conversation = task.conversation(0)
    numbers = [shown(conversation).index(doc) + 1 for doc in chain["doc_ids"]]
    [(_, answer)] = turns(conversation)
    assert answer == " ".join(f"[{n}]" for n in sorted(numbers)) + " " + chain["answers"][0]


def test_queries_that_cannot_be_trained_on(manager):
    unanswerable = {"id": "u", "query": "Who?", "answers": [], "doc_ids": []}
    assert len(RAGTask([unanswerable, QUERIES[0]], manager)) == 2
    unfound = {**QUERIES[0], "doc_ids": []}
    assert len(RAGTask([unfound, QUERIES[0]], manager)) == 1
    with pytest.raises(UserError, match="nothing to train on"):
        RAGTask([unanswerable], manager)
    stray = {**QUERIES[0], "doc_ids": ["elsewhere"]}
    with pytest.raises(UserError, match=r"does not hold the document .elsewhere."):
        RAGTask([stray], manager)


def holds(documents: list[dict], answer: str) -> bool:
    texts = (f" {normalize_answer(d['title'] + ' ' + d['content'])} " for d in documents)
    return any(f" {normalize_answer(answer)} " in text for text in texts)


def test_a_question_whose_documents_are_left_out_is_not_answered(manager):
    task = RAGTask(QUERIES, manager, top_k=4, questions_per_document=0, cite=True, absent=0.3, seed=1)
    away = 0
    for i, query in enumerate(QUERIES):
        conversation = task.conversation(i)
        ids, [(question, said)] = shown(conversation), turns(conversation)
        assert question == query["query"]
        if query["doc_ids"][0] in ids:
            assert said.endswith(query["answers"][0]) and len(ids) == 4
        else:
            away += 1
            assert said == ABSTENTION and ids
            assert not holds(conversation["messages"][0]["documents"], query["answers"][0])
    assert away == pytest.approx(0.3 * len(QUERIES), rel=0.2)
    assert any(shown(task.conversation(i)) != shown(task.conversation(i, epoch=1)) for i in range(20))


@pytest.mark.parametrize("absent", [0.2, 0.4])
def test_a_share_of_all_questions_in_a_talk_is_about_documents_that_were_found_and_left_out(manager, absent):
    task = RAGTask(QUERIES, manager, top_k=4, questions_per_document=1, cite=True, absent=absent, seed=1)
    refused = asked = 0
    for i, query in enumerate(QUERIES):
        conversation = task.conversation(i)
        ids = shown(conversation)
        found = {d.id for d in manager.retrieve(query["query"], 9)} | set(query["doc_ids"])
        assert set(ids) <= found
        for question, said in turns(conversation):
            asked += 1
            owner = OWNER[question]
            assert owner in found and (said == ABSTENTION) == (owner not in ids)
            if said == ABSTENTION:
                refused += 1
                assert not holds(conversation["messages"][0]["documents"], ANSWER[question, owner])
    # some are not asked: their answer stands in another document that is shown, or nobody asks about a val document
    assert 0.75 * absent < refused / asked < 1.1 * absent


def test_questions_without_an_answer_are_asked_of_documents_that_come_near(manager):
    nobody = WORLD.unanswerable["train"]
    task = RAGTask([*QUERIES, *nobody], manager, top_k=4, questions_per_document=1, cite=True, absent=0.4, seed=1)
    texts = {q["query"] for q in nobody}
    near = other = 0
    for i in range(len(QUERIES)):
        conversation = task.conversation(i)
        for question, said in turns(conversation):
            if question in texts:
                near += 1
                assert said == ABSTENTION
                found = {d.id for d in manager.retrieve(question, 4)}
                assert found & set(shown(conversation))
            elif said == ABSTENTION and question != QUERIES[i]["query"]:
                other += 1
        questions = [question for question, _ in turns(conversation)]
        assert len(set(questions)) == len(questions)
    assert near > 50 and 0.5 < near / other < 1.5


def test_a_question_that_the_base_does_not_answer(manager):
    queries = [QUERIES[0], *WORLD.unanswerable["train"][:3]]
    task = RAGTask(queries, manager, top_k=4, questions_per_document=0, cite=True)
    assert len(task) == 4
    for i in range(1, 4):
        conversation = task.conversation(i)
        assert turns(conversation) == [(queries[i]["query"], ABSTENTION)]
        assert sorted(shown(conversation)) == sorted(d.id for d in manager.retrieve(queries[i]["query"], 4))


def test_easy_contexts_for_comparison(manager):
    task = RAGTask(QUERIES, manager, top_k=4, questions_per_document=0, distractors="random", gold_first=True)
    near = total = 0
    for i, query in enumerate(QUERIES):
        gold, *others = shown(task.conversation(i))
        assert gold == query["doc_ids"][0] and len(set(others)) == 3 and gold not in others
        near += len({d.id for d in manager.retrieve(query["query"], 4)} & set(others))
        total += 3
    assert near < 0.2 * total


def test_an_answer_after_the_sentence_that_it_is_in(manager):
    task = RAGTask(QUERIES, manager, top_k=3, questions_per_document=0, cite=True, quote=True)
    for i in range(0, len(QUERIES), 5):
        conversation = task.conversation(i)
        [(_, answer)] = turns(conversation)
        number, quoted, text = re.fullmatch(r"\[(\d)\] “(.+)” (.+)", answer).groups()
        content = conversation["messages"][0]["documents"][int(number) - 1]["content"]
        assert quoted in content and text in quoted and quoted[-1] == "." and ". " not in quoted
        assert stated_answer(answer) == text == QUERIES[i]["answers"][0]
    long = "Word " * 40 + "the answer is “forty two” here " + "word " * 40
    assert find_quote("none", [long]) == ""
    found = find_quote('"forty two"', ["No. Nothing here.", long])
    assert len(found.split()) == 30 and '"forty two"' in found


def test_plain_conversations_take_turns(manager):
    base = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(5)]
    task = PlainTask(base, 2)
    assert len(task) == 2
    assert [task.conversation(i, epoch) for epoch in range(3) for i in range(2)] == [*base, base[0]]


def test_base_tasks_get_what_is_found_for_their_last_question(manager):
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": QUERIES[0]["query"]},
        {"role": "assistant", "content": "yes"},
    ]
    messages = RetrievalTask([{"messages": talk}], manager, top_k=2)[0]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "retrieval", "user", "assistant"]
    assert [d["id"] for d in messages[2]["documents"]] == [d.id for d in manager.retrieve(QUERIES[0]["query"], 2)]
