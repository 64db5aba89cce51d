"""The example world: documents, graph and questions agree, the splits are strangers, and nothing can be guessed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import string
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.metrics import exact_match
from tasks import example_world
from tasks.example_world import KINDS, MIN_DOCUMENTS, RELATIONS, SPLITS, World, generate_world, relation_of, wordings
from tasks.more_worlds import add_training_worlds

REPOSITORY = Path(example_world.__file__).parents[1]


@pytest.fixture(scope="module", params=[10, 17, 600])
def world(request: pytest.FixtureRequest) -> World:
    return generate_world(request.param, seed=3)


def graph_of(world: World) -> dict[str, dict[str, str]]:
    graph: dict[str, dict[str, str]] = defaultdict(dict)
    for subject, relation, value in world.triples:
        assert relation not in graph[subject], "a relation has one object"
        graph[subject][relation] = value
    return graph


def test_every_triple_stands_in_its_document(world: World) -> None:
    content = {document["title"]: document["content"] for document in world.documents}
    for subject, relation, value in world.triples:
        assert value in content[subject]
        assert subject in content[subject]
        assert relation.isidentifier() and relation in RELATIONS
        assert "|" not in subject + value  # the separator of graph.txt
    assert set(graph_of(world)) == set(content)


def test_documents_keep_the_contract(world: World) -> None:
    ids = [document["id"] for document in world.documents]
    titles = [document["title"] for document in world.documents]
    assert len(set(ids)) == len(ids) and len(set(titles)) == len(titles)
    for document in world.documents:
        kind = document["metadata"]["kind"]
        assert document["id"].startswith(f"{kind}_") and kind in KINDS
        assert document["metadata"]["split"] in SPLITS
        assert document["content"].endswith(".") and "{" not in document["content"] and "  " not in document["content"]


@pytest.mark.parametrize("num_documents", [10, 11, 29, 100, 1001])
def test_size_is_as_asked_and_every_split_has_questions(num_documents: int) -> None:
    world = generate_world(num_documents)
    assert len(world.documents) == num_documents
    sizes = Counter(document["metadata"]["split"] for document in world.documents)
    assert sizes["val"] == sizes["test"] == max(2, num_documents // 10)
    for split in SPLITS:
        assert world.questions[split] and world.multihop[split]


def test_documents_are_short_and_varied() -> None:
    world = generate_world(600)
    lengths = [len(document["content"].split()) for document in world.documents]
    assert 35 <= sum(lengths) / len(lengths) <= 50
    assert min(lengths) >= 20 and max(lengths) <= 65
    wordings = defaultdict(set)  # how a fact is told, with the names taken out
    graph = graph_of(world)
    for document in world.documents:
        for relation, value in graph[document["title"]].items():
            sentence = next(s for s in document["content"].split(". ") if value in s)
            wordings[relation].add(sentence.strip(".").replace(value, "O").replace(document["title"], "S"))
    assert all(len(forms) >= 3 for forms in wordings.values()), wordings


def test_every_fact_has_a_question_answered_verbatim_by_its_document(world: World) -> None:
    documents = {document["id"]: document for document in world.documents}
    graph = graph_of(world)
    asked = set()
    for split in SPLITS:
        for question in world.questions[split]:
            (answer,), (doc_id,) = question["answers"], question["doc_ids"]
            document = documents[doc_id]
            relation = question["id"].removeprefix(f"{doc_id}_")
            assert document["metadata"]["split"] == split
            assert answer in document["content"] and 1 <= len(answer.split()) <= 4
            assert answer == graph[document["title"]][relation]
            assert document["title"] in question["query"] and question["query"].endswith("?")
            assert "{" not in question["query"] and "  " not in question["query"]
            asked.add((document["title"], relation))
    assert asked == {(subject, relation) for subject, relation, _ in world.triples}


def test_questions_share_a_telling_word_with_every_sentence_of_their_fact() -> None:
    def words(template: str) -> set[str]:
        for slot in ("S", "s", "P", "o", "x"):
            template = template.replace(f"{{{slot}}}", "")
        filler = {"the", "is", "of", "in", "a", "that", "to", "was", "has", "town", "person"}
        return {word.strip(string.punctuation)[:5] for word in template.lower().split()} - filler

    for name, relation in RELATIONS.items():
        assert len(relation.sentences) >= 3 and len(relation.questions) >= 3
        shared = set.intersection(*(words(template) for template in relation.sentences + relation.questions))
        if name not in ("works_for", "lives_in", "makes", "employees"):  # verbs, inflected in questions
            assert shared, name
        else:
            stem = {"works_for": "work", "lives_in": "live", "makes": "make", "employees": "employ"}[name]
            assert all(stem in template for template in relation.sentences + relation.questions)


def test_splits_share_no_name_and_no_relation(world: World) -> None:
    words: dict[str, set[str]] = {split: set() for split in SPLITS}
    split_of = {document["title"]: document["metadata"]["split"] for document in world.documents}
    closed = set(example_world._TITLE_WORDS + example_world._COMPANY_WORDS + ["of"])
    for title, split in split_of.items():
        words[split] |= set(title.split()) - closed
    assert not words["train"] & words["val"] and not words["train"] & words["test"] and not words["val"] & words["test"]
    for subject, _relation, value in world.triples:
        assert split_of.get(value, split_of[subject]) == split_of[subject]
    for document in world.documents:  # nor do documents speak of another split
        others = set.union(*(words[split] for split in SPLITS if split != document["metadata"]["split"]))
        assert not others & {word.strip(".") for word in document["content"].split()}


def all_answers(graph: dict[str, dict[str, str]], start: str, path: list[str]) -> set[str]:
    """Every end of the path, by exact enumeration of the graph's edges."""
    ends = {start}
    for step in path:
        ends = {
            value
            for subject, facts in graph.items()
            if subject in ends
            for relation, value in facts.items()
            if relation == step
        }
    return ends


