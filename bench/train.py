"""Training speed: tokens/s of whole steps (forward, backward, optimizer), and the share of the machine's matrix rate.

    python -m bench.train --json
    python -m bench.train --peer PATH_TO_karpathy_nanochat --json

Every model trains in a process of its own, and they take turns in one sitting. --peer sets upstream nanochat's model
and optimizer, from a checkout of its repository, beside ours: attention only, same width, depth, vocabulary, rows and
length. The matrix rate is measured in the same run, on square products of 1,024 in the same type.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.common import print_figures, start, table
from nanochat.common import UserError, keep_freed_memory, run_main
from nanochat.config import load_config
from nanochat.model.lm import HybridLM, ModelConfig, default_block_pattern
from nanochat.optim import Optimizers
from nanochat.training import TrainConfig, autocast, lr_scale

REPOSITORY = Path(__file__).parents[1]


@dataclass(kw_only=True)
class Config:
    """Time training steps."""

    peer: Path | None = None
    """A checkout of karpathy/nanochat to set beside ours."""
    depth: int = 4
    """Blocks."""
    width: int = 256
    """Model width, in heads of 64."""
    vocabulary: int = 4096
    """Tokens."""
    tokens: int = 4096
    """Tokens in a step."""
    lengths: list[int] = field(default_factory=lambda: [512, 2048])
    """Lengths of the rows."""
    steps: int = 3
    """Steps in one timed round."""
    rounds: int = 5
    """Timed rounds; the median counts."""
    loss_steps: int = 0
    """Steps of training to compare the losses of bfloat16 and float32 after; 0: leave that out. 500 take minutes."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def shape_of(pattern: str, config: Config) -> ModelConfig:
    """With nanochat's MLP, so that sizes and work are the same."""
    return ModelConfig.from_depth(config.vocabulary, None, pattern, config.width, 64, mlp="relu2")


class OurTrainer:
    """Whole steps on random tokens."""

    def __init__(self, pattern: str, dtype: str, length: int, config: Config):
        torch.manual_seed(0)
        self.model = HybridLM(shape_of(pattern, config))
        self.optimizers = Optimizers(self.model)
        self.dtype = getattr(torch, dtype)

    def step(self, tokens: torch.Tensor) -> float:
        with autocast(torch.device("cpu"), self.dtype):
            loss = self.model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step()
        self.optimizers.zero_grad()
        return loss.item()


