"""What ends a run early: signals, losses that are no numbers, settings for what is kept."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch

from nanochat import stopping
from nanochat.checkpoint_manager import list_steps, load_checkpoint
from nanochat.common import Compute, Stopped, UserError
from nanochat.packing import PackedBatches, TokenData
from nanochat.report import read_metrics
from nanochat.stopping import MOST_SKIPPED, StopSignal
from nanochat.training import Phase, TrainConfig, train

CPU = Compute(torch.device("cpu"))
L, ROWS = 32, 4


def batches(seed: int = 0) -> PackedBatches:
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(0, 50, n).tolist(), [1] * n) for n in rng.integers(8, L, 40).tolist()]
    return PackedBatches(TokenData.from_examples(examples), L, ROWS, seed)


class At:
    """Batches that do something when a step is asked for."""

    def __init__(self, what, *steps: int):
        self.what, self.steps, self.inner = what, steps, batches()
        self.max_seq_len, self.rows_per_step, self.examples = L, ROWS, self.inner.examples

    def get(self, step, which=None):
        if step in self.steps:
            self.what()
        return self.inner.get(step, which)


@pytest.fixture
def start(small_tokenizer, make_model, tmp_path):
    """start(data, ...) trains a fresh model in tmp_path; returns it. start.model: called with what data needs."""
    model = make_model(small_tokenizer.vocab_size, "MT", noise=0.02)

    def run(data=None, steps=12, evaluate=None, **changes):
        settings = {"max_seq_len": L, "total_batch_size": ROWS * L, "device_batch_size": ROWS, "dtype": "float32"}
        settings |= {"eval_every": 0, "save_every": 4, **changes}
        phases = [Phase("text", data or batches(), steps)]
        return train(model, small_tokenizer, phases, TrainConfig(**settings), CPU, tmp_path, evaluate)

    run.model = model
    return run


def poison(model) -> None:
    """The next step's gradient is not a number, and nothing after it, if the step is left out."""
    handle = model.norm.weight.register_hook(lambda gradient: handle.remove() or gradient * math.nan)


def test_skipping_leaves_the_step_out_and_goes_on(start, tmp_path, capsys):
    seen = {}

    def spoil():
        seen["before"] = [p.clone() for p in start.model.parameters()]
        poison(start.model)

    def look():
        seen["after"] = [p.clone() for p in start.model.parameters()]

    class Watched(At):
        def get(self, step, which=None):
            {5: spoil, 6: look}.get(step, lambda: None)()
            return self.inner.get(step, which)

    start(Watched(None), on_nan="skip")
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if math.isnan(row["grad_norm"])] == [6]
    assert '"grad_norm": null' in (tmp_path / "metrics.jsonl").read_text()  # NaN is no JSON
    assert all(torch.isfinite(p).all() for p in start.model.parameters())
    shown = ", ".join(map(str, batches().examples(5)[:8]))
    assert f"step 5 (text, examples {shown}" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists()


def test_stopping_names_the_batch_and_the_last_checkpoint(start, tmp_path):
    shown = ", ".join(map(str, batches().examples(6)[:8]))
    with pytest.raises(
        UserError, match=rf"step 6 \(text, examples {shown}.*gradient norm nan.*that of step 4\. .*skip"
    ):
        start(At(lambda: poison(start.model), 6))
    assert list_steps(tmp_path) == [4]


def test_skipping_has_an_end(start):
    with pytest.raises(UserError, match=f"{MOST_SKIPPED} steps before were left out already; .*there is no checkpoint"):
        start(At(lambda: poison(start.model), *range(40)), steps=40, on_nan="skip", save_every=100)


def test_the_examples_of_a_step_are_those_of_its_batch():
    data = batches()
    for step in (0, 3, 11):
        numbers = data.examples(step)
        lengths = sorted(int(data.lengths[number]) for number in numbers)
        batch = data.get(step)
        counts = [torch.bincount(row[row < row.max()]).tolist() for row in batch.seq_idx]  # the last is padding
        learned = sorted(n for row in counts for n in row)
        full = [int(row.max()) for row in batch.seq_idx]
        assert sum(full) <= len(numbers) and sum(lengths) == (batch.targets >= 0).sum()
        assert set(learned) <= set(lengths)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(start, tmp_path, number):
    before = signal.getsignal(signal.SIGINT)  # nothing, where the tests run in the background
    with pytest.raises(Stopped, match=rf"{number.name} after step 6 of 12: saved") as stopped:
        start(At(lambda: os.kill(os.getpid(), number), 6))
    # the batch is asked for before anybody looks whether to stop: step 6 was not taken
    assert stopped.value.exit_status == 128 + number
    assert list_steps(tmp_path) == [4, 6]
    assert load_checkpoint(tmp_path)[2]["phase_steps"] == [6]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_it_at_once_but_not_torchruns_echo(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGINT
        clock[0] += 10
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_the_last_and_the_best_are_kept(start, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 1.5])
    start(evaluate=lambda: {"val_loss": next(losses)}, eval_every=3, save_every=2, keep_last=3, keep_best="val_loss")
    assert list_steps(tmp_path) == [8, 10, 12]
    assert list_steps(tmp_path / "best") == [6]
    with pytest.raises(UserError, match="--keep_best em: the validations have val_loss"):
        start(evaluate=lambda: {"val_loss": 1.0}, eval_every=3, keep_best="em")
    with pytest.raises(UserError, match="--keep_last 0: at least 1"):
        start(keep_last=0)


def test_too_little_room_is_told_before_the_first_step(start, tmp_path, monkeypatch):
    from nanochat import checkpoint_manager

    used = checkpoint_manager.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_manager.shutil, "disk_usage", lambda path: used._replace(free=100_000))
    with pytest.raises(UserError, match=r"checkpoints need .* GB more, and 0.0001 GB are free"):
        start()
    assert not (tmp_path / "metrics.jsonl").exists()
