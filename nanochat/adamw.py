"""The training loop of models that are not this project's own: AdamW, each part at its own rate.

nanochat/training.py trains HybridLM and would have to know too much of others; what is shared is imported from there.
D-RAG with a model of transformers and search indexes use this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanochat.checkpoint_manager import OPTIMIZER, commit, list_steps, newest, read_meta, require_space
from nanochat.common import Compute, UserError, print0
from nanochat.config import config_to_dict
from nanochat.optim import NamedOptimizers, adamw
from nanochat.parallel import (
    agree_on_step,
    clip_gradients,
    micro_batches,
    most_of_ranks,
    sum_gradients,
    sum_over_ranks,
)
from nanochat.report import write_report
from nanochat.run_log import RunLog
from nanochat.stopping import FiniteCheck, StopSignal, told_to_stop
from nanochat.training import Phase, TrainConfig, lr_scale, score_by


@dataclass
class Learner:
    """parts: modules by name, each with its learning rate; the first is what phases' losses are given. save(directory)
    and load(directory): what is learned, but for the optimizer's state. unit: what a row of a batch is. rates: of
    single parameters that have their own, by name in the part. optimizers: instead of AdamW."""

    parts: dict[str, tuple[nn.Module, float]]
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    unit: str = "questions"
    rates: dict[str, float] = field(default_factory=dict)
    optimizers: NamedOptimizers | None = None

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module, _ in self.parts.values()]


def train(
    learner: Learner,
    phases: Sequence[Phase],
    config: TrainConfig,
    compute: Compute,
    run_dir: Path,
    evaluate: Callable[[], dict[str, float]] | None,
    meta: dict,
) -> None:
    """Through the phases in order, the loss a mean over a step's rows."""
    model = learner.modules[0]
    parameters = list(model.parameters())
    total, learned = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
    description = f"{total / 1e6:,.2f}M parameters, {learned / 1e6:,.2f}M of them learned"
    print0(f"model: {description}")
    num_steps = sum(phase.steps for phase in phases)
    print0(f"{num_steps} steps of {phases[0].batches.rows_per_step} {learner.unit}")
    if config.plan:
        return
    if config.shard:
        raise UserError("--shard: this training does not split its weights; leave --shard out")
    optimizers = learner.optimizers or adamw(learner.parts, learner.rates)
    step, elapsed, best = 0, 0.0, -math.inf
    if config.resume == "auto" and list_steps(run_dir):
        step, elapsed, best = _resume(learner, optimizers, newest(run_dir, with_optimizer=True))
        print0(f"resuming {run_dir} after step {step}")
    agree_on_step(step, run_dir, compute)
    size = 4 * (total + 2 * learned)  # weights, and two moments of what is learned, in float32
    if compute.is_main:
        require_space(run_dir, size, config.keep_last + bool(config.keep_best))
    log = RunLog(run_dir, config, step) if compute.is_main else None
    finite = FiniteCheck(config.on_nan, run_dir)

    def save(directory: Path, keep: int) -> None:
        def write(directory: Path) -> None:
            learner.save(directory)
            state = {name: value.contiguous() for name, value in optimizers.state_dict().items()}
            save_file(state, directory / OPTIMIZER)

        if compute.is_main:
            require_space(directory, size)
            about = {**meta, "training_config": config_to_dict(config), "elapsed_seconds": elapsed}
            rng = torch.get_rng_state().tolist()
            commit(directory, step, write, about | {"rng": rng, **({"best": best} if config.keep_best else {})}, keep)

    def report() -> None:
        if log:
            log.close()
            write_report(run_dir, log.title, config_to_dict(config), description, num_steps)

    limit = config.max_minutes * 60 if config.max_minutes > 0 else math.inf
    ended = step >= num_steps or elapsed >= limit
    saved_step = step
    with StopSignal() as stop:
        while not ended:
            began = time.perf_counter()
            for module in learner.modules:
                module.train()
            done, phase = 0, phases[0]
            for phase in phases:
                if step < done + phase.steps:
                    break
                done += phase.steps
            batches = phase.batches
            if told_to_stop(stop, 0, compute)[1]:
                if step > saved_step:
                    save(run_dir, config.keep_last)
                if step:
                    report()
                stop.leave(compute, step, num_steps, run_dir)
            loss_sum = torch.zeros(1, device=compute.device)
            for rows in micro_batches(batches.rows_per_step, config.device_batch_size, compute):
                loss = phase.loss(model, batches.get(step - done, rows).to(compute.device)) / batches.rows_per_step
                if loss.requires_grad:
                    loss.backward()
                loss_sum += loss.detach()
            for module in learner.modules:
                sum_gradients(module, compute)
            sum_over_ranks(loss_sum, compute)
            norm = clip_gradients(optimizers.names, config.grad_clip, compute)
            scale = phase.lr * lr_scale(config, step, max(step / num_steps, elapsed / limit))
            if finite.passes(step, phase.name, loss_sum.item(), norm, batches, step - done):
                optimizers.set_lr_scale(scale)
                optimizers.step()
            optimizers.zero_grad()
            step += 1
            seconds = time.perf_counter() - began
            elapsed += seconds
            figures = {"phase": phase.name, "loss": loss_sum.item(), "lr_scale": scale, "grad_norm": norm}
            figures |= {"seconds": seconds, **(phase.figures() if phase.figures else {})}
            ended = step >= num_steps or most_of_ranks(elapsed, compute) >= limit
            evaluated = bool(config.eval_every and evaluate and (step % config.eval_every == 0 or ended))
            if evaluated:
                found = evaluate()
                figures |= {f"val_{name}" if name in figures else name: value for name, value in found.items()}
                if config.keep_best and (score := score_by(config.keep_best, found)) > best:
                    best = score
                    save(run_dir / "best", keep=1)
                elapsed += time.perf_counter() - began - seconds
            if log:
                tokens = batches.rows_per_step * batches.max_seq_len
                log.write(step, num_steps, figures, tokens, elapsed, limit, show=evaluated or ended)
            if ended or step % config.save_every == 0:
                save(run_dir, config.keep_last)
                saved_step = step
    report()
    if log:
        print0(f"wrote {run_dir}")


def _resume(learner: Learner, optimizers: NamedOptimizers, directory: Path) -> tuple[int, float, float]:
    meta = read_meta(directory)
    learner.load(directory)
    optimizers.load_state_dict(load_file(directory / OPTIMIZER))
    torch.set_rng_state(torch.tensor(meta["rng"], dtype=torch.uint8))
    return meta["step"], meta["elapsed_seconds"], meta.get("best", -math.inf)
