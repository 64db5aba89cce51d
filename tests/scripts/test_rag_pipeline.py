"""The main job, command by command, on a world of 60 documents and models of a few thousand parameters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = ["--max_seq_len", "256", "--total_batch_size", "512", "--device_batch_size", "2", "--eval_every", "2"]
RAG = ["--base_tasks", "", "--retriever_type", "bm25", "--num_steps", "4", "--questions_per_document", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base directory with example data, tokenizer, and base and mid checkpoints."""
    home = tmp_path_factory.mktemp("home")
    ok(run(home, "scripts.prepare_rag_dataset", "--output", home / "ex", "--num_documents", 60))
    ok(run(home, "scripts.tok_train", "--input", home / "ex/text/train.jsonl", "--vocab_size", 400))
    shape = ["--block_pattern", "MT", "--d_model", 32, "--head_dim", 16, "--d_state", 16, "--model_tag", "tiny"]
    text = ["--input", home / "ex/text/train.jsonl", "--num_steps", 2, "--copy_warmup_steps", 2]
    ok(run(home, "scripts.base_train", *text, *shape, *TINY))
    talks = ["--tasks", "", "--conversations", home / "ex/conversations/train.jsonl", "--num_steps", 3]
    ok(run(home, "scripts.chat_sft", *talks, *TINY))
    return home


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def command(module: str, *args) -> list[str]:
    return [sys.executable, "-m", module, *map(str, args)]


def run(home: Path, module: str, *args) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *args), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True, check=False
    )


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for text in said:
        assert text in done.stderr


def data(home: Path) -> list:
    return ["--knowledge_base", home / "ex/knowledge_base", "--queries", home / "ex/queries/train.jsonl"]


