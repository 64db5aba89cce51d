"""python -m scripts.kg_prepare, run as a user runs it, on the example world."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kg.documents import fact_documents
from nanochat.kg.graph import Graph
from nanochat.kg.triples import read_facts
from scripts import kg_prepare
from tasks.example_world import generate_world

REPOSITORY = Path(kg_prepare.__file__).parents[1]


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.kg_prepare", *map(str, argv)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def printed(*argv: str | Path) -> str:
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kg")
    world = generate_world(200)
    (folder / "graph.txt").write_text("".join("|".join(fact) + "\n" for fact in world.triples) + "no fact\n")
    questions = [json.dumps(question) + "\n" for split in ("train", "test") for question in world.multihop[split]]
    questions.append('{"id": "x", "query": "who is Nobody Atall?", "answers": ["Nothing"], "doc_ids": []}\n')
    (folder / "questions.jsonl").write_text("".join(questions))
    text = printed("build", "--triples", folder / "graph.txt", "--graph", folder / "kg")
    assert re.search(r"left out: 1 lines that are no fact \(graph.txt:\d+: 'no fact'\)", text)
    return folder


def test_the_example_world(home):
    graph = Graph.load(home / "kg")
    common = ("--graph", home / "kg", "--questions", home / "questions.jsonl")
    text = printed("coverage", *common)
    count = len((home / "questions.jsonl").read_text().splitlines())
    assert f"of all answers               {(count - 1) / count:.2%}" in text
    assert "not in the graph: 'Nothing', 1 times" in text and "'who is Nobody Atall?'" in text
    text = printed("mine", *common, "--output", home / "paths.jsonl", "--processes", 2)
    assert f"answers reached: {(count - 1) / (count - 1):.2%}" in text
    records = [json.loads(line) for line in (home / "paths.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [question["id"] for question in questions]
    direct = 0
    for record, question in zip(records[:-1], questions[:-1], strict=True):
        assert record["answers"] == question["answers"] and record["topics"][0] in question["query"]
        assert 1 <= min(record["hops"]) <= len(question["hops"])  # there may be a shorter way, not a longer
        if record["hops"] == [len(question["hops"])]:
            direct += 1
            relation = question["id"].rpartition("_")[2]
            assert any(record["answers"][0] in fact.split("|") and relation in fact for fact in record["facts"])
    assert direct > len(records) / 2
    nothing = {"topics": [], "answers": [], "hops": [], "facts": [], "doc_ids": []}
    assert records[-1] == {"id": "x", "query": "who is Nobody Atall?", **nothing}
    # they are queries of a knowledge base of facts: their documents are a way from an entity to the first answer
    documents = {document.id: document for document in fact_documents(read_facts([home / "graph.txt"]))}
    for record in records[:-1]:
        ends = [{documents[i].metadata["head"], documents[i].metadata["tail"]} for i in record["doc_ids"]]
        assert any(record["answers"][0] in pair for pair in ends)
        assert any(topic in pair for topic in record["topics"] for pair in ends)
        assert len(ends) >= record["hops"][0]
    text = printed("subgraph", *common, "--output", home / "around.jsonl", "--max_facts", 50)
    around = [json.loads(line) for line in (home / "around.jsonl").read_text().splitlines()]
    assert max(record["size"] for record in around) == 50 and any(record["cut"] for record in around)
    assert all(len(record["facts"]) == record["size"] for record in around)
    assert graph.find(around[0]["topics"][0]) is not None
    one = printed("mine", *common, "--output", home / "again.jsonl", "--processes", 1, "--num_questions", 20)
    assert "20 questions" in one
    assert (home / "again.jsonl").read_text().splitlines() == (home / "paths.jsonl").read_text().splitlines()[:20]


def test_a_question_set_with_its_facts_becomes_a_graph_that_answers_it(tmp_path):
    (tmp_path / "hub").mkdir()
    facts = [["Ann", "born_in", "Or"], ["Or", "in", "X"]]
    record = {"id": "a", "question": "Where is it?", "answer": ["X"], "q_entity": ["Ann"], "a_entity": ["X"]}
    (tmp_path / "hub/train.jsonl").write_text(json.dumps({**record, "graph": facts, "choices": []}))
    out = tmp_path / "out"
    text = printed("download", "--dataset", "webqsp", "--source", tmp_path / "hub", "--output", out)
    assert f"next: python -m scripts.kg_prepare build --triples {out}/facts.txt --graph {out}/graph" in text
    printed(*text.split("next: python -m scripts.kg_prepare ")[1].split())
    text = printed("mine", "--graph", out / "graph", "--questions", out / "train.jsonl")
    assert "after 2 facts: 100.00%" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "say what to do"),
        (("build",), "give --triples FILE"),
        (("download", "--dataset", "webq"), "--dataset: .*webqsp"),
        (("mine", "--graph", "nothing"), "nothing is no graph: .* build it with scripts.kg_prepare"),
        (("coverage", "--graph", "{home}/kg"), "give --questions FILE"),
        (("coverage", "--graph", "{home}/kg", "--questions", "{home}/none.jsonl"), "none.jsonl: No such file"),
        (
            (
                "coverage",
                "--graph",
                "{home}/kg",
                "--questions",
                "{home}/questions.jsonl",
                "--aliases",
                "{home}/graph.txt",
            ),
            "graph.txt:1: .* is not alias<tab>name",
        ),
    ],
)
def test_what_is_wrong_is_said(home, argv, message):
    done = run(*(part.format(home=home) for part in argv))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_texts_are_all_facts_an_entity_a_text(home):
    graph = Graph.load(home / "kg")
    assert "facts of" in printed("text", "--graph", home / "kg", "--output", home / "facts.jsonl")
    texts = [json.loads(line)["text"].split("\n") for line in (home / "facts.jsonl").read_text().splitlines()]
    facts = [graph.text(fact).split("|") for fact in range(graph.num_facts)]
    wanted = [f" {head}| {relation.replace('_', ' ')}| {tail}" for head, relation, tail in facts]
    assert sorted(line for text in texts for line in text) == sorted(wanted)
    heads = [{line.split("|")[0] for line in text} for text in texts]
    assert all(len(head) == 1 for head in heads) and len(set.union(*heads)) == len(texts)
    assert run("text", "--graph", home / "kg").stderr.count("\n") == 1  # no --output
