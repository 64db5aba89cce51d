"""Every stage of training killed and gone on with: the same weights, optimizer states and losses, bit for bit.

    python -m bench.faults_stages --json

Each stage is run twice by its real command on a tiny world (whole, and cut: SIGKILL about half way, then --resume
auto), each from what the stage before it made. resume_bit_exact: how many stages' two runs ended with equal files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import print_figures
from nanochat.checkpoint_manager import newest
from nanochat.common import run_main
from nanochat.config import load_config

REPOSITORY = Path(__file__).parents[1]
ROWS = "--max_seq_len 384 --total_batch_size 1536 --device_batch_size 2 --eval_every 0 --log_every 1000"
TEXT = "--input {home}/ex/text/train.jsonl"
BASE = "--knowledge_base {home}/ex/knowledge_base"
STAGES = {  # source of the checkpoints -> module, steps after which the run is killed, settings
    "base": (
        "base_train",
        9,
        f"{TEXT} --block_pattern MT --d_model 32 --head_dim 16 --d_state 16 --num_steps 20 {ROWS}",
    ),
    "mid": (
        "chat_sft",
        5,
        f"--tasks '' --conversations {{home}}/ex/conversations/train.jsonl --num_steps 12 --save_every 4 {ROWS}",
    ),
    "rag": (
        "rag_finetune",
        5,
        f"{BASE} --queries {{home}}/ex/queries/train.jsonl --base_tasks '' --retriever_type bm25 --source mid "
        f"--num_steps 12 --save_every 4 --absent 0.3 {ROWS}",
    ),
    "refrag_rl": (
        "refrag_finetune",
        3,
        f"{BASE} --num_steps 8 --rl_steps 6 --group_size 3 --queries_per_step 4 --save_every 2 --min_valid 0 "
        f"--max_doc_length 40 --top_k_per_hop 1 --max_tokens 40 --init_lr_frac 1 {ROWS}",
    ),
    "drag": (
        "drag_finetune",
        3,
        f"--graph {{home}}/kg --questions {{home}}/ex/queries/multihop_train.jsonl --phase 2 --pool 6 --k_facts 3 "
        f"--width 16 --num_val 0 --num_steps 8 --save_every 2 {ROWS}",
    ),
    "dsi": (
        "dsi_train",
        9,
        "--documents {home}/ex/documents.jsonl --width 32 --layers 1 --vocab_size 500 --num_steps 24 --save_every 5 "
        "--total_batch_size 1024 --eval_every 0 --log_every 1000 --scheme semantic --branches 4",
    ),
}


@dataclass(kw_only=True)
class Config:
    """Kill every stage of training and go on with it."""

    json: bool = False
    """Print the figures as one JSON object in the last line."""


def words(flags: str, home: Path) -> list[str]:
    return [word.replace("''", "") for word in flags.format(home=home).split()]


def start(home: Path, module: str, *flags: str) -> subprocess.Popen[str]:
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(home: Path, module: str, *flags: str) -> None:
    process = start(home, module, *flags)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(flags)}: {errors[-3000:]}")


def prepare(home: Path) -> None:
    run(home, "scripts.prepare_rag_dataset", "--output", f"{home}/ex", "--num_documents", "60")
    run(home, "scripts.tok_train", *words(f"{TEXT} --vocab_size 400", home))
    run(home, "scripts.kg_prepare", *words("build --triples {home}/ex/graph.txt --graph {home}/kg", home))


def cut_short(home: Path, source: str, module: str, kill_after: int, flags: list[str]) -> None:
    process = start(home, module, *flags)
    log = home / f"checkpoints/{source}/cut/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= kill_after):
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{module} ended before it could be killed: {process.communicate()[1][-3000:]}")
    run(home, module, *flags)


def ended_equal(root: Path) -> bool:
    """Whether both runs' last checkpoints and logs are the same."""
    whole, cut = newest(root / "whole"), newest(root / "cut")
    names = {str(file.relative_to(whole)) for file in whole.rglob("*.safetensors")}
    same = whole.name == cut.name and names == {str(file.relative_to(cut)) for file in cut.rglob("*.safetensors")}
    return (
        same
        and _log(root / "whole") == _log(root / "cut")
        and all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)
    )


def _log(run_dir: Path) -> list[dict]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    timed = ("seconds", "elapsed", "tokens_per_s")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def resumed(home: Path) -> dict[str, bool]:
    """Whether each stage's run that was cut short ended as the whole one."""
    found = {}
    for source, (script, kill_after, flags) in STAGES.items():
        module, settings = f"scripts.{script}", words(flags, home)
        if source == "drag":
            first = words(flags.replace("--phase 2", "--phase 1"), home)
            run(home, module, *first)
        run(home, module, *settings, "--model_tag", "whole")
        again = [*settings, "--model_tag", "cut", "--resume", "auto"]
        cut_short(home, source, module, kill_after, again)
        found[source] = ended_equal(home / f"checkpoints/{source}")
        print(f"{source}: {'equal' if found[source] else 'NOT equal'}", flush=True)
    return found


def main() -> None:
    config = load_config(Config)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found = resumed(Path(folder))
    print_figures({"resume_bit_exact": sum(found.values()), "stages": len(found)}, config.json)


if __name__ == "__main__":
    run_main(main)