def metrics(home: Path, source: str, tag: str = "tiny") -> list[dict]:
    lines = (home / "checkpoints" / source / tag / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(rows: list[dict]) -> list[tuple]:
    return [(r["step"], r["phase"], r["loss"], r["grad_norm"], r.get("val_loss")) for r in rows]


def test_finetune_evaluate_and_report(home):
    out = ok(run(home, "scripts.rag_finetune", *data(home), *RAG, *TINY, "--curriculum", "1:0.5,1-3:0.5", "--top_k", 3))
    assert "train, 1-3 documents" in out and "left" in out
    rows = metrics(home, "rag")
    assert [r["phase"] for r in rows] == ["1-doc", "1-doc", "1-3-doc", "1-3-doc"]
    assert all("val_loss" in r for r in rows[1::2])
    run_dir = home / "checkpoints/rag/tiny"
    report = (run_dir / "report.md").read_text()
    assert "loss.png" in report and "knowledge_base" in report and (run_dir / "loss.png").stat().st_size > 5000
    assert json.loads((run_dir / "config.json").read_text())["top_k"] == 3
    asked = ["--queries", home / "ex/queries/test.jsonl", "--num_questions", 9, "--output", home / "eval", "--json"]
    out = ok(run(home, "scripts.rag_eval", "--knowledge_base", home / "ex/knowledge_base", *asked))
    figures = json.loads(out.splitlines()[-1])["figures"]
    saved = json.loads((home / "eval/results.json").read_text())["figures"]
    assert figures == saved and figures["n"] == 9 and figures["recall_at_5"] > 0.8
    assert {"closed_em", "rag_f1", "gold_em", "rag_seconds_per_question"} <= set(figures)
    predictions = [json.loads(line) for line in (home / "eval/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 9 and {"closed", "rag", "gold"} <= set(predictions[0])
    assert (home / "eval/table.md").read_text().count("\n") == 5
    assert {"rag_em_low", "rag_em_high", "rag_hallucination", "rag_first_token_ms", "rag_mrr"} <= set(figures)
    for name in (
        "em",
        "f1",
        "contains",
        "recall_at_5",
        "mrr",
        "ndcg10",
        "hallucination",
        "first_token_ms",
        "tokens_per_s",
    ):
        assert figures[f"rag_{name}_low"] <= figures[f"rag_{name}"] <= figures[f"rag_{name}_high"]
    report = (home / "eval/report.md").read_text()
    assert "figures.png" in report and "answers are wrong" in report and "recall.png" in report
    other = ["--systems", "rag,simple,gold", "--positions", 4, "--by_top_k", "1,3", "--latency", 0]
    asked[asked.index("--output") + 1] = home / "other"
    out = ok(run(home, "scripts.rag_eval", "--knowledge_base", home / "ex/knowledge_base", *asked, *other))
    figures = json.loads(out.splitlines()[-1])["figures"]
    places = [figures[f"simple_em_at_place_{n}"] for n in range(1, 6)]
    assert figures["simple_position_spread"] == pytest.approx(max(places) - min(places))
    assert "simple_position_spread_high" in figures and "rag_em_of_3_documents" in figures
    assert (home / "other/place.png").exists() and "rag_first_token_ms" not in figures
    out = ok(run(home, "scripts.rag_eval", "--compare", f"{home / 'eval'},{home / 'other'}"))
    assert out.count("| 9 questions |") == 2 and "| em |" in out  # rag and gold
    refused(run(home, "scripts.rag_eval", "--compare", home / "nowhere"), "nowhere")
    refused(run(home, "scripts.rag_eval", "--knowledge_base", home / "ex/knowledge_base"), "--queries is required")


def test_plan_opens_everything_and_writes_nothing(home):
    out = ok(run(home, "scripts.rag_finetune", *data(home), *RAG, *TINY, "--model_tag", "tiny", "--plan"))
    assert "parameters" in out and "GB memory" in out and "minutes" in out
    assert not list(home.glob("checkpoints/rag/plan*"))


def test_config_file_and_flags(home, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text('base_tasks = []\nretriever_type = "bm25"\nnum_steps = 1\ntop_k = 2\nmax_seq_len = 256\n')
    out = ok(run(home, "scripts.rag_finetune", config, *data(home), *TINY, "--top_k", 4, "--plan"))
    assert "top_k                  = 4" in out and "num_steps              = 1" in out
    config.write_text("base_tasks = []\ntopk = 2\n")
    refused(run(home, "scripts.rag_finetune", config, *data(home)), f"{config}:2", "top_k")


@pytest.mark.parametrize("name", ["rag_tiny", "rag_hybrid_d20", "rag_mamba_d20"])
def test_configs_are_valid_settings(name):
    from nanochat.config import load_config
    from nanochat.model.lm import ModelConfig
    from scripts.rag_finetune import Config

    config = load_config(Config, [str(REPOSITORY / f"configs/{name}.py"), "--device_batch_size", "2"])
    assert config.device_batch_size == 2
    if name != "rag_tiny":
        assert ModelConfig.from_depth(65536, depth=20, block_pattern=config.block_pattern).d_model == 1280


def test_bad_input_is_one_line(home, tmp_path):
    finetune = "scripts.rag_finetune"
    refused(run(home, finetune), "--knowledge_base is required")
    refused(run(home, finetune, "--knowledge_base", tmp_path / "no", *RAG), "no", "nanochat.retrieval")
    refused(run(home, finetune, *data(home), "--tok_k", 3), "--top_k")
    refused(run(home, finetune, *data(home), *RAG[2:], "--model_tag", "nope"), "nope", "tiny")
    refused(run(home, finetune, *data(home), *RAG, "--block_pattern", "T,T"), "block_pattern")
    refused(run(home, finetune, *data(home), *RAG, "--curriculum", "1:2"), "--curriculum")
    refused(run(home, finetune, *data(home), *RAG, "--absent", "20"), "--absent")
    broken = tmp_path / "queries.jsonl"
    broken.write_text('{"id": "1", "query": "who?", "answers": ["x"], "doc_ids": ["nowhere"]}\n{"id": "2"')
    args = ["--knowledge_base", home / "ex/knowledge_base", "--queries", broken]
    refused(run(home, finetune, *args, *RAG), "queries.jsonl:2")
    broken.write_text('{"id": "1", "query": "who?", "answers": ["x"], "doc_ids": ["nowhere"]}\n' * 1)
    refused(run(home, finetune, *args, *RAG), "nowhere")
    # SmolTalk is the default base task: without the hub and without a file, one line names both ways
    done = run(home, finetune, *data(home), "--retriever_type", "bm25", *TINY)
    refused(done, "--smoltalk_path", "hub" if "hub" in done.stderr else "nanochat[hf]")


def test_pattern_without_mamba_is_refused(home):
    shape = ["--block_pattern", "TT", "--d_model", 32, "--head_dim", 16, "--model_tag", "plain", "--num_steps", 1]
    ok(run(home, "scripts.base_train", "--input", home / "ex/text/train.jsonl", *shape, *TINY))
    args = [*data(home), *RAG, *TINY, "--source", "base", "--model_tag", "plain", "--num_steps", 1]
    refused(run(home, "scripts.rag_finetune", *args), "T,T", "M,T", "--allow_transformer")
    ok(run(home, "scripts.rag_finetune", *args, "--allow_transformer"))


def test_killed_and_resumed_equals_unbroken(home):
    args = [*data(home), *RAG, *TINY, "--save_every", 2, "--num_steps", 8, "--curriculum", "1:0.5,5:0.5"]
    args += ["--source", "mid", "--resume", "auto"]
    start = home / "checkpoints/mid"
    for tag in ("whole", "killed"):
        (start / tag).symlink_to(start / "tiny")
    ok(run(home, "scripts.rag_finetune", *args, "--model_tag", "whole"))
    broken = command("scripts.rag_finetune", *args, "--model_tag", "killed")
    process = subprocess.Popen(broken, cwd=REPOSITORY, env=environment(home), stdout=subprocess.DEVNULL)
    log = home / "checkpoints/rag/killed/metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # still running when killed
    out = ok(run(home, "scripts.rag_finetune", *args, "--model_tag", "killed"))
    assert "resuming" in out
    assert curve(metrics(home, "rag", "killed")) == curve(metrics(home, "rag", "whole"))


def test_going_on_from_an_earlier_run_under_a_new_name(home):
    args = [*data(home), *RAG, *TINY, "--num_steps", 2]
    (home / "checkpoints/mid/first").symlink_to(home / "checkpoints/mid/tiny")
    ok(run(home, "scripts.rag_finetune", *args, "--model_tag", "first"))
    before = (home / "checkpoints/rag/first/step_000002/model.safetensors").read_bytes()
    more = [*args, "--source", "rag", "--model_tag", "first"]
    refused(run(home, "scripts.rag_finetune", *more), "--save_tag")
    ok(run(home, "scripts.rag_finetune", *more, "--save_tag", "second"))
    assert (home / "checkpoints/rag/first/step_000002/model.safetensors").read_bytes() == before
    assert metrics(home, "rag", "second")[0]["loss"] < metrics(home, "rag", "first")[0]["loss"]


def test_two_processes_give_the_losses_of_one(home):
    args = [*data(home), *RAG, *TINY, "--num_steps", 6, "--total_batch_size", 1024]
    start = home / "checkpoints/mid"
    for tag in ("one", "two"):
        (start / tag).symlink_to(start / "tiny")
    ok(run(home, "scripts.rag_finetune", *args, "--model_tag", "one"))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.rag_finetune"]
    ok(run(home, *torchrun, *args, "--model_tag", "two"))
    one, two = metrics(home, "rag", "one"), metrics(home, "rag", "two")
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-4
    assert abs(one[-1]["val_loss"] - two[-1]["val_loss"]) < 1e-4


def test_lora_resumed_equals_unbroken_and_is_saved_merged(home):
    pytest.importorskip("peft")
    from nanochat.checkpoint_manager import load_checkpoint

    args = [*data(home), *RAG, *TINY, "--lora_rank", 4, "--init_lr_frac", 1, "--save_every", 2, "--resume", "auto"]
    (home / "checkpoints/mid/lora").symlink_to(home / "checkpoints/mid/tiny")
    args += ["--model_tag", "lora"]
    done = run(home, "scripts.rag_finetune", *args)
    out = ok(done)
    assert not done.stderr
    assert "LoRA of rank 4 on 11 projections" in out
    unbroken = curve(metrics(home, "rag", "lora"))
    base, rag = (load_checkpoint(home / "checkpoints" / of / "lora")[0].state_dict() for of in ("mid", "rag"))
    changed = {name for name in base if not base[name].equal(rag[name])}
    assert len(changed) == 11 and "blocks.0.mixer.out_proj.weight" not in changed
    shutil.rmtree(home / "checkpoints/rag/lora/step_000004")
    refused(run(home, "scripts.rag_finetune", *args, "--lora_rank", 0), "with LoRA", "--model_tag")
    assert "resuming" in ok(run(home, "scripts.rag_finetune", *args))
    assert curve(metrics(home, "rag", "lora")) == unbroken and len(unbroken) == 4
    refused(run(home, "scripts.rag_finetune", *args, "--lora_rank", -1), "--lora_rank")
