"""The commands that search, talk and evaluate, over a base whose documents are facts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
from nanochat.citations import Source
from nanochat.common import UserError
from nanochat.kg.documents import fact_document
from nanochat.kg.gnn import FactRetriever, RetrieverConfig
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.__main__ import main as retrieval
from nanochat.retrieval.document import write_jsonl
from scripts._terminal import format_sources
from scripts.rag_eval import main as rag_eval

REPOSITORY = Path(__file__).parents[2]
FACTS = """\
Titanic|directed_by|James Cameron
Avatar|directed_by|James Cameron
James Cameron|born_in|Kapuskasing
Titanic|starred_actors|Kate Winslet
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_tokenizer, make_model) -> Path:
    """A base directory with a random model as checkpoint rag/tiny, and facts beside it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        meta = {"training_config": {"max_seq_len": 1000}}
        model = make_model(small_tokenizer.vocab_size, "MT")
        save_checkpoint(checkpoint_root("rag", "tiny"), 1, model, small_tokenizer, meta)
    (home / "kb.txt").write_text(FACTS)
    return home


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONIOENCODING": "utf-8"}


def run(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=REPOSITORY,
        env=environment(home),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def command(monkeypatch, capsys, home):
    """A command in this process; its output."""

    def command(main, *words: object) -> str:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        main()
        return capsys.readouterr().out

    return command


@pytest.fixture(scope="module")
def base(home) -> Path:
    out = run(home, "nanochat.retrieval", "build", "--triples", home / "kb.txt", "--output", home / "kb").stdout
    assert "4 facts about 5 entities, 3 relations" in out and "built kg: 4 documents" in out
    return home / "kb"


def test_a_base_of_triples_lives(base, home, command):
    at = ("--knowledge_base", base)
    found = json.loads(command(retrieval, "search", "who directed Avatar", "--json", "true", *at).splitlines()[0])
    assert (found["title"], found["content"]) == ("Avatar", "Avatar directed by James Cameron.")
    assert found["metadata"] == {"head": "Avatar", "relation": "directed_by", "tail": "James Cameron"}
    assert "nothing found (kg" in command(retrieval, "search", "who is who", *at)
    (home / "more.txt").write_text("Aliens\tdirected_by\tJames Cameron\n")
    assert "added: 1 documents" in command(retrieval, "add", "--triples", home / "more.txt", *at)
    assert "Aliens directed by James Cameron." in command(retrieval, "search", "[Aliens]", *at)
    new = fact_document(("Aliens", "directed_by", "James Cameron"))
    assert "deleted: 1 documents" in command(retrieval, "delete", "--ids", new.id, *at)
    assert "nothing found" in command(retrieval, "search", "[Aliens]", *at)
    assert "Titanic directed by" in command(retrieval, "search", "directed", "--type", "bm25", *at)


def test_a_trained_fact_retriever_goes_into_the_base(home, command, tmp_path):
    FactRetriever(RetrieverConfig(width=16), ["directed", "by"]).save(tmp_path / "facts")
    settings = ("--fact_retriever", tmp_path / "facts", "--threshold", 0.0, "--max_hops", 2)
    command(retrieval, "build", "--triples", home / "kb.txt", "--output", tmp_path / "kb", *settings)
    (tmp_path / "facts").rename(tmp_path / "elsewhere")
    manager = RetrievalManager(knowledge_base_path=tmp_path / "kb")
    assert (manager.retriever_type, manager.retriever.max_hops) == ("kg", 2)
    assert len(manager.retrieve("who directed Titanic", 10)) == 4 and manager.retriever.fact_retriever is not None


def test_mistakes_are_one_line(home, command, tmp_path):
    write_jsonl(tmp_path / "plain.jsonl", [Document("plain", "", "Some text.")])
    for words, reason in (
        (["--documents", tmp_path / "plain.jsonl", "--type", "kg"], "'plain' states no fact"),
        (["--documents", tmp_path / "plain.jsonl", "--triples", home / "kb.txt"], "not both"),
        (["--triples", tmp_path / "nowhere.txt"], "nowhere.txt: No such file"),
        (["--triples", tmp_path / "plain.jsonl"], "no fact in"),
        (["--triples", home / "kb.txt", "--fact_retriever", tmp_path / "nowhere"], "nowhere has no retriever"),
    ):
        with pytest.raises(UserError, match=reason):
            command(retrieval, "build", "--output", tmp_path / "kb", *words)
        assert not (tmp_path / "kb").exists()


def test_the_chat_draws_its_sources_as_a_graph(base, home):
    words = ("--knowledge_base", base, "--prompt", "where was James Cameron born?", "--max_tokens", 3)
    done = run(home, "scripts.rag_chat", *words)
    assert "ranked by the words" in done.stderr and done.stderr.count("\n") == 1
    drawn = done.stdout.split("sources:\n")[1].splitlines()
    assert [re.sub(r"\d\.\d{3}", "score", line) for line in drawn] == [
        "  [1] score  James Cameron  ─born_in─────→ Kapuskasing",
        "  [2] score                 ←─directed_by─ Avatar",
        "  [3] score                 ←─directed_by─ Titanic",
    ]


def test_sources_in_ascii_and_what_is_no_fact():
    fact = fact_document(("a\x1b[31m", "is\n", "b"))
    sources = [Source(3, fact), Source(4, fact, read=False)]
    assert format_sources(sources, "ascii") == [
        "[3] 0.000  a  -is-> b",
        "[4] 0.000     -is-> b  (did not fit, not read)",
    ]
    assert format_sources(sources[:1], "latin-1") == format_sources(sources[:1], None) == ["[3] 0.000  a  -is-> b"]
    assert format_sources(sources[:1]) == ["[3] 0.000  a  ─is─→ b"]
    assert format_sources([*sources, Source(5, Document("x", "A title", "text"))])[2] == "[5] 0.000  A title"


def test_questions_without_gold_documents_have_no_recall(base, home, command, tmp_path):
    asked = [("1", "who directed Titanic", "James Cameron"), ("2", "where was James Cameron born", "Kapuskasing")]
    records = [{"id": id, "query": query, "answers": [answer], "doc_ids": []} for id, query, answer in asked]
    write_jsonl(tmp_path / "queries.jsonl", records)
    words = ("--knowledge_base", base, "--queries", tmp_path / "queries.jsonl", "--max_tokens", 4, "--json")
    out = command(rag_eval, *words, "--output", tmp_path / "eval")
    assert "gold is left out" in out
    figures = json.loads(out.splitlines()[-1])["figures"]
    assert {"closed_em", "rag_em", "rag_f1"} <= set(figures)
    assert not [name for name in figures if "recall" in name or "citation" in name or name.startswith("gold")]
    row = next(line for line in (tmp_path / "eval/table.md").read_text().splitlines() if line.startswith("| kg top-5"))
    assert [cell.strip() for cell in row.split("|")][4:6] == ["-", "-"]
    with pytest.raises(UserError, match="no question names its gold documents"):
        command(rag_eval, *words, "--systems", "gold")
    records[0]["doc_ids"] = [fact_document(("Titanic", "directed_by", "James Cameron")).id]
    write_jsonl(tmp_path / "queries.jsonl", records)
    figures = json.loads(command(rag_eval, *words, "--output", tmp_path / "eval").splitlines()[-1])["figures"]
    assert figures["recall_at_5"] == 1.0 and "gold_em" in figures  # over the question that names one