def test_hops_chain_and_the_graph_gives_the_one_answer(world: World) -> None:
    documents = {document["id"]: document for document in world.documents}
    graph = graph_of(world)
    lengths = Counter()
    for split in SPLITS:
        for question in world.multihop[split]:
            hops = question["hops"]
            lengths[len(hops)] += 1
            assert [hop["doc_ids"] for hop in hops] == [[doc_id] for doc_id in question["doc_ids"]]
            chain = [documents[doc_id] for doc_id in question["doc_ids"]]
            assert len({document["id"] for document in chain}) == len(chain)
            assert {document["metadata"]["split"] for document in chain} == {split}
            assert chain[0]["title"] in question["query"]
            for document, hop in zip(chain, hops, strict=True):
                assert document["title"] in hop["query"]
            for document, following in itertools.pairwise(chain):
                assert following["title"] in document["content"]  # reading one tells what to look up next
                assert following["title"] not in question["query"]
            path = relations_of(question["id"].removeprefix(chain[0]["id"] + "_"), len(hops))
            assert all_answers(graph, chain[0]["title"], path) == set(question["answers"])
            assert all_answers(graph, chain[0]["title"], path[:1]) == {chain[1]["title"]}
            assert question["answers"][0] in chain[-1]["content"]
            assert not any(question["answers"][0] in document["content"] for document in chain[:-1])
    assert lengths[2] and (lengths[3] or len(world.documents) < 100)


def relations_of(text: str, count: int) -> list[str]:
    """ "mayor_born_in" -> ["mayor", "born_in"]"""
    if count == 1:
        assert text in RELATIONS
        return [text]
    first = next(name for name in RELATIONS if text.startswith(name + "_"))
    return [first, *relations_of(text.removeprefix(first + "_"), count - 1)]


def test_questions_without_an_answer_are_about_nobody(world: World) -> None:
    people = {document["title"] for document in world.documents if document["metadata"]["kind"] == "person"}
    words = {word for name in people for word in name.split()}
    assert world.unanswerable["train"]  # a split of very few has no pair to make a name of
    for questions in world.unanswerable.values():
        for question in questions:
            assert question["answers"] == question["doc_ids"] == question["hops"][0]["doc_ids"] == []
            for text in (question["query"], question["hops"][0]["query"]):
                named = [word for word in text.replace("?", "").replace("'s", "").split() if word in words]
                assert len(named) == 2 and " ".join(named) not in people and " ".join(named) in text


