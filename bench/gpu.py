"""What a GPU does with it, in one call of under ten minutes: parity and speed of the scan's kernels, training of d12
and d20 in bf16 and FP8, decoding, peak memory by length for attention, hybrid and Mamba.

    python -m bench.gpu --json          # on a CPU: the same code at a size that only shows that it runs

MFU is the model's matrix FLOPs over the card's peak in bf16 (--peak_tflops, 989 for an H100 or H200 without sparsity),
and beside it over the rate of square products of 8,192 measured in the same run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.common import print_figures, start, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.model import kernels
from nanochat.model.fp8 import use_fp8
from nanochat.model.lm import HybridLM, ModelConfig, default_block_pattern
from nanochat.model.ssd import ssd_scan
from nanochat.optim import Optimizers
from nanochat.training import autocast


@dataclass(kw_only=True)
class Config:
    """Measure on a GPU (or show on a CPU that it would run)."""

    peak_tflops: float = 989.0
    """The card's peak in bf16, for MFU."""
    vocabulary: int = 32768
    """Tokens."""
    tokens: int = 65536
    """Tokens in a training step of d12; a third of it for d20."""
    rounds: int = 5
    """Timed rounds; the median counts."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        run()
    taken = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def fresh(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")


def scan_kernels(device: torch.device, config: Config) -> tuple[list[list], dict[str, float]]:
    """Every installed kernel against the float64 scan in PyTorch: relative errors of output, state and gradients, with
    packed documents and an initial state; and the time of forward and backward in bf16."""
    large = device.type == "cuda"
    B, L, H, P, N = (2, 512, 8, 64, 64) if large else (1, 64, 2, 16, 16)
    generator = torch.Generator().manual_seed(0)

    def inputs(L: int, dtype: torch.dtype) -> list[torch.Tensor]:
        x, Bm, Cm = (torch.randn(B, L, h, n, generator=generator) for h, n in ((H, P), (1, N), (1, N)))
        dt, A = torch.rand(B, L, H, generator=generator) * 0.1, -torch.rand(H, generator=generator) * 15 - 1
        h0 = torch.randn(B, H, P, N, generator=generator)
        made = [t.to(device, dtype) for t in (x, Bm, Cm)] + [t.to(device) for t in (dt, A, h0)]
        return [t.requires_grad_() for t in made]

    def scan(given: list[torch.Tensor], documents: torch.Tensor | None) -> list[torch.Tensor]:
        x, Bm, Cm, dt, A, h0 = given
        y, state = ssd_scan(x, dt, A, Bm, Cm, h0, documents)
        loss = (y.float() * torch.linspace(-1, 1, y.shape[1], device=device)[:, None, None]).sum() + state.float().sum()
        return [y, state, *torch.autograd.grad(loss, given)]

    available = [k for k in kernels.PACKAGES if large and kernels._function(k) is not None]
    rows, figures = [], {}
    exact = [t.detach().double().requires_grad_() for t in inputs(L, torch.float32)]
    documents = (torch.rand(B, L, generator=generator) < 0.02).long().cumsum(1).to(device)
    for name in ["torch", *available]:
        errors = []
        for packed in (None, documents):
            kernels.set_ssm_kernel("torch")
            expected = scan(exact, packed)
            kernels.set_ssm_kernel(name)
            found = scan([t.detach().float().requires_grad_() for t in exact], packed)
            errors += [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
        timed = inputs(4096 if large else 64, torch.bfloat16)
        if name == "torch":
            timed = [t.detach().float().requires_grad_() for t in timed]
        seconds = seconds_of(lambda t=timed: scan(t, None), device, config.rounds)
        rows.append([name, max(errors), seconds * 1e3])
        figures[f"scan_error_{name}"], figures[f"scan_ms_{name}"] = max(errors), seconds * 1e3
    kernels.set_ssm_kernel("auto")
    return rows, figures


def training(device: torch.device, config: Config) -> tuple[list[list], dict[str, float]]:
    large = device.type == "cuda"
    size = 8192 if large else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    measured = 2 * size**3 / seconds_of(lambda: a @ b, device, config.rounds)
    rows, figures = [], {"matrix_tflops_bf16": measured / 1e12}
    for depth in (12, 20) if large else (2,):
        for fp8, compiled in ((False, False), (False, True), (True, True)):
            fresh(device)
            pattern = default_block_pattern(depth)
            torch.manual_seed(0)
            with torch.device(device):
                model = HybridLM(ModelConfig.from_depth(config.vocabulary if large else 256, None, pattern))
            if fp8:
                try:
                    use_fp8(model, device, emulate=not large)
                except UserError as error:
                    print(f"d{depth} in FP8 left out: {error}", flush=True)
                    continue
            if compiled:
                model.compile_mlps()
            optimizers = Optimizers(model)
            length = 2048 if large else 32
            step_tokens = config.tokens // (1 if depth <= 12 else 3) if large else 64
            tokens = torch.randint(0, model.config.vocab_size, (step_tokens // length, length + 1), device=device)

            def step(model=model, optimizers=optimizers, tokens=tokens) -> None:
                for row in tokens.split(8):
                    with autocast(device, torch.bfloat16):
                        loss = model(row[:, :-1], row[:, 1:])
                    loss.backward()
                optimizers.step()
                optimizers.zero_grad()

            rate = tokens.shape[0] * length / seconds_of(step, device, config.rounds)
            used = rate * model.flops_per_token(length)
            name = f"d{depth}_{'fp8' if fp8 else 'bf16'}{'_compiled' if compiled else ''}"
            mfu, of_measured = used / (config.peak_tflops * 1e12), used / measured
            rows.append([name, model.num_parameters() / 1e6, rate, mfu, of_measured, peak_gb(device)])
            figures |= {f"{name}_tokens_per_s": rate, f"{name}_mfu": mfu, f"{name}_of_measured": of_measured}
            print(f"{name}: {rate:,.0f} tokens/s", flush=True)
            del model, optimizers, step
    return rows, figures


def lengths(device: torch.device, config: Config) -> tuple[list[list], dict[str, float]]:
    """One training row of each length, with gradient checkpointing; then prefill of it and decoding after it."""
    large = device.type == "cuda"
    depth = 12 if large else 2
    patterns = {"T": "T" * depth, "hybrid": default_block_pattern(depth), "M": "M" * depth}
    rows, figures = [], {}
    for length in (4096, 8192, 32768) if large else (64,):
        for name, pattern in patterns.items():
            fresh(device)
            torch.manual_seed(0)
            with torch.device(device):
                model = HybridLM(ModelConfig.from_depth(config.vocabulary if large else 256, None, pattern))
            model.gradient_checkpointing = True
            tokens = torch.randint(0, model.config.vocab_size, (1, length + 1), device=device)

            def step(model=model, tokens=tokens) -> None:
                with autocast(device, torch.bfloat16):
                    model(tokens[:, :-1], tokens[:, 1:]).backward()

            seconds = seconds_of(step, device, 3)
            peak = peak_gb(device)
            model.zero_grad(set_to_none=True)
            model.eval()
            fresh(device)
            with torch.inference_mode(), autocast(device, torch.bfloat16):
                cache = model.new_cache(1)
                began = time.perf_counter()
                token = model(tokens[:, :-1], cache=cache, last_only=True).argmax(-1, keepdim=True).cpu().to(device)
                prefill = time.perf_counter() - began

                def decode(model=model, token=token, cache=cache) -> None:
                    for _ in range(16):
                        model(token, cache=cache, last_only=True)

                decoded = 16 / seconds_of(decode, device, 3)
            rows.append([length, name, length / seconds, peak, prefill, decoded, peak_gb(device)])
            figures |= {f"decode_{name}_{length}": decoded}
            if large:
                figures |= {f"peak_gb_{name}_{length}": peak}
            del model, cache, step, decode
    return rows, figures


def main() -> None:
    config = load_config(Config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start(threads=2 if device.type == "cpu" else 8)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: a self-test, its figures mean nothing"
    print(f"{name}\n", flush=True)
    figures: dict[str, float] = {}
    parts = [
        ("the scan's kernels", scan_kernels, ["kernel", "largest relative error", "ms"]),
        ("training", training, ["run", "M parameters", "tokens/s", "MFU", "of measured products", "peak GB"]),
        (
            "length",
            lengths,
            ["length", "model", "train tokens/s", "peak GB", "prefill s", "decode tokens/s", "decode peak GB"],
        ),
    ]
    for title, part, header in parts:
        rows, found = part(device, config)
        print(f"\n{title}\n\n{table(header, rows)}\n", flush=True)
        figures |= found
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
