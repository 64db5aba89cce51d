"""The training loop on models of a few thousand weights: it learns, accumulates, resumes, stops and tells the time."""

from __future__ import annotations

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat import training
from nanochat.checkpoint_manager import list_steps, load_checkpoint, mark_complete
from nanochat.common import Compute, UserError
from nanochat.model.lm import IGNORE
from nanochat.packing import PackedBatches, TokenData
from nanochat.report import read_metrics
from nanochat.training import Phase, TrainConfig, lr_scale, mean_loss, rows_per_step, train

CPU = Compute(torch.device("cpu"))
L, ROWS = 32, 4
TIMES = ("seconds", "tokens_per_s", "elapsed")


def examples(count=40, seed=0):
    """Sequences that count upwards, of different length, learned in their second part: uneven over rows."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n = int(rng.integers(4, L))
        ids = (rng.integers(0, 50) + np.arange(n)) % 50
        yield ids.tolist(), (np.arange(n) > rng.integers(1, n - 1)).tolist()


def batches(seed=0):
    return PackedBatches(TokenData.from_examples(examples(seed=seed)), L, ROWS, seed)


def config(**changes):
    settings = {"max_seq_len": L, "total_batch_size": ROWS * L, "device_batch_size": ROWS, "num_steps": 12}
    return TrainConfig(**{**settings, "eval_every": 0, "save_every": 4, "dtype": "float32", **changes})


@pytest.fixture
def run(small_tokenizer, make_model, tmp_path):
    """run(name, steps=12, **settings) trains a fresh model in tmp_path/tag/name; returns (model, metrics)."""

    def start(name="run", steps=12, phases=None, evaluate=None, model=None, **changes):
        model = model or make_model(small_tokenizer.vocab_size, "MT", noise=0.02)
        phases = phases or [Phase("text", batches(), steps)]
        run_dir = tmp_path / "tag" / name
        train(model, small_tokenizer, phases, config(**changes), CPU, run_dir, evaluate, {"extra": "kept"})
        return model, read_metrics(run_dir / "metrics.jsonl")

    start.directory = lambda name="run": tmp_path / "tag" / name
    return start


def losses(metrics):
    return [row["loss"] for row in metrics]


def without_times(metrics):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns_and_writes_what_it_did(run, capsys):
    def evaluate():
        return {"val_loss": 1.5}

    model, metrics = run(steps=40, evaluate=evaluate, eval_every=15, save_every=20, log_every=20)
    assert np.mean(losses(metrics)[-5:]) < 0.6 * losses(metrics)[0]
    assert [row["step"] for row in metrics] == list(range(1, 41))
    assert [row["step"] for row in metrics if "val_loss" in row] == [15, 30, 40]
    assert list_steps(run.directory()) == [20, 40]
    loaded, _, meta, state = load_checkpoint(run.directory())
    assert same_weights(loaded, model)
    assert meta["training_config"]["max_seq_len"] == L
    assert (meta["extra"], meta["phase_steps"]) == ("kept", [40])
    assert state
    assert json.loads((run.directory() / "config.json").read_text())["save_every"] == 20
    report = (run.directory() / "report.md").read_text()
    assert "40 of 40 steps" in report
    assert "| 40 | " in report
    assert "| 1.5000 |" in report
    assert (run.directory() / "loss.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "phase text: 40 steps of 128 tokens (4 rows), rows " in out
    assert re.search(r"text 40/40 \| loss [\d.]+ \| lr x0\.\d+ \| [\d,]+ tok/s \| 0m00s left \| val_loss 1.5000", out)
    shown = [int(step) for step in re.findall(r"text (\d+)/40", out)]
    assert shown == [1, 15, 20, 30, 40]


def test_a_phase_can_train_the_first_blocks_alone_and_scale_the_rate(run, small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size, "MTMT", noise=0.02)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first_two = make_model(small_tokenizer.vocab_size, "MTMT", noise=0.02)
    batch = batches().get(0)
    whole = first_two(batch.tokens, batch.targets, seq_idx=batch.seq_idx).item()
    del first_two.blocks[2:]
    expected = first_two(batch.tokens, batch.targets, seq_idx=batch.seq_idx).item()
    phases = [Phase("two blocks", batches(), 3, depth=2, lr=0.25), Phase("all", batches(), 1)]
    _, metrics = run(model=model, phases=phases[:1], warmdown_frac=0.0)
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-6) and expected != pytest.approx(whole, rel=1e-3)
    assert [row["lr_scale"] for row in metrics] == [0.25] * 3
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(name.startswith(("blocks.2", "blocks.3")) for name in moved)
    assert {name for name in before if name.startswith(("embed", "blocks.0", "blocks.1", "norm", "lm_head"))} == moved
    _, metrics = run("both", phases=phases, warmdown_frac=0.0)
    assert [row["lr_scale"] for row in metrics] == [0.25] * 3 + [1.0]


def test_the_first_loss_is_the_mean_over_all_learned_tokens_of_the_step(run, small_tokenizer, make_model):
    """Rows learn different numbers of tokens; a mean of row means would be another number."""
    _, metrics = run(steps=1, device_batch_size=1)
    batch = batches().get(0)
    model = make_model(small_tokenizer.vocab_size, "MT", noise=0.02)
    total = count = 0.0
    per_row = []
    with torch.no_grad():
        for row in range(ROWS):
            row_losses = model(
                batch.tokens[[row]], batch.targets[[row]], seq_idx=batch.seq_idx[[row]], reduction="none"
            )
            total, count = total + row_losses.double().sum().item(), count + len(row_losses)
            per_row.append(row_losses.mean().item())
    assert losses(metrics)[0] == pytest.approx(total / count, rel=1e-6)
    assert losses(metrics)[0] != pytest.approx(np.mean(per_row), rel=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_accumulation_equals_one_big_batch(run, size):
    # Muon orthogonalises in bfloat16, where a difference of one float32 rounding may become one of bfloat16: with it
    # the later losses agree less closely.
    for name, tolerance, changes in (("adamw", 1e-6, {"matrix_lr": 0.0}), ("both", 1e-3, {})):
        _, expected = run(f"whole_{name}", **changes)
        _, got = run(f"parts_{name}", device_batch_size=size, **changes)
        assert losses(got)[0] == pytest.approx(losses(expected)[0], abs=1e-6)
        assert got[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)
        assert np.abs(np.subtract(losses(got), losses(expected))).max() < tolerance


def test_gradient_checkpointing_changes_nothing(run):
    _, expected = run("plain", steps=3)
    _, got = run("checkpointed", steps=3, gradient_checkpointing=True)
    assert np.abs(np.subtract(losses(got), losses(expected))).max() < 1e-6


def test_compiling_changes_nothing_and_is_left_out_of_the_checkpoint(run, monkeypatch):
    compiled = []
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or compiling(function))
    _, expected = run("plain", steps=3, dtype="float32")
    model, got = run("compiled", steps=3, dtype="float32", compile=True)
    assert len(compiled) == len(model.blocks)
    assert np.abs(np.subtract(losses(got), losses(expected))).max() < 1e-4  # Muon rounds to bfloat16


class Stopped(Exception):
    pass


class StopsAt:
    """Batches that break off, as a kill would, when a step is asked for."""

    def __init__(self, inner, step):
        self.inner, self.step = inner, step
        self.max_seq_len, self.rows_per_step = inner.max_seq_len, inner.rows_per_step

    def get(self, step, which=None):
        if step == self.step:
            raise Stopped
        return self.inner.get(step, which)


@pytest.mark.parametrize("stop", [2, 4, 9])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run, stop):
    """Two phases; stopped before the first checkpoint, in the first phase, in the second."""

    def phases(broken=False):
        first, second = batches(1), batches(2)
        if broken:
            first, second = (StopsAt(first, stop), second) if stop < 6 else (first, StopsAt(second, stop - 6))
        return [Phase("first", first, 6), Phase("second", second, 8)]

    whole, expected = run("whole", phases=phases())
    with pytest.raises(Stopped):
        run("broken", phases=phases(broken=True))
    assert list_steps(run.directory("broken")) == list(range(4, stop + 1, 4))
    with open(run.directory("broken") / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a line the kill cut off
    resumed, got = run("broken", phases=phases(), resume="auto")
    assert without_times(got) == without_times(expected)
    assert [row["phase"] for row in got] == ["first"] * 6 + ["second"] * 8
    assert same_weights(resumed, whole)
    assert all(row["elapsed"] > before["elapsed"] for before, row in itertools.pairwise(got))
    a, b = (load_checkpoint(run.directory(name))[3] for name in ("whole", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    # a finished run that is resumed is left as it is; without --resume it begins anew
    again, got = run("broken", phases=phases(), resume="auto")
    assert without_times(got) == without_times(expected)
    assert same_weights(again, whole)
    _, got = run("broken", phases=phases(), steps=14)
    assert without_times(got) == without_times(expected)


def test_resume_refuses_another_model_or_tokenizer(run, small_tokenizer, make_model, tmp_path):
    run(steps=2)
    with pytest.raises(UserError, match="another shape"):
        run(steps=2, resume="auto", model=make_model(small_tokenizer.vocab_size, "TT"))
    other = type(small_tokenizer)(small_tokenizer.token_bytes[:-1])
    with pytest.raises(UserError, match="another tokenizer"):
        model = make_model(small_tokenizer.vocab_size)
        train(model, other, [Phase("t", batches(), 2)], config(resume="auto"), CPU, run.directory())
    (run.directory() / "step_000002" / "optimizer.safetensors").unlink()
    mark_complete(run.directory() / "step_000002")  # as a model that was imported
    with pytest.raises(UserError, match="no optimizer state"):
        run(steps=4, resume="auto")


def test_a_loss_that_is_no_number_stops_before_the_update(run):
    model, weights = None, {}

    class Poisoned(StopsAt):
        def get(self, step, which=None):
            if step == self.step:
                weights.update({k: v.clone() for k, v in model.state_dict().items()})
                model.norm.weight.data.fill_(math.nan)
            return self.inner.get(step, which)

    model, _ = run("warm", steps=1)
    with pytest.raises(UserError, match=r"step 6 \(text\): loss nan.*--resume auto"):
        run(model=model, phases=[Phase("text", Poisoned(batches(), 6), 12)])
    unchanged = {k: torch.equal(v, weights[k]) for k, v in model.state_dict().items()}
    assert [name for name, equal in unchanged.items() if not equal] == ["norm.weight"]
    assert [row["step"] for row in read_metrics(run.directory() / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert list_steps(run.directory()) == [4]
    _, metrics = run(resume="auto")  # the way out that the message names
    assert len(metrics) == 12
    assert np.isfinite(losses(metrics)).all()


@pytest.fixture
def clock(monkeypatch):
    """A clock that is one second later each time it is read, so that a step takes one second."""
    seconds = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


def test_max_minutes_ends_the_run_with_the_rate_brought_down(run, clock):
    phases = [Phase("first", batches(1), 300), Phase("second", batches(2), 700)]
    settings = {"max_minutes": 20 / 60, "warmdown_frac": 0.5, "final_lr_frac": 0.1, "save_every": 1000}
    _, metrics = run(phases=phases, **settings)
    assert metrics[-1]["elapsed"] >= 20 > metrics[-2]["elapsed"]
    assert list_steps(run.directory()) == [len(metrics)]
    before = [0.0, *(row["elapsed"] for row in metrics[:-1])]
    assert [row["lr_scale"] for row in metrics] == [
        pytest.approx(0.1 + 0.9 * min(1.0, (1 - elapsed / 20) / 0.5)) for elapsed in before
    ]
    # each phase gets its share of the time, not of the steps
    assert [row["phase"] for row in metrics] == ["first" if elapsed < 6 else "second" for elapsed in before]


def test_time_spent_on_evaluation_counts_too(run, clock):
    without, with_evals = (
        len(run(name, steps=1000, max_minutes=20 / 60, eval_every=every, evaluate=lambda: {"val_loss": 1.0})[1])
        for name, every in (("without", 0), ("with", 1))
    )
    assert with_evals < without


def test_time_figures_agree_with_each_other(run):
    _, metrics = run(steps=5)
    for row in metrics:
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(ROWS * L)
    assert metrics[-1]["elapsed"] == pytest.approx(sum(row["seconds"] for row in metrics))


def test_learning_rate_schedule():
    c = config(warmup_steps=4, warmdown_frac=0.5, final_lr_frac=0.2)
    assert [lr_scale(c, step, step / 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_scale(c, 50, 0.5) == 1.0
    assert lr_scale(c, 75, 0.75) == pytest.approx(0.6)
    assert lr_scale(c, 100, 1.0) == pytest.approx(0.2)
    assert lr_scale(c, 100, 1.3) == pytest.approx(0.2)  # an evaluation may end past the time limit
    assert lr_scale(config(warmdown_frac=0.0), 99, 0.99) == 1.0
    scaled = config(warmup_steps=4, warmdown_frac=0.5, final_lr_frac=0.2, init_lr_frac=0.1)
    for step in (0, 3, 50, 75, 100):
        assert lr_scale(scaled, step, step / 100) == pytest.approx(0.1 * lr_scale(c, step, step / 100))


def test_the_loop_follows_the_schedule(run):
    _, metrics = run(steps=10, warmup_steps=2, warmdown_frac=0.5)
    c = config(warmup_steps=2, warmdown_frac=0.5)
    assert [row["lr_scale"] for row in metrics] == [pytest.approx(lr_scale(c, s, s / 10)) for s in range(10)]


def test_plan_changes_nothing_and_writes_nothing(small_tokenizer, make_model, tmp_path, capsys):
    model = make_model(small_tokenizer.vocab_size)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, small_tokenizer, [Phase("text", batches(), 12)], config(plan=True), CPU, tmp_path / "tag" / "run")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert f"{model.num_parameters() / 1e6:.2f}M parameters" in out
    assert "phase text: 12 steps of 128 tokens" in out
    assert "total: 1,536 tokens" in out
    assert re.search(r"[\d.]+ GB memory, [\d.]+ GB disk", out)
    assert re.search(r"time: about [\d.]+ minutes at [\d,]+ tokens/s .*stopped here", out)


def test_mean_loss_is_the_mean_over_learned_tokens(small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size)
    data = batches()
    total = count = 0.0
    with torch.no_grad():
        for step in range(3):
            batch = data.get(step)
            row_losses = model(batch.tokens, batch.targets, seq_idx=batch.seq_idx, reduction="none")
            total, count = total + row_losses.double().sum().item(), count + len(row_losses)
            assert len(row_losses) == (batch.targets != IGNORE).sum()
    for size in (1, 3, 4):
        assert mean_loss(model, data, 3, config(device_batch_size=size), CPU) == pytest.approx(total / count, rel=1e-6)
    assert model.training


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_all_rows_between_them(world_size):
    for rows, size in ((8, 3), (9, 4), (13, 1), (8, 100)):
        pieces = [
            list(piece)
            for rank in range(world_size)
            for piece in training.micro_batches(rows, size, Compute(CPU.device, rank, rank, world_size))
        ]
        assert list(itertools.chain(*pieces)) == list(range(rows))
        assert all(0 < len(piece) <= size for piece in pieces)


def test_settings_that_cannot_work_are_refused(run):
    assert rows_per_step(config(total_batch_size=10 * L + 5), 1) == 10
    with pytest.raises(UserError, match=r"holds 4 rows .* fewer than the 8 device.* at least 256"):
        rows_per_step(config(), 8)
    with pytest.raises(UserError, match="nothing to train"):
        run(steps=0)
