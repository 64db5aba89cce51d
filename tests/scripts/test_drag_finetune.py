"""D-RAG's two phases, run as users run them, on a tiny world."""

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
import torch
from safetensors.torch import load_file

from nanochat.checkpoint_manager import BESIDE, checkpoint_root, save_checkpoint
from nanochat.config import load_config
from nanochat.kg.drag import load_drag
from nanochat.kg.drag_data import ask, read_all
from nanochat.kg.gnn import FactRetriever
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.training import rows_per_step
from scripts.drag_finetune import Config
from tasks.example_world import generate_world

REPOSITORY = Path(__file__).parents[2]
SHORT = [
    "--max_seq_len",
    256,
    "--total_batch_size",
    1024,
    "--device_batch_size",
    2,
    "--num_steps",
    8,
    "--save_every",
    2,
]
SHORT += ["--pool", 6, "--k_facts", 3, "--num_val", 6, "--eval_every", 4, "--width", 16, "--log_every", 1]


@pytest.fixture(scope="module")
def home(tmp_path_factory, make_model, small_tokenizer) -> Path:
    """A base directory with a graph, questions, a retriever of phase 1 and a model of source "rag"."""
    home = tmp_path_factory.mktemp("home")
    world = generate_world(80, seed=1)
    (home / "graph.txt").write_text("".join("|".join(fact) + "\n" for fact in world.triples))
    lines = [json.dumps(query) + "\n" for query in world.multihop["train"][:60]]
    lines.append('{"id": "x", "query": "who is Nobody Atall?", "answers": ["Nothing"], "doc_ids": []}\n')
    (home / "questions.jsonl").write_text("".join(lines))
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ.get("NANOCHAT_BASE_DIR"), str(home)
    save_checkpoint(checkpoint_root("rag", "tiny"), 1, make_model(small_tokenizer.vocab_size), small_tokenizer, {})
    os.environ.pop("NANOCHAT_BASE_DIR")
    if before is not None:
        os.environ["NANOCHAT_BASE_DIR"] = before
    run(home, "--phase", 1, module="scripts.kg_prepare", args=["build", "--triples", home / "graph.txt"])
    text = run(home, "--phase", 1, "--num_epochs", 4)
    assert "1 questions name no entity of the graph, and are left out" in text and "path_recall@10" in text
    return home


