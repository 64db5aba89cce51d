"""Read back a model that scripts.export_hf wrote, after it was trained on elsewhere for example.

python -m scripts.import_hf --input my_model --source rag --model_tag mine
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from nanochat.checkpoint_manager import checkpoint_root, list_steps, save_checkpoint
from nanochat.common import UserError, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.hf_tokenizer import from_hf_tokenizer
from nanochat.model.hf import from_hf


@dataclass(kw_only=True)
class Config:
    """Import a model that was exported for transformers."""

    input: Path
    """Directory with config.json, model.safetensors and tokenizer.json."""
    model_tag: str
    """Name of the checkpoint folder to write; it must not hold a model yet."""
    source: str = "rag"
    """Stage it counts as: rag, mid or base."""


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    root = checkpoint_root(config.source, config.model_tag)
    if list_steps(root):
        raise UserError(f"{root} holds a model already: choose another --model_tag")
    try:
        settings = json.loads((config.input / "config.json").read_text(encoding="utf-8"))
        tensors = {}
        for file in sorted(config.input.glob("model*.safetensors")):
            tensors |= load_file(file)
        model = from_hf(settings, tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{config.input} is not a readable transformers model ({error!r})") from error
    tokenizer = from_hf_tokenizer(config.input)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{config.input}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    rows = {"max_seq_len": settings.get("max_position_embeddings", 2048)}
    written = save_checkpoint(root, 0, model, tokenizer, {"training_config": rows})
    print0(f"wrote {written}: {model.config.block_pattern}, {model.num_parameters() / 1e6:.2f}M parameters")


if __name__ == "__main__":
    run_main(main)
