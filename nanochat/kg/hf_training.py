"""D-RAG's second phase with a model of transformers: its LoRA, the projector and the retriever learn together.

nanochat/training.py trains this project's own model and would have to know too much of others; what is shared is
imported from there. Learning rates are AdamW's, constant until they fall (--warmdown_frac).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanochat.checkpoint_manager import commit, list_steps, load_beside, newest, read_meta, save_beside
from nanochat.common import Compute, UserError, print0
from nanochat.config import config_to_dict
from nanochat.kg.drag import DRAG
from nanochat.training import Phase, RunLog, TrainConfig, lr_scale, micro_batches, sum_gradients, sum_over_ranks


def train_hf(
    drag: DRAG,
    phases: Sequence[Phase],
    config: TrainConfig,
    compute: Compute,
    run_dir: Path,
    evaluate: Callable[[], dict[str, float]] | None,
    meta: dict,
    lm_lr: float,
    beside_lr: float,
) -> None:
    """Through the phases in order. lm_lr: of the adapters; beside_lr: of retriever and projector."""
    lm, beside = drag.generator.model, drag.beside.to(compute.device)
    names = {f"lm.{name}": p for name, p in lm.named_parameters() if p.requires_grad}
    adapters = list(names.values())
    names |= {f"beside.{name}": p for name, p in beside.named_parameters() if p.requires_grad}
    others = list(names.values())[len(adapters) :]
    groups = [{"params": adapters, "rate": lm_lr}, {"params": others, "rate": beside_lr}]
    optimizer = torch.optim.AdamW(groups, lr=lm_lr, weight_decay=0.0)
    total = sum(p.numel() for p in lm.parameters())
    print0(f"model: {total / 1e6:,.1f}M parameters, {sum(p.numel() for p in adapters) / 1e6:,.2f}M of them learned")
    num_steps = sum(phase.steps for phase in phases)
    print0(f"{num_steps} steps of {phases[0].batches.rows_per_step} questions")
    if config.plan:
        return
    step, elapsed = 0, 0.0
    if config.resume == "auto" and list_steps(run_dir):
        step, elapsed = _resume(drag, beside, optimizer, names, newest(run_dir))
        print0(f"resuming {run_dir} after step {step}")
    log = RunLog(run_dir, config, step) if compute.is_main else None

    def save() -> None:
        def write(directory: Path) -> None:
            drag.generator.save(directory)
            save_beside(directory, beside)
            state = {
                f"{name}/{key}": value.contiguous() for name, p in names.items() for key, value in _state(optimizer, p)
            }
            save_file(state, directory / "optimizer.safetensors")

        about = {**meta, "training_config": config_to_dict(config), "elapsed_seconds": elapsed}
        commit(run_dir, step, write, about | {"rng": torch.get_rng_state().tolist()})

    while step < num_steps:
        began = time.perf_counter()
        lm.train()
        beside.train()
        done, phase = 0, phases[0]
        for phase in phases:
            if step < done + phase.steps:
                break
            done += phase.steps
        batches = phase.batches
        shares = micro_batches(batches.rows_per_step, config.device_batch_size, compute)
        loss_sum = torch.zeros(1, device=compute.device)
        for rows in shares:
            loss = phase.loss(lm, batches.get(step - done, rows).to(compute.device)) / batches.rows_per_step
            if loss.requires_grad:
                loss.backward()
            loss_sum += loss.detach()
        for module in (lm, beside):
            sum_gradients(module, compute)
        sum_over_ranks(loss_sum, compute)
        norm = nn.utils.clip_grad_norm_(names.values(), config.grad_clip or math.inf).item()
        scale = phase.lr * lr_scale(config, step, step / num_steps)
        if not math.isfinite(norm + loss_sum.item()):
            raise UserError(
                f"step {step} ({phase.name}): loss {loss_sum.item()}, gradient norm {norm}; stopped before the update. "
                "Lower --lm_lr and --beside_lr and go on with --resume auto"
            )
        for group in optimizer.param_groups:
            group["lr"] = scale * group["rate"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
        print0(f"wrote {run_dir}")


def _state(optimizer: torch.optim.Optimizer, p: nn.Parameter):
    return optimizer.state.get(p, {}).items()


def _resume(
    drag: DRAG, beside: nn.Module, optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], directory: Path
) -> tuple[int, float]:
    meta = read_meta(directory)
    drag.generator.load_adapters(directory)
    load_beside(directory, beside)
    for key, value in load_file(directory / "optimizer.safetensors").items():
        name, _, field = key.rpartition("/")
        optimizer.state[names[name]][field] = value if field == "step" else value.to(names[name].device)
    torch.set_rng_state(torch.tensor(meta["rng"], dtype=torch.uint8))
    return meta["step"], meta["elapsed_seconds"]
