"""D-RAG's second phase with a model of transformers: its LoRA, the projector and the retriever learn together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat import adamw
from nanochat.checkpoint_manager import load_beside, save_beside
from nanochat.common import Compute
from nanochat.kg.drag import DRAG
from nanochat.training import Phase, TrainConfig


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
    """lm_lr: of the adapters; beside_lr: of retriever and projector."""
    beside = drag.beside.to(compute.device)

    def save(directory: Path) -> None:
        drag.generator.save(directory)
        save_beside(directory, beside)

    def load(directory: Path) -> None:
        drag.generator.load_adapters(directory)
        load_beside(directory, beside)

    parts = {"lm": (drag.generator.model, lm_lr), "beside": (beside, beside_lr)}
    adamw.train(adamw.Learner(parts, save, load), phases, config, compute, run_dir, evaluate, meta)
