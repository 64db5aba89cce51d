"""All that is measured of faults, load and attack, one after the other, in one line of figures.

    python -m bench.faults --parts training,stages,kb,disk,fuzz,soak --json

Each part is a program of its own, which says what it does: bench.faults_training, bench.faults_stages, bench.faults_kb,
bench.faults_disk and bench.faults_training_disk, bench.fuzz, bench.soak (over the demo's model). With all counts as
they are it takes about an hour on two CPU cores, half of it for the parsers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

from bench.common import print_figures
from nanochat.common import UserError, print0, run_main
from nanochat.config import load_config


@dataclass(kw_only=True)
class Config:
    """Measure what survives."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """Of training, stages, kb, disk, fuzz, soak."""
    kills: int = 200
    """Of processes that write checkpoints, and of such that write knowledge bases."""
    rank_kills: int = 10
    """Of one of two ranks."""
    fuzz: int = 10_000
    """Inputs for each parser."""
    minutes: float = 10.0
    """That the server is asked for."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


PARTS = {
    "training": ["bench.faults_training --kills {kills} --rank_kills {rank_kills}"],
    "stages": ["bench.faults_stages"],
    "kb": ["bench.faults_kb --kills {kills}"],
    "disk": ["bench.faults_disk", "bench.faults_training_disk"],
    "fuzz": ["bench.fuzz --count {fuzz}"],
    "soak": ["bench.soak --home data/demo --clients 20 --minutes {minutes}"],
}
RENAMED = {"kills": "kills_kb", "inputs": "fuzz_inputs", "crashes": "fuzz_crashes"}
ADDED_UP = ("lost", "torn_reads", "reads")  # of checkpoints and of knowledge bases


def figures_of(command: str) -> dict[str, float]:
    print0(f"python -m {command}")
    done = subprocess.run([sys.executable, "-m", *command.split(), "--json"], stdout=subprocess.PIPE, text=True)
    try:
        found = json.loads(done.stdout.splitlines()[-1])["figures"]
    except (IndexError, ValueError, KeyError, TypeError):
        raise UserError(f"{command} ended with {done.returncode} and without figures") from None
    return {RENAMED.get(name, name): value for name, value in found.items()}


def main() -> None:
    config = load_config(Config)
    if unknown := set(config.parts) - set(PARTS):
        raise UserError(f"--parts {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    figures: dict[str, float] = {}
    for part in config.parts:
        for command in PARTS[part]:
            for name, value in figures_of(command.format(**vars(config))).items():
                figures[name] = figures.get(name, 0) + value if name in ADDED_UP else value
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
