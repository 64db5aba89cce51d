"""python -m scripts.prepare_rag_dataset, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_documents, read_queries
from scripts import prepare_rag_dataset

REPOSITORY = Path(prepare_rag_dataset.__file__).parents[1]
SPLITS = ("train", "val", "test")


def run(*argv: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.prepare_rag_dataset", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def prepare(output: Path, *argv: str | Path) -> str:
    done = run(*argv, "--output", output)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in output.parent.iterdir() if path.name.endswith(".building")] == []
    return done.stdout


def check_dataset(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Gold documents exist and hold an answer; the knowledge base has every document. Returns the queries by split."""
    documents = {document.id: document for document in read_documents(output / "documents.jsonl")}
    queries = {split: read_queries(output / "queries" / f"{split}.jsonl") for split in SPLITS}
    for query in (query for split in SPLITS for query in queries[split]):
        gold = [documents[id] for id in query["doc_ids"]]
        assert bool(gold) == bool(query["answers"])
        assert not gold or any(answer in document.content for answer in query["answers"] for document in gold)
    assert len(RetrievalManager(knowledge_base_path=output / "knowledge_base")) == len(documents)
    return queries


def squad_articles(*titles: str) -> dict[str, Any]:
    def paragraph(title: str, number: int) -> dict[str, Any]:
        answers = [{"text": f"{title}{number}", "answer_start": 16}]
        question = {"id": f"{title}-{number}", "question": f"What grows in {title} {number}?", "answers": answers}
        return {"context": f"In place {number} grows {title}{number}.", "qas": [question]}

    return {"data": [{"title": title, "paragraphs": [paragraph(title, i) for i in range(3)]} for title in titles]}


def test_example_writes_one_consistent_data_set(tmp_path: Path) -> None:
    output = tmp_path / "new" / "rag_examples"
    printed = prepare(output, "--mode", "example", "--num_documents", "60", "--seed", "1")
    queries = check_dataset(output)
    documents = read_documents(output / "documents.jsonl")
    assert len(documents) == 60
    split_of = {document.id: document.metadata["split"] for document in documents}
    for split in SPLITS:
        assert {split_of[id] for query in queries[split] for id in query["doc_ids"]} == {split}
        multihop = read_queries(output / "queries" / f"multihop_{split}.jsonl")
        assert all(len(query["hops"]) == len(query["doc_ids"]) >= 2 for query in multihop)
    triples = [line.split("|") for line in (output / "graph.txt").read_text().splitlines()]
    assert len(triples) == sum(map(len, queries.values()))  # a question for every fact
    assert all(len(triple) == 3 for triple in triples)
    assert f"{len(queries['train'])} questions" in printed and "60 documents" in printed and "next: python" in printed

    manager = RetrievalManager(knowledge_base_path=output / "knowledge_base")
    found = manager.search([query["query"] for query in queries["test"]], 5)
    hits = [query["doc_ids"][0] in [d.id for d in row] for query, row in zip(queries["test"], found, strict=True)]
    assert sum(hits) >= 0.95 * len(hits)


def test_example_can_be_run_again_and_changed(tmp_path: Path) -> None:
    output = tmp_path / "data"
    prepare(output, "--num_documents", "20")
    first = {path: path.read_bytes() for path in output.rglob("*.jsonl") if "knowledge_base" not in path.parts}
    prepare(output, "--num_documents", "20")
    assert {path: path.read_bytes() for path in first} == first
    prepare(output, "--num_documents", "20", "--seed", "1", "--retriever_type", "simple")
    assert all(path.read_bytes() != content for path, content in first.items())
    check_dataset(output)


def test_build_makes_a_knowledge_base_of_own_documents(tmp_path: Path) -> None:
    source = tmp_path / "my_documents.jsonl"
    source.write_text(
        '{"id": "policy_001", "title": "Return Policy", "content": "Items can be returned within 30 days."}\n'
        '{"id": "faq_001", "title": "Accounts", "content": "Click the Sign Up button."}\n'
    )
    output = tmp_path / "kb"
    printed = prepare(output, "--mode", "build", "--documents", source, "--retriever_type", "simple")
    assert "2 documents" in printed
    manager = RetrievalManager(retriever_type="simple", knowledge_base_path=output)
    assert manager.retrieve("return policy", top_k=1)[0].id == "policy_001"


