"""Small training runs by the real command, with any number of ranks: to compare, to kill, to go on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.report import read_metrics

REPOSITORY = Path(__file__).parents[1]
SHAPE = "--block_pattern MT --d_model 32 --head_dim 16 --d_state 16 --mamba_head_dim 16"
SIZES = "--max_seq_len 32 --total_batch_size 256 --device_batch_size 4 --dtype float32 --eval_every 0 --log_every 1000"


@dataclass
class Runs:
    """Of scripts.base_train in a base directory with a small text and its tokenizer."""

    home: Path
    flags: str = ""

    def prepare(self) -> Runs:
        rng = random.Random(0)
        words = ["river", "mountain", "the", "of", "old", "town", "bridge", "was", "built", "1987"]
        texts = [{"title": f"Place {i}", "text": " ".join(rng.choices(words, k=40))} for i in range(120)]
        self.home.mkdir(parents=True, exist_ok=True)
        self.text.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        command = [sys.executable, "-m", "scripts.tok_train", "--input", str(self.text), "--vocab_size", "300"]
        subprocess.run(command, cwd=REPOSITORY, env=self.env, check=True, capture_output=True)
        return self

    @property
    def text(self) -> Path:
        return self.home / "text.jsonl"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "NANOCHAT_BASE_DIR": str(self.home), "OMP_NUM_THREADS": "1"}

    def directory(self, tag: str) -> Path:
        return self.home / "checkpoints/base" / tag

    def start(self, tag: str, flags: str, ranks: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
        """ranks 0: without torchrun."""
        module = ["-m", "scripts.base_train", "--input", str(self.text), "--model_tag", tag]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        if ranks:
            launch += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
        command = [
            sys.executable,
            *launch,
            *module,
            *SHAPE.split(),
            *SIZES.split(),
            *self.flags.split(),
            *flags.split(),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.env, start_new_session=True, **pipes)

    def run(self, tag: str, flags: str, ranks: int = 0) -> list[float]:
        """To its end; the losses of all its steps."""
        process = self.start(tag, flags, ranks)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors[-3000:])
        return self.losses(tag)

    def losses(self, tag: str) -> list[float]:
        return [row["loss"] for row in read_metrics(self.directory(tag) / "metrics.jsonl")]

    def wait_for(self, tag: str, steps: int, process: subprocess.Popen[str], seconds: float = 120) -> bool:
        """Whether the run has logged so many steps before it ended."""
        metrics = self.directory(tag) / "metrics.jsonl"
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
                return True
            time.sleep(0.005)
        return False


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"scripts.base_train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def kill_a_rank(process: subprocess.Popen[str], rng: random.Random) -> None:
    os.kill(rng.choice(ranks_of(process)), signal.SIGKILL)


def largest_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))
