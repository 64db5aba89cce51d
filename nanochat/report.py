"""A run's report: report.md with the settings, the figures and plots, next to the checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

from nanochat.common import atomic_write_text

_NOT_PLOTTED = {"step", "phase", "lr_scale", "seconds", "tokens_per_s", "elapsed", "grad_norm", "loss"}


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl; null, which stands for what is not a number, as nan."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def write_report(run_dir: Path, title: str, config: dict, model: str, num_steps: int) -> Path:
    """Write run_dir/report.md, loss.png and, where there are other figures than losses, figures.png from
    run_dir/metrics.jsonl. model: what it is, in a sentence."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    last = rows[-1]
    tokens = sum(r["tokens_per_s"] * r["seconds"] for r in rows)
    seconds = sum(r["seconds"] for r in rows)
    names = sorted({k for r in rows for k in r} - _NOT_PLOTTED)
    most = max(len(r) for r in rows)
    evals = [r for r in rows if set(r) - _NOT_PLOTTED and len(r) == most]  # some figures come with every step
    losses = [name for name in names if name.endswith("loss")]
    plot_curves(rows, losses, run_dir / "loss.png", title)
    if others := [name for name in names if name not in losses]:
        plot_panels(rows, others, run_dir / "figures.png", title)
    lines = [
        f"# {title}",
        "",
        f"Model: {model}.",
        f"{last['step']} of {num_steps} steps, {tokens:,.0f} tokens in {seconds / 60:.1f} minutes of steps "
        f"({tokens / seconds:,.0f} tokens/s), {last['elapsed'] / 60:.1f} minutes in all.",
        "",
        "![losses](loss.png)",
        *(["![figures](figures.png)"] if others else []),
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


def plot_panels(rows: list[dict], names: list[str], path: Path, title: str) -> None:
    """Every other figure over steps, in a panel of its own: raw, and where there are many points smoothed too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.6 * lines), layout="constrained", squeeze=False)
    for panel, name in zip(axes.flat, names, strict=False):
        steps, values = zip(*[(r["step"], r[name]) for r in rows if name in r], strict=True)
        many = len(values) > 30
        panel.plot(steps, values, marker="" if many else "o", markersize=3, linewidth=0.8, alpha=0.35 if many else 1)
        if many:
            smooth, average = [], values[0]
            for value in values:
                average += (value - average) * 0.1
                smooth.append(average)
            panel.plot(steps, smooth, color="C0", linewidth=1.6)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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


def plot_searches(series: dict[str, dict[str, tuple[float, float]]], path: Path) -> None:
    """How good answers are against what they cost: (searches per question, EM as a share) of each point by its name;
    the points of a series are joined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row, (label, points) in enumerate(series.items()):
        axes.plot(*zip(*sorted(points.values()), strict=True), marker="o", markersize=4, linewidth=1.2, label=label)
        for name, point in points.items():
            place = (6, 8) if row % 2 else (6, -12)
            axes.annotate(name, point, textcoords="offset points", xytext=place, fontsize=8, color=f"C{row}")
    axes.set(xlabel="searches per question", ylabel="EM")
    axes.margins(x=0.15, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_bars(systems: dict[str, dict[str, tuple[float, float, float]]], path: Path, title: str) -> None:
    """Figures side by side, a group for each, a colour for each system: (value, low, high) with the interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for figures in systems.values() for name in figures))
    width = 0.8 / len(systems)
    figure, axes = plt.subplots(figsize=(max(6, 1.2 * len(names) + 2), 4.2), layout="constrained")
    for at, (system, figures) in enumerate(systems.items()):
        there = [n for n, name in enumerate(names) if name in figures]
        values = [figures[names[n]] for n in there]
        places = [n + (at - (len(systems) - 1) / 2) * width for n in there]
        errors = [[max(0.0, v - low) for v, low, _ in values], [max(0.0, high - v) for v, _, high in values]]
        axes.bar(places, [v for v, _, _ in values], width * 0.92, yerr=errors, capsize=2, label=system, ecolor="0.3")
    axes.set_xticks(range(len(names)), [name.replace("_", "\n", 1) for name in names])
    axes.set(ylim=(0, 1.05), title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(
    series: dict[str, dict[int, float]], path: Path, title: str, xlabel: str, ylabel: str, logarithmic: bool = False
) -> None:
    """A line through the points of each series."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name, points in series.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=4, label=name)
    if logarithmic:
        axes.set_xscale("log")
    ticks = sorted({x for points in series.values() for x in points})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set(ylim=(0, 1.02), title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
