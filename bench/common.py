"""What the benchmarks share: timing side by side, tables, the figures in the last line."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat.common import UserError, keep_freed_memory


def start(threads: int) -> None:
    """Fix the threads and the seed, and say on what machine the figures were taken."""
    import torch  # here, so that a benchmark without it neither waits for it nor counts its memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}, load before {load:.1f}", flush=True)


def side_by_side(runs: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each, after one call to warm up. All take turns in every round, so that what else the machine
    does falls on all of them."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; floats with three digits that matter."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *shown])


def run_script(base: Path, module: str, *arguments: object, may_fail_with: str = "") -> None:
    """A script in its own base directory, its output to base/log.txt. may_fail_with: words in the output of a failure
    that is a result."""
    began = time.perf_counter()
    path = base / "log.txt"
    before = path.stat().st_size if path.exists() else 0
    with open(path, "a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, "NANOCHAT_BASE_DIR": str(base)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    said = path.read_bytes()[before:].decode(errors="replace")
    if done.returncode and not (may_fail_with and may_fail_with in said):
        raise UserError(f"{module} failed; its output is in {path}")
    ended = f", {may_fail_with}" if done.returncode else ""
    print(f"{module} {base}: {time.perf_counter() - began:.0f} s{ended}", flush=True)


def print_figures(figures: dict[str, float], as_json: bool) -> None:
    print("\n" + table(["figure", "value"], list(figures.items())))
    if as_json:
        print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}}))


def on_small_disk(size: str, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module --disk DISK` with a disk of its own, in memory, that nothing else sees; its exit status."""
    if shutil.which("unshare") is None:
        raise UserError("cannot mount a small disk: there is no unshare; give one with --disk")
    with tempfile.TemporaryDirectory() as disk:
        mount = f"mount -t tmpfs -o size={size} none '{disk}' || exit 3; "
        alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        able = subprocess.run([*alone, f"{mount}exit 0"], capture_output=True, text=True)
        if able.returncode:
            raise UserError(f"cannot mount a small disk ({able.stderr.strip()}); give one with --disk")
        call = [sys.executable, "-m", module, "--disk", disk, *arguments]
        return subprocess.run([*alone, f'{mount}exec "$@"', "sh", *call]).returncode
