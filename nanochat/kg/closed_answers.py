"""Answers that can only be names: which tokens may come next, so that no name is miscopied or made up.

Source: Luo et al., "Graph-constrained Reasoning" (ICML 2025), whose trie holds paths of the graph; here it is the names
of the facts that are shown, few enough to be a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Names = tuple[tuple[int, ...], ...]


class ClosedAnswer:
    """One answer as it is written: a name, then separator and another name as often as there are names left, each once,
    then end."""

    def __init__(self, names: Iterable[Sequence[int]], separator: Sequence[int], end: int):
        """names, separator: token ids, none of them empty."""
        self._separator, self._end = tuple(separator), end
        self._open = self._names((), tuple(dict.fromkeys(map(tuple, names))))

    def _names(self, before: tuple[int, ...], names: Names) -> list[tuple[tuple[int, ...], Names | None]]:
        """What may be written from here, and which names are left behind it; None behind the end."""
        return [((*before, *name), tuple(other for other in names if other != name)) for name in names]

    def allowed(self) -> list[int]:
        """The tokens that may come next; none where anything may, for want of names."""
        return list(dict.fromkeys(rest[0] for rest, _ in self._open))

    def push(self, token: int) -> None:
        """token: one of those that are allowed."""
        going = [(rest[1:], left) for rest, left in self._open if rest[0] == token]
        self._open = [(rest, left) for rest, left in going if rest]
        for left in (left for rest, left in going if not rest and left is not None):
            self._open += [*self._names(self._separator, left), ((self._end,), None)]


def likeliest(logits: Tensor, answers: Sequence[ClosedAnswer] | None) -> list[int]:
    """The best next token of each row of logits (B, V), of those that its answer allows, which is told of it."""
    best = logits.argmax(-1).tolist()
    for row, answer in enumerate(answers or ()):
        if allowed := answer.allowed():
            best[row] = allowed[int(logits[row, torch.tensor(allowed, device=logits.device)].argmax())]
            answer.push(best[row])
    return best
