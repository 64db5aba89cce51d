"""Inference: prefill, batched decoding of rows of different length, streaming.

Rows are padded on the right and the padding leaves every state untouched, so a row's answer does not depend on the
rows beside it.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.conversation import answer_text, render_prompt
from nanochat.model.lm import HybridLM
from nanochat.tokenizer import Tokenizer


@dataclass
class Generation:
    """What came with an answer besides its text."""

    ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = "length"
    """"stop": the model ended its message; "length": max_tokens reached."""
    first_token_seconds: float = 0.0
    seconds: float = 0.0


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Next tokens (B,) from logits (B, V). temperature 0 takes the best."""
    if temperature < 0 or temperature != temperature:
        raise UserError(f"temperature {temperature} must be 0 (greedy) or more")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(max(1, top_k)).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)


class Engine:
    def __init__(self, model: HybridLM, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.special_id("<|assistant_end|>")

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        valid = torch.tensor([len(p) for p in prompts])
        tokens = torch.zeros(len(prompts), int(valid.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        return tokens.to(self.model.device), valid.to(self.model.device)

    @torch.inference_mode()
    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
    ) -> Iterator[list[int | None]]:
        """One list per step: the row's new token, or None once the row has ended."""
        if any(not p for p in prompts):
            raise UserError("a prompt is empty")
        self.model.eval()
        generator = torch.Generator(self.model.device).manual_seed(seed)
        tokens, valid = self._padded(prompts)
        rows = torch.arange(len(prompts))  # rows still running, as indices into prompts
        cache = self.model.new_cache(len(prompts))
        ragged = len(set(map(len, prompts))) > 1
        logits = self.model(tokens, cache=cache, valid=valid if ragged else None, last_only=True)
        for made in range(1, max_tokens + 1):
            chosen = sample(logits, temperature, top_k, generator)
            emitted: list[int | None] = [None] * len(prompts)
            for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
                emitted[row] = token
            yield emitted
            running = (chosen != self.end).nonzero().flatten()
            if not len(running) or made == max_tokens:
                return
            if len(running) < len(rows):  # ended rows leave the batch
                rows, chosen, cache = rows[running.cpu()], chosen[running], cache.select(running)
            logits = self.model(chosen.unsqueeze(-1), cache=cache, last_only=True)

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Stream the new tokens of one prompt; the end token is not among them."""
        for (token,) in self._decode([prompt], max_tokens, temperature, top_k, seed):
            if token == self.end:
                return
            yield token

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[list[int]]:
        """New tokens of each prompt, in the prompts' order. Prompts of similar length are run together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            for emitted in self._decode([prompts[i] for i in members], max_tokens, temperature, top_k, seed):
                for i, token in zip(members, emitted, strict=True):
                    if token is not None and token != self.end:
                        out[i].append(token)
        return out

    def stream_text(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as it becomes whole: bytes of a character split over tokens wait for the rest."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if text := decoder.decode(self.tokenizer.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def generate_from_conversation(
        self,
        conversation: dict,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        max_prompt_tokens: int | None = None,
        max_doc_tokens: int = 500,
    ) -> tuple[str, Generation]:
        """The assistant's answer to a conversation whose last message is not the assistant's, and how it came about."""
        prompt = render_prompt(conversation, self.tokenizer, max_prompt_tokens, max_doc_tokens)
        info = Generation(prompt_tokens=len(prompt))
        began = time.perf_counter()
        for (token,) in self._decode([prompt], max_tokens, temperature, top_k, seed):
            if not info.first_token_seconds:
                info.first_token_seconds = time.perf_counter() - began
            if token == self.end:
                info.finish_reason = "stop"
                break
            info.ids.append(token)
        info.seconds = time.perf_counter() - began
        return answer_text(info.ids, self.tokenizer), info
