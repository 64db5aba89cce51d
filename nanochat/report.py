"""A run's report: report.md with the settings, the figures and a plot of the losses, next to the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import atomic_write_text

if TYPE_CHECKING:
    from nanochat.model.lm import HybridLM

_NOT_PLOTTED = {"step", "phase", "lr_scale", "seconds", "tokens_per_s", "elapsed", "grad_norm", "loss"}


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]


def write_report(run_dir: Path, title: str, config: dict, model: HybridLM, num_steps: int) -> Path:
    """Write run_dir/report.md and run_dir/loss.png from run_dir/metrics.jsonl."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    last = rows[-1]
    tokens = sum(r["tokens_per_s"] * r["seconds"] for r in rows)
    seconds = sum(r["seconds"] for r in rows)
    evals = [r for r in rows if set(r) - _NOT_PLOTTED]
    names = sorted({k for r in evals for k in r} - _NOT_PLOTTED)
    plot_curves(rows, names, run_dir / "loss.png", title)
    lines = [
        f"# {title}",
        "",
        f"Model: `{model.config.block_pattern}`, width {model.config.d_model}, "
        f"{model.num_parameters() / 1e6:.2f}M parameters, vocabulary {model.config.vocab_size}.",
        f"{last['step']} of {num_steps} steps, {tokens:,.0f} tokens in {seconds / 60:.1f} minutes of steps "
        f"({tokens / seconds:,.0f} tokens/s), {last['elapsed'] / 60:.1f} minutes in all.",
        "",
        "![losses](loss.png)",
        "",
        "| step | loss | " + " | ".join(names) + (" |" if names else ""),
        "|---" * (2 + len(names)) + "|",
    ]
    for r in evals or [last]:
        lines.append(f"| {r['step']} | {r['loss']:.4f} | " + "".join(f"{r.get(k, float('nan')):.4f} | " for k in names))
    lines += ["", "Settings:", "", "```", *(f"{k} = {v!r}" for k, v in config.items()), "```", ""]
    path = run_dir / "report.md"
    atomic_write_text(path, "\n".join(lines))
    return path


def plot_curves(rows: list[dict], names: list[str], path: Path, title: str) -> None:
    """Training loss (raw and smoothed, a colour per phase) and every validation figure over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for phase in dict.fromkeys(r["phase"] for r in rows):
        members = [r for r in rows if r["phase"] == phase]
        steps, losses = [r["step"] for r in members], [r["loss"] for r in members]
        smooth, average = [], losses[0]
        for loss in losses:
            average += (loss - average) * 0.1
            smooth.append(average)
        (line,) = axes.plot(steps, smooth, label=f"{phase} (smoothed)", linewidth=1.6)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    for name in names:
        points = [(r["step"], r[name]) for r in rows if name in r]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle="--", label=name)
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
