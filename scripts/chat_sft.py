"""Teach a pretrained model to talk: fine-tuning on conversations. Its checkpoints are of source "mid".

python -m scripts.chat_sft --tasks Dolly --dolly_path dolly15k.jsonl
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft --tasks SmolTalk --conversations mine.jsonl
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.packing import PackedBatches
from nanochat.training import Phase, TrainConfig, mean_loss, rows_per_step, train
from tasks.common import load_conversations, load_tasks, render_examples


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Fine-tune a base model on conversations."""

    source: str = "base"
    """Checkpoint to start from."""
    tasks: list[str] = field(default_factory=lambda: ["SmolTalk"])
    """SmolTalk and Dolly, separated by commas; empty for none."""
    conversations: list[Path] = field(default_factory=list)
    """Files with one conversation {"messages": [...]} a line, separated by commas."""
    smoltalk_path: Path | None = None
    """A local copy of SmolTalk (.jsonl), for machines that do not reach the hub."""
    dolly_path: Path | None = None
    """The file of Dolly 15k."""
    task_samples: int = -1
    """Conversations taken of each task; -1: all."""
    max_doc_length: int = 500
    """Longest document in a conversation, in tokens; the rest is cut."""
    val_examples: int = 200
    """Conversations held out for validation (at most a tenth)."""


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    tag = find_model_tag(config.source, config.model_tag)
    model, tokenizer, _, _ = load_checkpoint(checkpoint_root(config.source, tag), device=compute.device)
    paths = {"smoltalk": config.smoltalk_path, "dolly": config.dolly_path}
    talks = load_tasks(config.tasks, paths, config.task_samples)
    for path in config.conversations:
        talks += load_conversations(path)
    if len(talks) < 2:
        raise UserError("at least two conversations are needed: name --tasks or --conversations")
    random.Random(config.seed).shuffle(talks)
    held_out = max(1, min(config.val_examples, len(talks) // 10))
    rows = rows_per_step(config, compute.world_size)
    batches = {}
    for name, part in {"val": talks[:held_out], "train": talks[held_out:]}.items():
        data, counts = render_examples(part, tokenizer, config.max_seq_len, config.max_doc_length)
        print0(f"{name}: {counts}")
        batches[name] = PackedBatches(data, config.max_seq_len, rows, config.seed)
    steps = config.num_steps if config.num_steps >= 0 else round(config.num_epochs * batches["train"].steps_per_epoch())

    def evaluate() -> dict[str, float]:
        return {"val_loss": mean_loss(model, batches["val"], batches["val"].steps_per_epoch(), config, compute)}

    phases = [Phase("sft", batches["train"], max(1, steps))]
    train(model, tokenizer, phases, config, compute, checkpoint_root("mid", tag), evaluate)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
