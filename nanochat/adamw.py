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

from nanochat.checkpoint_manager import commit, list_steps, newest, read_meta
from nanochat.common import Compute, UserError, print0
from nanochat.config import config_to_dict
from nanochat.optim import NamedOptimizers, adamw
from nanochat.report import write_report
from nanochat.training import Phase, RunLog, TrainConfig, lr_scale, micro_batches, sum_gradients, sum_over_ranks


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
    optimizers = learner.optimizers or adamw(learner.parts, learner.rates)
    step, elapsed = 0, 0.0
    if config.resume == "auto" and list_steps(run_dir):
        step, elapsed = _resume(learner, optimizers, newest(run_dir))
        print0(f"resuming {run_dir} after step {step}")
    log = RunLog(run_dir, config, step) if compute.is_main else None

    def save() -> None:
        def write(directory: Path) -> None:
            learner.save(directory)
            state = {name: value.contiguous() for name, value in optimizers.state_dict().items()}
            save_file(state, directory / "optimizer.safetensors")

        about = {**meta, "training_config": config_to_dict(config), "elapsed_seconds": elapsed}
        commit(run_dir, step, write, about | {"rng": torch.get_rng_state().tolist()})

    while step < num_steps:
        began = time.perf_counter()
        for module in learner.modules:
            module.train()
        done, phase = 0, phases[0]
        for phase in phases:
            if step < done + phase.steps:
                break
            done += phase.steps
        batches = phase.batches
        shares = micro_batches(batches.rows_per_step, config.device_batch_size, compute)
        loss_sum = torch.zeros(1, device=compute.device)
        for rows in shares:
            loss = phase.loss(model, batches.get(step - done, rows).to(compute.device)) / batches.rows_per_step
            if loss.requires_grad:
                loss.backward()
            loss_sum += loss.detach()
        for module in learner.modules:
            sum_gradients(module, compute)
        sum_over_ranks(loss_sum, compute)
        norm = nn.utils.clip_grad_norm_(list(optimizers.names), config.grad_clip or math.inf).item()
        scale = phase.lr * lr_scale(config, step, step / num_steps)
        if not math.isfinite(norm + loss_sum.item()):
            raise UserError(
                f"step {step} ({phase.name}): loss {loss_sum.item()}, gradient norm {norm}; stopped before the update. "
                "Lower the learning rate (--init_lr_frac) and go on with --resume auto"
            )
        optimizers.set_lr_scale(scale)
        optimizers.step()
        optimizers.zero_grad()
        step += 1
        seconds = time.perf_counter() - began
        elapsed += seconds
        figures = {"phase": phase.name, "loss": loss_sum.item(), "lr_scale": scale, "grad_norm": norm}
        figures |= {"seconds": seconds, **(phase.figures() if phase.figures else {})}
        evaluated = bool(config.eval_every and evaluate and (step % config.eval_every == 0 or step == num_steps))
        if evaluated:
            found = evaluate()
            figures |= {f"val_{name}" if name in figures else name: value for name, value in found.items()}
        if log:
            tokens = batches.rows_per_step * batches.max_seq_len
            log.write(step, num_steps, figures, tokens, elapsed, math.inf, show=evaluated or step == num_steps)
            if step % config.save_every == 0 or step == num_steps:
                save()
    if log:
        log.close()
        write_report(run_dir, log.title, config_to_dict(config), description, num_steps)
        print0(f"wrote {run_dir}")


def _resume(learner: Learner, optimizers: NamedOptimizers, directory: Path) -> tuple[int, float]:
    meta = read_meta(directory)
    learner.load(directory)
    optimizers.load_state_dict(load_file(directory / "optimizer.safetensors"))
    torch.set_rng_state(torch.tensor(meta["rng"], dtype=torch.uint8))
    return meta["step"], meta["elapsed_seconds"]