def test_question_ids_and_texts_are_unique(world: World) -> None:
    questions = [q for split in SPLITS for q in world.questions[split] + world.multihop[split]]
    assert len({question["id"] for question in questions}) == len(questions)
    assert len({question["query"] for question in questions}) == len(questions)


def test_guessing_what_was_most_frequent_in_training_fails() -> None:
    world = generate_world(2000)

    def relation(question: dict) -> str:
        return question["id"].removeprefix(question["doc_ids"][0] + "_")

    train = defaultdict(Counter)
    for question in world.questions["train"]:
        train[relation(question)][question["answers"][0]] += 1
    scores = defaultdict(list)
    for question in world.questions["test"]:
        guess = train[relation(question)].most_common(1)[0][0]
        scores[relation(question)].append(exact_match(guess, question["answers"]))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    assert set(means) == set(RELATIONS)
    assert max(means.values()) < 0.1, means
    everything = [score for values in scores.values() for score in values]
    assert sum(everything) / len(everything) < 0.02
    for name, answers in train.items():
        assert len(answers) >= 40, name


def digest(world: World) -> str:
    content = [world.documents, world.triples, world.questions, world.multihop, world.unanswerable]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_same_seed_same_world_whatever_the_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/tasks')\n"
        "from test_example_world import digest, generate_world\n"
        "print(digest(generate_world(60, seed=5)))"
    )
    found = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert found == {digest(generate_world(60, seed=5))}
    assert digest(generate_world(60, seed=6)) not in found


def test_names_stay_unique_when_short_ones_run_out() -> None:
    world = generate_world(12_000)
    assert len({document["title"] for document in world.documents}) == 12_000


def test_a_world_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="at least 10"):
        generate_world(MIN_DOCUMENTS - 1)


def test_a_question_in_all_its_wordings(world: World) -> None:
    names = {document["id"]: document["title"] for document in world.documents}
    for question in world.questions["train"]:
        name = names[question["doc_ids"][0]]
        texts = wordings(question, name)
        assert question["query"] in texts and len(set(texts)) == 3 and all(name in text for text in texts)
        assert relation_of(question) in RELATIONS and "{" not in "".join(texts)


def test_more_worlds_give_training_entities_under_names_that_nobody_else_has():
    world, plain = generate_world(200, seed=5), generate_world(200, seed=5)
    add_training_worlds(world, 200, [1005, 2005])
    held_out = [d for d in plain.documents if d["metadata"]["split"] != "train"]
    assert [d for d in world.documents if d["metadata"]["split"] != "train"] == held_out
    assert world.documents[: len(plain.documents)] == plain.documents
    for split in ("val", "test"):
        assert world.questions[split] == plain.questions[split] and world.multihop[split] == plain.multihop[split]
    new = world.documents[len(plain.documents) :]
    assert len(new) > 100 and {d["id"][:2] for d in new} == {"1_", "2_"}
    ids, titles = [d["id"] for d in world.documents], [d["title"] for d in world.documents]
    assert len(set(ids)) == len(ids) and len(set(titles)) == len(titles)
    names = {word for d in held_out for word in d["title"].split() if word[0].isupper()}
    fixed = {word for d in plain.documents if d["metadata"]["split"] == "train" for word in d["title"].split()}
    for document in new:
        text = f"{document['title']} {document['content']}"
        assert not {word.strip(".,") for word in text.split()} & (names - fixed)
    contents = {d["id"]: d["content"] for d in world.documents}
    assert len(world.questions["train"]) > 2 * len(plain.questions["train"])
    for question in world.questions["train"] + world.multihop["train"]:
        assert question["answers"][0] in contents[question["doc_ids"][-1]]
    assert len({q["id"] for q in world.unanswerable["train"]}) > len(plain.unanswerable["train"])
    for question in world.unanswerable["train"]:
        assert not any(f" {title} " in f" {question['query'].rstrip('?')} " for title in titles if " " in title)