def test_own_documents_without_questions(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    people = [f"{a}{b}na Li{b}d" for a in "KMRST" for b in "aeio"]
    for n, name in enumerate(people):
        page = (
            f"# {name}\n\n{name} was an engineer of bridges from Norland.\n\n## Life\n\nShe was born in 19{n + 10}.\n"
        )
        (folder / ("deep" if n % 2 else ".") / f"{name}.md").write_text(page)
    (folder / "copy.md").write_text((folder / f"{people[0]}.md").read_text())
    (folder / "photo.png").write_bytes(b"x")
    output = tmp_path / "own"
    printed = prepare(output, "--mode", "own", "--documents", folder, "--retriever_type", "simple")
    queries = check_dataset(output)
    assert sorted(map(len, queries.values())) == [4, 4, 32]  # two of each file, a tenth of the files
    assert {query["answers"][0] for split in SPLITS for query in queries[split]} == {
        "an engineer of bridges from Norland", *(str(1910 + n) for n in range(20))
    }  # fmt: skip
    assert "1 passages left out" in printed and "not read: photo.png: .png files are not read" in printed
    text = {document.id for document in read_documents(output / "text" / "train.jsonl")}
    held_out = {id for split in ("val", "test") for query in queries[split] for id in query["doc_ids"]}
    assert len(text) == 17 and not text & {id.split("#")[0] for id in held_out}  # the copy too

    alone = tmp_path / "few"
    printed = prepare(alone, "--mode", "own", "--documents", folder / "copy.md")
    assert "too few questions" in printed and not (alone / "queries").exists()
    assert len(RetrievalManager(knowledge_base_path=alone / "knowledge_base")) == 1


def test_squad_holds_out_whole_articles(tmp_path: Path) -> None:
    train, dev = tmp_path / "train.json", tmp_path / "dev.json"
    train.write_text(json.dumps(squad_articles(*(f"article{letter}" for letter in "abcdefghijkl"))))
    dev.write_text(json.dumps(squad_articles("unseen", "articlea")))  # one article is in both files
    content = json.loads(dev.read_text())
    for entry in content["data"]:
        for paragraph in entry["paragraphs"]:
            paragraph["qas"][0]["id"] += "-dev"
    dev.write_text(json.dumps(content))
    output = tmp_path / "squad"
    printed = prepare(output, "--mode", "squad", "--input", train, "--dev_input", dev)
    queries = check_dataset(output)
    assert [len(queries[split]) for split in SPLITS] == [33, 3, 6]
    title = {document.id: document.title for document in read_documents(output / "documents.jsonl")}
    assert len(title) == 13 * 3
    articles = {split: {title[id] for query in queries[split] for id in query["doc_ids"]} for split in SPLITS}
    assert len(articles["val"]) == 1 and not articles["val"] & articles["train"]
    assert articles["test"] == {"unseen", "articlea"}
    assert len(RetrievalManager(knowledge_base_path=output / "test_knowledge_base")) == 6
    assert "the 6 test passages alone" in printed
    writing = [json.loads(line) for line in (output / "conversations/writing.jsonl").read_text().splitlines()]
    assert len(writing) == 33 and len(read_documents(output / "text/train.jsonl")) == 33
    asked, written = (message["content"] for message in writing[0]["messages"])
    assert "In place 0 grows articlea0." in asked and written == "Q: What grows in articlea 0?\nA: articlea0"

    alone = tmp_path / "alone"
    prepare(alone, "--mode", "squad", "--input", train)
    queries = check_dataset(alone)
    assert [len(queries[split]) for split in SPLITS] == [30, 3, 3]


def test_hotpotqa_pools_paragraphs_and_keeps_hops(tmp_path: Path) -> None:
    def record(i: int) -> dict[str, Any]:
        first = [f"Film {i}", [f"Film {i} stars Person {i}."]]
        second = [f"Person {i}", [f"Person {i} lives in Town{i}."]]
        return {
            "_id": str(i),
            "question": f"Where does the star of Film {i} live?",
            "answer": f"Town{i}",
            "supporting_facts": [[first[0], 0], ["Missing" if i == 29 else second[0], 0]],
            "context": [second, first, ["Noise", ["Noise is loud."]]],
        }

    source = tmp_path / "hotpot.jsonl"
    source.write_text("".join(json.dumps(record(i)) + "\n" for i in range(30)))
    output = tmp_path / "hotpotqa"
    printed = prepare(output, "--mode", "hotpotqa", "--input", source)
    queries = check_dataset(output)
    assert [len(queries[split]) for split in SPLITS] == [23, 3, 3]
    assert all(len(query["hops"]) == 2 for split in SPLITS for query in queries[split])
    assert len(read_documents(output / "documents.jsonl")) == 61
    assert "1 questions skipped" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_documents", "5"], "at least 10"),
        (["--mode", "exmaple"], "did you mean 'example'?"),
        (["--num_docs", "50"], "did you mean --num_documents?"),
        (["--mode", "build"], "needs --documents"),
        (["--mode", "squad"], "needs --input"),
        (["--documents", "{good}"], "did you mean --mode own or build?"),
        (["--mode", "own"], "needs --documents"),
        (["--mode", "own", "--documents", "nowhere"], "nowhere is not there"),
        (["--mode", "own", "--documents", "{good}", "--writer", "me"], "no writer 'me'"),
        (["--mode", "own", "--documents", "{good}", "--chunk_overlap", "200"], "--chunk_overlap less"),
        (["--mode", "build", "--documents", "{bad}"], "bad.jsonl:2: "),
        (["--mode", "squad", "--input", "{bad}"], "bad.jsonl:2: not JSON"),
        (["--mode", "squad", "--input", "{one_article}"], "cannot be divided"),
        (["--mode", "hotpotqa", "--input", "{one_article}"], 'no "_id"'),
        (["--mode", "hotpotqa", "--input", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--model", "x"], "it is for dense and hybrid"),
    ],
)
def test_mistakes_give_one_line_and_write_nothing(tmp_path: Path, argv: list[str], message: str) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("good", "bad", "one_article")}
    files["good"].write_text('{"id": "a", "title": "", "content": "x"}\n')
    files["bad"].write_text('{"id": "a", "title": "", "content": "x"}\n{"id": \n')
    files["one_article"].write_text(json.dumps(squad_articles("only")))
    before = sorted(tmp_path.iterdir())
    done = run(*(argument.format(**files) for argument in argv), "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "file"
    output.write_text("mine")
    done = run("--num_documents", "10", "--output", output)
    assert done.returncode == 2 and "is a file" in done.stderr
    done = run("--num_documents", "10", "--output", output / "below")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and output.read_text() == "mine"

    # a model that is not there is met when the knowledge base is built, after all else is ready
    done = run(
        "--num_documents", "10", "--output", tmp_path / "x", "--retriever_type", "dense", "--model", tmp_path / "none"
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_killed_in_the_middle_leaves_no_half_data_set(tmp_path: Path) -> None:
    output = tmp_path / "data"
    code = (
        "import os, signal, sys\n"
        "from scripts import prepare_rag_dataset as p\n"
        "write, calls = p.write_jsonl, []\n"
        "def killed(path, records):\n"
        "    calls.append(write(path, records))\n"
        "    len(calls) == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "p.write_jsonl = killed\n"
        "sys.argv = ['p', '--num_documents', '20', '--output', sys.argv[1]]\n"
        "p.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(output)], cwd=REPOSITORY, capture_output=True, check=False)
    assert done.returncode == -9
    assert not output.exists()
    prepare(output, "--num_documents", "20")  # checks too that what the killed run left beside is gone
    check_dataset(output)
