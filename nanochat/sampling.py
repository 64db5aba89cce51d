"""How the next token is chosen from the model's logits, and where an answer ends.

Top-k, top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et al. 2024, arXiv 2407.01082) and the repetition
penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858). Rows of a batch may have different settings, and each draws from
its own seed: what a row gets does not depend on the rows beside it.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one answer."""

    max_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Only the k likeliest tokens; None or 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are in the prompt or the answer become less likely."""
    stop: tuple[str, ...] = ()
    """The answer ends before any of these texts."""
    refusal_threshold: float | None = None
    """Say that the documents do not say where the model gives that at least this probability, and else not; None: as it
    writes. For models whose answers begin with a citation, so that the first token decides."""
    seed: int = 0
    """Same seed, same answer."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 (greedy) or more": 0 <= self.temperature < math.inf,
            "top_k must be 1 or more, or 0 for all": self.top_k is None or self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be from 0 to 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": 0 < self.repetition_penalty < math.inf,
            "refusal_threshold must be from 0 to 1": self.refusal_threshold is None or 0 <= self.refusal_threshold <= 1,
            "stop must be texts that are not empty": not isinstance(self.stop, str) and all(self.stop),
        }
        for meaning, holds in checks.items():
            if not holds:
                name = meaning.split()[0]
                raise UserError(f"{name} {getattr(self, name)!r}: {meaning}")


def sample(
    logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float], seen: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Next tokens (B,) from logits (B, V). draws: a number in [0, 1) for each row, where in the distribution to look.
    seen: each row's tokens so far, for the repetition penalty."""
    if seen is not None and any(s.repetition_penalty != 1 for s in settings):
        logits = logits.clone()
        for row, (s, ids) in enumerate(zip(settings, seen, strict=True)):
            if s.repetition_penalty != 1:
                at = torch.tensor(sorted(set(ids)), device=logits.device)
                old = logits[row, at]
                logits[row, at] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    chosen = logits.argmax(-1)
    drawn = [row for row, s in enumerate(settings) if s.temperature > 0]
    plain = [row for row in drawn if not settings[row].top_k and settings[row].top_p == 1 and settings[row].min_p == 0]
    cut = [row for row in drawn if row not in plain]
    V = logits.shape[-1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float64).unsqueeze(-1)

    def scaled(rows: Sequence[int]) -> Tensor:
        at = torch.tensor(rows, device=logits.device)
        return logits[at].double() / column([settings[row].temperature for row in rows])

    if plain:  # no need to sort, which takes as long as a small model's step
        chosen[plain] = _drawn(scaled(plain).softmax(-1), column([draws[row] for row in plain]))
    if cut:
        rows = [settings[row] for row in cut]
        ranked, order = scaled(cut).sort(descending=True, stable=True)
        within_k = torch.arange(V, device=logits.device) < column([s.top_k or V for s in rows])
        p = ranked.masked_fill(~within_k, -torch.inf).softmax(-1)
        # the first token whose predecessors reach top_p is out; the likeliest one always stays
        keep = (p.cumsum(-1) - p < column([s.top_p for s in rows])) & (p >= column([s.min_p for s in rows]) * p[:, :1])
        rank = _drawn(p * keep, column([draws[row] for row in cut]))
        chosen[cut] = order.gather(1, rank.unsqueeze(-1)).squeeze(-1)
    return chosen


def _drawn(weights: Tensor, where: Tensor) -> Tensor:
    """(B,) columns of weights (B, V), each as likely as its weight; where (B, 1) in [0, 1) picks it."""
    cumulative = weights.cumsum(-1)
    return (cumulative <= where * cumulative[:, -1:]).sum(-1).clamp_max(weights.shape[-1] - 1)


class TextStream:
    """Tokens to text as it becomes whole: bytes of a character split over tokens wait for the rest, and what may be
    the beginning of a stop text waits until it is decided. `text` is all that was given out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int | None) -> str:
        """The text that this token completes; None: no more tokens. Nothing more comes once `stopped` is set."""
        if self.stopped:
            return ""
        last = token is None
        self._held += self._decoder.decode(b"" if last else self._tokenizer.decode_bytes([token]), final=last)
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            wait = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - wait
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that a stop text begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
