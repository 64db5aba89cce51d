"""Every benchmark's real command at a size that takes seconds: it runs, and its last line holds the figures by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def figures_of(module: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", "--json", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])["figures"]


def test_ssm():
    pytest.importorskip("transformers")
    figures = figures_of("ssm", "--width", "64", "--sizes", "1x64,1x128", "--states", "16", "--rounds", "1")
    assert set(figures) == {"over_hf_best_min", "over_hf_256_min", "bf16_over_fp32", "over_sdpa_64", "over_sdpa_128"}
    assert all(value > 0 for value in figures.values())


def test_attention():
    figures = figures_of("attention", "--tokens", "128", "--lengths", "16,64", "--rounds", "1")
    assert set(figures) == {f"over_fused_{d}_{n}" for d in ("float32", "bfloat16") for n in (16, 64)}
