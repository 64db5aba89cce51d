"""The one training loop: accumulation, schedule, data parallel ranks, evals, logs, checkpoints, resume.

A script gives it a model, a tokenizer and phases of batches (each batch a pure function of the step), and what to
evaluate. All is written under one run directory: step_XXXXXX/ checkpoints, metrics.jsonl, config.json, report.md.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from nanochat.checkpoint_manager import list_steps, load_beside, load_checkpoint, require_space, save_checkpoint
from nanochat.common import Compute, UserError, keep_freed_memory, print0
from nanochat.config import config_to_dict
from nanochat.model.fp8 import use_fp8
from nanochat.model.kernels import set_ssm_kernel
from nanochat.model.lm import IGNORE, HybridLM
from nanochat.model.lora import FILE as LORA_FILE
from nanochat.model.lora import has_lora, load_adapter
from nanochat.optim import Optimizers
from nanochat.parallel import (
    agree_on_step,
    clip_gradients,
    load_whole,
    micro_batches,
    most_of_ranks,
    shard,
    sum_gradients,
    sum_over_ranks,
    unsharded,
)
from nanochat.report import write_report
from nanochat.run_log import RunLog
from nanochat.stopping import FiniteCheck, StopSignal, told_to_stop
from nanochat.tokenizer import Tokenizer


@dataclass(kw_only=True)
class TrainConfig:
    """Settings every training script shares."""

    run: str = "dummy"
    """Name of the run in wandb; "dummy" logs to metrics.jsonl only."""
    model_tag: str = ""
    """Name of the model's checkpoint folder; empty: d<depth>, or the tag of the checkpoint it starts from."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights stay float32. auto: bfloat16 where the hardware multiplies in it."""
    ssm_kernel: Literal["auto", "mamba_ssm", "fla", "torch"] = "auto"
    """Code of the state-space scan on a GPU; auto: the first of these that is installed."""
    fp8: bool = False
    """Large matrix products in FP8 (Hopper or newer, needs torchao)."""
    fp8_emulate: bool = False
    """The roundings of FP8 on hardware without it, for tests; slower."""
    seed: int = 0
    """Seeds weights, data order and sampling."""
    max_seq_len: int = 2048
    """Length of a training row in tokens; examples are packed into rows."""
    device_batch_size: int = 8
    """Rows in one forward pass on one device; lower it when memory runs out, the result stays the same."""
    total_batch_size: int = 65536
    """Tokens in one optimizer step, over all devices (rounded down to whole rows)."""
    grad_accum_steps: int = 0
    """Forward passes of device_batch_size rows on each device in one optimizer step; 0: as total_batch_size needs."""
    num_steps: int = -1
    """Optimizer steps; -1: from num_epochs."""
    num_epochs: float = 1.0
    """Passes over the data when num_steps is -1."""
    max_minutes: float = -1.0
    """Stop after this many minutes of training, with the learning rate brought down in time; -1: no limit."""
    matrix_lr: float = 0.02
    """Muon's learning rate for the matrices inside blocks."""
    embed_lr: float = 0.02
    """AdamW's learning rate for the embedding (scaled by (width / 768)^-0.5). nanochat's .2 goes with a norm right
    after the embedding; without one it makes the embedding drown what the blocks write."""
    head_lr: float = 0.004
    """AdamW's learning rate for the output layer (scaled likewise)."""
    scalar_lr: float = 0.005
    """AdamW's learning rate for norms, convolutions and the scan's own parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay of Muon."""
    init_lr_frac: float = 1.0
    """Scales every learning rate: 1 to train, less to fine-tune carefully."""
    warmup_steps: int = 0
    """Steps of rising learning rate."""
    warmdown_frac: float = 0.4
    """Last share of training over which the learning rate falls linearly."""
    final_lr_frac: float = 0.05
    """Learning rate at the end, as a share of its peak."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    compile: bool = False
    """Compile the MLPs, for a GPU: fewer passes over memory, and what FP8 needs to pay. The first step waits for it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every: int = 250
    """Steps between validations (one more at the end); 0: never."""
    save_every: int = 1000
    """Steps between checkpoints (one more at the end, and one where SIGTERM or Ctrl-C ends the run)."""
    keep_last: int = 2
    """Checkpoints that are kept; older ones are removed."""
    keep_best: str = ""
    """Figure of the validations, like val_loss, by which the best checkpoint is kept too (--model_tag TAG/best): the
    lowest where it is a loss, else the highest."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where a step's loss or gradient is not a number: stop before the update, or leave the step out (ten in a row at
    most)."""
    shard: bool = False
    """Split weights, gradients and optimizer state over torchrun's ranks (FSDP2), for models too large for one GPU."""
    log_every: int = 10
    """Steps between printed lines; metrics.jsonl gets every step."""
    resume: Literal["", "auto"] = ""
    """auto: go on from the newest complete checkpoint of this model_tag, if there is one."""
    plan: bool = False
    """Print what the run would cost and stop: model size, tokens, memory, disk, time. Opens every input."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise UserError(f"--keep_last {self.keep_last}: at least 1")


class Batches(Protocol):
    """get: a Batch, or whatever else the phase's loss takes, with `learned` (what losses are divided by) and `to`."""

    max_seq_len: int
    rows_per_step: int

    def get(self, step: int, which: range | None = None) -> Any: ...


