"""Pretrain a model on raw text.

    python -m scripts.base_train --input data/text --depth 4 --max_minutes 30
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --input data/text --depth 20

The tokenizer comes from scripts.tok_train. A very small model does not find in-context lookup by itself: give it
exercises on random tokens (nanochat/warmup.py), as configs/demo_base.py does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanochat.checkpoint_manager import checkpoint_root
from nanochat.common import UserError, compute_cleanup, compute_init, get_base_dir, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.dataset import tokenize_texts
from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.packing import PackedBatches, TokenData
from nanochat.tokenizer import Tokenizer
from nanochat.training import Phase, TrainConfig, mean_loss, rows_per_step, train
from nanochat.warmup import Marks, WarmupBatches, copy_example, far_copy_example, recall_example, record_example


@dataclass(kw_only=True)
class ModelShape:
    """Settings of a new model's shape."""

    depth: int | None = None
    """Number of blocks; sets the width (64 per block) and the pattern unless those are given."""
    block_pattern: str = ""
    """T (attention) and M (Mamba-2) blocks, like "M,T,M,T"; empty: Mamba first, attention spread."""
    d_model: int | None = None
    """Width, if it should not follow from the depth."""
    head_dim: int | None = None
    """Width of an attention head."""
    n_kv_head: int | None = None
    """Key/value heads (grouped-query attention); as many as query heads unless given."""
    d_state: int | None = None
    """State width N of Mamba-2."""
    d_conv: int | None = None
    """Width of Mamba-2's convolution, 4 unless given. More lets the first block see whole names of many tokens."""
    mamba_head_dim: int | None = None
    """Head width P of Mamba-2."""
    mlp: str = "swiglu"
    """swiglu or relu2; a model with relu2 and rope cannot be exported to transformers."""
    rope: bool = True
    """Rotary positions in attention."""
    rope_theta: float | None = None
    """Base of the rotary positions' wavelengths; larger keeps more of a head for matching content far away."""
    tie_embeddings: bool = False
    """One matrix for embedding and output layer."""

    def model_config(self, vocab_size: int) -> ModelConfig:
        names = ("n_kv_head", "d_state", "d_conv", "mamba_head_dim", "rope_theta")
        optional = {name: getattr(self, name) for name in names if getattr(self, name)}
        try:
            return ModelConfig.from_depth(
                vocab_size,
                self.depth,
                self.block_pattern or None,
                self.d_model,
                self.head_dim,
                mlp=self.mlp,
                rope=self.rope,
                tie_embeddings=self.tie_embeddings,
                **optional,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(kw_only=True)
class Config(TrainConfig, ModelShape):
    """Pretrain a hybrid Transformer/Mamba model on raw text."""

    input: list[str]
    """Text to learn from: .txt or .jsonl files (also .gz) or directories of them, separated by commas."""
    tokenizer: Path | None = None
    """Directory of the tokenizer; by default $NANOCHAT_BASE_DIR/tokenizer."""
    copy_warmup_steps: int = 0
    """Steps of copying random token sequences before the text; about 1M tokens for a model of a few million weights."""
    far_copy_warmup_steps: int = 0
    """Steps, after those, of copying from anywhere in the context by matching several tokens."""
    recall_warmup_steps: int = 0
    """Steps, after those, of answering with what followed a few tokens of the question in a document."""
    record_warmup_steps: int = 0
    """Steps, after those, of finding a document's number by its title, and a value by number and key."""
    text_lr_frac: float = 1.0
    """Scales the learning rates on text: a tiny model forgets its warm-up in a few steps at the full rate."""
    max_chars: int = -1
    """Read at most this many characters of text; -1: all."""
    eval_steps: int = 8
    """Batches of held-out text in one validation."""


def warmup_phases(config: Config, tokenizer: Tokenizer, model: HybridLM, rows: int) -> list[Phase]:
    """The exercises of nanochat/warmup.py, copying on the blocks up to the first attention that has one below it."""
    lookup_depth = model.config.block_pattern.find("T", 1) + 1 or None
    marks = Marks.of(tokenizer)
    exercises = [
        ("copy", copy_example, config.copy_warmup_steps, lookup_depth, 1.0),
        ("far copy", far_copy_example, config.far_copy_warmup_steps, lookup_depth, 1.0),
        ("recall", partial(recall_example, marks=marks), config.recall_warmup_steps, None, 1.0),
        ("records", partial(record_example, marks=marks), config.record_warmup_steps, None, 0.5),
    ]
    # ordinary tokens, and no more than enough: copying a vocabulary of 4,096 costs several times the steps of 1,024
    drawn = min(1024, len(tokenizer.token_bytes))
    return [
        Phase(name, WarmupBatches(example, drawn, config.max_seq_len, rows, config.seed), steps, depth, lr)
        for name, example, steps, depth, lr in exercises
        if steps
    ]


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    tokenizer = Tokenizer.load(config.tokenizer or get_base_dir() / "tokenizer")
    model = HybridLM(config.model_config(tokenizer.vocab_size))
    rows = rows_per_step(config, compute.world_size)
    splits = tokenize_texts(config.input, tokenizer, config.max_chars)
    texts = {
        name: PackedBatches(TokenData.from_text(ids, starts, config.max_seq_len), config.max_seq_len, rows, config.seed)
        for name, (ids, starts) in splits.items()
    }
    print0(f"text: {len(splits['train'][0]):,} tokens to train on, {len(splits['val'][0]):,} held out")
    text = texts["train"]
    steps = config.num_steps if config.num_steps >= 0 else round(config.num_epochs * text.steps_per_epoch())
    phases = [Phase("text", text, steps, lr=config.text_lr_frac)] if steps else []
    phases = warmup_phases(config, tokenizer, model, rows) + phases
    tag = config.model_tag or f"d{len(model.config.block_pattern)}"

    def evaluate() -> dict[str, float]:
        steps = min(config.eval_steps, texts["val"].steps_per_epoch())
        return {"val_loss": mean_loss(model, texts["val"], steps, config, compute)}

    train(model, tokenizer, phases, config, compute, checkpoint_root("base", tag), evaluate)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
