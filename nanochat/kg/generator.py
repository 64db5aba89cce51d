"""HybridLM as the generator of D-RAG: it reads facts, each a vector and its text, then a question, and writes answers.

nanochat/kg/hf_generator.py is the same for models of transformers. Shapes: B batch, L length, D model width, F facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kg.closed_answers import ClosedAnswer, likeliest
from nanochat.model.gates import GatedFacts
from nanochat.model.lm import IGNORE, HybridLM
from nanochat.tokenizer import Tokenizer


class LMGenerator:
    """width: D. end: the token that ends an answer."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.width = model.config.d_model
        self.end = tokenizer.special_id("<|assistant_end|>")
        special = tokenizer.special_id
        self._before = [special("<|bos|>"), special("<|retrieval_start|>")]
        self.fact_marks = [special("<|doc_start|>")], [special("<|doc_end|>")]
        self._asking = [special("<|retrieval_end|>"), special("<|user_start|>")]
        self._answering = [special("<|user_end|>"), special("<|assistant_start|>")]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, text: str) -> list[int]:
        """Ordinary text: no special token comes out of it."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed(ids)

    def frame(self, question: str) -> tuple[list[int], list[int]]:
        """What stands before the facts, and what stands between them and the answer."""
        return self._before, [*self._asking, *self.encode(question), *self._answering]

    def losses(self, embeds: Tensor, fact: Tensor, gate: Tensor | None, targets: Tensor, valid: Tensor) -> Tensor:
        """The mean loss of each row's answer (B,), in fp32; 0 for a row without one. embeds (B, L, D), padded on the
        right; fact (B, L): negative for text; gate (B, F), None: all facts are there; targets (B, L), -1 where nothing
        is learned; valid (B,): tokens of each row."""
        states = self.model(embeds=embeds, facts=GatedFacts(fact, gate, valid), states=True)
        learned = targets != IGNORE
        logits = self.model.lm_head(states[learned]).float()
        each = F.cross_entropy(logits, targets[learned], reduction="none")
        count = learned.sum(1)
        rows = learned.nonzero()[:, 0]
        return each.new_zeros(len(targets)).index_add_(0, rows, each) / count.clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        fact: Tensor,
        valid: Tensor,
        max_tokens: int,
        closed: Sequence[ClosedAnswer] | None = None,
    ) -> list[list[int]]:
        """The likeliest next tokens after each row until one ends the answer (it is left out). Facts that were not
        chosen are not in the rows. closed: what each row's answer may be."""
        cache = self.model.new_cache(len(embeds))
        logits = self.model(embeds=embeds, facts=GatedFacts(fact), cache=cache, valid=valid, last_only=True)
        made: list[list[int]] = [[] for _ in range(len(embeds))]
        going = list(range(len(embeds)))  # the cache's rows
        for step in range(max_tokens):
            ids = likeliest(logits, closed and [closed[row] for row in going])
            left = [at for at, token in enumerate(ids) if token != self.end]
            for at in left:
                made[going[at]].append(ids[at])
            if not left or step + 1 == max_tokens:
                break
            if len(left) < len(going):
                going = [going[at] for at in left]
                cache.arrange(left)
            tokens = torch.tensor([[ids[at]] for at in left], device=self.device)
            logits = self.model(tokens, cache=cache.rows(0, len(left), room=1), last_only=True)
        return made

    def train(self, on: bool = True) -> None:
        self.model.train(on)


def pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """(B, L of the longest)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)
