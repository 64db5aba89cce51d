"""What many tests start from: a small real tokenizer and models small enough to train in a second."""

from __future__ import annotations

import os
from collections.abc import Callable

# Models this small gain nothing from more threads, and lose much where threads wait for each other on a busy machine.
# Set before torch is loaded, and for the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.tokenizer import Tokenizer

CORPUS = [
    "The old bridge over the river was built in 1987 by the town of Marrow.",
    "Each town has a river, a bridge and a mountain; the mountain is old.",
    "Ein Fluß, eine Brücke und ein Berg. 東京 🙂",
] * 5


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 320)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., HybridLM]:
    """make_model(vocab_size, pattern="MT", noise=0.05, **config): weights depend on the arguments alone."""

    def make(vocab_size: int, pattern: str = "MT", noise: float = 0.05, seed: int = 0, **overrides) -> HybridLM:
        torch.manual_seed(seed)
        shape = {"d_model": 32, "head_dim": 16, "d_state": 16, "mamba_head_dim": 16, **overrides}
        model = HybridLM(ModelConfig.from_depth(vocab_size, block_pattern=pattern, **shape))
        with torch.no_grad():  # the projections that start at zero would hide every mixer
            for p in model.parameters():
                p.add_(torch.randn_like(p) * noise)
        return model

    return make
