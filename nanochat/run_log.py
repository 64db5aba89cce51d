"""What a training run says of its steps: metrics.jsonl (one JSON object a step), progress lines, wandb if asked for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, print0
from nanochat.config import config_to_dict, save_config

if TYPE_CHECKING:
    from nanochat.training import TrainConfig


class RunLog:
    def __init__(self, run_dir: Path, config: TrainConfig, resumed_step: int):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.title = f"{run_dir.parent.name}/{run_dir.name}"
        self.every = config.log_every
        self.path = run_dir / "metrics.jsonl"
        save_config(config, run_dir / "config.json")
        kept = []
        if resumed_step and self.path.exists():  # steps after the checkpoint will be run, and logged, again
            lines = self.path.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if _logged_step(line) <= resumed_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept if line), encoding="utf-8")
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self.wandb = None
        if config.run != "dummy":
            try:
                import wandb
            except ImportError:
                raise UserError(
                    f'--run needs wandb: pip install "nanochat[wandb]"; without --run all is logged to {self.path}'
                ) from None
            self.wandb = wandb.init(project="nanochat", name=config.run, config=config_to_dict(config))

    def write(self, step, num_steps, figures, tokens, elapsed, limit, show) -> None:
        rate = tokens / figures["seconds"]
        row = {"step": step, **figures, "tokens_per_s": rate, "elapsed": elapsed}
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}); --resume auto goes on from the last checkpoint"
            ) from error
        if self.wandb:
            self.wandb.log({k: v for k, v in figures.items() if k != "phase"} | {"tokens_per_s": rate}, step=step)
        extra = {k: v for k, v in figures.items() if k not in ("phase", "loss", "lr_scale", "grad_norm", "seconds")}
        if not (show or step % self.every == 0 or step == 1):
            return
        left = min(elapsed / step * (num_steps - step), limit - elapsed)
        shown = "".join(f" | {k} {v:.4f}" for k, v in extra.items())
        print0(
            f"{figures['phase']} {step}/{num_steps} | loss {figures['loss']:.4f} | lr x{figures['lr_scale']:.2f} | "
            f"{rate:,.0f} tok/s | {_clock(max(0.0, left))} left{shown}"
        )

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line cut off by a kill


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
