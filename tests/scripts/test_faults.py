"""Real training runs, cut short and gone on with on other numbers of ranks: the losses are those of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench._ranks import REPOSITORY, Runs, kill_a_rank, ranks_of
from bench.faults_training import checkpoint_kills
from nanochat.checkpoint_manager import list_steps, load_checkpoint

STEPS = 40
FLAGS = f"--num_steps {STEPS} --save_every 15 --resume auto"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs")).prepare()


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> list[float]:
    return runs.run("unbroken", FLAGS)


def test_two_ranks_go_on_for_one_and_one_for_two(runs: Runs, unbroken: list[float]) -> None:
    # the learning rate falls at the end of a run, which the parts must not take for theirs
    steady = runs.run("steady", f"{FLAGS} --warmdown_frac 0")
    for steps, ranks in ((12, 0), (25, 2), (STEPS, 0)):
        runs.run("parts", f"--num_steps {steps} --save_every 15 --resume auto --warmdown_frac 0", ranks)
    assert runs.losses("parts") == pytest.approx(steady, abs=1e-4)
    assert steady != pytest.approx(unbroken, abs=1e-4)  # it would show


def test_a_split_model_saves_on_sigterm_and_one_process_goes_on(runs: Runs, unbroken: list[float]) -> None:
    process = runs.start("split", f"{FLAGS} --shard true", ranks=2)
    assert runs.wait_for("split", 18, process), process.communicate()
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    said = re.search(r"stopped by SIGTERM after step (\d+) of 40: saved in .*split; --resume auto goes on", errors)
    assert said, errors
    step = int(said[1])
    assert list_steps(runs.directory("split")) == [15, step]
    assert runs.losses("split") == pytest.approx(unbroken[:step], abs=1e-4)
    runs.run("split", FLAGS)
    assert runs.losses("split") == pytest.approx(unbroken, abs=1e-4)
    whole, _, _, state = load_checkpoint(runs.directory("split"))
    expected, _, _, expected_state = load_checkpoint(runs.directory("unbroken"))
    for (name, p), other in zip(expected.state_dict().items(), whole.state_dict().values(), strict=True):
        assert other.shape == p.shape and (p - other).abs().max() < 1e-2, name
    assert state.keys() == expected_state.keys()


@pytest.mark.parametrize("shard", ["", "--shard true"], ids=["copied", "split"])
def test_a_killed_rank_is_started_again_from_the_last_checkpoint(runs: Runs, unbroken, shard: str) -> None:
    tag = f"killed{bool(shard)}"
    process = runs.start(tag, f"{FLAGS} {shard}", ranks=2, restarts=1)
    assert runs.wait_for(tag, 19, process), process.communicate()
    kill_a_rank(process, random.Random(0))
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert re.search(r"resuming .* after step 15\n", out)
    assert runs.losses(tag) == pytest.approx(unbroken, abs=1e-4)


def test_a_killed_rank_ends_the_job(runs: Runs) -> None:
    process = runs.start("ends", FLAGS, ranks=2)
    assert runs.wait_for("ends", 3, process), process.communicate()
    kill_a_rank(process, random.Random(1))
    process.communicate(timeout=60)
    assert process.returncode == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_tells(runs: Runs, unbroken: list[float], number: int, status: int) -> None:
    tag = f"signal{status}"
    process = runs.start(tag, FLAGS, ranks=0)
    assert runs.wait_for(tag, 20, process), process.communicate()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    (line,) = errors.strip().splitlines()
    assert re.fullmatch(rf"stopped by {number.name} after step \d+ of 40: saved in .*; --resume auto goes on", line)
    step = list_steps(runs.directory(tag))[-1]
    assert step == len(runs.losses(tag)) and f"step {step} of" in line
    assert (runs.directory(tag) / "report.md").exists()
    assert runs.run(tag, FLAGS) == unbroken


def test_what_sharding_cannot_do_is_refused(runs: Runs) -> None:
    for ranks, flags, message in (
        (0, "--shard true", r"error: --shard splits a model over the ranks of torchrun"),
        (2, "--shard true --total_batch_size 224", r"error: --shard: 7 rows a step .* --total_batch_size 192"),
        (2, "--shard true --fp8_emulate true", r"error: --shard: not together with FP8"),
    ):
        process = runs.start("refused", f"{FLAGS} {flags}", ranks)
        _, errors = process.communicate()
        assert process.returncode in (1, 2) and re.search(message, errors), errors
    assert not list_steps(runs.directory("refused"))


def test_checkpoints_survive_kills_at_random_moments(tmp_path: Path) -> None:
    figures = checkpoint_kills(10, tmp_path / "checkpoints")
    assert figures["kills_checkpoint"] == 10 and figures["lost"] == figures["torn_reads"] == 0
    assert figures["reads"] > 10


def test_a_disk_that_fills_up_while_a_run_is_under_way() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.faults_training_disk", "--json"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if "cannot mount" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["refused_runs"] == 3 and figures["resumed_max_loss_diff"] == 0
