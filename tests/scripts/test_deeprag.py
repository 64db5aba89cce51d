"""DeepRAG's five commands on the synthetic world, one after the other, as its users write them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError
from scripts import deeprag

REPOSITORY = Path(deeprag.__file__).parents[1]


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"NANOCHAT_BASE_DIR": str(home / "models"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.deeprag", *words]
    return subprocess.run(
        command, cwd=home, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_all_five_commands(tmp_path):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    missing = run(tmp_path, "train-dsi", "data=synthetic")
    assert (
        missing.returncode != 0
        and "prepare-data data=synthetic" in missing.stderr
        and "Traceback" not in missing.stderr
    )
    for words in (
        ["prepare-data", "data=synthetic", "--num_documents", "60"],
        ["train-dsi", "--config-name=train/dsi_pretrain", "data=synthetic", "model=dsi_small", "training.max_steps=10"],
        ["train-agent", "data=synthetic", "training.max_steps=1", "--queries_per_step", "2"],
        ["train-joint", "data=synthetic", "training.max_steps=2"],
        ["evaluate-model", "data=synthetic", "training.max_steps=5", "--output", "eval"],
    ):
        done = run(tmp_path, *words)
        assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    figures = json.loads((tmp_path / "eval/results.json").read_text())["figures"]
    assert {"closed_em", "rag_em", "dsi_em", "joint_em", "agent_em", "dsi_hits1", "dsi_bm25_hits10"} <= figures.keys()
    checkpoints = tmp_path / "models/checkpoints"
    assert {"base", "dsi", "agent_sft", "agent", "joint"} <= {path.name for path in checkpoints.iterdir()}


def test_settings_as_their_users_write_them():
    folder, words = deeprag.split(
        [
            "--config-name",
            "train/dsi",
            "data=hotpotqa",
            "model=dsi_small",
            "training.max_steps=10",
            "--scheme",
            "title",
        ],
        "--num_steps",
        deeprag.MODELS,
    )
    assert folder == Path("data/deeprag/hotpotqa")
    assert words == ["--width", "128", "--layers", "2", "--num_steps", "10", "--scheme", "title"]
    for wrong in ("data=nq", "model=t5_huge", "training.lr=1"):
        with pytest.raises(UserError):
            deeprag.split([wrong], "--num_steps", deeprag.MODELS)
