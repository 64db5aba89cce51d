"""When to search, learned by example and by reward: the command, run as users run it, on a tiny world."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_root, load_model, save_checkpoint
from nanochat.config import load_config
from nanochat.conversation import render
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import build_knowledge_base
from tasks.example_world import generate_world

REPOSITORY = Path(__file__).parents[2]
TINY = ["--max_seq_len", 384, "--total_batch_size", 1536, "--max_doc_length", 40, "--top_k_per_hop", 1]
TINY += ["--max_hops", 1, "--max_tokens", 40, "--eval_every", 4, "--eval_questions", 6, "--init_lr_frac", 1]
TINY += ["--num_steps", 40, "--closed_book_tokens", 8]
REWARDS = ["--rl_steps", 6, "--group_size", 3, "--queries_per_step", 4, "--save_every", 2, "--min_valid", 0]
KNOWN = [("What is one?", "uno"), ("What is two?", "due"), ("What is three?", "tre"), ("What is four?", "quattro")]


@pytest.fixture(scope="module")
def home(tmp_path_factory, make_model, small_tokenizer) -> Path:
    """A base directory with a world, and a model of source "rag" that knows four answers by heart and no others."""
    home = tmp_path_factory.mktemp("home")
    world = generate_world(60, seed=1)
    build_knowledge_base(map(Document.from_dict, world.documents), home / "ex/knowledge_base", "bm25")
    (home / "ex/queries").mkdir()
    document = world.documents[0]["id"]
    known = [{"id": text, "query": text, "answers": [answer], "doc_ids": [document]} for text, answer in KNOWN]
    files = {"train": known + world.questions["train"][:20], "val": known + world.questions["val"]}
    for name, queries in files.items():
        (home / f"ex/queries/{name}.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    model = taught(make_model(small_tokenizer.vocab_size), small_tokenizer)
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ.get("NANOCHAT_BASE_DIR"), str(home)
    for tag in ("tiny", "whole", "killed", "one", "two"):
        save_checkpoint(checkpoint_root("rag", tag), 1, model, small_tokenizer, {})
    os.environ.pop("NANOCHAT_BASE_DIR")
    if before is not None:
        os.environ["NANOCHAT_BASE_DIR"] = before
    return home


def taught(model, tokenizer):
    """Answers KNOWN closed book."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": answer}] for text, answer in KNOWN]
    examples = [render({"messages": talk}, tokenizer, 128) for talk in talks]
    for _ in range(150):
        loss = torch.zeros(())
        for example in examples:
            tokens = torch.tensor([example.ids[:-1]])
            wanted = [token if learned else -1 for token, learned in zip(example.ids, example.mask, strict=True)][1:]
            loss = loss + model(tokens, torch.tensor([wanted]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def command(home, *args, module=("scripts.agent_train",)) -> list[str]:
    base = ["--knowledge_base", home / "ex/knowledge_base", "--val_queries", home / "ex/queries/val.jsonl"]
    base += ["--queries", home / "ex/queries/train.jsonl"]
    return [sys.executable, "-m", *map(str, [*module, *base, *TINY, *REWARDS, *args])]


def run(home, *args, **more) -> str:
    done = subprocess.run(
        command(home, *args, **more), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def metrics(home, source, tag):
    lines = (home / "checkpoints" / source / tag / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "elapsed", "tokens_per_s")} for line in lines
    ]


def test_example_then_reward_by_ppo_then_grpo(home, monkeypatch):
    assert "oracle" not in run(home, "--model_tag", "tiny", "--plan", "true")
    assert not (home / "checkpoints/agent_sft").exists()
    out = run(home, "--model_tag", "tiny")
    assert "oracle: search for " in out and "reinforce" in out
    searched, of = map(int, out.partition("oracle: search for ")[2].split(" questions")[0].split(" of "))
    assert searched == of - 2 * len(KNOWN)  # known by heart, in both files
    by_example = metrics(home, "agent_sft", "tiny")
    wanted = {"val_loss", "em", "searches", "search_rate", "search_precision", "search_recall", "worth"}
    assert len(by_example) == 40 and wanted <= set(by_example[-1])
    by_reward = metrics(home, "agent", "tiny")
    assert len(by_reward) == 6 and all({"reward", "searches"} <= set(row) for row in by_reward)
    assert {"worth", "search_rate"} <= set(by_reward[-1])
    written = [json.loads(line) for line in (home / "checkpoints/agent/tiny/rollouts.jsonl").read_text().splitlines()]
    for row in written:  # worth what the answer is, less the price of its searches, and nothing else
        searches = sum(line.startswith("search: ") for line in row["written"])
        expected = row["answer"] * row["valid"] - 0.1 * searches - 0.5 * (1 - row["valid"])
        assert row["reward"] == pytest.approx(expected)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    model, _, meta = load_model("agent", model_tag="tiny")
    assert meta["step"] == 6 and model.value_head is not None  # PPO is what it does by itself
    assert meta["start"] == {"source": "rag", "model_tag": "tiny", "step": 1}
    run(home, "--source", "agent_sft", "--model_tag", "tiny", "--algorithm", "grpo")
    model, _, meta = load_model("agent", model_tag="tiny")
    assert model.value_head is None and meta["start"]["source"] == "rag"
    assert len(metrics(home, "agent_sft", "tiny")) == 40  # untouched
    figures, table = evaluate(home, "agent:agent_sft/tiny,agent")
    assert {"agent:agent_sft/tiny_em", "agent_em", "agent_searches", "agent_search_rate"} <= set(figures)
    assert {"agent_search_precision", "agent_search_recall", "agent_needless_searches"} <= set(figures)
    assert "deciding to search" in table and "| search P / R | needless |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert (home / "eval/searches.png").stat().st_size > 5000
    always, _ = evaluate(home, "agent:agent_sft", "--min_hops", 1)
    assert always["agent:agent_sft_search_rate"] > 0.6  # all that it brings to an end
    never, _ = evaluate(home, "agent:agent_sft", "--max_hops", 0)
    assert never["agent:agent_sft_search_rate"] == never["agent:agent_sft_searches"] == 0


def evaluate(home, systems, *more):
    words = [sys.executable, "-m", "scripts.rag_eval", "--knowledge_base", home / "ex/knowledge_base"]
    words += ["--systems", systems, "--queries", home / "ex/queries/val.jsonl", "--model_tag", "tiny", "--json"]
    words += ["--output", home / "eval", *more]
    out = subprocess.run(list(map(str, words)), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])["figures"], (home / "eval/table.md").read_text()


def test_killed_in_reinforcement_and_resumed_equals_unbroken(home):
    args = ["--resume", "auto"]
    run(home, *args, "--model_tag", "whole")
    broken = command(home, *args, "--model_tag", "killed")
    process = subprocess.Popen(broken, cwd=REPOSITORY, env=environment(home), stdout=subprocess.DEVNULL)
    log = home / "checkpoints/agent/killed/metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # still running when killed
    assert "resuming" in run(home, *args, "--model_tag", "killed")
    assert metrics(home, "agent", "killed") == metrics(home, "agent", "whole")


def test_two_processes_learn_what_one_does(home):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.agent_train")
    args = ["--dtype", "float32", "--eval_every", 0]
    one = run(home, *args, "--model_tag", "one")
    two = run(home, *args, "--model_tag", "two", module=torchrun)
    assert next(line for line in one.splitlines() if line.startswith("oracle")) in two
    for a, b in zip(metrics(home, "agent", "one")[:2], metrics(home, "agent", "two")[:2], strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-6) and a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_the_config_is_valid():
    from scripts.agent_train import Config

    config = load_config(Config, [str(REPOSITORY / "configs/agent_tiny.py")])
    assert config.algorithm == "ppo" and config.reward_evidence == config.reward_economy == 0
