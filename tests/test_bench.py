"""Every benchmark's real command at a size that takes seconds: it runs, and its last line holds the figures by name."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def figures_of(module: str, *arguments: str, **environment: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", "--json", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])["figures"]


def test_ssm():
    pytest.importorskip("transformers")
    figures = figures_of("ssm", "--width", "64", "--sizes", "1x64,1x128", "--states", "16", "--rounds", "1")
    assert set(figures) == {"over_hf_best_min", "over_hf_256_min", "bf16_over_fp32", "over_sdpa_64", "over_sdpa_128"}
    assert all(value > 0 for value in figures.values())


def test_attention():
    figures = figures_of("attention", "--tokens", "128", "--lengths", "16,64", "--rounds", "1")
    assert set(figures) == {f"over_fused_{d}_{n}" for d in ("float32", "bfloat16") for n in (16, 64)}


def test_decode():
    sizes = ["--width", "64", "--depth", "2", "--lengths", "64,256", "--batches", "1,2", "--tokens", "2"]
    figures = figures_of("decode", *sizes, "--documents", "100", "--rounds", "1")
    # two blocks: the hybrid holds half of the keys and values, and one state
    assert 0.5 < figures["state_bytes_hybrid_over_T_8k"] < 1
    assert {"hybrid_over_T_8k", "mamba_over_T_8k", "batch2_over_1", "prefix_reuse_ratio"} <= set(figures)


def test_train():
    sizes = ["--width", "64", "--depth", "2", "--vocabulary", "256", "--tokens", "64", "--lengths", "32,64"]
    figures = figures_of("train", *sizes, "--rounds", "1", "--steps", "1", "--loss_steps", "30")
    assert figures["matrix_rate_fp32"] > 0 and figures["hybrid_over_T_fp32_64"] > 0
    assert figures["bf16_loss_gap"] < 0.05


def test_block_patterns():
    sizes = ["--width", "64", "--patterns", "MT,TM", "--vocabulary", "512", "--rows", "1", "--seeds", "0"]
    steps = ["--copy_steps", "1", "--lookup_steps", "4", "--text_steps", "2", "--num_documents", "200"]
    figures = figures_of("block_patterns", *sizes, *steps)
    assert set(figures) == {"accuracy_MT", "accuracy_TM", "loss_MT", "loss_TM", "best_pattern"}
    assert 0 <= figures["accuracy_MT"] < 0.2 and 4 < figures["loss_MT"] < 8


def test_gpu_runs_its_self_test_on_a_cpu():
    figures = figures_of("gpu", "--rounds", "1")
    assert figures["scan_error_torch"] < 1e-3 and figures["d2_bf16_tokens_per_s"] > 0


def test_refrag_searches_twice_for_two_paragraphs(tmp_path):
    texts = {
        "Blue Harbour": "Blue Harbour is a film. Its director was Anna Tovik.",
        "Anna Tovik": "She was born in Marrow.",
        "Film": "A film is a film. Films have a director. Where was the film of the director born?",
        "Birth": "Where people are born. Where was the director of a film born?",
        **{f"Director {n}": "A director of a film was born." for n in range(8)},
    }
    record = {
        "_id": "a",
        "question": "Where was the director of the film Blue Harbour born?",
        "answer": "Marrow",
        "type": "bridge",
        "supporting_facts": [["Blue Harbour", 0], ["Anna Tovik", 0]],
        "context": [[title, [text]] for title, text in texts.items()],
    }
    with gzip.open(tmp_path / "hotpotqa_distractor.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n")
    figures = figures_of("refrag", "--part", "hotpot", "--data", str(tmp_path))
    assert figures == {"hotpot_recall_single": 0, "hotpot_recall_2hop": 1}


def test_agent_asks_what_it_taught_in_other_words_and_about_strangers(tmp_path):
    from bench.agent import Config, prepare
    from nanochat.retrieval.document import Document, read_queries
    from nanochat.retrieval.knowledge_base import build_knowledge_base
    from tasks.common import load_conversations
    from tasks.example_world import generate_world

    world = generate_world(300, seed=1)
    build_knowledge_base(map(Document.from_dict, world.documents), tmp_path / "rag_examples/knowledge_base", "bm25")
    (tmp_path / "rag_examples/queries").mkdir()
    for split, questions in world.questions.items():
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (tmp_path / f"rag_examples/queries/{split}.jsonl").write_text(text)
    prepare(Config(home=tmp_path, known_entities=5, questions=20), tmp_path, seed=0)
    files = {name: read_queries(tmp_path / f"{name}.jsonl") for name in ("known_train", "known_asked", "unknown_train")}
    files |= {name: read_queries(tmp_path / f"{name}.jsonl") for name in ("unknown_asked", "val")}
    entities = {name: {query["doc_ids"][0] for query in queries} for name, queries in files.items()}
    asked = {name: {query["query"] for query in queries} for name, queries in files.items()}
    assert len(entities["known_train"]) == 5 and entities["known_asked"] <= entities["known_train"]
    assert not asked["known_asked"] & asked["known_train"]
    facts = {(query["doc_ids"][0], query["answers"][0]) for query in files["known_train"]}
    assert all((query["doc_ids"][0], query["answers"][0]) in facts for query in files["known_asked"])
    assert files["known_asked"] and files["unknown_asked"]
    assert not asked["val"] & (asked["known_asked"] | asked["unknown_asked"] | asked["known_train"])
    assert not entities["unknown_train"] & entities["known_train"]
    assert not entities["unknown_asked"] & (entities["unknown_train"] | entities["known_train"])
    taught = {talk["messages"][-2]["content"] for talk in load_conversations(tmp_path / "talks.jsonl")}
    assert asked["known_train"] <= taught and not asked["known_asked"] & taught
    assert not taught & asked["unknown_asked"]


def test_kg(tmp_path):
    with gzip.open(tmp_path / "kb.txt.gz", "wt") as file:
        file.write("Film|directed_by|Ann\nFilm|starred_actors|Bo\nOther|directed_by|Ann\n")
    for hops, line in enumerate(("who directed [Film]\tAnn", "who with [Bo]\tAnn", "what by who with [Bo]\tOther"), 1):
        with gzip.open(tmp_path / f"{hops}hop_qa_test.txt.gz", "wt") as file:
            file.write(line + "\n")
    figures = figures_of("kg", "--facts", "4000", "--many_facts", "8000", "--questions", "20", "--data", str(tmp_path))
    assert [figures[f"subgraph_recall_{hops}hop"] for hops in (1, 2, 3)] == [1, 1, 1]
    assert {"load_1m_s", "build_1m_s", "build_10m_s", "peak_10m_gb", "linker_1m_s"} <= set(figures)
    assert figures["mine_1m_questions_per_s"] > 0 and figures["mine_over_networkx_3hop"] > 0


def test_rag():
    sizes = ["--width", "64", "--block_pattern", "M,T", "--num_documents", "60", "--examples", "60"]
    figures = figures_of("rag", *sizes, "--max_seq_len", "1024", "--rows", "1", "--steps", "1", "--rounds", "2")
    assert set(figures) == {"rag_over_sft_step", "rag_over_sft_step_alone"} and min(figures.values()) > 0


def test_own(tmp_path):
    for package in ("fpdf", "docx"):
        pytest.importorskip(package)
    sentences = [f"The Hall of Town {n} was opened in {1900 + n} by the mayor of Town {n}. " * 20 for n in range(12)]
    with gzip.open(tmp_path / "wiki_2018plus.jsonl.gz", "wt") as file:
        for n, text in enumerate(sentences):
            file.write(json.dumps({"title": f"Hall {n}", "text": f"Hall {n} is a hall in Town {n}.\n\n{text}"}) + "\n")
    where = {"NANOCHAT_DATA": str(tmp_path)}
    figures = figures_of("own", "--output", str(tmp_path / "own"), "--files", "12", **where)
    assert figures["files"] == 15 and figures["files_read"] == 12 and figures["passages"] >= 12
    assert figures["questions_train"] > figures["questions_test"] > 0
