"""python -m scripts.dsi_train and scripts.joint_train, run as a user runs them, and a base of type dsi."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import newest, save_checkpoint
from nanochat.dsi.index import SearchIndex
from nanochat.retrieval.document import write_jsonl
from scripts import dsi_train
from tasks.example_world import generate_world

REPOSITORY = Path(dsi_train.__file__).parents[1]
TINY = ["--width", 32, "--layers", 1, "--vocab_size", 500, "--num_steps", 30, "--eval_every", 15, "--save_every", 10]
TINY += ["--total_batch_size", 1024, "--log_every", 10, "--scheme", "semantic", "--branches", 4]


def run(home: Path, module: str, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def printed(*argv: object) -> str:
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base directory with a trained index of 50 documents."""
    home = tmp_path_factory.mktemp("dsi")
    world = generate_world(60, seed=1)
    write_jsonl(home / "documents.jsonl", world.documents[:50])
    write_jsonl(home / "new.jsonl", world.documents[50:])
    known = {document["id"] for document in world.documents}
    queries = [query for split in world.questions.values() for query in split if set(query["doc_ids"]) <= known]
    write_jsonl(home / "queries.jsonl", queries)
    asked = ["--queries", home / "queries.jsonl", "--val_queries", home / "queries.jsonl", "--num_val", 20]
    text = printed(home, "scripts.dsi_train", "--documents", home / "documents.jsonl", *TINY, *asked)
    assert re.search(r"bm25, all documents +hits1 [01]\.\d+, hits10", text) and "index, all documents" in text
    return home


def root(home: Path, source: str = "dsi", tag: str = "t5_semantic") -> Path:
    return home / "checkpoints" / source / tag


def test_it_learns_reports_and_resumes_where_it_was(home, tmp_path):
    run_dir = root(home)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and rows[-1]["loss"] < 0.9 * rows[0]["loss"] and "hits1" in rows[14]
    assert (run_dir / "report.md").exists() and (run_dir / "loss.png").exists()
    whole = SearchIndex.load(newest(run_dir)).model.state_dict()
    for cut in (20, 30):  # stopped after 20 steps, then gone on with
        argv = ["--documents", home / "documents.jsonl", *TINY, "--queries", home / "queries.jsonl", "--eval_every", 0]
        steps = ["--num_steps", 30, "--resume", "auto"]
        if cut == 20:
            for step in list(run_dir.glob("step_*30")):
                step.rename(tmp_path / "away")
        printed(home, "scripts.dsi_train", *argv, *steps)
    again = SearchIndex.load(newest(run_dir)).model.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_new_documents(home):
    argv = ["--documents", home / "documents.jsonl", "--add", home / "new.jsonl", "--source_tag", "t5_semantic"]
    argv += ["--val_queries", home / "queries.jsonl", *TINY]
    text = printed(home, "scripts.dsi_train", *argv)
    for line in ("10 new documents, 60 in all", "old documents, before", "old documents, now", "new documents  "):
        assert line in text
    assert len(SearchIndex.load(newest(root(home, tag="t5_semantic_added")))) == 60


def test_a_base_of_type_dsi(home, tmp_path):
    base = ["--documents", home / "documents.jsonl", "--output", tmp_path / "kb", "--type", "dsi"]
    printed(home, "nanochat.retrieval", "build", *base, "--index", newest(root(home)))
    text = printed(home, "nanochat.retrieval", "search", "who lives in the town?", "--knowledge_base", tmp_path / "kb")
    assert len(re.findall(r"^\W*1\b", text, re.MULTILINE)) >= 1
    argv = ["--documents", home / "new.jsonl", "--knowledge_base", tmp_path / "kb", "--epochs", 2]
    assert "learned 10 new documents" in printed(home, "nanochat.retrieval", "add", *argv)
    assert "60" in printed(home, "nanochat.retrieval", "stats", "--knowledge_base", tmp_path / "kb")


@pytest.mark.parametrize("model, scheme", [("lm", "naive"), ("t5", "title")])
def test_other_models_and_ids(home, model, scheme):
    argv = [
        "--documents",
        home / "documents.jsonl",
        *TINY,
        "--num_steps",
        3,
        "--eval_every",
        0,
        "--block_pattern",
        "MT",
    ]
    argv += ["--width", 64] if model == "lm" else []
    printed(home, "scripts.dsi_train", *argv, "--model", model, "--scheme", scheme)
    index = SearchIndex.load(newest(root(home, tag=f"{model}_{scheme}")))
    assert len(index.search(["a town"], 50)[0]) == 50


def test_learning_from_answers(home, make_model, small_tokenizer):
    save_checkpoint(root(home, "rag", "tiny"), 1, make_model(small_tokenizer.vocab_size), small_tokenizer, {})
    argv = ["--documents", home / "documents.jsonl", "--queries", home / "queries.jsonl", "--num_val", 10]
    argv += ["--val_queries", home / "queries.jsonl", "--index_tag", "t5_semantic", "--total_batch_size", 512]
    argv += ["--num_steps", 3, "--eval_every", 0, "--reader_lr", 1e-4, "--device_batch_size", 2]
    text = printed(home, "scripts.joint_train", *argv)
    assert "index, before" in text and "index, now" in text
    before, after = (SearchIndex.load(newest(of)) for of in (root(home), root(home, "joint")))
    assert any(not torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    assert (newest(root(home, "joint")) / "reader").is_dir()
    rows = [json.loads(line) for line in (root(home, "joint") / "metrics.jsonl").read_text().splitlines()]
    assert {"marginal_loss", "policy_loss", "anchor_loss"} <= rows[0].keys()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give --documents FILE"),
        (["--documents", "DOCUMENTS", "--model", "gpt"], "--model 'gpt'"),
        (["--documents", "DOCUMENTS", "--pseudo_queries", "words"], "no kind of pseudo-query 'words'"),
        (["--documents", "DOCUMENTS", "--pseudo_queries", "spans:x"], "is not KIND:WEIGHT"),
        (["--documents", "DOCUMENTS", "--model", "t5:nowhere"], "is no T5"),
        (["--documents", "DOCUMENTS", "--add", "DOCUMENTS"], "the index has all of these documents"),
    ],
)
def test_what_is_wrong_is_one_line(home, argv, message):
    words = [home / "documents.jsonl" if word == "DOCUMENTS" else word for word in argv]
    done = run(home, "scripts.dsi_train", *words, *TINY)
    assert done.returncode != 0 and "Traceback" not in done.stderr and message in done.stderr, done.stderr
