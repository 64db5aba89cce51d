"""Training on a disk that fills up: told in one line, the checkpoint before it whole, gone on with once there is room.

    python -m bench.faults_training_disk --json

A disk of 8 MB is mounted for this process alone (in memory; unshare and mount have to be there). It is filled before a
run begins, and while one runs: before its next checkpoint and before its next line of metrics.jsonl.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench._ranks import Runs, largest_difference
from bench.common import on_small_disk, print_figures
from nanochat.checkpoint_manager import list_steps, newest
from nanochat.common import run_main
from nanochat.config import load_config

FLAGS = "--num_steps 60 --save_every 20 --resume auto"


@dataclass
class Config:
    """Fill the disk of a training run."""

    disk: Path | None = None
    """A small file system with nothing on it; one is mounted if not given."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - left))


def refused(process: subprocess.Popen[str], *said: str) -> None:
    _, errors = process.communicate(timeout=120)
    if process.returncode != 2 or errors.count("\n") != 1 or not all(text in errors for text in said):
        raise AssertionError(f"status {process.returncode}: {errors}")


def filled_runs(disk: Path) -> dict[str, float]:
    """How many runs were refused, and the largest difference of what was gone on with to an unbroken run."""
    runs = Runs(disk).prepare()
    expected = runs.run("unbroken", "--num_steps 60 --save_every 1000")
    shutil.rmtree(runs.directory("unbroken"))
    fill(disk, 300_000)  # too little for a checkpoint
    refused(runs.start("full", FLAGS, ranks=0), "checkpoints need", "are free", "make room")
    (disk / "filler").unlink()
    differences = []
    for tag, left in (("checkpoint", 500_000), ("log", 0)):
        process = runs.start(tag, FLAGS, ranks=0)
        if not runs.wait_for(tag, 22, process):
            raise AssertionError(process.communicate()[1])
        fill(disk, left)
        refused(process, str(runs.directory(tag)), "--resume auto")
        if list_steps(runs.directory(tag)) != [20]:
            raise AssertionError(f"{list_steps(runs.directory(tag))}")
        newest(runs.directory(tag), with_optimizer=True)
        (disk / "filler").unlink()
        differences.append(largest_difference(expected, runs.run(tag, FLAGS)))
        shutil.rmtree(runs.directory(tag))
    return {"refused_runs": 1 + len(differences), "resumed_max_loss_diff": max(differences)}


def main() -> None:
    config = load_config(Config)
    if config.disk is None:
        sys.exit(on_small_disk("8M", "bench.faults_training_disk", sys.argv[1:]))
    print_figures(filled_runs(config.disk), config.json)


if __name__ == "__main__":
    run_main(main)
