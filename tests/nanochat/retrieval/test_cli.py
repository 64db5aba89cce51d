"""The command, run as users run it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.document import write_jsonl

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
    assert "3 documents" in output and "MB" in output and f"wrote {tmp_path}/kb/v0001" in output
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