def random_rows(config: Config, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocabulary, (config.tokens // length, length + 1), generator=generator)


def serve(pattern: str, dtype: str, length: int, config: Config) -> None:
    """Be a worker: answer numbers of steps with seconds."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    trainer, tokens = OurTrainer(pattern, dtype, length, config), random_rows(config, length)
    trainer.step(tokens)
    trainer.step(tokens)
    print(f"ready {trainer.model.num_parameters()}", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            trainer.step(tokens)
        print(time.perf_counter() - began, flush=True)


class Worker:
    """A process that trains on demand."""

    def __init__(self, name: str, command: list[str], path: Path):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=path,
        )
        self.parameters = int(self._answer("ready").split()[1])

    def _answer(self, beginning: str = "") -> str:
        for line in self.process.stdout:
            if beginning and line.startswith(beginning):
                return line
            if not beginning:
                try:
                    float(line)
                except ValueError:
                    continue
                return line
        raise UserError(f"the worker {self.name} ended; its message stands above")

    def seconds(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def matrix_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of square matrix products, the best of several."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def loss_gap(config: Config) -> float:
    """How far the loss in bfloat16 is from that in float32 after the same steps, as a share. On sequences of a random
    grammar (each token one of 8 that may follow the one before), so that there is something to learn, with the learning
    rate brought down at the end as in training."""
    generator = torch.Generator().manual_seed(1)
    following = torch.randint(0, config.vocabulary, (config.vocabulary, 8), generator=generator)
    length = config.lengths[0]
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        trainer = OurTrainer(default_block_pattern(config.depth), dtype, length, config)
        generator.manual_seed(2)
        losses[dtype] = []
        for step in range(config.loss_steps):
            trainer.optimizers.set_lr_scale(lr_scale(TrainConfig(), step, step / config.loss_steps))
            rows = config.tokens // length
            choices = torch.randint(0, 8, (rows, length), generator=generator)
            tokens = [torch.randint(0, config.vocabulary, (rows,), generator=generator)]
            for i in range(length):
                tokens.append(following[tokens[-1], choices[:, i]])
            losses[dtype].append(trainer.step(torch.stack(tokens, dim=1)))
    ends = {dtype: statistics.mean(curve[-20:]) for dtype, curve in losses.items()}
    print(f"\nloss after {config.loss_steps} steps (mean of the last 20): {ends}", flush=True)
    return abs(ends["bfloat16"] / ends["float32"] - 1)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        pattern, dtype, length = sys.argv[2:5]
        serve(pattern, dtype, int(length), load_config(Config, sys.argv[5:]))
        return
    config = load_config(Config)
    start(config.threads)
    if config.peer and not (config.peer / "nanochat" / "gpt.py").is_file():
        raise UserError(f"--peer {config.peer}: no nanochat/gpt.py there; git clone karpathy/nanochat")
    settings = [f"--{name}={getattr(config, name)}" for name in ("width", "vocabulary", "tokens", "threads")]
    patterns = {"T": "T" * config.depth, "hybrid": default_block_pattern(config.depth)}
    rates_of_products = {d: matrix_rate(getattr(torch, d)) for d in ("float32", "bfloat16")}
    rows, rates = [], {}
    for length in config.lengths:
        workers = [
            Worker(
                f"{name} {dtype}", ["-m", "bench.train", "--worker", pattern, dtype, str(length), *settings], REPOSITORY
            )
            for name, pattern in patterns.items()
            for dtype in ("float32", "bfloat16")
        ]
        if config.peer:
            shape = [config.depth, config.width, config.vocabulary, config.tokens // length, length]
            for name, compiled in (("peer eager", 0), ("peer compiled", 1)):
                command = [str(REPOSITORY / "bench" / "train_peer.py"), *map(str, [*shape, compiled, config.threads])]
                workers.append(Worker(name, command, config.peer.resolve()))
        taken: dict[str, list[float]] = {w.name: [] for w in workers}
        for _ in range(config.rounds):
            for worker in workers:
                taken[worker.name].append(worker.seconds(config.steps))
        for worker in workers:
            rate = config.tokens * config.steps / statistics.median(taken[worker.name])
            rates[worker.name, length] = rate
            share: float | str = "-"
            kind, _, dtype = worker.name.partition(" ")
            if kind in patterns:
                model = HybridLM(shape_of(patterns[kind], config))
                share = rate * model.flops_per_token(length) / rates_of_products[dtype]
                rates[f"{worker.name} share", length] = share
            rows.append([length, worker.name, worker.parameters / 1e6, rate, share])
            worker.close()
    products = ", ".join(f"{d} {r / 1e9:.0f}" for d, r in rates_of_products.items())
    print(f"\nwidth {config.width}, {config.tokens} tokens a step; products of 1,024 in GFLOP/s: {products}\n")
    print(table(["length", "model", "M parameters", "tokens/s", "share of the matrix rate"], rows))
    first, last = config.lengths[0], config.lengths[-1]
    figures = {
        "matrix_rate_fp32": rates["T float32 share", first],
        "matrix_rate_bf16": rates["T bfloat16 share", first],
        f"hybrid_over_T_fp32_{last}": rates["hybrid float32", last] / rates["T float32", last],
        f"hybrid_over_T_bf16_{last}": rates["hybrid bfloat16", last] / rates["T bfloat16", last],
    }
    if config.peer:
        best = {length: max(rates["peer eager", length], rates["peer compiled", length]) for length in config.lengths}
        figures["over_peer_T_fp32"] = rates["T float32", first] / best[first]
        figures["over_peer_T_bf16"] = rates["T bfloat16", first] / best[first]
        figures[f"over_peer_hybrid_{last}"] = rates["hybrid float32", last] / best[last]
    if config.loss_steps:
        figures["bf16_loss_gap"] = loss_gap(config)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