def command(home, *more, module="scripts.drag_finetune", args=None) -> list[str]:
    where = ["--graph", home / "kg"]
    own = args + where if args else [*where, "--questions", home / "questions.jsonl", *SHORT, *more]
    return [sys.executable, "-m", module, *map(str, own)]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def run(home, *more, status=0, **how) -> str:
    done = subprocess.run(
        command(home, *more, **how), cwd=REPOSITORY, env=environment(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr[-6000:]
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def metrics(home, tag) -> list[dict]:
    lines = (home / "checkpoints/drag" / tag / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "elapsed", "tokens_per_s")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


def weights(home, tag, step=8) -> dict[str, torch.Tensor]:
    folder = home / f"checkpoints/drag/{tag}/step_{step:06d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / BESIDE)}


def test_both_phases_then_killed_and_resumed(home):
    text = run(home, "--phase", 2, "--model_tag", "whole", "--retriever_weight", 0)
    assert "generator 4/8" in text and "joint 6/8" in text and "settle 8/8" in text
    logged = metrics(home, "whole")
    assert len(logged) == 8 and {"hits1", "hit", "f1", "em", "val_facts_kept"} <= logged[-1].keys()
    assert (home / "checkpoints/drag/whole/best").is_dir() and list((home / "checkpoints/drag/whole").glob("*.png"))
    queries = ["--systems", "drag", "--model_tag", "whole", "--queries", home / "questions.jsonl"]
    run(home, module="scripts.rag_eval", args=[*queries, "--output", home / "eval"])
    figures = json.loads((home / "eval/results.json").read_text())["figures"]
    assert figures["n"] == 61 and 0 < figures["drag_facts_kept"] <= 3 and figures["drag_prompt_tokens"] > 10
    assert {"drag_hits1", "drag_hit", "drag_set_f1", "drag_set_em", "drag_em", "drag_f1"} <= figures.keys()
    answers = [json.loads(line)["drag"] for line in (home / "eval/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 61 and answers[-1] == ""  # a question that names no entity
    # the answers' loss alone has moved the retriever
    start, after = FactRetriever.load(home / "fact_retriever").state_dict(), weights(home, "whole")
    assert any(not torch.equal(tensor, after[f"retriever.{name}"]) for name, tensor in start.items())

    killed = subprocess.Popen(
        command(home, "--phase", 2, "--model_tag", "killed", "--retriever_weight", 0, "--resume", "auto"),
        cwd=REPOSITORY,
        env=environment(home),
        stdout=subprocess.DEVNULL,
    )
    log = home / "checkpoints/drag/killed/metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run(home, "--phase", 2, "--model_tag", "killed", "--retriever_weight", 0, "--resume", "auto")
    assert metrics(home, "killed") == logged
    again = weights(home, "killed")
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())


@pytest.mark.parametrize("sampler", ["none", "top_k"])
def test_a_cascade_leaves_the_retriever_as_it_is_and_the_others_do_not(home, sampler):
    run(
        home,
        "--phase",
        2,
        "--model_tag",
        sampler,
        "--sampler",
        sampler,
        "--balance",
        "gradient_norm",
        "--fact_price",
        0.1,
    )
    start, after = FactRetriever.load(home / "fact_retriever").state_dict(), weights(home, sampler)
    same = all(torch.equal(tensor, after[f"retriever.{name}"]) for name, tensor in start.items())
    assert same == (sampler == "none")


def test_two_processes_learn_as_one_does(home):
    # without chance in the gates and the words: each process draws its own
    common = ["--phase", 2, "--sampler", "none", "--dtype", "float32"]
    run(home, *common, "--model_tag", "one")
    argv = command(home, *common, "--model_tag", "two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv[1:]]
    subprocess.run(torchrun, cwd=REPOSITORY, env=environment(home), check=True, capture_output=True)
    one, two = weights(home, "one"), weights(home, "two")
    assert all(torch.allclose(tensor, two[name], atol=2e-4) for name, tensor in one.items())


def test_a_model_of_transformers_learns_by_lora_and_resumes(home, small_tokenizer):
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from nanochat.hf_tokenizer import to_hf_tokenizer

    shape = {"vocab_size": 330, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    tokens = {"bos_token_id": 300, "eos_token_id": 301, "pad_token_id": None}
    config = transformers.NemotronHConfig(
        hybrid_override_pattern="M*-", intermediate_size=48, **shape, **mamba, **tokens
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(home / "nemotron")
    to_hf_tokenizer(small_tokenizer, 512).save_pretrained(home / "nemotron")
    common = ["--phase", 2, "--generator", f"hf:{home / 'nemotron'}", "--model_tag", "hf", "--num_steps", 4]
    common += ["--dtype", "float32", "--lm_lr", 1e-3, "--eval_every", 0, "--gradient_checkpointing", "true"]
    common += ["--pool", 30, "--k_facts", 30, "--settle_frac", 0]  # so that there is an answer among them
    text = run(home, *common)
    assert "joint 4/4" in text and "of them learned" in text
    root = home / "checkpoints/drag/hf"
    adapters = lambda step: load_file(root / f"step_{step:06d}/adapter_model.safetensors")  # noqa: E731
    after, beside, logged = adapters(4), load_file(root / f"step_000004/{BESIDE}"), metrics(home, "hf")
    assert any(not torch.equal(tensor, adapters(2)[name]) for name, tensor in after.items())
    shutil.rmtree(root / "step_000004")
    run(home, *common, "--resume", "auto")
    assert metrics(home, "hf") == logged
    assert all(torch.equal(tensor, adapters(4)[name]) for name, tensor in after.items())
    again = load_file(root / f"step_000004/{BESIDE}")
    assert all(torch.equal(tensor, again[name]) for name, tensor in beside.items())
    drag, _ = load_drag(root, Graph.load(home / "kg"))
    batch = ask(drag.graph, Linker(drag.graph), read_all([home / "questions.jsonl"], 5), 3, 100, 4096)[0].batch([0, 1])
    assert len(drag.answer(batch, ["who?", "what?"])) == 2


@pytest.mark.parametrize("name", ["drag_tiny", "drag_metaqa", "drag_hybrid_d20"])
def test_recipes_are_settings_of_this_script(name):
    config = load_config(Config, [str(REPOSITORY / f"configs/{name}.py"), "--phase", "2"])
    assert config.k_facts <= config.pool and rows_per_step(config, 8) >= 8


def test_what_is_missing_is_one_line(home, tmp_path):
    error = run(home, "--phase", 2, "--fact_retriever", tmp_path, status=2)
    assert "has no retriever" in error
    error = run(home, "--phase", 2, "--balance", "gradient_norm", "--retriever_weight", 0, status=2)
    assert "give it a --retriever_weight" in error
    error = run(home, "--phase", 2, "--generator", "here", status=2)
    assert "write hf:PATH" in error
    error = run(home, "--phase", 2, "--source", "base", status=2)
    assert "no checkpoint of source 'base'" in error
    (tmp_path / "none.jsonl").write_text('{"id": "x", "query": "who is Nobody Atall?", "answers": ["A"]}\n')
    error = run(home, "--phase", 1, "--questions", tmp_path / "none.jsonl", status=2)
    assert "no question names an entity of the graph" in error