@dataclass
class Phase:
    """A stretch of training on one source of batches."""

    name: str
    batches: Batches
    steps: int
    depth: int | None = None
    """Train the first blocks only, with the output layer right after them; the others are left as they are."""
    lr: float = 1.0
    """Scales the learning rates."""
    loss: Callable[[HybridLM, Any], torch.Tensor] | None = None
    """The sum of a batch's losses; None: of the next token."""
    figures: Callable[[], dict[str, float]] | None = None
    """Asked after each step's gradients, for the log; may stop the run before the update by a UserError."""

    def sum_of_losses(self, model: HybridLM, batch: Any) -> torch.Tensor:
        if self.loss is not None:
            return self.loss(model, batch)
        return model(batch.tokens, batch.targets, seq_idx=batch.seq_idx, reduction="sum", depth=self.depth)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies in it (recent GPUs; CPUs with AVX512-BF16 or AMX, where a small
    hybrid trained about twice as fast), else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        fast = device.type == "cpu" and any(probe() for probe in probes if probe)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def lr_scale(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up over steps, constant, linear warm-down over the last share of the run (progress in [0, 1])."""
    if step < config.warmup_steps:
        return config.init_lr_frac * (step + 1) / config.warmup_steps
    left = (1 - progress) / config.warmdown_frac if config.warmdown_frac > 0 else 1.0
    return config.init_lr_frac * (config.final_lr_frac + (1 - config.final_lr_frac) * min(1.0, max(0.0, left)))


def rows_per_step(config: TrainConfig, world_size: int) -> int:
    if config.grad_accum_steps < 0:
        raise UserError(f"--grad_accum_steps {config.grad_accum_steps}: at least 1, or 0 to go by --total_batch_size")
    if config.grad_accum_steps:
        return config.grad_accum_steps * config.device_batch_size * world_size
    rows = config.total_batch_size // config.max_seq_len
    if rows < world_size:
        raise UserError(
            f"total_batch_size {config.total_batch_size} holds {rows} rows of max_seq_len {config.max_seq_len}, fewer "
            f"than the {world_size} device(s): raise total_batch_size to at least {world_size * config.max_seq_len}"
        )
    return rows


@torch.no_grad()
def mean_loss(model: HybridLM, batches: Batches, steps: int, config: TrainConfig, compute: Compute) -> float:
    """Mean loss per learned token over the first `steps` batches, shared among the ranks."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=compute.device)
    dtype = resolve_dtype(config.dtype, compute.device)
    for step in range(steps):
        for rows in micro_batches(batches.rows_per_step, config.device_batch_size, compute):
            batch = batches.get(step, rows).to(compute.device)
            with autocast(compute.device, dtype):
                loss = model(batch.tokens, batch.targets, seq_idx=batch.seq_idx, reduction="sum")
            total += torch.stack([loss.double(), (batch.targets != IGNORE).sum().double()])
    sum_over_ranks(total, compute)
    model.train()
    return (total[0] / total[1].clamp_min(1)).item()


def train(
    model: HybridLM,
    tokenizer: Tokenizer,
    phases: list[Phase],
    config: TrainConfig,
    compute: Compute,
    run_dir: Path,
    evaluate: Callable[[], dict[str, float]] | None = None,
    meta: dict | None = None,
    best_by: str = "",
    beside: nn.Module | None = None,
    beside_lr: float = 0.0,
) -> HybridLM:
    """Train through the phases in order; returns the model. With config.plan, print the plan and leave the model alone.

    evaluate() returns named figures; it runs every eval_every steps and after the last. best_by: the figure by which
    the best checkpoint is kept too, in run_dir/best (--model_tag TAG/best), where config.keep_best names no other.
    beside: another module that the phases' losses train along with the model, and that its checkpoints hold.
    """
    num_steps = sum(p.steps for p in phases)
    if num_steps < 1:
        raise UserError("nothing to train: num_steps is 0 (raise num_steps or num_epochs)")
    modules = [model] if beside is None else [model, beside]
    for module in modules:
        module.to(compute.device)
        module.train()
    model.gradient_checkpointing = config.gradient_checkpointing
    if compute.device.type == "cpu":
        keep_freed_memory()
    set_ssm_kernel(config.ssm_kernel)
    if config.fp8 or config.fp8_emulate:
        changed = use_fp8(model, compute.device, config.fp8_emulate)
        print0(f"fp8: {changed} linear layers{' (emulated)' if config.fp8_emulate else ''}")
    if config.compile:
        model.compile_mlps()
    dtype = resolve_dtype(config.dtype, compute.device)
    print_plan(model, phases, config, compute, dtype)
    if config.plan:
        return model
    if config.shard:
        _check_sharding(model, phases, config, compute)
        shard(model, compute)
    optimizers = Optimizers(
        model,
        config.matrix_lr,
        config.embed_lr,
        config.head_lr,
        config.scalar_lr,
        config.weight_decay,
        beside,
        beside_lr,
    )
    best_by = config.keep_best or best_by
    step, elapsed, best = 0, 0.0, -math.inf
    taken = [0] * len(phases)  # steps done in each phase: its data position
    if config.resume == "auto" and list_steps(run_dir):
        step, elapsed, taken, best = _resume(model, tokenizer, optimizers, run_dir, compute, beside)
    agree_on_step(step, run_dir, compute)
    size = sum(_state_bytes(model))
    if compute.is_main:
        require_space(run_dir, size, config.keep_last + bool(best_by))
    log = RunLog(run_dir, config, step) if compute.is_main else None
    save_meta = {"training_config": config_to_dict(config), **(meta or {})}
    finite = FiniteCheck(config.on_nan, run_dir)

    def save(directory: Path, keep: int) -> None:
        saved = unsharded(model) if config.shard else model
        optimizer_state = optimizers.state_dict()
        if not compute.is_main:
            return
        require_space(directory, size)
        state = {**save_meta, "elapsed_seconds": elapsed, "phase_steps": taken, "rng": torch.get_rng_state().tolist()}
        if best_by:
            state |= {"best": best}
        save_checkpoint(directory, step, saved, tokenizer, state, optimizer_state, keep, beside)

    def report() -> None:
        if log:
            log.close()
            write_report(run_dir, log.title, config_to_dict(config), model.description, num_steps)

    starts = [sum(p.steps for p in phases[:i]) / num_steps for i in range(len(phases))]
    limit = config.max_minutes * 60 if config.max_minutes > 0 else math.inf
    done = step >= num_steps or elapsed >= limit
    saved_step = step
    with StopSignal() as stop:
        while not done:
            began = time.perf_counter()
            # under a time limit every phase gets its share of the time, whatever the machine's speed
            progress = max(step / num_steps, elapsed / limit)
            phase_index = max(i for i, start in enumerate(starts) if start <= progress)
            phase = phases[phase_index]
            batches = phase.batches
            shares = micro_batches(batches.rows_per_step, config.device_batch_size, compute)
            micros = [batches.get(taken[phase_index], rows) for rows in shares]
            learned, stopping = told_to_stop(stop, sum(batch.learned for batch in micros), compute)
            if stopping:
                if step > saved_step:
                    save(run_dir, config.keep_last)
                if step:
                    report()
                stop.leave(compute, step, num_steps, run_dir)
            loss_sum = torch.zeros(1, device=compute.device)
            for batch in micros:
                batch = batch.to(compute.device)
                with autocast(compute.device, dtype):
                    loss = phase.sum_of_losses(model, batch) / max(1.0, learned)
                loss.backward()
                loss_sum += loss.detach()
            for module in modules:
                sum_gradients(module, compute)
            sum_over_ranks(loss_sum, compute)
            loss_value = loss_sum.item()
            weights = [p for module in modules for p in module.parameters()]
            norm = clip_gradients(weights, config.grad_clip, compute)
            fine = finite.passes(step, phase.name, loss_value, norm, batches, taken[phase_index])
            try:
                more = phase.figures() if phase.figures else {}
            except UserError:
                if step:  # what led to it can be looked at
                    report()
                raise
            scale = phase.lr * lr_scale(config, step, progress)
            if fine:
                optimizers.set_lr_scale(scale)
                optimizers.step()
            optimizers.zero_grad()
            step += 1
            taken[phase_index] += 1
            seconds = time.perf_counter() - began
            elapsed += seconds
            if limit < math.inf:
                elapsed = most_of_ranks(elapsed, compute)  # all ranks must stop at the same step
            done = step >= num_steps or elapsed >= limit
            tokens = batches.rows_per_step * batches.max_seq_len
            figures = {
                "phase": phase.name,
                "loss": loss_value,
                "lr_scale": scale,
                "grad_norm": norm,
                "seconds": seconds,
                **more,
            }
            evaluated = False
            if config.eval_every and evaluate and (step % config.eval_every == 0 or done):
                paused = time.perf_counter()
                found = evaluate()
                figures |= {f"val_{name}" if name in more else name: value for name, value in found.items()}
                evaluated = True
                if best_by and (score := score_by(best_by, found)) > best:
                    best = score
                    save(run_dir / "best", keep=1)
                elapsed += time.perf_counter() - paused  # a time limit is a promise to the user: it counts all time
                if limit < math.inf:
                    elapsed = most_of_ranks(elapsed, compute)
                    done = done or elapsed >= limit
            if log:
                log.write(step, num_steps, figures, tokens, elapsed, limit, show=done or evaluated)
            if done or step % config.save_every == 0:
                save(run_dir, config.keep_last)
                saved_step = step
    report()
    if log:
        print0(f"wrote {run_dir}")
    return unsharded(model) if config.shard else model


def score_by(name: str, figures: dict[str, float]) -> float:
    """By which the best checkpoint is kept: the higher the better."""
    if name not in figures:
        raise UserError(f"--keep_best {name}: the validations have {', '.join(sorted(figures))}")
    return -figures[name] if name.endswith("loss") else figures[name]


def _check_sharding(model: HybridLM, phases: list[Phase], config: TrainConfig, compute: Compute) -> None:
    if any(phase.loss is not None for phase in phases):
        raise UserError("--shard: this training reads the model's parts one by one; leave --shard out")
    if config.fp8 or config.fp8_emulate or has_lora(model):
        raise UserError("--shard: not together with FP8 or LoRA; leave one of them out")
    rows = phases[0].batches.rows_per_step
    if rows % compute.world_size:
        raise UserError(
            f"--shard: {rows} rows a step cannot be shared equally by {compute.world_size} devices, which have to work "
            f"in step: --total_batch_size {rows // compute.world_size * compute.world_size * config.max_seq_len}"
        )


def _resume(
    model: HybridLM,
    tokenizer: Tokenizer,
    optimizers: Optimizers,
    run_dir: Path,
    compute: Compute,
    beside: nn.Module | None,
) -> tuple[int, float, list[int], float]:
    """Load the newest complete checkpoint into model and optimizers; returns its step, training seconds so far, steps
    done in each phase and the best figure so far."""
    saved, saved_tokenizer, meta, state = load_checkpoint(run_dir, device=compute.device)
    if saved_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{run_dir} was trained with another tokenizer; use another --model_tag, or delete it")
    if saved.config != model.config:
        raise UserError(f"{run_dir} holds a model of another shape; use another --model_tag, or delete it")
    directory = Path(meta["directory"])
    if (directory / LORA_FILE).exists() != has_lora(model):
        raise UserError(
            f"{run_dir} was trained {'without' if has_lora(model) else 'with'} LoRA: use another --model_tag"
        )
    if has_lora(model):
        load_adapter(model, directory, saved.state_dict())
    else:
        load_whole(model, saved.state_dict())
    if beside is not None:
        load_beside(directory, beside)
    if state is None:
        raise UserError(f"{run_dir} has no optimizer state to resume from")
    optimizers.load_state_dict(state)
    torch.set_rng_state(torch.tensor(meta["rng"], dtype=torch.uint8))
    print0(f"resuming {run_dir} after step {meta['step']}")
    return meta["step"], meta["elapsed_seconds"], meta["phase_steps"], meta.get("best", -math.inf)


def _state_bytes(model: HybridLM) -> tuple[int, int]:
    """Bytes of weights and of optimizer state (Muon one moment, AdamW two), both float32."""
    trained = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    state = 4 * sum(n * (1 if name.endswith("proj.weight") else 2) for name, n in trained)
    return 4 * model.num_parameters(), state


def print_plan(model: HybridLM, phases: list[Phase], config: TrainConfig, compute: Compute, dtype: torch.dtype) -> None:
    """What the run will cost, before it starts. Time is measured on one forward and backward pass, not guessed."""
    weights, state = _state_bytes(model)
    c = model.config
    size = 2 if dtype == torch.bfloat16 else 4
    tokens_in_flight = config.device_batch_size * config.max_seq_len
    per_token = len(c.block_pattern) * (14 * c.d_model + 2 * c.mlp_width) * size  # activations kept for backward
    if config.gradient_checkpointing:
        per_token = len(c.block_pattern) * c.d_model * 4
    head = tokens_in_flight * c.vocab_size * 4 * 2
    memory = 2 * weights + state + tokens_in_flight * per_token + head
    total = sum(p.steps * p.batches.rows_per_step * p.batches.max_seq_len for p in phases)
    print0(f"model: {c.block_pattern}, width {c.d_model}, {model.num_parameters() / 1e6:.2f}M parameters, {dtype}")
    for p in phases:
        fill = f", rows {p.batches.fill:.1%} full" if hasattr(p.batches, "fill") else ""
        tokens = p.batches.rows_per_step * p.batches.max_seq_len
        print0(f"phase {p.name}: {p.steps} steps of {tokens:,} tokens ({p.batches.rows_per_step} rows){fill}")
    print0(
        f"total: {total:,} tokens, {total * model.flops_per_token(config.max_seq_len):.2e} FLOPs; about "
        f"{memory / 1e9:.2f} GB memory, {3 * (weights + state) / 1e9:.2f} GB disk"
    )
    if not config.plan:
        return
    phase = phases[-1]
    rows = micro_batches(phase.batches.rows_per_step, config.device_batch_size, compute)[0]
    batch = phase.batches.get(0, rows).to(compute.device)
    for _ in range(2):  # the first pass warms up
        began = time.perf_counter()
        with autocast(compute.device, dtype):
            loss = phase.sum_of_losses(model, batch)
        loss.backward()
        loss.item()
        seconds = time.perf_counter() - began
        model.zero_grad(set_to_none=True)
    rate = len(rows) * phase.batches.max_seq_len * compute.world_size / seconds
    estimate = total / rate / 60
    if config.max_minutes > 0:
        estimate = min(estimate, config.max_minutes)
    print0(f"time: about {estimate:.1f} minutes at {rate:,.0f} tokens/s (one pass measured). --plan: stopped here")
