"""Kill, cut short and compare: what training keeps under faults, on as many ranks as there are.

    python -m bench.faults_training --kills 200 --rank_kills 10 --json

kills_checkpoint: SIGKILLs at random moments of a process that writes checkpoints; after each the newest whole one has
to load, be what was written, and be no older than the last that was reported; meanwhile another process reads. Then
real runs of scripts.base_train by torchrun on the CPU: one, two and one ranks after each other, a rank killed at a
random step, and the losses of DDP and FSDP2 beside those of one process.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench._ranks import Runs, kill_a_rank, largest_difference
from bench.common import print_figures
from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Config:
    """Measure what training keeps under faults."""

    kills: int = 200
    """Of processes that write checkpoints."""
    rank_kills: int = 10
    """Of one of two ranks, each in a run of its own."""
    steps: int = 50
    """Compared between DDP, FSDP2 and one process."""
    seed: int = 0
    """Draws the moments."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- checkpoints


def small_model(vocab_size: int) -> HybridLM:
    return HybridLM(ModelConfig.from_depth(vocab_size, 2, "MT", 32, 16, d_state=16, mamba_head_dim=16))


def checkpoint_kills(count: int, root: Path, seed: int = 0) -> dict[str, float]:
    """Kills a writer `count` times. Steps go up by one; the weights of step n are all n, and so is its optimizer's
    state, so that a mixture of two would show."""
    tokenizer = Tokenizer.train(["some text to make a tokenizer of"] * 3, 280)
    model = small_model(tokenizer.vocab_size)
    rng = random.Random(seed)
    seen = {"kills_checkpoint": 0, "lost": 0, "torn_reads": 0, "reads": 0}

    def consistent(step: int, loaded: HybridLM, meta: dict, state: dict[str, torch.Tensor]) -> bool:
        values = {p.unique().item() if p.unique().numel() == 1 else None for p in loaded.parameters()}
        return values == {float(step)} and meta["value"] == step and state["embed.weight/step"].item() == step

    def write_on(first: int, acknowledged: int) -> None:
        step = first
        while True:
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(step)
            state = {"embed.weight/step": torch.tensor(float(step))}
            # now and then what a new run without --resume does: it replaces a checkpoint of the same step
            for _ in range(1 + (step % 3 == 0)):
                save_checkpoint(root, step, model, tokenizer, {"value": step}, state)
            os.write(acknowledged, step.to_bytes(8, "little"))
            step += 1

    def read() -> int:
        """The newest step; counts what is not whole."""
        try:
            loaded, _, meta, state = load_checkpoint(root)
        except UserError as error:
            if newest or "no complete checkpoint" not in str(error):  # none yet is no fault
                seen["torn_reads"] += 1
                print(error)
            return 0
        seen["reads"] += 1
        seen["torn_reads"] += not consistent(meta["step"], loaded, meta, state)
        return meta["step"]

    newest = 0
    for _ in range(count):
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            try:
                write_on(newest + 1, writable)
            finally:
                os._exit(1)
        os.close(writable)
        until = time.monotonic() + rng.uniform(0.0, 0.25)
        while time.monotonic() < until:
            read()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(readable, "rb") as pipe:
            told = pipe.read()
        last = int.from_bytes(told[-8:], "little") if told else newest
        found = read()
        seen["kills_checkpoint"] += 1
        seen["lost"] += found < last
        newest = found
    return {**seen, "checkpoints": newest}


# --- ranks


def resharding(runs: Runs) -> float:
    """Largest difference of the losses, and 0 only if the weights are equal too: one rank, two, one, resumed each time,
    beside one process that was never interrupted."""
    whole = runs.run("whole", "--num_steps 60 --save_every 20")
    for steps, ranks in ((20, 1), (40, 2), (60, 1)):
        # the same schedule in each part: the learning rate does not come down
        runs.run("parts", f"--num_steps {steps} --save_every 20 --warmdown_frac 0 --resume auto", ranks)
    constant = runs.run("constant", "--num_steps 60 --save_every 20 --warmdown_frac 0")
    assert len(whole) == len(constant)
    return largest_difference(constant, runs.losses("parts"))


def killed_ranks(runs: Runs, count: int, seed: int = 0) -> dict[str, float]:
    """One of two ranks is killed at a random step, with --max-restarts 1 every second time; else the job has to end,
    and is started again with --resume auto. At the end the losses have to be those of a run that nobody killed."""
    flags = "--num_steps 60 --save_every 7 --resume auto"
    expected = runs.run("unbroken", flags, 2)
    rng = random.Random(seed)
    figures = {"kills_rank": 0, "restarted": 0, "ended": 0, "kill_max_loss_diff": 0.0}
    for number in range(count):
        tag, restarts = f"killed{number}", number % 2
        process = runs.start(tag, flags, 2, restarts)
        if not runs.wait_for(tag, rng.randrange(1, 50), process):
            raise RuntimeError(f"the run ended before a rank could be killed: {process.communicate()[1][-2000:]}")
        kill_a_rank(process, rng)
        figures["kills_rank"] += 1
        process.communicate(timeout=180)
        if restarts:
            figures["restarted"] += process.returncode == 0
        else:
            figures["ended"] += process.returncode != 0
            runs.run(tag, flags, 2)
        difference = largest_difference(expected, runs.losses(tag))
        figures["kill_max_loss_diff"] = max(figures["kill_max_loss_diff"], difference)
    return figures


def compared(runs: Runs, steps: int) -> dict[str, float]:
    flags = f"--num_steps {steps} --save_every 1000"
    one = runs.run("one", flags)
    return {
        "ddp_max_loss_diff": largest_difference(one, runs.run("ddp", flags, 2)),
        "fsdp_max_loss_diff": largest_difference(one, runs.run("fsdp", f"{flags} --shard true", 2)),
    }


def main() -> None:
    config = load_config(Config)
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    with tempfile.TemporaryDirectory() as folder:
        figures = checkpoint_kills(config.kills, Path(folder) / "checkpoints", config.seed)
        runs = Runs(Path(folder) / "runs").prepare()
        figures["reshard_max_loss_diff"] = resharding(runs)
        figures |= compared(runs, config.steps)
        figures |= killed_ranks(runs, config.rank_kills, config.seed)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
