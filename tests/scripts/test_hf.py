"""python -m scripts.export_hf and scripts.import_hf, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints

pytest.importorskip("transformers")
REPOSITORY = Path(checkpoints.__file__).parents[1]


def run(home: Path, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{module}", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_export_and_import(tmp_path, small_tokenizer, make_model, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = make_model(small_tokenizer.vocab_size, "MT", mlp="swiglu").eval()
    meta = {"training_config": {"max_seq_len": 256}}
    checkpoints.save_checkpoint(checkpoints.checkpoint_root("rag", "tiny"), 7, model, small_tokenizer, meta)
    done = run(tmp_path, "export_hf", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "granitemoehybrid" in done.stdout

    theirs, tokenizer = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The bridge?"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5
    again = run(tmp_path, "export_hf", "--output", tmp_path / "out")
    assert again.returncode == 2 and "exists" in again.stderr and len(again.stderr.splitlines()) == 1

    done = run(tmp_path, "import_hf", "--input", tmp_path / "out", "--model_tag", "back")
    assert done.returncode == 0, done.stderr
    back, read_tokenizer, meta = checkpoints.load_model("rag", model_tag="back")
    assert meta["training_config"]["max_seq_len"] == 256
    assert read_tokenizer.fingerprint == small_tokenizer.fingerprint
    with torch.no_grad():
        assert torch.equal(back(ids), model(ids))
    again = run(tmp_path, "import_hf", "--input", tmp_path / "out", "--model_tag", "back")
    assert again.returncode == 2 and "holds a model already" in again.stderr
    (tmp_path / "out" / "config.json").write_text("{")
    broken = run(tmp_path, "import_hf", "--input", tmp_path / "out", "--model_tag", "other")
    assert broken.returncode == 2 and "not a readable" in broken.stderr and len(broken.stderr.splitlines()) == 1
