"""Search while answering, learned by example and by reward: the command, run as users run it, on a tiny world."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import checkpoint_root, load_model, save_checkpoint
from nanochat.config import load_config
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import build_knowledge_base
from tasks.example_world import generate_world

REPOSITORY = Path(__file__).parents[2]
TINY = ["--max_seq_len", 384, "--total_batch_size", 1536, "--max_doc_length", 40, "--top_k_per_hop", 1]
TINY += ["--max_tokens", 40, "--eval_every", 4, "--eval_questions", 6, "--init_lr_frac", 1, "--num_steps", 40]
REWARDS = ["--rl_steps", 6, "--group_size", 3, "--queries_per_step", 4, "--save_every", 2, "--min_valid", 0]


@pytest.fixture(scope="module")
def home(tmp_path_factory, make_model, small_tokenizer) -> Path:
    """A base directory with a world, and a model of source "rag" that knows nothing."""
    home = tmp_path_factory.mktemp("home")
    world = generate_world(60, seed=1)
    build_knowledge_base(map(Document.from_dict, world.documents), home / "ex/knowledge_base", "bm25")
    (home / "ex/queries").mkdir()
    files = {"multihop_train": world.multihop["train"], "train": world.questions["train"][:40]}
    for name, queries in (files | {"unanswerable_train": world.unanswerable["train"]}).items():
        lines = "".join(json.dumps(query) + "\n" for query in queries)
        (home / f"ex/queries/{name}.jsonl").write_text(lines)
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ.get("NANOCHAT_BASE_DIR"), str(home)
    for tag in ("tiny", "whole", "killed", "one", "two", "ppo"):
        save_checkpoint(checkpoint_root("rag", tag), 1, make_model(small_tokenizer.vocab_size), small_tokenizer, {})
    os.environ.pop("NANOCHAT_BASE_DIR")
    if before is not None:
        os.environ["NANOCHAT_BASE_DIR"] = before
    return home


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def command(home, *args, module=("scripts.refrag_finetune",)) -> list[str]:
    base = ["--knowledge_base", home / "ex/knowledge_base"]
    return [sys.executable, "-m", *map(str, [*module, *base, *TINY, *REWARDS, *args])]


def run(home, *args, status=0, **more) -> str:
    done = subprocess.run(
        command(home, *args, **more), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr[-8000:]
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def metrics(home, source, tag):
    lines = (home / "checkpoints" / source / tag / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "elapsed", "tokens_per_s")} for line in lines
    ]


def test_example_then_reward(home, monkeypatch):
    out = run(home, "--model_tag", "tiny")
    assert "multihop_train.jsonl" in out and "reinforce" in out
    supervised = metrics(home, "refrag", "tiny")
    assert len(supervised) == 40 and {"val_loss", "em", "evidence", "searches", "answered"} <= set(supervised[-1])
    assert supervised[-1]["searches"] > 0  # it has learned that much
    rewarded = metrics(home, "refrag_rl", "tiny")
    wanted = {"reward", "answer", "evidence", "economy", "valid", "searches", "documents", "length"}
    assert len(rewarded) == 6 and all(wanted <= set(row) for row in rewarded)
    learned = [row for row in rewarded if "kl" in row]  # in the others all answers were as good
    assert learned[0]["kl"] == pytest.approx(0, abs=1e-3)  # it begins as the supervised model
    assert learned[-1]["kl"] > 0 and learned[-1]["entropy"] > 0 and any(row["searches"] > 0 for row in rewarded)
    assert "val_evidence" in rewarded[3] and "em" in rewarded[3]
    run_dir = home / "checkpoints/refrag_rl/tiny"
    written = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    assert {row["iteration"] for row in written} == set(range(6))
    assert any(line.startswith("search: ") for row in written for line in row["written"])
    assert (run_dir / "figures.png").stat().st_size > 5000 and "figures.png" in (run_dir / "report.md").read_text()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    assert load_model("refrag_rl", model_tag="tiny")[2]["step"] == 6
    assert load_model("refrag_rl", model_tag="tiny/best")[2]["step"] in (4, 6)
    evaluate = ["--systems", "rag:refrag,refrag:refrag,refrag:refrag_rl", "--model_tag", "tiny", "--num_questions", 8]
    evaluate += ["--queries", home / "ex/queries/multihop_train.jsonl", "--output", home / "eval", "--json"]
    words = [sys.executable, "-m", "scripts.rag_eval", "--knowledge_base", home / "ex/knowledge_base", *evaluate]
    out = subprocess.run(list(map(str, words)), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    figures = json.loads(out.stdout.splitlines()[-1])["figures"]
    assert figures["refrag:refrag_searches"] > 0 and "refrag:refrag_rl_evidence" in figures
    table = (home / "eval/table.md").read_text()
    assert "searching (refrag_rl)" in table and "| searches | documents |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    both = ",".join(str(home / f"ex/queries/{name}.jsonl") for name in ("multihop_train", "unanswerable_train"))
    evaluate[1], evaluate[evaluate.index("--queries") + 1] = "refrag:refrag", both
    words = [sys.executable, "-m", "scripts.rag_eval", "--knowledge_base", home / "ex/knowledge_base", *evaluate]
    out = subprocess.run(list(map(str, words)), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    wanted = {f"refrag:refrag_{name}" for name in ("abstention_precision", "abstention_recall", "false_refusal")}
    assert wanted <= set(json.loads(out.stdout.splitlines()[-1])["figures"])
    table = (home / "eval/table.md").read_text()
    assert "| false refusals |" in table and len({line.count("|") for line in table.splitlines()}) == 1


def test_killed_in_reinforcement_and_resumed_equals_unbroken(home):
    args = ["--resume", "auto", "--algorithm", "grpo", "--branch", "true"]
    run(home, *args, "--model_tag", "whole")
    broken = command(home, *args, "--model_tag", "killed")
    process = subprocess.Popen(broken, cwd=REPOSITORY, env=environment(home), stdout=subprocess.DEVNULL)
    log = home / "checkpoints/refrag_rl/killed/metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # still running when killed
    assert "resuming" in run(home, *args, "--model_tag", "killed")
    assert metrics(home, "refrag_rl", "killed") == metrics(home, "refrag_rl", "whole")
    logs = [(home / f"checkpoints/refrag_rl/{tag}/rollouts.jsonl").read_text() for tag in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_two_processes_learn_what_one_does(home):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.refrag_finetune")
    args = ["--dtype", "float32", "--eval_every", 0]
    run(home, *args, "--model_tag", "one")
    run(home, *args, "--model_tag", "two", module=torchrun)
    for a, b in zip(metrics(home, "refrag_rl", "one")[:2], metrics(home, "refrag_rl", "two")[:2], strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-6) and a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_ppo_with_more_updates_and_from_a_supervised_model(home, monkeypatch):
    run(home, "--model_tag", "ppo", "--use_rewards", "false")
    assert not (home / "checkpoints/refrag_rl/ppo").exists()
    args = ["--source", "refrag", "--model_tag", "ppo", "--algorithm", "ppo", "--updates", 2]
    run(home, *args)
    rows = metrics(home, "refrag_rl", "ppo")
    assert rows[0]["reward"] == rows[1]["reward"] and rows[0]["reward"] != rows[2]["reward"]  # two steps on each
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    assert load_model("refrag_rl", model_tag="ppo")[0].value_head is not None
    stopped = run(home, *args, "--min_valid", 1.1, status=2)
    assert "collapsed" in stopped and "best checkpoint" in stopped


def test_bad_input_is_one_line(home, tmp_path):
    build_knowledge_base([Document("a", "", "x")], tmp_path / "kb", "bm25")
    assert "give --queries" in run(home, "--knowledge_base", tmp_path / "kb", status=2)
    assert "max_hops" in run(home, "--max_hops", -1, status=2)
    assert "save_every" in run(home, "--source", "refrag", "--model_tag", "tiny", "--updates", 4, status=2)


@pytest.mark.parametrize("name", ["refrag_tiny", "refrag_hybrid_d20"])
def test_configs_are_valid_settings(name):
    from scripts.refrag_finetune import Config

    assert load_config(Config, [str(REPOSITORY / f"configs/{name}.py")]).top_k_per_hop > 0
