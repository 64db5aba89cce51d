"""Train the tokenizer on raw text (see nanochat/tokenizer.py) and say how well it packs text it has not seen.

    python -m scripts.tok_train --input data/documents.jsonl,data/articles --vocab_size 4096

It lands in $NANOCHAT_BASE_DIR/tokenizer, where the other scripts look for it. A model belongs to the tokenizer it was
trained with: with another one, its checkpoint is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.dataset import iter_texts
from nanochat.tokenizer import Tokenizer

HELD_OUT_EVERY = 20  # one text in twenty is not trained on
MAX_HELD_OUT_CHARS = 1_000_000


@dataclass
class TokTrainConfig:
    """Train a byte-pair tokenizer."""

    input: list[str]
    """Text to learn from: .txt or .jsonl files (also .gz) or directories of them, separated by commas."""
    vocab_size: int = 4096
    """Tokens in the vocabulary, the special ones included."""
    output: Path | None = None
    """Where to save it; by default $NANOCHAT_BASE_DIR/tokenizer."""
    max_chars: int = 2_000_000_000
    """Stop reading after this many characters."""


def main() -> None:
    config = load_config(TokTrainConfig)
    print0(format_config(config))
    if config.max_chars < 1:
        raise UserError(f"--max_chars {config.max_chars}: at least 1 character is needed")
    output = config.output or get_base_dir() / "tokenizer"
    started = time.perf_counter()

    held_out: list[str] = []
    trained_chars = 0

    def training_texts() -> Iterator[str]:
        """One pass over the input; what is held out is set aside on the way."""
        nonlocal trained_chars
        held_out_chars = 0
        for index, text in enumerate(iter_texts(config.input)):
            if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and held_out_chars < MAX_HELD_OUT_CHARS:
                held_out.append(text[: MAX_HELD_OUT_CHARS - held_out_chars])
                held_out_chars += len(held_out[-1])
                continue
            text = text[: config.max_chars - trained_chars]
            trained_chars += len(text)
            yield text
            if trained_chars >= config.max_chars:
                return

    tokenizer = Tokenizer.train(training_texts(), config.vocab_size)
    if not trained_chars:
        raise UserError(f"no text in {', '.join(config.input)}")
    tokenizer.save(output)
    seconds = time.perf_counter() - started

    specials = len(tokenizer.special_tokens)
    fewer = (
        "" if tokenizer.vocab_size == config.vocab_size else f", all that this text gives (asked: {config.vocab_size})"
    )
    print0(f"vocabulary: {tokenizer.vocab_size} tokens, {specials} of them special{fewer}")
    if held_out:
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in held_out)
        num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(held_out))
        print0(f"bytes per token on held-out text: {num_bytes / num_tokens:.3f} ({num_bytes} bytes)")
    else:
        print0(f"bytes per token: not measured, fewer than {HELD_OUT_EVERY} texts leave none to hold out")
    print0(f"trained on {trained_chars} characters in {seconds:.1f} seconds")
    print0(f"saved to {output} (fingerprint {tokenizer.fingerprint})")


if __name__ == "__main__":
    run_main(main)
