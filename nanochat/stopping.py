"""How a training run ends before its end: a signal, a loss that is no number, a full disk. What was learned is kept."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import list_steps
from nanochat.common import Compute, Stopped, UserError, print0

MOST_SKIPPED = 10  # steps in a row; after so many it is no longer the batch
_AGAIN = 3.0  # seconds in which a signal is the same one: torchrun passes on what a terminal has sent to all


class StopSignal:
    """SIGTERM and SIGINT end the run after its step, while inside; one more, seconds later, ends it at once."""

    def __enter__(self) -> StopSignal:
        self.number, self._at = 0, 0.0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > _AGAIN:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)

    def leave(self, compute: Compute, step: int, num_steps: int, run_dir: Path) -> None:
        """Raise Stopped, on every rank, when the main process has saved."""
        if compute.world_size > 1:
            dist.barrier()  # the first process to end takes the others down
        number = self.number or signal.SIGTERM  # another rank was told
        name = signal.Signals(number).name
        raise Stopped(number, f"{name} after step {step} of {num_steps}: saved in {run_dir}; --resume auto goes on")


class FiniteCheck:
    """Of each step's loss and gradient norm, before the update. on_nan: stop the run, or skip the step."""

    def __init__(self, on_nan: Literal["stop", "skip"], run_dir: Path):
        self.on_nan, self.run_dir = on_nan, run_dir
        self._in_a_row = 0

    def passes(self, step: int, phase: str, loss: float, norm: float, batches: Any, at: int) -> bool:
        """Whether the step may be taken. batches, at: where its batch came from, to name the examples in it."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        examples: Sequence[int] = batches.examples(at) if hasattr(batches, "examples") else ()
        shown = ", ".join(map(str, examples[:8])) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        what = f"step {step} ({phase}{', examples ' if shown else ''}{shown}): loss {loss}, gradient norm {norm}"
        if self.on_nan == "skip" and self._in_a_row <= MOST_SKIPPED:
            print0(f"{what}; left out")
            return False
        steps = list_steps(self.run_dir)
        last = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        often = f"; {MOST_SKIPPED} steps before were left out already" if self.on_nan == "skip" else ""
        other = "" if self.on_nan == "skip" else ", or leave such steps out (--on_nan skip)"
        raise UserError(
            f"{what}{often}; stopped before the update, {last}. Lower the learning rate (--init_lr_frac) and go on "
            f"with --resume auto{other}"
        )


def told_to_stop(stop: StopSignal, learned: int, compute: Compute) -> tuple[float, bool]:
    """(tokens learned by all ranks in this step, whether any of them was told to stop): one sum, so that all agree."""
    if compute.world_size == 1:
        return learned, bool(stop.number)
    sums = torch.tensor([learned, bool(stop.number)], dtype=torch.float64).to(compute.device)
    dist.all_reduce(sums)
    return sums[0].item(), sums[1].item() > 0
