"""python -m scripts.base_train, run as a user runs it: trained, killed, resumed, planned, and refused."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHAPE = ["--block_pattern", "MT", "--d_model", "32", "--head_dim", "16", "--d_state", "16", "--mamba_head_dim", "16"]
SIZES = ["--max_seq_len", "32", "--total_batch_size", "128", "--device_batch_size", "4", "--dtype", "float32"]


def start(home: Path, module: str, *argv: object, **settings) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=REPOSITORY,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(home)},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings},
    )


def run(home: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    process = start(home, "scripts.base_train", *argv)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["river", "mountain", "the", "of", "old", "town", "bridge", "was", "built", "1987"]
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    records = [{"title": f"Place {i}", "text": " ".join(rng.choices(words, k=40))} for i in range(120)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A base directory with a tokenizer made by the real command."""
    home = tmp_path_factory.mktemp("home")
    process = start(home, "scripts.tok_train", "--input", corpus, "--vocab_size", "300")
    _, err = process.communicate()
    assert process.returncode == 0, err
    return home


def steps_of(home: Path, tag: str) -> list[str]:
    return sorted(path.name for path in (home / "checkpoints/base" / tag).glob("step_*"))


def curve(home: Path, tag: str) -> list[dict]:
    """metrics.jsonl without the times."""
    rows = map(json.loads, (home / "checkpoints/base" / tag / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "elapsed")} for row in rows]


def test_a_run_killed_and_resumed_equals_one_never_killed(home: Path, corpus: Path) -> None:
    """Copying first, then text; SIGKILL somewhere in the middle of the text, and once more on the way."""
    settings = ["--input", corpus, *SHAPE, *SIZES, "--copy_warmup_steps", 10, "--num_steps", 300]
    settings += ["--save_every", 22, "--eval_every", 100, "--eval_steps", 2]

    done = run(home, *settings, "--model_tag", "whole")
    assert done.returncode == 0, done.stderr
    assert re.search(r"max_seq_len += 32\n", done.stdout)  # the resolved settings
    assert "phase copy: 10 steps" in done.stdout and "phase text: 300 steps" in done.stdout
    whole = curve(home, "whole")
    assert [row["step"] for row in whole] == list(range(1, 311))
    assert [row["phase"] for row in whole] == ["copy"] * 10 + ["text"] * 300
    assert [row["step"] for row in whole if "val_loss" in row] == [100, 200, 300, 310]
    assert whole[-1]["loss"] < 0.75 * whole[10]["loss"]
    assert steps_of(home, "whole") == ["step_000308", "step_000310"]
    assert "loss.png" in (home / "checkpoints/base/whole/report.md").read_text()

    metrics = home / "checkpoints/base/killed/metrics.jsonl"
    for kill_after in (60, 150):
        with start(home, "scripts.base_train", *settings, "--model_tag", "killed", "--resume", "auto") as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_after:
                    break
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        assert len(curve(home, "killed")) < 310
    done = run(home, *settings, "--model_tag", "killed", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resuming " in done.stdout and "after step " in done.stdout
    assert curve(home, "killed") == whole  # bit for bit: JSON gives back the very floats
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (home / "checkpoints/base" / tag / "step_000310" / name for tag in ("whole", "killed"))
        assert a.read_bytes() == b.read_bytes()


def test_plan_writes_nothing_and_opens_every_input(home: Path, corpus: Path) -> None:
    done = run(home, "--input", corpus, *SHAPE, *SIZES, "--model_tag", "planned", "--plan")
    assert done.returncode == 0, done.stderr
    assert "time: about " in done.stdout and "--plan: stopped here" in done.stdout
    assert not (home / "checkpoints/base/planned").exists()
    done = run(home, "--input", f"{corpus},missing.txt", *SHAPE, *SIZES, "--plan")
    assert (done.returncode, done.stderr) == (2, "error: missing.txt does not exist\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--block_pattern", "MXT"], "block_pattern 'MXT' must be made of T (attention) and M (Mamba-2)"),
        (["--block_pattern", "MT", "--depth", "3"], "depth 3 and block_pattern 'MT' of 2 blocks disagree"),
        (["--blockpattern", "MT"], "unknown setting --blockpattern; did you mean --block_pattern?"),
        (["--total_batch_size", "16"], "raise total_batch_size to at least 2048"),
        (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["--num_steps", "0"], "nothing to train"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--d_model", "50", "--block_pattern", "M"], "mamba_head_dim 64 does not divide the inner width 100"),
        (["--head_dim", "15", "--block_pattern", "MT"], "head_dim 15 must be even"),
        (["--n_kv_head", "3", "--block_pattern", "MT"], "n_kv_head 3 must divide n_head 2"),
    ],
)
def test_mistakes_give_one_line(home: Path, corpus: Path, argv: list[str], said: str) -> None:
    done = run(home, "--input", corpus, "--model_tag", "refused", *argv)
    assert done.returncode == 2, (done.returncode, done.stderr[-1000:])
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (home / "checkpoints/base/refused").exists()
