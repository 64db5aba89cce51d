"""Write a model for transformers and vLLM: weights, config, tokenizer and chat template, with equal logits and ids.

    python -m scripts.export_hf --source rag --output my_model
    vllm serve my_model

relu2 without RoPE becomes NemotronH, swiglu GraniteMoeHybrid without experts; relu2 with RoPE has no counterpart.
scripts.import_hf reads it back.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.hf_tokenizer import to_hf_tokenizer
from nanochat.model.hf import target_of, to_hf


@dataclass(kw_only=True)
class Config:
    """Export a model for transformers and vLLM."""

    output: Path
    """Directory to write; it must not exist."""
    source: str = "rag"
    """Checkpoint to export: rag, mid or base."""
    model_tag: str = ""
    """Name of the model's checkpoint folder; by default the newest."""
    max_positions: int = 0
    """Longest context written in the config; 0: the length of the rows it was trained on."""


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    if config.output.exists():
        raise UserError(f"{config.output} exists: delete it, or choose another --output")
    model, tokenizer, meta = load_model(config.source, model_tag=config.model_tag)
    positions = config.max_positions or meta["training_config"]["max_seq_len"]
    theirs = to_hf(model, positions, tokenizer.special_id("<|bos|>"), tokenizer.special_id("<|assistant_end|>"))
    beside = config.output.with_name(f".{config.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    theirs.save_pretrained(beside)
    to_hf_tokenizer(tokenizer, positions).save_pretrained(beside)
    beside.rename(config.output)
    print0(f"wrote {config.output}: {target_of(model.config)}, {model.num_parameters() / 1e6:.2f}M parameters")
    if model.config.d_conv > 4:
        print0(
            f"note: a convolution of {model.config.d_conv} is wider than the kernels of causal-conv1d (and vLLM) take"
        )


if __name__ == "__main__":
    run_main(main)
