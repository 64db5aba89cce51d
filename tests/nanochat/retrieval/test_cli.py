"""The command, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.document import read_documents, write_jsonl

POLICIES = [
    Document("policy_001", "Return Policy", "Customers can return items within 30 days with the original receipt."),
    Document("policy_002", "Shipping Information", "We offer free shipping on orders over $50."),
    Document(
        "faq_001", "Account Creation", "Click the Sign Up button and provide your email address.\n" + "More. " * 300
    ),
]


def run(*arguments, status: int = 0) -> str:
    """The command's output, or, where it should fail, its one line of error."""
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.retrieval", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


@pytest.fixture
def documents(tmp_path):
    write_jsonl(tmp_path / "documents.jsonl", POLICIES)
    return tmp_path / "documents.jsonl"


@pytest.mark.parametrize("retriever_type", ["simple", "bm25"])
@pytest.mark.parametrize("word", [[], ["prepare_kb"]])
def test_build_and_search(documents, tmp_path, retriever_type, word):
    output = run(*word, "--documents", documents, "--output", tmp_path / "kb", "--type", retriever_type)
    assert "3 documents" in output and "kB" in output and f"wrote {tmp_path}/kb/v0001" in output
    assert f"built {retriever_type}: 3 documents" in output
    output = run("--search", "how to return an item", "--knowledge_base", tmp_path / "kb", "--top_k", "2")
    lines = output.splitlines()
    assert lines[0].split()[0] == "1." and "policy_001  Return Policy" in lines[0]
    assert "original receipt" in output and f"of 3 documents ({retriever_type}, " in lines[-1]


def test_type_is_simple_unless_given_and_settings_reach_the_retriever(documents, tmp_path):
    run("--documents", documents, "--output", tmp_path / "kb", "--stop-words=false")
    manager = RetrievalManager(knowledge_base_path=tmp_path / "kb")
    assert manager.retriever_type == "simple" and manager.retriever.stop_words is False
    run("build", "--documents", documents, "--output", tmp_path / "kb", "--type", "bm25", "--k1", "0.9", "--b", "0.4")
    retriever = RetrievalManager(knowledge_base_path=tmp_path / "kb").retriever
    assert (retriever.type, retriever.k1, retriever.b) == ("bm25", 0.9, 0.4)


def test_long_texts_are_cut_and_nothing_found_is_said(documents, tmp_path):
    run("--documents", documents, "--output", tmp_path / "kb", "--type", "bm25")
    output = run("search", "--search", "email", "--knowledge_base", tmp_path / "kb")
    assert "..." in output and len(output) < 500 and max(map(len, output.splitlines())) <= 80
    assert "nothing found" in run("--search", "xyzzy", "--knowledge_base", tmp_path / "kb")


def test_a_base_lives(documents, tmp_path):
    base = ("--knowledge_base", tmp_path / "kb")
    run("build", "--documents", documents, "--output", tmp_path / "kb", "--type", "bm25")
    more = [Document("late", "Late", "Parcels may come late.", "mail.txt", {"lang": "en", "year": 2024})]
    write_jsonl(tmp_path / "more.jsonl", more)
    assert "added: 1 documents" in run("add", "--documents", tmp_path / "more.jsonl", *base)
    assert "late  Late" in run("search", "parcels", *base)
    assert "late" in run("search", "parcels", "--where", "lang=en,year>=2024", *base)
    assert "nothing found" in run("search", "parcels", "--where", "lang=de", *base)
    found = [json.loads(line) for line in run("search", "receipt", "--json", "true", *base).splitlines()]
    assert [document["id"] for document in found] == ["policy_001"] and found[0]["score"] > 0
    assert "deleted: 2" in run("delete", "--ids", "late,faq_001", *base)
    assert "nothing found" in run("search", "parcels", *base)
    stats = json.loads(run("stats", "--json", "true", *base))
    assert (stats["documents"], stats["version"], stats["retriever"]) == (2, "v0003", "bm25")
    assert "documents                      2" in run("stats", *base)
    assert "have their checksums" in run("verify", *base)
    assert "4 documents" in run("rollback", *base) and "late" in run("search", "parcels", *base)
    (tmp_path / "ids").write_text("late\n\npolicy_002\n")
    run("delete", "--ids_file", tmp_path / "ids", *base)
    assert "wrote 2 documents" in run("export", "--output", tmp_path / "out.jsonl", *base)
    assert {document.id for document in read_documents(tmp_path / "out.jsonl")} == {"policy_001", "faq_001"}


def test_bad_documents_write_nothing(documents, tmp_path):
    with open(documents, "ab") as file:
        file.write(b'{"id": "x"')
    assert f"{documents}:4: " in run("--documents", documents, "--output", tmp_path / "kb", status=2)
    assert os.listdir(tmp_path) == ["documents.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--documents FILE.jsonl --output DIRECTORY"),
        (["--documents", "d.jsonl"], "--output"),
        (["--search", "x"], "--knowledge_base"),
        (["--search", "x", "--knowledge_base", "nowhere"], "no knowledge base at nowhere"),
        (["--documents", "nowhere.jsonl", "--output", "kb"], "nowhere.jsonl: cannot be read"),
        (["--document", "d.jsonl"], "did you mean --documents"),
        (["--type", "bm52"], "bm25"),
        (["--top_k", "five"], "five"),
        (["search"], 'search "text"'),
        (["stats"], "--knowledge_base DIRECTORY"),
        (["delete", "--knowledge_base", "nowhere"], "--ids"),
        (["add", "--knowledge_base", "nowhere"], "--documents"),
        (["delete", "--ids", "a", "--knowledge_base", "nowhere"], "no knowledge base at nowhere"),
        (["search", "x", "--where", "lang", "--knowledge_base", "nowhere"], "nowhere"),
        (["prepare"], "prepare"),
    ],
)
def test_bad_flags_are_one_line(arguments, reason):
    assert reason in run(*arguments, status=2)


def test_settings_of_another_retriever_are_refused(documents, tmp_path):
    error = run("--documents", documents, "--output", tmp_path / "kb", "--type", "bm25", "--alpha", "0.5", status=2)
    assert "'bm25' has no setting 'alpha'" in error and not (tmp_path / "kb").exists()


def test_top_k_below_one_is_refused(documents, tmp_path):
    run("--documents", documents, "--output", tmp_path / "kb")
    assert "top_k" in run("--search", "x", "--knowledge_base", tmp_path / "kb", "--top_k", "0", status=2)


def test_help_names_every_setting():
    output = run("--help")
    for name in ("--documents", "--output", "--type", "--model", "--search", "--knowledge_base", "--top_k"):
        assert name in output
