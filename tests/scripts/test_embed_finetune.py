"""The encoder's training, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.document import write_jsonl
from nanochat.retrieval.knowledge_base import build_knowledge_base

NAMES = [f"{first}{second}" for first in ("Marr", "Old", "Tow", "Bri", "Riv") for second in ("ow", "en", "ik", "us")]


def run(*arguments, status=0):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == status, done.stderr
    return done.stdout if not status else done.stderr


@pytest.fixture
def world(tmp_path, monkeypatch, make_model, small_tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = make_model(small_tokenizer.vocab_size, noise=0.0, d_model=64)
    save_checkpoint(checkpoint_root("mid", "tiny"), 1, model, small_tokenizer, {})
    documents = [Document(name, name, f"{name} is an old bridge.") for name in NAMES]
    build_knowledge_base(documents, tmp_path / "kb", "bm25")
    queries = [
        {"id": f"{name}{n}", "query": ask.format(name), "answers": ["x"], "doc_ids": [name]}
        for name in NAMES
        for n, ask in enumerate(("What is {}?", "Is {} old?", "Tell of {}!"))
    ]
    with open(tmp_path / "queries.jsonl", "w") as file:
        file.writelines(json.dumps(query) + "\n" for query in queries)
    return tmp_path


def test_it_learns_and_serves_as_self(world):
    arguments = ["--knowledge_base", world / "kb", "--queries", world / "queries.jsonl", "--num_steps", "60"]
    arguments += ["--batch_queries", "16", "--eval_every", "30", "--matrix_lr", "0.02"]
    output = run("-m", "scripts.embed_finetune", *arguments)
    first, last = (float(line.split("recall@1 ")[1].split()[0]) for line in output.splitlines() if "recall@1" in line)
    assert 0 <= first <= last >= 0.8, output
    run("-m", "nanochat.retrieval", "index", "--type", "dense", "--model", "self", "--knowledge_base", world / "kb")
    manager = RetrievalManager("dense", world / "kb")
    hits = manager.search([f"What is {name}?" for name in NAMES], 1)
    assert sum(found[0].id == name for found, name in zip(hits, NAMES, strict=True)) >= 0.8 * len(NAMES)


def test_bad_input_is_one_line(world, tmp_path):
    base = ["-m", "scripts.embed_finetune", "--knowledge_base", world / "kb"]
    assert "give --queries" in run(*base, status=2)
    write_jsonl(tmp_path / "other.jsonl", [Document("x", "", "y")])
    run("-m", "nanochat.retrieval", "--documents", tmp_path / "other.jsonl", "--output", tmp_path / "kb2")
    error = run(*base[:2], "--knowledge_base", tmp_path / "kb2", "--queries", world / "queries.jsonl", status=2)
    assert error.startswith("error: the knowledge base does not hold") and error.count("\n") == 1
